//! The few WAL records that the archive must understand.
//!
//! A record is a header of 24 bytes, then block and data headers, then data
//! (`src/include/access/xlogrecord.h`):
//! ```text
//!  0  xl_tot_len u32 · 4 xl_xid u32 · 8 xl_prev u64 · 16 xl_info u8 · 17 xl_rmid u8 · 20 xl_crc u32
//! ```
//! `xl_crc` is CRC-32C over everything after the header, then over the header up to `xl_crc`.

use chrono::{DateTime, Duration, Utc};
use serde::{Deserialize, Serialize};

use super::Lsn;
use super::page::{u32_at, u64_at};

/// Length of a record's fixed header.
pub(super) const RECORD_HEADER: usize = 24;
/// Where `xl_crc` stands in it.
pub(super) const CRC_OFFSET: usize = 20;

const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;

// src/include/catalog/pg_control.h
const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;

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

// src/include/access/xlogrecord.h
const BLOCK_ID_DATA_SHORT: u8 = 255;
const BLOCK_ID_DATA_LONG: u8 = 254;
const BLOCK_ID_ORIGIN: u8 = 253;
const BLOCK_ID_TOPLEVEL_XID: u8 = 252;

/// `MAXFNAMELEN`, the room for a restore point's name.
const RESTORE_POINT_NAME: usize = 64;

/// Something that a WAL record says, with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Where the record begins.
    pub lsn: Lsn,
    /// Where the next record begins, at the earliest. A recovery that has replayed up to here has
    /// seen the event.
    pub end_lsn: Lsn,
    /// What it says.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The kinds of events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A transaction committed (a prepared one too).
    Commit {
        /// Its top-level transaction identifier.
        xid: u32,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A transaction was rolled back.
    Abort {
        /// Its top-level transaction identifier.
        xid: u32,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// Its name.
        name: String,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A checkpoint was completed.
    Checkpoint {
        /// Where a recovery from it starts to replay.
        redo: Lsn,
        /// It was the checkpoint of a clean shutdown.
        shutdown: bool,
    },
    /// A promotion: the first record of a new timeline.
    EndOfRecovery {
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// Something that a newer pgkeep noted.
    #[serde(other)]
    Unknown,
}

/// Why a record could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its {0} lies outside of it")]
pub(super) struct Truncated(&'static str);

/// Microseconds since 2000-01-01 UTC, PostgreSQL's `TimestampTz`. Values that chrono cannot hold
/// become its limits.
pub(super) fn time_from_postgres(microseconds: i64) -> DateTime<Utc> {
    let epoch = DateTime::<Utc>::UNIX_EPOCH + Duration::seconds(946_684_800);
    let limit = if microseconds < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    epoch.checked_add_signed(Duration::microseconds(microseconds)).unwrap_or(limit)
}

/// Whether the record's body has to be kept for [`decode`]. `header` holds its first 24 bytes.
pub(super) fn is_wanted(header: &[u8]) -> bool {
    let (info, rmgr) = (header[16], header[17]);
    match rmgr {
        RM_XACT => matches!(
            info & XACT_OPERATION_MASK,
            XACT_COMMIT | XACT_ABORT | XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED
        ),
        RM_XLOG => matches!(
            info & 0xF0,
            XLOG_CHECKPOINT_SHUTDOWN
                | XLOG_CHECKPOINT_ONLINE
                | XLOG_RESTORE_POINT
                | XLOG_END_OF_RECOVERY
        ),
        _ => false,
    }
}

/// Whether the record ends its segment: what follows it up to the boundary is padding.
pub(super) fn is_switch(header: &[u8]) -> bool {
    header[17] == RM_XLOG && header[16] & 0xF0 == XLOG_SWITCH
}

/// Reads a wanted record. `record` is the record from its header on, cut off at the scanner's
/// capture limit.
pub(super) fn decode(record: &[u8], major: u32) -> Result<EventKind, Truncated> {
    let (xid, info, rmgr) = (u32_at(record, 4), record[16], record[17]);
    let data = main_data(record)?;
    if rmgr == RM_XACT {
        return decode_transaction(xid, info, data, major);
    }
    let time = |offset: usize| {
        let bytes = data.get(offset..offset + 8).ok_or(Truncated("time"))?;
        Ok(time_from_postgres(u64_at(bytes, 0) as i64))
    };
    Ok(match info & 0xF0 {
        XLOG_RESTORE_POINT => {
            let name = data.get(8..).ok_or(Truncated("name"))?;
            let name = &name[..name.len().min(RESTORE_POINT_NAME)];
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            EventKind::RestorePoint { name, time: time(0)? }
        }
        XLOG_END_OF_RECOVERY => EventKind::EndOfRecovery { time: time(0)? },
        kind => EventKind::Checkpoint {
            redo: Lsn(u64_at(data.get(..8).ok_or(Truncated("redo pointer"))?, 0)),
            shutdown: kind == XLOG_CHECKPOINT_SHUTDOWN,
        },
    })
}

/// The main data of a record whose block headers, if any, carry no blocks: true for all wanted
/// kinds.
fn main_data(record: &[u8]) -> Result<&[u8], Truncated> {
    let mut rest = &record[RECORD_HEADER..];
    loop {
        let (id, after) = rest.split_first().ok_or(Truncated("data header"))?;
        let header_length = match *id {
            BLOCK_ID_DATA_SHORT => return after.get(1..).ok_or(Truncated("data header")),
            BLOCK_ID_DATA_LONG => return after.get(4..).ok_or(Truncated("data header")),
            BLOCK_ID_ORIGIN => 2,
            BLOCK_ID_TOPLEVEL_XID => 4,
            _ => return Err(Truncated("main data (it refers to blocks)")),
        };
        rest = after.get(header_length..).ok_or(Truncated("data header"))?;
    }
}

fn decode_transaction(xid: u32, info: u8, data: &[u8], major: u32) -> Result<EventKind, Truncated> {
    let time = data.get(..8).ok_or(Truncated("time"))?;
    let time = time_from_postgres(u64_at(time, 0) as i64);
    let operation = info & XACT_OPERATION_MASK;
    let prepared = matches!(operation, XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED);
    // A prepared transaction is ended by another backend: its own xid stands inside.
    let xid = if prepared && info & XACT_HAS_INFO != 0 {
        // Behind very many subtransactions or invalidations it lies outside what was captured.
        prepared_xid(operation, &data[8..], major).ok().flatten().unwrap_or(xid)
    } else {
        xid
    };
    Ok(match operation {
        XACT_COMMIT | XACT_COMMIT_PREPARED => EventKind::Commit { xid, time },
        _ => EventKind::Abort { xid, time },
    })
}

/// Steps over the optional parts of a commit or abort record up to `xl_xact_twophase`
/// (`ParseCommitRecord` in `src/backend/access/rmgrdesc/xactdesc.c`).
fn prepared_xid(operation: u8, data: &[u8], major: u32) -> Result<Option<u32>, Truncated> {
    let mut at = 0;
    let number = |at: usize| {
        data.get(at..at + 4).map(|bytes| u32_at(bytes, 0)).ok_or(Truncated("transaction data"))
    };
    let flags = number(at)?;
    at += 4;
    if flags & XINFO_HAS_TWOPHASE == 0 {
        return Ok(None);
    }
    if flags & XINFO_HAS_DBINFO != 0 {
        at += 8;
    }
    // Each list is a count, then its entries: subtransactions 4 bytes, relation files 12,
    // dropped statistics 12 (15 to 17) or 16 (18 on), invalidation messages 16.
    if flags & XINFO_HAS_SUBXACTS != 0 {
        at += 4 + 4 * number(at)? as usize;
    }
    if flags & XINFO_HAS_RELFILES != 0 {
        at += 4 + 12 * number(at)? as usize;
    }
    if flags & XINFO_HAS_DROPPED_STATS != 0 {
        let entry = if major >= 18 { 16 } else { 12 };
        at += 4 + entry * number(at)? as usize;
    }
    if operation == XACT_COMMIT_PREPARED && flags & XINFO_HAS_INVALS != 0 {
        at += 4 + 16 * number(at)? as usize;
    }
    number(at).map(Some)
}
