//! WAL as PostgreSQL 17 writes it, made up as the simulation goes: for every timeline its bytes,
//! from the segment on in which it branched off.
//!
//! A new timeline's first segment begins with a copy of the old one's bytes up to the fork, page
//! headers and all; pages that begin behind the fork name the new timeline. What a crash cuts off
//! in the middle of a record is given up by the next page (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).

use std::collections::BTreeMap;
use std::fmt::Write;

use pgkeep::wal::Lsn;

use crate::dice::Dice;

pub const SYSTEM_ID: u64 = 7_100_000_000_000_000_001;
pub const SEGMENT: u64 = 1 << 20;
pub const PAGE: u64 = 8192;

const PAGE_MAGIC_17: u16 = 0xD116;
const CONTINUES: u16 = 0x1;
const LONG_HEADER: u16 = 0x2;
const OVERWRITES: u16 = 0x8;

const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_HEAP: u8 = 10;
const NOOP: u8 = 0x20;
const SWITCH: u8 = 0x40;
const END_OF_RECOVERY: u8 = 0x90;
const OVERWRITE_CONTRECORD: u8 = 0xD0;
const CHECKPOINT_SHUTDOWN: u8 = 0x00;
const CHECKPOINT_ONLINE: u8 = 0x10;

/// One timeline's WAL.
pub struct Timeline {
    /// The timeline before, and where this one left it.
    pub parent: Option<(u32, Lsn)>,
    /// Where its first segment begins.
    start: u64,
    bytes: Vec<u8>,
    /// Begin and end of every whole record in `bytes`; the end is where the next may begin.
    records: Vec<(u64, u64)>,
}

/// The WAL of one cluster, on all its timelines.
pub struct Wal {
    timelines: BTreeMap<u32, Timeline>,
    dice: Dice,
    next_xid: u32,
}

impl Wal {
    /// A new cluster whose WAL begins at a boundary of segments.
    pub fn new(dice: Dice, start: Lsn) -> Wal {
        assert_eq!(start.0 % SEGMENT, 0);
        let first = Timeline { parent: None, start: start.0, bytes: Vec::new(), records: vec![] };
        let mut wal = Wal { timelines: BTreeMap::from([(1, first)]), dice, next_xid: 700 };
        wal.checkpoint(1, false);
        wal
    }

    fn timeline(&self, tli: u32) -> &Timeline {
        &self.timelines[&tli]
    }

    fn writer(&mut self, tli: u32) -> (&mut Timeline, u32) {
        (self.timelines.get_mut(&tli).unwrap(), tli)
    }

    pub fn timelines(&self) -> impl Iterator<Item = (u32, &Timeline)> {
        self.timelines.iter().map(|(tli, timeline)| (*tli, timeline))
    }

    /// The first byte of a timeline's own files.
    pub fn start(&self, tli: u32) -> Lsn {
        Lsn(self.timeline(tli).start)
    }

    /// Behind the last byte.
    pub fn end(&self, tli: u32) -> Lsn {
        self.timeline(tli).end()
    }

    /// WAL `[from, to)` of a timeline's own files; `None` where there is none.
    pub fn read(&self, tli: u32, from: Lsn, to: Lsn) -> Option<&[u8]> {
        let timeline = self.timelines.get(&tli)?;
        let begin = from.0.checked_sub(timeline.start)?;
        let end = to.0.checked_sub(timeline.start)?;
        timeline.bytes.get(begin as usize..end as usize)
    }

    /// The path that leads to a timeline: each with where it begins to count and where it ends.
    pub fn path(&self, tli: u32) -> Vec<(u32, Lsn, Option<Lsn>)> {
        let mut path = Vec::new();
        let (mut at, mut end) = (tli, None);
        while let Some((parent, fork)) = self.timeline(at).parent {
            path.push((at, fork, end));
            (at, end) = (parent, Some(fork));
        }
        path.push((at, Lsn::INVALID, end));
        path.reverse();
        path
    }

    /// The history file of a timeline; `None` for the first.
    pub fn history(&self, tli: u32) -> Option<Vec<u8>> {
        let path = self.path(tli);
        let mut text = String::new();
        for (ancestor, _, end) in &path[..path.len() - 1] {
            writeln!(text, "{ancestor}\t{}\tno recovery target specified\n", end.unwrap()).unwrap();
        }
        (path.len() > 1).then(|| text.into_bytes())
    }

    /// The last end of a record at or before `lsn`.
    pub fn whole_records_until(&self, tli: u32, lsn: Lsn) -> Lsn {
        let timeline = self.timeline(tli);
        let found = timeline.records.iter().rev().find(|record| record.1 <= lsn.0);
        Lsn(found.map_or(timeline.start, |record| record.1))
    }

    /// Begins timeline `new` where `tli` has its last whole record before `end`.
    pub fn fork(&mut self, tli: u32, new: u32, end: Lsn) -> Lsn {
        let fork = self.whole_records_until(tli, end);
        let start = fork.0 - fork.0 % SEGMENT;
        let old = self.timeline(tli);
        let bytes = match old.start <= start {
            true => self.read(tli, Lsn(start), fork).unwrap().to_vec(),
            false => panic!("timeline {new} would fork before timeline {tli} begins"),
        };
        let records = old.records.iter().filter(|record| record.1 <= fork.0).copied().collect();
        let timeline = Timeline { parent: Some((tli, fork)), start, bytes, records };
        assert!(self.timelines.insert(new, timeline).is_none(), "timeline {new} exists");
        let time = self.time();
        let body = [&time.to_le_bytes()[..], &new.to_le_bytes(), &tli.to_le_bytes(), &[2, 0, 0, 0]];
        self.record(new, 0, RM_XLOG, END_OF_RECOVERY, &body.concat());
        fork
    }

    /// A crash forgets what lies behind `flushed`, and the server starts again on its timeline.
    pub fn crash(&mut self, tli: u32, flushed: Lsn) {
        let (timeline, _) = self.writer(tli);
        timeline.bytes.truncate((flushed.0 - timeline.start) as usize);
        timeline.records.retain(|record| record.1 <= flushed.0);
        let whole = timeline.records.last().map_or(timeline.start, |record| record.1);
        if whole < flushed.0 {
            // Half a record is left, up to the end of a page.
            assert_eq!(flushed.0 % PAGE, 0);
            let (timeline, tli) = self.writer(tli);
            timeline.page_header(tli, 0, OVERWRITES);
            let time = self.time();
            let body = [whole.to_le_bytes(), time.to_le_bytes()].concat();
            self.record(tli, 0, RM_XLOG, OVERWRITE_CONTRECORD, &body);
        }
        self.checkpoint(tli, false);
    }

    fn time(&mut self) -> i64 {
        840_000_000_000_000 + i64::from(self.next_xid) * 1_000_003
    }

    pub fn checkpoint(&mut self, tli: u32, shutdown: bool) {
        let mut body = vec![0; 88];
        body[..8].copy_from_slice(&self.end(tli).0.to_le_bytes());
        let info = if shutdown { CHECKPOINT_SHUTDOWN } else { CHECKPOINT_ONLINE };
        self.record(tli, 0, RM_XLOG, info, &body);
    }

    /// Ends the segment (`pg_switch_wal`).
    pub fn switch(&mut self, tli: u32) {
        let (timeline, _) = self.writer(tli);
        if timeline.end().0 % SEGMENT == 0 {
            return;
        }
        self.record(tli, 0, RM_XLOG, SWITCH, &[]);
        let (timeline, _) = self.writer(tli);
        let end = timeline.end().0.next_multiple_of(SEGMENT);
        timeline.bytes.resize((end - timeline.start) as usize, 0);
        if let Some(last) = timeline.records.last_mut() {
            last.1 = end;
        }
    }

    /// Writes up to a boundary of pages or segments with nothing behind it, so that a fork there
    /// lies exactly on it.
    pub fn fill_to(&mut self, tli: u32, unit: u64) {
        loop {
            let left = unit - self.end(tli).0 % unit;
            // 24 bytes of header, 2 or 5 of data header, and what page headers take on the way.
            let pages = (left - 1) / PAGE;
            let data = left as i64 - 24 - pages as i64 * 24;
            if left == unit {
                return;
            }
            match data {
                0 => return self.record(tli, 0, RM_XLOG, NOOP, &[]),
                3..=256 => return self.record(tli, 0, RM_HEAP, 0, &vec![7; data as usize - 2]),
                262..=60_000 => {
                    return self.record(tli, 0, RM_HEAP, 0, &vec![7; data as usize - 5]);
                }
                60_001.. => self.record(tli, 0, RM_HEAP, 0, &vec![7; 50_000]),
                _ => self.record(tli, 0, RM_XLOG, NOOP, &[]),
            }
        }
    }

    /// A transaction that wrote about so many bytes.
    pub fn transaction(&mut self, tli: u32, bytes: u64) {
        self.next_xid += 1;
        let xid = self.next_xid;
        let mut left = bytes;
        while left > 0 {
            let longest = if self.dice.percent(5) { 200_000 } else { 6_000 };
            let length = self.dice.between(1, longest).min(left);
            let body = self.dice.bytes(length as usize);
            self.record(tli, xid, RM_HEAP, 0, &body);
            left -= length;
        }
        if self.dice.percent(2) {
            self.record(tli, 0, RM_XLOG, NOOP, &[]);
        }
        let time = self.time();
        let info = if self.dice.percent(5) { 0x20 } else { 0 };
        self.record(tli, xid, RM_XACT, info, &time.to_le_bytes());
    }

    fn record(&mut self, tli: u32, xid: u32, manager: u8, info: u8, data: &[u8]) {
        let (timeline, tli) = self.writer(tli);
        timeline.record(tli, xid, manager, info, data);
    }
}

impl Timeline {
    fn end(&self) -> Lsn {
        Lsn(self.start + self.bytes.len() as u64)
    }

    fn page_header(&mut self, tli: u32, continued: usize, more: u16) {
        let address = self.end().0;
        let first = address.is_multiple_of(SEGMENT);
        let mut flags = more;
        flags |= if continued > 0 { CONTINUES } else { 0 };
        flags |= if first { LONG_HEADER } else { 0 };
        self.bytes.extend(PAGE_MAGIC_17.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(tli.to_le_bytes());
        self.bytes.extend(address.to_le_bytes());
        self.bytes.extend((continued as u32).to_le_bytes());
        self.bytes.extend([0; 4]);
        if first {
            self.bytes.extend(SYSTEM_ID.to_le_bytes());
            self.bytes.extend((SEGMENT as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    fn record(&mut self, tli: u32, xid: u32, manager: u8, info: u8, data: &[u8]) {
        let page = PAGE as usize;
        if self.bytes.len().is_multiple_of(page) {
            self.page_header(tli, 0, 0);
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
        header.extend(self.records.last().map_or(0, |record| record.0).to_le_bytes());
        header.extend([info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &header);
        header.extend(crc.to_le_bytes());
        let begin = self.end().0;
        let record = [header, body].concat();
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if self.bytes.len().is_multiple_of(page) {
                self.page_header(tli, rest.len(), 0);
            }
            let room = page - self.bytes.len() % page;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(now);
            rest = later;
        }
        // Records begin at multiples of eight.
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
        self.records.push((begin, self.end().0));
    }
}

#[cfg(test)]
mod tests {
    use pgkeep::wal::{EventKind, ScanSummary, Scanner, SegmentSize, WalFormat};

    use super::*;

    fn scan(wal: &Wal, tli: u32) -> (ScanSummary, u64) {
        let segment_size = SegmentSize::new(SEGMENT).unwrap();
        let format = WalFormat { major: 17, segment_size, system_id: SYSTEM_ID };
        let start = wal.start(tli);
        let mut summary = ScanSummary::default();
        let mut ends = 0;
        Scanner::new(format, start)
            .feed(wal.read(tli, start, wal.end(tli)).unwrap(), &mut summary, &mut |event| {
                ends += u64::from(matches!(event.kind, EventKind::EndOfRecovery { .. }));
            })
            .unwrap();
        (summary, ends)
    }

    #[test]
    fn the_products_scanner_finds_nothing_wrong_with_made_up_wal() {
        let mut wal = Wal::new(Dice::new(1, "wal"), Lsn(0xFFF0_0000));
        for _ in 0..60 {
            wal.transaction(1, 30_000);
        }
        wal.switch(1);
        wal.transaction(1, 100_000);
        let middle = Lsn(wal.end(1).0 - 50_000).round_down(PAGE);
        wal.crash(1, middle);
        wal.transaction(1, 5_000);
        for (tli, unit) in [(2, 8), (3, PAGE), (4, SEGMENT)] {
            wal.transaction(tli - 1, 20_000);
            wal.fill_to(tli - 1, unit);
            let end = wal.end(tli - 1);
            assert_eq!(wal.fork(tli - 1, tli, end), end);
            assert_eq!(end.0 % unit, 0);
            wal.transaction(tli, 20_000);
        }
        for tli in 1..=4 {
            let (summary, ends) = scan(&wal, tli);
            assert_eq!(summary.damage, Vec::<String>::new(), "timeline {tli}");
            assert_eq!(summary.open_record, None);
            assert!(summary.commits > 0);
            // Timeline 2's end of recovery also lies in the copied part of 3's first segment.
            assert!(ends >= u64::from(tli > 1), "timeline {tli} has {ends} ends of recovery");
        }
        assert_eq!(wal.path(4).len(), 4);
    }
}
