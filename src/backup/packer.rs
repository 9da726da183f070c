//! From files to frames: which blocks of a backup are new, which frame holds them, and the index
//! that says where every byte lies.
//!
//! Files are cut at multiples of [`BLOCK_SIZE`]. Blocks of zeros are not stored. A block that the
//! parent has under the same path and number is not stored either: the index names the parent's.
//! All others fill frames in the order in which the server sends them; none crosses a frame.
//!
//! Of each file only its record is kept, a few bytes: a cluster may have millions.

use std::io;

use bytes::{Bytes, BytesMut};

use super::parent_file::ParentFile;
use super::records::{Part, Record, Records};
use crate::repo::{
    BLOCK_SIZE, ContentKey, Extent, FRAME_SIZE, FileEntry, FileIndexWriter, FileKind, PackEntry,
};

/// A full frame: its content and the lengths of the blocks that tile it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawFrame {
    pub(super) content: Bytes,
    pub(super) blocks: Vec<u16>,
}

/// The path that begins.
#[derive(Debug)]
pub(super) struct NewFile {
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) mtime: u64,
    /// Its length in the cluster.
    pub(super) size: u64,
    /// The numbers of the blocks that the server sends, in order; `None`: all of them.
    pub(super) sent: Option<Vec<u32>>,
    /// What the parent has under the path.
    pub(super) parent: Option<ParentFile>,
}

impl NewFile {
    /// How many bytes of content follow.
    fn length(&self) -> u64 {
        match &self.sent {
            None => self.size,
            Some(blocks) => (blocks.len() * BLOCK_SIZE) as u64,
        }
    }
}

/// The file whose content comes.
#[derive(Debug)]
struct Current {
    file: NewFile,
    /// Bytes still to come.
    left: u64,
    /// Bytes of the block that is coming which lie at the end of the frame.
    pending: usize,
    /// Blocks that came.
    came: usize,
    /// How far the parts reach.
    covered: u64,
    parts: Vec<Part>,
}

/// Takes files and their content in order, gives full frames.
pub(super) struct Packer {
    key: ContentKey,
    records: Records,
    current: Option<Current>,
    filling: BytesMut,
    blocks: Vec<u16>,
    /// Frames are counted through all packs until the packs are known.
    frame: u64,
    new_bytes: u64,
}

/// What an index came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Bytes of its own packs.
    pub(super) stored: u64,
    /// Packs, those of older backups included, and their bytes.
    pub(super) packs: u32,
    pub(super) packs_size: u64,
}

impl Packer {
    pub(super) fn new(key: ContentKey) -> Packer {
        Packer {
            key,
            records: Records::default(),
            current: None,
            filling: BytesMut::new(),
            blocks: Vec::new(),
            frame: 0,
            new_bytes: 0,
        }
    }

    /// A directory.
    pub(super) fn directory(&mut self, path: &str, mode: u32) {
        self.end_file();
        self.records.push(&Record { path: path.to_owned(), mode, file: None });
    }

    /// A file begins; the one before it ends.
    pub(super) fn begin(&mut self, file: NewFile) {
        self.end_file();
        let left = file.length();
        let parts = Vec::new();
        self.current = Some(Current { file, left, pending: 0, came: 0, covered: 0, parts });
    }

    /// The next bytes of the current file; full frames are added to `frames`.
    pub(super) fn data(&mut self, mut bytes: &[u8], frames: &mut Vec<RawFrame>) {
        while !bytes.is_empty() {
            let Some(current) = &mut self.current else { return };
            let length = (current.pending as u64 + current.left).min(BLOCK_SIZE as u64) as usize;
            if length == 0 {
                return;
            }
            let begins = current.pending == 0;
            if begins && self.filling.len() + length > FRAME_SIZE {
                frames.extend(self.end_frame());
                continue;
            }
            let take = bytes.len().min(length - current.pending);
            let (now, later) = bytes.split_at(take);
            self.filling.extend_from_slice(now);
            current.pending += take;
            current.left -= take as u64;
            bytes = later;
            if current.pending == length {
                self.end_block(length);
            }
        }
    }

    /// Decides where the block lies that ends the frame being filled.
    fn end_block(&mut self, length: usize) {
        let Some(current) = &mut self.current else { return };
        if let Some(sent) = &current.file.sent {
            let number = sent.get(current.came).copied().unwrap_or_default();
            current.inherit(u64::from(number) * BLOCK_SIZE as u64);
        }
        let start = self.filling.len() - length;
        let block = &self.filling[start..];
        let known = current.file.parent.as_ref().is_some_and(|parent| {
            parent.block(current.covered).is_some_and(|known| {
                known.length as usize == length && known.hash == self.key.hash(block).short()
            })
        });
        if is_zero(block) {
            current.push(Part::Zeros { length: length as u64 });
            self.filling.truncate(start);
        } else if known {
            current.inherit(current.covered + length as u64);
            self.filling.truncate(start);
        } else {
            let (frame, offset) = (self.frame, start as u32);
            current.push(Part::Own { frame, offset, length: length as u32 });
            self.blocks.push(length as u16);
            self.new_bytes += length as u64;
        }
        current.came += 1;
        current.pending = 0;
    }

    /// Ends the current file.
    pub(super) fn end_file(&mut self) {
        let Some(mut current) = self.current.take() else { return };
        current.inherit(current.file.size);
        let Current { file, parts, .. } = current;
        let content = Some((file.mtime, file.size, parts));
        self.records.push(&Record { path: file.path, mode: file.mode, file: content });
    }

    /// Ends the frame being filled; only between two blocks.
    pub(super) fn end_frame(&mut self) -> Option<RawFrame> {
        if self.filling.is_empty() {
            return None;
        }
        self.frame += 1;
        let content = self.filling.split().freeze();
        self.filling.reserve(FRAME_SIZE);
        Some(RawFrame { content, blocks: std::mem::take(&mut self.blocks) })
    }

    /// Bytes that are in no older backup.
    pub(super) fn new_bytes(&self) -> u64 {
        self.new_bytes
    }

    /// `files.idx`, once the packs are known. Frames were counted through `own` in order; `older`
    /// are the parent's packs, of which only those are named that something lies in.
    pub(super) fn index(
        mut self,
        own: Vec<PackEntry>,
        older: Vec<PackEntry>,
    ) -> io::Result<(Bytes, Sums)> {
        self.end_file();
        let mut sums = Sums::default();
        let mut first_frames = Vec::with_capacity(own.len());
        let mut frames = 0_u64;
        for pack in &own {
            first_frames.push(frames);
            frames += pack.frames.len() as u64;
            sums.stored += pack.stored_size;
        }
        let mut is_used = vec![false; older.len()];
        self.records.older_packs(|pack| is_used[pack as usize] = true);
        let mut packs = own;
        let mut places = Vec::with_capacity(older.len());
        for (pack, is_used) in older.into_iter().zip(is_used) {
            places.push(packs.len() as u32);
            if is_used {
                packs.push(pack);
            }
        }
        sums.packs = packs.len() as u32;
        sums.packs_size = packs.iter().map(|pack| pack.stored_size).sum();
        let extent = |part: &Part| match *part {
            Part::Zeros { length } => Extent::Zeros { length },
            Part::Older { pack, frame, offset, length } => {
                Extent::Stored { pack: places[pack as usize], frame, offset, length }
            }
            Part::Own { frame, offset, length } => {
                let pack = first_frames.partition_point(|first| *first <= frame) - 1;
                let frame = (frame - first_frames[pack]) as u32;
                Extent::Stored { pack: pack as u32, frame, offset, length }
            }
        };
        let mut writer = FileIndexWriter::new(&packs)?;
        self.records.sorted(|record| {
            let kind = match record.file {
                None => FileKind::Directory,
                Some((mtime, size, parts)) => {
                    sums.files += 1;
                    sums.bytes += size;
                    let extents = parts.iter().map(extent).collect();
                    FileKind::File { mtime, size, extents }
                }
            };
            writer.push(&FileEntry { path: record.path, mode: record.mode, kind })
        })?;
        Ok((writer.finish()?, sums))
    }
}

impl Current {
    /// Takes what lies before `to` and was not sent from the parent; zeros beyond its end, as
    /// PostgreSQL does (`src/bin/pg_combinebackup/reconstruct.c`).
    fn inherit(&mut self, to: u64) {
        let from = self.covered;
        if from >= to {
            return;
        }
        let mut parts = Vec::new();
        let reached = match &self.file.parent {
            Some(parent) => parent.parts(from, to, &mut parts),
            None => from,
        };
        parts.into_iter().for_each(|part| self.push(part));
        if reached < to {
            self.push(Part::Zeros { length: to - reached });
        }
    }

    fn push(&mut self, part: Part) {
        self.covered += part.length();
        if !self.parts.last_mut().is_some_and(|last| last.join(&part)) {
            self.parts.push(part);
        }
    }
}

fn is_zero(block: &[u8]) -> bool {
    static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    block == &ZEROS[..block.len()]
}

#[cfg(test)]
mod tests;
