//! Where streaming begins: the archive itself is the only memory.
//!
//! The archive's frontier is looked up on the server's timeline, then on its ancestors, never past
//! a fork. So WAL that an old primary never shipped is fetched from the new one, on the old
//! timeline, up to the fork. The start is rounded down to a boundary of pieces, and what the
//! archive already has from there on is compared with what the server sends: a difference is a
//! clone, or a server that lost WAL.

use futures_util::future::join_all;

use super::ArchiveError;
use super::cutter::piece_unit;
use crate::repo::ContentKey;
use crate::store::{
    FailureKind, Region, StoreError, frontier_of, list_pieces, piece_metadata, read_piece,
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
    let size = format.segment_size;
    let unit = piece_unit(format);
    let path = history.path();
    let mut unread = Vec::new();
    for (index, (timeline, begin, end)) in path.iter().enumerate().rev() {
        let begins = (*begin > Lsn::INVALID).then(|| begin.round_down(unit));
        let lookups = regions.iter().map(|region| frontier_of(region, *timeline, size, begins));
        let mut frontier: Option<Lsn> = None;
        unread.clear();
        for lookup in join_all(lookups).await {
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
                StartPoint {
                    timeline: next,
                    lsn: end.round_down(unit),
                    frontier: end.round_down(unit),
                }
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

/// Reads WAL `[from, to)` from whichever region has it, as far as any has.
pub(super) async fn read_archived(
    regions: &[Region],
    timeline: TimelineId,
    format: &WalFormat,
    key: &ContentKey,
    from: Lsn,
    to: Lsn,
) -> Result<Vec<u8>, StoreError> {
    let size = format.segment_size;
    let mut best = Vec::new();
    let mut failure = None;
    for region in regions {
        let outcome = async {
            let found = list_pieces(region, timeline, size, from, Some(to)).await?;
            let mut wal = Vec::new();
            for part in found.coverage.cover(from, to) {
                let raw = read_piece(region, &part.piece, key).await?;
                let start = part.piece.start(size).unwrap_or(part.from);
                let skip = part.from.bytes_since(start) as usize;
                let length = part.to.bytes_since(part.from) as usize;
                wal.extend_from_slice(&raw[skip..skip + length]);
            }
            Ok::<_, StoreError>(wal)
        };
        match outcome.await {
            Ok(wal) if wal.len() as u64 == to.bytes_since(from) => return Ok(wal),
            Ok(wal) if wal.len() > best.len() => best = wal,
            Ok(_) => {}
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) if best.is_empty() && to > from => Err(error),
        _ => Ok(best),
    }
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
    let Some(open) = open_record_before(regions, timeline, format, start).await else {
        return fresh;
    };
    let from = open.round_down(WAL_PAGE_SIZE);
    let wal = read_archived(regions, timeline, format, key, from, start).await.unwrap_or_default();
    let mut scanner = Scanner::new(*format, from);
    let mut ignored = ScanSummary::default();
    let fed = scanner.feed(&wal, &mut ignored, &mut |_| ());
    if fed.is_ok() && scanner.position() == start { scanner } else { fresh }
}

/// Where the record begins that goes on at `start`, as the piece before it says.
async fn open_record_before(
    regions: &[Region],
    timeline: TimelineId,
    format: &WalFormat,
    start: Lsn,
) -> Option<Lsn> {
    let size = format.segment_size;
    let before = Lsn(start.0.checked_sub(1)?);
    for region in regions {
        let Ok(found) = list_pieces(region, timeline, size, before, Some(start)).await else {
            continue;
        };
        let parts = found.coverage.cover(before, start);
        let Some(part) = parts.last() else { continue };
        if part.piece.end(size) != Some(start) {
            continue;
        }
        if let Ok(metadata) = piece_metadata(region, &part.piece).await {
            return metadata.wal.open_record;
        }
    }
    None
}

/// Whether a failure to look something up means that the object is not there.
pub(super) fn is_missing(error: &StoreError) -> bool {
    error.kind == FailureKind::NotFound
}
