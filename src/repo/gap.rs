//! A recorded gap: WAL that no region has and no server can send any more (invariant I7).

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::wal::{Lsn, TimelineId};

/// What a gap's object says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Format version.
    pub format: u32,
    /// The timeline.
    pub timeline: TimelineId,
    /// The first byte that is missing.
    pub from: Lsn,
    /// Behind the last byte that is missing.
    pub to: Lsn,
    /// When it was noticed.
    pub noticed: DateTime<Utc>,
    /// Why the WAL could not be had: the server's words.
    pub reason: String,
}
