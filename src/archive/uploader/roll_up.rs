//! The roll-up of a finished folder: what all its pieces say, in one object. Written by each region's
//! uploader from what the region itself holds, so that it also says: this folder was whole.

use futures_util::{StreamExt, TryStreamExt, stream};

use super::Uploader;
use crate::repo::{
    Coverage, PieceName, build_roll_up, log_folder, parse_index_name, timeline_folder,
};
use crate::store::{StoreError, piece_metadata};
use crate::wal::{SegmentName, TimelineId};

/// Trailers read at once.
const READS_AT_ONCE: usize = 8;

impl Uploader {
    /// Whether the timeline's WAL begins in this folder.
    async fn is_first_folder(&self, timeline: TimelineId, log: u32) -> Result<bool, StoreError> {
        let (folders, _) = self.region.list_folder(&timeline_folder(timeline)).await?;
        Ok(folders.first().is_none_or(|first| *first >= format!("{log:08X}")))
    }

    /// Writes the roll-up of a folder, unless it is there or the folder has holes.
    pub(super) async fn roll_up(&self, timeline: TimelineId, log: u32) -> Result<(), StoreError> {
        let size = self.context.format.segment_size;
        let folder = log_folder(timeline, log);
        let listed = self.region.list(&folder).await?;
        if listed.iter().any(|object| parse_index_name(object.file_name()).is_some()) {
            return Ok(());
        }
        let pieces = listed.iter().filter_map(|object| PieceName::parse(object.file_name()));
        let coverage = Coverage::new(pieces, size);
        let next = SegmentName { timeline, log: log + 1, segment: 0 };
        let (Some(start), Some(end)) = (coverage.start(), size.number(next)) else {
            return Ok(());
        };
        let end = size.start_of(end);
        let first = SegmentName { segment: 0, log, timeline };
        let begins = size.number(first).map(|number| size.start_of(number));
        let is_first = self.is_first_folder(timeline, log).await?;
        if coverage.contiguous_end(start) < end || (begins != Some(start) && !is_first) {
            return Ok(());
        }
        let parts = coverage.cover(start, end);
        let read: Vec<_> = stream::iter(parts)
            .map(|part| async move {
                let metadata = piece_metadata(&self.region, &part.piece).await?;
                Ok::<_, StoreError>((part.piece, metadata))
            })
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await?;
        match build_roll_up(&self.context.key, &read) {
            Ok(roll_up) => self.region.put(&roll_up.key, roll_up.bytes).await.map(|_| ()),
            Err(error) => Err(self.region.damaged(&folder, error.to_string())),
        }
    }
}
