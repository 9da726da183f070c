//! What happens to servers: crashes, shutdowns, promotions, rejoining; and the load on the primary.

use std::time::Duration;

use crate::dice::Dice;
use crate::plan::Plan;
use crate::wal::PAGE;
use crate::world::{Host, HostState, World};

/// What the primary's clients do, spell by spell.
pub struct Load {
    until: Duration,
    /// Bytes a tick.
    bytes: u64,
    written: u64,
}

impl Load {
    pub fn new() -> Load {
        Load { until: Duration::ZERO, bytes: 0, written: 0 }
    }

    /// A tick of bursts, trickles and idle spells.
    pub fn tick(&mut self, now: Duration, dice: &mut Dice, plan: &Plan, world: &mut World) {
        if now >= self.until {
            let bytes = match dice.below(10) {
                0..3 => 0,
                3..7 => dice.between(100, 3_000),
                7..9 => dice.between(3_000, 20_000),
                _ => dice.between(20_000, 150_000),
            };
            self.until = now + Duration::from_millis(dice.between(500, 15_000));
            self.bytes = if self.written > plan.wal { bytes / 50 } else { bytes };
        }
        let amount = if self.bytes == 0 { 0 } else { dice.between(1, 2 * self.bytes) };
        let (switches, whole) = (dice.below(3000) == 0, dice.percent(80));
        let checkpoint = dice.below(80) == 0;
        self.written += amount;
        let primary = world.primary().filter(|host| world.hosts[*host].state == HostState::Up);
        if let Some(primary) = primary {
            let tli = world.hosts[primary].timeline;
            if amount > 0 {
                world.wal.transaction(tli, amount);
            }
            if switches {
                world.wal.switch(tli);
            }
            let end = world.wal.end(tli);
            let host = &mut world.hosts[primary];
            // Whole pages may be flushed before the record that they end in is complete.
            let flushed = if whole || amount == 0 { end } else { end.round_down(PAGE) };
            host.flushed = host.flushed.max(flushed);
        }
        world.replicate();
        for host in 0..world.hosts.len() {
            if checkpoint && !world.hosts[host].is_clone {
                world.checkpoint(host, plan.keep);
            }
        }
    }
}

impl World {
    pub fn add_clone(&mut self) {
        for _ in 0..12 {
            self.clone_wal.transaction(1, 300_000);
        }
        let (begin, end) = (self.clone_wal.start(1), self.clone_wal.end(1));
        let clone = Host { flushed: end, is_clone: true, ..Host::new("clone".into(), begin) };
        self.hosts.push(clone);
    }

    /// A server stops, all at once if it crashes.
    pub fn go_down(&mut self, host: usize, crash: bool) {
        let (tli, flushed, standby) = {
            let host = &mut self.hosts[host];
            host.state = HostState::Down;
            host.epoch += 1;
            host.slots.values_mut().for_each(|slot| slot.active = None);
            (host.timeline, host.flushed, host.standby)
        };
        if crash && !standby {
            self.wal.crash(tli, flushed);
        }
    }

    pub fn come_up(&mut self, host: usize) {
        self.hosts[host].state = HostState::Up;
        self.flush_all(host);
    }

    /// A standby becomes the primary, on a timeline of its own.
    pub fn promote(&mut self, new: usize) {
        let last = self.wal.timelines().map(|(tli, _)| tli).max().unwrap_or(1);
        let (tli, end) = (self.hosts[new].timeline, self.hosts[new].flushed);
        // Some numbers are skipped: a promotion that came to nothing took them.
        let next = last + 1 + u64::from(end.0 % 24 == 0) as u32;
        let fork = self.wal.fork(tli, next, end);
        for (index, host) in self.hosts.iter_mut().enumerate().filter(|(_, host)| !host.is_clone) {
            host.standby = index != new;
            if index == new {
                (host.timeline, host.follows) = (next, false);
                host.redo = host.redo.min(fork);
            } else if host.flushed > fork {
                // It must be rewound first; that takes no time here.
                host.flushed = fork;
            }
        }
        self.flush_all(new);
    }

    /// A failed primary comes back as a standby, rewound or made anew.
    pub fn rejoin(&mut self, index: usize) {
        let Some(primary) = self.primary() else { return };
        let (tli, flushed, redo) = {
            let host = &self.hosts[primary];
            (host.timeline, host.flushed, host.redo)
        };
        let oldest = self.hosts[primary].oldest;
        let host = &mut self.hosts[index];
        host.state = HostState::Up;
        (host.standby, host.follows) = (true, true);
        (host.timeline, host.flushed, host.redo) = (tli, flushed, redo);
        host.oldest = oldest.max(host.oldest);
        host.slots.clear();
        for host in self.hosts.iter_mut().filter(|host| host.standby) {
            host.follows = true;
        }
    }
}
