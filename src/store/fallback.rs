//! Reading from several regions: a bad or missing copy is noted and the next region is asked.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::{FailureKind, Region, StoreError};

/// How long one region has a range to itself before another is asked for the same.
const SLOW: Duration = Duration::from_secs(1);
/// Reads that must have been answered by the region that was asked for one that is asked of two:
/// where not a region but the way out is slow, asking twice only makes it slower.
const ANSWERS_PER_SECOND_READ: usize = 10;
/// Second reads that nothing was answered for.
const FIRST_SECOND_READS: usize = 4;

/// A copy that turned out bad.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Damage {
    /// The region.
    pub region: String,
    /// The object, relative to the region's URL.
    pub key: String,
    /// What is wrong with it.
    pub message: String,
}

/// Regions in the order in which they are asked, and the damage seen while reading.
#[derive(Clone, Debug)]
pub struct Regions {
    regions: Vec<Region>,
    damage: Arc<Mutex<BTreeSet<Damage>>>,
    speed: Arc<Speed>,
}

/// What was seen of the regions' speed, by all clones of [`Regions`].
#[derive(Debug)]
struct Speed {
    /// The region that is asked first: the one that last overtook another.
    first: AtomicUsize,
    /// Second reads that may be made, in parts of [`ANSWERS_PER_SECOND_READ`].
    allowance: AtomicUsize,
}

impl Default for Speed {
    fn default() -> Speed {
        let allowance = AtomicUsize::new(FIRST_SECOND_READS * ANSWERS_PER_SECOND_READ);
        Speed { first: AtomicUsize::new(0), allowance }
    }
}

impl Speed {
    fn earn(&self, parts: usize) {
        let most = FIRST_SECOND_READS * ANSWERS_PER_SECOND_READ;
        let add = |have: usize| Some((have + parts).min(most));
        let _ = self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    fn spend(&self) -> bool {
        let take = |have: usize| have.checked_sub(ANSWERS_PER_SECOND_READ);
        self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

/// Why no region could give an object.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", self.describe())]
pub struct ReadError {
    /// What each region said.
    pub errors: Vec<StoreError>,
}

impl ReadError {
    /// A copy exists but none is whole.
    pub fn is_damage(&self) -> bool {
        self.errors.iter().any(|error| error.kind == FailureKind::Damaged)
    }

    /// Every region answered, and none has it.
    pub fn is_not_found(&self) -> bool {
        !self.errors.is_empty()
            && self.errors.iter().all(|error| error.kind == FailureKind::NotFound)
    }

    fn describe(&self) -> String {
        match self.errors.as_slice() {
            [] => "no region is configured".to_owned(),
            errors => errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        }
    }
}

impl Regions {
    /// Regions in the order of preference.
    pub fn new(regions: Vec<Region>) -> Regions {
        Regions { regions, damage: Arc::default(), speed: Arc::default() }
    }

    /// The regions, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The same regions seen from a folder inside each.
    pub fn within(&self, folder: &str) -> Regions {
        let regions = self.regions.iter().map(|region| region.within(folder)).collect();
        Regions { regions, damage: self.damage.clone(), speed: self.speed.clone() }
    }

    /// Bad copies seen so far, by all clones of this value.
    pub fn damage(&self) -> Vec<Damage> {
        let damage = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        damage.iter().cloned().collect()
    }

    /// Notes a failure; damage is logged once.
    fn note(&self, error: &StoreError) {
        if error.kind != FailureKind::Damaged {
            tracing::debug!(%error, "asking the next region");
            return;
        }
        let damage = Damage {
            region: error.region.clone(),
            key: error.key.clone(),
            message: error.message.clone(),
        };
        let mut all = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        if all.insert(damage) {
            tracing::error!(
                region = error.region,
                object = error.key,
                "damaged object: {}",
                error.message
            );
        }
    }

    /// Asks one region after the other until one gives a value that `read` accepts.
    ///
    /// # Errors
    /// What each region said, when none could.
    pub async fn read<T, F>(&self, read: impl Fn(Region) -> F) -> Result<T, ReadError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut errors = Vec::new();
        for region in &self.regions {
            match read(region.clone()).await {
                Ok(value) => return Ok(value),
                Err(error) => {
                    self.note(&error);
                    errors.push(error);
                }
            }
        }
        Err(ReadError { errors })
    }

    /// As [`Regions::read_soonest`] for values that need no other look than `read`'s own.
    ///
    /// # Errors
    /// What each region said, when none could.
    pub async fn read_first<T, F>(&self, read: impl Fn(Region) -> F) -> Result<T, ReadError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        self.read_soonest(read, |_, value| std::future::ready(Ok(value))).await
    }

    /// As [`Regions::read`], but a region that has not answered within [`SLOW`] is not waited for
    /// alone: the next is asked as well, and the first answer that `accept` takes counts. The
    /// region that overtook another is asked first from then on.
    ///
    /// # Errors
    /// What each region said, when none could.
    pub async fn read_soonest<T, U, F, G>(
        &self,
        read: impl Fn(Region) -> F,
        accept: impl Fn(Region, T) -> G,
    ) -> Result<U, ReadError>
    where
        F: Future<Output = Result<T, StoreError>>,
        G: Future<Output = Result<U, StoreError>>,
    {
        let count = self.regions.len();
        let first = self.speed.first.load(Ordering::Relaxed).min(count.saturating_sub(1));
        let mut others = (0..count).filter(|index| *index != first);
        let mut next = (count > 0).then_some(first);
        let mut errors = Vec::new();
        let mut asked = FuturesUnordered::new();
        loop {
            if let Some(index) = next.take() {
                let answer = read(self.regions[index].clone());
                asked.push(async move { (index, answer.await) });
            }
            let answered = match tokio::time::timeout(SLOW, asked.next()).await {
                Ok(answered) => answered,
                Err(_) if others.clone().next().is_some() && self.speed.spend() => {
                    next = others.next();
                    continue;
                }
                Err(_) => asked.next().await,
            };
            let Some((index, answer)) = answered else { return Err(ReadError { errors }) };
            let region = self.regions[index].clone();
            let outcome = match answer {
                Ok(value) => accept(region, value).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(value) => {
                    let overtook = !asked.is_empty() && index != first;
                    if overtook {
                        tracing::debug!(region = self.regions[index].name(), "it is asked first");
                        self.speed.first.store(index, Ordering::Relaxed);
                    }
                    self.speed.earn(if overtook { ANSWERS_PER_SECOND_READ } else { 1 });
                    return Ok(value);
                }
                Err(error) => {
                    self.note(&error);
                    errors.push(error);
                    next = if asked.is_empty() { others.next() } else { None };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::store::{RegionSpec, open_region};

    fn regions(names: &[&str]) -> Regions {
        let open = |name: &&str| {
            let url = format!("file:///nonexistent/{name}");
            let spec = RegionSpec { name: (*name).to_owned(), url, options: BTreeMap::new() };
            open_region(&spec).unwrap()
        };
        Regions::new(names.iter().map(open).collect())
    }

    /// Reads of which `slow` takes a minute; who answered, and who was asked.
    async fn read(regions: &Regions, slow: &str, bad: &str) -> (String, Vec<String>) {
        let asked = Mutex::new(Vec::new());
        let winner = regions
            .read_soonest(
                |region| {
                    asked.lock().unwrap().push(region.name().to_owned());
                    let is_slow = region.name() == slow;
                    async move {
                        if is_slow {
                            tokio::time::sleep(Duration::from_secs(60)).await;
                        }
                        Ok(region.name().to_owned())
                    }
                },
                |region, name| async move {
                    if name == bad { Err(region.damaged("pack", "a bad frame")) } else { Ok(name) }
                },
            )
            .await
            .unwrap();
        (winner, asked.into_inner().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_region_is_overtaken_once_and_then_asked_last() {
        let regions = regions(&["eu", "us"]);
        assert_eq!(read(&regions, "", "").await, ("eu".into(), vec!["eu".into()]));
        let both = vec!["eu".into(), "us".into()];
        assert_eq!(read(&regions, "eu", "").await, ("us".into(), both));
        assert_eq!(read(&regions, "eu", "").await, ("us".into(), vec!["us".into()]));
        // A copy that is bad is passed over, whoever is slow.
        let both = vec!["us".into(), "eu".into()];
        assert_eq!(read(&regions, "eu", "us").await, ("eu".into(), both));
        assert_eq!(regions.damage().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn where_all_are_slow_not_every_read_is_made_twice() {
        let regions = regions(&["eu", "us"]);
        let mut requests = 0;
        for _ in 0..50 {
            let slow = || async { tokio::time::sleep(Duration::from_secs(5)).await };
            let asked = AtomicUsize::new(0);
            regions
                .read_soonest(
                    |_| {
                        asked.fetch_add(1, Ordering::Relaxed);
                        async move {
                            slow().await;
                            Ok(())
                        }
                    },
                    |_, ()| async { Ok(()) },
                )
                .await
                .unwrap();
            requests += asked.into_inner();
        }
        assert!(requests < 50 + 10, "{requests} requests for 50 reads");
    }

    #[tokio::test(start_paused = true)]
    async fn where_none_answers_what_each_said_is_told() {
        let regions = regions(&["eu", "us"]);
        let outcome = regions
            .read_soonest(
                |region| async move { Err::<(), _>(region.damaged("pack", "gone")) },
                |_, ()| async { Ok(()) },
            )
            .await;
        assert_eq!(outcome.unwrap_err().errors.len(), 2);
    }
}
