//! One run: the world is made, time passes, what the plan has happens, then all is well again and
//! the archive must become whole.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use pgkeep::archive::ArchiveSettings;
use pgkeep::config::Config;
use pgkeep::wal::Lsn;

use crate::dice::Dice;
use crate::invariants::CLUSTER;
use crate::plan::{Plan, Step};
use crate::process::{self, CLONE, Process};
use crate::servers::Load;
use crate::store::{Faults, RegionData};
use crate::watch::Watch;
use crate::world::{HostState, Network, Sim};

/// How finely time passes for servers and for who watches over processes.
const TICK: Duration = Duration::from_millis(100);
/// A standby takes over, and a server that failed comes back, so much later.
const PROMOTION: Duration = Duration::from_secs(2);
const REJOIN: Duration = Duration::from_secs(12);
/// A server shuts down by force after this time.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(100);
/// A service manager starts what ended by itself again after this time.
const SERVICE_RESTART: Duration = Duration::from_secs(2);
/// So long everything may take to become whole once nothing is wrong any more.
const RECOVERY_LIMIT: Duration = Duration::from_secs(45 * 60);
/// An archiver of a clone is given up after this time.
const CLONE_LIFE: Duration = Duration::from_secs(30);
/// How long the idle world is looked at.
const IDLE: Duration = Duration::from_secs(180);

/// What became of a seed.
pub struct Outcome {
    pub violations: Vec<String>,
    pub lines: Vec<String>,
    pub hash: u64,
    pub time: Duration,
    /// From the moment when nothing was wrong any more until the archive was whole.
    pub recovery: Duration,
    pub wal: u64,
    pub requests: u64,
    pub kills: u64,
    pub timelines: u64,
    pub gaps: u64,
    pub redressed: u64,
    /// What the server did not know.
    pub unknown: BTreeSet<String>,
}

/// Runs one seed.
pub fn simulate(seed: u64, verbose: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    pgkeep::jitter::seed(seed);
    pgkeep::offload::stay_here(Duration::from_millis(5));
    let outcome = runtime.block_on(async { Scenario::new(seed, verbose).run().await });
    runtime.shutdown_background();
    outcome
}

/// Something that a step began and that goes on later.
#[derive(Clone, Copy, Debug)]
enum Later {
    Up(usize),
    Promote { old: usize, new: usize },
    Rejoin(usize),
    ForceDown { host: usize, epoch: u64 },
    StartArchiver(usize),
}

struct Scenario {
    sim: Arc<Sim>,
    plan: Plan,
    dice: Dice,
    later: Vec<(Duration, Later)>,
    archivers: Vec<Option<Process>>,
    clones: Vec<(Duration, Process)>,
    started: u64,
    kills: u64,
    load: Load,
    /// After a shutdown: what happens to this host once it is down.
    stopping: Option<(usize, Option<u64>)>,
    watch: Watch,
}

impl Scenario {
    fn new(seed: u64, verbose: bool) -> Scenario {
        let plan = Plan::new(seed);
        let regions = plan.regions.iter().enumerate();
        let regions = regions.map(|(index, honours)| RegionData::new(index, *honours)).collect();
        let sim = Sim::new(seed, regions, plan.hosts, verbose);
        sim.note(format!("seed {seed}: {plan:?}"));
        sim.change(|world| {
            world.ledger.policy = plan.durability;
            world.slot_limit = plan.slot_limit;
            let end = world.wal.end(1);
            world.hosts.iter_mut().for_each(|host| host.flushed = end);
            world.add_clone();
        });
        let archivers = (0..1 + usize::from(plan.spare)).map(|_| None).collect();
        Scenario {
            watch: Watch::new(plan.regions.len(), plan.flush_interval),
            dice: Dice::new(seed, "scenario"),
            sim,
            plan,
            later: Vec::new(),
            archivers,
            clones: Vec::new(),
            started: 0,
            kills: 0,
            load: Load::new(),
            stopping: None,
        }
    }

    async fn run(mut self) -> Outcome {
        for archiver in 0..self.archivers.len() {
            self.later.push((
                Duration::from_millis(archiver as u64 * 900),
                Later::StartArchiver(archiver),
            ));
        }
        let mut steps = std::mem::take(&mut self.plan.steps).into_iter().peekable();
        while self.sim.now() < self.plan.end {
            while let Some((_, step)) = steps.next_if(|step| step.0 <= self.sim.now()) {
                self.step(step);
            }
            self.tick(true).await;
        }
        self.make_well();
        let begin = self.sim.now();
        let mut lacking = vec!["nothing was looked at".to_owned()];
        while self.sim.now() < begin + RECOVERY_LIMIT && !lacking.is_empty() {
            self.tick(false).await;
            let waits = !self.later.is_empty() || self.stopping.is_some();
            lacking = self.sim.world().lacking();
            if waits {
                lacking.push("servers are not back yet".into());
            }
        }
        let recovery = self.sim.now() - begin;
        self.sim.note(format!("whole after {recovery:?}"));
        for what in lacking {
            self.sim.violated("I8", format!("after {recovery:?} without faults: {what}"));
        }
        self.look_idle().await;
        self.stop_all().await;
        self.sim.check_everything();
        self.outcome(recovery)
    }

    /// A moment passes.
    async fn tick(&mut self, busy: bool) {
        tokio::time::sleep(TICK).await;
        let now = self.sim.now();
        if busy {
            let Scenario { sim, load, dice, plan, .. } = self;
            sim.change(|world| load.tick(now, dice, plan, world));
        }
        let due: Vec<Later> = {
            let (due, later) = self.later.drain(..).partition(|(at, _)| *at <= now);
            self.later = later;
            let due: Vec<(Duration, Later)> = due;
            due.into_iter().map(|(_, what)| what).collect()
        };
        for what in due {
            self.happen(what);
        }
        self.look_at_shutdown();
        self.look_at_archivers();
        let streaming = self.archivers.iter().flatten().any(|one| !one.fence.is_dead());
        self.watch.look(&self.sim, streaming, self.started + self.kills);
    }

    fn after(&mut self, delay: Duration, what: Later) {
        self.later.push((self.sim.now() + delay, what));
    }

    /// The primary, if nothing else is happening to the servers already.
    fn quiet_primary(&self) -> Option<usize> {
        let busy = self.stopping.is_some()
            || self.later.iter().any(|(_, later)| !matches!(later, Later::StartArchiver(_)));
        let world = self.sim.world();
        world.primary().filter(|host| !busy && world.hosts[*host].state == HostState::Up)
    }

    fn step(&mut self, step: Step) {
        self.sim.note(format!("step {step:?}"));
        match step {
            Step::Region(region, faults) => self.sim.regions[region].state().faults = faults,
            Step::Network(network) => self.sim.change(|world| world.network = network),
            Step::Kill { archiver, death, back } => {
                if let Some(process) = self.archivers[archiver].take() {
                    process.fence.kill(death);
                    self.died(archiver, back);
                }
            }
            Step::KillAtRequest { archiver, steps } => {
                if let Some(process) = &self.archivers[archiver] {
                    process.fence.die_after(steps);
                }
            }
            Step::Stop { archiver, back } => {
                if let Some(process) = self.archivers[archiver].take() {
                    process.cancelled.cancel();
                    self.watch.stopping.push((self.sim.now(), process));
                    self.after(back, Later::StartArchiver(archiver));
                }
            }
            Step::DropSlot => self.sim.change(|world| {
                for host in &mut world.hosts {
                    host.slots.retain(|_, slot| slot.active.is_some());
                }
            }),
            Step::Clone => self.start_clone(),
            _ => self.server_step(step),
        }
    }

    /// An archiver begins to stream from a clone of the primary, into an archive that exists.
    fn start_clone(&mut self) {
        let ends: Vec<Lsn> = {
            let world = self.sim.world();
            let regions = 0..self.plan.regions.len();
            regions.map(|region| world.ledger.frontier(region, &world.wal, 1)).collect()
        };
        let furthest = ends.into_iter().max().unwrap_or(Lsn::INVALID);
        // The first records are the same in both, and tell nothing.
        let begin = self.sim.world().wal.start(1);
        if furthest <= begin.advance(16 << 10) {
            return;
        }
        self.started += 1;
        let process =
            process::start(&self.sim, CLONE + self.started, settings(&self.plan), "clone");
        self.clones.push((self.sim.now(), process));
    }

    fn server_step(&mut self, step: Step) {
        let Some(primary) = self.quiet_primary() else { return };
        let standby = self.sim.world().hosts.iter().position(|host| host.standby && host.follows);
        match (step, standby) {
            (Step::Crash { back }, _) => {
                self.sim.change(|world| world.go_down(primary, true));
                self.after(back, Later::Up(primary));
            }
            (Step::Restart, _) => self.shut_down(primary, None),
            (Step::Failover { lag, fork_at }, Some(new)) => {
                self.sim.change(|world| {
                    world.wal.fill_to(world.hosts[primary].timeline, fork_at);
                    world.flush_all(primary);
                    world.replicate();
                    if lag > Duration::from_secs(2) {
                        // The primary writes what its standby never gets.
                        world.wal.transaction(
                            world.hosts[primary].timeline,
                            lag.as_millis() as u64 * 40,
                        );
                        world.flush_all(primary);
                        world.hosts[new].follows = false;
                    }
                });
                // It lives on for a moment: some of it is archived.
                let alive = lag / 4;
                self.after(alive, Later::ForceDown { host: primary, epoch: u64::MAX });
                self.after(alive + PROMOTION, Later::Promote { old: primary, new });
            }
            (Step::Switchover { fork_at }, Some(_)) => self.shut_down(primary, Some(fork_at)),
            _ => {}
        }
    }

    /// A fast shutdown; afterwards a standby is promoted, or the server starts again.
    fn shut_down(&mut self, host: usize, promote: Option<u64>) {
        let epoch = self.sim.change(|world| {
            let tli = world.hosts[host].timeline;
            world.wal.checkpoint(tli, true);
            if let Some(unit) = promote {
                world.wal.fill_to(tli, unit);
            }
            world.flush_all(host);
            world.replicate();
            world.hosts[host].state = HostState::Stopping;
            world.hosts[host].epoch
        });
        self.stopping = Some((host, promote));
        self.after(SHUTDOWN_LIMIT, Later::ForceDown { host, epoch });
    }

    /// A server that shuts down is down once nobody streams from it any more.
    fn look_at_shutdown(&mut self) {
        let Some((host, promote)) = self.stopping else { return };
        let (state, idle) = {
            let world = self.sim.world();
            (world.hosts[host].state, world.walsenders.is_empty())
        };
        if state == HostState::Stopping && !idle {
            return;
        }
        self.sim.note("the server has shut down");
        self.later.retain(|(_, later)| !matches!(later, Later::ForceDown { .. }));
        self.stopping = None;
        self.sim.change(|world| world.go_down(host, false));
        let new = self.sim.world().hosts.iter().position(|host| host.standby && host.follows);
        match (promote, new) {
            (Some(_), Some(new)) => self.after(PROMOTION, Later::Promote { old: host, new }),
            _ => self.after(PROMOTION, Later::Up(host)),
        }
    }

    fn happen(&mut self, what: Later) {
        match what {
            Later::StartArchiver(archiver) => self.start_archiver(archiver),
            _ => self.sim.note(format!("{what:?}")),
        }
        match what {
            Later::StartArchiver(_) => {}
            Later::Up(host) => self.sim.change(|world| world.come_up(host)),
            Later::Promote { old, new } => {
                self.sim.change(|world| world.promote(new));
                self.after(REJOIN, Later::Rejoin(old));
            }
            Later::Rejoin(host) => self.sim.change(|world| world.rejoin(host)),
            Later::ForceDown { host, epoch } => {
                if epoch != u64::MAX {
                    self.sim.violated("I9", "a shutdown was held up until it was forced");
                }
                self.sim.change(|world| world.go_down(host, true));
            }
        }
    }

    fn died(&mut self, archiver: usize, back: Duration) {
        self.kills += 1;
        self.sim.check_acknowledged("after a kill");
        self.after(back, Later::StartArchiver(archiver));
    }

    fn start_archiver(&mut self, archiver: usize) {
        self.started += 1;
        let hosts = {
            let world = self.sim.world();
            let names = world.hosts.iter().filter(|host| !host.is_clone);
            names.map(|host| host.name.clone()).collect::<Vec<_>>().join(",")
        };
        let process = process::start(&self.sim, self.started, settings(&self.plan), &hosts);
        self.archivers[archiver] = Some(process);
    }

    /// A service manager: what ended is started again.
    fn look_at_archivers(&mut self) {
        for archiver in 0..self.archivers.len() {
            let Some(process) = &self.archivers[archiver] else { continue };
            if process.fence.is_dead() {
                self.archivers[archiver] = None;
                self.died(archiver, Duration::from_secs(1));
            } else if process.task.is_finished() {
                let Some(process) = self.archivers[archiver].take() else { continue };
                self.watch.ended(&self.sim, process);
                self.after(SERVICE_RESTART, Later::StartArchiver(archiver));
            }
        }
        self.watch.look_at_stopping(&self.sim);
        let now = self.sim.now();
        let (over, on): (Vec<_>, Vec<_>) = self
            .clones
            .drain(..)
            .partition(|(since, clone)| clone.task.is_finished() || now - *since > CLONE_LIFE);
        self.clones = on;
        for (_, clone) in over {
            self.watch.clone_ended(&self.sim, clone);
        }
    }

    /// From now on nothing is wrong any more.
    fn make_well(&mut self) {
        self.sim.note("from here on all is well");
        for region in &self.sim.regions {
            region.state().faults = Faults::NONE;
        }
        for process in self.archivers.iter().flatten() {
            process.fence.live_on();
        }
        self.sim.change(|world| {
            world.network = Network::default();
            if let Some(primary) =
                world.primary().filter(|host| world.hosts[*host].state == HostState::Up)
            {
                world.wal.transaction(world.hosts[primary].timeline, 500);
                world.flush_all(primary);
                world.replicate();
            }
        });
    }

    /// An idle cluster costs nearly nothing.
    async fn look_idle(&mut self) {
        // What hung when all became well may still be given up.
        let until = self.sim.now() + Duration::from_secs(60);
        while self.sim.now() < until {
            self.tick(false).await;
        }
        let before: Vec<u64> = self.sim.regions.iter().map(|r| r.state().requests).collect();
        let until = self.sim.now() + IDLE;
        while self.sim.now() < until {
            self.tick(false).await;
        }
        let archivers = self.archivers.len() as u64;
        let allowed = (IDLE.as_secs() / 60 + 1) * archivers;
        for (region, before) in self.sim.regions.iter().zip(before) {
            let requests = region.state().requests - before;
            if requests > allowed {
                let what =
                    format!("{requests} requests to {} while idle for {IDLE:?}", region.name);
                self.sim.violated("I9", what);
            }
        }
        let covered = self.sim.covered_pieces();
        self.sim.note(format!("{covered} pieces stand that larger ones cover"));
    }

    async fn stop_all(&mut self) {
        for process in self.archivers.iter_mut().filter_map(Option::take) {
            process.cancelled.cancel();
            self.watch.stopping.push((self.sim.now(), process));
        }
        while !self.watch.stopping.is_empty() {
            tokio::time::sleep(TICK).await;
            self.watch.look_at_stopping(&self.sim);
        }
    }

    fn outcome(self, recovery: Duration) -> Outcome {
        let requests = self.sim.regions.iter().map(|region| region.state().requests).sum();
        let time = self.sim.now();
        let mut world = self.sim.world();
        let primary = world.primary().map_or(1, |host| world.hosts[host].timeline);
        let lines = std::mem::take(&mut world.trace.lines);
        let unknown =
            lines.iter().filter_map(|line| Some(line[line.find("UNKNOWN")?..].to_owned()));
        Outcome {
            violations: world.ledger.violations.clone(),
            hash: world.trace.hash,
            unknown: unknown.collect(),
            lines,
            time,
            recovery,
            wal: world.wal.end(primary).0 - world.wal.start(1).0,
            requests,
            kills: self.kills,
            timelines: world.wal.timelines().count() as u64 - 1,
            gaps: world.ledger.gaps.len() as u64,
            redressed: world.ledger.redressed,
        }
    }
}

/// The archiver's settings, from a configuration as a user writes it.
fn settings(plan: &Plan) -> ArchiveSettings {
    let text = format!(
        "[cluster]\nname = \"{CLUSTER}\"\nconninfo = \"\"\n[[region]]\nname = \"r0\"\nurl = \"file:///\"\n"
    );
    let config = Config::parse(&text, std::path::Path::new("pgkeep.toml")).unwrap();
    let mut settings = ArchiveSettings::new(&config.cluster, &config.wal);
    settings.flush_interval = plan.flush_interval;
    settings.durability = plan.durability;
    settings.memory_limit = plan.memory_limit;
    settings
}
