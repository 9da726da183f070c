//! From files to frames: which bytes share a frame, and the index that says where they went.
//!
//! Files are cut at multiples of 1 MiB into blocks. A block never crosses a frame; small files and
//! the last blocks of large ones share frames, in the order in which the server sends them.

use bytes::{Bytes, BytesMut};

use super::tar::{TarEntry, TarKind};
use crate::repo::{BackupLabel, Extent, FRAME_SIZE, FileEntry, FileIndex, FileKind, PackEntry};

/// Where a block lies: frames are counted through all packs until the packs are known.
#[derive(Clone, Copy, Debug)]
struct Block {
    frame: u64,
    offset: u32,
    length: u32,
}

#[derive(Debug)]
struct PackedFile {
    path: String,
    mode: u32,
    /// `None` for a directory.
    content: Option<(u64, u64, Vec<Block>)>,
}

/// Takes entries and their content in order, gives full frames.
#[derive(Debug, Default)]
pub(super) struct Packer {
    files: Vec<PackedFile>,
    filling: BytesMut,
    frame: u64,
    /// Bytes of the current file that are still to come, and how far it came.
    left: u64,
    position: u64,
    bytes: u64,
}

impl Packer {
    /// An entry begins, under `prefix` (a tablespace's folder) or directly in the data directory.
    /// Gives a frame when the one being filled has no room for the entry's first block.
    pub(super) fn begin(&mut self, entry: &TarEntry, prefix: &str) -> Option<Bytes> {
        let path = match prefix {
            "" => entry.path.clone(),
            _ => format!("{prefix}/{}", entry.path),
        };
        let content = match entry.kind {
            TarKind::Directory => None,
            TarKind::File => Some((entry.mtime, entry.size, Vec::new())),
            // Links to tablespaces are made anew by a restore.
            TarKind::Link => return None,
        };
        if path.is_empty() {
            return None;
        }
        self.files.push(PackedFile { path, mode: entry.mode, content });
        self.left = entry.size;
        self.position = 0;
        self.make_room()
    }

    /// The next bytes of the current file; full frames are added to `frames`.
    pub(super) fn data(&mut self, mut bytes: &[u8], frames: &mut Vec<Bytes>) {
        while !bytes.is_empty() {
            let in_block = self.position % FRAME_SIZE as u64;
            let take = bytes.len().min(FRAME_SIZE - in_block as usize);
            let (now, later) = bytes.split_at(take);
            self.note(in_block == 0, now.len());
            self.filling.extend_from_slice(now);
            self.position += take as u64;
            self.left = self.left.saturating_sub(take as u64);
            self.bytes += take as u64;
            bytes = later;
            if self.position.is_multiple_of(FRAME_SIZE as u64) {
                frames.extend(self.make_room());
            }
        }
    }

    /// Notes where the next bytes of the current file go.
    fn note(&mut self, begins_block: bool, length: usize) {
        let block =
            Block { frame: self.frame, offset: self.filling.len() as u32, length: length as u32 };
        let Some(PackedFile { content: Some((_, _, blocks)), .. }) = self.files.last_mut() else {
            return;
        };
        match blocks.last_mut() {
            Some(last) if !begins_block => last.length += length as u32,
            _ => blocks.push(block),
        }
    }

    /// Ends the frame if the next block of the current file would not fit into it.
    fn make_room(&mut self) -> Option<Bytes> {
        let next_block = self.left.min(FRAME_SIZE as u64) as usize;
        if self.filling.len() + next_block > FRAME_SIZE { self.end_frame() } else { None }
    }

    /// Ends the frame being filled.
    pub(super) fn end_frame(&mut self) -> Option<Bytes> {
        if self.filling.is_empty() {
            return None;
        }
        self.frame += 1;
        let frame = self.filling.split().freeze();
        self.filling.reserve(FRAME_SIZE);
        Some(frame)
    }

    /// Bytes of files so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The index, once the packs are known. Frames were counted through them in order.
    pub(super) fn index(self, packs: Vec<PackEntry>) -> FileIndex {
        let mut first_frames = Vec::with_capacity(packs.len());
        let mut frames = 0_u64;
        for pack in &packs {
            first_frames.push(frames);
            frames += pack.frames.len() as u64;
        }
        let extent = |block: &Block| {
            let pack = first_frames.partition_point(|first| *first <= block.frame) - 1;
            Extent::Stored {
                pack: pack as u32,
                frame: (block.frame - first_frames[pack]) as u32,
                offset: block.offset,
                length: block.length,
            }
        };
        let files = self.files.into_iter().map(|file| FileEntry {
            path: file.path,
            mode: file.mode,
            kind: match file.content {
                None => FileKind::Directory,
                Some((mtime, size, blocks)) => {
                    FileKind::File { mtime, size, extents: blocks.iter().map(extent).collect() }
                }
            },
        });
        FileIndex { files: files.collect(), packs }
    }
}

/// A pack whose number is known and nothing else yet.
pub(super) fn empty_pack(label: &BackupLabel, number: u32) -> PackEntry {
    PackEntry {
        label: label.clone(),
        number,
        stored_size: 0,
        hash: crate::repo::ContentHash([0; 32]),
        frames: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::{PackFrame, ShortHash};

    fn entry(path: &str, size: u64) -> TarEntry {
        TarEntry { path: path.into(), kind: TarKind::File, mode: 0o600, mtime: 1, size }
    }

    proptest! {
        // What goes in comes out, whatever the sizes and however the stream is torn.
        #[test]
        fn extents_give_back_every_file(
            sizes in prop::collection::vec(0_usize..2_500_000, 1..8),
            chunk in 1_usize..300_000,
            frames_per_pack in 1_usize..4,
        ) {
            let mut packer = Packer::default();
            let mut frames = Vec::new();
            let content = |index: usize, size: usize| -> Vec<u8> {
                (0..size).map(|i| (i / 7 + index * 31) as u8).collect()
            };
            for (index, size) in sizes.iter().enumerate() {
                frames.extend(packer.begin(&entry(&format!("f{index}"), *size as u64), ""));
                for part in content(index, *size).chunks(chunk) {
                    packer.data(part, &mut frames);
                }
            }
            frames.extend(packer.end_frame());
            prop_assert!(frames.iter().all(|frame| frame.len() <= FRAME_SIZE));
            let label = "20261123T071500Z-full-9c1e".parse().unwrap();
            let packs: Vec<_> = frames.chunks(frames_per_pack).enumerate().map(|(number, frames)| {
                let mut pack = empty_pack(&label, number as u32);
                pack.frames = frames.iter().map(|frame| PackFrame {
                    stored_size: 1, raw_size: frame.len() as u32, hash: ShortHash(0),
                }).collect();
                pack
            }).collect();
            let mut index = packer.index(packs);
            prop_assert!(FileIndex::decode(index.encode().unwrap()).is_ok());
            for file in &index.files {
                let number: usize = file.path[1..].parse().unwrap();
                let FileKind::File { extents, .. } = &file.kind else { unreachable!() };
                let mut bytes = Vec::new();
                for extent in extents {
                    let Extent::Stored { pack, frame, offset, length } = *extent else { unreachable!() };
                    let frame = &frames[pack as usize * frames_per_pack + frame as usize];
                    bytes.extend_from_slice(&frame[offset as usize..(offset + length) as usize]);
                }
                prop_assert_eq!(bytes, content(number, sizes[number]));
            }
        }
    }
}
