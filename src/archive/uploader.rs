//! Brings pieces into one region, in order, and keeps its frontier.
//!
//! A region fails alone: its uploader tries again and again with growing pauses, while the others
//! go on. When the queue had to drop pieces that this region misses, they are copied, byte for
//! byte, from a region that has them. A crash at any point leaves whole pieces, perhaps with a
//! hole behind the frontier; the next start finds the frontier by listing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::backlog::{Backlog, Next};
use super::piece::{Piece, PieceContext};
use super::state::ArchiveState;
use crate::repo::{LINEAGE_FILE, Lineage, PieceName, history_key, log_folder, timeline_folder};
use crate::store::{
    FailureKind, Region, StoreError, frontier_of, list_pieces, lowest_of, read_piece_object,
};
use crate::wal::{Lsn, TimelineId};

/// Pieces on their way to one region at once.
const IN_FLIGHT: usize = 4;
/// The pause after the first failure; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

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
    /// Whether the region may be filled although it holds no lineage and others do.
    pub(super) may_begin: bool,
    /// The timelines before this one and where each ends: the region must have them up to there
    /// before anything on this timeline counts.
    pub(super) ancestors: Vec<(TimelineId, Lsn)>,
    /// All history files: without them nothing on this timeline can be reached.
    pub(super) histories: Vec<(TimelineId, Bytes)>,
    /// Where this session's stream began.
    pub(super) stream_start: Lsn,
    pub(super) cancelled: CancellationToken,
}

/// What became of one upload.
enum Outcome {
    Stored,
    /// The queue dropped it while the region failed.
    Dropped,
}

/// What is known of the region.
struct Progress {
    frontier: Lsn,
    /// Whether any piece of this timeline is stored: before that, the order of uploads alone says
    /// that nothing is missing in front of them.
    has_pieces: bool,
    /// An upload was dropped, or failed behind another: nothing new is begun until it is copied.
    has_hole: bool,
    /// Pieces smaller than a full one that stand in the region.
    small: BTreeSet<PieceName>,
    taken: Option<u64>,
    /// Uploads that were started and are not yet part of the frontier, in order.
    pending: BTreeMap<u64, (Arc<Piece>, Option<Outcome>)>,
}

impl Uploader {
    /// Runs until the queue is closed and empty, or everything is cancelled.
    pub(super) async fn run(self) {
        let cancelled = self.cancelled.clone();
        tokio::select! {
            () = cancelled.cancelled() => {}
            () = self.work() => {}
        }
    }

    async fn work(self) {
        let mut progress = self.begin().await;
        let mut uploads = JoinSet::new();
        loop {
            let changed = self.backlog.changed();
            let idle = self.fill(&mut progress, &mut uploads).await;
            if uploads.is_empty() {
                match idle {
                    Next::Closed => return,
                    Next::Piece(..) => continue,
                    Next::Empty => {}
                }
            }
            tokio::select! {
                () = changed => {}
                Some(finished) = uploads.join_next() => {
                    if let Ok((sequence, outcome)) = finished {
                        if let Some(entry) = progress.pending.get_mut(&sequence) {
                            entry.1 = Some(outcome);
                        }
                        self.advance(&mut progress).await;
                    }
                }
            }
        }
    }

    /// Looks up where the region stands; as often as it takes.
    async fn begin(&self) -> Progress {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.look_up().await {
                Ok(progress) => {
                    self.state.worked(self.index);
                    self.report(progress.frontier);
                    return progress;
                }
                Err(error) => self.failed(&error, &mut pause).await,
            }
        }
    }

    async fn look_up(&self) -> Result<Progress, StoreError> {
        match self.region.get(LINEAGE_FILE).await {
            Ok(_) => {}
            Err(error) if error.kind == FailureKind::NotFound && self.may_begin => {
                self.region.put(LINEAGE_FILE, self.lineage.to_bytes().into()).await?;
            }
            Err(mut error) if error.kind == FailureKind::NotFound => {
                error.message = "it holds nothing of this cluster while other regions do: is it the right bucket or folder, and is its disk mounted? If the region is new, start once with --new-region and its name".into();
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        let size = self.context.format.segment_size;
        for (timeline, content) in &self.histories {
            let key = history_key(*timeline, self.context.key.hash(content).short());
            self.region.put(&key, content.clone()).await?;
        }
        let unit = super::cutter::piece_unit(&self.context.format);
        let mut begin = None;
        for (ancestor, end) in &self.ancestors {
            self.complete(*ancestor, begin, *end).await?;
            begin = Some(end.round_down(unit));
        }
        let found = frontier_of(&self.region, self.context.timeline, size, begin).await?;
        let small = found
            .iter()
            .flat_map(|frontier| frontier.recent.iter().copied())
            .filter(|piece| piece.len() < unit)
            .collect();
        let has_pieces = found.is_some();
        let frontier = match (found, begin) {
            (Some(found), _) => found.lsn,
            (None, Some(begin)) => begin,
            (None, None) => {
                self.lowest_elsewhere(self.context.timeline).await?.unwrap_or(self.stream_start)
            }
        };
        let (taken, has_hole, pending) = (None, false, BTreeMap::new());
        Ok(Progress { frontier, has_pieces, has_hole, small, taken, pending })
    }

    /// Copies what this region lacks of an older timeline, up to where that one ends.
    async fn complete(
        &self,
        timeline: TimelineId,
        begin: Option<Lsn>,
        end: Lsn,
    ) -> Result<(), StoreError> {
        let size = self.context.format.segment_size;
        let stored = frontier_of(&self.region, timeline, size, begin).await?;
        let from = match (stored, begin) {
            (Some(stored), _) => Some(stored.lsn),
            (None, Some(begin)) => Some(begin),
            (None, None) => None,
        };
        let lowest = self.lowest_elsewhere(timeline).await?;
        // What no region has cannot be copied; a restore's plan sees what that means.
        let from = from.max(lowest.filter(|lowest| from.is_none_or(|from| *lowest > from)));
        match from {
            Some(from) if from < end && lowest.is_some() => self.copy(timeline, from, end).await,
            _ => Ok(()),
        }
    }

    /// The lowest LSN of a timeline that another region holds.
    async fn lowest_elsewhere(&self, timeline: TimelineId) -> Result<Option<Lsn>, StoreError> {
        let size = self.context.format.segment_size;
        let mut lowest: Option<Lsn> = None;
        let mut failure = None;
        for other in &self.others {
            match lowest_of(other, timeline, size).await {
                Ok(found) => lowest = [lowest, found].into_iter().flatten().min(),
                Err(error) => failure = Some(error),
            }
        }
        match (lowest, failure) {
            (None, Some(error)) => Err(error),
            _ => Ok(lowest),
        }
    }

    /// Tells how far the region's WAL reaches. Up to the last fork it lies on older timelines.
    fn report(&self, frontier: Lsn) {
        let fork = self.ancestors.last().map_or(Lsn::INVALID, |(_, end)| *end);
        self.state.set_frontier(self.index, frontier.max(fork));
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

    /// Starts uploads until enough are under way; says what kept it from starting more.
    async fn fill(&self, progress: &mut Progress, uploads: &mut JoinSet<(u64, Outcome)>) -> Next {
        if progress.has_hole {
            if !progress.pending.is_empty() {
                return Next::Empty;
            }
            progress.has_hole = false;
            progress.taken = None;
        }
        let limit = if progress.has_pieces { IN_FLIGHT } else { 1 };
        while progress.pending.len() < limit {
            let next = self.backlog.next(self.index, progress.taken);
            let Next::Piece(sequence, piece) = next else { return next };
            let reached = progress.pending.values().map(|(piece, _)| piece.end).max();
            let reached =
                reached.map_or(progress.frontier, |reached| reached.max(progress.frontier));
            if piece.end <= progress.frontier {
                // Stored by an earlier run.
                progress.taken = Some(sequence);
                if progress.pending.is_empty() {
                    self.backlog.stored(self.index, sequence + 1, progress.frontier);
                }
                continue;
            }
            if piece.start > reached {
                if !progress.pending.is_empty() {
                    return Next::Empty;
                }
                self.fill_hole(progress, reached, piece.start).await;
                return Next::Piece(sequence, piece);
            }
            progress.taken = Some(sequence);
            progress.pending.insert(sequence, (piece.clone(), None));
            let uploader = self.clone();
            uploads.spawn(async move { (sequence, uploader.store(sequence, &piece).await) });
        }
        Next::Empty
    }

    async fn store(&self, sequence: u64, piece: &Piece) -> Outcome {
        let key = piece.name.key();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.region.put_once(&key, piece.body.clone()).await {
                Ok(_) => {
                    self.state.worked(self.index);
                    return Outcome::Stored;
                }
                Err(error) => self.failed(&error, &mut pause).await,
            }
            if !self.backlog.holds(sequence) {
                return Outcome::Dropped;
            }
        }
    }

    /// Moves the frontier over the uploads at the front that are done.
    async fn advance(&self, progress: &mut Progress) {
        while let Some(entry) = progress.pending.first_entry() {
            if entry.get().1.is_none() {
                return;
            }
            let sequence = *entry.key();
            let (piece, outcome) = entry.remove();
            if piece.start > progress.frontier || matches!(outcome, Some(Outcome::Dropped)) {
                // A hole: copied from another region once nothing is under way.
                progress.has_hole = true;
                self.state.set_behind(self.index, true);
                continue;
            }
            progress.has_pieces = true;
            let frontier = progress.frontier.max(piece.end);
            progress.frontier = frontier;
            self.report(frontier);
            self.state.set_behind(self.index, progress.has_hole);
            self.backlog.stored(self.index, sequence + 1, frontier);
            if piece.name.len() < super::cutter::piece_unit(&self.context.format) {
                progress.small.insert(piece.name);
            }
            if piece.replaces || !progress.small.is_empty() {
                self.remove_replaced(progress, &piece.name).await;
            }
        }
    }

    /// Removes the small pieces that `larger` replaces, once the region itself lists `larger`.
    async fn remove_replaced(&self, progress: &mut Progress, larger: &PieceName) {
        let replaced: Vec<_> =
            progress.small.iter().filter(|small| larger.covers(small)).copied().collect();
        if replaced.is_empty() {
            return;
        }
        let folder = log_folder(larger.segment.timeline, larger.segment.log);
        let outcome = async {
            let listed = self.region.list(&folder).await?;
            let key = larger.key();
            if !listed.iter().any(|object| object.key == key) {
                return Err(self.region.damaged(&key, "the store took it and does not list it"));
            }
            for small in &replaced {
                self.region.delete(&small.key()).await?;
            }
            Ok(())
        };
        match outcome.await {
            Ok(()) => {
                for small in replaced {
                    progress.small.remove(&small);
                }
            }
            Err(error) => {
                tracing::warn!(region = self.region.name(), "small pieces stay for now: {error}");
                self.state.failed(self.index, error.to_string());
            }
        }
    }

    /// Copies what the queue dropped from other regions; as often as it takes.
    async fn fill_hole(&self, progress: &mut Progress, from: Lsn, to: Lsn) {
        let mut at = from;
        let mut pause = FIRST_PAUSE;
        while at < to {
            match self.copy(self.context.timeline, at, to).await {
                Ok(()) => at = to,
                Err(error) => self.failed(&error, &mut pause).await,
            }
        }
        progress.frontier = to;
        progress.has_pieces = true;
        progress.taken = None;
        self.state.set_behind(self.index, false);
        self.report(to);
    }

    /// Copies all of `[from, to)` from other regions, byte for byte.
    async fn copy(&self, timeline: TimelineId, from: Lsn, to: Lsn) -> Result<(), StoreError> {
        tracing::info!(region = self.region.name(), %from, %to, "copying WAL from other regions");
        self.state.set_repairing(self.index, true);
        let outcome = self.copy_pieces(timeline, from, to).await;
        self.state.set_repairing(self.index, false);
        outcome
    }

    async fn copy_pieces(
        &self,
        timeline: TimelineId,
        from: Lsn,
        to: Lsn,
    ) -> Result<(), StoreError> {
        let size = self.context.format.segment_size;
        let mut at = from;
        let mut failure = None;
        for source in &self.others {
            let outcome = async {
                let found = list_pieces(source, timeline, size, at, Some(to)).await?;
                for part in found.coverage.cover(at, to) {
                    // Verified before it is passed on.
                    let object = read_piece_object(source, &part.piece, &self.context.key).await?;
                    self.region.put(&part.piece.key(), object).await?;
                    at = part.to;
                }
                Ok(())
            };
            if let Err(error) = outcome.await {
                failure = Some(error);
            }
            if at >= to {
                return Ok(());
            }
        }
        Err(failure.unwrap_or_else(|| StoreError {
            kind: FailureKind::NotFound,
            region: self.region.name().to_owned(),
            operation: "repair",
            key: timeline_folder(timeline),
            message: format!("no other region can give WAL from {at} to {to} now"),
        }))
    }
}
