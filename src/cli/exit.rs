//! From errors to exit codes and hints: in this one place.

use crate::archive::ArchiveError;
use crate::backup::BackupError;
use crate::config::ConfigError;
use crate::pg::PgError;
use crate::restore::{PlanError, RestoreError};
use crate::store::repair::RepairError;
use crate::store::{ReadError, StoreError};

/// The exit codes; `wal-fetch` has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// The configuration cannot be used.
    Configuration = 3,
    /// The target cannot be reached.
    Unreachable = 4,
    /// Something stored is damaged or missing.
    Integrity = 5,
    /// Two histories met, or the archive is another cluster's.
    Diverged = 6,
    /// Done, but in fewer regions than configured, or without files that backup.include names.
    FewerRegions = 7,
}

/// An error for people.
#[derive(Debug)]
pub struct CliError {
    /// The exit code.
    pub exit: Exit,
    /// What failed and why.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl CliError {
    /// An error without advice.
    pub fn new(exit: Exit, message: impl Into<String>) -> CliError {
        CliError { exit, message: message.into(), hint: None }
    }

    /// Adds advice.
    pub fn hint(mut self, hint: impl Into<String>) -> CliError {
        self.hint = Some(hint.into());
        self
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> CliError {
        CliError::new(Exit::Configuration, error.to_string())
    }
}

impl From<PgError> for CliError {
    fn from(error: PgError) -> CliError {
        let exit = match error {
            PgError::ConnInfo(_) => Exit::Configuration,
            _ => Exit::Failed,
        };
        CliError { exit, hint: error.hint(), message: error.to_string() }
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> CliError {
        CliError::new(Exit::Failed, error.to_string())
    }
}

impl From<ReadError> for CliError {
    fn from(error: ReadError) -> CliError {
        let exit = if error.is_damage() { Exit::Integrity } else { Exit::Failed };
        CliError::new(exit, error.to_string())
    }
}

impl From<RepairError> for CliError {
    fn from(error: RepairError) -> CliError {
        let message = error.to_string();
        match error {
            RepairError::Read(error) => error.into(),
            RepairError::NoArchive => CliError::new(Exit::Failed, message)
                .hint("check cluster.name, the regions' URLs and --lineage"),
            RepairError::Disagreement { .. } => CliError::new(Exit::Diverged, message)
                .hint("one of the two folders was not written by this cluster's archiver"),
        }
    }
}

impl From<ArchiveError> for CliError {
    fn from(error: ArchiveError) -> CliError {
        match error {
            ArchiveError::Server(error) => error.into(),
            error if error.is_divergence() => CliError::new(Exit::Diverged, error.to_string()),
            error => CliError::new(Exit::Failed, error.to_string()),
        }
    }
}

impl From<BackupError> for CliError {
    fn from(error: BackupError) -> CliError {
        match error {
            BackupError::Server(error) => error.into(),
            BackupError::Archive(error) => error.into(),
            BackupError::Read(error) => error.into(),
            BackupError::Checksums(_) => CliError::new(Exit::Integrity, error.to_string())
                .hint("the damage is on the server's disk; on_checksum_failure = \"keep\" keeps such a backup, and says which pages"),
            error => CliError::new(Exit::Failed, error.to_string()),
        }
    }
}

impl From<PlanError> for CliError {
    fn from(error: PlanError) -> CliError {
        match error {
            PlanError::Unreachable { .. } => CliError::new(Exit::Unreachable, error.to_string()),
            PlanError::Diverged(_) | PlanError::Promotions(_) => {
                CliError::new(Exit::Diverged, error.to_string())
            }
            PlanError::Read(error) => error.into(),
        }
    }
}

impl From<RestoreError> for CliError {
    fn from(error: RestoreError) -> CliError {
        match error {
            RestoreError::Read(error) => error.into(),
            RestoreError::Index(_) => CliError::new(Exit::Integrity, error.to_string()),
            RestoreError::Usage(_) => CliError::new(Exit::Usage, error.to_string()),
            error => CliError::new(Exit::Failed, error.to_string()),
        }
    }
}
