//! Brings pieces into one region, in order, and keeps its frontier.
//!
//! ```text
//! look_up ──► progress (decides) ──► uploads, copies from other regions, upkeep (tasks)
//! ```
//! A region fails alone: its uploader tries again and again with growing pauses, while the others
//! go on. A crash at any point leaves whole pieces, perhaps with a hole behind the frontier; the
//! next start finds the frontier by listing.

mod look_up;
mod progress;
mod roll_up;
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backlog::Backlog;
use super::memory::Memory;
use super::piece::{Piece, PieceContext};
use super::state::ArchiveState;
use crate::repo::Lineage;
use crate::store::{Copied, Put, Region, StoreError, WalRange, copy_wal};
use crate::wal::{Lsn, TimelineId};

use progress::{Outcome, Progress, Step};
use upkeep::{Finding, Upkeep};

/// The pause after the first failure; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often a hole that could not be filled is tried again.
const HOLE_PAUSE: Duration = Duration::from_secs(15);
/// Regions that are filled from others at once: each takes memory beside the queue.
pub(super) const REPAIRS_AT_ONCE: usize = 2;
/// How much is copied before another region may have its turn, in bytes.
const COPY_AT_ONCE: u64 = 256 << 20;

/// What an uploader works with.
#[derive(Clone)]
pub(super) struct Uploader {
    /// The region's place among the regions.
    pub(super) index: usize,
    pub(super) region: Region,
    /// The other regions, to copy from.
    pub(super) others: Vec<Region>,
    pub(super) backlog: Arc<Backlog>,
    pub(super) state: ArchiveState,
    pub(super) context: PieceContext,
    pub(super) lineage: Lineage,
    /// Whether any region holds the lineage.
    pub(super) is_established: bool,
    /// Whether the region may be filled although it holds no lineage and others do.
    pub(super) may_begin: bool,
    pub(super) memory: Memory,
    /// The timelines before this one and where each ends: the region must have them up to there
    /// before anything on this timeline counts.
    pub(super) ancestors: Vec<(TimelineId, Lsn)>,
    /// All history files: without them nothing on this timeline can be reached.
    pub(super) histories: Vec<(TimelineId, Bytes)>,
    /// The server's timeline, where the region may know of no newer one with WAL.
    pub(super) newest_timeline: Option<TimelineId>,
    /// Where this session's stream began.
    pub(super) stream_start: Lsn,
    /// Whether what the region holds from there on is compared with what the server sends.
    pub(super) is_compared: bool,
    /// [`REPAIRS_AT_ONCE`].
    pub(super) repairs: Arc<Semaphore>,
    /// Ends the session, so that the next one begins where the regions really end.
    pub(super) again: CancellationToken,
    pub(super) cancelled: CancellationToken,
}

/// A task of the uploader that ended.
enum Done {
    Uploaded(u64, Outcome),
    Filled(Lsn, Result<Copied, StoreError>),
    Mended((Lsn, Lsn), Result<Copied, StoreError>),
    Looked(upkeep::Report),
    RolledUp(upkeep::Folder, Result<(), StoreError>),
}

/// What changes while the uploader runs.
struct Running {
    progress: Progress,
    upkeep: Upkeep,
    tasks: JoinSet<Done>,
    mending: bool,
    mend_at: Instant,
    /// WAL of an older timeline that the region lacks and no other could give.
    older_hole: Option<Lsn>,
    /// Up to here the region's WAL lies on older timelines.
    older_end: Lsn,
}

impl Uploader {
    /// Runs until the queue is closed and empty, or everything is cancelled.
    pub(super) async fn run(self) {
        let cancelled = self.cancelled.clone();
        tokio::select! {
            biased;
            () = cancelled.cancelled() => {}
            () = self.work() => {}
        }
    }

    async fn work(self) {
        let mut running = self.begin().await;
        loop {
            let changed = self.backlog.changed();
            tokio::pin!(changed);
            // Registered before looking: a change in between is not missed.
            changed.as_mut().enable();
            if self.start_steps(&mut running) {
                return;
            }
            self.start_upkeep(&mut running);
            self.start_mending(&mut running);
            let wake = running.next_wake();
            tokio::select! {
                biased;
                Some(done) = running.tasks.join_next() => match done {
                    Ok(done) => self.take(done, &mut running),
                    // A task that panicked would leave its piece under way for ever.
                    Err(error) => {
                        tracing::error!(region = self.region.name(), "{error}; beginning again");
                        running = self.begin().await;
                    }
                },
                () = changed => {}
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Looks up where the region stands; as often as it takes.
    async fn begin(&self) -> Running {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.look_up().await {
                Ok(found) => {
                    self.state.worked(self.index);
                    let running = Running {
                        upkeep: Upkeep::new(self.unit(), found.known),
                        progress: found.progress,
                        tasks: JoinSet::new(),
                        mending: false,
                        mend_at: Instant::now() + HOLE_PAUSE,
                        older_hole: found.older_hole,
                        older_end: found.older_end,
                    };
                    self.report(&running);
                    return running;
                }
                Err(error) => self.failed(&error, &mut pause).await,
            }
        }
    }

    fn unit(&self) -> u64 {
        super::cutter::piece_unit(&self.context.format)
    }

    /// Starts whatever can be started; whether everything is done.
    fn start_steps(&self, running: &mut Running) -> bool {
        loop {
            match running.progress.step(&self.backlog, self.index) {
                Step::Upload(sequence, piece) => {
                    running.upkeep.begun(piece.name);
                    let uploader = self.clone();
                    running.tasks.spawn(async move {
                        Done::Uploaded(sequence, uploader.store(sequence, &piece).await)
                    });
                }
                Step::Fill(from, to) => {
                    self.report(running);
                    let uploader = self.clone();
                    running.tasks.spawn(async move {
                        let timeline = uploader.context.timeline;
                        Done::Filled(to, uploader.copy(timeline, from, to).await)
                    });
                }
                Step::Wait => return false,
                Step::End => return true,
            }
        }
    }

    fn start_upkeep(&self, running: &mut Running) {
        if let Some(look) = running.upkeep.due(Instant::now(), &mut running.progress) {
            let uploader = self.clone();
            running.tasks.spawn(async move { Done::Looked(uploader.look(look).await) });
        }
        if let Some(folder) =
            running.upkeep.next_finished(&running.progress).filter(|_| running.older_hole.is_none())
        {
            let uploader = self.clone();
            running.tasks.spawn(async move {
                Done::RolledUp(folder, uploader.roll_up(folder.0, folder.1).await)
            });
        }
    }

    fn start_mending(&self, running: &mut Running) {
        let Some(hole) = running.progress.first_hole() else { return };
        if running.mending || Instant::now() < running.mend_at {
            return;
        }
        running.mending = true;
        let uploader = self.clone();
        running.tasks.spawn(async move {
            let timeline = uploader.context.timeline;
            Done::Mended(hole, uploader.copy(timeline, hole.0, hole.1).await)
        });
    }

    fn take(&self, done: Done, running: &mut Running) {
        match done {
            Done::Uploaded(sequence, outcome) => {
                let stored =
                    running.progress.uploaded(sequence, outcome, &self.backlog, self.index);
                for (piece, put) in stored {
                    running.upkeep.stored(&piece, put, &mut running.progress);
                }
            }
            Done::Filled(to, outcome) => match outcome {
                Ok(copied) => {
                    if copied.reached < to {
                        let problem = copied.shortfall(&self.region, to);
                        tracing::error!(
                            region = self.region.name(),
                            "{problem}; going on behind it"
                        );
                        self.state.failed(self.index, problem.to_string());
                    }
                    running.upkeep.copied(&copied.pieces, &mut running.progress);
                    running.progress.filled(copied.reached, to);
                    running.mend_at = Instant::now() + HOLE_PAUSE;
                }
                // The region itself: the same step comes again.
                Err(_) => running.progress.filled(running.progress.tip(), running.progress.tip()),
            },
            Done::Mended(hole, outcome) => {
                running.mending = false;
                running.mend_at = Instant::now() + HOLE_PAUSE;
                if let Ok(copied) = outcome {
                    // Nobody has it: the server may, once it is asked from here on.
                    if copied.reached < hole.1
                        && copied.failure.is_none()
                        && self.state.asks_first_time(hole)
                    {
                        self.again.cancel();
                    }
                    running.upkeep.copied(&copied.pieces, &mut running.progress);
                    running.progress.mended(hole, copied.reached);
                    if copied.reached >= hole.1 {
                        running.mend_at = Instant::now();
                        tracing::info!(region = self.region.name(), from = %hole.0, to = %hole.1, "a hole was filled");
                    }
                }
            }
            Done::Looked(report) => self.take_report(report, running),
            Done::RolledUp(_, Ok(())) => {}
            Done::RolledUp(folder, Err(error)) => {
                // It only costs time when it is looked for.
                tracing::warn!(region = self.region.name(), timeline = %folder.0, log = folder.1, "no roll-up: {error}");
            }
        }
        self.report(running);
    }

    fn take_report(&self, report: upkeep::Report, running: &mut Running) {
        for finding in &report.findings {
            match finding {
                Finding::Lost(from, to, key) => {
                    let message = format!("the store took {key} and does not have it");
                    tracing::error!(region = self.region.name(), "{message}");
                    self.state.failed(self.index, message.clone());
                    self.state.alarm(format!("region {}: {message}", self.region.name()));
                    if from < to {
                        running.progress.lost(*from, *to);
                    }
                    // A store that goes on lying is not filled over and over.
                    let pause = match running.upkeep.is_distrusted() {
                        true => HOLE_PAUSE,
                        false => Duration::ZERO,
                    };
                    running.mend_at = Instant::now() + pause;
                }
                Finding::Damaged(key) => {
                    let alarm = format!(
                        "region {}: {key} does not hold what was stored; \"pgkeep repair --deep\" replaces it",
                        self.region.name()
                    );
                    if self.state.alarm(alarm.clone()) {
                        tracing::error!("{alarm}");
                    }
                }
                Finding::Foreign(key) => {
                    let name = self.region.name();
                    let alarm = format!(
                        "region {name}: somebody else archives different WAL under the same prefix: {key}. A clone of this server, or an old primary, has a pgkeep of its own"
                    );
                    if self.state.alarm(alarm.clone()) {
                        tracing::error!("{alarm}");
                    }
                }
            }
        }
        if let Some(error) = &report.error {
            tracing::warn!(region = self.region.name(), "small pieces stay for now: {error}");
        }
        running.upkeep.looked(report, &mut running.progress);
    }

    /// Tells how far the region's WAL reaches.
    fn report(&self, running: &Running) {
        let frontier = running.progress.frontier().max(running.older_end);
        let frontier = running.older_hole.map_or(frontier, |hole| hole.min(frontier));
        let doubted = running.upkeep.doubted_from(self.context.timeline, &running.progress);
        let frontier = doubted.map_or(frontier, |doubted| doubted.min(frontier));
        self.state.set_behind(self.index, running.progress.is_behind());
        self.state.set_frontier(self.index, frontier);
    }

    /// Notes a failure and waits before the next attempt.
    async fn failed(&self, error: &StoreError, pause: &mut Duration) {
        if *pause == FIRST_PAUSE {
            tracing::warn!(region = self.region.name(), "{error}; trying again");
        }
        self.state.failed(self.index, error.to_string());
        tokio::time::sleep(crate::jitter::around(*pause)).await;
        *pause = (*pause * 2).min(LONGEST_PAUSE);
    }

    async fn store(&self, sequence: u64, piece: &Piece) -> Outcome {
        let key = piece.name.key();
        let mut pause = FIRST_PAUSE;
        loop {
            let Some(outcome) = self.put_while_held(sequence, &key, piece).await else {
                return Outcome::Dropped;
            };
            match outcome {
                Ok(put) => {
                    self.state.worked(self.index);
                    return Outcome::Stored(put);
                }
                Err(error) => self.failed(&error, &mut pause).await,
            }
            if !self.backlog.holds(sequence) {
                return Outcome::Dropped;
            }
        }
    }

    /// Stores a piece unless the queue drops it meanwhile: what hangs must not keep its memory.
    async fn put_while_held(
        &self,
        sequence: u64,
        key: &str,
        piece: &Piece,
    ) -> Option<Result<Put, StoreError>> {
        let put = self.region.put_once(key, piece.body.clone());
        tokio::pin!(put);
        loop {
            let changed = self.backlog.changed();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.backlog.holds(sequence) {
                return None;
            }
            tokio::select! {
                biased;
                outcome = &mut put => return Some(outcome),
                () = changed => {}
            }
        }
    }

    /// Copies `[from, to)` from other regions, byte for byte; tries again while the region itself
    /// fails.
    async fn copy(&self, timeline: TimelineId, from: Lsn, to: Lsn) -> Result<Copied, StoreError> {
        tracing::info!(region = self.region.name(), %timeline, %from, %to, "copying WAL from other regions");
        self.state.set_repairing(self.index, true);
        let segment_size = self.context.format.segment_size;
        let mut all = Copied { reached: from, pieces: Vec::new(), failure: None };
        let mut pause = FIRST_PAUSE;
        let mut attempts = 0;
        let outcome = loop {
            let end = to.min(all.reached.advance(COPY_AT_ONCE));
            let range = WalRange { timeline, segment_size, from: all.reached, to: end };
            // Given back while it is waited: one region must not hold up the repair of another.
            let permit = self.repairs.acquire().await;
            let copied = copy_wal(&self.others, &self.region, range, &self.context.key).await;
            drop(permit);
            match copied {
                Ok(copied) => {
                    attempts = 0;
                    all.reached = copied.reached;
                    all.pieces.extend(copied.pieces);
                    all.failure = copied.failure;
                    if all.reached < end || all.reached >= to {
                        break Ok(all);
                    }
                }
                Err(error) if attempts < COPY_ATTEMPTS => {
                    attempts += 1;
                    self.failed(&error, &mut pause).await;
                }
                Err(error) => break Err(error),
            }
        };
        self.state.set_repairing(self.index, false);
        outcome
    }
}

/// How often a copy into a failing region is tried before everything is looked at again.
const COPY_ATTEMPTS: u32 = 4;

impl Running {
    /// When something is due even if nothing happens.
    fn next_wake(&self) -> Option<Instant> {
        let mend = self.progress.first_hole().filter(|_| !self.mending).map(|_| self.mend_at);
        [mend, self.upkeep.next_due(&self.progress)].into_iter().flatten().min()
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake).await,
        None => std::future::pending().await,
    }
}
