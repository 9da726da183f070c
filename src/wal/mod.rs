//! Write-ahead log as PostgreSQL writes it: positions, segment names, timelines, pages and records.
//!
//! Pure: nothing here reads a file, a socket or a clock. Everything else in the crate that has to
//! decide something about WAL asks this module, so that each fact about PostgreSQL's format stands
//! in one place, next to the name of the PostgreSQL source file that it comes from.

mod created;
mod event;
mod lsn;
#[cfg(test)]
mod made_up;
mod page;
mod record;
mod scanner;
mod segment;
mod summary;
mod timeline;
mod transaction;

pub use event::{Event, EventKind, InvalidRelationFile, RelationFile};
pub use lsn::{InvalidLsn, Lsn};
pub use page::{PageError, PageHeader, WAL_PAGE_SIZE, WalFormat};
pub use record::Record;
pub use scanner::Scanner;
pub use segment::{InvalidSegmentName, InvalidSegmentSize, SegmentName, SegmentNo, SegmentSize};
pub use summary::ScanSummary;
pub use timeline::{HistoryEntry, HistoryError, TimelineHistory, TimelineId};
