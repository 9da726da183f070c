//! WAL: folder by folder in its own order, so that a crash leaves the target whole up to some point
//! and memory does not grow with the archive.

use std::collections::{BTreeMap, BTreeSet};
use std::future::ready;

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::object::Listings;
use super::plan::{contained, end_of, missing_pieces, subtract, suspects};
use super::{
    CHECKS_AT_ONCE, COPIES_AT_ONCE, DamageOutcome, FailureKind, ObjectKind, StoreError, WalHole,
    Work,
};
use crate::repo::{Container, Coverage, PieceName, log_folder, parse_index_name};
use crate::store::wal::list_logs;
use crate::store::{list_gaps, list_timelines, read_piece_object};
use crate::wal::{Lsn, TimelineId};

/// Folders listed ahead of the one being copied.
const FOLDERS_AHEAD: usize = 4;

/// What lies in one folder, by region; nothing of regions that take no part.
struct Folder {
    timeline: TimelineId,
    pieces: Vec<BTreeMap<PieceName, u64>>,
    roll_ups: Listings,
}

/// How far a timeline has been looked at.
struct Line {
    timeline: TimelineId,
    /// Behind the last WAL that any region has in the folders before.
    reached: Option<Lsn>,
    gaps: Vec<(Lsn, Lsn)>,
}

/// What reading a piece for the target came to.
enum Read {
    Object(Bytes),
    Nowhere,
    Diverged,
}

impl Work<'_> {
    /// Copies the WAL that the target lacks.
    pub(super) async fn repair_wal(&self, target: usize, deep: bool) -> Result<(), StoreError> {
        let lists = self.ask(target, |region| async move { list_timelines(&region).await }).await?;
        let timelines: BTreeSet<_> = lists.into_iter().flatten().flatten().collect();
        let lists = self.ask(target, |region| async move { list_gaps(&region).await }).await?;
        let gaps: BTreeSet<_> = lists.into_iter().flatten().flatten().collect();
        for timeline in timelines {
            let here = gaps.iter().filter(|gap| gap.0 == timeline).map(|gap| (gap.1, gap.2));
            let mut line = Line { timeline, reached: None, gaps: here.collect() };
            let lists = self
                .ask(target, |region| async move { list_logs(&region, timeline).await })
                .await?;
            let logs: BTreeSet<u32> = lists.into_iter().flatten().flatten().collect();
            let mut folders = stream::iter(logs)
                .map(|log| self.list_folder(target, timeline, log))
                .buffered(FOLDERS_AHEAD);
            while let Some(folder) = folders.next().await {
                self.repair_folder(target, &folder?, &mut line, deep).await?;
            }
        }
        Ok(())
    }

    async fn list_folder(
        &self,
        target: usize,
        timeline: TimelineId,
        log: u32,
    ) -> Result<Folder, StoreError> {
        let mut folder = Folder { timeline, pieces: Vec::new(), roll_ups: Vec::new() };
        for list in self.list(target, &log_folder(timeline, log)).await? {
            let mut pieces = BTreeMap::new();
            let mut roll_ups = BTreeMap::new();
            for (key, size) in list {
                let name = key.rsplit('/').next().unwrap_or(&key);
                if let Some(piece) = PieceName::parse(name).filter(|piece| piece.key() == key) {
                    if piece.start(self.lineage.wal_segment_size).is_some() {
                        pieces.insert(piece, size);
                    }
                } else if parse_index_name(name).is_some() {
                    roll_ups.insert(key, size);
                }
            }
            folder.pieces.push(pieces);
            folder.roll_ups.push(roll_ups);
        }
        Ok(folder)
    }

    /// The pieces of a region that are not known to be damaged.
    fn good(&self, folder: &Folder, region: usize) -> Vec<PieceName> {
        let pieces = folder.pieces[region].keys();
        pieces.filter(|piece| !self.ledger.is_damaged(region, &piece.key())).copied().collect()
    }

    fn others(&self, folder: &Folder, target: usize) -> Vec<PieceName> {
        self.sources(target).flat_map(|source| self.good(folder, source)).collect()
    }

    async fn repair_folder(
        &self,
        target: usize,
        folder: &Folder,
        line: &mut Line,
        deep: bool,
    ) -> Result<(), StoreError> {
        let size = self.lineage.wal_segment_size;
        self.check_pieces(target, folder, deep).await?;
        let have = self.good(folder, target);
        let mut others = self.others(folder, target);
        let all = Coverage::new(have.iter().chain(&others).copied(), size);
        if let Some(met) = all.divergence(Lsn(0)) {
            let from = met.one.start(size).unwrap_or_default();
            self.ledger.diverge(folder.timeline, from, met.to_string());
        }
        self.note_holes(&all, line);
        let limit = self.ledger.diverged_from(folder.timeline).unwrap_or(Lsn(u64::MAX));
        others.retain(|piece| piece.end(size).is_some_and(|end| end <= limit));
        let mut wanted = missing_pieces(&have, &others, size);
        let damaged: Vec<PieceName> = folder.pieces[target]
            .keys()
            .filter(|piece| self.ledger.is_damaged(target, &piece.key()))
            .copied()
            .collect();
        wanted.extend(damaged.iter().filter(|piece| others.contains(piece)));
        wanted.sort_by_key(|piece| (piece.start(size), std::cmp::Reverse(piece.to)));
        wanted.dedup();
        self.copy_pieces(target, folder, &wanted).await?;
        let after = Coverage::new(have.into_iter().chain(wanted.iter().copied()), size);
        for piece in damaged.iter().filter(|piece| !wanted.contains(piece)) {
            let (from, to) = (piece.start(size).unwrap_or_default(), piece.end(size));
            let covered = to.is_some_and(|to| after.contiguous_end(from) >= to)
                && after.holes(from, to.unwrap_or(from)).is_empty();
            let outcome = if covered { DamageOutcome::Covered } else { DamageOutcome::Lost };
            self.ledger.outcome(target, &piece.key(), outcome);
        }
        self.repair_roll_ups(target, &folder.roll_ups, deep).await
    }

    /// Notes WAL between other WAL that no region has.
    fn note_holes(&self, all: &Coverage, line: &mut Line) {
        let Some(end) = end_of(all, self.lineage.wal_segment_size) else { return };
        let from = line.reached.or(all.start()).unwrap_or(end);
        for hole in all.holes(from, end) {
            for (from, to) in subtract(hole, &line.gaps) {
                self.ledger.hole(WalHole { timeline: line.timeline, from, to });
            }
        }
        line.reached = Some(end);
    }

    /// Reads what may be damaged in the target, or all of it.
    async fn check_pieces(
        &self,
        target: usize,
        folder: &Folder,
        all: bool,
    ) -> Result<(), StoreError> {
        let mine = &folder.pieces[target];
        let others: Vec<_> = self.sources(target).map(|source| &folder.pieces[source]).collect();
        let names: Vec<&PieceName> =
            if all { mine.keys().collect() } else { suspects(mine, &others) };
        let unknown = |piece: &&PieceName| {
            let key = piece.key();
            !self.ledger.is_verified(target, &key) && !self.ledger.is_damaged(target, &key)
        };
        let mut reads = stream::iter(names.into_iter().filter(unknown))
            .map(|piece| async move {
                (piece.key(), read_piece_object(&self.regions[target], piece, &self.key).await)
            })
            .buffer_unordered(CHECKS_AT_ONCE);
        while let Some((key, read)) = reads.next().await {
            match read {
                Ok(bytes) => self.ledger.verified(target, &key, bytes.len() as u64),
                Err(error) if error.kind == FailureKind::Damaged => {
                    self.ledger.damage(target, &key, &error.message);
                }
                // Replaced by a larger one meanwhile.
                Err(error) if error.kind == FailureKind::NotFound => self.ledger.unsettle(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copies pieces in the order of the WAL; nothing behind one that belongs to another history.
    async fn copy_pieces(
        &self,
        target: usize,
        folder: &Folder,
        wanted: &[PieceName],
    ) -> Result<(), StoreError> {
        let stored = |piece: &PieceName| {
            self.sources(target).filter_map(|s| folder.pieces[s].get(piece)).max().copied()
        };
        if self.options.dry_run {
            for piece in wanted {
                self.ledger.copied(target, ObjectKind::Wal, stored(piece).unwrap_or(0));
            }
            return Ok(());
        }
        self.progress.add_total(wanted.iter().filter_map(stored).sum());
        let mut copies = stream::iter(wanted)
            .map(|piece| async move { (piece, self.read_piece(target, folder, piece).await) })
            .buffered(COPIES_AT_ONCE)
            .take_while(|(_, read)| ready(!matches!(read, Read::Diverged)))
            .map(|(piece, read)| async move {
                match read {
                    Read::Object(bytes) => {
                        self.write(target, ObjectKind::Wal, &piece.key(), bytes).await
                    }
                    _ => {
                        self.lack(target, piece);
                        Ok(())
                    }
                }
            })
            .buffered(COPIES_AT_ONCE);
        while let Some(copied) = copies.next().await {
            copied?;
        }
        Ok(())
    }

    fn lack(&self, target: usize, piece: &PieceName) {
        let size = self.lineage.wal_segment_size;
        let from = piece.start(size).unwrap_or_default();
        let to = piece.end(size).unwrap_or(from);
        self.ledger.wal_lacking(target, piece.segment.timeline, from, to);
        self.ledger.lacking(target, format!("{}: no source could give it", piece.key()));
    }

    /// Reads a piece from whichever source has a good copy, and compares it with the smaller pieces
    /// in it that any region has: their names tell what its bytes must be.
    async fn read_piece(&self, target: usize, folder: &Folder, piece: &PieceName) -> Read {
        let key = piece.key();
        let holders = self.sources(target).filter(|s| folder.pieces[*s].contains_key(piece));
        for source in holders {
            if self.ledger.is_damaged(source, &key) {
                continue;
            }
            let object = match read_piece_object(&self.regions[source], piece, &self.key).await {
                Ok(object) => object,
                Err(error) => {
                    self.source_failed(source, &key, &error);
                    continue;
                }
            };
            let inside = contained(piece, &self.good(folder, target));
            let Some(other) = self.other_history(piece, object.clone(), inside).await else {
                return Read::Object(object);
            };
            let size = self.lineage.wal_segment_size;
            let from = other.start(size).unwrap_or_default();
            let what = format!("{piece} and {other} hold different WAL for the same range");
            self.ledger.diverge(folder.timeline, from, what);
            return Read::Diverged;
        }
        Read::Nowhere
    }

    /// The first of the smaller pieces whose content is not part of the larger one's.
    async fn other_history(
        &self,
        piece: &PieceName,
        object: Bytes,
        inside: Vec<PieceName>,
    ) -> Option<PieceName> {
        if inside.is_empty() {
            return None;
        }
        let (key, piece) = (self.key.clone(), *piece);
        let compared = tokio::task::spawn_blocking(move || {
            let raw = Container::open(object).ok()?.raw().ok()?;
            inside.into_iter().find(|other| {
                let range = (other.from - piece.from) as usize..(other.to - piece.from) as usize;
                raw.get(range).is_none_or(|bytes| key.hash(bytes).short() != other.hash)
            })
        });
        compared.await.ok().flatten()
    }
}
