//! Tests of `files.idx`.

use proptest::prelude::*;

use super::*;
use crate::repo::FRAME_SIZE;

fn pack(frames: usize) -> PackEntry {
    PackEntry {
        label: "20261123T071500Z-full-9c1e".parse().unwrap(),
        number: 0,
        stored_size: 1000,
        hash: ContentHash([7; 32]),
        frames: vec![
            PackFrame { stored_size: 10, raw_size: FRAME_SIZE as u32, hash: ShortHash(5) };
            frames
        ],
    }
}

fn file(path: &str, extents: Vec<Extent>) -> FileEntry {
    let size = extents.iter().map(Extent::length).sum();
    FileEntry {
        path: path.to_owned(),
        mode: 0o600,
        kind: FileKind::File { mtime: 1_700_000_000, size, extents },
    }
}

fn small_index() -> FileIndex {
    let stored = Extent::Stored { pack: 0, frame: 1, offset: 8192, length: 8192 };
    FileIndex {
        packs: vec![pack(2)],
        files: vec![
            FileEntry { path: "base".into(), mode: 0o700, kind: FileKind::Directory },
            file("base/1/1259", vec![stored, Extent::Zeros { length: 1 << 30 }]),
            file("empty", vec![]),
        ],
    }
}

#[test]
fn an_index_survives_and_its_files_come_back_sorted() {
    let mut index = small_index();
    index.files.reverse();
    let bytes = index.encode().unwrap();
    assert_eq!(FileIndex::decode(bytes).unwrap(), small_index());
}

#[test]
fn a_file_of_very_many_extents_survives() {
    let extents = (0..200_000)
        .map(|i| Extent::Stored { pack: 0, frame: i % 2, offset: 8 * (i % 1000), length: 8 })
        .collect();
    let mut index = FileIndex { packs: vec![pack(2)], files: vec![file("big", extents)] };
    let bytes = index.encode().unwrap();
    assert_eq!(FileIndex::decode(bytes).unwrap(), index);
}

// CASES 26: millions of files must not need gigabytes.
#[test]
fn many_files_take_few_bytes_each() {
    let files: Vec<_> = (0..100_000_u32)
        .map(|i| {
            let offset = (i % 128) * 8192;
            let extent = Extent::Stored { pack: 0, frame: i % 50, offset, length: 8192 };
            file(&format!("base/16384/{}", 100_000 + i), vec![extent])
        })
        .collect();
    let mut index = FileIndex { packs: vec![pack(50)], files };
    let bytes = index.encode().unwrap();
    assert!(bytes.len() < 2_000_000, "{} bytes for 100,000 files", bytes.len());
    assert_eq!(FileIndex::decode(bytes).unwrap().files.len(), 100_000);
}

#[test]
fn a_path_that_leads_outside_is_refused() {
    for path in ["../etc/passwd", "/etc/passwd", "base//1", "base/../../x", "", "a\0b"] {
        let mut index = FileIndex { packs: vec![], files: vec![file(path, vec![])] };
        let bytes = index.encode().unwrap();
        assert!(FileIndex::decode(bytes).is_err(), "{path:?} was accepted");
    }
}

#[test]
fn an_extent_that_points_nowhere_is_refused() {
    let stored = |pack, frame, offset, length| Extent::Stored { pack, frame, offset, length };
    for extent in [
        stored(1, 0, 0, 1),
        stored(0, 2, 0, 1),
        stored(0, 0, FRAME_SIZE as u32, 1),
        stored(0, 0, u32::MAX, u32::MAX),
    ] {
        let mut index = FileIndex { packs: vec![pack(2)], files: vec![file("x", vec![extent])] };
        let bytes = index.encode().unwrap();
        assert!(FileIndex::decode(bytes).is_err(), "{extent:?} was accepted");
    }
}

proptest! {
    #[test]
    fn one_flipped_bit_anywhere_is_noticed(position in 0_usize..10_000, bit in 0_u8..8) {
        let good = small_index().encode().unwrap();
        let mut bad = good.to_vec();
        let position = position % bad.len();
        bad[position] ^= 1 << bit;
        if let Ok(index) = FileIndex::decode(Bytes::from(bad)) {
            prop_assert_eq!(index, small_index());
        }
    }

    #[test]
    fn records_of_garbage_never_panic(raw: Vec<u8>) {
        let mut rest = raw.as_slice();
        let mut index = FileIndex::default();
        while !rest.is_empty() && index.take_file(&mut rest).is_ok() {}
        let mut rest = raw.as_slice();
        while !rest.is_empty() && take_pack(&mut rest).is_some() {}
    }
}

#[test]
fn packs_alone_are_read_without_the_files() {
    let bytes = small_index().encode().unwrap();
    assert_eq!(FileIndex::decode_packs(bytes).unwrap(), small_index().packs);
    let bytes = FileIndex::default().encode().unwrap();
    assert_eq!(FileIndex::decode_packs(bytes).unwrap(), []);
}

#[test]
fn every_path_is_looked_up_whatever_its_extents_fill() {
    let many = |count: u32| {
        (0..count)
            .map(|i| Extent::Stored { pack: 0, frame: i % 2, offset: 8 * (i % 1000), length: 8 })
            .collect()
    };
    let mut files = vec![file("a", many(500_000)), file("b", many(3)), file("z/1", many(400_000))];
    files.extend((0..40_000).map(|i| file(&format!("base/16384/{i}"), many(i % 3))));
    files.push(FileEntry { path: "base".into(), mode: 0o700, kind: FileKind::Directory });
    let mut index = FileIndex { packs: vec![pack(2)], files };
    let lookup = FileLookup::open(index.encode().unwrap()).unwrap();
    assert_eq!(lookup.packs(), index.packs);
    for file in &index.files {
        assert_eq!(lookup.find(&file.path).unwrap().as_ref(), Some(file), "{}", file.path);
    }
    for path in ["", "A", "aa", "base/16384", "base/16384/40000", "z", "z/2"] {
        assert_eq!(lookup.find(path).unwrap(), None, "{path}");
    }
    let empty = FileLookup::open(FileIndex::default().encode().unwrap()).unwrap();
    assert_eq!(empty.find("a").unwrap(), None);
}
