//! The archiver's sign of life in every region: how a quiet spell differs from a dead archiver.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::state::ArchiveState;
use crate::repo::{Alive, FORMAT_VERSION, RegionWord, alive_key};
use crate::store::Region;

/// How often it is looked whether the server has spoken since streaming began.
const FIRST_LOOK: Duration = Duration::from_millis(500);

/// The name under which this process leaves its last word: host and slot.
pub fn archiver_name(slot: &str) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let clean = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' };
    format!("{}-{slot}", host.chars().map(clean).collect::<String>())
}

/// Writes the last word to every region, now and then, until cancelled; then once more. A region
/// that does not answer delays no other.
pub(super) async fn keep_saying(
    regions: Vec<Region>,
    archiver: String,
    state: ArchiveState,
    interval: Duration,
    cancelled: CancellationToken,
) {
    let mut pause = FIRST_LOOK;
    loop {
        let stop = tokio::select! {
            () = cancelled.cancelled() => true,
            () = tokio::time::sleep(pause) => false,
        };
        if let Some(word) = word(&archiver, &state) {
            pause = interval;
            say(&regions, &word).await;
        }
        if stop {
            return;
        }
    }
}

fn word(archiver: &str, state: &ArchiveState) -> Option<Alive> {
    let report = state.report();
    Some(Alive {
        format: FORMAT_VERSION,
        archiver: archiver.to_owned(),
        server_time: report.server_time?,
        timeline: report.timeline?,
        wal_end: report.wal_end,
        durable_lsn: report.durable_lsn,
        server_version: report.server_version?,
        regions: report
            .regions
            .into_iter()
            .map(|region| RegionWord {
                name: region.name,
                state: region.health.as_str().to_owned(),
                archived_lsn: region.frontier,
            })
            .collect(),
    })
}

async fn say(regions: &[Region], word: &Alive) {
    let Ok(bytes) = serde_json::to_vec_pretty(word) else { return };
    let bytes = bytes::Bytes::from(bytes);
    let key = alive_key(&word.archiver);
    let writes = regions.iter().map(|region| async {
        if let Err(error) = region.overwrite(&key, bytes.clone()).await {
            tracing::debug!("{error}");
        }
    });
    futures_util::future::join_all(writes).await;
}
