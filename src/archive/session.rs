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
use super::receiver::{ReceiveEnd, Receiver};
use super::start::{StartPoint, find_start, read_overlaps, seeded_scanner};
use super::state::ArchiveState;
use super::timelines::Histories;
use super::uploader::{REPAIRS_AT_ONCE, Uploader};
use super::{ArchiveError, ArchiveSettings};
use crate::pg::{
    Connection, Connector, HostSpec, IdentifySystem, PgError, StreamEnd, WalMessage, WalStream,
};
use crate::repo::{ContentKey, Lineage};
use crate::store::{Region, Regions};
use crate::wal::{Lsn, TimelineHistory, TimelineId, WalFormat};

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
    pub(super) established: bool,
    pub(super) history: TimelineHistory,
    /// All history files that it has and the archive may have.
    pub(super) histories: Histories,
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
                // A slot may begin before the fork: that WAL is the older timeline's.
                let timeline = server.history.holding(lsn, server.format.segment_size);
                Ok(StartPoint { timeline, lsn, frontier: lsn })
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
        let overlaps = read_overlaps(regions, point, format, key).await?;
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
            may_begin: self.memory.may_begin(region.name())
                || self.settings.new_regions.iter().any(|name| name == region.name()),
            memory: self.memory.clone(),
            ancestors: ancestors.clone(),
            histories: server.histories.clone(),
            newest_timeline: self.refuses_newer(server).then_some(server.identity.timeline),
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
