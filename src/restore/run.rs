//! The restore itself: the plan is made, now the directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};

use super::RestoreError;
use super::directory::{
    TablespaceMap, check_empty, free_bytes, give, link_tablespaces, make_private, owner_for,
    place_tablespaces, sync_file_system,
};
use super::fetch::Fetch;
use super::plan::{PLAN_FILE, Plan};
use super::settings::{recovery_settings, shell_word, write_recovery};
use super::target::TargetAction;
use crate::backup::Progress;
use crate::repo::{BackupInfo, ContentKey, FileIndex, PieceName, files_idx_key};
use crate::store::{Catalog, Damage, ReadError, Regions, read_piece};

/// How often WAL that is checked is looked for again under another name.
const CHECK_ATTEMPTS: usize = 20;
/// The file without which no directory starts.
const PG_CONTROL: &str = "global/pg_control";
/// Files that belong to the server that was backed up, not to a copy of it.
const LEFT_OUT: [&str; 4] =
    ["tablespace_map", "standby.signal", "recovery.signal", "pgkeep-restore.json"];

/// How a restore is to be done.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The data directory to make.
    pub pgdata: PathBuf,
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
    /// How long it took.
    pub elapsed: Duration,
    /// Bad copies that were met, and passed over.
    pub damage: Vec<Damage>,
}

/// Brings the plan's backup to disk and sets up recovery.
///
/// # Errors
/// When the directory may not be used, a range cannot be had from any region, or the disk fails.
/// What was written until then cannot start.
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
    check_empty(&options.pgdata)?;
    for (_, place) in &places {
        check_empty(place)?;
    }
    check_space(&options.pgdata, plan)?;
    let owner = owner_for(&options.pgdata)?;
    let key = ContentKey::for_system(catalog.lineage.system_id());
    let index = read_index(&catalog.regions, info, &key).await?;
    make_private(&options.pgdata, 0o700)?;
    link_tablespaces(&options.pgdata, &places)?;
    progress.set_total(info.size);
    let fetch = Arc::new(Fetch {
        regions: catalog.regions.clone(),
        key,
        folder: options.pgdata.clone(),
        index,
        jobs_at_once: options.jobs,
        progress: progress.clone(),
    });
    let most = |path: &str| path != PG_CONTROL && !LEFT_OUT.contains(&path);
    let preparing = fetch.clone();
    blocking(move || preparing.prepare(most)).await?;
    let wal = async {
        match options.check_wal {
            true => check_wal(catalog, plan, options.jobs).await,
            false => Ok(()),
        }
    };
    tokio::try_join!(fetch.run(most), wal)?;
    fetch.set_modes(most)?;
    write_recovery(&options.pgdata, &settings(plan, options))?;
    let plan_bytes = serde_json::to_vec_pretty(plan).map_err(io::Error::from)?;
    fs::write(options.pgdata.join(PLAN_FILE), plan_bytes)?;
    let folders: Vec<PathBuf> = std::iter::once(options.pgdata.clone())
        .chain(places.iter().map(|(_, p)| p.clone()))
        .collect();
    let (pgdata, all) = (options.pgdata.clone(), folders.clone());
    blocking(move || {
        if let Some(owner) = owner {
            all.iter().try_for_each(|folder| give(folder, owner))?;
        }
        all.iter().try_for_each(|folder| sync_file_system(folder))
    })
    .await?;
    let last = |path: &str| path == PG_CONTROL;
    fetch.prepare(last)?;
    fetch.run(last).await?;
    blocking(move || {
        if let Some((user, group)) = owner {
            std::os::unix::fs::chown(pgdata.join(PG_CONTROL), Some(user), Some(group))?;
        }
        sync_file_system(&pgdata)
    })
    .await?;
    Ok(Restored { bytes: info.size, elapsed: began.elapsed(), damage: catalog.regions.damage() })
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
        let read = catalog.regions.read(|region| {
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

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn check_space(folder: &Path, plan: &Plan) -> Result<(), RestoreError> {
    let free = free_bytes(folder)?;
    // Recovery itself writes WAL: a few segments.
    let needed = plan.data_bytes + 3 * plan.wal_segment_size.bytes();
    if needed > free {
        return Err(RestoreError::Space { path: folder.to_owned(), needed, free });
    }
    Ok(())
}

/// Reads `files.idx`, checked against the hash in `backup.json`.
async fn read_index(
    regions: &Regions,
    info: &BackupInfo,
    key: &ContentKey,
) -> Result<FileIndex, RestoreError> {
    let object = files_idx_key(&info.label);
    let (expected, object) = (&info.files_idx, &object);
    let bytes = regions
        .read(|region| async move {
            let bytes = region.get(object).await?;
            if bytes.len() as u64 != expected.size || key.hash(&bytes) != expected.hash {
                return Err(region.damaged(object, "it does not have the hash in backup.json"));
            }
            Ok(bytes)
        })
        .await?;
    Ok(tokio::task::spawn_blocking(move || FileIndex::decode(bytes))
        .await
        .map_err(io::Error::other)??)
}

fn settings(plan: &Plan, options: &RestoreOptions) -> String {
    let word = |path: &Path| shell_word(&path.to_string_lossy());
    let command =
        format!("{} --config {} wal-fetch %f %p", word(&options.program), word(&options.config));
    recovery_settings(plan, options.action, &command, options.keep_archive_mode)
}
