//! Taking a backup, from the first question to the commit point.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::base::{Base, choose_base, open_stream, require_parent};
use super::clear::{Clearing, clear_own};
use super::include::{Captured, capture};
use super::lease::BackupLease;
use super::publish::{Parts, finish, publish, store_index};
use super::receive::{Received, Reception};
use super::wal::OwnArchiver;
use super::{BackupError, BackupOutcome, BackupType, Progress};
use crate::archive::ArchiveSettings;
use crate::config::OnChecksumFailure;
use crate::pg::{
    BackupOptions, BackupStream, Connection, Connector, IdentifySystem, PgError, ServerFacts, Sql,
};
use crate::repo::{BackupInfo, BackupLabel, ChangesFrom, ContentKey, FORMAT_VERSION, Tablespace};
use crate::store::{Region, Regions};
use crate::wal::{Lsn, SegmentSize, TimelineId};

/// What is to be done.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// How the server is reached.
    pub connector: Connector,
    /// How WAL is archived when no sidecar does.
    pub archive: ArchiveSettings,
    /// An archiver runs in this process already.
    pub has_archiver: bool,
    /// How it is to relate to older ones. Without one to build on, a full one is taken.
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
    /// Files and folders of this machine that are captured beside the backup.
    pub include: Vec<PathBuf>,
}

/// Whose backup it is.
struct Server {
    sql: Sql,
    identity: IdentifySystem,
    segment_size: SegmentSize,
    major: u32,
    facts: ServerFacts,
}

impl Server {
    async fn ask(request: &BackupRequest) -> Result<(Connection, Server), BackupError> {
        let mut connection = request.connector.connect(&[]).await?;
        let identity = connection.identify_system().await?;
        let segment_size = SegmentSize::from_setting(&connection.show("wal_segment_size").await?)
            .map_err(|error| PgError::Protocol(error.to_string()))?;
        let major = connection.major();
        let sql = request.connector.sql(connection.host()).await?;
        let facts = sql.server_facts().await?;
        Ok((connection, Server { sql, identity, segment_size, major, facts }))
    }

    /// Archives from here, unless somebody else does.
    async fn archive(
        &self,
        request: &BackupRequest,
        regions: &Regions,
    ) -> Result<Option<OwnArchiver>, BackupError> {
        let slot = self.sql.slot(&request.archive.slot).await?;
        if request.has_archiver || slot.is_some_and(|slot| slot.active_pid.is_some()) {
            return Ok(None);
        }
        let settings = request.archive.clone();
        Ok(Some(OwnArchiver::start(settings, request.connector.clone(), regions).await?))
    }
}

/// What is known of a backup before its files come.
struct Begun {
    label: BackupLabel,
    kind: BackupType,
    parent: Option<BackupLabel>,
    changes_from: Option<ChangesFrom>,
    start_time: DateTime<Utc>,
    start_lsn: Lsn,
    timeline: TimelineId,
    tablespaces: Vec<Tablespace>,
}

/// Takes a backup into all regions that can hold it.
///
/// # Errors
/// When it reaches no region. Regions that failed while others did not are in the outcome.
pub async fn take_backup(
    request: &BackupRequest,
    regions: &Regions,
    progress: &Arc<Progress>,
) -> Result<BackupOutcome, BackupError> {
    let began = Instant::now();
    let (connection, server) = Server::ask(request).await?;
    let own_archiver = server.archive(request, regions).await?;
    let key = ContentKey::for_system(server.identity.system_id);
    let cluster = regions.within(&request.archive.cluster);
    let base = choose_base(request.kind, &cluster, &server.identity, &key, server.major).await?;
    let Base { kind, parent, regions: lineage, everywhere, failures } = base;
    let start_time = server.sql.clock().await?;
    let label = BackupLabel::new(start_time, kind, rand::random());
    let parent_label = parent.as_ref().map(|parent| parent.info.label.clone());
    let lease = BackupLease::begin(&lineage, &label, parent_label.as_ref(), start_time).await;
    // The lease protects the parent from here on.
    if let Some(parent) = &parent_label {
        require_parent(&lineage, parent).await?;
    }
    let clearing = Clearing::begin(&everywhere, start_time);
    let level = request.compression_level;
    let captured = capture(&request.include, &lineage, &label, &key, level).await?;
    let options = BackupOptions {
        label: format!("pgkeep {label}"),
        max_rate: request.max_rate,
        spread_checkpoint: request.spread_checkpoint,
        incremental: false,
    };
    let (stream, parent) = open_stream(&request.connector, connection, options, parent).await?;
    progress.set_total(stream.tablespaces().iter().filter_map(|space| space.size).sum());
    let begun = Begun {
        label,
        kind,
        changes_from: parent.as_ref().map(|(_, changes_from)| *changes_from),
        parent: parent_label,
        start_time,
        start_lsn: stream.start(),
        timeline: stream.timeline(),
        tablespaces: tablespaces(&stream),
    };
    tracing::info!(label = %begun.label, start_lsn = %begun.start_lsn, parent = ?begun.parent, "base backup begins");
    let label = &begun.label;
    let reception = Reception { regions: &lineage, label, key: &key, level, parent, progress };
    let received = reception.run(stream).await?;
    let received = refuse_damage(received, request.on_checksum_failure, &lineage, label).await?;
    let stop_time = server.sql.clock().await?;
    let (info, stored) =
        store_index(received, &key, |parts| describe(&server, begun, stop_time, parts, &captured))
            .await?;
    let stored = captured.and(stored);
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
    finish(info, published, &lineage, failures, began)
}

fn tablespaces(stream: &BackupStream) -> Vec<Tablespace> {
    let outside = stream.tablespaces().iter().filter_map(|tablespace| {
        Some(Tablespace { oid: tablespace.oid?, location: tablespace.location.clone()? })
    });
    outside.collect()
}

/// `backup.json`.
fn describe(
    server: &Server,
    begun: Begun,
    stop_time: DateTime<Utc>,
    parts: Parts,
    captured: &Captured,
) -> BackupInfo {
    BackupInfo {
        format: FORMAT_VERSION,
        label: begun.label,
        kind: begun.kind,
        parent: begun.parent,
        changes_from: begun.changes_from,
        pgkeep_version: env!("CARGO_PKG_VERSION").to_owned(),
        server_version: server.facts.version.clone(),
        postgres_major: server.major,
        system_identifier: server.identity.system_id.to_string(),
        timeline: begun.timeline,
        wal_segment_size: server.segment_size,
        start_lsn: begun.start_lsn,
        stop_lsn: parts.stop_lsn,
        start_time: begun.start_time,
        stop_time,
        data_checksums: server.facts.data_checksums,
        checksum_failures: parts.checksum_failures,
        tablespaces: begun.tablespaces,
        files: parts.sums.files,
        size: parts.sums.bytes,
        new_size: parts.new_size,
        stored_size: parts.sums.stored,
        packs: parts.sums.packs,
        packs_size: parts.sums.packs_size,
        files_idx: parts.files_idx,
        backup_manifest: parts.manifest,
        include: captured.included.clone(),
        include_failures: captured.failures.clone(),
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
