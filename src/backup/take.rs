//! Taking a backup, from the first question to the commit point.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;

use super::base::{Base, choose_base, open_stream};
use super::include::capture;
use super::packer::Sums;
use super::receive::{Received, Reception};
use super::wal::{OwnArchiver, wait_for_wal};
use super::{BackupError, BackupOutcome, BackupType, Progress};
use crate::archive::ArchiveSettings;
use crate::pg::{BackupOptions, Connector, PgError};
use crate::repo::{
    BackupInfo, BackupLabel, ContentKey, FORMAT_VERSION, StoredObject, Tablespace, backup_json_key,
    files_idx_key,
};
use crate::store::{Region, Regions, StoreError};
use crate::wal::{Lsn, SegmentSize};

/// What is to be done.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// What kind of backup. Without one to build on, a full one is taken.
    pub kind: BackupType,
    /// How the server is reached.
    pub connector: Connector,
    /// How WAL is archived when no sidecar does.
    pub archive: ArchiveSettings,
    /// An archiver runs in this process already.
    pub has_archiver: bool,
    /// zstd's level.
    pub compression_level: i32,
    /// Kilobytes a second at most.
    pub max_rate: Option<u32>,
    /// Wait for the next scheduled checkpoint.
    pub spread_checkpoint: bool,
    /// How long the WAL may take to be in the regions.
    pub wal_timeout: Duration,
    /// Files and folders of this machine that are captured beside the backup.
    pub include: Vec<PathBuf>,
}

/// Takes a backup into all regions.
///
/// # Errors
/// When it reaches no region. Regions that failed while others did not are in the outcome.
pub async fn take_backup(
    request: &BackupRequest,
    regions: &Regions,
    progress: &Arc<Progress>,
) -> Result<BackupOutcome, BackupError> {
    let began = Instant::now();
    let mut connection = request.connector.connect(&[]).await?;
    let identity = connection.identify_system().await?;
    let segment_size = SegmentSize::from_setting(&connection.show("wal_segment_size").await?)
        .map_err(|error| PgError::Protocol(error.to_string()))?;
    let major = connection.major();
    let sql = request.connector.sql(connection.host()).await?;
    let facts = sql.server_facts().await?;
    let slot = sql.slot(&request.archive.slot).await?;
    let is_archived = request.has_archiver || slot.is_some_and(|slot| slot.active_pid.is_some());
    let own_archiver = match is_archived {
        true => None,
        false => {
            let settings = request.archive.clone();
            Some(OwnArchiver::start(settings, request.connector.clone(), regions).await?)
        }
    };
    let key = ContentKey::for_system(identity.system_id);
    let cluster = regions.within(&request.archive.cluster);
    let base = choose_base(request.kind, &cluster, &identity, &key, major).await?;
    let Base { kind, parent, regions: lineage, failures } = base;
    let start_time = sql.clock().await?;
    let label = BackupLabel::new(start_time, kind, rand::random());
    let level = request.compression_level;
    let captured = capture(&request.include, &lineage, &label, &key, level).await?;
    let options = BackupOptions {
        label: format!("pgkeep {label}"),
        max_rate: request.max_rate,
        spread_checkpoint: request.spread_checkpoint,
        incremental: false,
    };
    let (stream, parent) = open_stream(&request.connector, connection, options, parent).await?;
    let parent_label = parent.as_ref().map(|(parent, _)| parent.info.label.clone());
    let changes_from = parent.as_ref().map(|(_, changes_from)| *changes_from);
    let sizes = stream.tablespaces().iter().filter_map(|tablespace| tablespace.size);
    progress.set_total(sizes.sum());
    let (start_lsn, timeline) = (stream.start(), stream.timeline());
    let tablespaces = stream.tablespaces().iter().filter_map(|tablespace| {
        Some(Tablespace { oid: tablespace.oid?, location: tablespace.location.clone()? })
    });
    let tablespaces = tablespaces.collect();
    tracing::info!(%label, %start_lsn, parent = ?parent_label, "base backup begins");
    let reception =
        Reception { regions: &lineage, label: &label, key: &key, level, parent, progress };
    let received = reception.run(stream).await?;
    let stop_time = sql.clock().await?;
    let times = (start_time, stop_time);
    let (info, stored) = store_index(received, &key, |parts| {
        let sums = parts.sums;
        BackupInfo {
            format: FORMAT_VERSION,
            label: label.clone(),
            kind,
            parent: parent_label,
            changes_from,
            pgkeep_version: env!("CARGO_PKG_VERSION").to_owned(),
            server_version: facts.version.clone(),
            postgres_major: major,
            system_identifier: identity.system_id.to_string(),
            timeline,
            wal_segment_size: segment_size,
            start_lsn,
            stop_lsn: parts.stop_lsn,
            start_time: times.0,
            stop_time: times.1,
            data_checksums: facts.data_checksums,
            checksum_failures: parts.checksum_failures,
            tablespaces,
            files: sums.files,
            size: sums.bytes,
            new_size: parts.new_size,
            stored_size: sums.stored,
            packs: sums.packs,
            files_idx: parts.files_idx,
            backup_manifest: parts.manifest,
            include: captured.included.clone(),
            include_failures: captured.failures.clone(),
        }
    })
    .await?;
    let stored = captured.and(stored);
    let deadline = tokio::time::Instant::now() + request.wal_timeout;
    let published = publish(&info, &lineage, stored, deadline).await;
    if let Some(archiver) = own_archiver {
        // What is published is published.
        if let Err(error) = archiver.stop().await {
            tracing::warn!("the archiver of this backup ended with: {error}");
        }
    }
    finish(info, published, &lineage, failures, began)
}

/// What `backup.json` is made of.
struct Parts {
    sums: Sums,
    files_idx: StoredObject,
    manifest: StoredObject,
    stop_lsn: Lsn,
    new_size: u64,
    checksum_failures: Vec<String>,
}

/// Stores `files.idx`; says which regions have everything but the commit point.
async fn store_index(
    received: Received,
    key: &ContentKey,
    make: impl FnOnce(Parts) -> BackupInfo,
) -> Result<(BackupInfo, Vec<Result<(), StoreError>>), BackupError> {
    let Received { packer, packs, mut fanout, older_packs, manifest, stop_lsn, checksum_failures } =
        received;
    let new_size = packer.new_bytes();
    let index = tokio::task::spawn_blocking(move || packer.index(packs, older_packs));
    let (bytes, sums) = index.await.map_err(std::io::Error::other)??;
    let files_idx = StoredObject { size: bytes.len() as u64, hash: key.hash(&bytes) };
    let parts = Parts { sums, files_idx, manifest, stop_lsn, new_size, checksum_failures };
    let info = make(parts);
    fanout.begin(&files_idx_key(&info.label)).await;
    fanout.write(&bytes).await;
    fanout.end().await;
    Ok((info, fanout.finish().await))
}

/// Writes `backup.json` into every region that has everything else.
async fn publish(
    info: &BackupInfo,
    regions: &[Region],
    stored: Vec<Result<(), StoreError>>,
    deadline: tokio::time::Instant,
) -> Vec<Result<(), StoreError>> {
    let bytes = serde_json::to_vec_pretty(info).map(Bytes::from).unwrap_or_default();
    let key = backup_json_key(&info.label);
    let publications = regions.iter().zip(stored).map(|(region, stored)| {
        let (bytes, key) = (bytes.clone(), key.clone());
        async move {
            stored?;
            wait_for_wal(region, info, deadline).await?;
            region.put(&key, bytes).await.map(|_| ())
        }
    });
    join_all(publications).await
}

fn finish(
    info: BackupInfo,
    published: Vec<Result<(), StoreError>>,
    regions: &[Region],
    mut failures: Vec<StoreError>,
    began: Instant,
) -> Result<BackupOutcome, BackupError> {
    let mut names = Vec::new();
    for (region, outcome) in regions.iter().zip(published) {
        match outcome {
            Ok(()) => names.push(region.name().to_owned()),
            Err(error) => failures.push(error),
        }
    }
    if names.is_empty() {
        return Err(BackupError::NoRegion(failures));
    }
    Ok(BackupOutcome { info, regions: names, failures, elapsed: began.elapsed() })
}
