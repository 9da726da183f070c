//! Tests of the packer: what goes in comes out, whatever is new, inherited or zero.

use proptest::prelude::*;

use super::*;
use crate::repo::{Block, ContentHash, FileIndex, PackFrame, ShortHash};

const BLOCK: usize = BLOCK_SIZE;

fn key() -> ContentKey {
    ContentKey::for_system(1)
}

fn new_file(path: &str, size: usize, parent: Option<ParentFile>) -> NewFile {
    NewFile { path: path.into(), mode: 0o600, mtime: 1, size: size as u64, sent: None, parent }
}

/// A backup in memory: the index and what its frames hold.
#[derive(Default)]
struct Stored {
    index: FileIndex,
    /// The content of the frames, by pack and number.
    frames: Vec<Vec<RawFrame>>,
}

fn packs(label: &str, frames: &[RawFrame], frames_per_pack: usize) -> Vec<PackEntry> {
    let packs = frames.chunks(frames_per_pack).enumerate();
    packs
        .map(|(number, frames)| PackEntry {
            label: label.parse().unwrap(),
            number: number as u32,
            stored_size: 1,
            hash: ContentHash([0; 32]),
            frames: frames
                .iter()
                .map(|frame| PackFrame {
                    stored_size: 1,
                    raw_size: frame.content.len() as u32,
                    hash: ShortHash(0),
                })
                .collect(),
        })
        .collect()
}

impl Stored {
    fn content(&self, path: &str) -> Vec<u8> {
        let file = self.index.files.iter().find(|file| file.path == path).unwrap();
        let FileKind::File { extents, .. } = &file.kind else { panic!("a directory") };
        let mut bytes = Vec::new();
        for extent in extents {
            match *extent {
                Extent::Zeros { length } => bytes.resize(bytes.len() + length as usize, 0),
                Extent::Stored { pack, frame, offset, length } => {
                    let frame = &self.frames[pack as usize][frame as usize].content;
                    bytes.extend_from_slice(&frame[offset as usize..(offset + length) as usize]);
                }
            }
        }
        bytes
    }

    /// What it has under a path, as `Parent` would give it.
    fn parent_file(&self, path: &str) -> Option<ParentFile> {
        let file = self.index.files.iter().find(|file| file.path == path)?;
        let FileKind::File { extents, .. } = &file.kind else { return None };
        Some(ParentFile::new(extents, |pack, frame, offset| {
            let frame = &self.frames[pack as usize][frame as usize];
            let mut at = 0;
            for length in &frame.blocks {
                let length = u32::from(*length);
                if at == offset {
                    let content = &frame.content[at as usize..(at + length) as usize];
                    return Some(Block { length, hash: key().hash(content).short() });
                }
                at += length;
            }
            None
        }))
    }

    /// The backup that a packer came to, which may build on this one.
    fn next(&self, packer: Packer, frames: Vec<RawFrame>, label: &str, per_pack: usize) -> Stored {
        assert!(frames.iter().all(|frame| frame.content.len() <= FRAME_SIZE));
        let tiled = |frame: &RawFrame| {
            frame.blocks.iter().map(|length| usize::from(*length)).sum::<usize>()
                == frame.content.len()
        };
        assert!(frames.iter().all(tiled));
        let own = packs(label, &frames, per_pack);
        let (bytes, sums) = packer.index(own, self.index.packs.clone()).unwrap();
        let index = FileIndex::decode(bytes).unwrap();
        assert_eq!(sums.packs as usize, index.packs.len());
        let frames_of = |pack: &PackEntry| -> Vec<RawFrame> {
            if pack.label.as_str() == label {
                let chunks: Vec<_> = frames.chunks(per_pack).collect();
                return chunks[pack.number as usize].to_vec();
            }
            let place = self.index.packs.iter().position(|older| older == pack).unwrap();
            self.frames[place].clone()
        };
        Stored { frames: index.packs.iter().map(frames_of).collect(), index }
    }
}

/// Content of which some blocks are zeros.
fn content(seed: usize, size: usize) -> Vec<u8> {
    (0..size).map(|i| if i / BLOCK % 5 == 3 { 0 } else { (i / 7 + seed * 31 + 1) as u8 }).collect()
}

fn feed(packer: &mut Packer, bytes: &[u8], chunk: usize, frames: &mut Vec<RawFrame>) {
    bytes.chunks(chunk).for_each(|part| packer.data(part, frames));
}

const FULL: &str = "20261123T071500Z-full-9c1e";

fn full(files: &[(String, Vec<u8>)], chunk: usize, per_pack: usize) -> Stored {
    let mut packer = Packer::new(key());
    let mut frames = Vec::new();
    packer.directory("base", 0o700);
    for (path, bytes) in files {
        packer.begin(new_file(path, bytes.len(), None));
        feed(&mut packer, bytes, chunk, &mut frames);
    }
    packer.end_file();
    frames.extend(packer.end_frame());
    Stored::default().next(packer, frames, FULL, per_pack)
}

fn change(bytes: &mut Vec<u8>, changes: &[(usize, u8)], size: usize) {
    bytes.resize(size, 0);
    for (at, value) in changes {
        let blocks = size.div_ceil(BLOCK).max(1);
        if let Some(byte) = bytes.get_mut(at % blocks * BLOCK) {
            *byte = *value;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    // A full backup, then one that compares, then one whose changed blocks are sent: each gives back
    // every file as it was, whatever the sizes and however the stream is torn.
    #[test]
    fn every_backup_of_a_chain_gives_back_every_file(
        sizes in prop::collection::vec(0_usize..600_000, 1..6),
        chunk in 1_usize..100_000,
        per_pack in 1_usize..4,
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 0..12),
        new_size in 0_usize..700_000,
        new_blocks in 0_usize..90,
    ) {
        let mut files: Vec<(String, Vec<u8>)> = sizes.iter().enumerate()
            .map(|(index, size)| (format!("f{index}"), content(index, *size)))
            .collect();
        let first = full(&files, chunk, per_pack);
        for (path, bytes) in &files {
            prop_assert_eq!(&first.content(path), bytes);
        }

        change(&mut files[0].1, &changes, new_size);
        files.push(("new".into(), content(99, 10_000)));
        let (mut packer, mut frames) = (Packer::new(key()), Vec::new());
        for (path, bytes) in &files {
            packer.begin(new_file(path, bytes.len(), first.parent_file(path)));
            feed(&mut packer, bytes, chunk, &mut frames);
        }
        packer.end_file();
        frames.extend(packer.end_frame());
        let stored: usize = frames.iter().map(|frame| frame.content.len()).sum();
        prop_assert_eq!(packer.new_bytes() as usize, stored);
        let most = 10_000 + (changes.len() + 2) * BLOCK + new_size.saturating_sub(sizes[0]);
        prop_assert!(stored <= most, "{} bytes stored again", stored);
        let second = first.next(packer, frames, "20261124T071500Z-incr-9c1e", per_pack);
        for (path, bytes) in &files {
            prop_assert_eq!(&second.content(path), bytes);
        }

        // The server's own way: whole blocks, a file of blocks.
        let old = second.content("f0");
        let mut bytes = old.clone();
        bytes.resize(old.len().next_multiple_of(BLOCK), 0);
        change(&mut bytes, &changes, new_blocks * BLOCK);
        let truncation = bytes.len().min(old.len() / BLOCK * BLOCK);
        let changed: Vec<u32> = (0..new_blocks as u32).filter(|number| {
            let range = *number as usize * BLOCK..(*number as usize + 1) * BLOCK;
            range.end > truncation || old.get(range.clone()) != bytes.get(range)
        }).collect();
        let (mut packer, mut frames) = (Packer::new(key()), Vec::new());
        let mut file = new_file("f0", bytes.len(), second.parent_file("f0"));
        file.sent = Some(changed.clone());
        packer.begin(file);
        let sent: Vec<u8> = changed.iter()
            .flat_map(|number| &bytes[*number as usize * BLOCK..(*number as usize + 1) * BLOCK])
            .copied().collect();
        feed(&mut packer, &sent, chunk, &mut frames);
        packer.end_file();
        frames.extend(packer.end_frame());
        let third = second.next(packer, frames, "20261125T071500Z-incr-9c1e", per_pack);
        prop_assert_eq!(third.content("f0"), bytes);
    }
}

#[test]
fn what_the_parent_does_not_reach_is_zeros() {
    let first = full(&[("f".into(), content(1, BLOCK))], 100, 1);
    let mut packer = Packer::new(key());
    let mut file = new_file("f", 3 * BLOCK, first.parent_file("f"));
    file.sent = Some(vec![]);
    packer.begin(file);
    let second = first.next(packer, vec![], "20261124T071500Z-incr-9c1e", 1);
    let mut expected = content(1, BLOCK);
    expected.resize(3 * BLOCK, 0);
    assert_eq!(second.content("f"), expected);
    assert_eq!(second.index.packs.len(), 1);
}

#[test]
fn packs_in_which_nothing_lies_any_more_are_not_named() {
    let big = content(1, 3 * FRAME_SIZE);
    let first = full(&[("a".into(), big), ("b".into(), content(2, 100))], 10_000, 1);
    assert!(first.index.packs.len() > 2);
    let mut packer = Packer::new(key());
    let mut frames = Vec::new();
    packer.begin(new_file("b", 100, first.parent_file("b")));
    feed(&mut packer, &content(2, 100), 10, &mut frames);
    packer.end_file();
    assert_eq!(packer.end_frame(), None, "nothing is new");
    let second = first.next(packer, frames, "20261124T071500Z-incr-9c1e", 1);
    assert_eq!(second.index.packs.len(), 1);
    assert_eq!(second.content("b"), content(2, 100));
}
