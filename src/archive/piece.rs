//! From raw WAL to a finished object: hashing and compression, away from the runtime's threads.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::repo::{
    ContainerWriter, ContentKey, FORMAT_VERSION, PieceMeta, PieceName, compress_frame,
};
use crate::wal::{Lsn, ScanSummary, TimelineId, WalFormat};

/// Raw WAL that is to become one object.
#[derive(Debug)]
pub(super) struct PieceJob {
    /// The first byte.
    pub(super) start: Lsn,
    /// The content, in order; no part is longer than a frame.
    pub(super) raw: Vec<Bytes>,
    /// What the WAL in it says.
    pub(super) summary: ScanSummary,
    /// Whether it replaces smaller pieces that were stored before.
    pub(super) replaces: bool,
}

/// An object ready to be stored.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) name: PieceName,
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) body: Bytes,
    pub(super) replaces: bool,
}

/// What all pieces of a stream share.
#[derive(Clone)]
pub(super) struct PieceContext {
    pub(super) format: WalFormat,
    pub(super) timeline: TimelineId,
    pub(super) key: ContentKey,
    pub(super) level: i32,
}

impl PieceJob {
    /// Length of the content.
    pub(super) fn len(&self) -> u64 {
        self.raw.iter().map(|part| part.len() as u64).sum()
    }

    /// Hashes and compresses; takes a core for some milliseconds a MiB.
    pub(super) fn finish(self, context: &PieceContext) -> std::io::Result<Arc<Piece>> {
        let length = self.len();
        let end = self.start.advance(length);
        let mut hasher = context.key.hasher();
        let mut writer = ContainerWriter::default();
        let mut body = BytesMut::with_capacity((length / 2) as usize + 4096);
        for part in &self.raw {
            hasher.update(part);
            let frame = compress_frame(part, context.level)?;
            writer.push(&frame);
            body.extend_from_slice(&frame.stored);
        }
        let hash = hasher.finish();
        let size = context.format.segment_size;
        let metadata = PieceMeta {
            format: FORMAT_VERSION,
            system_identifier: context.format.system_id.to_string(),
            timeline: context.timeline,
            start: self.start,
            end,
            wal_segment_size: size,
            hash,
            wal: self.summary,
        };
        body.extend_from_slice(&writer.finish(&serde_json::to_vec(&metadata)?));
        let from = size.offset(self.start) as u32;
        let name = PieceName {
            segment: size.name(context.timeline, size.segment_of(self.start)),
            from,
            to: from + length as u32,
            hash: hash.short(),
        };
        let body = body.freeze();
        Ok(Arc::new(Piece { name, start: self.start, end, body, replaces: self.replaces }))
    }
}
