//! Backups: data first, `backup.json` last (invariant I3).
//!
//! What proves an object: `backup.json` has size and hash of all others but packs, and
//! `files.idx` those of every pack, packs of older backups included. `backup.json` itself is proved
//! by what it names: of several that differ, the one whose `files.idx` exists is right.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};

use super::object::Listings;
use super::{
    CHECKS_AT_ONCE, COPIES_AT_ONCE, DamageOutcome, FailureKind, ObjectKind, Region, StoreError,
    Work,
};
use crate::repo::{
    BACKUP_FOLDER, BackupInfo, BackupLabel, ContentHash, FORMAT_VERSION, FileIndex, PackEntry,
    backup_folder, backup_json_key, files_idx_key, include_key, manifest_key, pack_key,
};
use crate::store::PART_SIZE;

/// An object of a backup, and what proves it.
#[derive(Clone)]
struct Stored {
    key: String,
    kind: ObjectKind,
    size: u64,
    /// `None` for files that nothing names: their length is all that is known of them.
    hash: Option<ContentHash>,
}

/// A backup as the regions together know it.
struct Known {
    info: BackupInfo,
    json: Bytes,
    objects: Vec<Stored>,
}

/// What a read that passes a hash came to.
const WRONG_HASH: &str = "its content does not have the hash that the backup gives";

impl Work<'_> {
    /// Makes every backup of any source whole in the target, the oldest first.
    pub(super) async fn repair_backups(&self, target: usize, deep: bool) -> Result<(), StoreError> {
        let lists = self.list(target, BACKUP_FOLDER).await?;
        let labels: BTreeSet<BackupLabel> = lists
            .iter()
            .flat_map(BTreeMap::keys)
            .filter_map(|key| key.strip_suffix("/backup.json")?.rsplit('/').next()?.parse().ok())
            .collect();
        // Packs are shared by backups: each is looked at once.
        let mut done = BTreeSet::new();
        for label in labels {
            if let Some(known) = self.know(target, &label, &lists).await? {
                self.repair_backup(target, known, &lists, &mut done, deep).await?;
            }
        }
        Ok(())
    }

    /// Finds out what the backup consists of; `None` when no region can tell.
    async fn know(
        &self,
        target: usize,
        label: &BackupLabel,
        lists: &Listings,
    ) -> Result<Option<Known>, StoreError> {
        let key = backup_json_key(label);
        let copies = self.read_commits(target, label, lists).await?;
        let mut candidates: Vec<(usize, &BackupInfo, &Bytes)> = Vec::new();
        for (_, info, bytes) in &copies {
            match candidates.iter_mut().find(|candidate| candidate.2 == bytes) {
                Some(candidate) => candidate.0 += 1,
                None => candidates.push((1, info, bytes)),
            }
        }
        candidates.sort_by_key(|(count, ..)| std::cmp::Reverse(*count));
        for (_, info, bytes) in candidates {
            let Some(packs) = self.read_packs(target, info, lists).await? else { continue };
            for (region, _, other) in copies.iter().filter(|(_, _, other)| other != bytes) {
                let message = "another region's copy differs, and fits files.idx";
                self.ledger.damage(*region, &key, message);
                tracing::debug!("{} bytes instead of {}", other.len(), bytes.len());
            }
            let objects = self.objects_of(target, info, &packs, lists);
            return Ok(Some(Known { info: info.clone(), json: bytes.clone(), objects }));
        }
        if self.ledger.is_damaged(target, &key) {
            self.ledger.outcome(target, &key, DamageOutcome::Lost);
        }
        self.ledger.lost(format!("{}: no region has it whole", files_idx_key(label)));
        Ok(None)
    }

    /// The copies of `backup.json` that can be believed by themselves.
    async fn read_commits(
        &self,
        target: usize,
        label: &BackupLabel,
        lists: &Listings,
    ) -> Result<Vec<(usize, BackupInfo, Bytes)>, StoreError> {
        let key = backup_json_key(label);
        let holds = |region: &usize| lists[*region].contains_key(&key);
        let holders: Vec<usize> = [target].into_iter().chain(self.sources(target)).collect();
        let reads = holders.into_iter().filter(holds).map(|index| {
            let (region, key) = (&self.regions[index], &key);
            async move { (index, self.read_commit(region, key, label).await) }
        });
        let mut copies = Vec::new();
        for (index, read) in join_all(reads).await {
            match read {
                _ if self.ledger.is_damaged(index, &key) => {}
                Ok((info, bytes)) => copies.push((index, info, bytes)),
                Err(error) if error.kind == FailureKind::Damaged || index != target => {
                    self.source_failed(index, &key, &error);
                }
                Err(error) if error.kind == FailureKind::NotFound => self.ledger.unsettle(),
                Err(error) => return Err(error),
            }
        }
        Ok(copies)
    }

    async fn read_commit(
        &self,
        region: &Region,
        key: &str,
        label: &BackupLabel,
    ) -> Result<(BackupInfo, Bytes), StoreError> {
        let bytes = region.get(key).await?;
        let info: BackupInfo = serde_json::from_slice(&bytes)
            .map_err(|error| region.damaged(key, format!("it cannot be read: {error}")))?;
        if info.format > FORMAT_VERSION {
            let message =
                format!("it was written by a newer pgkeep (format {}); use that", info.format);
            return Err(region.error("use", key, FailureKind::Permanent, message));
        }
        if info.label != *label || info.system_identifier != self.lineage.system_identifier {
            return Err(region.damaged(key, "it is another backup's"));
        }
        Ok((info, bytes))
    }

    /// The packs of a backup, from the first good `files.idx`.
    async fn read_packs(
        &self,
        target: usize,
        info: &BackupInfo,
        lists: &Listings,
    ) -> Result<Option<Vec<PackEntry>>, StoreError> {
        let key = files_idx_key(&info.label);
        let right_size = |region: &usize| lists[*region].get(&key) == Some(&info.files_idx.size);
        let holders: Vec<usize> = [target].into_iter().chain(self.sources(target)).collect();
        for index in holders.into_iter().filter(right_size) {
            if self.ledger.is_damaged(index, &key) {
                continue;
            }
            let region = &self.regions[index];
            let read = async {
                let bytes = region.get(&key).await?;
                if self.key.hash(&bytes) != info.files_idx.hash {
                    return Err(region.damaged(&key, WRONG_HASH));
                }
                FileIndex::decode_packs(bytes)
                    .map_err(|error| region.damaged(&key, error.to_string()))
            };
            match read.await {
                Ok(packs) => {
                    self.ledger.verified(index, &key, info.files_idx.size);
                    return Ok(Some(packs));
                }
                Err(error) if error.kind == FailureKind::Damaged || index != target => {
                    self.source_failed(index, &key, &error);
                }
                Err(error) if error.kind == FailureKind::NotFound => self.ledger.unsettle(),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Everything that must be there before `backup.json`.
    fn objects_of(
        &self,
        target: usize,
        info: &BackupInfo,
        packs: &[PackEntry],
        lists: &Listings,
    ) -> Vec<Stored> {
        let label = &info.label;
        let mut objects: Vec<Stored> = packs
            .iter()
            .map(|pack| Stored {
                key: pack_key(&pack.label, pack.number),
                kind: ObjectKind::Pack,
                size: pack.stored_size,
                hash: Some(pack.hash),
            })
            .collect();
        let include = info.include.iter().map(|found| (include_key(label), &found.object));
        let known =
            [(files_idx_key(label), &info.files_idx), (manifest_key(label), &info.backup_manifest)];
        objects.extend(known.into_iter().chain(include).map(|(key, stored)| Stored {
            key,
            kind: ObjectKind::BackupIndex,
            size: stored.size,
            hash: Some(stored.hash),
        }));
        objects.extend(self.extras_of(target, label, &objects, lists));
        objects
    }

    /// Files in the folder that neither `backup.json` nor `files.idx` names.
    fn extras_of(
        &self,
        target: usize,
        label: &BackupLabel,
        named: &[Stored],
        lists: &Listings,
    ) -> Vec<Stored> {
        let folder = format!("{}/", backup_folder(label));
        let pack_prefix = format!("{folder}pack-");
        let commit = backup_json_key(label);
        let mut extras: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        for list in lists {
            let inside =
                list.range(folder.clone()..).take_while(|(key, _)| key.starts_with(&folder));
            for (key, size) in inside.filter(|(key, _)| {
                !key.starts_with(&pack_prefix)
                    && **key != commit
                    && !named.iter().any(|object| object.key == **key)
            }) {
                extras.entry(key.clone()).or_default().insert(*size);
            }
        }
        let mut objects = Vec::new();
        for (key, sizes) in extras {
            match sizes.first() {
                Some(size) if sizes.len() == 1 => {
                    objects.push(Stored {
                        key,
                        kind: ObjectKind::BackupExtra,
                        size: *size,
                        hash: None,
                    });
                }
                _ => self.ledger.lacking(
                    target,
                    format!("{key}: regions differ on its length, and nothing says which is right"),
                ),
            }
        }
        objects
    }

    async fn repair_backup(
        &self,
        target: usize,
        known: Known,
        lists: &Listings,
        done: &mut BTreeSet<String>,
        deep: bool,
    ) -> Result<(), StoreError> {
        let Known { info, json, objects } = known;
        let key = backup_json_key(&info.label);
        let committed = lists[target].contains_key(&key) && !self.ledger.is_damaged(target, &key);
        let met = self.ledger.diverged_from(info.timeline).is_some_and(|from| info.stop_lsn > from);
        if met && !committed {
            let what = "it lies behind the point where two histories met";
            self.ledger.lacking(target, format!("{}: {what}", info.label));
            return Ok(());
        }
        let fresh: Vec<&Stored> =
            objects.iter().filter(|object| !done.contains(&object.key)).collect();
        self.check_stored(target, &fresh, lists, deep).await?;
        let needed: Vec<&Stored> =
            objects.iter().filter(|object| !self.holds(target, object, lists, done)).collect();
        let lost: Vec<&&Stored> =
            needed.iter().filter(|object| self.holders(target, object, lists).is_empty()).collect();
        for object in &lost {
            self.ledger.outcome(target, &object.key, DamageOutcome::Lost);
            self.ledger.lost(format!("{}: no region has it whole", object.key));
        }
        if !committed && !lost.is_empty() {
            // What can never be a backup there is not copied.
            return Ok(());
        }
        let copied = self.copy_all(target, &needed, lists, done).await?;
        if committed {
            return Ok(());
        }
        let waits = match copied {
            false => Some("not all of its objects could be copied"),
            true if self.ledger.lacks_wal(target, info.timeline, info.start_lsn, info.stop_lsn) => {
                Some("not all of its WAL could be copied")
            }
            true if !self.options.dry_run && !self.is_complete(target, &objects).await? => {
                Some("the region does not list all that was written")
            }
            true => None,
        };
        match waits {
            Some(why) => {
                self.ledger.lacking(target, format!("{key}: {why}"));
                Ok(())
            }
            None => self.write(target, ObjectKind::Backup, &key, json).await,
        }
    }

    /// Whether the target has a good copy, as far as is known.
    fn holds(
        &self,
        target: usize,
        object: &Stored,
        lists: &Listings,
        done: &BTreeSet<String>,
    ) -> bool {
        done.contains(&object.key)
            || (lists[target].get(&object.key) == Some(&object.size)
                && !self.ledger.is_damaged(target, &object.key))
    }

    /// The sources whose copy has the right size.
    fn holders(&self, target: usize, object: &Stored, lists: &Listings) -> Vec<usize> {
        self.sources(target)
            .filter(|source| lists[*source].get(&object.key) == Some(&object.size))
            .filter(|source| !self.ledger.is_damaged(*source, &object.key))
            .collect()
    }

    /// Finds damaged objects in the target: by their size, or by reading them.
    async fn check_stored(
        &self,
        target: usize,
        objects: &[&Stored],
        lists: &Listings,
        deep: bool,
    ) -> Result<(), StoreError> {
        let mut to_read = Vec::new();
        for object in objects {
            let Some(size) = lists[target].get(&object.key) else { continue };
            if *size != object.size {
                let problem = format!("it is {size} bytes long instead of {}", object.size);
                self.ledger.damage(target, &object.key, &problem);
            } else if deep && object.hash.is_some() {
                to_read.push(*object);
            }
        }
        to_read.retain(|object| {
            !self.ledger.is_verified(target, &object.key)
                && !self.ledger.is_damaged(target, &object.key)
        });
        self.progress.add_total(to_read.iter().map(|object| object.size).sum());
        let mut reads = stream::iter(to_read)
            .map(|object| async move { (object, self.verify(&self.regions[target], object).await) })
            .buffer_unordered(CHECKS_AT_ONCE);
        while let Some((object, read)) = reads.next().await {
            match read {
                Ok(()) => self.ledger.verified(target, &object.key, object.size),
                Err(error) if error.kind == FailureKind::Damaged => {
                    self.ledger.damage(target, &object.key, &error.message);
                }
                Err(error) if error.kind == FailureKind::NotFound => self.ledger.unsettle(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copies what is needed; whether all of it could be had.
    async fn copy_all(
        &self,
        target: usize,
        needed: &[&Stored],
        lists: &Listings,
        done: &mut BTreeSet<String>,
    ) -> Result<bool, StoreError> {
        self.progress.add_total(needed.iter().map(|object| object.size).sum());
        let mut copies = stream::iter(needed)
            .map(|object| async move { (*object, self.copy_one(target, object, lists).await) })
            .buffer_unordered(COPIES_AT_ONCE);
        let mut all = true;
        while let Some((object, copied)) = copies.next().await {
            if copied? {
                done.insert(object.key.clone());
            } else {
                all = false;
                let what = format!("{}: no source could give it", object.key);
                self.ledger.lacking(target, what);
            }
        }
        Ok(all)
    }

    async fn copy_one(
        &self,
        target: usize,
        object: &Stored,
        lists: &Listings,
    ) -> Result<bool, StoreError> {
        for source in self.holders(target, object, lists) {
            if self.options.dry_run {
                self.ledger.copied(target, object.kind, object.size);
                return Ok(true);
            }
            match self.copy_stored(source, target, object).await {
                Ok(()) => return Ok(true),
                Err(error) if error.region == self.regions[target].name() => return Err(error),
                Err(error) => self.source_failed(source, &object.key, &error),
            }
        }
        Ok(false)
    }

    /// Copies one object; it appears under its name only if its hash was right.
    async fn copy_stored(
        &self,
        source: usize,
        target: usize,
        object: &Stored,
    ) -> Result<(), StoreError> {
        let Stored { key, kind, size, .. } = object;
        let from = &self.regions[source];
        if *size <= PART_SIZE as u64 {
            let bytes = read_part(from, key, 0, *size).await?;
            if object.hash.is_some_and(|hash| self.key.hash(&bytes) != hash) {
                return Err(from.damaged(key, WRONG_HASH));
            }
            return self.write(target, *kind, key, bytes).await;
        }
        let mut upload = self.regions[target].upload(key).await?;
        let mut hasher = self.key.hasher();
        let mut at = 0;
        while at < *size {
            let part = match read_part(from, key, at, *size).await {
                Ok(part) => part,
                Err(error) => {
                    upload.abort().await;
                    return Err(error);
                }
            };
            at += part.len() as u64;
            hasher.update(&part);
            self.progress.add(part.len() as u64);
            if let Err(error) = upload.write(part).await {
                upload.abort().await;
                return Err(error);
            }
        }
        if object.hash.is_some_and(|hash| hasher.finish() != hash) {
            upload.abort().await;
            return Err(from.damaged(key, WRONG_HASH));
        }
        upload.finish().await?;
        self.ledger.outcome(target, key, DamageOutcome::Replaced);
        self.ledger.copied(target, *kind, *size);
        Ok(())
    }

    /// Reads an object through and compares its hash.
    async fn verify(&self, region: &Region, object: &Stored) -> Result<(), StoreError> {
        let mut hasher = self.key.hasher();
        let mut at = 0;
        while at < object.size {
            let part = read_part(region, &object.key, at, object.size).await?;
            at += part.len() as u64;
            hasher.update(&part);
            self.progress.add(part.len() as u64);
        }
        match object.hash {
            Some(hash) if hasher.finish() != hash => Err(region.damaged(&object.key, WRONG_HASH)),
            _ => Ok(()),
        }
    }

    /// Looks again, before `backup.json` says so, whether all is there.
    async fn is_complete(&self, target: usize, objects: &[Stored]) -> Result<bool, StoreError> {
        let region = &self.regions[target];
        let folders: BTreeSet<&str> =
            objects.iter().filter_map(|object| Some(object.key.rsplit_once('/')?.0)).collect();
        let mut sizes = BTreeMap::new();
        for folder in folders {
            let listed = region.list(folder).await?;
            sizes.extend(listed.into_iter().map(|object| (object.key, object.size)));
        }
        Ok(objects.iter().all(|object| sizes.get(&object.key) == Some(&object.size)))
    }
}

/// Reads the next part of an object that is `size` bytes long.
async fn read_part(region: &Region, key: &str, at: u64, size: u64) -> Result<Bytes, StoreError> {
    let to = size.min(at + PART_SIZE as u64);
    if at >= to {
        return Ok(Bytes::new());
    }
    region.get_range(key, at..to).await
}
