//! One connection to the server: who it is, where to begin, then timeline after timeline.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::backlog::Backlog;
use super::companions::Companions;
use super::cutter::{Cutter, piece_unit};
use super::memory::Memory;
use super::piece::PieceContext;
use super::pipeline::{Overlap, Pipeline, PipelineParts};
use super::receiver::{ReceiveEnd, Receiver, SENDER_TIMEOUT};
use super::start::{StartPoint, find_start, is_missing, read_overlaps, seeded_scanner};
use super::state::ArchiveState;
use super::timelines::{Histories, KnownTimelines, read_histories};
use super::uploader::{REPAIRS_AT_ONCE, Uploader};
use super::{ArchiveError, ArchiveSettings};
use crate::pg::{
    Connection, Connector, HostSpec, IdentifySystem, PgError, ServerError, Sql, StreamEnd,
    WalMessage, WalStream,
};
use crate::repo::{ContentKey, FORMAT_VERSION, LINEAGE_FILE, Lineage};
use crate::store::{Region, Regions, ask_all};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId, WalFormat};

/// How long the last WAL may take to reach the regions when this process is told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take after the connection broke, before the next attempt.
const BREAK_PATIENCE: Duration = Duration::from_secs(30);
/// How long a piece may be on its way to the slowest region that still counts as working.
const PIECE_PATIENCE: Duration = Duration::from_secs(120);
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
    pub(super) memory: &'a Memory,
    pub(super) cancelled: &'a CancellationToken,
}

/// What is known once the server has identified itself.
pub(super) struct Server {
    pub(super) host: HostSpec,
    pub(super) version: String,
    pub(super) identity: IdentifySystem,
    pub(super) in_recovery: bool,
    /// Where the slot's WAL begins.
    pub(super) restart_lsn: Option<Lsn>,
    pub(super) format: WalFormat,
    pub(super) key: ContentKey,
    pub(super) lineage: Lineage,
    /// The regions, at the lineage's folder.
    pub(super) regions: Vec<Region>,
    /// Whether any region holds the lineage.
    established: bool,
    pub(super) history: TimelineHistory,
    /// All history files that it has and the archive may have.
    histories: Histories,
}

/// What is streamed, and how far.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    pub(super) point: StartPoint,
    /// The slot; none on a server that only helps out.
    pub(super) slot: Option<String>,
    /// Enough once this is reached.
    pub(super) until: Option<Lsn>,
}

pub(super) enum TimelineEnd {
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
        let _companions = Companions::start(self, &server);
        loop {
            let point = self.start_point(&mut connection, &mut server).await?;
            let slot = Some(self.settings.slot.clone());
            let stretch = Stretch { point, slot, until: None };
            let end = self.stream(connection, &server, &stretch).await;
            self.state.end(None);
            let end = match end {
                Err(error) => return Err(self.meet(error, &server, &stretch).await),
                Ok(end) => end,
            };
            match end {
                TimelineEnd::Cancelled => return Ok(SessionEnd::Cancelled),
                TimelineEnd::Closed | TimelineEnd::Next(_, None) => {
                    return Ok(SessionEnd::ServerClosed);
                }
                TimelineEnd::Next(timeline, Some(next)) => {
                    tracing::info!(%timeline, "the server goes on with another timeline");
                    connection = next;
                    server.identity = connection.identify_system().await?;
                    self.learn_timelines(&mut connection, &mut server).await?;
                }
            }
        }
    }

    /// What an error of the stream calls for, before the next attempt.
    async fn meet(&self, error: ArchiveError, server: &Server, stretch: &Stretch) -> ArchiveError {
        let code = match &error {
            ArchiveError::Server(server) => server.code(),
            _ => None,
        };
        // undefined_file inside a stream: the segment has been removed.
        if code != Some("58P01") {
            return error;
        }
        let point = &stretch.point;
        if point.lsn < point.frontier.round_down(piece_unit(&server.format)) {
            self.memory.cannot_step_back(point.timeline, point.frontier);
            return ArchiveError::NoOverlap(point.frontier);
        }
        match self.meet_removed(server, stretch, &error.to_string()).await {
            Ok(()) => error,
            Err(worse) => worse,
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
        let restart_lsn = self.prepare_slot(&mut connection, &sql).await?;
        let mut server = Server {
            host: connection.host().clone(),
            version: connection.server_version().to_owned(),
            history: TimelineHistory::without_ancestors(identity.timeline),
            histories: Vec::new(),
            identity,
            in_recovery,
            restart_lsn,
            format,
            key: ContentKey::for_system(system_id),
            lineage,
            regions,
            established,
        };
        self.learn_timelines(&mut connection, &mut server).await?;
        Ok((connection, server))
    }

    /// Makes the slot if it is not there, or has lost its WAL; where its WAL begins.
    async fn prepare_slot(
        &self,
        connection: &mut Connection,
        sql: &Sql,
    ) -> Result<Option<Lsn>, ArchiveError> {
        let name = &self.settings.slot;
        connection.create_slot(name).await?;
        let mut slot = sql.slot(name).await?;
        if slot.as_ref().is_some_and(|slot| slot.wal_status.as_deref() == Some("lost")) {
            tracing::error!("the slot has lost WAL (max_slot_wal_keep_size): making it anew");
            connection.drop_slot(name).await?;
            connection.create_slot(name).await?;
            slot = sql.slot(name).await?;
        }
        Ok(slot.and_then(|slot| slot.restart_lsn))
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
        let own = &system_id.to_string();
        let regions: Vec<Region> = self.cluster.iter().cloned().collect();
        let lookups = ask_all(&regions, |region| async move {
            let (mut folders, _) = region.list_folder("").await?;
            // Only lineages: their folders are named by numbers.
            folders.retain(|name| name != own && name.bytes().all(|byte| byte.is_ascii_digit()));
            match region.within(own).get(LINEAGE_FILE).await {
                Ok(_) => Ok((folders, true)),
                Err(error) if is_missing(&error) => Ok((folders, false)),
                Err(error) => Err(error),
            }
        });
        let mut failures = Vec::new();
        let mut foreign = None;
        let mut established = false;
        for (region, lookup) in regions.iter().zip(lookups.await) {
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

    /// Reads the server's histories and checks them against the archive's. The uploaders store
    /// them before anything else.
    async fn learn_timelines(
        &self,
        connection: &mut Connection,
        server: &mut Server,
    ) -> Result<(), ArchiveError> {
        let (history, files) = read_histories(connection, server.identity.timeline).await?;
        let known = KnownTimelines::read(&server.regions).await;
        let takes_writes = !server.in_recovery && !self.settings.accept_timeline;
        server.histories = known.check(&history, files, &server.key, takes_writes)?;
        server.history = history;
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
            Some(point) => {
                let point = self.memory.skip(point);
                // At a fork the timeline's WAL begins.
                let begins = server.history.begin_of(point.timeline).unwrap_or(Lsn::INVALID);
                let stepped = self.memory.step_back(point.clone(), unit);
                Ok(if stepped.lsn >= begins.round_down(unit) { stepped } else { point })
            }
            // One that is silent may hold the archive.
            None if !lookup.unread.is_empty() => Err(ArchiveError::NoRegion(lookup.unread)),
            None => {
                let begin = server.restart_lsn.unwrap_or(server.identity.flushed);
                let lsn = begin.round_down(unit);
                Ok(StartPoint { timeline: server.identity.timeline, lsn, frontier: lsn })
            }
        }
    }

    pub(super) async fn stream(
        &self,
        connection: Connection,
        server: &Server,
        stretch: &Stretch,
    ) -> Result<TimelineEnd, ArchiveError> {
        let (point, format) = (&stretch.point, &server.format);
        let (regions, key) = (&server.regions, &server.key);
        let overlaps = read_overlaps(regions, point, format, key).await;
        let scanner = seeded_scanner(regions, point.timeline, format, key, point.lsn).await;
        let slot = stretch.slot.as_deref();
        let started = connection.start_replication(slot, point.lsn, point.timeline).await;
        let mut stream = match started {
            Ok(Ok(stream)) => stream,
            Ok(Err(next)) => return Ok(TimelineEnd::Next(next.timeline, None)),
            Err((error, _)) => return Err(error.into()),
        };
        let host = stream.connection().host().to_string();
        tracing::info!(
            server = host, timeline = %point.timeline, lsn = %point.lsn, slot, "streaming WAL"
        );
        self.state.reset_frontiers();
        self.state.begin(host, server.version.clone(), server.identity.system_id, point.timeline);
        let cutter = Cutter::new(server.format, server.key.clone(), point.lsn, scanner);
        let again = CancellationToken::new();
        let pipeline = self.start_pipeline(server, point, cutter, overlaps, &again);
        let receiver = Receiver {
            stream: &mut stream,
            feed: &pipeline.feed,
            state: self.state,
            durable: self.state.durable(),
            compared: &pipeline.compared,
            slot_begin: server.restart_lsn.unwrap_or(Lsn::INVALID),
            until: stretch.until,
            again: &again,
            cancelled: self.cancelled,
        };
        let received = receiver.run().await;
        self.end_stream(received, stream, pipeline).await
    }

    fn start_pipeline(
        &self,
        server: &Server,
        point: &StartPoint,
        cutter: Cutter,
        overlaps: Vec<Option<Overlap>>,
        again: &CancellationToken,
    ) -> Pipeline {
        let context = PieceContext {
            format: server.format,
            timeline: point.timeline,
            key: server.key.clone(),
            level: self.settings.compression_level,
        };
        let backlog = Arc::new(Backlog::new(server.regions.len(), self.settings.memory_limit));
        let cancelled = CancellationToken::new();
        let repairs = Arc::new(Semaphore::new(REPAIRS_AT_ONCE));
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
            is_established: server.established,
            may_begin: !server.established
                || self.settings.new_regions.iter().any(|name| name == region.name()),
            ancestors: ancestors.clone(),
            histories: server.histories.clone(),
            stream_start,
            is_compared: overlaps.get(index).is_some_and(Option::is_some),
            repairs: repairs.clone(),
            again: again.clone(),
            cancelled: cancelled.clone(),
        });
        let uploaders = uploaders.collect();
        Pipeline::start(PipelineParts {
            cutter,
            overlaps: overlaps.into_iter().flatten().collect(),
            flush_interval: self.settings.flush_interval,
            durable: self.state.durable(),
            backlog,
            context,
            memory: self.memory.clone(),
            state: self.state.clone(),
            uploaders,
            cancelled,
        })
    }

    /// Lets what was received reach the regions, and says goodbye to the server.
    async fn end_stream(
        &self,
        received: Result<ReceiveEnd, PgError>,
        stream: WalStream,
        pipeline: Pipeline,
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
            Ok(ReceiveEnd::Reached) => {
                pipeline.finish(BREAK_PATIENCE, PATIENCE_FOR_OTHERS).await?;
                Ok(TimelineEnd::Closed)
            }
            Ok(ReceiveEnd::Stalled) => {
                tracing::warn!(
                    "no region takes WAL: the connection is made anew, so that the server may shut down meanwhile"
                );
                drop(stream);
                // What is on its way may be slow and yet arrive.
                pipeline.finish(PIECE_PATIENCE, Duration::ZERO).await?;
                Ok(TimelineEnd::Closed)
            }
            Ok(ReceiveEnd::Pipeline | ReceiveEnd::Again) => {
                pipeline.finish(BREAK_PATIENCE, Duration::ZERO).await?;
                Ok(TimelineEnd::Closed)
            }
            Err(error) => {
                pipeline.finish(BREAK_PATIENCE, PATIENCE_FOR_OTHERS).await?;
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
}
