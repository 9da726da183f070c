//! Backups by the clock: what is due next, and the task of `pgkeep run` that takes it.
//!
//! The archive itself is the memory: a backup that should have been taken while nobody ran, or while
//! another one was being taken, is found missing and made up for, once. Only an archiver that streams
//! takes backups; a hot spare begins with this when it takes over.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;

use super::{BackupError, BackupRequest, BackupTurns};
use crate::archive::ArchiveState;
use crate::config::{BackupConfig, Schedule};
use crate::repo::BackupType;
use crate::store::{Catalog, Regions, list_lineages};

/// How often the clock is looked at: it may be set, and the machine may sleep.
const LOOK: Duration = Duration::from_secs(2);
/// The pause after the first failure; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// What this machine's clock and the server's may differ by after they were compared.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::seconds(1);

/// When backups are due, by type.
#[derive(Clone, Debug, Default)]
pub struct Schedules {
    /// Full ones.
    pub full: Option<Schedule>,
    /// Differential ones.
    pub differential: Option<Schedule>,
    /// Incremental ones.
    pub incremental: Option<Schedule>,
}

/// A backup that is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// When.
    pub at: DateTime<Utc>,
    /// Its type.
    pub kind: BackupType,
}

/// When the newest backup began that is at least as large as each type: a full backup does for a
/// differential one, and either for an incremental one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    full: Option<DateTime<Utc>>,
    differential: Option<DateTime<Utc>>,
    incremental: Option<DateTime<Utc>>,
}

impl Done {
    /// A backup began at `time`.
    pub fn add(&mut self, kind: BackupType, time: DateTime<Utc>) {
        let time = Some(time);
        self.incremental = self.incremental.max(time);
        if kind != BackupType::Incremental {
            self.differential = self.differential.max(time);
        }
        if kind == BackupType::Full {
            self.full = self.full.max(time);
        }
    }
}

impl Schedules {
    /// From the configuration.
    pub fn new(config: &BackupConfig) -> Schedules {
        Schedules {
            full: config.full.clone(),
            differential: config.differential.clone(),
            incremental: config.incremental.clone(),
        }
    }

    /// Whether nothing is scheduled.
    pub fn is_empty(&self) -> bool {
        self.full.is_none() && self.differential.is_none() && self.incremental.is_none()
    }

    /// The next backup. One that is due now, or was missed, has a time that is not after `now`: the
    /// last one at which it was due. The larger type wins: it does for the smaller one too.
    pub fn next(&self, done: &Done, now: DateTime<Utc>) -> Option<Due> {
        // The larger types first.
        let all = [
            (BackupType::Full, &self.full, done.full),
            (BackupType::Differential, &self.differential, done.differential),
            (BackupType::Incremental, &self.incremental, done.incremental),
        ];
        let mut next: Option<Due> = None;
        for (kind, schedule, done) in all {
            let Some(schedule) = schedule else { continue };
            let last = schedule.last_until(now);
            if let Some(at) = last.filter(|at| done.is_none_or(|done| done < *at)) {
                return Some(Due { at, kind });
            }
            let due = schedule.next_after(now).map(|at| Due { at, kind });
            next = match (next, due) {
                (Some(next), Some(due)) if due.at < next.at => Some(due),
                (next, due) => next.or(due),
            };
        }
        next
    }
}

/// Takes backups when they are due, until cancelled.
pub async fn keep_schedule(
    schedules: Schedules,
    archive: ArchiveState,
    request: BackupRequest,
    regions: Regions,
    turns: BackupTurns,
    cancelled: CancellationToken,
) {
    let keeper = Keeper { schedules, archive, request, regions, turns };
    tokio::select! {
        () = keeper.keep() => {}
        () = cancelled.cancelled() => {}
    }
}

struct Keeper {
    schedules: Schedules,
    archive: ArchiveState,
    request: BackupRequest,
    regions: Regions,
    turns: BackupTurns,
}

impl Keeper {
    async fn keep(&self) {
        let mut pause = FIRST_PAUSE;
        // What the archive said; not known until it was asked since streaming began.
        let mut done: Option<Done> = None;
        loop {
            let system_id = self.archive.report().system_id;
            let Some(system_id) = system_id.filter(|_| self.archive.report().streaming) else {
                // Another archiver may take backups meanwhile.
                done = None;
                self.turns.set_next(None);
                tokio::time::sleep(LOOK).await;
                continue;
            };
            let now = Utc::now();
            let due = done.and_then(|done| self.schedules.next(&done, now));
            if done.is_some() {
                self.turns.set_next(due);
            }
            match due {
                Some(due) if due.at > now => {
                    let left = (due.at - now).to_std().unwrap_or_default();
                    tokio::time::sleep(left.min(LOOK)).await;
                    continue;
                }
                // Every schedule comes round again, so there is none.
                None if done.is_some() => return,
                _ => {}
            }
            match self.round(system_id).await {
                Ok(known) => {
                    done = Some(known);
                    pause = FIRST_PAUSE;
                }
                Err(kind) => {
                    tracing::warn!(
                        "the {kind} backup is tried again in about {} s",
                        pause.as_secs()
                    );
                    tokio::time::sleep(crate::jitter::around(pause)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Asks the archive what is due, and takes it. Gives what is there then, or the type of the
    /// backup that could not be taken.
    async fn round(&self, system_id: u64) -> Result<Done, BackupType> {
        let turn = self.turns.wait().await;
        let mut done = match self.ask_archive(system_id).await {
            Ok(done) => done,
            Err(error) => {
                let kind = self.turns.next().map_or(BackupType::Full, |due| due.kind);
                let problem = format!("it cannot be told which backups there are: {error}");
                self.turns.failed(kind, &problem);
                return Err(kind);
            }
        };
        let now = Utc::now();
        let due = self.schedules.next(&done, now);
        self.turns.set_next(due);
        let Some(due) = due.filter(|due| due.at <= now) else { return Ok(done) };
        tracing::info!("a {} backup was due at {}", due.kind, due.at.format("%Y-%m-%d %H:%M UTC"));
        let request = BackupRequest { kind: due.kind, ..self.request.clone() };
        match turn.take(&request, &self.regions, &self.archive).await {
            // It may have become a larger one, for want of a parent.
            Ok(outcome) => {
                done.add(due.kind, now);
                done.add(outcome.info.kind, now);
                Ok(done)
            }
            // The same pages would be read again, with the same end.
            Err(BackupError::Checksums(_)) => {
                done.add(due.kind, now);
                Ok(done)
            }
            Err(_) => Err(due.kind),
        }
    }

    /// When the backups in the archive began, by this machine's clock.
    async fn ask_archive(&self, system_id: u64) -> Result<Done, BackupError> {
        let server = self.request.connector.first_sql().await?.clock().await?;
        let behind = Utc::now() - server + CLOCK_TOLERANCE;
        let cluster = self.regions.within(&self.request.archive.cluster);
        let mut done = Done::default();
        let lineages = list_lineages(&cluster).await?;
        let Some(lineage) = lineages.into_iter().find(|found| found.system_id() == system_id)
        else {
            return Ok(done);
        };
        for (info, _) in Catalog::read(&cluster, lineage).await?.backups.values() {
            done.add(info.kind, info.start_time + behind);
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
