//! What one session of the archiver must remember for the next. Nothing of it outlives the process:
//! lost, it costs one more attempt.

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
    /// Stream from here although a region that is silent may lack what lies before.
    skip_to: Option<(TimelineId, Lsn)>,
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

    /// The next session shall begin here.
    pub(super) fn skip_to(&self, timeline: TimelineId, lsn: Lsn) {
        self.lock().skip_to = Some((timeline, lsn));
    }

    /// The place to begin, if nothing else was decided.
    pub(super) fn skip(&self, point: StartPoint) -> StartPoint {
        match self.lock().skip_to.take() {
            Some((timeline, lsn)) if timeline == point.timeline && lsn > point.lsn => {
                StartPoint { timeline, lsn, frontier: lsn }
            }
            _ => point,
        }
    }
}
