//! Which pieces give a range of WAL, and where it has holes.

use super::PieceName;
use crate::wal::{Lsn, SegmentSize};

/// One piece of a cover and the bytes to take from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoverPart {
    /// The object.
    pub piece: PieceName,
    /// The first byte to take.
    pub from: Lsn,
    /// Behind the last byte to take.
    pub to: Lsn,
}

/// The pieces of one timeline, ready to be asked for ranges.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Sorted by start, the longest first.
    pieces: Vec<(Lsn, Lsn, PieceName)>,
}

/// Two contents for the same bytes of WAL: two histories diverged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{one} and {other} hold different WAL for the same range")]
pub struct Divergence {
    /// One of them.
    pub one: PieceName,
    /// The other.
    pub other: PieceName,
}

impl Coverage {
    /// Takes in all pieces of one timeline, in any order. Names that do not fit the segment size
    /// are left out.
    pub fn new(pieces: impl IntoIterator<Item = PieceName>, size: SegmentSize) -> Coverage {
        let mut pieces: Vec<_> = pieces
            .into_iter()
            .filter_map(|piece| Some((piece.start(size)?, piece.end(size)?, piece)))
            .collect();
        pieces.sort_unstable_by(|a, b| {
            a.0.cmp(&b.0).then(b.1.cmp(&a.1)).then(a.2.hash.cmp(&b.2.hash))
        });
        pieces.dedup_by_key(|entry| entry.2);
        Coverage { pieces }
    }

    /// Whether there is no piece at all.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The lowest LSN that any piece holds.
    pub fn start(&self) -> Option<Lsn> {
        self.pieces.first().map(|first| first.0)
    }

    /// The end of the WAL that follows `from` without a hole; `from` itself when that byte is not
    /// there.
    pub fn contiguous_end(&self, from: Lsn) -> Lsn {
        let mut end = from;
        for (piece_start, piece_end, _) in &self.pieces {
            if *piece_start > end {
                break;
            }
            end = end.max(*piece_end);
        }
        end
    }

    /// All holes in `[from, to)`.
    pub fn holes(&self, from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
        let mut holes = Vec::new();
        let mut at = from;
        for (piece_start, piece_end, _) in &self.pieces {
            if at >= to {
                break;
            }
            if *piece_start > at {
                holes.push((at, (*piece_start).min(to)));
            }
            at = at.max(*piece_end);
        }
        if at < to {
            holes.push((at, to));
        }
        holes
    }

    /// The fewest pieces that give `[from, to)`, as far as it goes without a hole.
    pub fn cover(&self, from: Lsn, to: Lsn) -> Vec<CoverPart> {
        let mut parts = Vec::new();
        let mut at = from;
        let mut next = 0;
        while at < to {
            let mut best: Option<(Lsn, PieceName)> = None;
            while let Some((start, end, piece)) = self.pieces.get(next) {
                if *start > at {
                    break;
                }
                if *end > at && best.is_none_or(|(best_end, _)| *end > best_end) {
                    best = Some((*end, *piece));
                }
                next += 1;
            }
            let Some((end, piece)) = best else { break };
            parts.push(CoverPart { piece, from: at, to: end.min(to) });
            at = end;
        }
        parts
    }

    /// Two pieces for the same range with different content, if there are any from `from` on.
    pub fn divergence(&self, from: Lsn) -> Option<Divergence> {
        self.pieces.windows(2).find_map(|pair| {
            let (one, other) = (&pair[0], &pair[1]);
            let same_range = one.0 == other.0 && one.1 == other.1 && one.1 > from;
            same_range.then_some(Divergence { one: one.2, other: other.2 })
        })
    }

    /// The pieces in order.
    pub fn pieces(&self) -> impl Iterator<Item = &PieceName> {
        self.pieces.iter().map(|entry| &entry.2)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::ShortHash;
    use crate::wal::{SegmentNo, TimelineId};

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn piece(segment: u64, from: u32, to: u32, hash: u64) -> PieceName {
        let segment = SIZE.name(TimelineId(1), SegmentNo(segment));
        PieceName { segment, from, to, hash: ShortHash(hash) }
    }

    #[test]
    fn the_largest_pieces_are_preferred() {
        let whole = piece(1, 0, 16 << 20, 1);
        let pieces = [piece(1, 0, 100, 2), piece(1, 100, 300, 3), whole, piece(2, 0, 50, 4)];
        let coverage = Coverage::new(pieces, SIZE);
        let start = SIZE.start_of(SegmentNo(1));
        let end = SIZE.start_of(SegmentNo(2)).advance(50);
        let parts = coverage.cover(start, end);
        assert_eq!(parts.iter().map(|part| part.piece).collect::<Vec<_>>(), [whole, pieces[3]]);
        assert_eq!(coverage.contiguous_end(start), end);
        assert_eq!(coverage.holes(start, end), []);
    }

    #[test]
    fn holes_are_named() {
        let coverage = Coverage::new([piece(1, 0, 100, 1), piece(1, 200, 300, 2)], SIZE);
        let start = SIZE.start_of(SegmentNo(1));
        assert_eq!(coverage.contiguous_end(start), start.advance(100));
        assert_eq!(
            coverage.holes(start, start.advance(400)),
            [(start.advance(100), start.advance(200)), (start.advance(300), start.advance(400))]
        );
        assert_eq!(coverage.contiguous_end(start.advance(150)), start.advance(150));
    }

    // CASES 14: two histories for one range are reported, never guessed between.
    #[test]
    fn two_contents_for_one_range_are_a_divergence() {
        let pieces = [piece(1, 0, 100, 1), piece(1, 0, 100, 2)];
        assert!(Coverage::new(pieces, SIZE).divergence(Lsn(0)).is_some());
        assert!(Coverage::new(pieces, SIZE).divergence(SIZE.start_of(SegmentNo(2))).is_none());
        let pieces = [piece(1, 0, 100, 1), piece(1, 0, 100, 1), piece(1, 0, 101, 3)];
        assert!(Coverage::new(pieces, SIZE).divergence(Lsn(0)).is_none());
    }

    proptest! {
        // Against the obvious model: a flag for each byte.
        #[test]
        fn covers_and_holes_agree_with_a_byte_map(
            ranges in prop::collection::vec((0_u32..60, 1_u32..20), 0..12),
            from in 0_u64..70,
            length in 0_u64..70,
        ) {
            let base = SIZE.start_of(SegmentNo(1));
            let pieces = ranges.iter().enumerate()
                .map(|(i, (start, length))| piece(1, *start, start + length, i as u64));
            let coverage = Coverage::new(pieces, SIZE);
            let mut there = [false; 200];
            for (start, length) in &ranges {
                there[*start as usize..(start + length) as usize].fill(true);
            }
            let to = from + length;
            let run = (from..to).take_while(|at| there[*at as usize]).count() as u64;
            let parts = coverage.cover(base.advance(from), base.advance(to));
            let covered: u64 = parts.iter().map(|part| part.to.bytes_since(part.from)).sum();
            prop_assert_eq!(covered, run);
            for part in &parts {
                prop_assert!(part.piece.start(SIZE).unwrap() <= part.from);
                prop_assert!(part.to <= part.piece.end(SIZE).unwrap());
            }
            let missing: u64 = coverage.holes(base.advance(from), base.advance(to)).iter()
                .map(|(a, b)| b.bytes_since(*a)).sum();
            prop_assert_eq!(missing, (from..to).filter(|at| !there[*at as usize]).count() as u64);
            prop_assert!(coverage.contiguous_end(base.advance(from)) >= base.advance(from + run));
        }
    }
}
