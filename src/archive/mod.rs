//! The WAL archiver: streams from the server, cuts pieces, brings them into every region.
//!
//! ```text
//! receiver ──► cutter ──► compression pool ──► backlog ──► one uploader a region
//!     ▲                                                          │
//!     └──────────── durable LSN, the only flush reported ◄───────┘
//! ```
//! There is no local state: after a lost connection, a restart or `kill -9` the archive's own
//! frontier says where to go on ([`start`]).

mod alive;
mod backlog;
mod companions;
mod connect;
mod cutter;
mod durability;
mod gap;
mod memory;
mod piece;
mod pipeline;
mod receiver;
mod session;
mod start;
mod state;
mod supervisor;
mod timelines;
mod uploader;

use std::time::Duration;

use crate::config::{Durability, WalConfig};
use crate::pg::PgError;
use crate::store::StoreError;
use crate::wal::{Lsn, PageError, TimelineId};

use pipeline::Overlap;

pub use alive::archiver_name;
pub use durability::{Hold, HoldLimits, durable_lsn};
pub use state::{ArchiveReport, ArchiveState, RegionHealth, RegionReport};
pub use supervisor::Archiver;

/// How the archiver works.
#[derive(Clone, Debug)]
pub struct ArchiveSettings {
    /// The cluster's name.
    pub cluster: String,
    /// The replication slot.
    pub slot: String,
    /// Whether a standby may be archived from.
    pub allow_standby: bool,
    /// How old WAL may get before it is stored; zero: continuously.
    pub flush_interval: Duration,
    /// When WAL counts as safe.
    pub durability: Durability,
    /// What a policy that waits for several regions may make the slot hold.
    pub max_hold: HoldLimits,
    /// zstd's level.
    pub compression_level: i32,
    /// Memory for WAL on its way, in bytes.
    pub memory_limit: u64,
    /// How often the archiver says that it is alive.
    pub alive_interval: Duration,
    /// Accept a cluster with another system identifier than the archive's.
    pub new_lineage: bool,
    /// Regions that may be filled although they are empty and others are not.
    pub new_regions: Vec<String>,
    /// Archive a server that takes writes on an older timeline than the archive's newest.
    pub accept_timeline: bool,
}

impl ArchiveSettings {
    /// Settings from the configuration.
    pub fn new(cluster: &crate::config::ClusterConfig, wal: &WalConfig) -> ArchiveSettings {
        ArchiveSettings {
            cluster: cluster.name.clone(),
            slot: cluster.slot.clone(),
            allow_standby: cluster.allow_standby,
            flush_interval: wal.flush_interval.0,
            durability: wal.durability,
            max_hold: HoldLimits { bytes: wal.max_hold_bytes.0, time: wal.max_hold_time.0 },
            compression_level: wal.compression_level,
            memory_limit: wal.memory_limit.0,
            alive_interval: wal.alive_interval.0,
            new_lineage: false,
            new_regions: Vec::new(),
            accept_timeline: false,
        }
    }
}

/// Why archiving stopped.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The server.
    #[error(transparent)]
    Server(#[from] PgError),
    /// No region can be read.
    #[error("no region can be read: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoRegion(Vec<StoreError>),
    /// A region that cannot be done without.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server is a standby.
    #[error(
        "{0} is a standby; set cluster.allow_standby = true to archive from it, or target_session_attrs=read-write in conninfo to find the primary"
    )]
    Standby(String),
    /// The archive belongs to another cluster.
    #[error(
        "the archive {cluster:?} in region {region} belongs to system identifier {found}, the server has {server}. If this is the same database after pg_upgrade or a new initdb, start once with --new-lineage; if it is another one, give it another cluster.name"
    )]
    Foreign {
        /// The cluster's name.
        cluster: String,
        /// A region where it was found.
        region: String,
        /// The system identifiers there.
        found: String,
        /// The server's.
        server: u64,
    },
    /// The server's WAL is not the archive's.
    #[error(
        "the server's WAL differs from the archive's on timeline {timeline}: {problem}. This server is a clone, or was restored without getting a timeline of its own, or lost WAL; nothing was overwritten"
    )]
    Diverged {
        /// The timeline.
        timeline: TimelineId,
        /// Where, and how it was seen.
        problem: String,
    },
    /// The server sends what cannot be its WAL.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The last WAL of the archive is gone from the server.
    #[error(
        "the server has no WAL before {0} any more that could be compared with the archive's; going on without"
    )]
    NoOverlap(Lsn),
    /// WAL that was damaged on its way, or on the server.
    #[error(
        "WAL from the server on timeline {timeline} is damaged ({damage}); asking for it again"
    )]
    DamagedWal {
        /// The timeline.
        timeline: TimelineId,
        /// What is wrong with it.
        damage: String,
    },
    /// PostgreSQL of a version that is not known.
    #[error("PostgreSQL {0} is not supported; 13 to 18 are")]
    UnknownVersion(String),
    /// WAL that the server does not have any more.
    #[error(
        "the server has removed WAL that the archive lacks, from {from} on timeline {timeline}"
    )]
    Removed {
        /// The timeline.
        timeline: TimelineId,
        /// The first byte that is missing.
        from: Lsn,
    },
    /// The system.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

impl ArchiveError {
    /// Whether it may pass by itself.
    pub fn is_transient(&self) -> bool {
        match self {
            ArchiveError::Server(error) => error.is_transient(),
            ArchiveError::NoRegion(_)
            | ArchiveError::Store(_)
            | ArchiveError::Standby(_)
            | ArchiveError::Removed { .. }
            | ArchiveError::NoOverlap(_)
            | ArchiveError::DamagedWal { .. }
            | ArchiveError::Io(_) => true,
            ArchiveError::Foreign { .. }
            | ArchiveError::Diverged { .. }
            | ArchiveError::Page(_)
            | ArchiveError::UnknownVersion(_) => false,
        }
    }

    /// Whether another archiver holds the slot (`ERRCODE_OBJECT_IN_USE`).
    pub fn is_slot_in_use(&self) -> bool {
        matches!(self, ArchiveError::Server(error) if error.code() == Some("55006"))
    }

    /// Whether two histories, or two clusters, met.
    pub fn is_divergence(&self) -> bool {
        matches!(self, ArchiveError::Foreign { .. } | ArchiveError::Diverged { .. })
    }
}
