//! What a region says it stored is looked at: before small pieces that larger ones cover are
//! removed, now and then in between, and a sample is read back (invariants I5, I10).
//!
//! One look is one listing of one folder. It also shows whether somebody else writes into it: the
//! contents are then compared, because a second archiver of the same server writes the same WAL and
//! a clone does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::super::piece::Piece;
use super::{Progress, Uploader};
use crate::repo::{Coverage, PieceName, log_folder};
use crate::store::{FailureKind, Put, StoreError, read_cover, read_piece};
use crate::wal::{Lsn, SegmentName, TimelineId};

/// Looks are at least this far apart.
const SPACING: Duration = Duration::from_secs(2);
/// How long it is waited after a look that failed.
const ERROR_PAUSE: Duration = Duration::from_secs(15);
/// So many pieces are stored before the region is asked whether it has them.
const LOOK_AFTER: usize = 64;
/// … and so long after the last look at the latest: what a store took and lost must be known soon.
const LOOK_PAUSE: Duration = Duration::from_secs(15);
/// Of so many pieces, one is read back.
const SAMPLE_EVERY: u32 = 64;
/// How much of the sample is read.
const SAMPLE_SIZE: usize = 1 << 20;
/// Pieces of somebody else that are compared in one look.
const SUSPECTS_AT_ONCE: usize = 2;

/// The folder of a LOG8: timeline and number.
pub(super) type Folder = (TimelineId, u32);

/// What was stored and is to be looked at.
pub(super) struct Upkeep {
    unit: u64,
    /// Every piece of the newest folders that was found there, or put there by this process.
    own: BTreeSet<PieceName>,
    /// Pieces stored since they were last listed, with their sizes. What was there already may
    /// have been compressed otherwise.
    unseen: BTreeMap<PieceName, Option<u64>>,
    suspects: BTreeSet<PieceName>,
    /// Told already.
    foreign: BTreeSet<PieceName>,
    /// Small pieces can be removed.
    has_covered: bool,
    since_sample: u32,
    sample: Option<Sample>,
    looking: bool,
    last: Option<Instant>,
    /// The store took something and did not have it: from then on nothing counts before it was
    /// seen.
    is_distrusted: bool,
    /// Folders that were left behind and are whole: to be rolled up.
    finished: BTreeSet<Folder>,
    rolled_up: BTreeSet<Folder>,
}

/// A part of an object that is to be read back.
#[derive(Clone, Debug)]
struct Sample {
    name: PieceName,
    offset: u64,
    content: Bytes,
}

/// One look at one folder.
#[derive(Debug)]
pub(super) struct Look {
    folder: Folder,
    own: BTreeSet<PieceName>,
    expected: Vec<(PieceName, Option<u64>)>,
    small: Vec<PieceName>,
    suspects: Vec<PieceName>,
    sample: Option<Sample>,
}

/// Something that an operator must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// WAL that was stored is not there: this range, this object.
    Lost(Lsn, Lsn, String),
    /// An object does not hold what was stored.
    Damaged(String),
    /// An object holds other WAL than this archiver's.
    Foreign(String),
}

/// What a look came to.
#[derive(Debug, Default)]
pub(super) struct Report {
    folder: Option<Folder>,
    seen: Vec<PieceName>,
    /// Took but not there, yet covered by smaller ones.
    vanished: Vec<PieceName>,
    removed: Vec<PieceName>,
    /// Pieces that this process did not put there.
    unknown: Vec<PieceName>,
    /// Of somebody else, with the same WAL.
    same: Vec<PieceName>,
    /// Of somebody else, with other WAL.
    foreign: Vec<PieceName>,
    pub(super) findings: Vec<Finding>,
    pub(super) error: Option<StoreError>,
}

impl Upkeep {
    pub(super) fn new(unit: u64, known: BTreeSet<PieceName>) -> Upkeep {
        let folders: BTreeSet<Folder> = known.iter().map(folder_of).collect();
        // What an earlier run left to be done.
        let finished = folders.iter().rev().skip(1).copied().collect();
        Upkeep {
            unit,
            finished,
            rolled_up: BTreeSet::new(),
            has_covered: true,
            own: known,
            unseen: BTreeMap::new(),
            suspects: BTreeSet::new(),
            foreign: BTreeSet::new(),
            since_sample: 0,
            sample: None,
            looking: false,
            last: None,
            is_distrusted: false,
        }
    }

    /// A piece is about to be stored.
    pub(super) fn begun(&mut self, name: PieceName) {
        self.own.insert(name);
    }

    /// A piece was stored.
    pub(super) fn stored(&mut self, piece: &Arc<Piece>, put: Put, progress: &mut Progress) {
        let name = piece.name;
        let size = (put == Put::Written).then_some(piece.body.len() as u64);
        self.unseen.insert(name, size);
        if name.len() < self.unit {
            progress.small.insert(name);
        }
        self.has_covered |= piece.replaces || !progress.small.is_empty();
        self.since_sample += 1;
        if self.since_sample >= SAMPLE_EVERY && put == Put::Written {
            self.since_sample = 0;
            // Somewhere in the object; the hash in its name is as good as chance.
            let length = piece.body.len().min(SAMPLE_SIZE);
            let room = (piece.body.len() - length) as u64 + 1;
            let offset = name.hash.0 % room;
            let content = piece.body.slice(offset as usize..offset as usize + length);
            self.sample = Some(Sample { name, offset, content });
        }
    }

    /// Pieces were copied from other regions.
    pub(super) fn copied(&mut self, pieces: &[PieceName], progress: &mut Progress) {
        for piece in pieces {
            self.own.insert(*piece);
            self.unseen.insert(*piece, None);
            if piece.len() < self.unit {
                progress.small.insert(*piece);
            }
        }
    }

    /// Whether the store was found lying before.
    pub(super) fn is_distrusted(&self) -> bool {
        self.is_distrusted
    }

    /// Nothing from here on counts yet: a store that lied is believed only once it lists what it
    /// was given.
    pub(super) fn doubted_from(&self, timeline: TimelineId, progress: &Progress) -> Option<Lsn> {
        let mut unseen = self.unseen.keys().filter(|name| name.segment.timeline == timeline);
        let first = unseen.next().filter(|_| self.is_distrusted)?;
        first.start(progress.segment_size())
    }

    /// When the next look is due if nothing happens.
    pub(super) fn next_due(&self, progress: &Progress) -> Option<Instant> {
        let wanted = self.has_covered && !progress.small.is_empty();
        let wanted = wanted || self.comparable(progress).next().is_some();
        let pause = match (wanted, self.unseen.is_empty()) {
            (true, _) => SPACING,
            (false, false) if self.is_distrusted => SPACING,
            (false, false) => LOOK_PAUSE,
            (false, true) => return None,
        };
        self.last.filter(|_| !self.looking && !progress.is_copying()).map(|last| last + pause)
    }

    fn comparable(&self, progress: &Progress) -> impl Iterator<Item = PieceName> {
        let tip = progress.frontier();
        let size = progress.segment_size();
        self.suspects
            .iter()
            .filter(move |piece| piece.start(size).is_some_and(|start| start < tip))
            .copied()
    }

    /// The look that is due now.
    pub(super) fn due(&mut self, now: Instant, progress: &mut Progress) -> Option<Look> {
        if self.looking || progress.is_copying() {
            return None;
        }
        let newest = self.own.iter().next_back().map(folder_of)?;
        let rested = self.last.is_none_or(|last| now >= last + SPACING);
        let small: Vec<PieceName> = match self.has_covered && rested {
            true => progress.small.iter().filter(|s| self.is_covered(s)).copied().collect(),
            false => Vec::new(),
        };
        if rested && small.is_empty() {
            self.has_covered = false;
        }
        let suspects: Vec<PieceName> =
            self.comparable(progress).filter(|_| rested).take(SUSPECTS_AT_ONCE).collect();
        let oldest_unseen = self.unseen.keys().next().map(folder_of);
        let folder = match (small.first(), suspects.first(), oldest_unseen) {
            (Some(small), _, _) => folder_of(small),
            (None, Some(suspect), _) => folder_of(suspect),
            (None, None, Some(folder)) if folder < newest => folder,
            (None, None, Some(folder))
                if self.unseen.len() >= LOOK_AFTER
                    || self.sample.is_some()
                    || (self.is_distrusted && rested)
                    || self.last.is_none_or(|last| now >= last + LOOK_PAUSE) =>
            {
                folder
            }
            _ => return None,
        };
        self.looking = true;
        self.last = Some(now);
        let inside = |name: &&PieceName| folder_of(name) == folder;
        Some(Look {
            folder,
            own: self.own.iter().filter(inside).copied().collect(),
            expected: self
                .unseen
                .iter()
                .filter(|(name, _)| folder_of(name) == folder)
                .map(|(name, size)| (*name, *size))
                .collect(),
            small: small.iter().filter(inside).copied().collect(),
            suspects: suspects.iter().filter(inside).copied().collect(),
            sample: self.sample.take(),
        })
    }

    fn is_covered(&self, small: &PieceName) -> bool {
        // Those that cover it begin at or before it, in the same segment.
        let first = PieceName { from: 0, to: 0, ..*small };
        self.own
            .range(first..)
            .take_while(|piece| piece.segment == small.segment && piece.from <= small.from)
            .any(|piece| piece.covers(small))
    }

    /// A look has ended.
    pub(super) fn looked(&mut self, report: Report, progress: &mut Progress) {
        self.looking = false;
        if report.error.is_some() {
            // A store that refuses is not asked every other moment.
            self.last = Some(Instant::now() + ERROR_PAUSE);
        }
        self.is_distrusted |=
            report.findings.iter().any(|finding| matches!(finding, Finding::Lost(..)));
        for name in &report.foreign {
            self.suspects.remove(name);
            self.foreign.insert(*name);
        }
        for name in report.seen.iter().chain(&report.vanished) {
            self.unseen.remove(name);
        }
        for name in &report.vanished {
            self.own.remove(name);
        }
        for name in &report.removed {
            progress.small.remove(name);
            self.own.remove(name);
        }
        for name in &report.same {
            self.suspects.remove(name);
            self.own.insert(*name);
        }
        for name in &report.unknown {
            if !self.own.contains(name) && !self.foreign.contains(name) && !progress.is_copying() {
                self.suspects.insert(*name);
            }
        }
        self.note_finished(report.folder.filter(|_| report.error.is_none()), progress);
        // Folders that were left behind are known to be whole.
        if let Some(newest) = self.own.iter().next_back().copied() {
            let first_unseen = self.unseen.keys().next().copied();
            self.own.retain(|name| {
                name.segment.log + 1 >= newest.segment.log
                    || first_unseen.is_some_and(|unseen| *name >= unseen)
            });
        }
    }
}

impl Upkeep {
    /// A folder was looked at: nothing in it is left to be done, and a newer one is being filled?
    fn note_finished(&mut self, folder: Option<Folder>, progress: &Progress) {
        let newest = self.own.iter().next_back().map(folder_of);
        let Some(folder) = folder.filter(|folder| Some(*folder) < newest) else { return };
        let is_open =
            self.unseen.keys().chain(&progress.small).any(|name| folder_of(name) == folder);
        if !is_open && !self.rolled_up.contains(&folder) {
            self.finished.insert(folder);
        }
    }

    /// The next folder to be rolled up; it is not given again unless that fails.
    pub(super) fn next_finished(&mut self, progress: &Progress) -> Option<Folder> {
        let size = progress.segment_size();
        let folder = *self.finished.first()?;
        let next = SegmentName { timeline: folder.0, log: folder.1 + 1, segment: 0 };
        // Behind an open hole nothing may say that it is whole.
        let end = size.start_of(size.number(next)?);
        if end > progress.frontier() {
            return None;
        }
        self.finished.remove(&folder);
        self.rolled_up.insert(folder);
        Some(folder)
    }
}

/// The folder in which a piece lies.
fn folder_of(name: &PieceName) -> Folder {
    (name.segment.timeline, name.segment.log)
}

impl Uploader {
    /// Lists a folder and does what is to be done in it.
    pub(super) async fn look(&self, look: Look) -> Report {
        let mut report = Report { folder: Some(look.folder), ..Report::default() };
        if let Err(error) = self.try_look(&look, &mut report).await {
            report.error = Some(error);
        }
        report
    }

    async fn try_look(&self, look: &Look, report: &mut Report) -> Result<(), StoreError> {
        let size = self.context.format.segment_size;
        let listed: BTreeMap<PieceName, u64> = self
            .region
            .list(&log_folder(look.folder.0, look.folder.1))
            .await?
            .iter()
            .filter_map(|object| Some((PieceName::parse(object.file_name())?, object.size)))
            .collect();
        let whole = |name: &PieceName, stored: Option<u64>| {
            listed.get(name).is_some_and(|size| stored.is_none_or(|stored| *size == stored))
        };
        let mut lost = Vec::new();
        for (name, stored) in &look.expected {
            if whole(name, *stored) {
                report.seen.push(*name);
            } else {
                lost.push(*name);
            }
        }
        let there = listed.keys().filter(|name| !lost.contains(name)).copied();
        let coverage = Coverage::new(there, size);
        for name in &lost {
            let (Some(from), Some(to)) = (name.start(size), name.end(size)) else { continue };
            let reached = coverage.contiguous_end(from);
            report.vanished.push(*name);
            report.findings.push(Finding::Lost(reached.min(to), to, name.key()));
        }
        report.unknown = listed.keys().filter(|name| !look.own.contains(name)).copied().collect();
        self.remove_covered(look, &listed, &lost, report).await?;
        if let Some(sample) = &look.sample {
            self.read_back(sample, report).await?;
        }
        for suspect in &look.suspects {
            self.compare_with(suspect, look, report).await?;
        }
        Ok(())
    }

    /// Removes small pieces, each covered by one of ours that the region itself lists.
    async fn remove_covered(
        &self,
        look: &Look,
        listed: &BTreeMap<PieceName, u64>,
        lost: &[PieceName],
        report: &mut Report,
    ) -> Result<(), StoreError> {
        let standing: Vec<&PieceName> =
            listed.keys().filter(|name| look.own.contains(name) && !lost.contains(name)).collect();
        let covered = look.small.iter().filter(|small| standing.iter().any(|l| l.covers(small)));
        let covered: Vec<PieceName> = covered.copied().collect();
        let there = covered.iter().filter(|small| listed.contains_key(small));
        let keys: Vec<String> = there.map(PieceName::key).collect();
        for key in &keys {
            self.region.delete(key).await?;
        }
        report.removed.extend(covered);
        Ok(())
    }

    async fn read_back(&self, sample: &Sample, report: &mut Report) -> Result<(), StoreError> {
        let key = sample.name.key();
        let range = sample.offset..sample.offset + sample.content.len() as u64;
        let damaged = match self.region.get_range(&key, range).await {
            Ok(content) => content != sample.content,
            Err(error) if error.kind == FailureKind::Damaged => true,
            // Replaced by a larger one meanwhile.
            Err(error) if error.kind == FailureKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if damaged {
            // Another archiver may have compressed the same WAL otherwise.
            match read_piece(&self.region, &sample.name, &self.context.key).await {
                Err(error) if error.kind == FailureKind::Damaged => {
                    report.findings.push(Finding::Damaged(key));
                }
                Err(error) if error.kind == FailureKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    async fn compare_with(
        &self,
        suspect: &PieceName,
        look: &Look,
        report: &mut Report,
    ) -> Result<(), StoreError> {
        let size = self.context.format.segment_size;
        let key = &self.context.key;
        let theirs = match read_piece(&self.region, suspect, key).await {
            Ok(theirs) => theirs,
            // Removed by who put it there.
            Err(error) if error.kind == FailureKind::NotFound => {
                report.same.push(*suspect);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let (Some(from), Some(to)) = (suspect.start(size), suspect.end(size)) else {
            return Ok(());
        };
        let own = Coverage::new(look.own.iter().copied(), size);
        let ours = read_cover(&self.region, &own, size, key, from, to).await?;
        let length = ours.len().min(theirs.len());
        if ours[..length] != theirs[..length] {
            report.foreign.push(*suspect);
            report.findings.push(Finding::Foreign(suspect.key()));
        } else if length == theirs.len() {
            report.same.push(*suspect);
        }
        Ok(())
    }
}
