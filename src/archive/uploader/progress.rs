//! What is known of one region while it is fed. Pure: it decides what is to be done next, and the
//! tasks around it do it.
//!
//! Pieces go out in the order of the WAL. What the queue had to drop is copied from another region
//! before anything behind it is taken, so that a slow region stays whole, only older. When no other
//! region can give it now, it becomes an open hole: the region takes what follows, its frontier
//! stays in front of the hole, and the hole is tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::backlog::{Backlog, Next};
use super::super::piece::Piece;
use crate::repo::PieceName;
use crate::store::Put;
use crate::wal::{Lsn, SegmentSize};

/// Pieces on their way to one region at once.
const IN_FLIGHT: usize = 4;

/// What became of one upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Stored(Put),
    /// The queue dropped it while the region failed.
    Dropped,
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Step {
    /// Store this piece.
    Upload(u64, Arc<Piece>),
    /// Copy this range from other regions.
    Fill(Lsn, Lsn),
    /// Wait for something to change.
    Wait,
    /// Everything was done.
    End,
}

/// The state of one region.
#[derive(Debug)]
pub(super) struct Progress {
    segment_size: SegmentSize,
    /// Behind the last byte stored, holes aside.
    tip: Lsn,
    /// Holes that could not be filled, ascending.
    holes: Vec<(Lsn, Lsn)>,
    /// Whether any piece of this timeline is stored: before that, the order of uploads alone says
    /// that nothing is missing in front of them.
    has_pieces: bool,
    /// An upload was dropped, or failed behind another: nothing new is begun until what is under
    /// way has ended.
    rewind: bool,
    /// A range is being copied.
    filling: bool,
    /// Every piece that is known to stand in the region and is smaller than a full one.
    pub(super) small: BTreeSet<PieceName>,
    taken: Option<u64>,
    /// Uploads that were started and are not yet part of the frontier, in order.
    pending: BTreeMap<u64, (Arc<Piece>, Option<Outcome>)>,
}

impl Progress {
    pub(super) fn new(
        segment_size: SegmentSize,
        tip: Lsn,
        has_pieces: bool,
        small: BTreeSet<PieceName>,
    ) -> Progress {
        Progress {
            segment_size,
            tip,
            holes: Vec::new(),
            has_pieces,
            rewind: false,
            filling: false,
            small,
            taken: None,
            pending: BTreeMap::new(),
        }
    }

    /// Whether a range is being copied.
    pub(super) fn is_copying(&self) -> bool {
        self.filling
    }

    /// The cluster's segment size.
    pub(super) fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    /// Behind the last byte that follows without a hole.
    pub(super) fn frontier(&self) -> Lsn {
        self.holes.first().map_or(self.tip, |(from, _)| *from)
    }

    /// Behind the last byte stored.
    pub(super) fn tip(&self) -> Lsn {
        self.tip
    }

    /// The first hole that could not be filled.
    pub(super) fn first_hole(&self) -> Option<(Lsn, Lsn)> {
        self.holes.first().copied()
    }

    /// Whether the region misses something that it should have.
    pub(super) fn is_behind(&self) -> bool {
        self.rewind || self.filling || !self.holes.is_empty()
    }

    /// Decides what is next, and takes note that it is begun.
    pub(super) fn step(&mut self, backlog: &Backlog, region: usize) -> Step {
        if self.filling {
            return Step::Wait;
        }
        if self.rewind {
            if !self.pending.is_empty() {
                return Step::Wait;
            }
            self.rewind = false;
            self.taken = None;
        }
        let limit = if self.has_pieces { IN_FLIGHT } else { 1 };
        loop {
            if self.pending.len() >= limit {
                return Step::Wait;
            }
            let (sequence, piece) = match backlog.next(region, self.taken) {
                Next::Piece(sequence, piece) => (sequence, piece),
                Next::Closed if self.pending.is_empty() => return Step::End,
                Next::Closed | Next::Empty => return Step::Wait,
            };
            let reached = self.pending.values().map(|(piece, _)| piece.end).max();
            let reached = reached.map_or(self.tip, |reached| reached.max(self.tip));
            if piece.end <= self.tip {
                // Stored by an earlier run.
                self.taken = Some(sequence);
                if self.pending.is_empty() {
                    backlog.stored(region, sequence + 1, self.tip);
                }
                continue;
            }
            if piece.start > reached {
                if !self.pending.is_empty() {
                    return Step::Wait;
                }
                self.filling = true;
                return Step::Fill(reached, piece.start);
            }
            self.taken = Some(sequence);
            self.pending.insert(sequence, (piece.clone(), None));
            return Step::Upload(sequence, piece);
        }
    }

    /// An upload ended. The pieces that are now part of the region's WAL, in order.
    pub(super) fn uploaded(
        &mut self,
        sequence: u64,
        outcome: Outcome,
        backlog: &Backlog,
        region: usize,
    ) -> Vec<(Arc<Piece>, Put)> {
        if let Some(entry) = self.pending.get_mut(&sequence) {
            entry.1 = Some(outcome);
        }
        let mut stored = Vec::new();
        while let Some(entry) = self.pending.first_entry() {
            let Some(outcome) = entry.get().1 else { break };
            let sequence = *entry.key();
            let (piece, _) = entry.remove();
            let Outcome::Stored(put) = outcome else {
                self.rewind = true;
                continue;
            };
            if piece.start > self.tip {
                self.rewind = true;
                continue;
            }
            self.has_pieces = true;
            self.tip = self.tip.max(piece.end);
            backlog.stored(region, sequence + 1, self.tip);
            stored.push((piece, put));
        }
        stored
    }

    /// The copy of `[from, to)` ended at `reached`. What is missing behind it stays open.
    pub(super) fn filled(&mut self, reached: Lsn, to: Lsn) {
        self.filling = false;
        if reached < to {
            self.holes.push((reached, to));
        }
        self.has_pieces |= reached > self.tip;
        self.tip = self.tip.max(to);
        self.taken = None;
    }

    /// Something that was stored turned out not to be there.
    pub(super) fn lost(&mut self, from: Lsn, to: Lsn) {
        let at = self.holes.partition_point(|hole| hole.0 < from);
        self.holes.insert(at, (from, to.min(self.tip)));
    }

    /// The first hole was filled up to `reached`.
    pub(super) fn mended(&mut self, hole: (Lsn, Lsn), reached: Lsn) {
        if let Some(index) = self.holes.iter().position(|open| *open == hole) {
            if reached >= hole.1 {
                self.holes.remove(index);
            } else {
                self.holes[index].0 = reached;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::repo::ShortHash;
    use crate::wal::{SegmentNo, TimelineId};

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn piece(number: u64) -> Arc<Piece> {
        let segment = SIZE.name(TimelineId(1), SegmentNo(number));
        let start = SIZE.start_of(SegmentNo(number));
        Arc::new(Piece {
            name: PieceName { segment, from: 0, to: 16 << 20, hash: ShortHash(number) },
            start,
            end: start.advance(16 << 20),
            body: Bytes::from_static(b"x"),
            replaces: false,
        })
    }

    fn start_of(number: u64) -> Lsn {
        SIZE.start_of(SegmentNo(number))
    }

    fn progress(tip: u64) -> Progress {
        Progress::new(SIZE, start_of(tip), true, BTreeSet::new())
    }

    fn upload(step: Step) -> u64 {
        match step {
            Step::Upload(sequence, _) => sequence,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_frontier_moves_in_the_order_of_the_wal() {
        let backlog = Backlog::new(1, 1000);
        (1..4).for_each(|number| backlog.push(piece(number), 0));
        let mut progress = progress(1);
        let first = upload(progress.step(&backlog, 0));
        let second = upload(progress.step(&backlog, 0));
        assert!(progress.uploaded(second, Outcome::Stored(Put::Written), &backlog, 0).is_empty());
        assert_eq!(progress.frontier(), start_of(1));
        assert_eq!(progress.uploaded(first, Outcome::Stored(Put::Written), &backlog, 0).len(), 2);
        assert_eq!(progress.frontier(), start_of(3));
    }

    // Invariant I6: what the queue dropped is copied from another region first.
    #[test]
    fn what_was_dropped_is_filled_before_anything_behind_it() {
        let backlog = Backlog::new(1, 1000);
        backlog.push(piece(3), 0);
        let mut progress = progress(1);
        assert!(matches!(progress.step(&backlog, 0), Step::Fill(from, to)
            if from == start_of(1) && to == start_of(3)));
        assert!(matches!(progress.step(&backlog, 0), Step::Wait));
        progress.filled(start_of(3), start_of(3));
        assert_eq!(progress.frontier(), start_of(3));
        upload(progress.step(&backlog, 0));
    }

    #[test]
    fn a_hole_that_nobody_can_fill_keeps_the_frontier_but_not_the_uploads() {
        let backlog = Backlog::new(1, 1000);
        backlog.push(piece(3), 0);
        let mut progress = progress(1);
        assert!(matches!(progress.step(&backlog, 0), Step::Fill(..)));
        progress.filled(start_of(2), start_of(3));
        let sequence = upload(progress.step(&backlog, 0));
        progress.uploaded(sequence, Outcome::Stored(Put::Written), &backlog, 0);
        assert_eq!((progress.frontier(), progress.tip()), (start_of(2), start_of(4)));
        let hole = progress.first_hole().unwrap();
        progress.mended(hole, start_of(3));
        assert_eq!(progress.frontier(), start_of(4));
        assert!(!progress.is_behind());
    }

    #[test]
    fn an_upload_that_was_dropped_makes_it_look_again() {
        let backlog = Backlog::new(1, 1000);
        (1..3).for_each(|number| backlog.push(piece(number), 0));
        let mut progress = progress(1);
        let first = upload(progress.step(&backlog, 0));
        let second = upload(progress.step(&backlog, 0));
        progress.uploaded(second, Outcome::Stored(Put::Written), &backlog, 0);
        progress.uploaded(first, Outcome::Dropped, &backlog, 0);
        assert_eq!(progress.frontier(), start_of(1));
        // Still in this queue, so it is simply stored again.
        assert_eq!(upload(progress.step(&backlog, 0)), first);
    }

    #[test]
    fn what_was_lost_takes_the_frontier_back() {
        let mut progress = progress(5);
        progress.lost(start_of(2), start_of(3));
        assert_eq!(progress.frontier(), start_of(2));
        progress.mended((start_of(2), start_of(3)), start_of(3));
        assert_eq!(progress.frontier(), start_of(5));
    }
}
