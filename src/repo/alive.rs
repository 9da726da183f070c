//! `alive/<archiver>.json`: an archiver's last word, so that a quiet spell differs from a dead
//! archiver. The only objects that are overwritten; no restore's correctness depends on them.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::wal::{Lsn, TimelineId};

/// What an archiver last said of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// Format version.
    pub format: u32,
    /// Who: host and slot.
    pub archiver: String,
    /// The server's clock when it said so.
    pub server_time: DateTime<Utc>,
    /// The timeline being archived.
    pub timeline: TimelineId,
    /// The end of the server's WAL at that time.
    pub wal_end: Lsn,
    /// What the durability policy made of the regions.
    pub durable_lsn: Lsn,
    /// The server's version, as `server_version` prints it.
    pub server_version: String,
    /// How each region stood.
    pub regions: Vec<RegionWord>,
}

/// One region in an archiver's last word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionWord {
    /// The region's name.
    pub name: String,
    /// `healthy`, `lagging`, `repairing` or `unreachable`.
    pub state: String,
    /// Its frontier.
    pub archived_lsn: Option<Lsn>,
}
