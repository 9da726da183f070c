//! WAL in a region: what is listed there, how far it reaches, reading a piece.

use futures_util::{StreamExt, TryStreamExt};

use super::{FailureKind, Region, StoreError};
use crate::repo::{
    Container, ContentHash, ContentKey, Coverage, GAP_FOLDER, PieceMeta, PieceName,
    TIMELINE_FOLDER, TRAILER_GUESS, Trailer, TrailerRead, WAL_FOLDER, log_folder, parse_gap_key,
    parse_history_name, parse_index_name, timeline_folder,
};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// Folders that are looked at for a hole: at least two, and more while none is rolled up.
const FOLDERS_LOOKED_AT: usize = 8;
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
    /// All pieces in the newest folders: larger ones among them replace smaller ones.
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

pub(super) async fn list_logs(
    region: &Region,
    timeline: TimelineId,
) -> Result<Vec<u32>, StoreError> {
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
/// hole in the newest folders, back to one that was rolled up and so was whole. Writes go out in
/// the order of the WAL, so only the last few can have left a hole; a recorded gap is stepped over.
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
    let mut pieces: Vec<PieceName> = Vec::new();
    let mut folder_start = Lsn(u64::MAX);
    for (age, log) in logs.iter().rev().take(FOLDERS_LOOKED_AT).enumerate() {
        let name = SegmentName { timeline, log: *log, segment: 0 };
        let Some(number) = size.number(name) else { break };
        folder_start = size.start_of(number);
        let listed = region.list(&log_folder(timeline, *log)).await?;
        pieces.extend(listed.iter().filter_map(|object| PieceName::parse(object.file_name())));
        let is_whole = listed.iter().any(|object| parse_index_name(object.file_name()).is_some());
        if age > 0 && is_whole {
            break;
        }
    }
    let pieces = Coverage::new(pieces, size);
    // A gap may be all that is known of a timeline: WAL that was removed before any was stored.
    let lowest = pieces.start();
    let begins = begin.filter(|begin| lowest.is_none() || *begin >= folder_start);
    let Some(start) = begins.or(lowest) else { return Ok(None) };
    let gaps = list_gaps(region).await?;
    let mut lsn = pieces.contiguous_end(start);
    while let Some((_, _, to)) =
        gaps.iter().find(|(tli, from, to)| *tli == timeline && *from <= lsn && lsn < *to)
    {
        lsn = pieces.contiguous_end(*to);
    }
    if lsn == start && lowest.is_none_or(|lowest| lowest > start) {
        return Ok(None);
    }
    Ok(Some(Frontier { lsn, recent: pieces.pieces().copied().collect() }))
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
    let object = bytes.clone();
    // Frame by frame: the whole content is never held.
    with_piece(region, piece, bytes, {
        let (piece, key) = (*piece, content_key.clone());
        move |container| {
            let mut hasher = key.hasher();
            let mut length = 0;
            for index in 0..container.trailer().frames.len() {
                let frame = container.frame(index).map_err(|error| error.to_string())?;
                hasher.update(&frame);
                length += frame.len() as u64;
            }
            check_content(&piece, length, hasher.finish())
        }
    })
    .await?;
    Ok(object)
}

async fn open_piece(
    region: &Region,
    piece: &PieceName,
    content_key: &ContentKey,
    bytes: bytes::Bytes,
) -> Result<Vec<u8>, StoreError> {
    let (name, key) = (*piece, content_key.clone());
    with_piece(region, piece, bytes, move |container| {
        let raw = container.raw().map_err(|error| error.to_string())?;
        check_content(&name, raw.len() as u64, key.hash(&raw))?;
        Ok(raw)
    })
    .await
}

fn check_content(piece: &PieceName, length: u64, hash: ContentHash) -> Result<(), String> {
    if length == piece.len() && hash.short() == piece.hash {
        return Ok(());
    }
    Err("its content does not have the hash in its name".to_owned())
}

/// Opens an object as a piece, away from the runtime's threads; its place is checked.
async fn with_piece<T: Send + 'static>(
    region: &Region,
    piece: &PieceName,
    bytes: bytes::Bytes,
    work: impl FnOnce(&Container) -> Result<T, String> + Send + 'static,
) -> Result<T, StoreError> {
    let key = piece.key();
    let piece = *piece;
    let opened = crate::offload::offload(move || {
        let container = Container::open(bytes).map_err(|error| error.to_string())?;
        if container.trailer().raw_size() != piece.len() {
            return Err("its length is not the one in its name".to_owned());
        }
        check_place(&container.trailer().metadata, &piece)?;
        work(&container)
    });
    match opened.await {
        Ok(Ok(value)) => Ok(value),
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

/// Reads WAL `[from, to)`, verified, as far as the region has it without a hole.
///
/// # Errors
/// When the store fails or a piece is damaged.
pub async fn read_wal(
    region: &Region,
    timeline: TimelineId,
    size: SegmentSize,
    key: &ContentKey,
    from: Lsn,
    to: Lsn,
) -> Result<Vec<u8>, StoreError> {
    let found = list_pieces(region, timeline, size, from, Some(to)).await?;
    read_cover(region, &found.coverage, size, key, from, to).await
}

/// [`read_wal`] from pieces that were listed before.
///
/// # Errors
/// When the store fails or a piece is damaged.
pub async fn read_cover(
    region: &Region,
    coverage: &Coverage,
    size: SegmentSize,
    key: &ContentKey,
    from: Lsn,
    to: Lsn,
) -> Result<Vec<u8>, StoreError> {
    let mut wal = Vec::new();
    for part in coverage.cover(from, to) {
        let raw = read_piece(region, &part.piece, key).await?;
        let start = part.piece.start(size).unwrap_or(part.from);
        let skip = part.from.bytes_since(start) as usize;
        let length = part.to.bytes_since(part.from) as usize;
        wal.extend_from_slice(&raw[skip..skip + length]);
    }
    Ok(wal)
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
