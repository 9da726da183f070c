//! The plan of a restore: everything is decided, and refused, before anything is touched.
//!
//! The plan pins the lineage, the timeline path as numbers, the backup and the end of the WAL. It
//! is stored beside the data as [`PLAN_FILE`], for `wal-fetch`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::target::{Target, TimelineChoice};
use super::wal_path::WalPath;
use crate::repo::{BackupInfo, BackupLabel, FORMAT_VERSION, PieceName};
use crate::store::{Catalog, ReadError};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// The plan's name in the data directory.
pub const PLAN_FILE: &str = "pgkeep-restore.json";

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct PlanRequest {
    /// What is to be reached.
    pub target: Target,
    /// Stop just before the target instead of just after it.
    pub exclusive: bool,
    /// Which history to follow.
    pub timeline: TimelineChoice,
    /// The backup to begin with; the best one if not given.
    pub backup: Option<BackupLabel>,
    /// The regions that the user chose, by name; empty for all.
    pub regions: Vec<String>,
}

/// One timeline of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathPart {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where its WAL begins to count.
    pub begin: Lsn,
    /// Where it stops to count: the fork, or the end of the plan.
    pub end: Lsn,
}

/// A plan that holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Format version.
    pub format: u32,
    /// The cluster's name.
    pub cluster: String,
    /// Whose archive it is.
    pub system_identifier: String,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// The cluster's segment size in bytes.
    pub wal_segment_size: SegmentSize,
    /// The backup.
    pub backup: BackupLabel,
    /// The regions that have it.
    pub backup_regions: Vec<String>,
    /// The regions that may be read, by name; all of them if none is named.
    #[serde(default)]
    pub regions: Vec<String>,
    /// Why this backup.
    pub reason: String,
    /// The timelines that recovery passes through, oldest first.
    pub path: Vec<PathPart>,
    /// What was asked for.
    pub target: Target,
    /// What PostgreSQL is told; `End` where the target is the state at the end.
    pub recovery_target: Target,
    /// Stop just before the target.
    pub exclusive: bool,
    /// Bytes of the data directory.
    pub data_bytes: u64,
    /// Bytes of packs to fetch.
    pub backup_bytes: u64,
    /// Bytes of WAL to replay at most.
    pub wal_bytes: u64,
    /// The last moment that recovery reaches, if the archive tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reaches: Option<DateTime<Utc>>,
    /// Where the last record of the WAL begins, if the archive tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_record: Option<Lsn>,
    /// The pieces of WAL that recovery will ask for.
    #[serde(skip)]
    pub pieces: Vec<PieceName>,
}

impl Plan {
    /// The end of the WAL that the plan promises.
    pub fn end(&self) -> Lsn {
        self.path.last().map_or(Lsn::INVALID, |part| part.end)
    }

    /// The timeline that recovery ends on.
    pub fn timeline(&self) -> TimelineId {
        self.path.last().map_or(TimelineId::FIRST, |part| part.timeline)
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The target cannot be reached.
    #[error("{target} cannot be reached: {reason}{}", nearest.as_ref().map_or(String::new(), |text| format!(". {text}")))]
    Unreachable {
        /// What was asked for.
        target: Target,
        /// Why not.
        reason: String,
        /// What can be reached instead.
        nearest: Option<String>,
    },
    /// Two histories.
    #[error("{0}; nobody but you can say which one is right")]
    Diverged(#[from] crate::repo::Divergence),
    /// Two promotions to one timeline.
    #[error(
        "the regions have different history files of timeline {0}: two servers were promoted to it. Nobody but you can say which one is right: --region chooses a region that has only one, --target-timeline another history"
    )]
    Promotions(TimelineId),
    /// No region can be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Makes the plan.
///
/// # Errors
/// When the target cannot be reached, with the reason.
pub async fn make_plan(catalog: &Catalog, request: &PlanRequest) -> Result<Plan, PlanError> {
    let unreachable = |reason: String| PlanError::Unreachable {
        target: request.target.clone(),
        reason,
        nearest: nearest(catalog),
    };
    if catalog.backups.is_empty() {
        return Err(unreachable("the archive has no backup".into()));
    }
    let mut reasons = Vec::new();
    for (info, regions) in catalog.backups_by_time().into_iter().rev() {
        let label = &info.label;
        if request.backup.as_ref().is_some_and(|wanted| wanted != label) {
            continue;
        }
        match candidate(catalog, request, info).await? {
            Ok(found) => return Ok(found.into_plan(catalog, request, info, regions)),
            Err(reason) => reasons.push(format!("backup {label}: {reason}")),
        }
    }
    if reasons.is_empty()
        && let Some(label) = &request.backup
    {
        return Err(unreachable(format!("there is no backup {label}")));
    }
    // The newest few say it; the rest repeat them.
    reasons.truncate(3);
    Err(unreachable(reasons.join("; ")))
}

/// What a backup can do for the request.
struct Found {
    path: Vec<PathPart>,
    recovery_target: Target,
    wal_bytes: u64,
    reaches: Option<DateTime<Utc>>,
    last_record: Option<Lsn>,
    pieces: Vec<PieceName>,
}

impl Found {
    fn into_plan(
        self,
        catalog: &Catalog,
        request: &PlanRequest,
        info: &BackupInfo,
        regions: &[String],
    ) -> Plan {
        let newest = catalog.backups_by_time().last().map(|(info, _)| &info.label);
        let reason = match (&request.backup, newest) {
            (Some(_), _) => "it was asked for",
            (None, Some(newest)) if *newest == info.label => "it is the newest backup",
            _ => "it is the newest backup that ended before the target on its path",
        };
        Plan {
            format: FORMAT_VERSION,
            cluster: catalog.lineage.cluster.clone(),
            system_identifier: catalog.lineage.system_identifier.clone(),
            postgres_major: catalog.lineage.postgres_major,
            wal_segment_size: catalog.lineage.wal_segment_size,
            backup: info.label.clone(),
            backup_regions: regions.to_vec(),
            regions: request.regions.clone(),
            reason: reason.to_owned(),
            path: self.path,
            target: request.target.clone(),
            recovery_target: self.recovery_target,
            exclusive: request.exclusive,
            data_bytes: info.size,
            backup_bytes: info.packs_size.max(info.stored_size),
            wal_bytes: self.wal_bytes,
            reaches: self.reaches,
            last_record: self.last_record,
            pieces: self.pieces,
        }
    }
}

/// Looks whether the backup can serve the request: the inner `Err` says why not.
async fn candidate(
    catalog: &Catalog,
    request: &PlanRequest,
    info: &BackupInfo,
) -> Result<Result<Found, String>, PlanError> {
    let timeline = match request.timeline {
        TimelineChoice::Latest => catalog.newest_timeline(),
        TimelineChoice::Current => info.timeline,
        TimelineChoice::Number(number) => number,
    };
    let Some(history) = catalog.history(timeline) else {
        return Ok(Err(format!("the history file of timeline {timeline} is missing")));
    };
    let path = history.path();
    if let Some((conflict, _, _)) = path.iter().find(|part| catalog.conflicts.contains(&part.0)) {
        return Err(PlanError::Promotions(*conflict));
    }
    if let Err(reason) = suits(info, &history, &request.target) {
        return Ok(Err(reason));
    }
    let wal = WalPath::read(catalog, &history, info.timeline, info.start_lsn).await?;
    if let Some(divergence) = wal.divergence() {
        return Err(divergence.into());
    }
    let end = wal.end();
    if end < info.stop_lsn {
        return Ok(Err(format!(
            "WAL from {end} on is missing, and the backup is consistent only at {}",
            info.stop_lsn
        )));
    }
    let resolved = match &request.target {
        Target::Immediate => wal.resolve_immediate(catalog, info).await?,
        Target::End => match wal.hole() {
            Some((from, to)) => Err(format!(
                "there is a hole in the WAL from {from} to {to}. To recover up to it, ask for --target-lsn {from}"
            )),
            None => match unseen_end(catalog, request, timeline, end) {
                Some(reason) => Err(reason),
                None => Ok((Target::End, wal.last_time(catalog, info.stop_lsn).await?)),
            },
        },
        Target::Lsn(lsn) => wal.resolve_lsn(catalog, *lsn).await?,
        Target::Time(time) => wal.resolve_time(catalog, *time, info, request.exclusive).await?,
        Target::Xid(xid) => wal.resolve_xid(catalog, *xid, info.stop_lsn).await?,
        Target::Name(name) => wal.resolve_name(catalog, name, info.stop_lsn).await?,
    };
    // PostgreSQL notices that it is consistent with the record after the backup's last one.
    let needed = match &resolved {
        Ok((Target::Immediate, _)) => info.stop_lsn.advance(1),
        _ => end,
    };
    let last_record = wal.last_record(catalog).await?;
    Ok(resolved.map(|(recovery_target, reaches)| Found {
        last_record,
        wal_bytes: needed.bytes_since(info.start_lsn),
        path: wal.parts_until(end),
        pieces: wal.pieces_until(needed),
        recovery_target,
        reaches,
    }))
}

/// Whether an archiver said that a region holds more than what can be read: then the end that is
/// seen is not the end.
fn unseen_end(
    catalog: &Catalog,
    request: &PlanRequest,
    timeline: TimelineId,
    end: Lsn,
) -> Option<String> {
    let may_be_read = |name: &String| request.regions.is_empty() || request.regions.contains(name);
    let words = catalog.alive.iter().filter(|word| word.timeline == timeline);
    let claims = words.flat_map(|word| &word.regions).filter(|region| may_be_read(&region.name));
    let furthest = claims
        .filter_map(|region| Some((region.archived_lsn?, &region.name)))
        .max()
        .filter(|(lsn, _)| *lsn > end)?;
    let failures: Vec<_> = catalog.failures.iter().map(ToString::to_string).collect();
    let failures = match failures.is_empty() {
        true => String::new(),
        false => format!(" ({})", failures.join("; ")),
    };
    Some(format!(
        "the archiver last said that region {} holds WAL up to {}, and what can be read ends at {end}{failures}. To lose what lies behind it, ask for --target-lsn {end}, or name the regions to be used with --region",
        furthest.1, furthest.0
    ))
}

/// What can be said without looking at WAL.
fn suits(info: &BackupInfo, history: &TimelineHistory, target: &Target) -> Result<(), String> {
    if !history.reachable_from(info.timeline, info.stop_lsn) {
        return Err(format!(
            "it lies on timeline {} and ended at {}, from where timeline {} cannot be reached",
            info.timeline, info.stop_lsn, history.timeline
        ));
    }
    match target {
        Target::Time(time) if *time < info.stop_time => Err(format!(
            "it ended later, at {}",
            info.stop_time.format("%Y-%m-%d %H:%M:%S%.3f UTC")
        )),
        Target::Lsn(lsn) if *lsn < info.stop_lsn => {
            Err(format!("it ended later, at {}", info.stop_lsn))
        }
        _ => Ok(()),
    }
}

/// What can be reached: told with every refusal.
fn nearest(catalog: &Catalog) -> Option<String> {
    let (first, _) = catalog.backups_by_time().into_iter().next()?;
    let word = catalog.alive.iter().map(|alive| alive.server_time).max();
    let until = word.map_or(String::new(), |time| {
        format!("; an archiver last spoke at {}", time.format("%Y-%m-%d %H:%M:%S%.3f UTC"))
    });
    Some(format!(
        "The earliest moment that can be is {} ({}), the end of backup {}{until}",
        first.stop_time.format("%Y-%m-%d %H:%M:%S%.3f UTC"),
        first.stop_lsn,
        first.label
    ))
}
