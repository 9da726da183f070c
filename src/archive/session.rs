//! One connection to the server: who it is, where to begin, then timeline after timeline.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::backlog::Backlog;
use super::cutter::{Cutter, piece_unit};
use super::piece::PieceContext;
use super::pipeline::{Overlap, Pipeline};
use super::receiver::{ReceiveEnd, Receiver, SENDER_TIMEOUT};
use super::start::{StartPoint, find_start, is_missing, read_archived, seeded_scanner};
use super::state::ArchiveState;
use super::uploader::Uploader;
use super::{ArchiveError, ArchiveSettings};
use crate::pg::{
    Connection, Connector, IdentifySystem, PgError, ServerError, Sql, StreamEnd, WalMessage,
    WalStream,
};
use crate::repo::{ContentKey, FORMAT_VERSION, Gap, LINEAGE_FILE, Lineage, gap_key};
use crate::store::{FailureKind, Region, Regions};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId, WalFormat};

/// How long the last WAL may take to reach the regions when this process is told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take after the connection broke, before the next attempt.
const BREAK_PATIENCE: Duration = Duration::from_secs(30);
/// How long the other regions are waited for once one has everything.
const PATIENCE_FOR_OTHERS: Duration = Duration::from_secs(5);

/// How a session ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionEnd {
    /// The server closed it: look the primary up again.
    ServerClosed,
    /// This process was told to stop.
    Cancelled,
}

pub(super) struct Session<'a> {
    pub(super) settings: &'a ArchiveSettings,
    pub(super) connector: &'a Connector,
    /// The regions, at the cluster's folder.
    pub(super) cluster: &'a Regions,
    pub(super) state: &'a ArchiveState,
    pub(super) cancelled: &'a CancellationToken,
}

/// What is known once the server has identified itself.
struct Server {
    host: String,
    version: String,
    identity: IdentifySystem,
    in_recovery: bool,
    /// Where the slot's WAL begins.
    restart_lsn: Option<Lsn>,
    format: WalFormat,
    key: ContentKey,
    lineage: Lineage,
    /// The regions, at the lineage's folder.
    regions: Vec<Region>,
    /// Whether any region holds the lineage.
    established: bool,
    history: TimelineHistory,
    /// All history files that it has.
    histories: Vec<(TimelineId, Bytes)>,
}

enum TimelineEnd {
    Next(TimelineId, Option<Connection>),
    Closed,
    Cancelled,
}

impl Session<'_> {
    /// Runs until the connection ends.
    ///
    /// # Errors
    /// Whatever ended it.
    pub(super) async fn run(&self) -> Result<SessionEnd, ArchiveError> {
        let (mut connection, mut server) = self.connect().await?;
        loop {
            let point = self.start_point(&mut connection, &mut server).await?;
            let end = self.stream(connection, &server, &point).await;
            self.state.end(None);
            match end? {
                TimelineEnd::Cancelled => return Ok(SessionEnd::Cancelled),
                TimelineEnd::Closed | TimelineEnd::Next(_, None) => {
                    return Ok(SessionEnd::ServerClosed);
                }
                TimelineEnd::Next(timeline, Some(next)) => {
                    tracing::info!(%timeline, "the server goes on with another timeline");
                    connection = next;
                    server.identity = connection.identify_system().await?;
                    self.read_histories(&mut connection, &mut server).await?;
                }
            }
        }
    }

    async fn connect(&self) -> Result<(Connection, Server), ArchiveError> {
        let settings = [("wal_sender_timeout", SENDER_TIMEOUT)];
        let mut connection = self.connector.connect(&settings).await?;
        let identity = connection.identify_system().await?;
        let segment_size = SegmentSize::from_setting(&connection.show("wal_segment_size").await?)
            .map_err(|error| PgError::Protocol(error.to_string()))?;
        let (major, system_id) = (connection.major(), identity.system_id);
        let format = WalFormat { major, segment_size, system_id };
        if format.page_magic().is_none() {
            return Err(ArchiveError::UnknownVersion(connection.server_version().to_owned()));
        }
        let sql = self.connector.sql(connection.host()).await?;
        let in_recovery = sql.value("SELECT pg_is_in_recovery()").await?.as_deref() == Some("t");
        if in_recovery && !self.settings.allow_standby {
            return Err(ArchiveError::Standby(connection.host().to_string()));
        }
        self.check_slot_is_free(&sql).await?;
        let established = self.check_lineage(system_id).await?;
        let lineage = Lineage {
            format: FORMAT_VERSION,
            cluster: self.settings.cluster.clone(),
            system_identifier: system_id.to_string(),
            postgres_major: major,
            wal_segment_size: segment_size,
        };
        let regions = self.cluster.within(&system_id.to_string()).iter().cloned().collect();
        connection.create_slot(&self.settings.slot).await?;
        let mut slot = sql.slot(&self.settings.slot).await?;
        if slot.as_ref().is_some_and(|slot| slot.wal_status.as_deref() == Some("lost")) {
            tracing::error!("the slot has lost WAL (max_slot_wal_keep_size): making it anew");
            connection.drop_slot(&self.settings.slot).await?;
            connection.create_slot(&self.settings.slot).await?;
            slot = sql.slot(&self.settings.slot).await?;
        }
        let mut server = Server {
            host: connection.host().to_string(),
            version: connection.server_version().to_owned(),
            history: TimelineHistory::without_ancestors(identity.timeline),
            histories: Vec::new(),
            identity,
            in_recovery,
            restart_lsn: slot.and_then(|slot| slot.restart_lsn),
            format,
            key: ContentKey::for_system(system_id),
            lineage,
            regions,
            established,
        };
        self.read_histories(&mut connection, &mut server).await?;
        Ok((connection, server))
    }

    /// A hot spare asks the server only, and no region.
    async fn check_slot_is_free(&self, sql: &Sql) -> Result<(), ArchiveError> {
        let Some(slot) = sql.slot(&self.settings.slot).await? else { return Ok(()) };
        let Some(pid) = slot.active_pid else { return Ok(()) };
        let holder = slot.holder.unwrap_or_default();
        Err(ArchiveError::Server(PgError::Server(ServerError {
            severity: "ERROR".into(),
            code: "55006".into(),
            message: format!(
                "the replication slot {} is held by {holder} (process {pid})",
                self.settings.slot
            ),
            detail: String::new(),
            hint: String::new(),
        })))
    }

    /// Whether any region holds this lineage. A name under which only other lineages live is
    /// somebody else's (invariant I8).
    async fn check_lineage(&self, system_id: u64) -> Result<bool, ArchiveError> {
        let own = system_id.to_string();
        let lookups = self.cluster.iter().map(|region| async {
            let (mut folders, _) = region.list_folder("").await?;
            // Only lineages: their folders are named by numbers.
            folders.retain(|name| *name != own && name.bytes().all(|byte| byte.is_ascii_digit()));
            match region.within(&own).get(LINEAGE_FILE).await {
                Ok(_) => Ok((folders, true)),
                Err(error) if is_missing(&error) => Ok((folders, false)),
                Err(error) => Err(error),
            }
        });
        let mut failures = Vec::new();
        let mut foreign = None;
        let mut established = false;
        for (region, lookup) in self.cluster.iter().zip(join_all(lookups).await) {
            match lookup {
                Ok((_, true)) => established = true,
                Ok((folders, false)) if !folders.is_empty() => {
                    foreign = Some((region.name().to_owned(), folders.join(", ")));
                }
                Ok(_) => {}
                Err(error) => failures.push(error),
            }
        }
        // An archive may not be begun, nor a region filled, while one that is silent may hold it.
        if !failures.is_empty() && !established {
            return Err(ArchiveError::NoRegion(failures));
        }
        match foreign {
            Some((region, found)) if !established && !self.settings.new_lineage => {
                let cluster = self.settings.cluster.clone();
                Err(ArchiveError::Foreign { cluster, region, found, server: system_id })
            }
            _ => Ok(established),
        }
    }

    /// Reads every history file that the server has, from timeline 2 on: not only its own ancestry,
    /// because a recovery looks for the newest timeline number by number. The uploaders store them
    /// before anything else.
    async fn read_histories(
        &self,
        connection: &mut Connection,
        server: &mut Server,
    ) -> Result<(), ArchiveError> {
        let current = server.identity.timeline;
        server.history = TimelineHistory::without_ancestors(current);
        server.histories.clear();
        for number in 2..=current.0 {
            let timeline = TimelineId(number);
            let Some(content) = connection.timeline_history(timeline).await? else { continue };
            if timeline == current {
                server.history = TimelineHistory::parse(timeline, &content)
                    .map_err(|error| PgError::Protocol(error.to_string()))?;
            }
            server.histories.push((timeline, content));
        }
        Ok(())
    }

    async fn start_point(
        &self,
        connection: &mut Connection,
        server: &mut Server,
    ) -> Result<StartPoint, ArchiveError> {
        let lookup = find_start(&server.regions, &server.history, &server.format).await?;
        // Asked again: while the regions were, another archiver may have gone on.
        server.identity.flushed = connection.identify_system().await?.flushed;
        let unit = piece_unit(&server.format);
        let on_timeline = |point: &StartPoint| point.timeline == server.identity.timeline;
        match lookup.point {
            Some(point)
                if on_timeline(&point)
                    && !server.in_recovery
                    && server.identity.flushed < point.lsn =>
            {
                Err(ArchiveError::Diverged {
                    timeline: point.timeline,
                    problem: format!(
                        "the archive reaches {}, the server only {}",
                        point.frontier, server.identity.flushed
                    ),
                })
            }
            Some(point) => Ok(point),
            // One that is silent may hold the archive.
            None if !lookup.unread.is_empty() => Err(ArchiveError::NoRegion(lookup.unread)),
            None => {
                let begin = server.restart_lsn.unwrap_or(server.identity.flushed);
                let lsn = begin.round_down(unit);
                Ok(StartPoint { timeline: server.identity.timeline, lsn, frontier: lsn })
            }
        }
    }

    async fn stream(
        &self,
        connection: Connection,
        server: &Server,
        point: &StartPoint,
    ) -> Result<TimelineEnd, ArchiveError> {
        let context = PieceContext {
            format: server.format,
            timeline: point.timeline,
            key: server.key.clone(),
            level: self.settings.compression_level,
        };
        let wal = read_archived(
            &server.regions,
            point.timeline,
            &server.format,
            &server.key,
            point.lsn,
            point.frontier,
        )
        .await;
        let wal = match wal {
            Ok(wal) => wal,
            // The server sends it again, and the next larger piece replaces it.
            Err(error) if error.kind == FailureKind::Damaged => {
                tracing::error!("{error}");
                Vec::new()
            }
            Err(error) => return Err(error.into()),
        };
        let scanner =
            seeded_scanner(&server.regions, point.timeline, &server.format, &server.key, point.lsn)
                .await;
        let slot = &self.settings.slot;
        let started = connection.start_replication(slot, point.lsn, point.timeline).await;
        let mut stream = match started {
            Ok(Ok(stream)) => stream,
            Ok(Err(next)) => return Ok(TimelineEnd::Next(next.timeline, None)),
            Err((error, _)) => return Err(error.into()),
        };
        tracing::info!(
            server = server.host, timeline = %point.timeline, lsn = %point.lsn, slot, "streaming WAL"
        );
        self.state.reset_frontiers();
        let (host, version) = (server.host.clone(), server.version.clone());
        self.state.begin(host, version, server.identity.system_id, point.timeline);
        let cutter = Cutter::new(server.format, point.lsn, scanner);
        let overlap = Overlap { start: point.lsn, wal };
        let pipeline = self.start_pipeline(server, context, cutter, overlap);
        let receiver = Receiver {
            stream: &mut stream,
            feed: &pipeline.feed,
            state: self.state,
            durable: self.state.durable(),
            compared: &pipeline.compared,
            cancelled: self.cancelled,
        };
        let received = receiver.run().await;
        self.end_stream(received, stream, pipeline, server, point).await
    }

    fn start_pipeline(
        &self,
        server: &Server,
        context: PieceContext,
        cutter: Cutter,
        overlap: Overlap,
    ) -> Pipeline {
        let backlog = Arc::new(Backlog::new(server.regions.len(), self.settings.memory_limit));
        let cancelled = CancellationToken::new();
        let before = server.history.ancestors.iter();
        let before = before.take_while(|entry| entry.timeline < context.timeline);
        let ancestors: Vec<_> = before.map(|entry| (entry.timeline, entry.end)).collect();
        let stream_start = cutter.position();
        let uploaders = server.regions.iter().enumerate().map(|(index, region)| Uploader {
            index,
            region: region.clone(),
            others: server.regions.iter().filter(|o| o.name() != region.name()).cloned().collect(),
            backlog: backlog.clone(),
            state: self.state.clone(),
            context: context.clone(),
            lineage: server.lineage.clone(),
            may_begin: !server.established
                || self.settings.new_regions.iter().any(|name| name == region.name()),
            ancestors: ancestors.clone(),
            histories: server.histories.clone(),
            stream_start,
            cancelled: cancelled.clone(),
        });
        let uploaders = uploaders.collect();
        let durable = self.state.durable();
        let interval = self.settings.flush_interval;
        Pipeline::start(cutter, overlap, interval, durable, &backlog, context, uploaders, cancelled)
    }

    /// Lets what was received reach the regions, and says goodbye to the server.
    async fn end_stream(
        &self,
        received: Result<ReceiveEnd, PgError>,
        stream: WalStream,
        pipeline: Pipeline,
        server: &Server,
        point: &StartPoint,
    ) -> Result<TimelineEnd, ArchiveError> {
        match received {
            Ok(ReceiveEnd::Cancelled) => {
                pipeline.finish(STOP_PATIENCE, PATIENCE_FOR_OTHERS).await?;
                let _ = tokio::time::timeout(PATIENCE_FOR_OTHERS, self.say_goodbye(stream)).await;
                Ok(TimelineEnd::Cancelled)
            }
            Ok(ReceiveEnd::Server) => {
                let finished = tokio::time::timeout(BREAK_PATIENCE, stream.finish()).await;
                pipeline.finish(BREAK_PATIENCE, PATIENCE_FOR_OTHERS).await?;
                match finished.map_err(|_| PgError::Timeout("ending the stream"))?? {
                    (StreamEnd::NextTimeline(next), connection) => {
                        Ok(TimelineEnd::Next(next.timeline, connection))
                    }
                    (StreamEnd::Closed, _) => Ok(TimelineEnd::Closed),
                }
            }
            Ok(ReceiveEnd::Pipeline) => {
                pipeline.finish(BREAK_PATIENCE, Duration::ZERO).await?;
                Ok(TimelineEnd::Closed)
            }
            Err(error) => {
                let from = stream.position();
                pipeline.finish(BREAK_PATIENCE, PATIENCE_FOR_OTHERS).await?;
                // undefined_file inside a stream: the segment has been removed.
                if error.code() == Some("58P01") {
                    self.record_gap(server, point, from, &error.to_string()).await?;
                }
                Err(error.into())
            }
        }
    }

    /// Acknowledges the last WAL, and hears the server's clock once more: if nothing was written
    /// since, the archive is whole up to that moment.
    async fn say_goodbye(&self, mut stream: WalStream) -> Result<(), PgError> {
        let durable = (*self.state.durable().borrow()).min(stream.position());
        stream.send_status(durable, durable, true).await?;
        if let WalMessage::Keepalive { wal_end, clock, .. } = stream.next().await? {
            self.state.heard(wal_end, durable, clock);
        }
        stream.finish().await.map(drop)
    }

    /// The server has removed WAL that the archive lacks (invariant I7). Recorded only when every
    /// region could be asked: one that is silent may have it.
    async fn record_gap(
        &self,
        server: &Server,
        point: &StartPoint,
        from: Lsn,
        reason: &str,
    ) -> Result<(), ArchiveError> {
        let timeline = point.timeline;
        let lookup = find_start(&server.regions, &server.history, &server.format).await?;
        let unit = piece_unit(&server.format);
        let to = server.restart_lsn.unwrap_or(server.identity.flushed).round_down(unit);
        if !lookup.unread.is_empty() || to <= from || timeline != server.identity.timeline {
            return Err(ArchiveError::Removed { timeline, from });
        }
        let from = lookup.point.map_or(from, |point| point.frontier);
        let noticed = chrono::Utc::now();
        let reason = reason.to_owned();
        let gap = Gap { format: FORMAT_VERSION, timeline, from, to, noticed, reason };
        let bytes = serde_json::to_vec_pretty(&gap).map_err(std::io::Error::from)?;
        let key = gap_key(timeline, from, to);
        tracing::error!(%timeline, %from, %to, "GAP: this WAL is lost for the archive; no restore can cross it. Take a base backup now");
        let writes = server.regions.iter().map(|region| region.put(&key, bytes.clone().into()));
        let failures: Vec<_> = join_all(writes).await.into_iter().filter_map(Result::err).collect();
        if failures.len() == server.regions.len() {
            return Err(ArchiveError::NoRegion(failures));
        }
        for failure in failures {
            tracing::warn!("the gap is not recorded everywhere: {failure}");
        }
        Ok(())
    }
}
