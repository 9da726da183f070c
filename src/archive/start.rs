//! Where streaming begins: the archive itself is the only memory.
//!
//! The archive's frontier is looked up on the server's timeline, then on its ancestors, never past
//! a fork. So WAL that an old primary never shipped is fetched from the new one, on the old
//! timeline, up to the fork. The start is rounded down to a boundary of pieces, and what each
//! region already has from there on is compared with what the server sends: a difference is a
//! clone, or a server that lost WAL.

use super::cutter::piece_unit;
use super::{ArchiveError, Overlap};
use crate::repo::ContentKey;
use crate::store::{
    FailureKind, Region, StoreError, ask_all, frontier_of, list_pieces, piece_metadata, read_wal,
};
use crate::wal::{
    Lsn, ScanSummary, Scanner, TimelineHistory, TimelineId, WAL_PAGE_SIZE, WalFormat,
};

/// Where to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StartPoint {
    /// On this timeline.
    pub(super) timeline: TimelineId,
    /// At this boundary of pieces.
    pub(super) lsn: Lsn,
    /// Up to here the archive has WAL already.
    pub(super) frontier: Lsn,
}

/// What the regions say about where to begin.
#[derive(Debug)]
pub(super) struct StartLookup {
    /// The place, unless the archive is empty.
    pub(super) point: Option<StartPoint>,
    /// Regions that could not be asked.
    pub(super) unread: Vec<StoreError>,
}

/// Finds where the archive ends on the path of the server's timeline.
///
/// # Errors
/// When no region can be asked.
pub(super) async fn find_start(
    regions: &[Region],
    history: &TimelineHistory,
    format: &WalFormat,
) -> Result<StartLookup, ArchiveError> {
    // An archive that began after a fork has nothing at the begin of that timeline: then the lowest
    // WAL that is there counts as its begin.
    let lookup = find_start_from(regions, history, format, true).await?;
    match lookup.point {
        Some(_) => Ok(lookup),
        None => find_start_from(regions, history, format, false).await,
    }
}

async fn find_start_from(
    regions: &[Region],
    history: &TimelineHistory,
    format: &WalFormat,
    at_forks: bool,
) -> Result<StartLookup, ArchiveError> {
    let size = format.segment_size;
    let unit = piece_unit(format);
    let path = history.path();
    let mut unread = Vec::new();
    for (index, (timeline, begin, end)) in path.iter().enumerate().rev() {
        let begins = (at_forks && *begin > Lsn::INVALID).then(|| begin.round_down(unit));
        let lookups = ask_all(regions, |region| async move {
            frontier_of(&region, *timeline, size, begins).await
        });
        let mut frontier: Option<Lsn> = None;
        unread.clear();
        for lookup in lookups.await {
            match lookup {
                Ok(found) => frontier = frontier.max(found.map(|found| found.lsn)),
                Err(error) => unread.push(error),
            }
        }
        if unread.len() == regions.len() {
            return Err(ArchiveError::NoRegion(unread));
        }
        let Some(frontier) = frontier else { continue };
        // WAL past the fork belongs to another history.
        let frontier = end.map_or(frontier, |end| frontier.min(end));
        let point = match end {
            Some(end) if frontier >= *end => {
                let next = path[index + 1].0;
                let lsn = end.round_down(unit);
                StartPoint { timeline: next, lsn, frontier: lsn }
            }
            _ => {
                let lsn = frontier.max(*begin).round_down(unit);
                StartPoint { timeline: *timeline, lsn, frontier }
            }
        };
        return Ok(StartLookup { point: Some(point), unread });
    }
    Ok(StartLookup { point: None, unread })
}

/// What each region holds from the start on, to be compared with what the server sends; `None` for
/// a region that is silent, or whose copy is damaged: the server sends it again.
///
/// # Errors
/// When nothing could be read of what the archive has there: a clone would go unnoticed.
pub(super) async fn read_overlaps(
    regions: &[Region],
    point: &StartPoint,
    format: &WalFormat,
    key: &ContentKey,
) -> Result<Vec<Option<Overlap>>, ArchiveError> {
    let size = format.segment_size;
    let (timeline, start) = (point.timeline, point.lsn);
    // Nothing behind the furthest frontier counts, but a clone may have left it there.
    let end = start.advance(piece_unit(format));
    let reads = ask_all(regions, |region| async move {
        let wal = read_wal(&region, timeline, size, key, start, end).await?;
        Ok(Overlap { region: region.name().to_owned(), start, wal })
    });
    let mut silent = Vec::new();
    let told = |read: Result<Overlap, StoreError>| match read {
        Ok(overlap) => Some(overlap),
        Err(error) if error.kind == FailureKind::Damaged => {
            tracing::error!("{error}");
            None
        }
        Err(error) => {
            silent.push(error);
            None
        }
    };
    let overlaps: Vec<_> = reads.await.into_iter().map(told).collect();
    let has_any = overlaps.iter().flatten().any(|overlap| !overlap.wal.is_empty());
    if point.frontier > start && !has_any && !silent.is_empty() {
        return Err(ArchiveError::NoRegion(silent));
    }
    Ok(overlaps)
}

/// A scanner that stands at `start` and knows the record that goes on there, if the archive has
/// its beginning.
pub(super) async fn seeded_scanner(
    regions: &[Region],
    timeline: TimelineId,
    format: &WalFormat,
    key: &ContentKey,
    start: Lsn,
) -> Scanner {
    let fresh = Scanner::new(*format, start);
    let seeds = ask_all(regions, |region| async move {
        let Some(open) = open_record_before(&region, timeline, format, start).await? else {
            return Ok(None);
        };
        let from = open.round_down(WAL_PAGE_SIZE);
        let wal = read_wal(&region, timeline, format.segment_size, key, from, start).await?;
        Ok(Some((from, wal)))
    });
    for (from, wal) in seeds.await.into_iter().flatten().flatten() {
        let mut scanner = Scanner::new(*format, from);
        let mut ignored = ScanSummary::default();
        let fed = scanner.feed(&wal, &mut ignored, &mut |_| ());
        if fed.is_ok() && scanner.position() == start {
            return scanner;
        }
    }
    fresh
}

/// Where the record begins that goes on at `start`, as the piece before it says.
async fn open_record_before(
    region: &Region,
    timeline: TimelineId,
    format: &WalFormat,
    start: Lsn,
) -> Result<Option<Lsn>, StoreError> {
    let size = format.segment_size;
    let Some(before) = start.0.checked_sub(1).map(Lsn) else { return Ok(None) };
    let found = list_pieces(region, timeline, size, before, Some(start)).await?;
    let parts = found.coverage.cover(before, start);
    let Some(part) = parts.last().filter(|part| part.piece.end(size) == Some(start)) else {
        return Ok(None);
    };
    Ok(piece_metadata(region, &part.piece).await?.wal.open_record)
}

/// Whether a failure to look something up means that the object is not there.
pub(super) fn is_missing(error: &StoreError) -> bool {
    error.kind == FailureKind::NotFound
}
