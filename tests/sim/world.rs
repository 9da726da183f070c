//! What the simulated world is made of: the servers' state, what they were told, the trace.
//!
//! Everything that must survive the death of a process or a connection lives here, as plain data
//! under one lock that is never held over an await. `changed` says that something changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pgkeep::wal::Lsn;
use tokio::io::DuplexStream;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::dice::{Dice, number_of};
use crate::invariants::Ledger;
use crate::store::RegionData;
use crate::wal::{SEGMENT, Wal};

/// How a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    Up,
    /// A fast shutdown: it waits until its walsenders' clients have everything.
    Stopping,
    Down,
}

/// A replication slot.
#[derive(Clone, Debug, Default)]
pub struct Slot {
    pub restart: Option<Lsn>,
    /// The connection that streams from it.
    pub active: Option<u64>,
    /// Its WAL was removed (`max_slot_wal_keep_size`).
    pub lost: bool,
}

/// One server.
pub struct Host {
    pub name: String,
    pub state: HostState,
    pub standby: bool,
    pub timeline: u32,
    pub flushed: Lsn,
    /// The first byte that it still has, on whatever timeline.
    pub oldest: Lsn,
    /// Where its last checkpoint began.
    pub redo: Lsn,
    pub slots: BTreeMap<String, Slot>,
    /// Grows with every crash: connections of an older one are cut.
    pub epoch: u64,
    /// Whether it receives WAL from the primary.
    pub follows: bool,
    /// Its WAL differs from everybody else's.
    pub is_clone: bool,
}

/// What the network does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network {
    /// Connections in a hundred that are cut after some bytes.
    pub cuts: u64,
    /// Bytes a second; 0 without limit.
    pub rate: u64,
}

/// The world's state.
pub struct World {
    pub wal: Wal,
    /// The WAL of the clone.
    pub clone_wal: Wal,
    pub hosts: Vec<Host>,
    pub network: Network,
    /// `max_slot_wal_keep_size` in bytes.
    pub slot_limit: Option<u64>,
    pub ledger: Ledger,
    pub connections: u64,
    /// Walsenders that are streaming, by connection.
    pub walsenders: BTreeSet<u64>,
    /// Sockets of hosts that vanished: nobody closed them.
    pub graveyard: Vec<DuplexStream>,
    pub trace: Trace,
}

/// The simulated world.
pub struct Sim {
    pub seed: u64,
    start: Instant,
    world: Mutex<World>,
    pub changed: Notify,
    pub regions: Vec<Arc<RegionData>>,
}

/// What happened, in order.
#[derive(Default)]
pub struct Trace {
    pub lines: Vec<String>,
    pub hash: u64,
    pub verbose: bool,
}

impl Host {
    pub fn new(name: String, begin: Lsn) -> Host {
        Host {
            name,
            state: HostState::Up,
            standby: false,
            timeline: 1,
            flushed: begin,
            oldest: begin,
            redo: begin,
            slots: BTreeMap::new(),
            epoch: 0,
            follows: false,
            is_clone: false,
        }
    }
}

impl Sim {
    pub fn new(seed: u64, regions: Vec<Arc<RegionData>>, hosts: usize, verbose: bool) -> Arc<Sim> {
        let mut dice = Dice::new(seed, "begin");
        // Some archives go over the end of a folder of 4 GiB.
        let segments = if dice.percent(30) { 4096 - dice.between(1, 4) } else { 300 };
        let begin = Lsn(segments * SEGMENT);
        let wal = Wal::new(Dice::new(seed, "wal"), begin);
        let clone_wal = Wal::new(Dice::new(seed, "clone"), begin);
        let host = |index: usize| Host {
            standby: index > 0,
            follows: index > 0,
            flushed: wal.end(1),
            ..Host::new(format!("db{}", index + 1), begin)
        };
        let hosts = (0..hosts).map(host).collect();
        let world = World {
            wal,
            clone_wal,
            hosts,
            network: Network::default(),
            slot_limit: None,
            ledger: Ledger::new(regions.len()),
            connections: 0,
            walsenders: BTreeSet::new(),
            graveyard: Vec::new(),
            trace: Trace { verbose, ..Trace::default() },
        };
        let changed = Notify::new();
        Arc::new(Sim { seed, start: Instant::now(), world: Mutex::new(world), changed, regions })
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Virtual time since the simulation began.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Adds a line to the trace.
    pub fn note(&self, text: impl AsRef<str>) {
        let now = self.now();
        self.world().trace.add(now, text.as_ref());
    }

    /// Something is as it must never be.
    pub fn violated(&self, invariant: &str, what: impl AsRef<str>) {
        let text = format!("VIOLATED {invariant}: {}", what.as_ref());
        let now = self.now();
        let mut world = self.world();
        world.trace.add(now, &text);
        world.ledger.violations.push(format!("{:.3} s: {text}", now.as_secs_f64()));
    }

    /// Changes the world and tells everybody.
    pub fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let value = change(&mut self.world());
        self.changed.notify_waiters();
        value
    }
}

impl Trace {
    fn add(&mut self, now: Duration, text: &str) {
        let mut line = String::new();
        write!(line, "{:9.3} {text}", now.as_secs_f64()).unwrap();
        self.hash = self.hash.rotate_left(5) ^ number_of(&line);
        if self.verbose {
            eprintln!("{line}");
        }
        self.lines.push(line);
    }
}

impl World {
    /// The server that writes.
    pub fn primary(&self) -> Option<usize> {
        self.hosts.iter().position(|host| !host.standby && !host.is_clone)
    }

    pub fn wal_of(&self, host: usize) -> &Wal {
        if self.hosts[host].is_clone { &self.clone_wal } else { &self.wal }
    }

    /// WAL that a host can send on a timeline: up to `limit`, unless it was removed.
    pub fn read_wal(&self, host: usize, tli: u32, from: Lsn, to: Lsn) -> Option<Vec<u8>> {
        if from.round_down(SEGMENT) < self.hosts[host].oldest {
            return None;
        }
        self.wal_of(host).read(tli, from, to).map(<[u8]>::to_vec)
    }

    /// The primary's whole WAL becomes durable on it.
    pub fn flush_all(&mut self, host: usize) {
        let tli = self.hosts[host].timeline;
        let end = self.wal_of(host).end(tli);
        self.hosts[host].flushed = end;
    }

    /// Standbys that follow receive what the primary has flushed.
    pub fn replicate(&mut self) {
        let Some(primary) = self.primary() else { return };
        let (tli, flushed, redo) = {
            let host = &self.hosts[primary];
            if host.state == HostState::Down {
                return;
            }
            (host.timeline, host.flushed, host.redo)
        };
        for host in self.hosts.iter_mut().filter(|host| host.standby && host.follows) {
            if host.state == HostState::Up {
                (host.timeline, host.flushed, host.redo) = (tli, flushed, redo);
            }
        }
    }

    /// A checkpoint removes WAL that nobody asked to keep: at most `keep` bytes stay without slot.
    pub fn checkpoint(&mut self, host: usize, keep: u64) {
        let limit = self.slot_limit;
        let host = &mut self.hosts[host];
        let mut oldest = Lsn(host.flushed.0.saturating_sub(keep));
        let at_least = limit.map(|limit| Lsn(host.flushed.0.saturating_sub(limit)));
        for slot in host.slots.values_mut() {
            let Some(restart) = slot.restart.filter(|_| !slot.lost) else { continue };
            if at_least
                .is_some_and(|at_least| restart.round_down(SEGMENT) < at_least.round_down(SEGMENT))
            {
                (slot.lost, slot.restart) = (true, None);
            } else {
                oldest = oldest.min(restart);
            }
        }
        host.redo = host.flushed.min(host.redo.max(oldest));
        host.oldest = host.oldest.max(oldest.round_down(SEGMENT));
    }
}
