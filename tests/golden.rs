//! Golden files: a small region in `tests/golden/v1`, as version 1 of the formats wrote it. The
//! tests read every object in it, so that archives which exist stay readable, and hold
//! `docs/FORMAT.md` against it.
//!
//! The files are only read. `PGKEEP_WRITE_GOLDEN=1 cargo test --test golden` writes them anew,
//! which is right only as long as no archive of that version exists outside of tests; after that
//! a changed format gets a folder of its own beside `v1`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "all of it is test code")]

#[path = "golden/bytes.rs"]
mod bytes_of;
#[path = "golden/make.rs"]
mod make;
#[path = "golden/page.rs"]
mod page;
#[path = "golden/wal.rs"]
mod wal;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Once;

use bytes::Bytes;
use pgkeep::repo::{
    Alive, BackupInfo, Block, BlockHashes, Container, Extent, FileIndex, FileKind, Gap, Lease,
    Lineage, PieceMeta, PieceName, parse_gap_key, parse_history_name, parse_index_name,
    read_roll_up,
};
use pgkeep::wal::{Lsn, TimelineHistory, TimelineId};
use serde_json::json;

use make::key;
use wal::{SEGMENT_SIZE, SYSTEM_ID, finished_segment, unfinished_segment};

const FULL: &str =
    "wal/00000002/00000016/0000000200000016000000B3-00000000-01000000-792e59139804e357.zst";
const TAIL: [&str; 3] = [
    "wal/00000002/00000016/0000000200000016000000B4-00000000-00002064-2f2730591f6fd551.zst",
    "wal/00000002/00000016/0000000200000016000000B4-00002064-00005000-87281c3ac348971b.zst",
    "wal/00000002/00000016/0000000200000016000000B4-00004000-00005A00-38ebeac07430cb13.zst",
];
const HISTORY: &str = "timeline/00000002-6ddbdece96558126.history";
/// The last segment of its folder, and the folder's roll-up.
const LATER: &str =
    "wal/00000003/00000017/0000000300000017000000FF-00000000-01000000-0aa33c56e79cdf3e.zst";
const INDEX: &str = "wal/00000003/00000017/index-45aab96e40a161a0.zst";
const LATER_HISTORY: &str = "timeline/00000003-9b7268d5522997ef.history";
const GAP: &str = "gap/00000001/00000016A0002000-00000016A2000000.json";
const ALIVE: &str = "alive/db1-pgkeep.json";
const BACKUP_JSON: &str = "backup/20261123T071500Z-incr-9c1e/backup.json";
const FILES_IDX: &str = "backup/20261123T071500Z-incr-9c1e/files.idx";
const MANIFEST: &str = "backup/20261123T071500Z-incr-9c1e/backup_manifest";
const LEASE: &str = "lease/20261123T071500Z-incr-9c1e-000001.json";
const PACK: &str = "backup/20261123T071500Z-incr-9c1e/pack-000000.zst";

/// The golden region's lineage; written anew first when the environment asks for it.
fn region() -> PathBuf {
    static WRITE: Once = Once::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/v1")
        .join(make::CLUSTER)
        .join(SYSTEM_ID.to_string());
    WRITE.call_once(|| {
        if std::env::var_os("PGKEEP_WRITE_GOLDEN").is_some_and(|value| value == "1") {
            make::write(&folder);
            // Past the capture of the test's output: it must not go unseen.
            let _ = writeln!(std::io::stderr(), "PGKEEP_WRITE_GOLDEN: wrote {}", folder.display());
        }
    });
    folder
}

fn read(object: &str) -> Bytes {
    let path = region().join(object);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    bytes.into()
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> T {
    serde_json::from_slice(bytes).unwrap()
}

/// The keys of all objects in a folder, sorted.
fn keys_below(folder: &Path) -> Vec<String> {
    let mut keys = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => keys.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned()),
            }
        }
    }
    keys.sort_unstable();
    keys
}

#[test]
fn the_golden_region_holds_these_objects_and_no_others() {
    let [first, second, third] = TAIL;
    let expected = [
        ALIVE,
        BACKUP_JSON,
        MANIFEST,
        FILES_IDX,
        PACK,
        GAP,
        LEASE,
        "lineage.json",
        HISTORY,
        LATER_HISTORY,
        FULL,
        first,
        second,
        third,
        LATER,
        INDEX,
    ];
    assert_eq!(keys_below(&region()), expected);
}

#[test]
fn a_lineage_is_read_and_written_as_the_same_bytes() {
    let bytes = read("lineage.json");
    let lineage: Lineage = parse(&bytes);
    assert_eq!(lineage.format, 1);
    assert_eq!(lineage.cluster, "orders");
    assert_eq!(lineage.system_identifier, "7654321098765432101");
    assert_eq!(lineage.system_id(), 7_654_321_098_765_432_101);
    assert_eq!(lineage.postgres_major, 17);
    assert_eq!(lineage.wal_segment_size.bytes(), 16_777_216);
    // Two archivers that write it at once must write the same.
    assert_eq!(lineage.to_bytes(), bytes);
}

#[test]
fn a_full_piece_gives_its_segment_and_what_the_wal_says() {
    let container = Container::open(read(FULL)).unwrap();
    let expected = json!({
        "format": 1,
        "system_identifier": "7654321098765432101",
        "timeline": 2,
        "start": "16/B3000000",
        "end": "16/B4000000",
        "wal_segment_size": 16_777_216,
        "hash": "792e59139804e3578beac5d4cd30a56b37a829789c7860dca9e5f6dd2806b0c0",
        "wal": {
            "records": 9, "commits": 3, "aborts": 1,
            "min_time": "2026-11-23T07:00:01.250Z", "max_time": "2026-11-23T07:00:03.000001Z",
            "min_xid": 1000, "max_xid": 1003,
            "events": [
                {"lsn": "16/B3000028", "end_lsn": "16/B3000058", "event": "end_of_recovery",
                 "time": "2026-11-23T07:00:00Z"},
                {"lsn": "16/B3000058", "end_lsn": "16/B30000D0", "event": "checkpoint",
                 "redo": "16/B3000028", "shutdown": false},
                {"lsn": "16/B3000178", "end_lsn": "16/B30001E0", "event": "restore_point",
                 "name": "before upgrade", "time": "2026-11-23T07:00:04Z"},
                {"lsn": "16/B30001E0", "end_lsn": "16/B3000258", "event": "checkpoint",
                 "redo": "16/B3000028", "shutdown": true},
            ],
            "last_record": "16/B3000258",
        },
    });
    assert_eq!(parse::<serde_json::Value>(&container.trailer().metadata), expected);
    // Nothing of it is lost on the way through the type, nor added.
    let meta: PieceMeta = parse(&container.trailer().metadata);
    assert_eq!(serde_json::to_value(meta).unwrap(), expected);
    assert_eq!(container.trailer().frames.len(), 16);
    assert!(container.raw().unwrap() == finished_segment(), "the raw content differs");
}

#[test]
fn a_piece_tells_which_files_databases_and_timelines_came_and_went() {
    let container = Container::open(read(LATER)).unwrap();
    let metadata: serde_json::Value = parse(&container.trailer().metadata);
    let event = |lsn: &str, end_lsn: &str, kind: &str, more: serde_json::Value| {
        let mut event = json!({"lsn": lsn, "end_lsn": end_lsn, "event": kind});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        event
    };
    let (first, behind_first) = ("17/FF000028", "17/FF0000A0");
    let expected = [
        event(first, behind_first, "checkpoint", json!({"redo": first, "shutdown": true})),
        event(first, behind_first, "timeline_switch", json!({"timeline": 3, "previous": 2})),
        event(
            behind_first,
            "17/FF0000F0",
            "files_removed",
            json!({
                "xid": 2000, "time": "2026-11-23T07:00:05Z", "database": 16384,
                "removed": 2, "created": 0, "files": ["1663/16384/16390", "1663/16384/16395"],
            }),
        ),
        event(
            "17/FF000120",
            "17/FF000168",
            "files_removed",
            json!({
                "xid": 2001, "time": "2026-11-23T07:00:06Z", "database": 16384,
                "removed": 1, "created": 1, "files": ["1663/16384/16400"],
            }),
        ),
        event(
            "17/FF000168",
            "17/FF000198",
            "database_created",
            json!({
                "xid": 2003, "database": 16410, "tablespace": 1663, "template": 1,
            }),
        ),
        event(
            "17/FF000198",
            "17/FF0001C0",
            "database_created",
            json!({
                "xid": 2004, "database": 16411, "tablespace": 1663,
            }),
        ),
        event(
            "17/FF0001C0",
            "17/FF0001F0",
            "database_dropped",
            json!({
                "xid": 2005, "database": 16411, "tablespaces": [1663, 16300],
            }),
        ),
    ];
    assert_eq!(metadata["wal"]["events"], json!(expected));
    // Nothing of it is lost on the way through the type, nor added.
    let meta: PieceMeta = parse(&container.trailer().metadata);
    assert_eq!(serde_json::to_value(meta).unwrap(), metadata);
}

#[test]
fn a_roll_up_repeats_what_the_pieces_of_its_folder_say() {
    let pieces = read_roll_up(read(INDEX), INDEX, &key()).unwrap();
    let metadata = Container::open(read(LATER)).unwrap().trailer().metadata.clone();
    let name = LATER.rsplit('/').next().unwrap();
    assert_eq!(pieces, [(PieceName::parse(name).unwrap(), parse(&metadata))]);
    // The line is the metadata as the piece has them.
    let raw = Container::open(read(INDEX)).unwrap().raw().unwrap();
    let metadata = String::from_utf8(metadata.to_vec()).unwrap();
    let line = format!("{{\"piece\":\"{name}\",\"metadata\":{metadata}}}\n");
    assert_eq!(String::from_utf8(raw.clone()).unwrap(), line);
    let short = parse_index_name(INDEX.rsplit('/').next().unwrap());
    assert_eq!(short, Some(key().hash(&raw).short()));
}

#[test]
fn pieces_of_a_tail_say_where_a_record_is_cut() {
    let open = [("16/B4000050", 1, 1), ("16/B4004EE8", 2, 1), ("16/B4004EE8", 2, 1)];
    let segment = unfinished_segment();
    for ((object, (from, to)), (open_record, records, commits)) in
        TAIL.iter().zip(make::TAIL).zip(open)
    {
        let container = Container::open(read(object)).unwrap();
        assert!(container.raw().unwrap() == segment[from..to], "{object} differs");
        let meta: PieceMeta = parse(&container.trailer().metadata);
        assert_eq!(meta.start, Lsn(0x16_B400_0000 + from as u64));
        assert_eq!(meta.end, Lsn(0x16_B400_0000 + to as u64));
        let open_record = Some(open_record.parse().unwrap());
        let wal = meta.wal;
        let found = (wal.open_record, wal.records, wal.commits, wal.damage.len());
        assert_eq!(found, (open_record, records, commits, 0), "{object}");
    }
}

#[test]
fn the_name_of_a_piece_tells_its_place_and_the_hash_of_its_content() {
    for object in [FULL, TAIL[0], TAIL[1], TAIL[2], LATER] {
        let name = PieceName::parse(object.rsplit('/').next().unwrap()).unwrap();
        assert_eq!(name.key(), object);
        let container = Container::open(read(object)).unwrap();
        let meta: PieceMeta = parse(&container.trailer().metadata);
        let place = (name.segment.timeline, name.start(SEGMENT_SIZE), name.end(SEGMENT_SIZE));
        assert_eq!(place, (meta.timeline, Some(meta.start), Some(meta.end)));
        assert_eq!(key().hash(&container.raw().unwrap()), meta.hash);
        assert_eq!(name.hash, meta.hash.short());
    }
}

#[test]
fn a_history_file_has_postgresqls_own_bytes_under_their_hash() {
    let bytes = read(HISTORY);
    assert_eq!(bytes, "1\t16/B3000028\tno recovery target specified\n");
    let name = HISTORY.strip_prefix("timeline/").unwrap();
    assert_eq!(parse_history_name(name), Some((TimelineId(2), key().hash(&bytes).short())));
    let history = TimelineHistory::parse(TimelineId(2), &bytes).unwrap();
    assert_eq!(history.end_of(TimelineId(1)), Some(Some(Lsn(0x16_B300_0028))));
}

#[test]
fn a_gap_says_what_is_missing_and_why() {
    let gap: Gap = parse(&read(GAP));
    assert_eq!(gap, make::gap());
    assert_eq!(parse_gap_key(GAP), Some((TimelineId(1), Lsn(0x16_A000_2000), Lsn(0x16_A200_0000))));
    assert_eq!((gap.timeline, gap.from, gap.to), parse_gap_key(GAP).unwrap());
}

#[test]
fn an_archivers_last_word_is_read() {
    let alive: Alive = parse(&read(ALIVE));
    assert_eq!(alive, make::alive());
    assert_eq!(alive.regions[1].archived_lsn, None);
}

#[test]
fn a_commit_point_proves_the_index_and_the_manifest() {
    let info: BackupInfo = parse(&read(BACKUP_JSON));
    assert_eq!(info, make::backup(&read(PACK), &read(FILES_IDX)));
    assert_eq!(read(MANIFEST), make::manifest());
    for (object, stored) in [(FILES_IDX, &info.files_idx), (MANIFEST, &info.backup_manifest)] {
        let bytes = read(object);
        assert_eq!(
            (bytes.len() as u64, key().hash(&bytes)),
            (stored.size, stored.hash),
            "{object}"
        );
    }
    assert_eq!((info.files, info.size), (6, 1_099_513_133_315));
}

#[test]
fn what_a_commit_point_need_not_say_may_be_absent() {
    let mut value: serde_json::Value = parse(&read(BACKUP_JSON));
    let object = value.as_object_mut().unwrap();
    object.remove("parent").unwrap();
    object.remove("checksum_failures").unwrap();
    object.remove("changes_from").unwrap();
    let info: BackupInfo = serde_json::from_value(value.clone()).unwrap();
    assert_eq!((info.parent.clone(), info.checksum_failures.len()), (None, 0));
    assert_eq!(serde_json::to_value(info).unwrap(), value);
}

#[test]
fn a_lease_says_what_must_stay() {
    let lease: Lease = parse(&read(LEASE));
    assert_eq!(lease, make::lease());
    let unknown = String::from_utf8(read(LEASE).to_vec()).unwrap().replace("backup", "drill");
    let unknown: Lease = parse(unknown.as_bytes());
    assert!(unknown.names(&make::OLDER_LABEL.parse().unwrap()), "an unknown kind counts too");
}

#[test]
fn a_pack_gives_its_frames() {
    let container = Container::open(read(PACK)).unwrap();
    assert_eq!(
        container.trailer().metadata,
        r#"{"backup":"20261123T071500Z-incr-9c1e","pack":0,"hash_frames":1}"#
    );
    assert_eq!(container.trailer().frames.len(), 3);
    assert!(container.frame(0).unwrap() == make::pack_frames()[0]);
    assert!(container.frame(1).unwrap() == make::pack_frames()[1]);
    let mut hashes = BlockHashes::default();
    hashes.add(&container.frame(2).unwrap()).unwrap();
    let page = &make::pack_frames()[0][3..];
    let block = Block { length: 8192, hash: key().hash(page).short() };
    assert_eq!(hashes.find(0, 3), Some(block));
}

#[test]
fn an_index_tells_every_path_pack_and_extent() {
    let index = FileIndex::decode(read(FILES_IDX)).unwrap();
    assert!(index == make::index(&read(PACK)), "the index says something else");
}

#[test]
fn the_extents_of_an_index_give_the_files_from_the_pack() {
    let index = FileIndex::decode(read(FILES_IDX)).unwrap();
    let pack = Container::open(read(PACK)).unwrap();
    let content = |path: &str| {
        let file = index.files.iter().find(|file| file.path == path).unwrap();
        let FileKind::File { extents, .. } = &file.kind else { panic!("{path} is a directory") };
        let Extent::Stored { pack: 1, frame, offset, length } = extents[0] else {
            panic!("{path} does not begin in the golden pack");
        };
        let raw = pack.frame(frame as usize).unwrap();
        assert_eq!(key().hash(&raw).short(), index.packs[1].frames[frame as usize].hash);
        raw[offset as usize..(offset + length) as usize].to_vec()
    };
    assert_eq!(content("PG_VERSION"), b"17\n");
    assert!(content("base/5/1259") == make::pack_frames()[0][3..]);
    assert!(content("global/pg_control") == make::pack_frames()[1]);
}

/// The metadata as the first builds wrote them: they did not tell of new timelines.
fn without_later_events(metadata: &[u8]) -> serde_json::Value {
    let mut metadata: serde_json::Value = parse(metadata);
    let events = metadata["wal"]["events"].as_array_mut().unwrap();
    events.retain(|event| event["event"] != "timeline_switch");
    metadata
}

/// Compressed bytes may change with zstd; what they hold, and all else, may not.
#[test]
fn what_is_written_today_is_what_the_golden_files_hold() {
    let frames = |bytes: Bytes| {
        let container = Container::open(bytes).unwrap();
        let frames = 0..container.trailer().frames.len();
        let raw: Vec<_> = frames.map(|index| container.frame(index).unwrap()).collect();
        (raw, container.trailer().metadata.clone())
    };
    let backup = serde_json::to_vec_pretty(&make::backup(&read(PACK), &read(FILES_IDX))).unwrap();
    for (object, bytes) in make::objects() {
        let golden = read(&object);
        let same = match object.as_str() {
            FILES_IDX => frames(make::files_idx(&read(PACK))) == frames(golden),
            BACKUP_JSON => backup == golden,
            FULL => {
                let ((raw, metadata), (golden_raw, golden)) = (frames(bytes), frames(golden));
                let golden: serde_json::Value = parse(&golden);
                raw == golden_raw && without_later_events(&metadata) == golden
            }
            name if name.ends_with(".zst") => frames(bytes) == frames(golden),
            _ => bytes == golden,
        };
        assert!(same, "{object} is written differently today");
    }
}
