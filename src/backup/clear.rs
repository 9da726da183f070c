//! Removes what a dead backup left: a folder `backup/<label>/` without `backup.json` whose writer
//! does not live any more. Called by the next backup, beside its own work.
//!
//! A folder goes only if all of this holds: no region has its `backup.json` (else it is a backup
//! that `repair` may be filling in); it is older than a lease lives, and no lease in force, in any
//! region, names it; and no `files.idx` of a backup that counts names its packs. Leases are read
//! after the folders are listed, and `backup.json` is looked for after that: a writer writes its
//! lease before its first pack, and removes it after `backup.json`, so one of the two is always seen.
//! If any region does not answer, nothing is removed this time.
//!
//! Objects go in the reverse order of writing, packs last. A crash in the middle leaves a smaller
//! leftover, for the next backup.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::{join_all, try_join_all};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::task::JoinHandle;

use crate::repo::{
    BACKUP_FOLDER, BackupLabel, BackupType, FileIndex, LEASE_FOLDER, Lease, backup_folder,
    backup_json_key, files_idx_key, is_abandoned,
};
use crate::store::{FailureKind, Patience, Region, StoreError};

/// `backup.json` objects that are looked for at once, in each region.
const LOOKS_AT_ONCE: usize = 8;
/// How long the end of a backup waits for the clearing that began with it.
const END_WAIT: Duration = Duration::from_secs(60);

/// A clearing under way. Dropped, it goes on in the background.
pub(super) struct Clearing(JoinHandle<()>);

impl Clearing {
    /// Begins to clear `regions`, at the lineage's folder. `now` is the server's time, by which
    /// labels and leases are made.
    pub(super) fn begin(regions: &[Region], now: DateTime<Utc>) -> Clearing {
        let patient = |region: &Region| region.with_patience(Patience::LOOKUP);
        let regions: Vec<Region> = regions.iter().map(patient).collect();
        Clearing(tokio::spawn(async move {
            if let Err(error) = clear(&regions, now).await {
                tracing::debug!("what dead backups left stays for now: {error}");
            }
        }))
    }

    /// Waits for it, a bounded time.
    pub(super) async fn end(self) {
        let _ = tokio::time::timeout(END_WAIT, self.0).await;
    }
}

/// Removes what this process wrote of a backup that it gives up.
pub(super) async fn clear_own(regions: &[Region], label: &BackupLabel) {
    let clearings = regions.iter().map(|region| async {
        if let Err(error) = clear_folder(region, label).await {
            tracing::warn!("what was stored of backup {label} stays for now: {error}");
        }
    });
    join_all(clearings).await;
}

async fn clear(regions: &[Region], now: DateTime<Utc>) -> Result<(), StoreError> {
    let folders = try_join_all(regions.iter().map(folders)).await?;
    let (mut leases, mut forgotten) = (Vec::new(), Vec::new());
    for found in try_join_all(regions.iter().map(leases_of)).await? {
        let (old, current): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(_, lease)| lease.is_forgotten(now));
        forgotten.push(old.into_iter().map(|(key, _)| key).collect::<Vec<_>>());
        leases.extend(current.into_iter().map(|(_, lease)| lease));
    }
    let labels: BTreeSet<&BackupLabel> = folders.iter().flatten().collect();
    let silent: BTreeSet<&BackupLabel> =
        labels.iter().copied().filter(|label| is_abandoned(label, &leases, now)).collect();
    // Of the others too: a backup that was just taken may need packs of an old folder.
    let committed = try_join_all(regions.iter().map(|region| committed(region, &labels))).await?;
    let backups: BTreeSet<&BackupLabel> = committed.iter().flatten().collect();
    let dead = |label: &&BackupLabel| silent.contains(label) && !backups.contains(label);
    let clearings = regions.iter().zip(&folders).zip(&committed).zip(&forgotten).map(
        |(((region, folders), committed), forgotten)| async move {
            let dead: BTreeSet<&BackupLabel> = folders.iter().filter(dead).collect();
            let outcome = clear_region(region, dead, committed).await;
            for error in outcome.err().into_iter().chain(region.delete_many(forgotten).await) {
                tracing::warn!("clearing what a dead backup left: {error}");
            }
        },
    );
    join_all(clearings).await;
    Ok(())
}

/// The labels that have a folder.
async fn folders(region: &Region) -> Result<Vec<BackupLabel>, StoreError> {
    let (names, _) = region.list_folder(BACKUP_FOLDER).await?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

/// All leases, with their keys. One that cannot be read protects everything.
async fn leases_of(region: &Region) -> Result<Vec<(String, Lease)>, StoreError> {
    let mut leases = Vec::new();
    for object in region.list(LEASE_FOLDER).await? {
        let bytes = match region.get(&object.key).await {
            Ok(bytes) => bytes,
            // It ended meanwhile.
            Err(error) if error.kind == FailureKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let lease = serde_json::from_slice(&bytes)
            .map_err(|error| region.damaged(&object.key, format!("it cannot be read: {error}")))?;
        leases.push((object.key, lease));
    }
    Ok(leases)
}

/// Which of these labels are backups in a region.
async fn committed(
    region: &Region,
    labels: &BTreeSet<&BackupLabel>,
) -> Result<BTreeSet<BackupLabel>, StoreError> {
    let labels: Vec<BackupLabel> = labels.iter().copied().cloned().collect();
    stream::iter(labels)
        .map(|label| async move {
            let size = region.size(&backup_json_key(&label)).await?;
            Ok(size.map(|_| label))
        })
        .buffer_unordered(LOOKS_AT_ONCE)
        .try_filter_map(|label| async { Ok(label) })
        .try_collect()
        .await
}

async fn clear_region(
    region: &Region,
    mut dead: BTreeSet<&BackupLabel>,
    committed: &BTreeSet<BackupLabel>,
) -> Result<(), StoreError> {
    let Some(oldest) = dead.first().map(|label| label.time()) else { return Ok(()) };
    // A full backup refers to nothing but itself, and none to what came after it.
    let referring =
        committed.iter().filter(|label| label.kind() != BackupType::Full && label.time() >= oldest);
    for label in referring {
        let key = files_idx_key(label);
        let packs = FileIndex::decode_packs(region.get(&key).await?)
            .map_err(|error| region.damaged(&key, error.to_string()))?;
        for pack in &packs {
            dead.remove(&pack.label);
        }
    }
    for label in dead {
        clear_folder(region, label).await?;
    }
    Ok(())
}

async fn clear_folder(region: &Region, label: &BackupLabel) -> Result<(), StoreError> {
    let folder = backup_folder(label);
    let commit = backup_json_key(label);
    let objects = region.list(&folder).await?;
    if objects.iter().any(|object| object.key == commit) {
        return Ok(());
    }
    let is_pack = |key: &String| key.starts_with(&format!("{folder}/pack-"));
    let bytes: u64 = objects.iter().map(|object| object.size).sum();
    let keys = objects.into_iter().map(|object| object.key);
    let (packs, others): (Vec<String>, Vec<String>) = keys.partition(is_pack);
    for part in [&others, &packs] {
        if let Some(error) = region.delete_many(part).await.into_iter().next() {
            return Err(error);
        }
    }
    region.remove_emptied_folder(&folder).await;
    tracing::info!(
        region = region.name(),
        "removed what was left of backup {label}, which never became one: {} objects, {bytes} bytes",
        packs.len() + others.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use chrono::TimeDelta;
    use object_store::memory::InMemory;

    use super::*;
    use crate::repo::{FORMAT_VERSION, LEASE_LIFETIME, LeaseKind, lease_key, pack_key};

    fn now() -> DateTime<Utc> {
        "2026-11-23T07:15:00Z".parse().unwrap()
    }

    fn label(minutes_ago: i64) -> BackupLabel {
        BackupLabel::new(now() - TimeDelta::minutes(minutes_ago), BackupType::Full, 1)
    }

    fn region(name: &str) -> Region {
        Region::over(name, &format!("mem://{name}"), Arc::new(InMemory::new()))
    }

    async fn put(region: &Region, key: &str) {
        region.put(key, Bytes::from_static(b"x")).await.unwrap();
    }

    async fn lease(region: &Region, label: &BackupLabel, expires: DateTime<Utc>) {
        let lease = Lease {
            format: FORMAT_VERSION,
            kind: LeaseKind::Backup,
            label: label.clone(),
            parent: None,
            written: expires - LEASE_LIFETIME,
            expires,
        };
        let bytes = serde_json::to_vec(&lease).unwrap();
        region.put(&lease_key(label, 0), Bytes::from(bytes)).await.unwrap();
    }

    async fn keys(region: &Region) -> Vec<String> {
        let mut keys: Vec<_> =
            region.list("").await.unwrap().into_iter().map(|object| object.key).collect();
        keys.sort();
        keys
    }

    #[tokio::test]
    async fn only_what_is_dead_is_removed() {
        let (eu, us) = (region("eu"), region("us"));
        let (dead, young, leased, half, whole) =
            (label(60), label(10), label(61), label(62), label(63));
        for label in [&dead, &young, &leased, &half, &whole] {
            put(&eu, &pack_key(label, 0)).await;
            put(&eu, &files_idx_key(label)).await;
        }
        put(&us, &pack_key(&dead, 0)).await;
        put(&eu, &backup_json_key(&whole)).await;
        // It is a backup elsewhere, and being copied here perhaps.
        put(&us, &backup_json_key(&half)).await;
        // The lease is in the other region only: this one was silent when it was renewed.
        lease(&us, &leased, now() + TimeDelta::minutes(1)).await;
        lease(&us, &dead, now() - TimeDelta::minutes(16)).await;
        let before = keys(&eu).await;
        clear(&[eu.clone(), us.clone()], now()).await.unwrap();
        let gone = |key: &&String| key.starts_with(&backup_folder(&dead));
        let kept: Vec<_> = before.iter().filter(|key| !gone(key)).cloned().collect();
        assert_eq!(keys(&eu).await, kept);
        assert_eq!(keys(&us).await, [backup_json_key(&half), lease_key(&leased, 0)]);
    }

    #[tokio::test]
    async fn a_lease_that_cannot_be_read_protects_everything() {
        let eu = region("eu");
        put(&eu, &pack_key(&label(60), 0)).await;
        put(&eu, "lease/x.json").await;
        assert!(clear(std::slice::from_ref(&eu), now()).await.is_err());
        assert_eq!(keys(&eu).await.len(), 2);
    }

    #[tokio::test]
    async fn packs_that_a_backup_needs_stay() {
        let eu = region("eu");
        let (dead, child) = (label(60), BackupLabel::new(now(), BackupType::Incremental, 2));
        put(&eu, &pack_key(&dead, 0)).await;
        put(&eu, &backup_json_key(&child)).await;
        // Not to be read: nobody knows what it needs.
        put(&eu, &files_idx_key(&child)).await;
        clear(std::slice::from_ref(&eu), now()).await.unwrap();
        assert_eq!(keys(&eu).await.len(), 3);
    }
}
