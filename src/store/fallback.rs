//! Reading from several regions: a bad or missing copy is noted and the next region is asked.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use super::{FailureKind, Region, StoreError};

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
        Regions { regions, damage: Arc::default() }
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
        Regions { regions, damage: self.damage.clone() }
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
}
