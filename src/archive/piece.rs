//! From raw WAL to a finished object: hashing and compression, away from the runtime's threads.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::OwnedSemaphorePermit;

use crate::repo::{
    ContainerWriter, ContentHash, ContentKey, FORMAT_VERSION, Frame, PieceMeta, PieceName,
    compress_wal_frame,
};
use crate::wal::{Lsn, ScanSummary, TimelineId, WalFormat};

/// Less than this is compressed at once: handing it over would take longer.
const SMALL: usize = 64 << 10;

/// A range of WAL that is to become one object.
#[derive(Debug)]
pub(super) struct PieceJob {
    /// The first byte.
    pub(super) start: Lsn,
    /// Behind the last byte.
    pub(super) end: Lsn,
    /// The content, in order.
    pub(super) parts: Vec<Part>,
    pub(super) hash: PieceHash,
    /// What the WAL in it says.
    pub(super) summary: ScanSummary,
    /// Whether it replaces smaller pieces that were stored before.
    pub(super) replaces: bool,
    /// Whether it ends the current piece.
    pub(super) is_full: bool,
}

/// A part of a piece; none is longer than a frame.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// A full frame of the current piece, by its number.
    Frame(usize),
    /// Raw bytes.
    Raw(Bytes),
}

/// The hash of a piece's content.
#[derive(Clone, Debug)]
pub(super) enum PieceHash {
    /// It was computed as the WAL passed.
    Known(ContentHash),
    /// That of these bytes.
    Of(Vec<Bytes>),
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

/// Work that is done once and waited for by several.
pub(super) type Pending<T> = Shared<BoxFuture<'static, Result<T, String>>>;

/// A piece of which everything is under way.
pub(super) struct Assembly {
    pub(super) job: PieceJob,
    pub(super) frames: Vec<Pending<Frame>>,
    pub(super) hash: Pending<ContentHash>,
}

/// Starts work on a thread of its own; `permit` is given back when it ends.
fn start<T: Clone + Send + Sync + 'static>(
    permit: OwnedSemaphorePermit,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Pending<T> {
    let task = crate::offload::offload(move || {
        let done = work();
        drop(permit);
        done
    });
    async move { task.await.unwrap_or_else(|error| Err(error.to_string())) }.boxed().shared()
}

fn done<T: Clone + Send + Sync + 'static>(value: Result<T, String>) -> Pending<T> {
    std::future::ready(value).boxed().shared()
}

/// Compresses a frame; takes a core for about a millisecond a MiB.
pub(super) fn compress(raw: Bytes, level: i32, permit: OwnedSemaphorePermit) -> Pending<Frame> {
    let work = move || compress_wal_frame(&raw, level).map_err(|error| error.to_string());
    start(permit, work)
}

/// Compresses a frame here and now, if it is small enough for that.
pub(super) fn compress_small(raw: &Bytes, level: i32) -> Option<Pending<Frame>> {
    let work = || done(compress_wal_frame(raw, level).map_err(|error| error.to_string()));
    (raw.len() <= SMALL).then(work)
}

/// A hash that is known.
pub(super) fn known(hash: ContentHash) -> Pending<ContentHash> {
    done(Ok(hash))
}

/// Hashes the content of a piece.
pub(super) fn hash(
    raw: Vec<Bytes>,
    key: ContentKey,
    permit: OwnedSemaphorePermit,
) -> Pending<ContentHash> {
    start(permit, move || {
        let mut hasher = key.hasher();
        raw.iter().for_each(|part| hasher.update(part));
        Ok(hasher.finish())
    })
}

impl PieceJob {
    /// Length of the content.
    pub(super) fn len(&self) -> u64 {
        self.end.bytes_since(self.start)
    }
}

impl Assembly {
    /// Waits for what is under way and puts the object together.
    pub(super) async fn finish(self, context: &PieceContext) -> Result<Arc<Piece>, String> {
        let Assembly { job, frames, hash } = self;
        let mut writer = ContainerWriter::default();
        let mut stored = Vec::with_capacity(frames.len());
        for frame in frames {
            let frame = frame.await?;
            writer.push(&frame);
            stored.push(frame.stored);
        }
        let hash = hash.await?;
        let size = context.format.segment_size;
        let from = size.offset(job.start) as u32;
        let name = PieceName {
            segment: size.name(context.timeline, size.segment_of(job.start)),
            from,
            to: from + job.len() as u32,
            hash: hash.short(),
        };
        let (start, end, replaces) = (job.start, job.end, job.replaces);
        let metadata = PieceMeta {
            format: FORMAT_VERSION,
            system_identifier: context.format.system_id.to_string(),
            timeline: context.timeline,
            start,
            end,
            wal_segment_size: size,
            hash,
            wal: job.summary,
        };
        let metadata = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
        let trailer = writer.finish(&metadata);
        let length = stored.iter().map(Bytes::len).sum::<usize>() + trailer.len();
        let mut body = BytesMut::with_capacity(length);
        stored.iter().chain([&trailer]).for_each(|part| body.extend_from_slice(part));
        Ok(Arc::new(Piece { name, start, end, body: body.freeze(), replaces }))
    }
}
