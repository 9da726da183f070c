//! Compressed frames into packs, packs into regions, while the server's stream runs.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::BackupError;
use super::fanout::Fanout;
use super::packer::empty_pack;
use crate::repo::{
    BackupLabel, ContainerWriter, ContentHasher, ContentKey, Frame, PackEntry, PackFrame,
    ShortHash, compress_frame, pack_key,
};

/// A pack ends when it has grown to this.
const PACK_SIZE: u64 = 128 << 20;
/// A pack has at most so many frames, however small they are.
const PACK_FRAMES: u32 = 16384;

/// A frame being compressed, in the order of the stream.
pub(super) type Compressing = JoinHandle<std::io::Result<(Frame, ShortHash)>>;

/// Hands a frame to the compression pool.
pub(super) fn compress(raw: Bytes, key: &ContentKey, level: i32) -> Compressing {
    let key = key.clone();
    tokio::task::spawn_blocking(move || {
        let hash = key.hash(&raw).short();
        Ok((compress_frame(&raw, level)?, hash))
    })
}

/// The pack being written.
struct Open {
    entry: PackEntry,
    writer: ContainerWriter,
    hasher: ContentHasher,
}

/// Writes packs until no more frames come; gives them with the writer they went through.
///
/// # Errors
/// When every region has failed, or a frame cannot be compressed.
pub(super) async fn write_packs(
    mut frames: mpsc::Receiver<Compressing>,
    mut fanout: Fanout,
    label: BackupLabel,
    key: ContentKey,
) -> Result<(Vec<PackEntry>, Fanout), BackupError> {
    let mut packs = Vec::new();
    let mut open: Option<Open> = None;
    while let Some(frame) = frames.recv().await {
        let (frame, hash) = frame.await.map_err(std::io::Error::other)??;
        if !fanout.is_alive() {
            let outcomes = fanout.finish().await;
            let errors = outcomes.into_iter().filter_map(Result::err).collect();
            return Err(BackupError::NoRegion(errors));
        }
        let mut current = match open.take() {
            Some(current) => current,
            None => {
                let number = packs.len() as u32;
                fanout.begin(&pack_key(&label, number)).await;
                let entry = empty_pack(&label, number);
                Open { entry, writer: ContainerWriter::default(), hasher: key.hasher() }
            }
        };
        current.writer.push(&frame);
        current.hasher.update(&frame.stored);
        let stored_size = frame.stored.len() as u32;
        current.entry.frames.push(PackFrame { stored_size, raw_size: frame.raw_size, hash });
        fanout.write(&frame.stored).await;
        let full =
            current.writer.stored_size() >= PACK_SIZE || current.writer.frames() >= PACK_FRAMES;
        if full {
            packs.push(end_pack(current, &mut fanout).await);
        } else {
            open = Some(current);
        }
    }
    if let Some(current) = open {
        packs.push(end_pack(current, &mut fanout).await);
    }
    Ok((packs, fanout))
}

async fn end_pack(open: Open, fanout: &mut Fanout) -> PackEntry {
    let Open { mut entry, writer, mut hasher } = open;
    let stored = writer.stored_size();
    let metadata = format!("{{\"backup\":\"{}\",\"pack\":{}}}", entry.label, entry.number);
    let trailer = writer.finish(metadata.as_bytes());
    hasher.update(&trailer);
    entry.stored_size = stored + trailer.len() as u64;
    entry.hash = hasher.finish();
    fanout.write(&trailer).await;
    fanout.end().await;
    entry
}
