//! Taking a backup, from the first question to the commit point.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::mpsc;

use super::clear::{Clearing, clear_own};
use super::fanout::Fanout;
use super::lease::BackupLease;
use super::packer::Packer;
use super::packs::{Compressing, compress, write_packs};
use super::tar::{TarEvent, TarReader};
use super::wal::{OwnArchiver, wait_for_wal};
use super::{BackupError, BackupOutcome, Progress};
use crate::archive::ArchiveSettings;
use crate::config::OnChecksumFailure;
use crate::pg::{BackupEvent, BackupOptions, BackupStream, Connector, PgError};
use crate::repo::{
    BackupInfo, BackupLabel, BackupType, ContentHasher, ContentKey, FORMAT_VERSION, FileIndex,
    FileKind, PackEntry, StoredObject, Tablespace, backup_json_key, files_idx_key, manifest_key,
};
use crate::store::{Region, Regions, StoreError};
use crate::wal::{Lsn, SegmentSize};

/// Checksum failures that are noted by name; the server itself stops at five a file.
const MAX_FAILURES: usize = 1000;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// How the server is reached.
    pub connector: Connector,
    /// How WAL is archived when no sidecar does.
    pub archive: ArchiveSettings,
    /// An archiver runs in this process already.
    pub has_archiver: bool,
    /// How it is to relate to older ones.
    pub kind: BackupType,
    /// What to do when the server finds pages with wrong checksums.
    pub on_checksum_failure: OnChecksumFailure,
    /// zstd's level.
    pub compression_level: i32,
    /// Kilobytes a second at most.
    pub max_rate: Option<u32>,
    /// Wait for the next scheduled checkpoint.
    pub spread_checkpoint: bool,
    /// How long the WAL may take to be in the regions.
    pub wal_timeout: Duration,
}

/// What the stream gave.
struct Received {
    packer: Packer,
    packs: Vec<PackEntry>,
    fanout: Fanout,
    manifest: StoredObject,
    stop_lsn: Lsn,
    checksum_failures: Vec<String>,
}

/// What is being received.
enum Part {
    Nothing,
    Archive(TarReader, String),
    Manifest,
}

/// Takes a full backup into all regions.
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
    let lineage = regions.within(&request.archive.cluster).within(&identity.system_id.to_string());
    let lineage: Vec<Region> = lineage.iter().cloned().collect();
    let key = ContentKey::for_system(identity.system_id);
    let start_time = sql.clock().await?;
    let label = BackupLabel::new(start_time, BackupType::Full, rand::random());
    let lease = BackupLease::begin(&lineage, &label, None, start_time).await;
    let clearing = Clearing::begin(&lineage, start_time);
    let options = BackupOptions {
        label: format!("pgkeep {label}"),
        max_rate: request.max_rate,
        spread_checkpoint: request.spread_checkpoint,
    };
    let stream = connection.base_backup(&options).await?;
    let sizes = stream.tablespaces().iter().filter_map(|tablespace| tablespace.size);
    progress.set_total(sizes.sum());
    let (start_lsn, timeline) = (stream.start(), stream.timeline());
    let tablespaces = stream.tablespaces().iter().filter_map(|tablespace| {
        Some(Tablespace { oid: tablespace.oid?, location: tablespace.location.clone()? })
    });
    let tablespaces = tablespaces.collect();
    tracing::info!(%label, %start_lsn, "base backup begins");
    let level = request.compression_level;
    let received = receive(stream, &lineage, &label, &key, level, progress).await?;
    let received = refuse_damage(received, request.on_checksum_failure, &lineage, &label).await?;
    let stop_time = sql.clock().await?;
    let times = (start_time, stop_time);
    let (info, stored) = store_index(received, &key, |parts| {
        let sums = Sums::of(&parts.index);
        BackupInfo {
            format: FORMAT_VERSION,
            label: label.clone(),
            kind: BackupType::Full,
            parent: None,
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
            packs: parts.index.packs.len() as u32,
            files_idx: parts.files_idx,
            backup_manifest: parts.manifest,
        }
    })
    .await?;
    let deadline = tokio::time::Instant::now() + request.wal_timeout;
    let published = publish(&info, &lineage, stored, &lease, deadline).await;
    lease.end().await;
    clearing.end().await;
    if let Some(archiver) = own_archiver {
        // What is published is published.
        if let Err(error) = archiver.stop().await {
            tracing::warn!("the archiver of this backup ended with: {error}");
        }
    }
    finish(info, published, &lineage, began)
}

/// What `backup.json` is made of.
struct Parts {
    index: FileIndex,
    files_idx: StoredObject,
    manifest: StoredObject,
    stop_lsn: Lsn,
    new_size: u64,
    checksum_failures: Vec<String>,
}

struct Sums {
    files: u64,
    bytes: u64,
    stored: u64,
}

impl Sums {
    fn of(index: &FileIndex) -> Sums {
        let sizes = index.files.iter().filter_map(|file| match &file.kind {
            FileKind::File { size, .. } => Some(*size),
            FileKind::Directory => None,
        });
        Sums {
            files: sizes.clone().count() as u64,
            bytes: sizes.sum(),
            stored: index.packs.iter().map(|pack| pack.stored_size).sum(),
        }
    }
}

/// Reads the whole stream.
async fn receive(
    mut stream: BackupStream,
    regions: &[Region],
    label: &BackupLabel,
    key: &ContentKey,
    level: i32,
    progress: &Progress,
) -> Result<Received, BackupError> {
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let (sender, frames) = mpsc::channel::<Compressing>(2 * cores);
    let fanout = Fanout::new(regions);
    let writer = tokio::spawn(write_packs(frames, fanout, label.clone(), key.clone()));
    let mut sender = Some(sender);
    let mut writer = Some(writer);
    let mut packer = Packer::default();
    let mut packed = None;
    let mut part = Part::Nothing;
    let mut manifest: (u64, ContentHasher) = (0, key.hasher());
    let mut checksum_failures = Vec::new();
    loop {
        let event = stream.next().await?;
        match event {
            BackupEvent::Archive(tablespace) => {
                end_archive(&part)?;
                let prefix = tablespace.map(|oid| format!("pg_tblspc/{oid}"));
                part = Part::Archive(TarReader::default(), prefix.unwrap_or_default());
            }
            BackupEvent::Data(bytes) => match &mut part {
                Part::Archive(tar, prefix) => {
                    progress.add(bytes.len() as u64);
                    let ready = pack(bytes, tar, prefix, &mut packer)?;
                    if !hand_over(ready, sender.as_ref(), key, level).await {
                        break;
                    }
                }
                Part::Manifest => {
                    manifest.0 += bytes.len() as u64;
                    manifest.1.update(&bytes);
                    if let Some((_, fanout)) = &mut packed {
                        Fanout::write(fanout, &bytes).await;
                    }
                }
                Part::Nothing => return Err(PgError::Protocol("data of nothing".into()).into()),
            },
            BackupEvent::Manifest => {
                end_archive(&part)?;
                part = Part::Manifest;
                hand_over(packer.end_frame().into_iter().collect(), sender.as_ref(), key, level)
                    .await;
                drop(sender.take());
                let Some(writer) = writer.take() else { break };
                let mut done = writer.await.map_err(std::io::Error::other)??;
                done.1.begin(&manifest_key(label)).await;
                packed = Some(done);
            }
            BackupEvent::Warning(warning) => {
                tracing::warn!("server: {warning}");
                let about_checksums = warning.message.contains("checksum");
                if about_checksums && checksum_failures.len() < MAX_FAILURES {
                    checksum_failures.push(warning.message);
                }
            }
            BackupEvent::End { stop, checksum_error } => {
                if let Some(error) = checksum_error
                    && checksum_failures.is_empty()
                {
                    checksum_failures.push(error.message);
                }
                let Some((packs, mut fanout)) = packed else { break };
                fanout.end().await;
                let manifest = StoredObject { size: manifest.0, hash: manifest.1.finish() };
                let stop_lsn = stop;
                return Ok(Received {
                    packer,
                    packs,
                    fanout,
                    manifest,
                    stop_lsn,
                    checksum_failures,
                });
            }
        }
    }
    // Only the writer can have ended this, and it says why.
    drop(sender);
    match writer {
        Some(writer) => match writer.await.map_err(std::io::Error::other)? {
            Err(error) => Err(error),
            Ok(_) => Err(PgError::Protocol("the backup ended early".into()).into()),
        },
        None => Err(PgError::Protocol("the backup has no manifest".into()).into()),
    }
}

/// Gives up a backup of damaged pages if the policy says so, and removes what was stored of it.
async fn refuse_damage(
    received: Received,
    policy: OnChecksumFailure,
    regions: &[Region],
    label: &BackupLabel,
) -> Result<Received, BackupError> {
    if received.checksum_failures.is_empty() || policy == OnChecksumFailure::Keep {
        return Ok(received);
    }
    // Nothing must be written any more when it is removed.
    received.fanout.finish().await;
    clear_own(regions, label).await;
    Err(BackupError::Checksums(received.checksum_failures))
}

fn end_archive(part: &Part) -> Result<(), BackupError> {
    match part {
        Part::Archive(tar, _) => Ok(tar.finish()?),
        _ => Ok(()),
    }
}

/// Takes a chunk of an archive; gives the frames that became full.
fn pack(
    mut bytes: Bytes,
    tar: &mut TarReader,
    prefix: &str,
    packer: &mut Packer,
) -> Result<Vec<Bytes>, BackupError> {
    let mut frames = Vec::new();
    while let Some(event) = tar.next(&mut bytes)? {
        match event {
            TarEvent::Entry(entry) => frames.extend(packer.begin(&entry, prefix)),
            TarEvent::Data(data) => packer.data(&data, &mut frames),
        }
    }
    Ok(frames)
}

/// Gives frames to the compression pool; `false` when nobody takes the results any more.
async fn hand_over(
    frames: Vec<Bytes>,
    sender: Option<&mpsc::Sender<Compressing>>,
    key: &ContentKey,
    level: i32,
) -> bool {
    let Some(sender) = sender else { return false };
    for frame in frames {
        if sender.send(compress(frame, key, level)).await.is_err() {
            return false;
        }
    }
    true
}

/// Stores `files.idx`; says which regions have everything but the commit point.
async fn store_index(
    received: Received,
    key: &ContentKey,
    make: impl FnOnce(Parts) -> BackupInfo,
) -> Result<(BackupInfo, Vec<Result<(), StoreError>>), BackupError> {
    let Received { packer, packs, mut fanout, manifest, stop_lsn, checksum_failures } = received;
    let new_size = packer.bytes();
    let mut index = packer.index(packs);
    let (index, bytes) = tokio::task::spawn_blocking(move || {
        let bytes = index.encode()?;
        Ok::<_, std::io::Error>((index, bytes))
    })
    .await
    .map_err(std::io::Error::other)??;
    let files_idx = StoredObject { size: bytes.len() as u64, hash: key.hash(&bytes) };
    let parts = Parts { index, files_idx, manifest, stop_lsn, new_size, checksum_failures };
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
    lease: &BackupLease,
    deadline: tokio::time::Instant,
) -> Vec<Result<(), StoreError>> {
    let bytes = serde_json::to_vec_pretty(info).map(Bytes::from).unwrap_or_default();
    let key = backup_json_key(&info.label);
    let publications = regions.iter().zip(stored).map(|(region, stored)| {
        let (bytes, key) = (bytes.clone(), key.clone());
        async move {
            stored?;
            wait_for_wal(region, info, deadline).await?;
            lease.check(region)?;
            region.put(&key, bytes).await.map(|_| ())
        }
    });
    join_all(publications).await
}

fn finish(
    info: BackupInfo,
    published: Vec<Result<(), StoreError>>,
    regions: &[Region],
    began: Instant,
) -> Result<BackupOutcome, BackupError> {
    let mut names = Vec::new();
    let mut failures = Vec::new();
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
