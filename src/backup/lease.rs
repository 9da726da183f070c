//! The lease of a running backup (`repo/lease.rs`), written to every region before the first pack
//! and renewed until the end. It tells others that the backup's folder is not a dead one's leftover,
//! and that its parent must stay.
//!
//! One clock for all: the server's, read once when the backup begins and carried on by this process'
//! monotonic clock, so that writers on machines with other clocks agree on what has expired.
//!
//! Each region has a task of its own; one that fails is tried again. Where the lease lapsed all the
//! same, another process may have cleared what this one wrote: the backup is not published there.
//! A process that dies leaves its last leases, which expire by themselves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::repo::{BackupLabel, FORMAT_VERSION, LEASE_LIFETIME, Lease, LeaseKind, lease_key};
use crate::store::{FailureKind, Patience, Region, StoreError};

/// How often a lease is renewed.
const RENEW: Duration = Duration::from_secs(300);
/// When a renewal that failed is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// How long the backup waits for its first leases: its label's youth protects it meanwhile.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// How long the end waits for the leases to be removed: they expire anyway.
const END_WAIT: Duration = Duration::from_secs(10);
/// A lease must be in force for so long after `backup.json` is begun.
const MARGIN: TimeDelta = TimeDelta::minutes(2);

/// The server's clock, without asking it again.
#[derive(Clone, Copy, Debug)]
struct Clock {
    read: DateTime<Utc>,
    at: Instant,
}

impl Clock {
    fn now(&self) -> DateTime<Utc> {
        let passed = TimeDelta::from_std(self.at.elapsed()).unwrap_or(TimeDelta::MAX);
        self.read.checked_add_signed(passed).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }
}

/// How a region stands.
#[derive(Clone, Copy, Debug)]
struct Hold {
    /// Until when nobody may clear the backup there.
    until: DateTime<Utc>,
    /// There was a moment in which somebody might have.
    lapsed: bool,
}

type Holds = Arc<Mutex<Vec<(String, Hold)>>>;

fn lock(holds: &Holds) -> MutexGuard<'_, Vec<(String, Hold)>> {
    holds.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lease of the backup that this process takes. Dropped, it ends too, in the background.
pub(super) struct BackupLease {
    clock: Clock,
    holds: Holds,
    stop: DropGuard,
    tasks: Vec<JoinHandle<()>>,
}

impl BackupLease {
    /// Writes the lease of a backup that began at `now`, the server's time, to `regions`, at the
    /// lineage's folder. Waits for regions that hang no longer than a moment.
    pub(super) async fn begin(
        regions: &[Region],
        label: &BackupLabel,
        parent: Option<&BackupLabel>,
        now: DateTime<Utc>,
    ) -> BackupLease {
        let clock = Clock { read: now, at: Instant::now() };
        // The label has whole seconds.
        let young = Hold { until: label.time() + LEASE_LIFETIME, lapsed: false };
        let holds: Vec<_> = regions.iter().map(|r| (r.name().to_owned(), young)).collect();
        let holds: Holds = Arc::new(Mutex::new(holds));
        let cancelled = CancellationToken::new();
        let tried = watch::Sender::new(0);
        let mut tried_by = tried.subscribe();
        let mut tasks = Vec::new();
        for (index, region) in regions.iter().enumerate() {
            let keeper = Keeper {
                region: region.with_patience(Patience::LOOKUP),
                index,
                label: label.clone(),
                parent: parent.cloned(),
                clock,
                holds: holds.clone(),
                tried: tried.clone(),
            };
            tasks.push(tokio::spawn(keeper.keep(cancelled.clone())));
        }
        let all = tried_by.wait_for(|tried| *tried >= regions.len());
        let _ = tokio::time::timeout(FIRST_WAIT, all).await;
        BackupLease { clock, holds, stop: cancelled.drop_guard(), tasks }
    }

    /// Whether what was written to a region is surely still there, for long enough to publish it.
    ///
    /// # Errors
    /// When the lease lapsed there.
    pub(super) fn check(&self, region: &Region) -> Result<(), StoreError> {
        let holds = lock(&self.holds);
        let hold = holds.iter().find(|(name, _)| name == region.name()).map(|(_, hold)| *hold);
        let end = self.clock.now() + MARGIN;
        if hold.is_some_and(|hold| !hold.lapsed && end < hold.until) {
            return Ok(());
        }
        Err(StoreError {
            kind: FailureKind::Transient,
            region: region.name().to_owned(),
            operation: "publish",
            key: String::new(),
            message: "the lease of this backup could not be renewed in time, so another process may have cleared what was written".into(),
        })
    }

    /// Removes the lease.
    pub(super) async fn end(self) {
        let BackupLease { stop, tasks, .. } = self;
        drop(stop);
        if tokio::time::timeout(END_WAIT, join_all(tasks)).await.is_err() {
            tracing::debug!("a lease of this backup stays until it expires");
        }
    }
}

/// Keeps the lease in one region.
struct Keeper {
    region: Region,
    index: usize,
    label: BackupLabel,
    parent: Option<BackupLabel>,
    clock: Clock,
    holds: Holds,
    tried: watch::Sender<usize>,
}

impl Keeper {
    async fn keep(self, cancelled: CancellationToken) {
        // Numbers whose objects may be there, oldest first.
        let mut written: Vec<u32> = Vec::new();
        let mut number = 0;
        loop {
            let last = written.last().copied();
            written.push(number);
            let outcome = tokio::select! {
                outcome = self.write(number) => outcome,
                () = cancelled.cancelled() => break,
            };
            self.tried.send_modify(|tried| *tried += 1);
            number += 1;
            let pause = match outcome {
                Ok(()) => {
                    // The one before stays, for those who are listing just now.
                    let old = written.iter().copied().filter(|n| Some(*n) < last).collect();
                    written.retain(|n| Some(*n) >= last);
                    self.remove(old).await;
                    RENEW
                }
                Err(error) => {
                    tracing::warn!("the lease of backup {}: {error}", self.label);
                    RETRY
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = cancelled.cancelled() => break,
            }
        }
        self.remove(written).await;
    }

    async fn write(&self, number: u32) -> Result<(), StoreError> {
        let now = self.clock.now();
        let lease = Lease {
            format: FORMAT_VERSION,
            kind: LeaseKind::Backup,
            label: self.label.clone(),
            parent: self.parent.clone(),
            written: now,
            expires: now + LEASE_LIFETIME,
        };
        let bytes = serde_json::to_vec_pretty(&lease).map(Bytes::from).unwrap_or_default();
        self.region.put(&lease_key(&self.label, number), bytes).await?;
        let done = self.clock.now();
        if let Some((_, hold)) = lock(&self.holds).get_mut(self.index) {
            hold.lapsed |= done >= hold.until;
            hold.until = lease.expires;
        }
        Ok(())
    }

    async fn remove(&self, numbers: Vec<u32>) {
        let keys: Vec<_> = numbers.iter().map(|n| lease_key(&self.label, *n)).collect();
        for error in self.region.delete_many(&keys).await {
            tracing::debug!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::repo::{BackupType, LEASE_FOLDER};

    fn now() -> DateTime<Utc> {
        "2026-11-23T07:15:00Z".parse().unwrap()
    }

    fn label() -> BackupLabel {
        BackupLabel::new(now(), BackupType::Full, 1)
    }

    async fn leases(region: &Region) -> Vec<Lease> {
        let mut found = Vec::new();
        for object in region.list(LEASE_FOLDER).await.unwrap() {
            found.push(serde_json::from_slice(&region.get(&object.key).await.unwrap()).unwrap());
        }
        found
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_renewed_until_it_ends_and_then_gone() {
        let region = Region::over("eu", "mem://eu", Arc::new(InMemory::new()));
        let parent = BackupLabel::new(now(), BackupType::Full, 2);
        let regions = [region.clone()];
        let lease = BackupLease::begin(&regions, &label(), Some(&parent), now()).await;
        for minute in 1..=100 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            let clock = now() + TimeDelta::minutes(minute);
            let found = leases(&region).await;
            assert!(found.len() <= 2, "{found:?}");
            assert!(found.iter().any(|lease| lease.is_in_force(clock)), "{found:?} at {clock}");
            assert!(found.iter().all(|lease| lease.names(&label()) && lease.names(&parent)));
            lease.check(&region).unwrap();
        }
        lease.end().await;
        assert_eq!(leases(&region).await, []);
    }

    // A machine that slept, or a region that was away for too long.
    #[tokio::test(start_paused = true)]
    async fn a_lease_that_lapsed_publishes_nothing() {
        let region = Region::over("eu", "mem://eu", Arc::new(InMemory::new()));
        let regions = [region.clone()];
        let lease = BackupLease::begin(&regions, &label(), None, now()).await;
        tokio::time::advance(Duration::from_secs(16 * 60)).await;
        assert!(lease.check(&region).is_err());
        tokio::time::sleep(RENEW).await;
        // In force again, but there was a moment without.
        assert!(lease.check(&region).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_dropped_goes_away() {
        let region = Region::over("eu", "mem://eu", Arc::new(InMemory::new()));
        let lease = BackupLease::begin(std::slice::from_ref(&region), &label(), None, now()).await;
        assert_eq!(leases(&region).await.len(), 1);
        drop(lease);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(leases(&region).await, []);
    }
}
