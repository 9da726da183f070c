//! WAL as PostgreSQL 17 writes it, made up: pages with headers, records with their CRC.
//!
//! Three segments of 16 MiB. The first begins timeline 2, holds one record of each kind that the
//! archive understands, and ends early with a switch. The second is still being written: one of
//! its records goes over several pages. The third begins timeline 3 at the end of a log folder and
//! tells of relation files and databases that came and went.

use pgkeep::wal::{Lsn, SegmentSize, TimelineId, WalFormat};

pub const SYSTEM_ID: u64 = 7_654_321_098_765_432_101;
pub const SEGMENT_SIZE: SegmentSize = SegmentSize::DEFAULT;
pub const FORMAT: WalFormat =
    WalFormat { major: 17, segment_size: SEGMENT_SIZE, system_id: SYSTEM_ID };
pub const TIMELINE: TimelineId = TimelineId(2);
/// Where the finished segment begins.
pub const FINISHED: Lsn = Lsn(0x16_B300_0000);
/// Where the segment begins that is still being written.
pub const UNFINISHED: Lsn = Lsn(0x16_B400_0000);

/// The timeline of the segment that is the last one of its log folder, and where that begins.
pub const LATER_TIMELINE: TimelineId = TimelineId(3);
pub const LATER: Lsn = Lsn(0x17_FF00_0000);

const PAGE_SIZE: usize = 8192;
const PAGE_MAGIC_17: u16 = 0xD116;
const CONTINUES: u16 = 1;
const LONG_HEADER: u16 = 2;

const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_SMGR: u8 = 2;
const RM_DBASE: u8 = 4;
const RM_HEAP: u8 = 10;

/// 2026-11-23 07:00:00 UTC in microseconds since 2000-01-01.
const SEVEN: i64 = (1_795_417_200 - 946_684_800) * 1_000_000;

struct Writer {
    timeline: TimelineId,
    start: Lsn,
    bytes: Vec<u8>,
    previous: u64,
}

impl Writer {
    fn page_header(&mut self, continued: usize) {
        let first = self.bytes.is_empty();
        let mut flags = if continued > 0 { CONTINUES } else { 0 };
        flags |= if first { LONG_HEADER } else { 0 };
        let address = self.start.0 + self.bytes.len() as u64;
        self.bytes.extend(PAGE_MAGIC_17.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(self.timeline.0.to_le_bytes());
        self.bytes.extend(address.to_le_bytes());
        self.bytes.extend((continued as u32).to_le_bytes());
        self.bytes.extend([0; 4]);
        if first {
            self.bytes.extend(SYSTEM_ID.to_le_bytes());
            self.bytes.extend((SEGMENT_SIZE.bytes() as u32).to_le_bytes());
            self.bytes.extend((PAGE_SIZE as u32).to_le_bytes());
        }
    }

    fn record(&mut self, xid: u32, manager: u8, info: u8, data: &[u8]) {
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
        if padded.is_multiple_of(PAGE_SIZE) {
            self.page_header(0);
        }
        let mut body = Vec::new();
        match u8::try_from(data.len()) {
            Ok(0) => {}
            Ok(short) => body.extend([255, short]),
            Err(_) => {
                body.push(254);
                body.extend((data.len() as u32).to_le_bytes());
            }
        }
        body.extend(data);
        let mut header = Vec::new();
        header.extend((24 + body.len() as u32).to_le_bytes());
        header.extend(xid.to_le_bytes());
        header.extend(self.previous.to_le_bytes());
        header.extend([info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &header);
        header.extend(crc.to_le_bytes());
        self.previous = self.start.0 + self.bytes.len() as u64;
        let record = [header, body].concat();
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if self.bytes.len().is_multiple_of(PAGE_SIZE) {
                self.page_header(rest.len());
            }
            let room = PAGE_SIZE - self.bytes.len() % PAGE_SIZE;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(now);
            rest = later;
        }
    }

    /// A record whose data begins with a time, so many microseconds after seven.
    fn timed(&mut self, xid: u32, manager: u8, info: u8, after: i64, more: &[u8]) {
        let data = [&(SEVEN + after).to_le_bytes()[..], more].concat();
        self.record(xid, manager, info, &data);
    }
}

fn writer(timeline: TimelineId, start: Lsn, previous: u64) -> Writer {
    let mut writer = Writer { timeline, start, bytes: Vec::new(), previous };
    writer.page_header(0);
    writer
}

/// All 16 MiB of the finished segment.
pub fn finished_segment() -> Vec<u8> {
    let mut wal = writer(TIMELINE, FINISHED, 0x16_B2FF_FF90);
    // End of recovery: the first record of timeline 2, whose parent is 1.
    wal.timed(0, RM_XLOG, 0x90, 0, &[2, 0, 0, 0, 1, 0, 0, 0]);
    let mut checkpoint = vec![0; 88];
    checkpoint[..8].copy_from_slice(&0x16_B300_0028_u64.to_le_bytes());
    wal.record(0, RM_XLOG, 0x10, &checkpoint);
    // Commits out of order, an abort, and a prepared transaction (1001) ended by another.
    wal.timed(1000, RM_XACT, 0x00, 1_500_000, &[]);
    wal.timed(1003, RM_XACT, 0x00, 1_250_000, &[]);
    wal.timed(1002, RM_XACT, 0x20, 2_000_001, &[]);
    wal.timed(0, RM_XACT, 0x30 | 0x80, 3_000_001, &[16, 0, 0, 0, 0xE9, 3, 0, 0]);
    let mut name = [0; 64];
    name[..14].copy_from_slice(b"before upgrade");
    wal.timed(0, RM_XLOG, 0x70, 4_000_000, &name);
    wal.record(0, RM_XLOG, 0x00, &checkpoint);
    // A switch: the rest of the segment is not used.
    wal.record(0, RM_XLOG, 0x40, &[]);
    wal.bytes.resize(SEGMENT_SIZE.bytes() as usize, 0);
    wal.bytes
}

/// What there is of the segment still being written.
pub fn unfinished_segment() -> Vec<u8> {
    let mut wal = writer(TIMELINE, UNFINISHED, 0x16_B300_0250);
    wal.timed(1004, RM_XACT, 0x00, 60_000_000, &[]);
    let long: Vec<u8> = (0..20_000_u32).map(|i| (i / 7) as u8).collect();
    wal.record(1005, RM_HEAP, 0x00, &long);
    wal.timed(1005, RM_XACT, 0x00, 61_000_000, &[]);
    wal.record(0, RM_HEAP, 0x00, &long[..3000]);
    wal.bytes
}

fn numbers(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// All 16 MiB of the segment of timeline 3.
pub fn later_segment() -> Vec<u8> {
    let mut wal = writer(LATER_TIMELINE, LATER, 0x17_FEFF_FF90);
    let mut checkpoint = vec![0; 88];
    checkpoint[..8].copy_from_slice(&0x17_FF00_0028_u64.to_le_bytes());
    checkpoint[8..16].copy_from_slice(&numbers(&[3, 2]));
    wal.record(0, RM_XLOG, 0x00, &checkpoint);
    // DROP TABLE: database, relation files.
    let files = numbers(&[5, 16384, 1663, 2, 1663, 16384, 16390, 1663, 16384, 16395]);
    wal.timed(2000, RM_XACT, 0x81, 5_000_000, &files);
    // TRUNCATE in a subtransaction.
    wal.record(2002, RM_SMGR, 0x10, &numbers(&[1663, 16384, 16401, 0]));
    let files = numbers(&[7, 16384, 1663, 1, 2002, 1, 1663, 16384, 16400]);
    wal.timed(2001, RM_XACT, 0x81, 6_000_000, &files);
    // Two databases, one of them copied; the other one goes again.
    wal.record(2003, RM_DBASE, 0x00, &numbers(&[16410, 1663, 1, 1663]));
    wal.record(2004, RM_DBASE, 0x10, &numbers(&[16411, 1663]));
    wal.record(2005, RM_DBASE, 0x20, &numbers(&[16411, 2, 1663, 16300]));
    wal.record(0, RM_XLOG, 0x40, &[]);
    wal.bytes.resize(SEGMENT_SIZE.bytes() as usize, 0);
    wal.bytes
}
