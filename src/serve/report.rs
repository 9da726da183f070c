//! The status report: where the cluster's archive stands, for people and programs. Its fields are
//! a contract; more may come.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use super::catalog::Known;
use crate::archive::ArchiveReport;
use crate::backup::{Attempt, BackupTurns};
use crate::pg::SlotStatus;
use crate::repo::{Alive, BackupType};
use crate::restore::{RecoveryWindow, recovery_window};
use crate::store::{Catalog, ReadError, frontier_of};
use crate::wal::{Lsn, TimelineId};

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// `sidecar`: from the running archiver; `regions`: from what lies in the regions.
    pub source: String,
    /// When it was made, by this machine's clock.
    pub time: DateTime<Utc>,
    /// Whose archive it is.
    pub cluster: ClusterStatus,
    /// Whether WAL is being streamed now; `null` when nobody can tell.
    pub streaming: Option<bool>,
    /// What keeps it from streaming, or was the last trouble.
    pub trouble: Option<String>,
    /// What an operator must look into: of the sidecar, since its start.
    #[serde(default)]
    pub alarms: Vec<String>,
    /// The regions.
    pub regions: Vec<RegionStatus>,
    /// Up to here WAL counts as safe.
    pub durable_lsn: Option<Lsn>,
    /// The replication slot on the server; `null` as long as nobody looked.
    #[serde(default)]
    pub slot: Option<SlotStatus>,
    /// How old the parts are that come from the regions: window, gaps, backups. `null` when they have
    /// not answered yet.
    #[serde(default)]
    pub catalog_age_seconds: Option<f64>,
    /// The moments that a restore can reach; `null` when none.
    pub recovery_window: Option<RecoveryWindow>,
    /// WAL that is lost.
    pub gaps: Vec<GapStatus>,
    /// The newest backup.
    pub last_backup: Option<BackupStatus>,
    /// The next scheduled backup; one in the past is overdue. `null` when nothing is scheduled, or
    /// another archiver takes the backups, or nobody can tell.
    #[serde(default)]
    pub next_backup: Option<NextBackup>,
    /// What became of the last backup that the sidecar took, or tried to take, since its start.
    #[serde(default)]
    pub last_attempt: Option<Attempt>,
    /// What must be met.
    pub objectives: ObjectiveStatus,
}

impl StatusReport {
    /// Adds what the sidecar knows of its own backups.
    pub(super) fn add_backups(&mut self, turns: &BackupTurns) {
        self.next_backup = turns.next().map(|due| NextBackup { time: due.at, kind: due.kind });
        self.last_attempt = turns.last_attempt();
        self.alarms.extend(turns.alarm());
    }
}

/// A backup that is scheduled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextBackup {
    /// When.
    pub time: DateTime<Utc>,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: BackupType,
}

/// Whose archive it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Its name.
    pub name: String,
    /// Its system identifier.
    pub system_identifier: Option<String>,
    /// The server's version.
    pub server_version: Option<String>,
    /// The timeline being archived.
    pub timeline: Option<TimelineId>,
}

/// One region.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegionStatus {
    /// Its name.
    pub name: String,
    /// Its URL.
    pub url: String,
    /// `healthy`, `lagging`, `repairing` or `unreachable`.
    pub state: String,
    /// Its frontier.
    pub archived_lsn: Option<Lsn>,
    /// Bytes behind the server's WAL.
    pub lag_bytes: Option<u64>,
    /// The age of the oldest WAL that it does not have.
    pub lag_seconds: Option<f64>,
    /// Its last failure.
    pub last_error: Option<String>,
}

/// WAL that is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapStatus {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first byte that is missing.
    pub from: Lsn,
    /// Behind the last byte that is missing.
    pub to: Lsn,
}

/// A backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupStatus {
    /// Its name.
    pub label: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: BackupType,
    /// The server's clock when it ended.
    pub stop_time: DateTime<Utc>,
    /// The regions that have it.
    pub regions: Vec<String>,
}

/// What must be met, in seconds, and whether it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectiveStatus {
    /// How much may be lost.
    pub rpo_seconds: u64,
    /// How long a recovery may take.
    pub rto_seconds: u64,
    /// Whether every region is near enough; `null` when nobody can tell.
    pub rpo_met: Option<bool>,
    /// Whether a recovery was fast enough; `null` as long as none was measured.
    pub rto_met: Option<bool>,
}

/// The objectives of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Objectives {
    /// How much may be lost.
    pub rpo: Duration,
    /// How long a recovery may take.
    pub rto: Duration,
}

impl Objectives {
    fn status(self, rpo_met: Option<bool>) -> ObjectiveStatus {
        ObjectiveStatus {
            rpo_seconds: self.rpo.as_secs(),
            rto_seconds: self.rto.as_secs(),
            rpo_met,
            rto_met: None,
        }
    }
}

fn last_backup(catalog: &Catalog) -> Option<BackupStatus> {
    let (info, regions) = catalog.backups_by_time().pop()?;
    Some(BackupStatus {
        label: info.label.to_string(),
        kind: info.kind,
        stop_time: info.stop_time,
        regions: regions.clone(),
    })
}

fn gaps(catalog: &Catalog) -> Vec<GapStatus> {
    let gap = |gap: &(TimelineId, Lsn, Lsn)| GapStatus { timeline: gap.0, from: gap.1, to: gap.2 };
    catalog.gaps.iter().map(gap).collect()
}

/// The report of a running sidecar. `known` is what it last read from the regions.
pub(super) fn status_from_sidecar(
    name: &str,
    archive: &ArchiveReport,
    known: Option<&Known>,
    slot: Option<SlotStatus>,
    objectives: Objectives,
) -> StatusReport {
    let catalog = known.map(|known| known.catalog.as_ref());
    let regions: Vec<RegionStatus> = archive
        .regions
        .iter()
        .map(|region| RegionStatus {
            name: region.name.clone(),
            url: region.url.clone(),
            state: region.health.as_str().to_owned(),
            archived_lsn: region.frontier,
            lag_bytes: region.lag_bytes,
            lag_seconds: region.lag_seconds,
            last_error: region.last_error.clone(),
        })
        .collect();
    let near = |region: &RegionStatus| {
        region.lag_seconds.is_some_and(|lag| lag <= objectives.rpo.as_secs_f64())
    };
    let rpo_met = archive.streaming && regions.iter().all(near);
    StatusReport {
        source: "sidecar".into(),
        time: Utc::now(),
        cluster: ClusterStatus {
            name: name.to_owned(),
            system_identifier: archive.system_id.map(|id| id.to_string()),
            server_version: archive.server_version.clone(),
            timeline: archive.timeline,
        },
        streaming: Some(archive.streaming),
        trouble: archive.trouble.clone(),
        alarms: archive.alarms.clone(),
        regions,
        durable_lsn: (archive.durable_lsn > Lsn::INVALID).then_some(archive.durable_lsn),
        slot,
        catalog_age_seconds: known.map(|known| known.read.elapsed().as_secs_f64()),
        recovery_window: known.and_then(|known| known.window.clone()),
        gaps: catalog.map(gaps).unwrap_or_default(),
        last_backup: catalog.and_then(last_backup),
        next_backup: None,
        last_attempt: None,
        objectives: objectives.status(Some(rpo_met)),
    }
}

/// The report of somebody who sees only the regions, and the archivers' last words in them.
///
/// # Errors
/// When no region can be read.
pub async fn status_from_regions(
    catalog: &Catalog,
    objectives: Objectives,
) -> Result<StatusReport, ReadError> {
    let timeline = catalog.newest_timeline();
    let word: Option<&Alive> = catalog.alive.iter().max_by_key(|alive| alive.server_time);
    let size = catalog.lineage.wal_segment_size;
    let now = Utc::now();
    let silent = word.map(|word| (now - word.server_time).as_seconds_f64().max(0.0));
    let lookups = catalog.regions.iter().map(|region| frontier_of(region, timeline, size, None));
    let looked_up = join_all(lookups).await;
    let mut regions = Vec::new();
    for (region, found) in catalog.regions.iter().zip(looked_up) {
        let end = word.filter(|word| word.timeline == timeline).map(|word| word.wal_end);
        let (state, archived_lsn, last_error) = match found {
            Ok(found) => {
                let lsn = found.map(|found| found.lsn);
                let state = if lsn >= end { "healthy" } else { "lagging" };
                (state, lsn, None)
            }
            Err(error) => ("unreachable", None, Some(error.to_string())),
        };
        let lag_bytes = archived_lsn.zip(end).map(|(lsn, end)| end.bytes_since(lsn));
        regions.push(RegionStatus {
            name: region.name().to_owned(),
            url: region.url().to_owned(),
            state: state.to_owned(),
            archived_lsn,
            lag_bytes,
            // Since the archiver's last word nobody knows what was written, and of a region that is
            // behind it nobody knows how long it has been.
            lag_seconds: silent.filter(|_| state == "healthy"),
            last_error,
        });
    }
    let near = |region: &RegionStatus| {
        region.lag_seconds.is_some_and(|lag| lag <= objectives.rpo.as_secs_f64())
    };
    let rpo_met = silent.map(|_| regions.iter().all(near));
    Ok(StatusReport {
        source: "regions".into(),
        time: now,
        cluster: ClusterStatus {
            name: catalog.lineage.cluster.clone(),
            system_identifier: Some(catalog.lineage.system_identifier.clone()),
            server_version: word.map(|word| word.server_version.clone()),
            timeline: Some(timeline),
        },
        streaming: None,
        trouble: None,
        alarms: Vec::new(),
        regions,
        durable_lsn: word.map(|word| word.durable_lsn),
        slot: None,
        catalog_age_seconds: Some(0.0),
        recovery_window: recovery_window(catalog).await?,
        gaps: gaps(catalog),
        last_backup: last_backup(catalog),
        next_backup: None,
        last_attempt: None,
        objectives: objectives.status(rpo_met),
    })
}
