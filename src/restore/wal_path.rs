//! The WAL along a path of timelines: how far it reaches, and where a target lies in it.

use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};

use super::plan::PathPart;
use super::target::Target;
use crate::repo::{BackupInfo, CoverPart, Coverage, Divergence, PieceMeta, PieceName};
use crate::store::{Catalog, ReadError, Regions, piece_metadata, read_piece};
use crate::wal::{
    Event, EventKind, Lsn, ScanSummary, Scanner, TimelineHistory, TimelineId, WAL_PAGE_SIZE,
    WalFormat,
};

/// Metadata read at once.
const READS_AT_ONCE: usize = 16;

/// Commits this much older than a target prove that nothing older can lie behind it.
const TIME_DISORDER: chrono::Duration = chrono::Duration::hours(1);

/// A target as PostgreSQL is told, with the moment that is reached; or why it cannot be reached.
type Resolved = Result<(Target, Option<DateTime<Utc>>), String>;

struct Part {
    timeline: TimelineId,
    begin: Lsn,
    /// The fork; `None` on the last timeline.
    fork: Option<Lsn>,
    coverage: Coverage,
}

/// The WAL that a recovery finds, from a backup's start on.
pub(super) struct WalPath {
    parts: Vec<Part>,
    end: Lsn,
    hole: Option<(Lsn, Lsn)>,
}

impl WalPath {
    /// Lists the WAL from `from` on `timeline` to the end of the path.
    pub(super) async fn read(
        catalog: &Catalog,
        history: &TimelineHistory,
        timeline: TimelineId,
        from: Lsn,
    ) -> Result<WalPath, ReadError> {
        let mut parts = Vec::new();
        for (on_path, begin, fork) in history.path() {
            if on_path < timeline {
                continue;
            }
            let begin = begin.max(from);
            let (coverage, _) = catalog.coverage(on_path, begin, fork).await?;
            parts.push(Part { timeline: on_path, begin, fork, coverage });
        }
        let mut path = WalPath { parts, end: from, hole: None };
        path.measure(from);
        Ok(path)
    }

    /// Finds the end of the WAL that follows without a hole. What lies before a fork may be taken
    /// from the newer timeline, whose first segment begins with a copy of it.
    fn measure(&mut self, from: Lsn) {
        let mut at = from;
        for (index, part) in self.parts.iter().enumerate() {
            let own = part.coverage.contiguous_end(at);
            let next = self.parts.get(index + 1).map(|next| next.coverage.contiguous_end(own));
            let reached = match part.fork {
                None => own,
                Some(fork) => own.max(next.unwrap_or(own)).min(fork),
            };
            at = at.max(reached);
            if part.fork.is_some_and(|fork| at < fork) {
                self.hole = part.fork.map(|fork| (at, fork));
                break;
            }
            if part.fork.is_none() {
                let after = part.coverage.pieces().last().copied();
                let later = part.coverage.holes(at, Lsn(u64::MAX));
                let beyond = later.first().filter(|(_, to)| *to < Lsn(u64::MAX));
                self.hole = beyond.copied().filter(|_| after.is_some());
            }
        }
        self.end = at;
    }

    pub(super) fn end(&self) -> Lsn {
        self.end
    }

    /// The first hole, if WAL follows behind it.
    pub(super) fn hole(&self) -> Option<(Lsn, Lsn)> {
        self.hole
    }

    pub(super) fn divergence(&self) -> Option<Divergence> {
        self.parts.iter().find_map(|part| part.coverage.divergence(part.begin))
    }

    /// The path up to an LSN.
    pub(super) fn parts_until(&self, until: Lsn) -> Vec<PathPart> {
        let mut path = Vec::new();
        for part in &self.parts {
            let end = part.fork.map_or(until, |fork| fork.min(until));
            path.push(PathPart { timeline: part.timeline, begin: part.begin, end });
        }
        path
    }

    /// The pieces along the path, in order.
    fn pieces(&self) -> Vec<CoverPart> {
        let mut pieces = Vec::new();
        for part in &self.parts {
            let to = part.fork.unwrap_or(self.end).min(self.end);
            pieces.extend(part.coverage.cover(part.begin, to));
        }
        pieces
    }

    /// The pieces along the path up to an LSN.
    pub(super) fn pieces_until(&self, until: Lsn) -> Vec<PieceName> {
        self.pieces().iter().filter(|part| part.from < until).map(|part| part.piece).collect()
    }

    /// What the pieces say of themselves, in the order given.
    async fn metadata(
        catalog: &Catalog,
        pieces: &[CoverPart],
    ) -> Result<Vec<PieceMeta>, ReadError> {
        let reads = pieces.iter().map(|part| read_metadata(catalog.regions.clone(), part.piece));
        let reads: Vec<_> = reads.collect();
        futures_util::stream::iter(reads).buffered(READS_AT_ONCE).try_collect().await
    }

    /// The newest metadata for which `wanted` gives something, looking backwards.
    async fn search_back<T>(
        &self,
        catalog: &Catalog,
        wanted: impl Fn(&PieceMeta) -> Option<T>,
    ) -> Result<Option<T>, ReadError> {
        for chunk in self.pieces().rchunks(READS_AT_ONCE) {
            let metadata = Self::metadata(catalog, chunk).await?;
            if let Some(found) = metadata.iter().rev().find_map(&wanted) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The last moment of which the archive knows: of a commit, or an archiver's last word.
    pub(super) async fn last_time(
        &self,
        catalog: &Catalog,
        after: Lsn,
    ) -> Result<Option<DateTime<Utc>>, ReadError> {
        let commit = self
            .search_back(catalog, |meta| match meta.wal.max_time {
                // Before the backup's end: nothing was committed since.
                None if meta.end <= after => Some(None),
                None => None,
                time => Some(time),
            })
            .await?;
        Ok(commit.flatten().max(self.last_word(catalog)))
    }

    /// The last moment at which an archiver said that the archive has all WAL up to here.
    fn last_word(&self, catalog: &Catalog) -> Option<DateTime<Utc>> {
        let timeline = self.parts.last()?.timeline;
        let whole = catalog.alive.iter().filter(|alive| {
            alive.timeline == timeline
                && alive.durable_lsn >= alive.wal_end
                && self.end >= alive.wal_end
        });
        whole.map(|alive| alive.server_time).max()
    }

    /// Where the last record of the WAL begins.
    pub(super) async fn last_record(&self, catalog: &Catalog) -> Result<Option<Lsn>, ReadError> {
        let last = self.search_back(catalog, |meta| meta.wal.last_record).await?;
        // The last piece may reach past a fork.
        Ok(last.filter(|last| *last < self.end))
    }

    /// The end of the backup is noticed with the next record: without one it is the end of the WAL.
    pub(super) async fn resolve_immediate(
        &self,
        catalog: &Catalog,
        info: &BackupInfo,
    ) -> Result<Resolved, ReadError> {
        let last = self.last_record(catalog).await?;
        let follows = last.is_some_and(|last| last >= info.stop_lsn);
        let target = if follows { Target::Immediate } else { Target::End };
        Ok(Ok((target, Some(info.stop_time))))
    }

    /// An LSN is reached by the first record that begins there or later: there must be one.
    pub(super) async fn resolve_lsn(
        &self,
        catalog: &Catalog,
        lsn: Lsn,
    ) -> Result<Resolved, ReadError> {
        if lsn > self.end {
            return Ok(Err(format!("the WAL ends at {}", self.end)));
        }
        let last = self.last_record(catalog).await?;
        let at_end = last.is_none_or(|last| lsn > last);
        Ok(Ok((if at_end { Target::End } else { Target::Lsn(lsn) }, None)))
    }

    /// A time is reached by the first commit or abort after it: without one, PostgreSQL would
    /// stop with FATAL at the end, although the end is the state that was asked for.
    pub(super) async fn resolve_time(
        &self,
        catalog: &Catalog,
        time: DateTime<Utc>,
        info: &BackupInfo,
        exclusive: bool,
    ) -> Result<Resolved, ReadError> {
        let later = |moment: DateTime<Utc>| if exclusive { moment >= time } else { moment > time };
        let found = self
            .search_back(catalog, |meta| {
                let hit = meta.wal.max_time.is_some_and(later);
                // Times in WAL go back a little, never by hours.
                let long_before = meta.wal.max_time.is_some_and(|max| time - max > TIME_DISORDER);
                let far_before = meta.end <= info.stop_lsn || long_before;
                if hit || far_before { Some(hit) } else { None }
            })
            .await?;
        if found == Some(true) {
            return Ok(Ok((Target::Time(time), Some(time))));
        }
        if let Some((from, to)) = self.hole {
            return Ok(Err(format!("the WAL has a hole from {from} to {to}")));
        }
        let last = self.last_time(catalog, info.stop_lsn).await?;
        if last.is_some_and(|last| time <= last) {
            return Ok(Ok((Target::End, Some(time))));
        }
        let last = last.unwrap_or(info.stop_time).format("%Y-%m-%d %H:%M:%S%.6f UTC");
        Ok(Err(format!(
            "the archive knows nothing after {last}; the latest moment is {last} (or leave the target out to recover to the end)"
        )))
    }

    pub(super) async fn resolve_xid(
        &self,
        catalog: &Catalog,
        xid: u32,
        after: Lsn,
    ) -> Result<Resolved, ReadError> {
        let pieces = self.pieces();
        for chunk in pieces.rchunks(READS_AT_ONCE) {
            let metadata = Self::metadata(catalog, chunk).await?;
            for (index, meta) in metadata.iter().enumerate().rev() {
                let (Some(min), Some(max)) = (meta.wal.min_xid, meta.wal.max_xid) else { continue };
                if !(min..=max).contains(&xid) {
                    continue;
                }
                let found = self.find_xid(catalog, &chunk[index], xid).await?;
                // Past the fork it belongs to another history.
                let Some(event) = found.filter(|event| event.lsn < chunk[index].to) else {
                    continue;
                };
                return Ok(match (event.lsn >= after, event.kind) {
                    (true, EventKind::Commit { time, .. } | EventKind::Abort { time, .. }) => {
                        Ok((Target::Xid(xid), Some(time)))
                    }
                    _ => Err(format!("it ended at {}, before the backup did", event.lsn)),
                });
            }
        }
        Ok(Err(format!("the WAL from {} to {} does not end it", after, self.end)))
    }

    /// Decodes one piece, with what precedes it for a record that begins there.
    async fn find_xid(
        &self,
        catalog: &Catalog,
        part: &CoverPart,
        xid: u32,
    ) -> Result<Option<Event>, ReadError> {
        let format = WalFormat {
            major: catalog.lineage.postgres_major,
            segment_size: catalog.lineage.wal_segment_size,
            system_id: catalog.lineage.system_id(),
        };
        let key = crate::repo::ContentKey::for_system(format.system_id);
        let pieces = self.pieces();
        let position = pieces.iter().position(|other| other.piece == part.piece).unwrap_or(0);
        // The scanner needs a page to begin with, before the record that goes on into the piece.
        let on_page = |part: &CoverPart| {
            part.piece.start(format.segment_size).is_some_and(|start| start.0 % WAL_PAGE_SIZE == 0)
        };
        let first = (0..position).rev().find(|index| on_page(&pieces[*index])).unwrap_or(0);
        let start = pieces[first].piece.start(format.segment_size).unwrap_or(pieces[first].from);
        let mut scanner = Scanner::new(format, start);
        let mut found = None;
        for part in &pieces[first..=position] {
            let (piece, key) = (part.piece, key.clone());
            let raw = catalog
                .regions
                .read_first(|region| {
                    let key = key.clone();
                    async move { read_piece(&region, &piece, &key).await }
                })
                .await?;
            let start = piece.start(format.segment_size).unwrap_or(part.from);
            let skip = scanner.position().bytes_since(start) as usize;
            let mut ignored = ScanSummary::default();
            let mut look = |event: &Event| {
                if let EventKind::Commit { xid: x, .. } | EventKind::Abort { xid: x, .. } =
                    event.kind
                    && x == xid
                {
                    found = Some(event.clone());
                }
            };
            if scanner.feed(raw.get(skip..).unwrap_or_default(), &mut ignored, &mut look).is_err() {
                break;
            }
        }
        Ok(found)
    }

    /// PostgreSQL stops at the first restore point of that name; the last one is meant.
    pub(super) async fn resolve_name(
        &self,
        catalog: &Catalog,
        name: &str,
        after: Lsn,
    ) -> Result<Resolved, ReadError> {
        let pieces = self.pieces();
        let metadata = Self::metadata(catalog, &pieces).await?;
        // Past a fork they belong to another history.
        let events = metadata
            .iter()
            .zip(&pieces)
            .flat_map(|(meta, part)| meta.wal.events.iter().filter(|event| event.lsn < part.to));
        let mut points = events.filter_map(|event| match &event.kind {
            EventKind::RestorePoint { name: other, time } if other == name => {
                Some((event.lsn, *time))
            }
            _ => None,
        });
        let first = points.next();
        let others = points.count();
        Ok(match first {
            None => Err(format!("there is none of that name from {after} to {}", self.end)),
            Some((lsn, _)) if lsn < after => {
                Err(format!("it lies at {lsn}, before the backup ended"))
            }
            Some((lsn, time)) => {
                if others > 0 {
                    tracing::warn!(
                        "{others} more restore points have that name; PostgreSQL stops at the first, {lsn}"
                    );
                }
                Ok((Target::Name(name.to_owned()), Some(time)))
            }
        })
    }
}

async fn read_metadata(regions: Regions, piece: PieceName) -> Result<PieceMeta, ReadError> {
    regions.read_first(|region| async move { piece_metadata(&region, &piece).await }).await
}
