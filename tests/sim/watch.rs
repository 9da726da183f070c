//! What is looked at all the time: regions without faults stay current (I6), processes that are
//! told to stop do so, clones are refused.

use std::collections::VecDeque;
use std::time::Duration;

use pgkeep::wal::Lsn;

use crate::process::{Death, Process};
use crate::store::Faults;
use crate::world::{HostState, Network, Sim};

/// After a disturbance that concerns a region so long nothing is expected of it.
const GRACE: Duration = Duration::from_secs(45);
/// A region without faults has WAL so long after the flush interval.
const LAG: Duration = Duration::from_secs(10);
/// An archiver that is told to stop has this long.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// The watch over one run.
pub struct Watch {
    lag: Duration,
    /// Since when each region has had no faults.
    healthy: Vec<Duration>,
    /// Since when server, network and archiver have been undisturbed.
    undisturbed: Duration,
    /// The primary's timeline and end, over time.
    flushed: VecDeque<(Duration, u32, Lsn)>,
    last: Option<(usize, u32, u64)>,
    last_starts: u64,
    late: Vec<bool>,
    pub stopping: Vec<(Duration, Process)>,
}

impl Watch {
    pub fn new(regions: usize, flush_interval: Duration) -> Watch {
        Watch {
            lag: flush_interval + LAG,
            healthy: vec![Duration::ZERO; regions],
            undisturbed: Duration::ZERO,
            flushed: VecDeque::new(),
            last: None,
            last_starts: 0,
            late: vec![false; regions],
            stopping: Vec::new(),
        }
    }

    /// Looks at the world. `starts` grows whenever an archiver dies or is started.
    pub fn look(&mut self, sim: &Sim, archiving: bool, starts: u64) {
        let now = sim.now();
        for (region, healthy) in sim.regions.iter().zip(&mut self.healthy) {
            if region.state().faults != Faults::NONE {
                *healthy = now;
            }
        }
        let mut late = Vec::new();
        {
            let world = sim.world();
            let primary = world.primary().filter(|host| world.hosts[*host].state == HostState::Up);
            let current = primary.map(|host| {
                let state = &world.hosts[host];
                self.flushed.push_back((now, state.timeline, state.flushed));
                (host, state.timeline, state.epoch)
            });
            let network = world.network;
            let calm = Network::default();
            let is_calm = network.cuts == calm.cuts && network.rate == calm.rate;
            let lost_slot =
                primary.is_some_and(|host| world.hosts[host].slots.values().any(|slot| slot.lost));
            let same = current.is_some() && current == self.last && starts == self.last_starts;
            if !same || !archiving || !is_calm || lost_slot {
                self.undisturbed = now;
            }
            (self.last, self.last_starts) = (current, starts);
            while self.flushed.len() > 1 && self.flushed[1].0 + self.lag <= now {
                self.flushed.pop_front();
            }
            if let (Some((_, tli, _)), Some((at, then, lsn))) = (current, self.flushed.front()) {
                let calm = now.saturating_sub(self.undisturbed) > GRACE + self.lag;
                for region in 0..self.healthy.len() {
                    let healthy = now.saturating_sub(self.healthy[region]) > GRACE + self.lag;
                    if !calm || !healthy || *then != tli || *at + self.lag > now {
                        continue;
                    }
                    let frontier = world.ledger.frontier(region, &world.wal, tli);
                    if frontier < *lsn && !self.late[region] {
                        self.late[region] = true;
                        late.push(format!("r{region} has no faults, and reaches {frontier}; the server had {lsn} {:?} ago", now - *at));
                    }
                }
            }
        }
        for what in late {
            sim.violated("I6", what);
        }
    }

    /// An archiver ended without having been asked to.
    pub fn ended(&mut self, sim: &Sim, process: Process) {
        let id = process.fence.id;
        match now_or_never(process) {
            Some(Ok(Err(error))) => {
                sim.note(format!("archiver {id} ended: {error}"));
                if error.is_divergence() || !error.is_transient() {
                    sim.violated("I8", format!("archiver {id} gave up: {error}"));
                }
            }
            Some(Ok(Ok(()))) => sim.violated("I8", format!("archiver {id} ended by itself")),
            Some(Err(error)) if error.is_panic() => sim.violated("I9", format!("{error:?}")),
            _ => {}
        }
    }

    /// The clone's archiver must have refused.
    pub fn clone_ended(&mut self, sim: &Sim, process: Process) {
        let id = process.fence.id;
        if !process.task.is_finished() {
            // It may never have got as far as the comparison.
            return process.fence.kill(Death::Killed);
        }
        match now_or_never(process) {
            Some(Ok(Err(error))) if error.is_divergence() => {
                sim.note(format!("the clone's archiver {id} refused: {error}"));
            }
            other => sim.note(format!("the clone's archiver {id} ended: {other:?}")),
        }
    }

    /// Those that were told to stop do.
    pub fn look_at_stopping(&mut self, sim: &Sim) {
        let now = sim.now();
        let mut on = Vec::new();
        for (since, process) in std::mem::take(&mut self.stopping) {
            let id = process.fence.id;
            if process.task.is_finished() {
                sim.note(format!("archiver {id} has stopped"));
                let ended = now_or_never(process);
                if let Some(Err(error)) = ended.filter(|end| !is_killed(end)) {
                    sim.violated("I9", format!("archiver {id}: {error:?}"));
                }
            } else if now - since > STOP_LIMIT {
                sim.violated("I9", format!("archiver {id} did not stop within {STOP_LIMIT:?}"));
                process.fence.kill(Death::Killed);
            } else {
                on.push((since, process));
            }
        }
        self.stopping = on;
    }
}

/// It died while it stopped.
fn is_killed(ended: &Ended) -> bool {
    ended.as_ref().is_err_and(tokio::task::JoinError::is_cancelled)
}

type Ended = Result<Result<(), pgkeep::archive::ArchiveError>, tokio::task::JoinError>;

fn now_or_never(process: Process) -> Option<Ended> {
    futures_util::FutureExt::now_or_never(process.task)
}
