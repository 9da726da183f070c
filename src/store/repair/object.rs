//! Objects that are small enough to be held: history files, gaps, roll-ups; and how any object is
//! written.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::plan::suspects;
use super::{DamageOutcome, FailureKind, ObjectKind, StoreError, Work};
use crate::repo::{
    GAP_FOLDER, Gap, TIMELINE_FOLDER, history_key, parse_gap_key, parse_history_name, read_roll_up,
};
use crate::store::{ObjectInfo, Put};
use crate::wal::{Lsn, TimelineHistory, TimelineId};

/// Keys and sizes, by region; nothing of regions that take no part.
pub(super) type Listings = Vec<BTreeMap<String, u64>>;

/// Whether bytes are what their key says.
type Check = fn(&Work<'_>, &str, &Bytes) -> Result<(), String>;

impl Work<'_> {
    /// History files. All copies are read: they are few and tiny, and a recovery needs each.
    pub(super) async fn repair_histories(&self, target: usize) -> Result<(), StoreError> {
        let mut lists = self.list(target, TIMELINE_FOLDER).await?;
        let name_of = |key: &str| parse_history_name(key.rsplit('/').next().unwrap_or(key));
        lists.iter_mut().for_each(|list| list.retain(|key, _| name_of(key).is_some()));
        self.check_objects(target, &lists, true, check_history).await?;
        for source in self.sources(target) {
            self.check_source(source, &lists[source], check_history).await;
        }
        // Two contents for one timeline: somebody promoted twice to the same number.
        let mut hashes: BTreeMap<TimelineId, BTreeSet<_>> = BTreeMap::new();
        for (region, list) in lists.iter().enumerate() {
            let good = list.keys().filter(|key| !self.ledger.is_damaged(region, key));
            for (timeline, hash) in good.filter_map(|key| name_of(key)) {
                hashes.entry(timeline).or_default().insert(hash);
            }
        }
        for (timeline, hashes) in hashes.into_iter().filter(|(_, hashes)| hashes.len() > 1) {
            let keys: Vec<_> = hashes.iter().map(|hash| history_key(timeline, *hash)).collect();
            let what = format!("{} are different histories of one timeline", keys.join(" and "));
            self.ledger.diverge(timeline, Lsn(0), what);
            for key in keys {
                lists.iter_mut().for_each(|list| {
                    list.remove(&key);
                });
            }
        }
        self.copy_objects(target, ObjectKind::History, &lists, check_history).await
    }

    /// Recorded gaps. Two regions may have noticed one at different moments: both records are good.
    pub(super) async fn repair_gaps(&self, target: usize) -> Result<(), StoreError> {
        let mut lists = self.list(target, GAP_FOLDER).await?;
        lists.iter_mut().for_each(|list| list.retain(|key, _| parse_gap_key(key).is_some()));
        self.check_objects(target, &lists, true, check_gap).await?;
        self.copy_objects(target, ObjectKind::Gap, &lists, check_gap).await
    }

    /// Roll-ups of one folder.
    pub(super) async fn repair_roll_ups(
        &self,
        target: usize,
        lists: &Listings,
        deep: bool,
    ) -> Result<(), StoreError> {
        self.check_objects(target, lists, deep, check_roll_up).await?;
        self.copy_objects(target, ObjectKind::RollUp, lists, check_roll_up).await
    }

    /// Lists a folder in the target and its sources.
    pub(super) async fn list(&self, target: usize, folder: &str) -> Result<Listings, StoreError> {
        let answers = self.ask(target, |region| async move { region.list(folder).await }).await?;
        let to_map = |objects: Vec<ObjectInfo>| {
            objects.into_iter().map(|object| (object.key, object.size)).collect()
        };
        Ok(answers.into_iter().map(|list| list.map(to_map).unwrap_or_default()).collect())
    }

    /// Reads what may be damaged in the target, or all of it.
    async fn check_objects(
        &self,
        target: usize,
        lists: &Listings,
        all: bool,
        check: Check,
    ) -> Result<(), StoreError> {
        let others: Vec<_> = self.sources(target).map(|source| &lists[source]).collect();
        let mine = &lists[target];
        let keys = if all { mine.keys().collect() } else { suspects(mine, &others) };
        for key in keys {
            if self.ledger.is_verified(target, key) || self.ledger.is_damaged(target, key) {
                continue;
            }
            match self.read_checked(target, key, check).await {
                Ok(bytes) => self.ledger.verified(target, key, bytes.len() as u64),
                Err(error) if error.kind == FailureKind::Damaged => {
                    self.ledger.damage(target, key, &error.message);
                }
                Err(error) if error.kind == FailureKind::NotFound => self.ledger.unsettle(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn check_source(&self, source: usize, list: &BTreeMap<String, u64>, check: Check) {
        for key in list.keys() {
            if self.ledger.is_verified(source, key) || self.ledger.is_damaged(source, key) {
                continue;
            }
            match self.read_checked(source, key, check).await {
                Ok(bytes) => self.ledger.verified(source, key, bytes.len() as u64),
                Err(error) => self.source_failed(source, key, &error),
            }
        }
    }

    async fn read_checked(
        &self,
        region: usize,
        key: &str,
        check: Check,
    ) -> Result<Bytes, StoreError> {
        let region = &self.regions[region];
        let bytes = region.get(key).await?;
        check(self, key, &bytes).map_err(|problem| region.damaged(key, problem))?;
        Ok(bytes)
    }

    /// Copies what the target lacks, or has damaged.
    async fn copy_objects(
        &self,
        target: usize,
        kind: ObjectKind,
        lists: &Listings,
        check: Check,
    ) -> Result<(), StoreError> {
        let wanted: BTreeSet<&String> = lists.iter().flat_map(BTreeMap::keys).collect();
        for key in wanted {
            let damaged = self.ledger.is_damaged(target, key);
            if lists[target].contains_key(key) && !damaged {
                continue;
            }
            match self.read_from_any(target, key, lists, check).await {
                Some(bytes) => self.write(target, kind, key, bytes).await?,
                None if damaged => self.ledger.outcome(target, key, DamageOutcome::Lost),
                None => self.ledger.lacking(target, format!("{key}: no source could give it")),
            }
        }
        Ok(())
    }

    async fn read_from_any(
        &self,
        target: usize,
        key: &str,
        lists: &Listings,
        check: Check,
    ) -> Option<Bytes> {
        let holders = self.sources(target).filter(|source| lists[*source].contains_key(key));
        for source in holders.filter(|source| !self.ledger.is_damaged(*source, key)) {
            match self.read_checked(source, key, check).await {
                Ok(bytes) => return Some(bytes),
                Err(error) => self.source_failed(source, key, &error),
            }
        }
        None
    }

    /// Writes a verified object, over a damaged one if there is one; in a dry run counts it.
    pub(super) async fn write(
        &self,
        target: usize,
        kind: ObjectKind,
        key: &str,
        bytes: Bytes,
    ) -> Result<(), StoreError> {
        let length = bytes.len() as u64;
        if self.options.dry_run {
            self.ledger.copied(target, kind, length);
            return Ok(());
        }
        let region = &self.regions[target];
        let written = if self.ledger.is_damaged(target, key) {
            region.overwrite(key, bytes).await?;
            self.ledger.outcome(target, key, DamageOutcome::Replaced);
            true
        } else {
            region.put(key, bytes).await? == Put::Written
        };
        if written {
            self.ledger.copied(target, kind, length);
        }
        self.progress.add(length);
        Ok(())
    }
}

fn check_history(work: &Work<'_>, key: &str, bytes: &Bytes) -> Result<(), String> {
    let name = parse_history_name(key.rsplit('/').next().unwrap_or(key));
    let (timeline, hash) = name.ok_or("its name is that of no history file")?;
    if work.key.hash(bytes).short() != hash {
        return Err("its content does not have the hash in its name".to_owned());
    }
    TimelineHistory::parse(timeline, bytes).map(|_| ()).map_err(|error| error.to_string())
}

fn check_gap(_: &Work<'_>, key: &str, bytes: &Bytes) -> Result<(), String> {
    let gap: Gap =
        serde_json::from_slice(bytes).map_err(|error| format!("it cannot be read: {error}"))?;
    match parse_gap_key(key) {
        Some(named) if named == (gap.timeline, gap.from, gap.to) => Ok(()),
        _ => Err("it names another gap".to_owned()),
    }
}

fn check_roll_up(work: &Work<'_>, key: &str, bytes: &Bytes) -> Result<(), String> {
    read_roll_up(bytes.clone(), key, &work.key).map(|_| ()).map_err(|error| error.to_string())
}
