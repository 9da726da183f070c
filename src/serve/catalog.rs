//! What the service knows of the regions: read in the background, so that an answer never waits
//! for a region.
//!
//! Reading costs requests, so it happens only while somebody asks, and not more often than every
//! [`SPACING`]. Regions are read side by side, each with its own deadline; those that answer are told of
//! before those that hang.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::restore::{RecoveryWindow, recovery_window};
use crate::store::{Catalog, Region, Regions, list_lineages};

/// The regions are not read more often.
const SPACING: Duration = Duration::from_secs(10);
/// How long one region may take.
const REGION_DEADLINE: Duration = Duration::from_secs(10);
/// How long the regions that have answered wait for the others before they are told of.
const GATHER: Duration = Duration::from_millis(200);
/// How long the recovery window may take.
const WINDOW_DEADLINE: Duration = Duration::from_secs(10);
/// How long an answer may wait for regions that are being read.
const PATIENCE: Duration = Duration::from_millis(800);

/// What was read.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// When.
    pub(super) read: Instant,
    /// What the regions hold.
    pub(super) catalog: Arc<Catalog>,
    /// The moments that a restore can reach.
    pub(super) window: Option<RecoveryWindow>,
}

/// The reader's end and the readers' end.
#[derive(Debug)]
pub(super) struct CatalogCache {
    /// The regions, at the cluster's folder.
    regions: Regions,
    known: watch::Sender<Option<Known>>,
    asked: Notify,
}

impl CatalogCache {
    pub(super) fn new(regions: Regions) -> CatalogCache {
        CatalogCache { regions, known: watch::Sender::new(None), asked: Notify::new() }
    }

    /// What is known now. What is old is read again, and waited for a moment.
    pub(super) async fn get(&self) -> Option<Known> {
        let mut known = self.known.subscribe();
        let is_fresh = |known: &Option<Known>| {
            known.as_ref().is_some_and(|known| known.read.elapsed() < SPACING)
        };
        if !is_fresh(&known.borrow_and_update()) {
            self.asked.notify_one();
        }
        let _ = tokio::time::timeout(PATIENCE, known.wait_for(is_fresh)).await;
        self.known.borrow().clone()
    }

    /// Reads when somebody asks, until cancelled. `system_id` tells whose archive it is, once that is
    /// known.
    pub(super) async fn keep(
        &self,
        system_id: impl Fn() -> Option<u64>,
        cancelled: &CancellationToken,
    ) {
        let mut earlier: Vec<Option<Catalog>> = vec![None; self.regions.len()];
        let keep = async {
            loop {
                self.asked.notified().await;
                let begun = Instant::now();
                match system_id() {
                    Some(system_id) => self.read(&system_id.to_string(), &mut earlier).await,
                    None => continue,
                }
                tokio::time::sleep(SPACING.saturating_sub(begun.elapsed())).await;
            }
        };
        tokio::select! {
            () = cancelled.cancelled() => {}
            () = keep => {}
        }
    }

    /// Reads every region once. `earlier` is what each said the last time.
    async fn read(&self, system_id: &str, earlier: &mut [Option<Catalog>]) {
        let reads = self.regions.iter().enumerate().map(|(index, region)| async move {
            (index, tokio::time::timeout(REGION_DEADLINE, read_region(region, system_id)).await)
        });
        let mut reads: FuturesUnordered<_> = reads.collect();
        let mut answered = vec![false; earlier.len()];
        while let Some(first) = reads.next().await {
            let mut done = vec![first];
            let gather = async {
                while let Some(next) = reads.next().await {
                    done.push(next);
                }
            };
            let _ = tokio::time::timeout(GATHER, gather).await;
            let mut changed = false;
            for (index, outcome) in done {
                let outcome = outcome.ok().flatten();
                changed |= outcome.is_some() || earlier[index].is_some();
                answered[index] = outcome.is_some();
                earlier[index] = outcome;
            }
            if changed {
                self.publish(earlier, &answered).await;
            }
        }
    }

    /// Tells what the regions said. Only those that answered now are asked for the recovery window.
    async fn publish(&self, parts: &[Option<Catalog>], answered: &[bool]) {
        let Some(catalog) = merged(parts.iter().flatten()) else { return };
        let present = parts.iter().zip(answered).filter(|(_, answered)| **answered);
        let Some(present) = merged(present.filter_map(|(part, _)| part.as_ref())) else { return };
        let old_window = self.known.borrow().as_ref().and_then(|known| known.window.clone());
        let window = match tokio::time::timeout(WINDOW_DEADLINE, recovery_window(&present)).await {
            Ok(Ok(window)) => window,
            Ok(Err(error)) => {
                tracing::debug!("the recovery window: {error}");
                old_window
            }
            Err(_) => old_window,
        };
        let known = Known { read: Instant::now(), catalog: Arc::new(catalog), window };
        self.known.send_replace(Some(known));
    }
}

/// One region's part; `None` when it does not answer, or has no archive of this system.
async fn read_region(region: &Region, system_id: &str) -> Option<Catalog> {
    let alone = Regions::new(vec![region.clone()]);
    let lineages = list_lineages(&alone).await.ok()?;
    let lineage = lineages.into_iter().find(|lineage| lineage.system_identifier == system_id)?;
    Catalog::read(&alone, lineage).await.ok()
}

/// What several regions say, as if it had been read at once.
fn merged<'a>(parts: impl Iterator<Item = &'a Catalog>) -> Option<Catalog> {
    let mut all: Option<Catalog> = None;
    let mut regions = Vec::new();
    for part in parts {
        regions.extend(part.regions.iter().cloned());
        let Some(all) = &mut all else {
            all = Some(part.clone());
            continue;
        };
        for (label, (info, names)) in &part.backups {
            let entry =
                all.backups.entry(label.clone()).or_insert_with(|| (info.clone(), Vec::new()));
            entry.1.extend(names.iter().cloned());
        }
        for (timeline, history) in &part.histories {
            all.histories.entry(*timeline).or_insert_with(|| history.clone());
        }
        all.timelines.extend(&part.timelines);
        all.gaps.extend(&part.gaps);
        all.alive.extend(part.alive.iter().cloned());
        all.failures.extend(part.failures.iter().cloned());
    }
    let mut all = all?;
    all.regions = Regions::new(regions);
    all.timelines.sort_unstable();
    all.timelines.dedup();
    all.gaps.sort_unstable();
    all.gaps.dedup();
    Some(all)
}
