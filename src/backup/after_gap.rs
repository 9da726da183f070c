//! A new base backup as soon as a gap was recorded: only it makes the moments after the gap
//! reachable.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{BackupRequest, Progress, take_backup};
use crate::store::Regions;

/// The pause after the first failure; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Takes a base backup whenever `gaps` grows, again until one was taken; until cancelled.
pub async fn back_up_after_gaps(
    mut gaps: watch::Receiver<u64>,
    request: BackupRequest,
    regions: Regions,
    cancelled: CancellationToken,
) {
    gaps.mark_unchanged();
    loop {
        tokio::select! {
            changed = gaps.changed() => if changed.is_err() { return },
            () = cancelled.cancelled() => return,
        }
        gaps.mark_unchanged();
        tracing::warn!("a gap was recorded: taking a base backup at once (wal.on_gap)");
        let mut pause = FIRST_PAUSE;
        loop {
            let progress = Arc::new(Progress::default());
            let taken = tokio::select! {
                taken = take_backup(&request, &regions, &progress) => taken,
                () = cancelled.cancelled() => return,
            };
            match taken {
                Ok(outcome) => {
                    tracing::info!(label = %outcome.info.label, regions = ?outcome.regions, "the backup after the gap is there");
                    for failure in &outcome.failures {
                        tracing::warn!("{failure}");
                    }
                    break;
                }
                Err(error) => tracing::error!("the backup after the gap failed: {error}"),
            }
            tokio::select! {
                () = tokio::time::sleep(crate::jitter::around(pause)) => {}
                () = cancelled.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}
