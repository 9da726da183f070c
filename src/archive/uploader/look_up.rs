//! Where a region stands when a session begins: is it the right one, what does it hold, what of
//! older timelines does it miss.

use std::collections::BTreeSet;

use super::{Progress, Uploader};
use crate::repo::{LINEAGE_FILE, PieceName, TIMELINE_FOLDER, history_key, parse_history_name};
use crate::store::{
    FailureKind, Frontier, StoreError, ask_all, frontier_of, list_timelines, lowest_of, read_wal,
};
use crate::wal::{Lsn, TimelineId};

/// What was found.
pub(super) struct Found {
    pub(super) progress: Progress,
    /// The pieces in the newest folders.
    pub(super) known: BTreeSet<PieceName>,
    /// WAL of an older timeline that is missing and that no other region could give.
    pub(super) older_hole: Option<Lsn>,
    /// Up to here the region's WAL lies on older timelines: the last fork, unless the archive began
    /// behind it.
    pub(super) older_end: Lsn,
}

/// What a region holds of an older timeline.
enum Older {
    /// All up to its end.
    Whole,
    /// What no region has is missing from here on.
    Hole(Lsn),
    /// Nothing: the archive began later.
    Nothing,
}

impl Uploader {
    pub(super) async fn look_up(&self) -> Result<Found, StoreError> {
        self.check_lineage().await?;
        self.store_histories().await?;
        self.check_timelines().await?;
        let mut begin = None;
        let mut older_hole = None;
        let mut older_end = Lsn::INVALID;
        for (ancestor, end) in &self.ancestors {
            match self.complete(*ancestor, begin, *end).await? {
                Older::Whole => older_end = *end,
                Older::Hole(from) => {
                    older_hole = older_hole.or(Some(from));
                    older_end = *end;
                }
                Older::Nothing => older_end = Lsn::INVALID,
            }
            begin = Some(end.round_down(self.unit()));
        }
        let size = self.context.format.segment_size;
        let found = self.frontier(self.context.timeline, begin).await?;
        let known: BTreeSet<PieceName> =
            found.iter().flat_map(|frontier| frontier.recent.iter().copied()).collect();
        let unit = self.unit();
        let small = known.iter().filter(|piece| piece.len() < unit).copied().collect();
        let has_pieces = found.is_some();
        let tip = match (found, begin) {
            (Some(found), _) => found.lsn,
            // The archive may have begun after the fork.
            (None, begin) => {
                match (self.lowest_elsewhere(self.context.timeline).await, begin) {
                    (Ok(Some(lowest)), begin) => lowest.max(begin.unwrap_or(Lsn::INVALID)),
                    (Ok(None), _) => self.stream_start,
                    (Err(_), Some(begin)) => begin,
                    // A region to be filled must know from where on.
                    (Err(error), None) if self.is_established => return Err(error),
                    (Err(_), None) => self.stream_start,
                }
            }
        };
        if has_pieces && !self.is_compared && tip > self.stream_start {
            self.compare(tip).await?;
        }
        let progress = Progress::new(size, tip, has_pieces, small);
        Ok(Found { progress, known, older_hole, older_end })
    }

    async fn check_lineage(&self) -> Result<(), StoreError> {
        match self.region.get(LINEAGE_FILE).await {
            Ok(_) => {
                self.memory.has_begun(self.region.name());
                Ok(())
            }
            Err(error) if error.kind == FailureKind::NotFound && self.may_begin => {
                self.region.put(LINEAGE_FILE, self.lineage.to_bytes().into()).await?;
                self.memory.has_begun(self.region.name());
                Ok(())
            }
            Err(mut error) if error.kind == FailureKind::NotFound => {
                error.message = "it holds nothing of this cluster while other regions do: is it the right bucket or folder, and is its disk mounted? If the region is new, start once with --new-region and its name".into();
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Stores the history files that the region lacks. One that has another content for the same
    /// timeline belongs to another history (invariant I2).
    async fn store_histories(&self) -> Result<(), StoreError> {
        if self.histories.is_empty() {
            return Ok(());
        }
        let listed = self.region.list(TIMELINE_FOLDER).await?;
        let there: Vec<_> =
            listed.iter().filter_map(|object| parse_history_name(object.file_name())).collect();
        for (timeline, content) in &self.histories {
            let hash = self.context.key.hash(content).short();
            if there.contains(&(*timeline, hash)) {
                continue;
            }
            let key = history_key(*timeline, hash);
            if there.iter().any(|(other, _)| other == timeline) {
                let problem = format!(
                    "the region has another history file of timeline {timeline}: two servers were promoted to it, and their WAL must not be mixed"
                );
                return Err(self.region.damaged(&key, problem));
            }
            self.region.put(&key, content.clone()).await?;
        }
        Ok(())
    }

    /// A region that was silent when the session began may know of a promotion: then this server is
    /// an old primary, and its WAL has no place there.
    async fn check_timelines(&self) -> Result<(), StoreError> {
        let Some(newest) = self.newest_timeline else { return Ok(()) };
        let known = list_timelines(&self.region).await?;
        match known.last().filter(|known| **known > newest) {
            Some(known) => {
                let problem = format!(
                    "it has WAL of timeline {known}, and this server takes writes on timeline {newest}: an old primary that came back? Nothing is stored there"
                );
                self.state.alarm(format!("region {}: {problem}", self.region.name()));
                Err(self.region.damaged("wal", problem))
            }
            None => Ok(()),
        }
    }

    /// Copies what this region lacks of an older timeline, up to where that one ends.
    async fn complete(
        &self,
        timeline: TimelineId,
        begin: Option<Lsn>,
        end: Lsn,
    ) -> Result<Older, StoreError> {
        let stored = self.frontier(timeline, begin).await?;
        let from = match (stored, begin) {
            (Some(stored), _) => Some(stored.lsn),
            (None, Some(begin)) => Some(begin),
            (None, None) => None,
        };
        if from.is_some_and(|from| from >= end) {
            return Ok(Older::Whole);
        }
        let Ok(lowest) = self.lowest_elsewhere(timeline).await else {
            return Ok(Older::Hole(from.unwrap_or(Lsn::INVALID)));
        };
        // The archive may have begun later.
        let from = from.max(lowest.filter(|lowest| from.is_none_or(|from| *lowest > from)));
        match from {
            Some(from) if from < end && lowest.is_some() => {
                let copied = self.copy(timeline, from, end).await?;
                if copied.reached >= end {
                    return Ok(Older::Whole);
                }
                let problem = copied.shortfall(&self.region, end);
                tracing::error!(region = self.region.name(), %timeline, "{problem}");
                Ok(Older::Hole(copied.reached))
            }
            _ => Ok(Older::Nothing),
        }
    }

    /// How far the region's WAL of a timeline reaches. Where the archive began after the timeline
    /// did, the timeline begins there.
    async fn frontier(
        &self,
        timeline: TimelineId,
        begin: Option<Lsn>,
    ) -> Result<Option<Frontier>, StoreError> {
        let size = self.context.format.segment_size;
        let found = frontier_of(&self.region, timeline, size, begin).await?;
        let Some(begin) = begin.filter(|_| found.is_none()) else { return Ok(found) };
        let own = lowest_of(&self.region, timeline, size).await?;
        // Somebody who is silent may have what lies before.
        let Ok(elsewhere) = self.lowest_elsewhere(timeline).await else { return Ok(None) };
        let lowest = [own, elsewhere].into_iter().flatten().min();
        match lowest {
            Some(lowest) if lowest > begin => {
                frontier_of(&self.region, timeline, size, Some(lowest)).await
            }
            _ => Ok(None),
        }
    }

    /// The lowest LSN of a timeline that another region holds; an error when one that may hold it
    /// cannot be asked and no other does.
    async fn lowest_elsewhere(&self, timeline: TimelineId) -> Result<Option<Lsn>, StoreError> {
        let size = self.context.format.segment_size;
        let mut lowest: Option<Lsn> = None;
        let mut failure = None;
        let asked =
            ask_all(&self.others, |other| async move { lowest_of(&other, timeline, size).await });
        for answer in asked.await {
            match answer {
                Ok(found) => lowest = [lowest, found].into_iter().flatten().min(),
                Err(error) => failure = Some(error),
            }
        }
        match (lowest, failure) {
            (None, Some(error)) => Err(error),
            _ => Ok(lowest),
        }
    }

    /// Compares what this region holds from the stream's start on with what another one holds: the
    /// session could not, because this region was silent then.
    async fn compare(&self, tip: Lsn) -> Result<(), StoreError> {
        let (timeline, format) = (self.context.timeline, &self.context.format);
        let from = self.stream_start;
        let size = format.segment_size;
        let key = &self.context.key;
        let own = match read_wal(&self.region, timeline, size, key, from, tip).await {
            Ok(own) => own,
            // Larger pieces replace what is damaged, and verification finds what is not replaced.
            Err(error) if error.kind == FailureKind::Damaged => return Ok(()),
            Err(error) => return Err(error),
        };
        for other in &self.others {
            let Ok(theirs) = read_wal(other, timeline, size, key, from, tip).await else {
                continue;
            };
            let length = own.len().min(theirs.len());
            if own[..length] != theirs[..length] {
                let same = own.iter().zip(&theirs).take_while(|(a, b)| a == b).count() as u64;
                let problem = format!(
                    "its WAL differs from that of region {} at {} on timeline {timeline}: two histories",
                    other.name(),
                    from.advance(same)
                );
                return Err(self.region.damaged("wal", problem));
            }
        }
        Ok(())
    }
}
