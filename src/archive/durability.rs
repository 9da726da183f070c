//! The durability policy: what the regions' frontiers mean for PostgreSQL.

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

    #[test]
    fn no_region_means_nothing_is_durable() {
        assert_eq!(durable_lsn(Durability::Any, &[]), Lsn::INVALID);
        assert_eq!(durable_lsn(Durability::All, &[Some(Lsn(9)), None]), Lsn::INVALID);
    }
}
