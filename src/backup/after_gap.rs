//! A new base backup as soon as a gap was recorded: only it makes the moments after the gap
//! reachable. A crash forgets nothing: at the start the regions tell whether one is owed.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{BackupError, BackupRequest, BackupTurns};
use crate::archive::ArchiveState;
use crate::store::{Catalog, ReadError, Regions, list_lineages};

/// The pause after the first failure; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// How often it is looked whether the archiver has begun.
const BEGIN_PAUSE: Duration = Duration::from_secs(1);

/// Takes a base backup whenever the archiver records a gap, again until one was taken; until
/// cancelled.
pub async fn back_up_after_gaps(
    archive: ArchiveState,
    request: BackupRequest,
    regions: Regions,
    turns: BackupTurns,
    cancelled: CancellationToken,
) {
    let mut gaps = archive.gaps();
    let owed = tokio::select! {
        owed = is_owed_at_start(&archive, &request.archive.cluster, &regions) => owed,
        () = cancelled.cancelled() => return,
    };
    if owed {
        gaps.mark_changed();
    }
    loop {
        tokio::select! {
            changed = gaps.changed() => if changed.is_err() { return },
            () = cancelled.cancelled() => return,
        }
        tracing::warn!("a gap was recorded: taking a base backup at once (wal.on_gap)");
        let mut pause = FIRST_PAUSE;
        loop {
            let taking = async { turns.wait().await.take(&request, &regions, &archive).await };
            let taken = tokio::select! {
                taken = taking => taken,
                () = cancelled.cancelled() => return,
            };
            match taken {
                Ok(_) => break,
                // The same pages would be read again, with the same end.
                Err(BackupError::Checksums(_)) => pause = LONGEST_PAUSE,
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(crate::jitter::around(pause)) => {}
                () = cancelled.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Whether a gap was recorded, by an earlier archiver perhaps, and no backup was taken since.
async fn is_owed_at_start(archive: &ArchiveState, cluster: &str, regions: &Regions) -> bool {
    let mut pause = FIRST_PAUSE;
    loop {
        let report = archive.report();
        let Some(system_id) = report.system_id.filter(|_| report.streaming) else {
            tokio::time::sleep(BEGIN_PAUSE).await;
            continue;
        };
        match is_owed(&regions.within(cluster), system_id).await {
            Ok(owed) => return owed,
            Err(error) => tracing::debug!("whether a backup is owed cannot be told yet: {error}"),
        }
        tokio::time::sleep(crate::jitter::around(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn is_owed(cluster: &Regions, system_id: u64) -> Result<bool, ReadError> {
    let lineages = list_lineages(cluster).await?;
    let Some(lineage) = lineages.into_iter().find(|lineage| lineage.system_id() == system_id)
    else {
        return Ok(false);
    };
    let catalog = Catalog::read(cluster, lineage).await?;
    Ok(catalog.gaps.iter().any(|(timeline, _, to)| {
        !catalog.backups.values().any(|(info, _)| {
            info.timeline > *timeline || (info.timeline == *timeline && info.start_lsn >= *to)
        })
    }))
}
