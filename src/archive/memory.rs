//! What one session of the archiver must remember for the next. Nothing of it outlives the process:
//! lost, it costs one more attempt.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::start::StartPoint;
use crate::wal::{Lsn, TimelineId};

/// Shared by the sessions of one archiver.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Pieces whose WAL came damaged once: if it comes so again, it is so on the server.
    damaged: Vec<(TimelineId, Lsn)>,
    /// WAL that is missing was first noticed then.
    removed: Option<((TimelineId, Lsn), Instant)>,
    /// The server has no WAL before here any more.
    no_overlap: Option<(TimelineId, Lsn)>,
    /// Stream from here although a region that is silent may lack what lies before.
    skip_to: Option<(TimelineId, Lsn)>,
    /// Regions in which the archive was to begin, and has not: they were silent then.
    to_begin: BTreeSet<String>,
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether damage in the piece that begins here is seen for the first time.
    pub(super) fn is_new_damage(&self, timeline: TimelineId, piece: Lsn) -> bool {
        let mut inner = self.lock();
        let is_new = !inner.damaged.contains(&(timeline, piece));
        if is_new {
            inner.damaged.push((timeline, piece));
        }
        is_new
    }

    /// Since when WAL from here on is known to be missing on the server.
    pub(super) fn removed_since(&self, timeline: TimelineId, from: Lsn) -> Instant {
        let mut inner = self.lock();
        match inner.removed {
            Some((what, since)) if what == (timeline, from) => since,
            _ => {
                let now = Instant::now();
                inner.removed = Some(((timeline, from), now));
                now
            }
        }
    }

    /// The server cannot give WAL before here for a comparison.
    pub(super) fn cannot_step_back(&self, timeline: TimelineId, lsn: Lsn) {
        self.lock().no_overlap = Some((timeline, lsn));
    }

    /// A point that lies exactly where the archive ends shares no byte with it: one piece earlier
    /// there is something to compare, and so to tell a clone.
    pub(super) fn step_back(&self, point: StartPoint, unit: u64) -> StartPoint {
        let at_the_end = point.lsn == point.frontier && point.lsn.0 >= 2 * unit;
        let known = self.lock().no_overlap == Some((point.timeline, point.lsn));
        if at_the_end && !known {
            return StartPoint { lsn: point.lsn.retreat(unit), ..point };
        }
        point
    }

    /// The next session shall begin here.
    pub(super) fn skip_to(&self, timeline: TimelineId, lsn: Lsn) {
        self.lock().skip_to = Some((timeline, lsn));
    }

    /// This process begins the archive, in these regions.
    pub(super) fn begin_in(&self, regions: impl Iterator<Item = String>) {
        self.lock().to_begin = regions.collect();
    }

    /// Whether the archive was to begin in this region and has not yet.
    pub(super) fn may_begin(&self, region: &str) -> bool {
        self.lock().to_begin.contains(region)
    }

    /// The archive has begun in this region: found empty from now on, it was lost.
    pub(super) fn has_begun(&self, region: &str) {
        self.lock().to_begin.remove(region);
    }

    /// The place to begin, if nothing else was decided.
    pub(super) fn skip(&self, point: StartPoint) -> StartPoint {
        match self.lock().skip_to.take() {
            Some((timeline, lsn)) if (timeline, lsn) > (point.timeline, point.lsn) => {
                StartPoint { timeline, lsn, frontier: lsn }
            }
            _ => point,
        }
    }
}
