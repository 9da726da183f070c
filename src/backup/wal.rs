//! The WAL that makes a backup restorable: from its start to its stop, in each region.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::BackupError;
use crate::archive::{ArchiveError, ArchiveSettings, ArchiveState, Archiver};
use crate::pg::Connector;
use crate::repo::BackupInfo;
use crate::store::{FailureKind, Region, Regions, StoreError, list_pieces};

/// The first pause before a region is asked again; it doubles up to the longest. The server ends its
/// segment with the backup, so the WAL is mostly there at once.
const FIRST_POLL: Duration = Duration::from_millis(20);
const LONGEST_POLL: Duration = Duration::from_millis(500);
/// How long the archiver may take to begin.
const BEGIN_PATIENCE: Duration = Duration::from_secs(60);

/// An archiver in this process, for a backup without a running sidecar.
pub(super) struct OwnArchiver {
    cancelled: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), ArchiveError>>,
}

impl OwnArchiver {
    /// Starts it and waits until it streams, or stands by for a sidecar that came first: the backup's
    /// WAL must not be missed.
    ///
    /// # Errors
    /// When it cannot begin.
    pub(super) async fn start(
        settings: ArchiveSettings,
        connector: Connector,
        regions: &Regions,
    ) -> Result<OwnArchiver, BackupError> {
        tracing::info!("no sidecar holds the slot: archiving the backup's WAL from here");
        let archiver = Archiver::new(settings, connector, regions);
        let state: ArchiveState = archiver.state();
        let cancelled = CancellationToken::new();
        let token = cancelled.clone();
        let task = tokio::spawn(async move { archiver.run(&token).await });
        let own = OwnArchiver { cancelled, task };
        let deadline = Instant::now() + BEGIN_PATIENCE;
        loop {
            let report = state.report();
            if report.streaming || report.is_spare {
                return Ok(own);
            }
            if own.task.is_finished() || Instant::now() > deadline {
                own.stop().await?;
                let trouble = state.report().trouble.unwrap_or_default();
                return Err(BackupError::Io(std::io::Error::other(format!(
                    "the archiver did not begin: {trouble}"
                ))));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Stores the last WAL and ends.
    ///
    /// # Errors
    /// What ended it before.
    pub(super) async fn stop(self) -> Result<(), BackupError> {
        self.cancelled.cancel();
        match self.task.await {
            Ok(outcome) => Ok(outcome?),
            Err(error) => Err(BackupError::Io(std::io::Error::other(error))),
        }
    }
}

/// Waits until the region holds the backup's WAL without a hole.
///
/// # Errors
/// When it does not by `deadline`, or cannot be asked.
pub(super) async fn wait_for_wal(
    region: &Region,
    info: &BackupInfo,
    deadline: Instant,
) -> Result<(), StoreError> {
    let (from, to) = (info.start_lsn, info.stop_lsn);
    let mut pause = FIRST_POLL;
    loop {
        let listed =
            list_pieces(region, info.timeline, info.wal_segment_size, from, Some(to)).await;
        let problem = match listed {
            Ok(found) => match found.coverage.holes(from, to).first() {
                None => return Ok(()),
                Some((missing, until)) => format!("WAL from {missing} to {until} is missing"),
            },
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => String::new(),
        };
        if Instant::now() >= deadline {
            return Err(StoreError {
                kind: FailureKind::NotFound,
                region: region.name().to_owned(),
                operation: "complete",
                key: info.label.to_string(),
                message: format!(
                    "{problem}, so the backup cannot be restored there; is \"pgkeep run\" streaming? (backup.wal_timeout)"
                ),
            });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_POLL);
    }
}
