//! The recovery window: the moments that a restore can reach.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::wal_path::WalPath;
use crate::store::{Catalog, ReadError};
use crate::wal::Lsn;

/// The moments that a restore can reach on the newest timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryWindow {
    /// The end of the oldest backup behind which the WAL has no hole.
    pub earliest_time: DateTime<Utc>,
    /// The last moment of which the archive knows.
    pub latest_time: Option<DateTime<Utc>>,
    /// As `earliest_time`.
    pub earliest_lsn: Lsn,
    /// The end of the WAL.
    pub latest_lsn: Lsn,
}

/// Computes the window; `None` when nothing can be restored.
///
/// # Errors
/// When no region can be read.
pub async fn recovery_window(catalog: &Catalog) -> Result<Option<RecoveryWindow>, ReadError> {
    let Some(history) = catalog.history(catalog.newest_timeline()) else { return Ok(None) };
    let mut not_before = Lsn::INVALID;
    for (info, _) in catalog.backups_by_time() {
        let reachable = history.reachable_from(info.timeline, info.stop_lsn);
        if !reachable || info.start_lsn < not_before {
            continue;
        }
        let wal = WalPath::read(catalog, &history, info.timeline, info.start_lsn).await?;
        if let Some((_, behind)) = wal.hole() {
            not_before = behind;
            continue;
        }
        if wal.end() < info.stop_lsn {
            continue;
        }
        return Ok(Some(RecoveryWindow {
            earliest_time: info.stop_time,
            latest_time: wal.last_time(catalog, info.stop_lsn).await?.or(Some(info.stop_time)),
            earliest_lsn: info.stop_lsn,
            latest_lsn: wal.end(),
        }));
    }
    Ok(None)
}
