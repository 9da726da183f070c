//! Makes the objects of the golden region as the program makes them.
//!
//! What only the compressed form decides (sizes and hashes of stored bytes) is taken from objects
//! that are given, so that another version of zstd changes nothing else.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use pgkeep::repo::{
    Alive, BackupInfo, BackupType, Block, BlockHashesWriter, ChangesFrom, Container,
    ContainerWriter, ContentKey, Extent, FORMAT_VERSION, FRAME_SIZE, FileEntry, FileIndex,
    FileKind, Gap, LINEAGE_FILE, Lease, LeaseKind, Lineage, PackEntry, PackFrame, PieceMeta,
    PieceName, RegionWord, RollUp, StoredObject, Tablespace, alive_key, backup_json_key,
    build_roll_up, compress_frame, files_idx_key, gap_key, history_key, lease_key, manifest_key,
    pack_key,
};
use pgkeep::wal::{Lsn, ScanSummary, Scanner, TimelineId};

use crate::wal::{
    FINISHED, FORMAT, LATER, LATER_TIMELINE, SEGMENT_SIZE, SYSTEM_ID, TIMELINE, UNFINISHED,
    finished_segment, later_segment, unfinished_segment,
};

pub const CLUSTER: &str = "orders";
pub const LABEL: &str = "20261123T071500Z-incr-9c1e";
pub const OLDER_LABEL: &str = "20261122T030000Z-full-1a2b";
pub const HISTORY: &[u8] = b"1\t16/B3000028\tno recovery target specified\n";
pub const LATER_HISTORY: &[u8] =
    b"1\t16/B3000028\tno recovery target specified\n2\t17/FF000028\tno recovery target specified\n";
/// The small pieces of the segment still being written, as offsets in it. The last one overlaps:
/// an archiver that started again cut it.
pub const TAIL: [(usize, usize); 3] = [(0, 0x2064), (0x2064, 0x5000), (0x4000, 0x5A00)];
/// So many extents that the records of one file fill more than a frame.
pub const MANY_EXTENTS: usize = 180_000;

const LEVEL: i32 = 1;

pub fn key() -> ContentKey {
    ContentKey::for_system(SYSTEM_ID)
}

/// An object of frames that hold `parts`.
fn container(parts: &[&[u8]], metadata: &[u8]) -> Bytes {
    let mut writer = ContainerWriter::default();
    let mut bytes = BytesMut::new();
    for part in parts {
        let frame = compress_frame(part, LEVEL).unwrap();
        writer.push(&frame);
        bytes.extend_from_slice(&frame.stored);
    }
    bytes.extend_from_slice(&writer.finish(metadata));
    bytes.freeze()
}

fn piece(
    timeline: TimelineId,
    segment: &[u8],
    segment_start: Lsn,
    (from, to): (usize, usize),
) -> (String, Bytes) {
    let mut scanner = Scanner::new(FORMAT, segment_start);
    let mut before = ScanSummary::default();
    scanner.feed(&segment[..from], &mut before, &mut |_| ()).unwrap();
    let mut summary = ScanSummary::default();
    let raw = &segment[from..to];
    scanner.feed(raw, &mut summary, &mut |_| ()).unwrap();
    let hash = key().hash(raw);
    let metadata = PieceMeta {
        format: FORMAT_VERSION,
        system_identifier: SYSTEM_ID.to_string(),
        timeline,
        start: segment_start.advance(from as u64),
        end: segment_start.advance(to as u64),
        wal_segment_size: SEGMENT_SIZE,
        hash,
        wal: summary,
    };
    let parts: Vec<&[u8]> = raw.chunks(FRAME_SIZE).collect();
    let name = PieceName {
        segment: SEGMENT_SIZE.name(timeline, SEGMENT_SIZE.segment_of(segment_start)),
        from: from as u32,
        to: to as u32,
        hash: hash.short(),
    };
    (name.key(), container(&parts, &serde_json::to_vec(&metadata).unwrap()))
}

pub fn pieces() -> Vec<(String, Bytes)> {
    let finished = finished_segment();
    let mut pieces = vec![piece(TIMELINE, &finished, FINISHED, (0, finished.len()))];
    let unfinished = unfinished_segment();
    pieces.extend(TAIL.map(|range| piece(TIMELINE, &unfinished, UNFINISHED, range)));
    pieces.push(later_piece());
    pieces
}

fn later_piece() -> (String, Bytes) {
    let later = later_segment();
    piece(LATER_TIMELINE, &later, LATER, (0, later.len()))
}

/// The roll-up of the folder of timeline 3.
pub fn roll_up() -> RollUp {
    let (name, bytes) = later_piece();
    let name = PieceName::parse(name.rsplit('/').next().unwrap()).unwrap();
    let container = Container::open(bytes).unwrap();
    let metadata = serde_json::from_slice(&container.trailer().metadata).unwrap();
    build_roll_up(&key(), &[(name, metadata)]).unwrap()
}

pub fn lineage() -> Lineage {
    Lineage {
        format: FORMAT_VERSION,
        cluster: CLUSTER.to_owned(),
        system_identifier: SYSTEM_ID.to_string(),
        postgres_major: 17,
        wal_segment_size: SEGMENT_SIZE,
    }
}

pub fn gap() -> Gap {
    Gap {
        format: FORMAT_VERSION,
        timeline: TimelineId(1),
        from: Lsn(0x16_A000_2000),
        to: Lsn(0x16_A200_0000),
        noticed: "2026-11-22T18:30:00.250Z".parse().unwrap(),
        reason: "requested WAL segment 0000000100000016000000A0 has already been removed"
            .to_owned(),
    }
}

/// The second lease of the backup.
pub fn lease() -> Lease {
    Lease {
        format: FORMAT_VERSION,
        kind: LeaseKind::Backup,
        label: LABEL.parse().unwrap(),
        parent: Some(OLDER_LABEL.parse().unwrap()),
        written: "2026-11-23T07:20:00.000003Z".parse().unwrap(),
        expires: "2026-11-23T07:35:00.000003Z".parse().unwrap(),
    }
}

pub fn alive() -> Alive {
    let region = |name: &str, state: &str, archived_lsn| RegionWord {
        name: name.to_owned(),
        state: state.to_owned(),
        archived_lsn,
    };
    Alive {
        format: FORMAT_VERSION,
        archiver: "db1-pgkeep".to_owned(),
        server_time: "2026-11-23T07:01:02.000003Z".parse().unwrap(),
        timeline: TIMELINE,
        wal_end: Lsn(0x16_B400_5A00),
        durable_lsn: Lsn(0x16_B400_5A00),
        server_version: "17.6 (Debian 17.6-1.pgdg13+1)".to_owned(),
        regions: vec![
            region("eu", "healthy", Some(Lsn(0x16_B400_5A00))),
            region("us", "unreachable", None),
        ],
    }
}

pub fn manifest() -> Bytes {
    let text = "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"Files\": [],\n\"Manifest-Checksum\": \"0\"}\n";
    Bytes::from_static(text.as_bytes())
}

/// What the pack's two frames hold. In the first a small file and a page share the room.
pub fn pack_frames() -> [Vec<u8>; 2] {
    let page = (0..8192_u32).map(|i| (i / 5) as u8);
    let control = (0..8192_u32).map(|i| (i % 251) as u8);
    [b"17\n".iter().copied().chain(page).collect(), control.collect()]
}

/// The hashes of the blocks in the pack's frames, which lie in a third one.
pub fn pack_hashes() -> Vec<u8> {
    let [first, second] = pack_frames();
    let block =
        |content: &[u8]| Block { length: content.len() as u32, hash: key().hash(content).short() };
    let mut hashes = BlockHashesWriter::default();
    hashes.push(0, &[block(&first[..3]), block(&first[3..])]);
    hashes.push(1, &[block(&second)]);
    hashes.finish().concat()
}

pub fn pack() -> Bytes {
    let frames = pack_frames();
    let metadata = format!("{{\"backup\":\"{LABEL}\",\"pack\":0,\"hash_frames\":1}}");
    container(&[&frames[0], &frames[1], &pack_hashes()], metadata.as_bytes())
}

/// The pack that lies in an older backup's folder, which is not part of the golden region.
pub fn older_pack() -> PackEntry {
    let mut hash = [0; 32];
    hash.iter_mut().enumerate().for_each(|(index, byte)| *byte = index as u8);
    let hash = pgkeep::repo::ContentHash(hash);
    let frame = PackFrame { stored_size: 300, raw_size: 1 << 20, hash: hash.short() };
    let label = OLDER_LABEL.parse().unwrap();
    PackEntry { label, number: 7, stored_size: 134_217_728, hash, frames: vec![frame] }
}

/// What `files.idx` says of the pack.
pub fn pack_entry(pack: &Bytes) -> PackEntry {
    let container = Container::open(pack.clone()).unwrap();
    let frames = container.trailer().frames.iter().zip(pack_frames());
    let frames = frames.map(|(range, raw)| PackFrame {
        stored_size: range.stored_size,
        raw_size: range.raw_size,
        hash: key().hash(&raw).short(),
    });
    PackEntry {
        label: LABEL.parse().unwrap(),
        number: 0,
        stored_size: pack.len() as u64,
        hash: key().hash(pack),
        frames: frames.collect(),
    }
}

fn directory(path: &str, mode: u32) -> FileEntry {
    FileEntry { path: path.to_owned(), mode, kind: FileKind::Directory }
}

fn file(path: &str, mode: u32, extents: Vec<Extent>) -> FileEntry {
    let size = extents.iter().map(Extent::length).sum();
    let kind = FileKind::File { mtime: 1_795_417_200, size, extents };
    FileEntry { path: path.to_owned(), mode, kind }
}

/// The index. Pack 0 is the older backup's.
pub fn index(pack: &Bytes) -> FileIndex {
    let stored = |pack, frame, offset, length| Extent::Stored { pack, frame, offset, length };
    let relation = vec![
        stored(1, 0, 3, 8192),
        Extent::Zeros { length: 40_960 },
        stored(0, 0, 1_040_384, 8192),
    ];
    let zeros = vec![Extent::Zeros { length: 1 << 40 }];
    FileIndex {
        packs: vec![older_pack(), pack_entry(pack)],
        files: vec![
            file("PG_VERSION", 0o600, vec![stored(1, 0, 0, 3)]),
            directory("base", 0o700),
            directory("base/5", 0o700),
            file("base/5/1259", 0o600, relation),
            file("base/5/16400", 0o600, vec![stored(0, 0, 1_040_384, 8); MANY_EXTENTS]),
            file("base/5/2619", 0o600, vec![]),
            directory("global", 0o700),
            file("global/pg_control", 0o600, vec![stored(1, 1, 0, 8192)]),
            directory("größe", 0o750),
            directory("pg_tblspc/16500/PG_17_202406281", 0o700),
            file("pg_tblspc/16500/PG_17_202406281/16501", 0o640, zeros),
        ],
    }
}

pub fn files_idx(pack: &Bytes) -> Bytes {
    index(pack).encode().unwrap()
}

pub fn backup(pack: &Bytes, files_idx: &Bytes) -> BackupInfo {
    let stored = |bytes: &Bytes| StoredObject { size: bytes.len() as u64, hash: key().hash(bytes) };
    let index = FileIndex::decode(files_idx.clone()).unwrap();
    let sizes = index.files.iter().filter_map(|file| match file.kind {
        FileKind::File { size, .. } => Some(size),
        FileKind::Directory => None,
    });
    BackupInfo {
        format: FORMAT_VERSION,
        label: LABEL.parse().unwrap(),
        kind: BackupType::Incremental,
        parent: Some(OLDER_LABEL.parse().unwrap()),
        changes_from: Some(ChangesFrom::WalSummaries),
        pgkeep_version: "0.1.0".to_owned(),
        server_version: "17.6 (Debian 17.6-1.pgdg13+1)".to_owned(),
        postgres_major: 17,
        system_identifier: SYSTEM_ID.to_string(),
        timeline: TIMELINE,
        wal_segment_size: SEGMENT_SIZE,
        start_lsn: Lsn(0x16_B300_0028),
        stop_lsn: Lsn(0x16_B300_0258),
        start_time: "2026-11-23T07:15:00Z".parse().unwrap(),
        stop_time: "2026-11-23T07:15:09.750Z".parse().unwrap(),
        data_checksums: true,
        checksum_failures: vec![
            "checksum verification failed in file \"base/5/1259\", block 1".to_owned(),
        ],
        tablespaces: vec![Tablespace { oid: 16500, location: "/srv/fast".to_owned() }],
        files: sizes.clone().count() as u64,
        size: sizes.sum(),
        new_size: pack_frames().concat().len() as u64,
        stored_size: pack.len() as u64,
        packs: 2,
        packs_size: 134_217_728 + pack.len() as u64,
        files_idx: stored(files_idx),
        backup_manifest: stored(&manifest()),
        include: None,
        include_failures: Vec::new(),
    }
}

/// Every object with its key.
pub fn objects() -> Vec<(String, Bytes)> {
    let label = LABEL.parse().unwrap();
    let (pack, gap, alive) = (pack(), gap(), alive());
    let files_idx = files_idx(&pack);
    let backup = serde_json::to_vec_pretty(&backup(&pack, &files_idx)).unwrap();
    let mut objects = pieces();
    let roll_up = roll_up();
    objects.extend([
        (roll_up.key, roll_up.bytes),
        (LINEAGE_FILE.to_owned(), lineage().to_bytes().into()),
        (history_key(TIMELINE, key().hash(HISTORY).short()), Bytes::from_static(HISTORY)),
        (
            history_key(LATER_TIMELINE, key().hash(LATER_HISTORY).short()),
            Bytes::from_static(LATER_HISTORY),
        ),
        (gap_key(gap.timeline, gap.from, gap.to), serde_json::to_vec_pretty(&gap).unwrap().into()),
        (alive_key(&alive.archiver), serde_json::to_vec_pretty(&alive).unwrap().into()),
        (lease_key(&label, 1), serde_json::to_vec_pretty(&lease()).unwrap().into()),
        (pack_key(&label, 0), pack),
        (manifest_key(&label), manifest()),
        (files_idx_key(&label), files_idx),
        (backup_json_key(&label), backup.into()),
    ]);
    objects
}

/// Writes the golden region anew.
pub fn write(folder: &Path) {
    if folder.exists() {
        std::fs::remove_dir_all(folder).unwrap();
    }
    for (key, bytes) in objects() {
        let path = folder.join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}
