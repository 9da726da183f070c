//! What a seed brings: the shape of the world, and when what goes wrong in it.

use std::time::Duration;

use pgkeep::config::Durability;

use crate::dice::Dice;
use crate::known;
use crate::process::Death;
use crate::store::{Faults, Refusal};
use crate::world::Network;

/// Everything about one run that is decided in advance.
#[derive(Debug)]
pub struct Plan {
    pub regions: Vec<bool>,
    pub hosts: usize,
    pub durability: Durability,
    pub flush_interval: Duration,
    pub memory_limit: u64,
    /// `max_slot_wal_keep_size`: only some servers ever remove WAL that is needed.
    pub slot_limit: Option<u64>,
    /// How much WAL stays on a server without anybody asking for it.
    pub keep: u64,
    /// A second archiver waits for the slot.
    pub spare: bool,
    pub steps: Vec<(Duration, Step)>,
    /// When everything is well again.
    pub end: Duration,
    /// The most WAL that bursts may write.
    pub wal: u64,
}

/// Something that happens.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A region has these faults from now on.
    Region(usize, Faults),
    Network(Network),
    /// An archiver dies, and comes back after so long.
    Kill {
        archiver: usize,
        death: Death,
        back: Duration,
    },
    /// It dies after so many more beginnings and ends of requests.
    KillAtRequest {
        archiver: usize,
        steps: u64,
    },
    /// It is told to stop.
    Stop {
        archiver: usize,
        back: Duration,
    },
    /// The primary crashes and starts again.
    Crash {
        back: Duration,
    },
    /// The primary is shut down and started again.
    Restart,
    /// The primary crashes, a standby takes over that lags so long.
    Failover {
        lag: Duration,
        fork_at: u64,
    },
    /// The primary is shut down, a standby takes over.
    Switchover {
        fork_at: u64,
    },
    /// Somebody drops the slot if nobody uses it.
    DropSlot,
    /// An archiver starts that streams from a clone of the primary.
    Clone,
}

fn seconds(dice: &mut Dice, low: u64, high: u64) -> Duration {
    Duration::from_millis(dice.between(low * 1000, high * 1000))
}

impl Plan {
    pub fn new(seed: u64) -> Plan {
        let mut dice = Dice::new(seed, "plan");
        let dice = &mut dice;
        let regions = dice.between(1, 3) as usize;
        let end = seconds(dice, 40, 180);
        let mut plan = Plan {
            regions: (0..regions).map(|_| dice.percent(70)).collect(),
            hosts: dice.between(1, 3) as usize,
            durability: *dice.pick(&[Durability::Any, Durability::Majority, Durability::All]),
            flush_interval: Duration::from_millis(*dice.pick(&[0, 200, 1000, 5000])),
            memory_limit: *dice.pick(&[2 << 20, 4 << 20, 16 << 20]),
            slot_limit: None,
            keep: 1 << 30,
            spare: dice.percent(25),
            steps: Vec::new(),
            end,
            wal: dice.between(1 << 20, 4 << 20),
        };
        if dice.percent(15) {
            plan.slot_limit = Some(dice.between(2, 4) << 20);
            plan.keep = 1 << 20;
        }
        for _ in 0..dice.between(1, 8) {
            let at = Duration::from_millis(dice.below(end.as_millis() as u64));
            plan.add_trouble(dice, at);
        }
        plan.steps.sort_by_key(|step| step.0);
        plan
    }

    fn add_trouble(&mut self, dice: &mut Dice, at: Duration) {
        let archiver = dice.below(1 + u64::from(self.spare)) as usize;
        let back = seconds(dice, 0, 10);
        let fork_at = *dice.pick(&[8, 8, 8192, 1 << 20]);
        let forks = self.hosts > 1;
        let step = match dice.below(100) {
            0..40 => {
                let region = dice.below(self.regions.len() as u64) as usize;
                let (faults, spell) = (faults(dice), seconds(dice, 1, 60));
                self.steps.push((at + spell, Step::Region(region, Faults::NONE)));
                Step::Region(region, faults)
            }
            40..50 => {
                let spell = seconds(dice, 1, 30);
                self.steps.push((at + spell, Step::Network(Network::default())));
                let rate = *dice.pick(&[0, 0, 100 << 10, 1 << 20]);
                Step::Network(Network { cuts: dice.between(0, 80), rate })
            }
            50..58 => {
                let death = *dice.pick(&[Death::Killed, Death::Killed, Death::Vanished]);
                Step::Kill { archiver, death, back }
            }
            58..68 => Step::KillAtRequest { archiver, steps: dice.between(1, 80) },
            68..73 => Step::Stop { archiver, back },
            73..79 => Step::Crash { back },
            79..83 => Step::Restart,
            83..90 if forks => Step::Failover { lag: seconds(dice, 0, 10), fork_at },
            90..96 if forks => Step::Switchover { fork_at },
            96..98 if self.slot_limit.is_some() => Step::DropSlot,
            96..100 => Step::Clone,
            _ => Step::Crash { back },
        };
        self.steps.push((at, step));
    }
}

/// What may be wrong with a region.
fn faults(dice: &mut Dice) -> Faults {
    let none = Faults::NONE;
    match dice.below(9 + u64::from(known::lying_puts())) {
        0 => Faults { fail_before: 30, fail_after: 20, ..none },
        1 => Faults { fail_after: 60, ..none },
        2 => Faults { fail_before: 100, ..none },
        3 => Faults { fail_before: 100, refusal: Refusal::Denied, ..none },
        4 => Faults { hang: 100, ..none },
        5 => Faults { hang: 15, fail_before: 10, ..none },
        6 => Faults { latency_ms: (300, 4000), ..none },
        7 => Faults { rate: dice.between(20 << 10, 500 << 10), ..none },
        8 => Faults { says_exists: 50, ..none },
        _ => Faults { lies: 20, ..none },
    }
}
