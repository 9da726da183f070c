//! The bytes themselves, read as `docs/FORMAT.md` describes them and without the code that wrote
//! them.

use bytes::Bytes;
use pgkeep::repo::{
    Alive, BackupInfo, Container, ContainerError, ContainerWriter, FRAME_SIZE, FileIndex,
    FileIndexError, Gap, Lineage, PieceMeta,
};
use pgkeep::wal::{EventKind, Lsn};

use crate::make::MANY_EXTENTS;
use crate::{
    ALIVE, BACKUP_JSON, FILES_IDX, FULL, GAP, INDEX, LATER, PACK, SYSTEM_ID, TAIL, key, parse, read,
};

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

#[test]
fn frames_metadata_and_seek_table_lie_where_the_page_says() {
    for object in [FULL, TAIL[0], TAIL[1], TAIL[2], LATER, INDEX, PACK, FILES_IDX] {
        let bytes = read(object);
        let footer = bytes.len() - 9;
        let entries = u32_at(&bytes, footer);
        assert_eq!(bytes[footer + 4..], hex("80 B1EA928F"), "{object}");
        let table = bytes.len() - 17 - 12 * entries;
        assert_eq!(bytes[table..table + 4], hex("5E2A4D18"));
        assert_eq!(u32_at(&bytes, table + 4), 12 * entries + 9);
        let last = footer - 12;
        let mut at = 0;
        for entry in (table + 8..last).step_by(12) {
            let (stored, raw) = (u32_at(&bytes, entry), u32_at(&bytes, entry + 4));
            let frame = &bytes[at..at + stored];
            assert_eq!(frame[..4], hex("28B52FFD"), "a zstd frame's magic number");
            assert_eq!(frame[4] & 0b0000_0100, 0b0000_0100, "Content_Checksum_flag");
            assert_eq!(frame[4] & 0b0000_0011, 0, "Dictionary_ID_flag");
            assert!((1..=FRAME_SIZE).contains(&raw));
            assert_eq!(frame[stored - 4..], bytes[entry + 8..entry + 12]);
            at += stored;
        }
        assert_eq!(bytes[at..at + 4], hex("5D2A4D18"), "{object}");
        assert_eq!(at + 8 + u32_at(&bytes, at + 4), table, "metadata ends where the table begins");
        assert_eq!(u32_at(&bytes, last), table - at, "the last entry is that of the metadata");
        assert_eq!(bytes[last + 4..footer], [0; 8]);
        let (frames, json_length) = (entries - 1, table - at - 16);
        assert_eq!(bytes.len(), at + 45 + json_length + 12 * frames);
        assert_eq!(bytes[at + 8..at + 12], hex("01 000000"));
        let json = &bytes[at + 16..table];
        assert_eq!(u32_at(&bytes, at + 12), crc32c::crc32c(json) as usize);
        assert_eq!(json, Container::open(bytes.clone()).unwrap().trailer().metadata);
    }
}

#[test]
fn the_key_of_content_hashes_is_derived_as_the_page_says() {
    let derived = blake3::derive_key("pgkeep v1 content hash", &SYSTEM_ID.to_le_bytes());
    let manifest = read(crate::MANIFEST);
    let hash = blake3::keyed_hash(&derived, &manifest);
    assert_eq!(key().hash(&manifest).0, *hash.as_bytes());
    assert_eq!(key().hash(&manifest).short().to_string(), hash.to_hex()[..16]);
}

#[test]
fn the_hashes_of_blocks_have_the_bytes_that_the_page_says() {
    let pack = Container::open(read(PACK)).unwrap();
    let hash = |content: &[u8]| key().hash(content).0[..8].to_vec();
    let (first, second) = (pack.frame(0).unwrap(), pack.frame(1).unwrap());
    let expected = [
        hex("00 02 03 01 8040 01"),
        hash(&first[..3]),
        hash(&first[3..]),
        hex("01 01 8040 01"),
        hash(&second),
    ];
    assert_eq!(pack.frame(2).unwrap(), expected.concat());
}

#[test]
fn the_records_of_an_index_have_the_bytes_that_the_page_says() {
    let container = Container::open(read(FILES_IDX)).unwrap();
    let pack = Container::open(read(PACK)).unwrap();
    let ranges = &pack.trailer().frames;
    let varint = |value: usize| [(value & 0x7F | 0x80) as u8, (value >> 7) as u8];
    // Label, number 7, 2^27 bytes, hash, one frame of 300 stored and 2^20 raw bytes.
    let older = [
        &[26][..],
        b"20261122T030000Z-full-1a2b",
        &hex("07 80808040"),
        &hex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"),
        &hex("01 ac02 808040 0001020304050607"),
    ];
    // The pack beside it: its sizes are below 2^14, two bytes each.
    let own = [
        &[26][..],
        b"20261123T071500Z-incr-9c1e",
        &[0],
        &varint(read(PACK).len()),
        &key().hash(&read(PACK)).0,
        &[2],
        &varint(ranges[0].stored_size as usize),
        &varint(ranges[0].raw_size as usize),
        &key().hash(&pack.frame(0).unwrap()).0[..8],
        &varint(ranges[1].stored_size as usize),
        &varint(ranges[1].raw_size as usize),
        &key().hash(&pack.frame(1).unwrap()).0[..8],
    ];
    assert_eq!(container.frame(0).unwrap(), [older.concat(), own.concat()].concat());

    let path = |path: &str| [&[path.len() as u8][..], path.as_bytes()].concat();
    let mode_and_mtime = hex("8003 f0c88fd806");
    let mut expected = Vec::new();
    let mut add = |parts: &[&[u8]]| expected.extend(parts.concat());
    // Three bytes at offset 0 of frame 0 of the second pack.
    add(&[&[1], &path("PG_VERSION"), &mode_and_mtime, &hex("03 01 02000003")]);
    add(&[&[0], &path("base"), &hex("c003")]);
    add(&[&[0], &path("base/5"), &hex("c003")]);
    add(&[&[1], &path("base/5/1259"), &mode_and_mtime, &hex("80c003 03")]);
    add(&[&hex("02 00 03 8040"), &hex("00 80c002"), &hex("01 00 80c03f 8040")]);
    // 8192 extents in a record, the rest in records of kind 2.
    let extent = hex("01 00 80c03f 08");
    let full = extent.repeat(8192);
    add(&[&[1], &path("base/5/16400"), &mode_and_mtime, &hex("80f257 8040"), &full]);
    for _ in 1..MANY_EXTENTS / 8192 {
        add(&[&hex("02 8040"), &full]);
    }
    add(&[&hex("02 a03e"), &extent.repeat(MANY_EXTENTS % 8192)]);
    add(&[&[1], &path("base/5/2619"), &mode_and_mtime, &hex("00 00")]);
    add(&[&[0], &path("global"), &hex("c003")]);
    add(&[&[1], &path("global/pg_control"), &mode_and_mtime, &hex("8040 01 02 01 00 8040")]);
    add(&[&[0], &path("größe"), &hex("e803")]);
    add(&[&[0], &path("pg_tblspc/16500/PG_17_202406281"), &hex("c003")]);
    add(&[&[1], &path("pg_tblspc/16500/PG_17_202406281/16501"), &hex("a003 f0c88fd806")]);
    add(&[&hex("808080808020 01 00 808080808020")]);

    let (first, second) = (container.frame(1).unwrap(), container.frame(2).unwrap());
    assert_eq!(container.trailer().frames.len(), 3);
    assert!([first, second.clone()].concat() == expected, "the file records differ");
    assert_eq!(second[..3], hex("02 a03e"), "a frame may begin with more extents");
    let summary: serde_json::Value = parse(&container.trailer().metadata);
    let paths = ["PG_VERSION", "base/5/16400"];
    let counts = serde_json::json!({
        "format": 1, "pack_frames": 1, "packs": 2, "files": 11, "first_paths": paths,
    });
    assert_eq!(summary, counts);
}

#[test]
fn keys_that_a_later_version_may_add_are_passed_over() {
    fn same<T: serde::de::DeserializeOwned + PartialEq>(bytes: &[u8]) -> bool {
        let mut value: serde_json::Value = parse(bytes);
        value["a_key_of_tomorrow"] = serde_json::json!({ "x": 1 });
        serde_json::from_value::<T>(value).unwrap() == parse::<T>(bytes)
    }
    let piece = Container::open(read(FULL)).unwrap();
    assert!(same::<PieceMeta>(&piece.trailer().metadata));
    assert!(same::<Lineage>(&read("lineage.json")));
    assert!(same::<Gap>(&read(GAP)));
    assert!(same::<Alive>(&read(ALIVE)));
    assert!(same::<BackupInfo>(&read(BACKUP_JSON)));
}

#[test]
fn events_that_a_later_version_may_add_are_passed_over() {
    let piece = Container::open(read(FULL)).unwrap();
    let known: PieceMeta = parse(&piece.trailer().metadata);
    let mut value: serde_json::Value = parse(&piece.trailer().metadata);
    let event = serde_json::json!({
        "lsn": "16/B3000300", "end_lsn": "16/B3000330", "event": "of_tomorrow", "x": { "y": [1] },
    });
    value["wal"]["events"].as_array_mut().unwrap().push(event);
    let mut read: PieceMeta = serde_json::from_value(value).unwrap();
    let unknown = read.wal.events.pop().unwrap();
    assert_eq!((unknown.lsn, unknown.kind), (Lsn(0x16_B300_0300), EventKind::Unknown));
    assert_eq!(read, known);
}

#[test]
fn newer_versions_of_container_and_index_are_refused_by_name() {
    let mut newer = read(PACK).to_vec();
    let metadata = newer.windows(4).position(|bytes| bytes == hex("5D2A4D18")).unwrap();
    newer[metadata + 8] = 2;
    let opened = Container::open(Bytes::from(newer));
    assert_eq!(opened.err(), Some(ContainerError::Newer(2)));

    let summary = br#"{"format":2,"pack_frames":0,"packs":0,"files":0,"first_paths":[]}"#;
    let newer = ContainerWriter::default().finish(summary);
    let decoded = FileIndex::decode(newer);
    assert_eq!(decoded, Err(FileIndexError::Container(ContainerError::Newer(2))));
}
