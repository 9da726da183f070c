//! What the parent of a backup has under one path. Pure.

use super::records::Part;
use crate::repo::{BLOCK_SIZE, Block, Extent};

/// A file of the parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ParentFile {
    /// The extents, with where in the file each begins. Packs are counted as the parent does.
    extents: Vec<(u64, Extent)>,
    size: u64,
    /// The hash of each block, as far as it is known.
    blocks: Vec<Option<Block>>,
}

impl ParentFile {
    /// A file of these extents. `find` gives the hash of the block that begins at an offset of a
    /// frame of a pack.
    pub(super) fn new(
        extents: &[Extent],
        mut find: impl FnMut(u32, u32, u32) -> Option<Block>,
    ) -> ParentFile {
        let mut file = ParentFile::default();
        for extent in extents {
            if let Extent::Stored { pack, frame, offset, length } = *extent
                && file.size.is_multiple_of(BLOCK_SIZE as u64)
            {
                let first = (file.size / BLOCK_SIZE as u64) as usize;
                for (index, at) in (0..length).step_by(BLOCK_SIZE).enumerate() {
                    if let Some(block) = find(pack, frame, offset + at) {
                        file.blocks.resize(first + index, None);
                        file.blocks.push(Some(block));
                    }
                }
            }
            file.extents.push((file.size, *extent));
            file.size += extent.length();
        }
        file
    }

    /// The block at an offset of the file.
    pub(super) fn block(&self, offset: u64) -> Option<Block> {
        if !offset.is_multiple_of(BLOCK_SIZE as u64) {
            return None;
        }
        *self.blocks.get(usize::try_from(offset / BLOCK_SIZE as u64).ok()?)?
    }

    /// Where the bytes `[from, to)` lie, as far as the file reaches; how far that is.
    pub(super) fn parts(&self, from: u64, to: u64, parts: &mut Vec<Part>) -> u64 {
        let to = to.min(self.size);
        let mut at = from;
        let first = self.extents.partition_point(|(begin, _)| *begin <= from).saturating_sub(1);
        for (begin, extent) in &self.extents[first.min(self.extents.len())..] {
            let end = (begin + extent.length()).min(to);
            if at >= end {
                if *begin >= to {
                    break;
                }
                continue;
            }
            let (skip, length) = (at - begin, end - at);
            parts.push(match *extent {
                Extent::Zeros { .. } => Part::Zeros { length },
                Extent::Stored { pack, frame, offset, .. } => {
                    Part::Older { pack, frame, offset: offset + skip as u32, length: length as u32 }
                }
            });
            at = end;
        }
        at
    }
}
