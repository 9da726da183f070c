//! Commit and abort records, read as they pass.
//!
//! Such a record may list a hundred thousand subtransactions and relation files. None of the lists
//! is held in memory: each item is used when its last byte has come, and counted.
//!
//! Main data (`ParseCommitRecord` in `src/backend/access/rmgrdesc/xactdesc.c`): the time, 8 bytes;
//! with `XLOG_XACT_HAS_INFO` the flags, 4 bytes, and then for each flag that is set, in this order:
//! ```text
//! DBINFO         database u32, tablespace u32
//! SUBXACTS       count, then u32 each
//! RELFILES       count, then tablespace, database, number, u32 each
//! DROPPED_STATS  count, then 12 bytes each (15 to 17) or 16 (18 on); bit 8, not there before 15
//! INVALS         count, then 16 bytes each
//! TWOPHASE       xid u32; more may follow
//! ```

use chrono::{DateTime, Utc};

use super::created::CreatedFiles;
use super::page::{u32_at, u64_at};
use super::record::{
    BLOCK_ID_DATA_LONG, BLOCK_ID_DATA_SHORT, BLOCK_ID_ORIGIN, BLOCK_ID_TOPLEVEL_XID, Truncated,
    time_from_postgres,
};
use super::{EventKind, RelationFile};

// src/include/access/xact.h
const XACT_OPERATION_MASK: u8 = 0x70;
const XACT_HAS_INFO: u8 = 0x80;
const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;
const XINFO_HAS_DBINFO: u32 = 1 << 0;
const XINFO_HAS_SUBXACTS: u32 = 1 << 1;
const XINFO_HAS_RELFILES: u32 = 1 << 2;
const XINFO_HAS_INVALS: u32 = 1 << 3;
const XINFO_HAS_TWOPHASE: u32 = 1 << 4;
const XINFO_HAS_DROPPED_STATS: u32 = 1 << 8;

/// How many of the removed files an event names; the others are counted.
const FILES_NAMED: usize = 16;
/// The longest item that is looked at.
const ITEM_LIMIT: usize = 12;

/// Whether a record of the transaction manager is one that [`TransactionReader`] reads.
pub(super) fn ends_transaction(info: u8) -> bool {
    matches!(
        info & XACT_OPERATION_MASK,
        XACT_COMMIT | XACT_ABORT | XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED
    )
}

/// What the next bytes are. The order is that of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// What a header in front of the main data is.
    HeaderId,
    Time,
    Flags,
    Database,
    SubtransactionCount,
    Subtransaction,
    FileCount,
    File,
    StatisticsCount,
    InvalidationCount,
    Twophase,
    /// Nothing else is looked at.
    End,
}

/// A commit or abort record of which some bytes have passed.
#[derive(Debug)]
pub(super) struct TransactionReader {
    xid: u32,
    info: u8,
    major: u32,
    part: Part,
    /// Items of the current list that have not come yet.
    left: u32,
    /// Bytes to pass over before the current part.
    skip: u64,
    item: [u8; ITEM_LIMIT],
    item_length: usize,
    flags: u32,
    time: i64,
    database: Option<u32>,
    twophase_xid: Option<u32>,
    created: u32,
    removed: u32,
    files: Vec<RelationFile>,
}

impl TransactionReader {
    pub(super) fn new(xid: u32, info: u8, major: u32) -> TransactionReader {
        TransactionReader {
            xid,
            info,
            major,
            part: Part::HeaderId,
            left: 0,
            skip: 0,
            item: [0; ITEM_LIMIT],
            item_length: 0,
            flags: 0,
            time: 0,
            database: None,
            twophase_xid: None,
            created: 0,
            removed: 0,
            files: Vec::new(),
        }
    }

    /// Reads the next bytes behind the record's fixed header. What the subtransactions created is
    /// taken out of `created`: they end with the record.
    pub(super) fn read(&mut self, mut bytes: &[u8], created: &mut CreatedFiles) {
        while self.part != Part::End && !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            bytes = &bytes[skipped as usize..];
            let take = (self.part.length() - self.item_length).min(bytes.len());
            let (now, later) = bytes.split_at(take);
            self.item[self.item_length..self.item_length + take].copy_from_slice(now);
            self.item_length += take;
            bytes = later;
            if self.skip == 0 && self.item_length == self.part.length() {
                self.item_length = 0;
                self.end_item(created);
            }
        }
    }

    fn end_item(&mut self, created: &mut CreatedFiles) {
        let number = |index: usize| u32_at(&self.item, 4 * index);
        match self.part {
            Part::HeaderId => {
                // The main data's header is the last one.
                (self.part, self.skip) = match self.item[0] {
                    BLOCK_ID_DATA_SHORT => (Part::Time, 1),
                    BLOCK_ID_DATA_LONG => (Part::Time, 4),
                    BLOCK_ID_ORIGIN => (Part::HeaderId, 2),
                    BLOCK_ID_TOPLEVEL_XID => (Part::HeaderId, 4),
                    // It refers to a block, which no such record does: never to be read.
                    _ => (Part::HeaderId, u64::MAX),
                };
                return;
            }
            Part::Time => {
                self.time = u64_at(&self.item, 0) as i64;
                let has_flags = self.info & XACT_HAS_INFO != 0;
                self.part = if has_flags { Part::Flags } else { Part::End };
                return;
            }
            Part::Flags => self.flags = number(0),
            Part::Database => self.database = Some(number(0)),
            Part::SubtransactionCount | Part::FileCount => self.left = number(0),
            Part::Subtransaction => {
                self.created = self.created.saturating_add(created.take(number(0)));
                self.left -= 1;
            }
            Part::File => {
                if self.files.len() < FILES_NAMED {
                    let (tablespace, database, number) = (number(0), number(1), number(2));
                    self.files.push(RelationFile { tablespace, database, number });
                }
                self.removed += 1;
                self.left -= 1;
            }
            Part::StatisticsCount => {
                let entry = if self.major >= 18 { 16 } else { 12 };
                self.skip = entry * u64::from(number(0));
            }
            Part::InvalidationCount => self.skip = 16 * u64::from(number(0)),
            Part::Twophase => self.twophase_xid = Some(number(0)),
            Part::End => {}
        }
        self.part = self.following();
    }

    /// The part behind the current one, which has ended.
    fn following(&self) -> Part {
        match self.part {
            Part::SubtransactionCount | Part::Subtransaction if self.left > 0 => {
                return Part::Subtransaction;
            }
            Part::FileCount | Part::File if self.left > 0 => return Part::File,
            _ => {}
        }
        let optional = [
            (XINFO_HAS_DBINFO, Part::Database),
            (XINFO_HAS_SUBXACTS, Part::SubtransactionCount),
            (XINFO_HAS_RELFILES, Part::FileCount),
            (XINFO_HAS_DROPPED_STATS, Part::StatisticsCount),
            (XINFO_HAS_INVALS, Part::InvalidationCount),
            (XINFO_HAS_TWOPHASE, Part::Twophase),
        ];
        let next = optional.iter().find(|(flag, part)| self.flags & flag != 0 && *part > self.part);
        next.map_or(Part::End, |(_, part)| *part)
    }

    /// What the record says, once it has passed whole.
    pub(super) fn finish(
        self,
        created: &mut CreatedFiles,
        on_event: &mut dyn FnMut(EventKind),
    ) -> Result<(), Truncated> {
        match self.part {
            Part::End => {}
            Part::HeaderId => return Err(Truncated("main data")),
            Part::Time => return Err(Truncated("time")),
            _ => return Err(Truncated("transaction data")),
        }
        let time: DateTime<Utc> = time_from_postgres(self.time);
        // A prepared transaction is ended by another backend: its own xid stands inside.
        let xid = self.twophase_xid.unwrap_or(self.xid);
        let created = self.created.saturating_add(created.take(xid));
        let operation = self.info & XACT_OPERATION_MASK;
        if !matches!(operation, XACT_COMMIT | XACT_COMMIT_PREPARED) {
            // Files that an abort removes are those that the transaction itself created.
            on_event(EventKind::Abort { xid, time });
            return Ok(());
        }
        on_event(EventKind::Commit { xid, time });
        if let Some(first) = self.files.first() {
            let database = self.database.unwrap_or(first.database);
            let (removed, files) = (self.removed, self.files);
            on_event(EventKind::FilesRemoved { xid, time, database, removed, created, files });
        }
        Ok(())
    }
}

impl Part {
    /// How many bytes it has.
    fn length(self) -> usize {
        match self {
            Part::HeaderId => 1,
            Part::Time | Part::Database => 8,
            Part::File => 12,
            Part::End => 0,
            _ => 4,
        }
    }
}
