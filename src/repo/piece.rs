//! The metadata of a WAL piece: it makes the archive its own index.

use serde::{Deserialize, Serialize};

use super::ContentHash;
use crate::wal::{Lsn, ScanSummary, SegmentSize, TimelineId};

/// What the metadata frame of a piece says, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PieceMeta {
    /// Format version.
    pub format: u32,
    /// Whose WAL it is; text, because many JSON readers round numbers of this size.
    pub system_identifier: String,
    /// The timeline that it was streamed from.
    pub timeline: TimelineId,
    /// The first byte.
    pub start: Lsn,
    /// Behind the last byte.
    pub end: Lsn,
    /// The cluster's segment size in bytes.
    pub wal_segment_size: SegmentSize,
    /// The whole hash of the raw content.
    pub hash: ContentHash,
    /// What the WAL in it says.
    pub wal: ScanSummary,
}
