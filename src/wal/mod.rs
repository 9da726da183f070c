//! Write-ahead log as PostgreSQL writes it: positions, segment names, timelines, pages and records.
//!
//! Pure: nothing here reads a file, a socket or a clock. Everything else in the crate that has to
//! decide something about WAL asks this module, so that each fact about PostgreSQL's format stands
//! in one place, next to the name of the PostgreSQL source file that it comes from.

mod lsn;
mod page;
mod record;
mod scanner;
mod segment;
mod timeline;

pub use lsn::{InvalidLsn, Lsn};
pub use page::{PageError, PageHeader, WAL_PAGE_SIZE, WalFormat};
pub use record::{Event, EventKind};
pub use scanner::{ScanSummary, Scanner};
pub use segment::{InvalidSegmentName, InvalidSegmentSize, SegmentName, SegmentNo, SegmentSize};
pub use timeline::{HistoryEntry, HistoryError, TimelineHistory, TimelineId};
