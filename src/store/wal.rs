//! WAL in a region: what is listed there, how far it reaches, reading a piece.

use futures_util::{StreamExt, TryStreamExt};

use super::{FailureKind, Region, StoreError};
use crate::repo::{
    Container, ContentHash, ContentKey, Coverage, GAP_FOLDER, PieceMeta, PieceName,
    TIMELINE_FOLDER, TRAILER_GUESS, Trailer, TrailerRead, WAL_FOLDER, log_folder, parse_gap_key,
    parse_history_name, timeline_folder,
};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// Folders listed at once.
const LISTS_AT_ONCE: usize = 16;

/// The pieces of one timeline between two LSNs, with their sizes.
#[derive(Clone, Debug, Default)]
pub struct PieceIndex {
    /// What they cover.
    pub coverage: Coverage,
    /// Stored bytes of all of them.
    pub stored_size: u64,
}

/// How far a region's WAL reaches on a timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontier {
    /// Behind the last byte that follows without a hole.
    pub lsn: Lsn,
    /// Small pieces near the frontier, which a larger one will replace.
    pub recent: Vec<PieceName>,
}

/// The timelines that have WAL in the region, ascending.
///
/// # Errors
/// When the store fails.
pub async fn list_timelines(region: &Region) -> Result<Vec<TimelineId>, StoreError> {
    let (folders, _) = region.list_folder(WAL_FOLDER).await?;
    Ok(folders.iter().filter_map(|name| TimelineId::from_hex8(name)).collect())
}

async fn list_logs(region: &Region, timeline: TimelineId) -> Result<Vec<u32>, StoreError> {
    let (folders, _) = region.list_folder(&timeline_folder(timeline)).await?;
    let number = |name: &String| match name.len() {
        8 => u32::from_str_radix(name, 16).ok(),
        _ => None,
    };
    Ok(folders.iter().filter_map(number).collect())
}

/// All pieces of a timeline that may hold WAL in `[from, to)`; folders are listed in parallel.
///
/// # Errors
/// When the store fails.
pub async fn list_pieces(
    region: &Region,
    timeline: TimelineId,
    size: SegmentSize,
    from: Lsn,
    to: Option<Lsn>,
) -> Result<PieceIndex, StoreError> {
    let first = size.name(timeline, size.segment_of(from)).log;
    let last = to.map_or(u32::MAX, |to| size.name(timeline, size.segment_before(to)).log);
    let logs = list_logs(region, timeline).await?;
    let wanted = logs.into_iter().filter(|log| (first..=last).contains(log));
    let lists: Vec<_> = futures_util::stream::iter(wanted)
        .map(|log| async move { region.list(&log_folder(timeline, log)).await })
        .buffer_unordered(LISTS_AT_ONCE)
        .try_collect()
        .await?;
    let mut stored_size = 0;
    let mut pieces = Vec::new();
    for object in lists.into_iter().flatten() {
        let Some(piece) = PieceName::parse(object.file_name()) else { continue };
        let ends_after = piece.end(size).is_some_and(|end| end > from);
        let begins_before = to.is_none_or(|to| piece.start(size).is_some_and(|start| start < to));
        if ends_after && begins_before {
            stored_size += object.size;
            pieces.push(piece);
        }
    }
    Ok(PieceIndex { coverage: Coverage::new(pieces, size), stored_size })
}

/// Looks up how far the region's WAL reaches on a timeline: the end of the first run without a
/// hole in the newest two folders. Writes go out in the order of the WAL, so only the last few
/// can have left a hole; a recorded gap is stepped over.
///
/// `begin`, where it is known, is where the timeline's WAL must begin: what lies behind a hole at
/// the very beginning does not count.
///
/// # Errors
/// When the store fails.
pub async fn frontier_of(
    region: &Region,
    timeline: TimelineId,
    size: SegmentSize,
    begin: Option<Lsn>,
) -> Result<Option<Frontier>, StoreError> {
    let logs = list_logs(region, timeline).await?;
    let Some(log) = logs.iter().rev().take(2).next_back() else { return Ok(None) };
    let name = crate::wal::SegmentName { timeline, log: *log, segment: 0 };
    let Some(folder_start) = size.number(name).map(|number| size.start_of(number)) else {
        return Ok(None);
    };
    let pieces = list_pieces(region, timeline, size, folder_start, None).await?.coverage;
    let Some(lowest) = pieces.start() else { return Ok(None) };
    let start = begin.filter(|begin| *begin >= folder_start).unwrap_or(lowest);
    let gaps = list_gaps(region).await?;
    let mut lsn = pieces.contiguous_end(start);
    while let Some((_, _, to)) =
        gaps.iter().find(|(tli, from, to)| *tli == timeline && *from <= lsn && lsn < *to)
    {
        lsn = pieces.contiguous_end(*to);
    }
    if lsn == start && lowest > start {
        return Ok(None);
    }
    let near = size.start_of(size.segment_before(lsn));
    let recent = pieces
        .pieces()
        .filter(|piece| piece.start(size).is_some_and(|start| start >= near))
        .copied()
        .collect();
    Ok(Some(Frontier { lsn, recent }))
}

/// The lowest LSN of a timeline that a region holds.
///
/// # Errors
/// When the store fails.
pub async fn lowest_of(
    region: &Region,
    timeline: TimelineId,
    size: SegmentSize,
) -> Result<Option<Lsn>, StoreError> {
    let logs = list_logs(region, timeline).await?;
    let Some(log) = logs.first() else { return Ok(None) };
    let objects = region.list(&log_folder(timeline, *log)).await?;
    let pieces = objects.iter().filter_map(|object| PieceName::parse(object.file_name()));
    Ok(pieces.filter_map(|piece| piece.start(size)).min())
}

/// The gaps recorded in a region.
///
/// # Errors
/// When the store fails.
pub async fn list_gaps(region: &Region) -> Result<Vec<(TimelineId, Lsn, Lsn)>, StoreError> {
    let objects = region.list(GAP_FOLDER).await?;
    let mut gaps: Vec<_> = objects.iter().filter_map(|object| parse_gap_key(&object.key)).collect();
    gaps.sort_unstable();
    Ok(gaps)
}

/// Every history file in the region, parsed and raw. A damaged one is reported and left out: it
/// must not hide the others.
///
/// # Errors
/// When the store fails.
pub async fn list_histories(
    region: &Region,
    key: &ContentKey,
) -> Result<Vec<(TimelineHistory, bytes::Bytes)>, StoreError> {
    let mut histories = Vec::new();
    for object in region.list(TIMELINE_FOLDER).await? {
        let Some((timeline, hash)) = parse_history_name(object.file_name()) else { continue };
        let bytes = region.get(&object.key).await?;
        if key.hash(&bytes).short() != hash {
            let message = "its content does not have the hash in its name";
            tracing::error!("{}", region.damaged(&object.key, message));
            continue;
        }
        match TimelineHistory::parse(timeline, &bytes) {
            Ok(history) => histories.push((history, bytes)),
            Err(error) => tracing::error!("{}", region.damaged(&object.key, error.to_string())),
        }
    }
    histories.sort_by_key(|(history, _)| history.timeline);
    Ok(histories)
}

/// Reads a piece and checks its content against the hash in its name.
///
/// # Errors
/// When it is not there, the store fails, or it is damaged.
pub async fn read_piece(
    region: &Region,
    piece: &PieceName,
    content_key: &ContentKey,
) -> Result<Vec<u8>, StoreError> {
    let bytes = region.get(&piece.key()).await?;
    open_piece(region, piece, content_key, bytes).await
}

/// Reads a piece as it is stored, checked like [`read_piece`].
///
/// # Errors
/// When it is not there, the store fails, or it is damaged.
pub async fn read_piece_object(
    region: &Region,
    piece: &PieceName,
    content_key: &ContentKey,
) -> Result<bytes::Bytes, StoreError> {
    let bytes = region.get(&piece.key()).await?;
    open_piece(region, piece, content_key, bytes.clone()).await?;
    Ok(bytes)
}

async fn open_piece(
    region: &Region,
    piece: &PieceName,
    content_key: &ContentKey,
    bytes: bytes::Bytes,
) -> Result<Vec<u8>, StoreError> {
    let key = piece.key();
    let piece = *piece;
    let content_key = content_key.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let container = Container::open(bytes).map_err(|error| error.to_string())?;
        let metadata = container.trailer().metadata.clone();
        if container.trailer().raw_size() != piece.len() {
            return Err("its length is not the one in its name".to_owned());
        }
        let raw = container.raw().map_err(|error| error.to_string())?;
        let hash: ContentHash = content_key.hash(&raw);
        if raw.len() as u64 != piece.len() || hash.short() != piece.hash {
            return Err("its content does not have the hash in its name".to_owned());
        }
        check_place(&metadata, &piece)?;
        Ok(raw)
    });
    match opened.await {
        Ok(Ok(raw)) => Ok(raw),
        Ok(Err(problem)) => Err(region.damaged(&key, problem)),
        Err(error) => Err(region.error("read", &key, FailureKind::Permanent, error.to_string())),
    }
}

/// The hash covers the content alone: that it is the WAL of this place is in the metadata.
fn check_place(metadata: &[u8], piece: &PieceName) -> Result<(), String> {
    let metadata: PieceMeta =
        serde_json::from_slice(metadata).map_err(|error| format!("its metadata: {error}"))?;
    let size = metadata.wal_segment_size;
    if metadata.timeline != piece.segment.timeline || piece.start(size) != Some(metadata.start) {
        return Err(format!(
            "it holds WAL of another place: timeline {}, from {}",
            metadata.timeline, metadata.start
        ));
    }
    Ok(())
}

/// Reads what a piece says of itself, without its content.
///
/// # Errors
/// When it is not there, the store fails, or its trailer is damaged.
pub async fn piece_metadata(region: &Region, piece: &PieceName) -> Result<PieceMeta, StoreError> {
    let key = piece.key();
    let mut last = TRAILER_GUESS;
    loop {
        let (tail, size) = region.get_tail(&key, last).await?;
        match Trailer::read(&tail, size) {
            Ok(TrailerRead::Done(trailer)) => {
                check_place(&trailer.metadata, piece)
                    .map_err(|error| region.damaged(&key, error))?;
                return serde_json::from_slice(&trailer.metadata)
                    .map_err(|error| region.damaged(&key, format!("its metadata: {error}")));
            }
            Ok(TrailerRead::NeedLast(more)) if more > last => last = more,
            Ok(TrailerRead::NeedLast(_)) => {
                return Err(region.damaged(&key, "its trailer is cut off"));
            }
            Err(error) => return Err(region.damaged(&key, error.to_string())),
        }
    }
}
