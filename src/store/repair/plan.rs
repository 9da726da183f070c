//! What a region lacks, from listings alone: pure, so that it can be tested on any listings.

use std::collections::BTreeMap;

use crate::repo::{Coverage, PieceName};
use crate::wal::{Lsn, SegmentSize};

/// The fewest pieces among `others` that fill what `have` does not hold of their WAL, in its order.
/// A piece whose bytes `have` holds in others, larger or smaller, is not missing.
pub(super) fn missing_pieces(
    have: &[PieceName],
    others: &[PieceName],
    size: SegmentSize,
) -> Vec<PieceName> {
    let have = Coverage::new(have.iter().copied(), size);
    let others = Coverage::new(others.iter().copied(), size);
    let (Some(from), Some(to)) = (others.start(), end_of(&others, size)) else { return Vec::new() };
    let mut missing = Vec::new();
    let mut filled = from;
    for (hole_from, hole_to) in have.holes(from, to) {
        for (run_from, run_to) in filled_parts(&others, hole_from, hole_to) {
            for part in others.cover(run_from.max(filled), run_to) {
                filled = part.piece.end(size).unwrap_or(part.to);
                missing.push(part.piece);
            }
        }
    }
    missing
}

/// The end of the last byte that any piece holds.
pub(super) fn end_of(coverage: &Coverage, size: SegmentSize) -> Option<Lsn> {
    coverage.pieces().filter_map(|piece| piece.end(size)).max()
}

/// The parts of `[from, to)` that are there.
fn filled_parts(coverage: &Coverage, from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
    subtract((from, to), &coverage.holes(from, to))
}

/// What is left of a range without the `parts` of it, which are sorted.
pub(super) fn subtract(range: (Lsn, Lsn), parts: &[(Lsn, Lsn)]) -> Vec<(Lsn, Lsn)> {
    let mut left = Vec::new();
    let mut at = range.0;
    for (from, to) in parts {
        if *from > at && at < range.1 {
            left.push((at, (*from).min(range.1)));
        }
        at = at.max(*to);
    }
    if at < range.1 {
        left.push((at, range.1));
    }
    left
}

/// What in the target's listing may be damaged: nothing at all is in it, or another region's copy
/// has another size. (That alone proves nothing: two archivers may compress differently.)
pub(super) fn suspects<'a, K: Ord>(
    target: &'a BTreeMap<K, u64>,
    others: &[&BTreeMap<K, u64>],
) -> Vec<&'a K> {
    let differs = |key: &K, size: u64| {
        others.iter().any(|other| other.get(key).is_some_and(|stored| *stored != size))
    };
    target
        .iter()
        .filter(|(key, size)| **size == 0 || differs(key, **size))
        .map(|(key, _)| key)
        .collect()
}

/// The pieces whose content must be part of this one's, if all is of one history.
pub(super) fn contained(piece: &PieceName, all: &[PieceName]) -> Vec<PieceName> {
    let mut inside: Vec<_> = all.iter().filter(|other| piece.covers(other)).copied().collect();
    inside.sort_unstable();
    inside.dedup();
    inside
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::ShortHash;
    use crate::wal::{SegmentNo, TimelineId};

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn piece(from: u32, to: u32) -> PieceName {
        let segment = SIZE.name(TimelineId(1), SegmentNo(1));
        // One history: the range decides the content.
        PieceName { segment, from, to, hash: ShortHash(u64::from(from) << 32 | u64::from(to)) }
    }

    fn bytes_of(pieces: &[PieceName]) -> Vec<bool> {
        let mut there = vec![false; 200];
        for piece in pieces {
            there[piece.from as usize..piece.to as usize].fill(true);
        }
        there
    }

    #[test]
    fn a_large_piece_is_copied_and_not_the_small_ones_in_it() {
        let others = [piece(0, 10), piece(10, 20), piece(0, 40), piece(20, 40), piece(40, 50)];
        assert_eq!(missing_pieces(&[], &others, SIZE), [piece(0, 40), piece(40, 50)]);
        assert_eq!(missing_pieces(&[piece(0, 64)], &others, SIZE), []);
        assert_eq!(missing_pieces(&[piece(0, 40)], &others, SIZE), [piece(40, 50)]);
        // Held in small pieces is held.
        let small = [piece(0, 10), piece(10, 20), piece(20, 40)];
        assert_eq!(missing_pieces(&small, &others, SIZE), [piece(40, 50)]);
    }

    #[test]
    fn one_piece_that_fills_two_holes_is_copied_once() {
        let have = [piece(10, 20), piece(30, 35)];
        assert_eq!(missing_pieces(&have, &[piece(0, 40)], SIZE), [piece(0, 40)]);
    }

    #[test]
    fn sizes_that_differ_are_suspicious() {
        let target = BTreeMap::from([("a", 10), ("b", 10), ("c", 0), ("d", 7)]);
        let other = BTreeMap::from([("a", 10), ("b", 9), ("e", 1)]);
        assert_eq!(suspects(&target, &[&other]), [&"b", &"c"]);
    }

    #[test]
    fn what_recorded_gaps_leave_of_a_hole() {
        let hole = (Lsn(10), Lsn(50));
        assert_eq!(subtract(hole, &[]), [hole]);
        assert_eq!(subtract(hole, &[(Lsn(0), Lsn(60))]), []);
        assert_eq!(
            subtract(hole, &[(Lsn(5), Lsn(12)), (Lsn(20), Lsn(30)), (Lsn(60), Lsn(70))]),
            [(Lsn(12), Lsn(20)), (Lsn(30), Lsn(50))]
        );
    }

    fn pieces() -> impl Strategy<Value = Vec<PieceName>> {
        let range = (0_u32..100, 1_u32..40).prop_map(|(from, len)| piece(from, from + len));
        prop::collection::vec(range, 0..12)
    }

    proptest! {
        // Against the obvious model: a flag for each byte.
        #[test]
        fn what_is_missing_makes_the_target_hold_all_and_nothing_twice(
            have in pieces(),
            others in pieces(),
        ) {
            let missing = missing_pieces(&have, &others, SIZE);
            let before = bytes_of(&have);
            let union = bytes_of(&[have.clone(), others.clone()].concat());
            let after = [have.clone(), missing.clone()].concat();
            prop_assert_eq!(bytes_of(&after), union);
            for (index, piece) in missing.iter().enumerate() {
                prop_assert!(others.contains(piece));
                prop_assert!(!missing[..index].contains(piece));
                // Each brings something that the target did not have.
                prop_assert!((piece.from..piece.to).any(|at| !before[at as usize]));
            }
            prop_assert!(missing.is_sorted_by_key(|piece| piece.from));
            prop_assert_eq!(missing_pieces(&after, &others, SIZE), []);
        }
    }
}
