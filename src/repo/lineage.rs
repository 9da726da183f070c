//! `lineage.json`: whose archive lies under a prefix. Always the same bytes for one lineage, so
//! that two archivers that write it at once write the same.

use serde::{Deserialize, Serialize};

use crate::wal::SegmentSize;

/// The version of all formats in this crate that a reader must know.
pub const FORMAT_VERSION: u32 = 1;

/// What a lineage is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// [`FORMAT_VERSION`] of the writer.
    pub format: u32,
    /// The cluster's name in the configuration.
    pub cluster: String,
    /// The system identifier; text, because many JSON readers round numbers of this size.
    pub system_identifier: String,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// The cluster's segment size in bytes.
    pub wal_segment_size: SegmentSize,
}

impl Lineage {
    /// The bytes of `lineage.json`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// The system identifier as a number; 0 when the text is none.
    pub fn system_id(&self) -> u64 {
        self.system_identifier.parse().unwrap_or(0)
    }
}
