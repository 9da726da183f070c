//! Finished pieces on their way to the regions: one queue, one cursor for each region.
//!
//! The bodies in the queue, and those being made, are all the memory that WAL takes: room is
//! reserved before a piece is compressed. A piece leaves when every region has it. When room is
//! short, pieces leave that *some* region has: the regions that miss them copy them from there
//! later. When no region has them, nothing leaves, the receiver stops reading, and the slot keeps
//! the WAL on the server (invariants I6, I9).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::piece::Piece;
use crate::wal::Lsn;

/// The queue.
pub(super) struct Backlog {
    inner: Mutex<Inner>,
    /// Something was added, removed, or stored.
    changed: Notify,
    limit: u64,
}

struct Inner {
    pieces: VecDeque<Arc<Piece>>,
    /// The sequence number of the first piece in the queue.
    base: u64,
    /// For each region: the next piece that it has not stored.
    cursors: Vec<u64>,
    /// Bytes reserved and held.
    used: u64,
    /// The furthest frontier of any region.
    furthest: Lsn,
    /// No more pieces will come.
    closed: bool,
}

/// What a region finds when it asks for its next piece.
#[derive(Debug)]
pub(super) enum Next {
    /// This one, with its sequence number.
    Piece(u64, Arc<Piece>),
    /// Nothing yet.
    Empty,
    /// Nothing any more.
    Closed,
}

impl Backlog {
    pub(super) fn new(regions: usize, limit: u64) -> Backlog {
        Backlog {
            inner: Mutex::new(Inner {
                pieces: VecDeque::new(),
                base: 0,
                cursors: vec![0; regions],
                used: 0,
                furthest: Lsn::INVALID,
                closed: false,
            }),
            changed: Notify::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `bytes` more fit, and reserves them. One piece always fits into an empty queue.
    pub(super) async fn reserve(&self, bytes: u64) {
        loop {
            let changed = self.changed.notified();
            {
                let mut inner = self.lock();
                while inner.used + bytes > self.limit && inner.evict() {}
                if inner.used + bytes <= self.limit || inner.used == 0 {
                    inner.used += bytes;
                    return;
                }
            }
            changed.await;
        }
    }

    /// Adds a piece for which `reserved` bytes were reserved.
    pub(super) fn push(&self, piece: Arc<Piece>, reserved: u64) {
        let mut inner = self.lock();
        inner.used = inner.used - reserved + piece.body.len() as u64;
        inner.pieces.push_back(piece);
        drop(inner);
        self.changed.notify_waiters();
    }

    /// No more pieces will come.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_waiters();
    }

    /// The piece after `after`, or the region's first one. Small pieces that a later one in the
    /// queue replaces are passed over: a region that is behind need not store them.
    pub(super) fn next(&self, region: usize, after: Option<u64>) -> Next {
        let inner = self.lock();
        let wanted = after.map_or(inner.cursors[region], |after| after + 1).max(inner.base);
        let first = (wanted - inner.base) as usize;
        for (index, piece) in inner.pieces.iter().enumerate().skip(first) {
            let replaced =
                inner.pieces.range(index + 1..).any(|later| later.name.covers(&piece.name));
            if !replaced {
                return Next::Piece(inner.base + index as u64, piece.clone());
            }
        }
        if inner.closed { Next::Closed } else { Next::Empty }
    }

    /// Whether the queue still holds a piece.
    pub(super) fn holds(&self, sequence: u64) -> bool {
        self.lock().base <= sequence
    }

    /// The region has stored everything before `next`, up to the LSN `frontier`.
    pub(super) fn stored(&self, region: usize, next: u64, frontier: Lsn) {
        let mut inner = self.lock();
        inner.cursors[region] = inner.cursors[region].max(next);
        inner.furthest = inner.furthest.max(frontier);
        let done = inner.cursors.iter().copied().min().unwrap_or(0);
        while inner.base < done && inner.drop_first() {}
        drop(inner);
        self.changed.notify_waiters();
    }

    /// Waits for a change that comes after the call.
    pub(super) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    /// Bytes reserved and held.
    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.lock().used
    }
}

impl Inner {
    fn drop_first(&mut self) -> bool {
        let Some(piece) = self.pieces.pop_front() else { return false };
        self.used -= piece.body.len() as u64;
        self.base += 1;
        true
    }

    /// Drops the first piece if some region has it.
    fn evict(&mut self) -> bool {
        match self.pieces.front() {
            Some(piece) if piece.end <= self.furthest => self.drop_first(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::repo::{PieceName, ShortHash};
    use crate::wal::{SegmentNo, SegmentSize, TimelineId};

    fn piece(from: u32, to: u32, stored: usize) -> Arc<Piece> {
        let size = SegmentSize::DEFAULT;
        let segment = size.name(TimelineId(1), SegmentNo(1));
        let start = size.start_of(SegmentNo(1));
        Arc::new(Piece {
            name: PieceName { segment, from, to, hash: ShortHash(u64::from(to)) },
            start: start.advance(u64::from(from)),
            end: start.advance(u64::from(to)),
            body: Bytes::from(vec![0; stored]),
            replaces: false,
        })
    }

    fn sequence(next: Next) -> Option<u64> {
        match next {
            Next::Piece(sequence, _) => Some(sequence),
            _ => None,
        }
    }

    #[tokio::test]
    async fn a_piece_leaves_when_every_region_has_it() {
        let backlog = Backlog::new(2, 1000);
        backlog.reserve(100).await;
        backlog.push(piece(0, 10, 40), 100);
        assert_eq!(backlog.used(), 40);
        backlog.stored(0, 1, Lsn(0));
        assert_eq!(sequence(backlog.next(1, None)), Some(0));
        assert_eq!(sequence(backlog.next(0, None)), None);
        backlog.stored(1, 1, Lsn(0));
        assert_eq!(backlog.used(), 0);
    }

    // Invariant I6: a region that stands still costs no memory once another has the WAL.
    #[tokio::test]
    async fn short_of_room_what_one_region_has_is_dropped_and_nothing_else() {
        let backlog = Backlog::new(2, 100);
        for (from, to) in [(0, 10), (10, 20)] {
            backlog.reserve(50).await;
            backlog.push(piece(from, to, 50), 50);
        }
        let no_room = tokio::time::timeout(std::time::Duration::ZERO, backlog.reserve(50)).await;
        assert!(no_room.is_err(), "WAL that no region has was dropped");
        backlog.stored(0, 1, piece(0, 10, 0).end);
        backlog.reserve(50).await;
        assert!(!backlog.holds(0));
        assert_eq!(sequence(backlog.next(1, None)), Some(1));
    }

    #[tokio::test]
    async fn a_region_that_is_behind_passes_over_what_was_replaced() {
        let backlog = Backlog::new(1, 1000);
        backlog.push(piece(0, 10, 0), 0);
        backlog.push(piece(10, 20, 0), 0);
        backlog.push(piece(0, 30, 0), 0);
        backlog.push(piece(30, 40, 0), 0);
        assert_eq!(sequence(backlog.next(0, None)), Some(2));
        assert_eq!(sequence(backlog.next(0, Some(2))), Some(3));
        assert!(matches!(backlog.next(0, Some(3)), Next::Empty));
        backlog.close();
        assert!(matches!(backlog.next(0, Some(3)), Next::Closed));
    }
}
