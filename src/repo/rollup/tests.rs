use proptest::prelude::*;

use super::*;
use crate::wal::{Event, EventKind, Lsn, RelationFile, ScanSummary, SegmentNo, SegmentSize};

const SYSTEM_ID: u64 = 7_000_000_000_000_000_001;
const SIZE: SegmentSize = SegmentSize::DEFAULT;
const TIMELINE: TimelineId = TimelineId(3);

fn key() -> ContentKey {
    ContentKey::for_system(SYSTEM_ID)
}

/// A piece of the second log folder.
fn piece(segment: u8, from: u32, to: u32, events: usize) -> (PieceName, PieceMeta) {
    let segment = SegmentNo(256 + u64::from(segment));
    let hash = key().hash(&[segment.0 as u8, from as u8, to as u8]);
    let name = PieceName { segment: SIZE.name(TIMELINE, segment), from, to, hash: hash.short() };
    let start = name.start(SIZE).unwrap();
    let event = |number: usize| Event {
        lsn: start.advance(number as u64),
        end_lsn: start.advance(number as u64 + 100),
        kind: EventKind::FilesRemoved {
            xid: number as u32,
            time: "2026-11-23T07:00:04Z".parse().unwrap(),
            database: 5,
            removed: 1,
            created: 0,
            files: vec![RelationFile { tablespace: 1663, database: 5, number: number as u32 }],
        },
    };
    let metadata = PieceMeta {
        format: FORMAT_VERSION,
        system_identifier: SYSTEM_ID.to_string(),
        timeline: TIMELINE,
        start,
        end: name.end(SIZE).unwrap(),
        wal_segment_size: SIZE,
        hash,
        wal: ScanSummary { events: (0..events).map(event).collect(), ..ScanSummary::default() },
    };
    (name, metadata)
}

fn folder() -> Vec<(PieceName, PieceMeta)> {
    (0..=255).map(|segment| piece(segment, 0, 16 << 20, usize::from(segment) % 5)).collect()
}

#[test]
fn a_roll_up_gives_back_the_pieces_in_the_order_of_their_names() {
    let mut pieces = folder();
    let roll_up = build_roll_up(&key(), &pieces).unwrap();
    assert!(roll_up.key.starts_with("wal/00000003/00000001/index-"), "{}", roll_up.key);
    assert_eq!(read_roll_up(roll_up.bytes.clone(), &roll_up.key, &key()).unwrap(), pieces);
    // As a search wants it: far less than one trailer a piece.
    assert!(roll_up.bytes.len() < 64 << 10, "{} bytes", roll_up.bytes.len());
    // Two archivers that list the pieces in another order, or twice, write the same object.
    pieces.reverse();
    pieces.push(pieces[0].clone());
    assert_eq!(build_roll_up(&key(), &pieces).unwrap(), roll_up);
}

#[test]
fn a_roll_up_may_be_longer_than_a_frame() {
    let pieces: Vec<_> = (0..20).map(|segment| piece(segment, 0, 16 << 20, 1000)).collect();
    let roll_up = build_roll_up(&key(), &pieces).unwrap();
    let frames = Container::open(roll_up.bytes.clone()).unwrap().trailer().frames.len();
    assert!(frames > 1, "{frames} frames");
    assert_eq!(read_roll_up(roll_up.bytes, &roll_up.key, &key()).unwrap(), pieces);
}

#[test]
fn two_words_about_one_piece_are_chosen_between_without_their_order() {
    let one = piece(7, 0, 100, 0);
    let mut other = one.clone();
    other.1.wal.open_record = Some(Lsn(5));
    let build = |pieces: &[_]| build_roll_up(&key(), pieces).unwrap();
    assert_eq!(build(&[one.clone(), other.clone()]), build(&[other, one]));
}

#[test]
fn pieces_of_other_places_are_refused() {
    let good = piece(1, 0, 100, 0);
    let other_folder = {
        let (mut name, mut metadata) = piece(1, 0, 100, 0);
        name.segment.log = 2;
        metadata.start = name.start(SIZE).unwrap();
        metadata.end = name.end(SIZE).unwrap();
        (name, metadata)
    };
    let mut other_place = piece(2, 0, 100, 0);
    other_place.1.start = Lsn(0);
    let mut other_cluster = piece(2, 0, 100, 0);
    other_cluster.1.system_identifier = "1".to_owned();
    for bad in [other_folder, other_place, other_cluster] {
        let built = build_roll_up(&key(), &[good.clone(), bad.clone()]);
        assert!(matches!(built, Err(RollUpError::Misplaced(name)) if name == bad.0));
    }
    assert!(matches!(build_roll_up(&key(), &[]), Err(RollUpError::Empty)));
}

#[test]
fn a_roll_up_under_another_name_is_refused() {
    let roll_up = build_roll_up(&key(), &folder()).unwrap();
    let read = |object_key: &str, key: &ContentKey| {
        read_roll_up(roll_up.bytes.clone(), object_key, key).is_ok()
    };
    assert!(read(&roll_up.key, &key()));
    assert!(!read(&roll_up.key.replace("/00000001/", "/00000002/"), &key()));
    assert!(!read(&roll_up.key, &ContentKey::for_system(1)));
}

proptest! {
    #[test]
    fn any_pieces_of_a_folder_survive(
        parts in prop::collection::btree_set((any::<u8>(), 0_u32..1 << 23, 1_u32..1 << 23), 1..40),
        events in 0_usize..20,
    ) {
        let mut pieces: Vec<_> = parts
            .iter()
            .map(|(segment, from, length)| piece(*segment, *from, from + length, events))
            .collect();
        let roll_up = build_roll_up(&key(), &pieces).unwrap();
        pieces.sort_by_key(|piece| piece.0);
        prop_assert_eq!(read_roll_up(roll_up.bytes, &roll_up.key, &key()).unwrap(), pieces);
    }

    // Invariant I5: bytes are verified before use.
    #[test]
    fn damage_anywhere_is_noticed(position: prop::sample::Index, bit in 0_u8..8, cut: bool) {
        let pieces = [piece(1, 0, 100, 2), piece(2, 0, 16 << 20, 1)];
        let roll_up = build_roll_up(&key(), &pieces).unwrap();
        let mut bad = roll_up.bytes.to_vec();
        let at = position.index(bad.len());
        if cut {
            bad.truncate(at);
        } else {
            bad[at] ^= 1 << bit;
        }
        // A bit of the seek table's checksums, which only other readers use, may go unseen; what
        // is read is right all the same.
        if let Ok(read) = read_roll_up(bad.into(), &roll_up.key, &key()) {
            prop_assert!(!cut);
            prop_assert_eq!(read, pieces.to_vec());
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>, metadata: Vec<u8>, raw: Vec<u8>) {
        let name = "wal/00000003/00000001/index-0000000000000000.zst";
        let _ = read_roll_up(bytes.into(), name, &key());
        let frame = compress_frame(&raw, LEVEL).unwrap();
        let mut writer = ContainerWriter::default();
        writer.push(&frame);
        let object = [frame.stored, writer.finish(&metadata)].concat();
        let _ = read_roll_up(object.into(), name, &key());
    }
}
