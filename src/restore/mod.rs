//! Restoring: plan first, touch nothing until the plan holds, fetch, and let PostgreSQL recover.
//!
//! `pg_control` is written last, after everything else is synced, so that a half-restored directory
//! cannot start. The plan lies beside the data for [`wal_fetch`], which PostgreSQL calls while it
//! replays.

mod clear;
mod compare;
mod directory;
mod fetch;
mod frames;
mod include;
mod manifest;
mod occupant;
mod plan;
mod run;
mod settings;
mod target;
mod wal_fetch;
mod wal_path;
mod window;

use std::io;
use std::path::PathBuf;

use crate::repo::FileIndexError;
use crate::store::ReadError;

pub use directory::TablespaceMap;
pub use include::{IncludeOptions, IncludeOutcome, PreparedInclude, prepare_include};
pub use occupant::interrupted_backup;
pub use plan::{PLAN_FILE, PathPart, Plan, PlanError, PlanRequest, make_plan};
pub use run::{RestoreOptions, Restored, restore};
pub use target::{Target, TargetAction, TimelineChoice, parse_time, parse_timeline};
pub use wal_fetch::{FetchError, Fetched, Source, read_plan};
pub use window::{RecoveryWindow, recovery_window};

/// The plan's name until it is whole.
const PLAN_BEING_WRITTEN: &str = "pgkeep-restore.json.new";

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The directory may not be written.
    #[error("{}: {problem}", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The disk is too small.
    #[error("{}: {needed} bytes are needed and {free} are free", .path.display())]
    Space {
        /// The directory.
        path: PathBuf,
        /// What the data takes.
        needed: u64,
        /// What there is.
        free: u64,
    },
    /// No region can give an object.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The backup's index makes no sense although its hash is right.
    #[error("files.idx: {0}")]
    Index(#[from] FileIndexError),
    /// The disk.
    #[error("{0}")]
    Io(#[from] io::Error),
}
