//! Base backups: one BASE_BACKUP stream, read once, written to every region.
//!
//! ```text
//! server ──► tar ──► packer ──► compression pool ──► packs ──► fan-out ──► one upload a region
//! ```
//! Data first, then `files.idx`, and `backup.json` last, in each region only once the WAL from the
//! backup's start to its stop is there: a crash at any point leaves nothing that counts as a backup
//! (invariant I3).

mod after_gap;
mod base;
mod clear;
mod fanout;
mod include;
mod incremental;
mod lease;
mod packer;
mod packs;
mod parent;
mod parent_file;
mod publish;
mod receive;
mod records;
mod schedule;
mod take;
mod tar;
mod turn;
mod wal;

use std::time::Duration;

use crate::archive::ArchiveError;
use crate::pg::PgError;
use crate::repo::{BackupInfo, BackupLabel};
use crate::store::{ReadError, StoreError};

pub use crate::progress::Progress;
pub use crate::repo::BackupType;
pub use after_gap::back_up_after_gaps;
pub use include::{CaptureError, Survey, survey};
pub use schedule::{Done, Due, Schedules, keep_schedule};
pub use take::{BackupRequest, take_backup};
pub use tar::{TarEntry, TarError, TarEvent, TarKind, TarReader};
pub use turn::{Attempt, BackupTurns};

/// What a backup came to.
#[derive(Debug)]
pub struct BackupOutcome {
    /// The backup.
    pub info: BackupInfo,
    /// The regions that have it, by name.
    pub regions: Vec<String>,
    /// What kept it from the others.
    pub failures: Vec<StoreError>,
    /// How long it took.
    pub elapsed: Duration,
}

/// Why a backup failed.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The server.
    #[error(transparent)]
    Server(#[from] PgError),
    /// The archiver that should bring the backup's WAL.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// What the server sent.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// Files from outside the data directory, before the server was read.
    #[error("{0}")]
    Capture(#[from] CaptureError),
    /// The server found damaged pages, and such a backup is not wanted.
    #[error("the server found pages with wrong checksums, so the backup was given up (backup.on_checksum_failure = \"fail\"): {}", .0.join("; "))]
    Checksums(Vec<String>),
    /// Every region failed.
    #[error("the backup reached no region: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoRegion(Vec<StoreError>),
    /// The regions cannot be read for what the backup builds on.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The backup that this one builds on cannot be used.
    #[error("the parent {0} cannot be used: {1}; \"pgkeep backup --type full\" needs none")]
    Parent(BackupLabel, String),
    /// The system.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}
