//! The few WAL records that the archive must understand.
//!
//! A record is a header of 24 bytes, then block and data headers, then data
//! (`src/include/access/xlogrecord.h`):
//! ```text
//!  0  xl_tot_len u32 · 4 xl_xid u32 · 8 xl_prev u64 · 16 xl_info u8 · 17 xl_rmid u8 · 20 xl_crc u32
//! ```
//! `xl_crc` is CRC-32C over everything after the header, then over the header up to `xl_crc`.

use chrono::{DateTime, Utc};

use super::page::{u32_at, u64_at};
use super::transaction::ends_transaction;
use super::{EventKind, Lsn, TimelineId};

/// Length of a record's fixed header.
pub(super) const RECORD_HEADER: usize = 24;
/// Where `xl_crc` stands in it.
pub(super) const CRC_OFFSET: usize = 20;

const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_SMGR: u8 = 2;
const RM_DBASE: u8 = 4;
/// The upper half of `xl_info` belongs to the resource manager (`XLR_INFO_MASK`).
const OPERATION_MASK: u8 = 0xF0;

// src/include/catalog/pg_control.h
const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;

// src/include/catalog/storage_xlog.h, src/include/common/relpath.h
const XLOG_SMGR_CREATE: u8 = 0x10;
const MAIN_FORK: u32 = 0;
const INIT_FORK: u32 = 3;

// src/include/commands/dbcommands_xlog.h: 13 and 14 have but one way to create.
const XLOG_DBASE_CREATE_FILE_COPY: u8 = 0x00;
const XLOG_DBASE_CREATE_WAL_LOG: u8 = 0x10;
const XLOG_DBASE_DROP: u8 = 0x20;
const XLOG_DBASE_DROP_14: u8 = 0x10;

// src/include/access/xlogrecord.h
pub(super) const BLOCK_ID_DATA_SHORT: u8 = 255;
pub(super) const BLOCK_ID_DATA_LONG: u8 = 254;
pub(super) const BLOCK_ID_ORIGIN: u8 = 253;
pub(super) const BLOCK_ID_TOPLEVEL_XID: u8 = 252;

/// PostgreSQL's epoch, 2000-01-01 UTC, in Unix time.
const EPOCH_MICROSECONDS: i64 = 946_684_800_000_000;
/// `MAXFNAMELEN`, the room for a restore point's name.
const RESTORE_POINT_NAME: usize = 64;
/// How many of a dropped database's tablespaces an event names.
const TABLESPACES_NAMED: usize = 16;

/// What the fixed header of a record says, with its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where the record begins.
    pub lsn: Lsn,
    /// `xl_tot_len`: header, data and all, without page headers in between.
    pub length: u32,
    /// `xl_xid`: the (sub)transaction, or 0.
    pub xid: u32,
    /// `xl_prev`: where the record before begins.
    pub previous: Lsn,
    /// `xl_info`.
    pub info: u8,
    /// `xl_rmid`: the resource manager.
    pub resource_manager: u8,
    /// `xl_crc`.
    pub crc: u32,
}

/// What has to be done with a record's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// Nothing but its CRC.
    None,
    /// A commit or abort, for [`super::transaction::TransactionReader`].
    Transaction,
    /// To be kept, as far as the scanner's limit goes, for [`decode`].
    Whole,
}

/// Why a record could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its {0} lies outside of it")]
pub(super) struct Truncated(pub(super) &'static str);

/// Microseconds since 2000-01-01 UTC, PostgreSQL's `TimestampTz`. Values that chrono cannot hold
/// become its limits.
pub(super) fn time_from_postgres(microseconds: i64) -> DateTime<Utc> {
    let limit = if microseconds < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    let since_1970 = microseconds.checked_add(EPOCH_MICROSECONDS);
    since_1970.and_then(DateTime::from_timestamp_micros).unwrap_or(limit)
}

/// What [`decode`] finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    /// An event.
    Event(EventKind),
    /// A checkpoint or an end of recovery that begins a timeline: two events.
    Switch(EventKind, EventKind),
    /// A relation file was created in the transaction of the record.
    CreatedFile,
    /// Nothing that matters.
    Nothing,
}

impl Record {
    /// Reads the fixed header, 24 bytes.
    #[inline]
    pub(super) fn parse(header: &[u8], lsn: Lsn) -> Record {
        Record {
            lsn,
            length: u32_at(header, 0),
            xid: u32_at(header, 4),
            previous: Lsn(u64_at(header, 8)),
            info: header[16],
            resource_manager: header[17],
            crc: u32_at(header, CRC_OFFSET),
        }
    }

    #[inline]
    pub(super) fn interest(&self) -> Interest {
        let operation = self.info & OPERATION_MASK;
        let whole = match self.resource_manager {
            RM_XACT if ends_transaction(self.info) => return Interest::Transaction,
            RM_XLOG => matches!(
                operation,
                XLOG_CHECKPOINT_SHUTDOWN
                    | XLOG_CHECKPOINT_ONLINE
                    | XLOG_RESTORE_POINT
                    | XLOG_END_OF_RECOVERY
            ),
            RM_SMGR => operation == XLOG_SMGR_CREATE,
            RM_DBASE => true,
            _ => false,
        };
        if whole { Interest::Whole } else { Interest::None }
    }

    /// Whether the record ends its segment: what follows it up to the boundary is padding.
    #[inline]
    pub(super) fn is_switch(&self) -> bool {
        self.resource_manager == RM_XLOG && self.info & OPERATION_MASK == XLOG_SWITCH
    }
}

/// Reads a record of [`Interest::Whole`]. `body` is what follows its fixed header, cut off at the
/// scanner's limit.
pub(super) fn decode(record: &Record, body: &[u8], major: u32) -> Result<Decoded, Truncated> {
    let operation = record.info & OPERATION_MASK;
    let data = Data(main_data(body)?);
    match record.resource_manager {
        RM_SMGR => match data.u32_at(12, "fork")? {
            // Relations that are not logged have no main fork in the WAL, but an init fork.
            MAIN_FORK | INIT_FORK => Ok(Decoded::CreatedFile),
            _ => Ok(Decoded::Nothing),
        },
        RM_DBASE => decode_database(record.xid, operation, data, major),
        _ => decode_xlog(operation, data),
    }
}

fn decode_xlog(operation: u8, data: Data<'_>) -> Result<Decoded, Truncated> {
    let event = match operation {
        XLOG_RESTORE_POINT => {
            let name = data.0.get(8..).ok_or(Truncated("name"))?;
            let name = &name[..name.len().min(RESTORE_POINT_NAME)];
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            return Ok(Decoded::Event(EventKind::RestorePoint { name, time: data.time()? }));
        }
        XLOG_END_OF_RECOVERY => EventKind::EndOfRecovery { time: data.time()? },
        operation => EventKind::Checkpoint {
            redo: Lsn(data.u64_at(0, "redo pointer")?),
            shutdown: operation == XLOG_CHECKPOINT_SHUTDOWN,
        },
    };
    // Both kinds have the timelines at the same place.
    let timeline = TimelineId(data.u32_at(8, "timeline")?);
    let previous = TimelineId(data.u32_at(12, "timeline")?);
    if timeline == previous {
        return Ok(Decoded::Event(event));
    }
    Ok(Decoded::Switch(event, EventKind::TimelineSwitch { timeline, previous }))
}

fn decode_database(
    xid: u32,
    operation: u8,
    data: Data<'_>,
    major: u32,
) -> Result<Decoded, Truncated> {
    let database = data.u32_at(0, "database")?;
    let drop = if major < 15 { XLOG_DBASE_DROP_14 } else { XLOG_DBASE_DROP };
    Ok(Decoded::Event(if operation == drop {
        let count = data.u32_at(4, "tablespaces")? as usize;
        let named =
            (0..count.min(TABLESPACES_NAMED)).map(|at| data.u32_at(8 + 4 * at, "tablespaces"));
        let tablespaces = named.collect::<Result<_, _>>()?;
        EventKind::DatabaseDropped { xid, database, tablespaces }
    } else if matches!(operation, XLOG_DBASE_CREATE_FILE_COPY | XLOG_DBASE_CREATE_WAL_LOG) {
        let tablespace = data.u32_at(4, "tablespace")?;
        let copied = operation == XLOG_DBASE_CREATE_FILE_COPY;
        let template = if copied { Some(data.u32_at(8, "template")?) } else { None };
        EventKind::DatabaseCreated { xid, database, tablespace, template }
    } else {
        return Ok(Decoded::Nothing);
    }))
}

/// The main data of a record.
#[derive(Clone, Copy)]
struct Data<'a>(&'a [u8]);

impl Data<'_> {
    fn u32_at(&self, offset: usize, what: &'static str) -> Result<u32, Truncated> {
        self.0.get(offset..offset + 4).map(|bytes| u32_at(bytes, 0)).ok_or(Truncated(what))
    }

    fn u64_at(&self, offset: usize, what: &'static str) -> Result<u64, Truncated> {
        self.0.get(offset..offset + 8).map(|bytes| u64_at(bytes, 0)).ok_or(Truncated(what))
    }

    fn time(&self) -> Result<DateTime<Utc>, Truncated> {
        self.u64_at(0, "time").map(|time| time_from_postgres(time as i64))
    }
}

/// The main data of a record whose block headers, if any, carry no blocks: true for all wanted
/// kinds.
fn main_data(body: &[u8]) -> Result<&[u8], Truncated> {
    let mut rest = body;
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
