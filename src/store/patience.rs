//! How long a store may take, and how often it is asked: every deadline of the request layer.
//!
//! An answer must begin, and go on, within a short time of its own, so that a store that hangs is
//! known within seconds, while a slow one that makes progress is waited for. A read that dribbles,
//! and a write (whose progress cannot be seen), end by the slowest rate that still counts as
//! working (invariant I9).

use std::time::Duration;

/// The slowest store that still counts as working, in bytes a second.
const SLOWEST_RATE: u64 = 256 << 10;
/// The pause before the second attempt; it doubles with each further one.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// Deadlines and attempts of a region's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How often a request is tried before its failure is the caller's.
    pub attempts: u32,
    /// Until an answer begins: an object's first byte, a page of a listing, a deletion.
    pub answer: Duration,
    /// Between two chunks of an object on its way here.
    pub idle: Duration,
    /// For a write, on top of the time that its bytes take at the slowest rate.
    pub write: Duration,
    /// For putting together the parts of an upload, which stores may take long for.
    pub complete: Duration,
}

impl Patience {
    /// For the work itself: a request is worth waiting for.
    pub const WORK: Patience = Patience {
        attempts: 4,
        answer: Duration::from_secs(10),
        idle: Duration::from_secs(10),
        write: Duration::from_secs(20),
        complete: Duration::from_secs(60),
    };

    /// For looking things up before the work begins: a region that hangs costs 20 s, and the
    /// caller goes on without it.
    pub const LOOKUP: Patience =
        Patience { attempts: 2, write: Duration::from_secs(10), ..Patience::WORK };

    /// For a write of so many bytes.
    pub(super) fn for_write(&self, bytes: u64) -> Duration {
        self.write + at_slowest_rate(bytes)
    }

    /// For all of a read of so many bytes, once the answer has begun. Longer than a pause may be.
    pub(super) fn for_read(&self, bytes: u64) -> Duration {
        self.answer + self.idle + at_slowest_rate(bytes)
    }
}

impl Default for Patience {
    fn default() -> Patience {
        Patience::WORK
    }
}

fn at_slowest_rate(bytes: u64) -> Duration {
    Duration::from_secs(bytes / SLOWEST_RATE)
}
