//! Copying WAL from region to region, byte for byte: how a region that missed something becomes
//! whole again without the server.
//!
//! Every piece is verified on its way. Pieces are written in the order of the WAL, so that a crash
//! in the middle leaves the region whole up to some point.

use futures_util::{StreamExt, stream};

use super::{FailureKind, Region, StoreError, list_gaps, list_pieces, read_piece_object};
use crate::repo::{ContentKey, CoverPart, PieceName, gap_key};
use crate::wal::{Lsn, SegmentSize, TimelineId};

/// Pieces on their way at once: one is read while another is written.
const COPIES_AT_ONCE: usize = 2;

/// What a copy came to.
#[derive(Clone, Debug)]
pub struct Copied {
    /// Up to here the target has the WAL now.
    pub reached: Lsn,
    /// The pieces that were written.
    pub pieces: Vec<PieceName>,
    /// Why it did not go on: the last failure of a source; `None` when every source answered and
    /// none has what comes next.
    pub failure: Option<StoreError>,
}

/// The WAL to be copied.
#[derive(Clone, Copy, Debug)]
pub struct WalRange {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The first byte.
    pub from: Lsn,
    /// Behind the last byte.
    pub to: Lsn,
}

/// Copies a range into `target` from whichever source has it, as far as any has. A recorded gap is
/// copied too, and stepped over.
///
/// # Errors
/// When the target cannot be written.
pub async fn copy_wal(
    sources: &[Region],
    target: &Region,
    range: WalRange,
    key: &ContentKey,
) -> Result<Copied, StoreError> {
    let mut copied = Copied { reached: range.from, pieces: Vec::new(), failure: None };
    // A piece may be replaced by a larger one between the listing and the reading, and a source may
    // go on where another ended: round again as long as that helps.
    loop {
        let before = copied.reached;
        copied.failure = None;
        for source in sources {
            if copied.reached >= range.to {
                return Ok(copied);
            }
            if let Err(failure) = copy_from(source, target, range, key, &mut copied).await {
                if failure.region == target.name() {
                    return Err(failure);
                }
                copied.failure = Some(failure);
            }
        }
        if copied.reached == before || copied.reached >= range.to {
            return Ok(copied);
        }
    }
}

async fn copy_from(
    source: &Region,
    target: &Region,
    range: WalRange,
    key: &ContentKey,
    copied: &mut Copied,
) -> Result<(), StoreError> {
    let WalRange { timeline, segment_size, to, .. } = range;
    let found = list_pieces(source, timeline, segment_size, copied.reached, Some(to)).await?;
    let parts = found.coverage.cover(copied.reached, to);
    let mut copies = stream::iter(parts)
        .map(|part: CoverPart| async move {
            let object = read_piece_object(source, &part.piece, key).await?;
            target.put(&part.piece.key(), object).await?;
            Ok(part)
        })
        .buffered(COPIES_AT_ONCE);
    while let Some(part) = copies.next().await {
        let part = part?;
        copied.pieces.push(part.piece);
        copied.reached = part.to;
    }
    drop(copies);
    if copied.reached < to {
        copy_gap(source, target, timeline, copied).await?;
    }
    Ok(())
}

/// Where the WAL ends in a recorded gap, the record is what there is to be copied.
async fn copy_gap(
    source: &Region,
    target: &Region,
    timeline: TimelineId,
    copied: &mut Copied,
) -> Result<(), StoreError> {
    let at = copied.reached;
    let gaps = list_gaps(source).await?;
    let here = gaps.iter().find(|gap| gap.0 == timeline && gap.1 <= at && at < gap.2);
    let Some((_, from, to)) = here else { return Ok(()) };
    let name = gap_key(timeline, *from, *to);
    let content = source.get(&name).await?;
    target.put(&name, content).await?;
    copied.reached = *to;
    Ok(())
}

impl Copied {
    /// The error that says that a copy ended early.
    pub fn shortfall(&self, target: &Region, to: Lsn) -> StoreError {
        self.failure.clone().unwrap_or_else(|| StoreError {
            kind: FailureKind::NotFound,
            region: target.name().to_owned(),
            operation: "repair",
            key: "wal".to_owned(),
            message: format!("no other region has WAL from {} to {to}", self.reached),
        })
    }
}
