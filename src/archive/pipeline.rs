//! The tasks between the socket and the regions, for one timeline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{AcquireError, Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::backlog::Backlog;
use super::cutter::{Cut, Cutter, piece_unit};
use super::memory::Memory;
use super::piece::{self, Assembly, Part, Pending, PieceContext, PieceHash, PieceJob};
use super::state::ArchiveState;
use super::uploader::Uploader;
use crate::repo::Frame;
use crate::wal::Lsn;

/// Batches between socket and cutter: about 1 MiB of WAL each.
const FEED_CAPACITY: usize = 8;

/// Pieces between being cut and being whole.
const ASSEMBLING: usize = 4;

/// With `flush_interval = "0s"`: how long WAL waits for the piece before it to become durable.
const CONTINUOUS_LIMIT: Duration = Duration::from_millis(500);

/// What the receiver hands on.
#[derive(Debug)]
pub(super) enum Feed {
    /// WAL that follows what came before.
    Data(Vec<Bytes>),
    /// Make everything safe now.
    Flush,
}

/// WAL that a region has already, to be compared with what the server sends.
#[derive(Debug)]
pub(super) struct Overlap {
    pub(super) region: String,
    pub(super) start: Lsn,
    pub(super) wal: Vec<u8>,
}

/// The running tasks.
pub(super) struct Pipeline {
    pub(super) feed: mpsc::Sender<Feed>,
    /// Up to here what the server sent was compared with the archive: nothing behind it may be
    /// acknowledged, whatever the regions hold.
    pub(super) compared: Arc<AtomicU64>,
    cutter: JoinHandle<Result<(), ArchiveError>>,
    sequencer: JoinHandle<Result<(), ArchiveError>>,
    uploaders: JoinSet<()>,
    cancelled: CancellationToken,
}

/// What a pipeline is made of.
pub(super) struct PipelineParts {
    pub(super) cutter: Cutter,
    pub(super) overlaps: Vec<Overlap>,
    pub(super) flush_interval: Duration,
    pub(super) durable: watch::Receiver<Lsn>,
    pub(super) backlog: Arc<Backlog>,
    pub(super) context: PieceContext,
    pub(super) memory: Memory,
    pub(super) state: ArchiveState,
    pub(super) uploaders: Vec<Uploader>,
    pub(super) cancelled: CancellationToken,
}

/// A piece under way, and the memory that was reserved for it.
type Assembling = (Assembly, u64);

struct CutterTask {
    cutter: Cutter,
    overlaps: Vec<Overlap>,
    flush_interval: Duration,
    durable: watch::Receiver<Lsn>,
    backlog: Arc<Backlog>,
    context: PieceContext,
    memory: Memory,
    state: ArchiveState,
    assembling: mpsc::Sender<Assembling>,
    /// Jobs that compress or hash at once: as many as there are cores.
    cores: Arc<Semaphore>,
    /// The full frames of the current piece.
    frames: Vec<Pending<Frame>>,
    /// Memory reserved for them.
    frames_reserved: u64,
    /// When the oldest byte that no piece holds arrived.
    oldest: Option<Instant>,
    /// How far pieces were cut; `None` before the first.
    cut: Option<Lsn>,
    /// Up to here what the server sent was compared with the archive.
    compared: Arc<AtomicU64>,
}

impl Pipeline {
    /// Starts all tasks.
    pub(super) fn start(parts: PipelineParts) -> Pipeline {
        let PipelineParts { cutter, overlaps, flush_interval, durable, .. } = parts;
        let PipelineParts { backlog, context, memory, state, uploaders, cancelled, .. } = parts;
        let (feed, feed_receiver) = mpsc::channel(FEED_CAPACITY);
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let (assembling, sequence) = mpsc::channel(ASSEMBLING);
        let compared = Arc::new(AtomicU64::new(0));
        let task = CutterTask {
            cutter,
            overlaps,
            flush_interval,
            durable,
            backlog: backlog.clone(),
            context: context.clone(),
            memory,
            state,
            assembling,
            cores: Arc::new(Semaphore::new(cores)),
            frames: Vec::new(),
            frames_reserved: 0,
            oldest: None,
            cut: None,
            compared: compared.clone(),
        };
        let mut running = JoinSet::new();
        for uploader in uploaders {
            running.spawn(uploader.run());
        }
        Pipeline {
            feed,
            compared,
            cutter: tokio::spawn(task.run(feed_receiver)),
            sequencer: tokio::spawn(in_order(sequence, backlog, context)),
            uploaders: running,
            cancelled,
        }
    }

    /// Lets everything that was received reach the regions, for at most `patience`, then stops
    /// all tasks. A region that failed is waited for only `patience_for_others` after another has
    /// finished.
    ///
    /// # Errors
    /// What the cutter found wrong with the WAL.
    pub(super) async fn finish(
        mut self,
        patience: Duration,
        patience_for_others: Duration,
    ) -> Result<(), ArchiveError> {
        drop(self.feed);
        let stragglers = [self.cutter.abort_handle(), self.sequencer.abort_handle()];
        let mut deadline = Instant::now() + patience;
        let cut = tokio::time::timeout_at(deadline, async {
            let cut = joined(self.cutter.await);
            let ordered = joined(self.sequencer.await);
            cut.and(ordered)
        });
        let outcome = cut.await.unwrap_or(Ok(()));
        // Past their time they hold memory for nobody.
        for task in stragglers {
            task.abort();
        }
        if outcome.is_err() {
            deadline = Instant::now() + patience_for_others;
        }
        while let Ok(Some(_)) = tokio::time::timeout_at(deadline, self.uploaders.join_next()).await
        {
            deadline = deadline.min(Instant::now() + patience_for_others);
        }
        self.cancelled.cancel();
        while self.uploaders.join_next().await.is_some() {}
        outcome
    }
}

fn joined(
    result: Result<Result<(), ArchiveError>, tokio::task::JoinError>,
) -> Result<(), ArchiveError> {
    result.unwrap_or_else(|error| Err(ArchiveError::Io(std::io::Error::other(error))))
}

/// Puts finished pieces into the queue in the order of the WAL.
async fn in_order(
    mut sequence: mpsc::Receiver<Assembling>,
    backlog: Arc<Backlog>,
    context: PieceContext,
) -> Result<(), ArchiveError> {
    while let Some((assembly, reserved)) = sequence.recv().await {
        let piece = assembly.finish(&context).await.map_err(std::io::Error::other)?;
        tracing::debug!(piece = %piece.name, stored = piece.body.len(), "piece is ready");
        backlog.push(piece, reserved);
    }
    backlog.close();
    Ok(())
}

impl CutterTask {
    async fn run(mut self, mut feed: mpsc::Receiver<Feed>) -> Result<(), ArchiveError> {
        let continuous = self.flush_interval.is_zero();
        loop {
            // Continuously: as soon as one piece is durable the next one is cut, and at the latest
            // after a moment: the regions that work must not wait for one that does not.
            let interval = if continuous { CONTINUOUS_LIMIT } else { self.flush_interval };
            let due = self.oldest.map(|oldest| oldest + interval);
            let durable = *self.durable.borrow();
            if continuous
                && self.cutter.has_unflushed()
                && self.cut.is_none_or(|cut| durable >= cut)
            {
                self.flush().await?;
                continue;
            }
            tokio::select! {
                biased;
                // First: a feed that is never empty must not keep it waiting.
                () = sleep_until(due), if due.is_some() => self.flush().await?,
                next = feed.recv() => match next {
                    Some(Feed::Data(batch)) => {
                        for bytes in batch {
                            self.take(&bytes).await?;
                        }
                    }
                    Some(Feed::Flush) => self.flush().await?,
                    None => return self.flush().await,
                },
                changed = self.durable.changed(), if continuous => {
                    if changed.is_err() {
                        return self.flush().await;
                    }
                }
            }
        }
    }

    async fn take(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.compare(bytes)?;
        let mut cuts = Vec::new();
        self.cutter.push(bytes, &mut cuts)?;
        self.compared.store(self.cutter.position().0, Ordering::Release);
        let mut full = false;
        for cut in cuts {
            match cut {
                Cut::Frame(raw) => self.compress(raw).await?,
                Cut::Piece(job) => {
                    full = true;
                    self.dispatch(*job).await?;
                }
            }
        }
        if full || self.oldest.is_none() {
            self.oldest = self.cutter.has_unflushed().then(Instant::now);
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), ArchiveError> {
        if let Some(job) = self.cutter.flush() {
            self.dispatch(job).await?;
        }
        self.oldest = None;
        Ok(())
    }

    async fn dispatch(&mut self, job: PieceJob) -> Result<(), ArchiveError> {
        if !job.summary.damage.is_empty() {
            self.meet_damage(&job)?;
        }
        self.cut = Some(job.end);
        let mut frames = Vec::with_capacity(job.parts.len());
        let mut reserved = 0;
        if job.is_full {
            frames = std::mem::take(&mut self.frames);
            reserved = std::mem::take(&mut self.frames_reserved);
        } else {
            reserved += job.len();
            self.backlog.reserve(reserved).await;
            for part in &job.parts {
                match part {
                    Part::Frame(index) => frames.extend(self.frames.get(*index).cloned()),
                    Part::Raw(raw) => frames.push(self.start_compressing(raw.clone()).await?),
                }
            }
        }
        let hash = match &job.hash {
            PieceHash::Known(hash) => piece::known(*hash),
            PieceHash::Of(raw) => {
                piece::hash(raw.clone(), self.context.key.clone(), self.permit().await?)
            }
        };
        let sent = self.assembling.send((Assembly { job, frames, hash }, reserved)).await;
        sent.map_err(|_| ArchiveError::Io(std::io::Error::other("the queue of pieces ended")))
    }

    /// Compresses a full frame while the piece goes on.
    async fn compress(&mut self, raw: Bytes) -> Result<(), ArchiveError> {
        let length = raw.len() as u64;
        self.backlog.reserve(length).await;
        self.frames_reserved += length;
        let frame = self.start_compressing(raw).await?;
        self.frames.push(frame);
        Ok(())
    }

    async fn start_compressing(&self, raw: Bytes) -> Result<Pending<Frame>, ArchiveError> {
        let level = self.context.level;
        if let Some(frame) = piece::compress_small(&raw, level) {
            return Ok(frame);
        }
        Ok(piece::compress(raw, level, self.permit().await?))
    }

    async fn permit(&self) -> Result<tokio::sync::OwnedSemaphorePermit, ArchiveError> {
        let permit = self.cores.clone().acquire_owned().await;
        permit.map_err(|error: AcquireError| ArchiveError::Io(std::io::Error::other(error)))
    }

    /// Damaged WAL may have been damaged on its way: it is asked for once more. If it comes so
    /// again it is so on the server, and archived as it is, marked in the piece's metadata.
    fn meet_damage(&self, job: &PieceJob) -> Result<(), ArchiveError> {
        let piece = job.start.round_down(piece_unit(&self.context.format));
        let timeline = self.context.timeline;
        let damage = job.summary.damage.join("; ");
        if self.memory.is_new_damage(timeline, piece) {
            return Err(ArchiveError::DamagedWal { timeline, damage });
        }
        if self.state.alarm(format!("WAL from the server is damaged: {damage}")) {
            tracing::error!(%timeline, "WAL from the server is damaged, archived as it is: {damage}");
        }
        Ok(())
    }

    /// Compares with what the archive has; a difference means two histories.
    fn compare(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        let position = self.cutter.position();
        for overlap in &self.overlaps {
            let skip = position.bytes_since(overlap.start) as usize;
            let known = overlap.wal.get(skip..).unwrap_or_default();
            let length = known.len().min(bytes.len());
            if known[..length] != bytes[..length] {
                let same = known.iter().zip(bytes).take_while(|(a, b)| a == b).count();
                return Err(ArchiveError::Diverged {
                    timeline: self.context.timeline,
                    problem: format!(
                        "the first byte that differs from region {} is at {}",
                        overlap.region,
                        position.advance(same as u64)
                    ),
                });
            }
        }
        let end = position.advance(bytes.len() as u64);
        self.overlaps.retain(|overlap| overlap.start.advance(overlap.wal.len() as u64) > end);
        Ok(())
    }
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}
