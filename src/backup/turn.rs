//! One backup at a time in this process: whoever takes one waits for its turn. What became of the last
//! one, and what comes next, for the status report.
//!
//! In memory only: after a restart the archive tells which backups there are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{BackupError, BackupOutcome, BackupRequest, Due, Progress, take_backup};
use crate::archive::ArchiveState;
use crate::repo::{BackupLabel, BackupType};
use crate::store::Regions;

/// The last backup that this process tried to take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// When it ended, by this machine's clock.
    pub time: DateTime<Utc>,
    /// What kind of backup was wanted.
    #[serde(rename = "type")]
    pub kind: BackupType,
    /// Its name, if there is one.
    pub label: Option<BackupLabel>,
    /// Why there is none.
    pub error: Option<String>,
}

#[derive(Debug, Default)]
struct Inner {
    turn: tokio::sync::Mutex<()>,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    next: Option<Due>,
    last: Option<Attempt>,
}

/// The backups of this process, shared by all that take them.
#[derive(Clone, Debug, Default)]
pub struct BackupTurns(Arc<Inner>);

/// The right to take a backup now.
pub(super) struct Turn<'a> {
    turns: &'a BackupTurns,
    _guard: tokio::sync::MutexGuard<'a, ()>,
}

impl BackupTurns {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.0.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next scheduled backup; one in the past is overdue.
    pub fn next(&self) -> Option<Due> {
        self.lock().next
    }

    /// What became of the last backup.
    pub fn last_attempt(&self) -> Option<Attempt> {
        self.lock().last.clone()
    }

    /// What an operator must look into, as long as the last backup failed.
    pub fn alarm(&self) -> Option<String> {
        let last = self.last_attempt()?;
        let error = last.error?;
        Some(format!("the last {} backup failed: {error}", last.kind))
    }

    pub(super) fn set_next(&self, next: Option<Due>) {
        self.lock().next = next;
    }

    /// Something kept a backup from being taken.
    pub(super) fn failed(&self, kind: BackupType, error: &str) {
        tracing::error!("the {kind} backup failed: {error}");
        let error = Some(error.to_owned());
        self.lock().last = Some(Attempt { time: Utc::now(), kind, label: None, error });
    }

    /// Waits until no other backup is taken.
    pub(super) async fn wait(&self) -> Turn<'_> {
        Turn { turns: self, _guard: self.0.turn.lock().await }
    }
}

impl Turn<'_> {
    /// Takes a backup, and tells log and status report what became of it.
    ///
    /// # Errors
    /// When there is none.
    pub(super) async fn take(
        &self,
        request: &BackupRequest,
        regions: &Regions,
        archive: &ArchiveState,
    ) -> Result<BackupOutcome, BackupError> {
        let progress = Arc::new(Progress::default());
        let taken = take_backup(request, regions, &progress).await;
        match &taken {
            Ok(outcome) => {
                let info = &outcome.info;
                tracing::info!(label = %info.label, regions = ?outcome.regions, "the backup is there");
                for failure in &outcome.failures {
                    tracing::warn!("{failure}");
                }
                tell_checksum_failures(archive, &info.checksum_failures);
                let label = Some(info.label.clone());
                let attempt = Attempt { time: Utc::now(), kind: info.kind, label, error: None };
                self.turns.lock().last = Some(attempt);
            }
            Err(error) => {
                if let BackupError::Checksums(failures) = error {
                    tell_checksum_failures(archive, failures);
                }
                self.turns.failed(request.kind, &error.to_string());
            }
        }
        taken
    }
}

/// An alarm that stays: a later backup may not read these pages again.
fn tell_checksum_failures(archive: &ArchiveState, failures: &[String]) {
    for failure in failures {
        if archive.alarm(format!("damage on the server's disk: {failure}")) {
            tracing::error!("damage on the server's disk: {failure}");
        }
    }
}
