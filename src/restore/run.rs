//! The restore itself: the plan is made, now the directory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};

use super::RestoreError;
use super::clear::{Belongings, clear, remove_control};
use super::directory::{
    TablespaceMap, check_place, free_bytes, give, held_bytes, link_tablespaces, make_private,
    owner_for, place_tablespaces, sync_file_system,
};
use super::fetch::Fetch;
use super::manifest::Manifest;
use super::occupant::{Occupant, PG_CONTROL, lock, occupant, write_plan};
use super::plan::{PLAN_FILE, Plan};
use super::settings::{recovery_settings, shell_word, write_recovery};
use super::target::TargetAction;
use crate::backup::Progress;
use crate::repo::{
    BackupInfo, ContentKey, FileIndex, PieceName, StoredObject, files_idx_key, manifest_key,
};
use crate::store::{Catalog, Damage, ReadError, Region, Regions, read_piece};

/// How often WAL that is checked is looked for again under another name.
const CHECK_ATTEMPTS: usize = 20;
/// Files that belong to the server that was backed up, not to a copy of it.
const LEFT_OUT: [&str; 4] =
    ["tablespace_map", "standby.signal", "recovery.signal", "pgkeep-restore.json"];

/// How a restore is to be done.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The data directory to make.
    pub pgdata: PathBuf,
    /// It may be a data directory of the same cluster: only what differs is rewritten.
    pub delta: bool,
    /// Tablespaces that go elsewhere.
    pub tablespaces: Vec<TablespaceMap>,
    /// Ranged reads at once.
    pub jobs: usize,
    /// What PostgreSQL does at the target.
    pub action: TargetAction,
    /// This program, for `restore_command`.
    pub program: PathBuf,
    /// The configuration, for `restore_command`.
    pub config: PathBuf,
    /// Leave `archive_mode` as the origin had it.
    pub keep_archive_mode: bool,
    /// Read and verify all WAL that recovery will ask for, before anything could start.
    pub check_wal: bool,
}

/// What a restore did.
#[derive(Debug)]
pub struct Restored {
    /// Bytes of the data directory.
    pub bytes: u64,
    /// Bytes of it that were on disk already.
    pub kept: u64,
    /// Stored bytes that were read.
    pub fetched: u64,
    /// Files, links and folders that did not belong there.
    pub removed: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Bad copies that were met, and passed over.
    pub damage: Vec<Damage>,
}

/// Brings the plan's backup to disk and sets up recovery.
///
/// # Errors
/// When the directory may not be used, a range cannot be had from any region, or the disk fails.
/// What was written until then cannot start, and the same restore again ends what was begun.
pub async fn restore(
    catalog: &Catalog,
    plan: &Plan,
    options: &RestoreOptions,
    progress: &Arc<Progress>,
) -> Result<Restored, RestoreError> {
    let began = Instant::now();
    let Some((info, _)) = catalog.backups.get(&plan.backup) else {
        return Err(RestoreError::Usage(format!("there is no backup {}", plan.backup)));
    };
    let places = place_tablespaces(&info.tablespaces, &options.tablespaces)?;
    for (oid, place) in &places {
        check_place(&options.pgdata, *oid, place)?;
    }
    let found = occupant(&options.pgdata, plan, options.delta)?;
    check_space(&options.pgdata, plan, found)?;
    let owner = owner_for(&options.pgdata)?;
    let key = ContentKey::for_system(catalog.lineage.system_id());
    let index = read_index(&catalog.regions, info, &key).await?;
    if found == Occupant::Nothing {
        make_private(&options.pgdata, 0o700)?;
    }
    let _alone = lock(&options.pgdata)?;
    // Another restore may have come first.
    let found = occupant(&options.pgdata, plan, options.delta)?;
    write_plan(&options.pgdata, plan)?;
    progress.set_total(info.size);
    let (folder, regions) = (options.pgdata.clone(), catalog.regions.clone());
    let fetch = Fetch::new(regions, key.clone(), folder, index, options.jobs, progress.clone());
    let fetch = Arc::new(fetch.comparing(found != Occupant::Nothing));
    let (preparing, tablespaces, major) = (fetch.clone(), places.clone(), info.postgres_major);
    let removed = blocking(move || {
        let (folder, index) = (&preparing.folder, &preparing.index);
        let mut removed = 0;
        if found != Occupant::Nothing {
            remove_control(folder)?;
            removed = clear(folder, &Belongings::new(index, most, &tablespaces, major))?;
        }
        link_tablespaces(folder, &tablespaces)?;
        preparing.prepare(most)?;
        Ok(removed)
    })
    .await?;
    let wal = async {
        match options.check_wal {
            true => check_wal(catalog, plan, options.jobs).await,
            false => Ok(()),
        }
    };
    let manifest = async { Ok(read_manifest(&catalog.regions, info, &key).await) };
    let ((), (), manifest) = tokio::try_join!(fetch.run(most), wal, manifest)?;
    finish(&fetch, manifest, &settings(plan, options), &places, owner).await?;
    Ok(Restored {
        bytes: info.size,
        kept: fetch.kept(),
        fetched: fetch.fetched(),
        removed,
        elapsed: began.elapsed(),
        damage: catalog.regions.damage(),
    })
}

/// Whether a file of a backup is restored with the others.
fn most(path: &str) -> bool {
    path != PG_CONTROL && is_restored(path)
}

fn is_restored(path: &str) -> bool {
    !LEFT_OUT.contains(&path)
}

/// Writes what recovery needs, makes everything durable, and only then lets the directory start.
async fn finish(
    fetch: &Arc<Fetch>,
    manifest: Option<Manifest>,
    settings: &str,
    places: &[(u32, PathBuf)],
    owner: Option<(u32, u32)>,
) -> Result<(), RestoreError> {
    let folders: Vec<PathBuf> = std::iter::once(fetch.folder.clone())
        .chain(places.iter().map(|(_, place)| place.clone()))
        .collect();
    fetch.set_modes(most)?;
    write_recovery(&fetch.folder, settings)?;
    let last = |path: &str| path == PG_CONTROL;
    let this = fetch.clone();
    blocking(move || {
        if let Some(manifest) = manifest {
            // The server's own entry of pg_control is right.
            manifest.write(&this.folder, &this.index, is_restored, &[PLAN_FILE])?;
        }
        if let Some(owner) = owner {
            folders.iter().try_for_each(|folder| give(folder, owner))?;
        }
        folders.iter().try_for_each(|folder| sync_file_system(folder))
    })
    .await?;
    fetch.prepare(last)?;
    fetch.run(last).await?;
    fetch.set_modes(last)?;
    let folder = fetch.folder.clone();
    blocking(move || {
        if let Some((user, group)) = owner {
            std::os::unix::fs::chown(folder.join(PG_CONTROL), Some(user), Some(group))?;
        }
        sync_file_system(&folder)
    })
    .await?;
    Ok(())
}

/// Reads and verifies every piece of WAL that recovery will ask for: damage is found now, not after
/// hours of replay.
async fn check_wal(catalog: &Catalog, plan: &Plan, at_once: usize) -> Result<(), RestoreError> {
    let key = ContentKey::for_system(catalog.lineage.system_id());
    let checks: Vec<_> =
        plan.pieces.iter().map(|piece| check_piece(catalog, *piece, key.clone())).collect();
    futures_util::stream::iter(checks).buffer_unordered(at_once).try_collect::<Vec<()>>().await?;
    Ok(())
}

async fn check_piece(
    catalog: &Catalog,
    piece: PieceName,
    key: ContentKey,
) -> Result<(), ReadError> {
    let mut wanted = vec![piece];
    let size = catalog.lineage.wal_segment_size;
    for attempt in 0.. {
        let Some(next) = wanted.last().copied() else { break };
        let read = catalog.regions.read_first(|region| {
            let key = key.clone();
            async move { read_piece(&region, &next, &key).await }
        });
        match (read.await, next.start(size), next.end(size)) {
            (Ok(_), ..) => drop(wanted.pop()),
            // An archiver replaced it by a larger one meanwhile.
            (Err(error), Some(from), Some(to))
                if error.is_not_found() && attempt < CHECK_ATTEMPTS =>
            {
                let (now, _) = catalog.coverage(next.segment.timeline, from, Some(to)).await?;
                if !now.holes(from, to).is_empty() {
                    return Err(error);
                }
                wanted.pop();
                wanted.extend(now.cover(from, to).iter().map(|part| part.piece));
            }
            (Err(error), ..) => return Err(error),
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn check_space(folder: &Path, plan: &Plan, found: Occupant) -> Result<(), RestoreError> {
    let held = match found {
        Occupant::Nothing => 0,
        _ => held_bytes(folder)?,
    };
    let free = free_bytes(folder)?.saturating_add(held);
    // Recovery itself writes WAL: a few segments.
    let needed = plan.data_bytes + 3 * plan.wal_segment_size.bytes();
    if needed > free {
        return Err(RestoreError::Space { path: folder.to_owned(), needed, free });
    }
    Ok(())
}

/// Reads `files.idx`.
async fn read_index(
    regions: &Regions,
    info: &BackupInfo,
    key: &ContentKey,
) -> Result<FileIndex, RestoreError> {
    let bytes = read_whole(regions, &files_idx_key(&info.label), &info.files_idx, key).await?;
    Ok(tokio::task::spawn_blocking(move || FileIndex::decode(bytes))
        .await
        .map_err(io::Error::other)??)
}

/// Reads the server's manifest. A restore does not fail for it.
async fn read_manifest(regions: &Regions, info: &BackupInfo, key: &ContentKey) -> Option<Manifest> {
    let object = manifest_key(&info.label);
    let problem = match read_whole(regions, &object, &info.backup_manifest, key).await {
        Ok(bytes) => match tokio::task::spawn_blocking(move || Manifest::parse(&bytes)).await {
            Ok(Ok(manifest)) => return Some(manifest),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        },
        Err(error) => error.to_string(),
    };
    tracing::warn!("no backup_manifest is written, which pg_verifybackup needs: {problem}");
    None
}

/// Reads an object, checked against the hash in `backup.json`.
async fn read_whole(
    regions: &Regions,
    object: &str,
    expected: &StoredObject,
    key: &ContentKey,
) -> Result<Bytes, ReadError> {
    let read = |region: Region| async move { region.get(object).await };
    let check = |region: Region, bytes: Bytes| async move {
        if bytes.len() as u64 != expected.size || key.hash(&bytes) != expected.hash {
            return Err(region.damaged(object, "it does not have the hash in backup.json"));
        }
        Ok(bytes)
    };
    regions.read_soonest(read, check).await
}

fn settings(plan: &Plan, options: &RestoreOptions) -> String {
    let word = |path: &Path| shell_word(&path.to_string_lossy());
    let command =
        format!("{} --config {} wal-fetch %f %p", word(&options.program), word(&options.config));
    recovery_settings(plan, options.action, &command, options.keep_archive_mode)
}
