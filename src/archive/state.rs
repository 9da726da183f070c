//! What the archiver knows of itself: read by status reports, changed by its tasks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::durability::{Hold, HoldLimits};
use crate::config::Durability;
use crate::wal::{Lsn, TimelineId};

/// Samples of when WAL arrived, for the lag in time; older ones are thinned out.
const MAX_SAMPLES: usize = 4096;
/// Samples are at least this far apart.
const SAMPLE_SPACING: Duration = Duration::from_millis(50);
/// A region that failed for so long counts as unreachable.
const UNREACHABLE_AFTER: Duration = Duration::from_secs(5);
/// A region that was unreachable counts as healthy again once it has worked for so long.
const HEALTHY_AFTER: Duration = Duration::from_secs(3);
/// Alarms that are kept; each is told once.
const MAX_ALARMS: usize = 32;

/// How a region stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionHealth {
    /// It takes what it gets.
    Healthy,
    /// It takes writes but is behind.
    Lagging,
    /// What it missed is being copied from another region.
    Repairing,
    /// It does not take writes.
    Unreachable,
}

impl RegionHealth {
    /// The word used in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            RegionHealth::Healthy => "healthy",
            RegionHealth::Lagging => "lagging",
            RegionHealth::Repairing => "repairing",
            RegionHealth::Unreachable => "unreachable",
        }
    }
}

/// One region in a report.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionReport {
    /// Its name.
    pub name: String,
    /// Its URL.
    pub url: String,
    /// How it stands.
    pub health: RegionHealth,
    /// Its frontier on the current timeline.
    pub frontier: Option<Lsn>,
    /// How many bytes it is behind the server.
    pub lag_bytes: Option<u64>,
    /// The age of the oldest WAL that it does not have.
    pub lag_seconds: Option<f64>,
    /// Its last failure.
    pub last_error: Option<String>,
}

/// What an archiver reports.
#[derive(Clone, Debug, PartialEq)]
pub struct ArchiveReport {
    /// Whether it is streaming now.
    pub streaming: bool,
    /// Whether another archiver holds the slot: this one waits as a hot spare.
    pub is_spare: bool,
    /// Why not, or the last trouble.
    pub trouble: Option<String>,
    /// The server that it streams from.
    pub host: Option<String>,
    /// The server's version.
    pub server_version: Option<String>,
    /// The cluster's system identifier.
    pub system_id: Option<u64>,
    /// The timeline being archived.
    pub timeline: Option<TimelineId>,
    /// The server's clock, when it last spoke.
    pub server_time: Option<DateTime<Utc>>,
    /// The end of the server's WAL, when it last spoke.
    pub wal_end: Lsn,
    /// What the durability policy makes of the regions.
    pub durable_lsn: Lsn,
    /// Whether the durability policy has given way (`wal.max_hold_bytes`, `wal.max_hold_time`).
    pub has_fallen_back: bool,
    /// What an operator must look into, until the next restart.
    pub alarms: Vec<String>,
    /// The regions.
    pub regions: Vec<RegionReport>,
}

#[derive(Debug)]
struct RegionState {
    name: String,
    url: String,
    frontier: Option<Lsn>,
    repairing: bool,
    behind: bool,
    failing_since: Option<Instant>,
    /// When it answered again after it had been unreachable.
    back_since: Option<Instant>,
    last_error: Option<String>,
}

impl RegionState {
    fn worked(&mut self) {
        let now = Instant::now();
        if let Some(since) = self.failing_since.take()
            && now.duration_since(since) >= UNREACHABLE_AFTER
        {
            self.back_since = Some(now);
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    streaming: bool,
    /// The session has streamed: what is known is its own.
    has_streamed: bool,
    is_spare: bool,
    trouble: Option<String>,
    host: Option<String>,
    server_version: Option<String>,
    system_id: Option<u64>,
    timeline: Option<TimelineId>,
    server_time: Option<DateTime<Utc>>,
    wal_end: Lsn,
    samples: VecDeque<(Lsn, Instant)>,
    regions: Vec<RegionState>,
    hold: Hold,
    /// The server waits for this archiver before it lets commits return.
    is_synchronous: Option<bool>,
    alarms: Vec<String>,
    asked: Vec<(Lsn, Lsn)>,
}

/// The archiver's state, shared by its tasks.
#[derive(Clone)]
pub struct ArchiveState {
    inner: Arc<Mutex<Inner>>,
    policy: Durability,
    limits: HoldLimits,
    durable: Arc<watch::Sender<Lsn>>,
    gaps: Arc<watch::Sender<u64>>,
}

impl ArchiveState {
    /// A state for regions with these names and URLs.
    pub fn new(
        policy: Durability,
        limits: HoldLimits,
        regions: impl Iterator<Item = (String, String)>,
    ) -> ArchiveState {
        let regions = regions
            .map(|(name, url)| RegionState {
                name,
                url,
                frontier: None,
                repairing: false,
                behind: false,
                failing_since: None,
                back_since: None,
                last_error: None,
            })
            .collect();
        let inner = Inner { regions, ..Inner::default() };
        ArchiveState {
            inner: Arc::new(Mutex::new(inner)),
            policy,
            limits,
            durable: Arc::new(watch::Sender::new(Lsn::INVALID)),
            gaps: Arc::new(watch::Sender::new(0)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The durable LSN and its changes.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        self.durable.subscribe()
    }

    /// How many gaps were recorded since the start, and its changes: each calls for a new base
    /// backup.
    pub fn gaps(&self) -> watch::Receiver<u64> {
        self.gaps.subscribe()
    }

    pub(super) fn gap_recorded(&self) {
        self.gaps.send_modify(|gaps| *gaps += 1);
    }

    fn update_durable(&self, inner: &mut Inner) {
        let frontiers: Vec<_> = inner.regions.iter().map(|region| region.frontier).collect();
        // As long as it is not known, it may be synchronous: nothing gives way.
        let limits = (inner.is_synchronous == Some(false)).then_some(self.limits);
        let before = inner.hold.has_fallen_back();
        let durable = inner.hold.decide(self.policy, limits, &frontiers, Instant::now());
        match (before, inner.hold.has_fallen_back()) {
            (false, true) => tracing::error!(
                "the regions that durability = {:?} waits for hold too much WAL on the server: one region is enough until they have caught up (wal.max_hold_bytes, wal.max_hold_time)",
                self.policy
            ),
            (true, false) => tracing::info!("durability = {:?} holds again", self.policy),
            _ => {}
        }
        // What was called durable stays so: a policy that comes back takes nothing back.
        self.durable.send_if_modified(|value| {
            let moves = durable > *value;
            *value = durable.max(*value);
            moves
        });
    }

    /// Time passes: the durability policy may give way.
    pub(super) fn tick(&self) {
        self.update_durable(&mut self.lock());
    }

    /// Whether commits on the server wait for this archiver.
    pub(super) fn set_synchronous(&self, is_synchronous: bool) {
        let mut inner = self.lock();
        inner.is_synchronous = Some(is_synchronous);
        self.update_durable(&mut inner);
    }

    /// Notes what an operator must look into; whether it is new.
    pub fn alarm(&self, alarm: String) -> bool {
        let mut inner = self.lock();
        let is_new = !inner.alarms.contains(&alarm) && inner.alarms.len() < MAX_ALARMS;
        if is_new {
            inner.alarms.push(alarm);
        }
        is_new
    }

    /// Whether the server has not been asked for this range yet.
    pub(super) fn asks_first_time(&self, range: (Lsn, Lsn)) -> bool {
        let mut inner = self.lock();
        let is_new = !inner.asked.contains(&range);
        if is_new {
            inner.asked.push(range);
        }
        is_new
    }

    /// Streaming begins from a server, on a timeline.
    pub(super) fn begin(
        &self,
        host: String,
        version: String,
        system_id: u64,
        timeline: TimelineId,
    ) {
        let mut inner = self.lock();
        inner.streaming = true;
        inner.has_streamed = true;
        inner.is_spare = false;
        inner.trouble = None;
        inner.host = Some(host);
        inner.server_version = Some(version);
        inner.system_id = Some(system_id);
        inner.timeline = Some(timeline);
        inner.samples.clear();
        inner.wal_end = Lsn::INVALID;
    }

    /// A session begins: what was known of the last one is old.
    pub(super) fn begin_session(&self) {
        let mut inner = self.lock();
        inner.has_streamed = false;
        inner.is_synchronous = None;
    }

    /// Whether this session has streamed.
    pub(super) fn has_streamed(&self) -> bool {
        self.lock().has_streamed
    }

    /// Streaming ended.
    pub(super) fn end(&self, trouble: Option<String>) {
        let mut inner = self.lock();
        inner.streaming = false;
        inner.trouble = trouble;
    }

    /// Frontiers of another timeline begin.
    pub(super) fn reset_frontiers(&self) {
        let mut inner = self.lock();
        for region in &mut inner.regions {
            region.frontier = None;
        }
        inner.hold = Hold::default();
        self.durable.send_replace(Lsn::INVALID);
    }

    /// The server spoke.
    pub(super) fn heard(&self, wal_end: Lsn, received: Lsn, clock: DateTime<Utc>) {
        let mut inner = self.lock();
        inner.server_time = Some(clock);
        inner.wal_end = inner.wal_end.max(wal_end).max(received);
        let now = Instant::now();
        let due = inner
            .samples
            .back()
            .is_none_or(|(lsn, at)| received > *lsn && now.duration_since(*at) >= SAMPLE_SPACING);
        if due {
            if inner.samples.len() == MAX_SAMPLES {
                // Keep every second one: a longer memory, coarser.
                let mut keep = false;
                inner.samples.retain(|_| {
                    keep = !keep;
                    keep
                });
            }
            inner.samples.push_back((received, now));
        } else if let Some(last) = inner.samples.back_mut() {
            last.0 = last.0.max(received);
        }
    }

    /// Another archiver holds the slot.
    pub(super) fn wait_as_spare(&self) {
        self.lock().is_spare = true;
    }

    /// A region stores WAL without a hole up to here.
    pub(super) fn set_frontier(&self, region: usize, frontier: Lsn) {
        let mut inner = self.lock();
        inner.regions[region].frontier = Some(frontier);
        self.update_durable(&mut inner);
    }

    /// A region is copying what it missed, or has done so.
    pub(super) fn set_repairing(&self, region: usize, repairing: bool) {
        self.lock().regions[region].repairing = repairing;
    }

    /// A region had to drop out of the fast path, or is back.
    pub(super) fn set_behind(&self, region: usize, behind: bool) {
        self.lock().regions[region].behind = behind;
    }

    /// A request to a region failed.
    pub(super) fn failed(&self, region: usize, message: String) {
        let mut inner = self.lock();
        let region = &mut inner.regions[region];
        region.failing_since.get_or_insert_with(Instant::now);
        region.last_error = Some(message);
    }

    /// A request to a region worked.
    pub(super) fn worked(&self, region: usize) {
        self.lock().regions[region].worked();
    }

    /// Everything, for people and programs.
    pub fn report(&self) -> ArchiveReport {
        let durable_lsn = *self.durable.borrow();
        let inner = self.lock();
        let now = Instant::now();
        let regions = inner.regions.iter().map(|region| inner.region_report(region, now)).collect();
        ArchiveReport {
            streaming: inner.streaming,
            is_spare: inner.is_spare,
            trouble: inner.trouble.clone(),
            host: inner.host.clone(),
            server_version: inner.server_version.clone(),
            system_id: inner.system_id,
            timeline: inner.timeline,
            server_time: inner.server_time,
            wal_end: inner.wal_end,
            durable_lsn,
            has_fallen_back: inner.hold.has_fallen_back(),
            alarms: inner.alarms.clone(),
            regions,
        }
    }
}

impl Inner {
    fn region_report(&self, region: &RegionState, now: Instant) -> RegionReport {
        let frontier = region.frontier;
        let failing = region.failing_since.map(|since| now.duration_since(since));
        let back = region.back_since.map(|since| now.duration_since(since));
        let is_back_shortly = back.is_some_and(|time| time < HEALTHY_AFTER);
        let health = match failing {
            Some(time) if time >= UNREACHABLE_AFTER => RegionHealth::Unreachable,
            _ if region.repairing => RegionHealth::Repairing,
            _ if region.behind || frontier.is_none() => RegionHealth::Lagging,
            _ if is_back_shortly => RegionHealth::Lagging,
            _ => RegionHealth::Healthy,
        };
        let oldest = frontier
            .and_then(|frontier| self.samples.iter().find(|(lsn, _)| *lsn > frontier))
            .map(|(_, at)| now.duration_since(*at).as_secs_f64());
        RegionReport {
            name: region.name.clone(),
            url: region.url.clone(),
            health,
            frontier,
            lag_bytes: frontier.map(|frontier| self.wal_end.bytes_since(frontier)),
            lag_seconds: frontier.map(|_| oldest.unwrap_or(0.0)),
            last_error: region.last_error.clone(),
        }
    }
}
