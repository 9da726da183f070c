//! What a server knows of a physical slot, how much WAL it holds there, and how long that can go
//! on: pure but for [`SlotWatch`], which remembers what was seen.
//!
//! The server keeps WAL from the slot's `restart_lsn` on. With `max_slot_wal_keep_size` it gives up
//! the slot, and the WAL, at the first checkpoint behind that limit; without, its disk fills.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::wal::Lsn;

/// The rate of WAL is taken over so much time: a busy second says little.
const RATE_SPAN: Duration = Duration::from_secs(60);
/// Samples kept at most; the oldest go first.
const MAX_SAMPLES: usize = 128;

/// What a server knows of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotFacts {
    /// The process that serves the client that streams from it, if one does.
    pub active_pid: Option<i32>,
    /// The oldest WAL that it keeps; `None` when it keeps none.
    pub restart_lsn: Option<Lsn>,
    /// `wal_status`: `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// The client that streams from it: application and address.
    pub holder: Option<String>,
    /// The end of the server's WAL: written, or on a standby received or replayed.
    pub wal_end: Lsn,
    /// How much may still be written until the limit is reached, as the server computes it. Only
    /// a primary's answer counts.
    pub safe_wal_size: Option<u64>,
    /// `max_slot_wal_keep_size` in bytes; `None` without limit.
    pub limit_bytes: Option<u64>,
}

impl SlotFacts {
    /// Whether it lost WAL (`max_slot_wal_keep_size`): it will never hold any again.
    pub fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost")
    }

    /// How much WAL it keeps on the server.
    pub fn retained_bytes(&self) -> Option<u64> {
        self.restart_lsn.map(|lsn| self.wal_end.bytes_since(lsn))
    }

    /// How much WAL may still be written before the server gives the slot up.
    pub fn bytes_until_limit(&self) -> Option<u64> {
        let limit = self.limit_bytes?;
        self.safe_wal_size.or_else(|| Some(limit.saturating_sub(self.retained_bytes()?)))
    }

    /// Who streams from it, for people.
    pub fn held_by(&self) -> Option<String> {
        let pid = self.active_pid?;
        Some(match self.holder.as_deref().unwrap_or_default() {
            "" => format!("process {pid}"),
            holder => format!("{holder} (process {pid})"),
        })
    }
}

/// How fast WAL is written, in bytes a second, from two positions; `None` when no time passed.
pub fn wal_rate(earlier: Lsn, later: Lsn, elapsed: Duration) -> Option<f64> {
    let seconds = elapsed.as_secs_f64();
    (seconds > 0.0).then(|| later.bytes_since(earlier) as f64 / seconds)
}

/// How long until so many bytes are written; `None` without limit, at rest, and when it is longer
/// than can be said.
pub fn time_until_limit(
    bytes_left: Option<u64>,
    bytes_per_second: Option<f64>,
) -> Option<Duration> {
    let (left, rate) = (bytes_left?, bytes_per_second?);
    if left == 0 {
        return Some(Duration::ZERO);
    }
    if rate > 0.0 { Duration::try_from_secs_f64(left as f64 / rate).ok() } else { None }
}

/// A slot in the status report; its fields are a contract.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    /// Its name.
    pub name: String,
    /// The server that was asked.
    pub host: String,
    /// When it was, by this machine's clock.
    pub time: DateTime<Utc>,
    /// The oldest WAL that it keeps.
    pub restart_lsn: Option<Lsn>,
    /// How much WAL it keeps on the server.
    pub retained_bytes: Option<u64>,
    /// `max_slot_wal_keep_size`; `null` without limit.
    pub limit_bytes: Option<u64>,
    /// How long until the limit is reached if WAL is written as fast as now and none is archived;
    /// `null` without limit or at rest.
    pub seconds_until_limit: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`; `null` when the slot does not exist.
    pub wal_status: Option<String>,
}

impl SlotStatus {
    /// The status of a slot that was asked for now; `None` stands for one that does not exist.
    pub fn new(
        name: &str,
        host: &str,
        facts: Option<&SlotFacts>,
        bytes_per_second: Option<f64>,
    ) -> SlotStatus {
        let left = facts.and_then(SlotFacts::bytes_until_limit);
        SlotStatus {
            name: name.to_owned(),
            host: host.to_owned(),
            time: Utc::now(),
            restart_lsn: facts.and_then(|facts| facts.restart_lsn),
            retained_bytes: facts.and_then(SlotFacts::retained_bytes),
            limit_bytes: facts.and_then(|facts| facts.limit_bytes),
            seconds_until_limit: time_until_limit(left, bytes_per_second).map(|t| t.as_secs()),
            wal_status: facts.and_then(|facts| facts.wal_status.clone()),
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    host: String,
    samples: VecDeque<(Lsn, Instant)>,
    status: Option<SlotStatus>,
}

/// What was last seen of a slot: shared by the one who looks and those who tell.
#[derive(Clone, Debug, Default)]
pub struct SlotWatch {
    seen: Arc<Mutex<Seen>>,
}

impl SlotWatch {
    /// Takes in what a server said at `now`; the rate of its WAL comes from what it said before.
    pub fn observe(&self, name: &str, host: &str, facts: Option<&SlotFacts>, now: Instant) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = &mut *seen;
        if seen.host != host {
            host.clone_into(&mut seen.host);
            seen.samples.clear();
        }
        if let Some(facts) = facts {
            seen.samples.push_back((facts.wal_end, now));
        }
        // One sample as old as the span or older stays, to measure from.
        let is_old = |sample: &(Lsn, Instant)| now.duration_since(sample.1) >= RATE_SPAN;
        while seen.samples.len() > MAX_SAMPLES || seen.samples.get(1).is_some_and(is_old) {
            seen.samples.pop_front();
        }
        let rate = match (seen.samples.front(), seen.samples.back()) {
            (Some(first), Some(last)) => wal_rate(first.0, last.0, last.1.duration_since(first.1)),
            _ => None,
        };
        seen.status = Some(SlotStatus::new(name, host, facts, rate));
    }

    /// Says what is known, by somebody who knows more.
    pub fn set(&self, status: Option<SlotStatus>) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).status = status;
    }

    /// What is known.
    pub fn get(&self) -> Option<SlotStatus> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).status.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(restart: u64, end: u64, limit: Option<u64>) -> SlotFacts {
        SlotFacts {
            active_pid: None,
            restart_lsn: Some(Lsn(restart)),
            wal_status: Some("reserved".into()),
            holder: None,
            wal_end: Lsn(end),
            safe_wal_size: None,
            limit_bytes: limit,
        }
    }

    #[test]
    fn the_time_until_the_limit_is_what_is_left_by_the_rate() {
        let rate = wal_rate(Lsn(1000), Lsn(3000), Duration::from_secs(2));
        assert_eq!(rate, Some(1000.0));
        assert_eq!(time_until_limit(Some(60_000), rate), Some(Duration::from_secs(60)));
        assert_eq!(time_until_limit(Some(0), rate), Some(Duration::ZERO));
        assert_eq!(time_until_limit(Some(0), Some(0.0)), Some(Duration::ZERO));
    }

    #[test]
    fn without_limit_or_writes_there_is_no_time() {
        assert_eq!(time_until_limit(None, Some(1.0)), None);
        assert_eq!(time_until_limit(Some(1), Some(0.0)), None);
        assert_eq!(time_until_limit(Some(1), None), None);
        assert_eq!(time_until_limit(Some(u64::MAX), Some(f64::MIN_POSITIVE)), None);
        assert_eq!(wal_rate(Lsn(1), Lsn(2), Duration::ZERO), None);
        // A server that went back, as after a failover, writes nothing for now.
        assert_eq!(wal_rate(Lsn(2), Lsn(1), Duration::from_secs(1)), Some(0.0));
    }

    #[test]
    fn what_is_left_is_the_servers_word_or_else_computed() {
        assert_eq!(facts(100, 400, None).bytes_until_limit(), None);
        assert_eq!(facts(100, 400, Some(1000)).bytes_until_limit(), Some(700));
        assert_eq!(facts(100, 4000, Some(1000)).bytes_until_limit(), Some(0));
        let said = SlotFacts { safe_wal_size: Some(5), ..facts(100, 400, Some(1000)) };
        assert_eq!(said.bytes_until_limit(), Some(5));
        let none = SlotFacts { restart_lsn: None, ..facts(0, 400, Some(1000)) };
        assert_eq!((none.retained_bytes(), none.bytes_until_limit()), (None, None));
    }

    #[test]
    fn a_watch_measures_over_a_minute_and_forgets_another_server() {
        let watch = SlotWatch::default();
        assert_eq!(watch.get(), None);
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        watch.observe("s", "a", Some(&facts(0, 0, Some(10_000))), at(0));
        assert_eq!(watch.get().unwrap().seconds_until_limit, None);
        // 10 bytes a second in the first minute, 100 in the second.
        watch.observe("s", "a", Some(&facts(0, 600, Some(10_000))), at(60));
        assert_eq!(watch.get().unwrap().seconds_until_limit, Some(940));
        watch.observe("s", "a", Some(&facts(0, 6600, Some(10_000))), at(120));
        assert_eq!(watch.get().unwrap().seconds_until_limit, Some(34));
        assert_eq!(watch.get().unwrap().retained_bytes, Some(6600));
        watch.observe("s", "b", Some(&facts(0, 6600, Some(10_000))), at(121));
        assert_eq!(watch.get().unwrap().seconds_until_limit, None);
        watch.observe("s", "b", None, at(122));
        let gone = watch.get().unwrap();
        assert_eq!((gone.host.as_str(), gone.wal_status, gone.restart_lsn), ("b", None, None));
    }
}
