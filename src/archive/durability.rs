//! The durability policy: what the regions' frontiers mean for PostgreSQL.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::Durability;
use crate::wal::Lsn;

/// The LSN up to which WAL counts as safe: the 1st, the (⌊N/2⌋+1)-th or the N-th largest frontier.
/// A region whose frontier is not known has none.
pub fn durable_lsn(policy: Durability, frontiers: &[Option<Lsn>]) -> Lsn {
    let mut known: Vec<Lsn> =
        frontiers.iter().map(|frontier| frontier.unwrap_or(Lsn::INVALID)).collect();
    known.sort_unstable_by(|a, b| b.cmp(a));
    let rank = match policy {
        Durability::Any => 0,
        Durability::Majority => known.len() / 2,
        Durability::All => known.len().saturating_sub(1),
    };
    known.get(rank).copied().unwrap_or(Lsn::INVALID)
}

/// How much the slot may be made to hold for regions that do not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// WAL that some region has and the policy waits for, in bytes.
    pub bytes: u64,
    /// How long it may be waited for.
    pub time: Duration,
}

/// Keeps one region's outage from filling the server's disk: a policy that waits for too much, or
/// too long, gives way to [`Durability::Any`] until the regions have caught up. A synchronous
/// archiver never gives way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hold {
    /// What some region had at this time; the policy has not reached it yet.
    mark: Option<(Lsn, Instant)>,
    has_fallen_back: bool,
}

impl Hold {
    /// The durable LSN at `now`. `limits` are `None` for a synchronous archiver.
    pub fn decide(
        &mut self,
        policy: Durability,
        limits: Option<HoldLimits>,
        frontiers: &[Option<Lsn>],
        now: Instant,
    ) -> Lsn {
        let strict = durable_lsn(policy, frontiers);
        let any = durable_lsn(Durability::Any, frontiers);
        let Some(limits) = limits.filter(|_| strict < any) else {
            *self = Hold::default();
            return strict;
        };
        // A frontier that is not known yet says nothing about bytes: it counts by time.
        let held = if strict == Lsn::INVALID { 0 } else { any.bytes_since(strict) };
        let (mark, since) = match self.mark {
            Some(mark) if strict < mark.0 => mark,
            // What was waited for came: what is waited for now is younger.
            _ => {
                self.has_fallen_back &= held > limits.bytes / 2;
                (any, now)
            }
        };
        self.mark = Some((mark, since));
        let too_long = now.duration_since(since) > limits.time;
        self.has_fallen_back |= too_long || held > limits.bytes;
        if self.has_fallen_back { any } else { strict }
    }

    /// Whether the policy has given way.
    pub fn has_fallen_back(&self) -> bool {
        self.has_fallen_back
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        // Invariant I1 begins here: so many regions hold at least what is called durable.
        #[test]
        fn enough_regions_hold_what_is_called_durable(
            frontiers in prop::collection::vec(prop::option::of(0_u64..50), 1..6),
        ) {
            let frontiers: Vec<_> = frontiers.into_iter().map(|f| f.map(Lsn)).collect();
            let n = frontiers.len();
            for (policy, needed) in
                [(Durability::Any, 1), (Durability::Majority, n / 2 + 1), (Durability::All, n)]
            {
                let durable = durable_lsn(policy, &frontiers);
                let holding = |lsn: Lsn| {
                    frontiers.iter().filter(|f| f.unwrap_or(Lsn::INVALID) >= lsn).count()
                };
                prop_assert!(holding(durable) >= needed);
                prop_assert!(holding(durable.advance(1)) < needed);
            }
        }
    }

    const LIMITS: HoldLimits = HoldLimits { bytes: 100, time: Duration::from_secs(60) };

    proptest! {
        // Nothing that no region has is ever called durable, and a synchronous archiver never
        // gives way.
        #[test]
        fn giving_way_stays_between_the_policy_and_the_best_region(
            steps in prop::collection::vec(
                (prop::collection::vec(prop::option::of(0_u64..1000), 3), 0_u64..100), 1..30),
            synchronous: bool,
        ) {
            let mut now = Instant::now();
            let mut hold = Hold::default();
            for (frontiers, seconds) in steps {
                now += Duration::from_secs(seconds);
                let frontiers: Vec<_> = frontiers.into_iter().map(|f| f.map(Lsn)).collect();
                let limits = (!synchronous).then_some(LIMITS);
                let decided = hold.decide(Durability::All, limits, &frontiers, now);
                let strict = durable_lsn(Durability::All, &frontiers);
                let any = durable_lsn(Durability::Any, &frontiers);
                prop_assert!(decided == strict || (decided == any && !synchronous));
                if strict > Lsn::INVALID && any.bytes_since(strict) > LIMITS.bytes && !synchronous {
                    prop_assert_eq!(decided, any);
                }
            }
        }
    }

    #[test]
    fn one_region_that_is_gone_does_not_fill_the_servers_disk() {
        let mut hold = Hold::default();
        let start = Instant::now();
        let mut at = |seconds, one, other| {
            let now = start + Duration::from_secs(seconds);
            let frontiers = [Some(Lsn(one)), Some(Lsn(other))];
            let lsn = hold.decide(Durability::All, Some(LIMITS), &frontiers, now);
            (lsn.0, hold.has_fallen_back())
        };
        // A region that is a little behind, all the time, is waited for.
        for second in 0..200 {
            assert_eq!(at(second, 1010 + second, 1000 + second), (1000 + second, false));
        }
        // One that stands still is waited for until the time is over.
        assert_eq!(at(240, 1250, 1205), (1205, false));
        assert_eq!(at(301, 1251, 1205), (1251, true));
        // Coming back it has to catch up first.
        assert_eq!(at(302, 1400, 1206), (1400, true));
        assert_eq!(at(303, 1400, 1380), (1380, false));
        // Too many bytes at once.
        assert_eq!(at(304, 1500, 1380), (1500, true));
    }

    // The first region that answers must not make the policy give way to itself.
    #[test]
    fn regions_that_have_not_answered_yet_are_waited_for() {
        let mut hold = Hold::default();
        let start = Instant::now();
        let far = Some(Lsn(1 << 50));
        let at = |hold: &mut Hold, seconds, other| {
            let now = start + Duration::from_secs(seconds);
            hold.decide(Durability::All, Some(LIMITS), &[far, other], now)
        };
        assert_eq!(at(&mut hold, 0, None), Lsn::INVALID);
        assert_eq!(at(&mut hold, 59, None), Lsn::INVALID);
        assert_eq!(at(&mut hold, 61, None), Lsn(1 << 50));
    }

    #[test]
    fn no_region_means_nothing_is_durable() {
        assert_eq!(durable_lsn(Durability::Any, &[]), Lsn::INVALID);
        assert_eq!(durable_lsn(Durability::All, &[Some(Lsn(9)), None]), Lsn::INVALID);
    }
}
