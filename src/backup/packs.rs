//! Compressed frames into packs, packs into regions, while the server's stream runs.

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::BackupError;
use super::fanout::Fanout;
use super::packer::RawFrame;
use crate::repo::{
    BackupLabel, Block, BlockHashesWriter, ContainerWriter, ContentHash, ContentHasher, ContentKey,
    Frame, PackEntry, PackFrame, ShortHash, compress_frame, pack_key,
};

/// A pack ends when it has grown to this.
const PACK_SIZE: u64 = 128 << 20;
/// A pack has at most so many frames, however small they are.
const PACK_FRAMES: u32 = 16384;

/// Hashes do not shrink.
const HASHES_LEVEL: i32 = 1;

/// What compression makes of a frame.
pub(super) struct Compressed {
    frame: Frame,
    hash: ShortHash,
    blocks: Vec<Block>,
}

/// A frame being compressed, in the order of the stream.
pub(super) type Compressing = JoinHandle<std::io::Result<Compressed>>;

/// Hands a frame to the compression pool.
pub(super) fn compress(raw: RawFrame, key: &ContentKey, level: i32) -> Compressing {
    let key = key.clone();
    tokio::task::spawn_blocking(move || {
        let content = &raw.content;
        let hash = key.hash(content).short();
        let mut rest: &[u8] = content;
        let blocks = raw.blocks.iter().map(|length| {
            let (block, after) = rest.split_at(usize::from(*length));
            rest = after;
            Block { length: u32::from(*length), hash: key.hash(block).short() }
        });
        let blocks = blocks.collect();
        Ok(Compressed { frame: compress_frame(content, level)?, hash, blocks })
    })
}

/// The pack being written.
struct Open {
    entry: PackEntry,
    writer: ContainerWriter,
    hasher: ContentHasher,
    blocks: BlockHashesWriter,
}

impl Open {
    fn new(label: &BackupLabel, number: u32, key: &ContentKey) -> Open {
        Open {
            entry: PackEntry {
                label: label.clone(),
                number,
                stored_size: 0,
                hash: ContentHash([0; 32]),
                frames: Vec::new(),
            },
            writer: ContainerWriter::default(),
            hasher: key.hasher(),
            blocks: BlockHashesWriter::default(),
        }
    }

    async fn write(&mut self, frame: &Frame, fanout: &mut Fanout) {
        self.writer.push(frame);
        self.hasher.update(&frame.stored);
        fanout.write(&frame.stored).await;
    }
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
        let Compressed { frame, hash, blocks } = frame.await.map_err(std::io::Error::other)??;
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
                Open::new(&label, number, &key)
            }
        };
        let stored_size = frame.stored.len() as u32;
        current.blocks.push(current.entry.frames.len() as u32, &blocks);
        current.entry.frames.push(PackFrame { stored_size, raw_size: frame.raw_size, hash });
        current.write(&frame, &mut fanout).await;
        let full =
            current.writer.stored_size() >= PACK_SIZE || current.writer.frames() >= PACK_FRAMES;
        if full {
            packs.push(end_pack(current, &mut fanout).await?);
        } else {
            open = Some(current);
        }
    }
    if let Some(current) = open {
        packs.push(end_pack(current, &mut fanout).await?);
    }
    Ok((packs, fanout))
}

/// The hashes of the blocks, and the trailer.
async fn end_pack(mut open: Open, fanout: &mut Fanout) -> std::io::Result<PackEntry> {
    let hashes = std::mem::take(&mut open.blocks).finish();
    for raw in &hashes {
        open.write(&compress_frame(raw, HASHES_LEVEL)?, fanout).await;
    }
    let Open { mut entry, writer, mut hasher, .. } = open;
    let stored = writer.stored_size();
    let metadata = format!(
        "{{\"backup\":\"{}\",\"pack\":{},\"hash_frames\":{}}}",
        entry.label,
        entry.number,
        hashes.len()
    );
    let trailer = writer.finish(metadata.as_bytes());
    hasher.update(&trailer);
    entry.stored_size = stored + trailer.len() as u64;
    entry.hash = hasher.finish();
    fanout.write(&trailer).await;
    fanout.end().await;
    Ok(entry)
}
