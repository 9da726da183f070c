//! The files of an incremental BASE_BACKUP that hold only changed blocks
//! (`src/backend/backup/basebackup_incremental.c`, `sendFile` in `basebackup.c`).
//!
//! ```text
//! u32 magic 0xd3ae1f0d, u32 number of blocks, u32 truncation length in blocks,
//! u32 number of each block, ascending; zeros up to a multiple of 8192 if there is any block;
//! then the blocks
//! ```
//! Numbers are in the server's byte order, which is little-endian wherever both programs run. The
//! file becomes as long as its truncation length, or up to its highest block if that lies beyond.

use super::TarError;
use crate::repo::BLOCK_SIZE;

/// What such a file's name begins with.
const PREFIX: &str = "INCREMENTAL.";
const MAGIC: u32 = 0xd3ae_1f0d;
const FIXED: usize = 12;

/// The path that a file of changed blocks stands for; `None` for any other file.
pub(super) fn stands_for(path: &str) -> Option<String> {
    let (folder, name) = path.rsplit_once('/')?;
    let name = name.strip_prefix(PREFIX)?;
    // Relation files: a number, a fork, and one more number for segments after the first.
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let (relation, segment) = name.split_once('.').unwrap_or((name, "0"));
    let (relation, fork) = relation.split_once('_').unwrap_or((relation, "vm"));
    let is_relation =
        is_number(relation) && is_number(segment) && matches!(fork, "vm" | "fsm" | "init");
    is_relation.then(|| format!("{folder}/{name}"))
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChangedBlocks {
    /// The file's length in bytes.
    pub(super) size: u64,
    /// The numbers of the blocks that follow.
    pub(super) blocks: Vec<u32>,
}

/// Reads the header of one file of `length` bytes as it comes.
#[derive(Debug)]
pub(super) struct HeaderReader {
    path: String,
    length: u64,
    bytes: Vec<u8>,
}

impl HeaderReader {
    pub(super) fn new(path: String, length: u64) -> HeaderReader {
        HeaderReader { path, length, bytes: Vec::new() }
    }

    /// The file that it stands for.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Takes bytes from the front of `data` until the header is complete.
    pub(super) fn take(
        &mut self,
        data: &mut bytes::Bytes,
    ) -> Result<Option<ChangedBlocks>, TarError> {
        loop {
            let needed = self.needed()?;
            if self.bytes.len() == needed {
                return self.parse().map(Some);
            }
            if data.is_empty() {
                return Ok(None);
            }
            let part = data.split_to(data.len().min(needed - self.bytes.len()));
            self.bytes.extend_from_slice(&part);
        }
    }

    fn number(&self, index: usize) -> u32 {
        let bytes = self.bytes.get(4 * index..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// How long the header is, as far as can be told.
    fn needed(&self) -> Result<usize, TarError> {
        if self.bytes.len() < FIXED {
            return Ok(FIXED);
        }
        let (magic, count) = (self.number(0), self.number(1) as usize);
        let header = match count {
            0 => FIXED,
            _ => (FIXED + 4 * count).next_multiple_of(BLOCK_SIZE),
        };
        let expected = header as u64 + (count * BLOCK_SIZE) as u64;
        if magic != MAGIC || expected != self.length {
            return Err(self.damaged("its header does not fit its length"));
        }
        Ok(header)
    }

    fn parse(&mut self) -> Result<ChangedBlocks, TarError> {
        let count = self.number(1) as usize;
        let blocks: Vec<u32> = (0..count).map(|index| self.number(3 + index)).collect();
        if !blocks.is_sorted_by(|a, b| a < b) {
            return Err(self.damaged("its blocks are not in order"));
        }
        let highest = blocks.last().map_or(0, |last| u64::from(*last) + 1);
        let size = highest.max(u64::from(self.number(2))) * BLOCK_SIZE as u64;
        Ok(ChangedBlocks { size, blocks })
    }

    fn damaged(&self, what: &str) -> TarError {
        TarError(format!("{}: {what}", self.path))
    }
}

/// The backup label without the lines that a server refuses to start with: the restored directory
/// is no incremental backup.
pub(super) fn plain_label(label: &[u8]) -> Vec<u8> {
    let lines = label.split_inclusive(|byte| *byte == b'\n');
    lines.filter(|line| !line.starts_with(b"INCREMENTAL FROM ")).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn header(blocks: &[u32], truncation: u32) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend((blocks.len() as u32).to_le_bytes());
        bytes.extend(truncation.to_le_bytes());
        blocks.iter().for_each(|block| bytes.extend(block.to_le_bytes()));
        if !blocks.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(BLOCK_SIZE), 0);
        }
        bytes
    }

    fn read(bytes: &[u8], length: u64, chunk: usize) -> Result<Option<ChangedBlocks>, TarError> {
        let mut reader = HeaderReader::new("base/5/1".into(), length);
        for part in bytes.chunks(chunk) {
            let mut part = Bytes::copy_from_slice(part);
            if let Some(found) = reader.take(&mut part)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    proptest! {
        #[test]
        fn headers_are_read_however_they_are_torn(
            blocks in prop::collection::btree_set(0_u32..200_000, 0..3000),
            truncation in 0_u32..200_000,
            chunk in 1_usize..9000,
        ) {
            let blocks: Vec<u32> = blocks.into_iter().collect();
            let mut bytes = header(&blocks, truncation);
            let length = (bytes.len() + blocks.len() * BLOCK_SIZE) as u64;
            bytes.extend([7; 10]);
            let found = read(&bytes, length, chunk).unwrap().unwrap();
            let highest = blocks.last().map_or(0, |last| last + 1);
            prop_assert_eq!(found.size, u64::from(highest.max(truncation)) * BLOCK_SIZE as u64);
            prop_assert_eq!(found.blocks, blocks);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, length: u64, with_magic: bool) {
            let mut bytes = bytes;
            if with_magic && bytes.len() > 4 {
                bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            }
            let _ = read(&bytes, length, 100);
        }
    }

    #[test]
    fn headers_that_do_not_fit_are_refused() {
        let good = header(&[1, 5], 9);
        let length = good.len() as u64 + 2 * BLOCK_SIZE as u64;
        assert!(read(&good, length, 100).unwrap().is_some());
        assert!(read(&good, length + 1, 100).is_err());
        let unsorted = header(&[5, 1], 9);
        assert!(read(&unsorted, length, 100).is_err());
        let mut foreign = good;
        foreign[0] ^= 1;
        assert!(read(&foreign, length, 100).is_err());
        // No block: not padded.
        assert_eq!(
            read(&header(&[], 3), 12, 5).unwrap(),
            Some(ChangedBlocks { size: 3 * 8192, blocks: vec![] })
        );
    }

    #[test]
    fn only_relation_files_stand_for_others() {
        for (path, file) in [
            ("base/5/INCREMENTAL.1259", Some("base/5/1259")),
            ("pg_tblspc/1/PG_17/5/INCREMENTAL.16400.2", Some("pg_tblspc/1/PG_17/5/16400.2")),
            ("base/5/INCREMENTAL.1259_vm", Some("base/5/1259_vm")),
            ("base/5/INCREMENTAL.1259_vm.1", Some("base/5/1259_vm.1")),
            ("base/5/INCREMENTAL.1259_xx", None),
            ("base/5/INCREMENTAL.", None),
            ("base/5/INCREMENTAL.1.", None),
            ("INCREMENTAL.1", None),
            ("base/5/1259", None),
        ] {
            assert_eq!(stands_for(path).as_deref(), file, "{path}");
        }
    }

    #[test]
    fn a_label_loses_what_makes_it_incremental_and_nothing_else() {
        let label = b"START WAL LOCATION: 0/2000028 (file 1)\nLABEL: x\nSTART TIMELINE: 1\nINCREMENTAL FROM LSN: 0/1\nINCREMENTAL FROM TLI: 1\n";
        assert_eq!(
            plain_label(label),
            b"START WAL LOCATION: 0/2000028 (file 1)\nLABEL: x\nSTART TIMELINE: 1\n"
        );
    }
}
