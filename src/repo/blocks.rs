//! The block hashes of a pack: what a later backup compares with, so that it stores only blocks
//! that changed.
//!
//! The raw content of every frame of a pack is tiled by blocks: the pages of a file, cut at
//! multiples of [`BLOCK_SIZE`] in the file, and its last, shorter block. Their hashes lie in the
//! last frames of the pack; its metadata says how many those are (`hash_frames`). Records, one for
//! each frame that holds files, in order, none of which crosses a frame; numbers are varints:
//! ```text
//! frame, number of runs, then for each run: length of a block, number of such blocks;
//! then an 8-byte hash of each block, big-endian
//! ```

use super::container::MAX_FRAMES;
use super::varint::{put, take};
use super::{FRAME_SIZE, ShortHash};

/// What files are cut into: the size of PostgreSQL's pages (`BLCKSZ`). Scattered updates change
/// single pages: with larger blocks an incremental backup stores several times as much.
pub const BLOCK_SIZE: usize = 8192;

/// A block in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its length; [`BLOCK_SIZE`], or less at a file's end.
    pub length: u32,
    /// Hash of its content.
    pub hash: ShortHash,
}

/// Collects the hashes of a pack that is being written.
#[derive(Debug, Default)]
pub struct BlockHashesWriter {
    full: Vec<Vec<u8>>,
    filling: Vec<u8>,
}

impl BlockHashesWriter {
    /// Notes the blocks of a frame, in order.
    pub fn push(&mut self, frame: u32, blocks: &[Block]) {
        let mut record = Vec::with_capacity(16 + 8 * blocks.len());
        put(&mut record, u64::from(frame));
        let runs: Vec<_> = blocks.chunk_by(|a, b| a.length == b.length).collect();
        put(&mut record, runs.len() as u64);
        for run in &runs {
            put(&mut record, u64::from(run[0].length));
            put(&mut record, run.len() as u64);
        }
        for block in blocks {
            record.extend_from_slice(&block.hash.0.to_be_bytes());
        }
        if record.len() > FRAME_SIZE {
            // A frame of a hundred thousand tiny files: they are stored again by the next backup.
            return;
        }
        if self.filling.len() + record.len() > FRAME_SIZE {
            self.full.push(std::mem::take(&mut self.filling));
        }
        self.filling.extend_from_slice(&record);
    }

    /// The raw content of the frames that hold the hashes.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        if !self.filling.is_empty() {
            self.full.push(self.filling);
        }
        self.full
    }
}

/// The block hashes of one pack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockHashes {
    /// For each frame where its blocks begin in the lists below; one more for the end.
    firsts: Vec<u32>,
    offsets: Vec<u32>,
    lengths: Vec<u16>,
    hashes: Vec<ShortHash>,
}

impl BlockHashes {
    /// Adds what a frame of hashes holds. Frames must come in order.
    ///
    /// # Errors
    /// `None` when it is damaged.
    pub fn add(&mut self, mut raw: &[u8]) -> Option<()> {
        while !raw.is_empty() {
            let frame = usize::try_from(take(&mut raw)?).ok()?;
            if frame >= MAX_FRAMES || frame < self.firsts.len() {
                return None;
            }
            self.firsts.resize(frame + 1, self.offsets.len() as u32);
            let runs = take(&mut raw)?;
            let mut offset = 0_u32;
            for _ in 0..runs {
                let length = take(&mut raw)?;
                let count = take(&mut raw)?;
                let room = (FRAME_SIZE - offset as usize) as u64;
                if length == 0 || length > BLOCK_SIZE as u64 || count > room / length {
                    return None;
                }
                for _ in 0..count {
                    self.offsets.push(offset);
                    self.lengths.push(length as u16);
                    offset += length as u32;
                }
            }
            while self.hashes.len() < self.offsets.len() {
                let (hash, rest) = raw.split_first_chunk()?;
                self.hashes.push(ShortHash(u64::from_be_bytes(*hash)));
                raw = rest;
            }
        }
        Some(())
    }

    /// The block that begins at `offset` of a frame.
    pub fn find(&self, frame: u32, offset: u32) -> Option<Block> {
        let frame = frame as usize;
        let first = *self.firsts.get(frame)? as usize;
        let end = self.firsts.get(frame + 1).map_or(self.offsets.len(), |end| *end as usize);
        let place = first + self.offsets.get(first..end)?.binary_search(&offset).ok()?;
        Some(Block { length: u32::from(self.lengths[place]), hash: self.hashes[place] })
    }

    /// Bytes of memory that it takes.
    pub fn memory(&self) -> usize {
        4 * self.firsts.len() + 14 * self.offsets.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(lengths: &[u16]) -> Vec<Block> {
        let block = |(index, length): (usize, &u16)| Block {
            length: u32::from(*length),
            hash: ShortHash(index as u64 * 77 + u64::from(*length)),
        };
        lengths.iter().enumerate().map(block).collect()
    }

    proptest! {
        #[test]
        fn every_block_is_found_again(
            frames in prop::collection::vec(
                prop::collection::vec(prop_oneof![3 => Just(8192_u16), 1 => 1_u16..8192], 0..120),
                0..40,
            ),
            empty_first: bool,
        ) {
            let mut writer = BlockHashesWriter::default();
            let shift = u32::from(empty_first);
            for (frame, lengths) in frames.iter().enumerate() {
                writer.push(frame as u32 + shift, &blocks(lengths));
            }
            let mut hashes = BlockHashes::default();
            for raw in writer.finish() {
                prop_assert!(raw.len() <= FRAME_SIZE);
                prop_assert!(hashes.add(&raw).is_some());
            }
            for (frame, lengths) in frames.iter().enumerate() {
                let mut offset = 0;
                for block in blocks(lengths) {
                    prop_assert_eq!(hashes.find(frame as u32 + shift, offset), Some(block));
                    prop_assert_eq!(hashes.find(frame as u32 + shift, offset + 1).filter(|_| block.length > 1), None);
                    offset += block.length;
                }
                prop_assert_eq!(hashes.find(frame as u32 + shift, offset), None);
            }
            prop_assert_eq!(hashes.find(frames.len() as u32 + shift, 0), None);
        }

        #[test]
        fn no_bytes_make_it_panic(raw: Vec<u8>, frame in 0_u32..5, offset in 0_u32..9000) {
            let mut hashes = BlockHashes::default();
            let _ = hashes.add(&raw);
            let _ = hashes.find(frame, offset);
        }
    }

    #[test]
    fn hashes_of_many_frames_fill_several_and_stay_in_order() {
        let mut writer = BlockHashesWriter::default();
        for frame in 0..2000 {
            writer.push(frame, &blocks(&[8192; 128]));
        }
        let raws = writer.finish();
        assert_eq!(raws.len(), 2);
        let mut hashes = BlockHashes::default();
        raws.iter().for_each(|raw| hashes.add(raw).unwrap());
        assert_eq!(hashes.find(1999, 127 * 8192), Some(blocks(&[8192; 128])[127]));
        assert_eq!(hashes.memory(), 2000 * 4 + 14 * 2000 * 128);
        assert!(BlockHashes::default().add(&raws[0][1..]).is_none());
    }
}
