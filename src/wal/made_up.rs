//! WAL made up for tests: pages with headers, records with their CRC and their place in the chain.

use super::{Lsn, SegmentSize, WAL_PAGE_SIZE, WalFormat};

pub(super) const FORMAT: WalFormat =
    WalFormat { major: 17, segment_size: SegmentSize::DEFAULT, system_id: 7 };
pub(super) const START: Lsn = Lsn(0x1_2300_0000);
/// 2026-11-23 07:00:00 UTC in microseconds since 2000-01-01.
pub(super) const SEVEN: i64 = (1_795_417_200 - 946_684_800) * 1_000_000;

const PAGE: usize = WAL_PAGE_SIZE as usize;
const CONTINUES: u16 = 1;
const LONG_HEADER: u16 = 2;
const OVERWRITES: u16 = 8;

/// Writes records one after the other from the start of a segment on.
pub(super) struct MadeUp {
    pub(super) bytes: Vec<u8>,
    pub(super) major: u32,
    pub(super) starts: Vec<Lsn>,
}

impl MadeUp {
    pub(super) fn new(major: u32) -> MadeUp {
        MadeUp { bytes: Vec::new(), major, starts: Vec::new() }
    }

    pub(super) fn format(&self) -> WalFormat {
        WalFormat { major: self.major, ..FORMAT }
    }

    fn page_header(&mut self, continued: usize, more_flags: u16) {
        let address = START.0 + self.bytes.len() as u64;
        let first = address.is_multiple_of(FORMAT.segment_size.bytes());
        let mut flags = if continued > 0 { CONTINUES } else { 0 } | more_flags;
        flags |= if first { LONG_HEADER } else { 0 };
        self.bytes.extend(self.format().page_magic().unwrap().to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(1_u32.to_le_bytes());
        self.bytes.extend(address.to_le_bytes());
        self.bytes.extend((continued as u32).to_le_bytes());
        self.bytes.extend([0; 4]);
        if first {
            self.bytes.extend(FORMAT.system_id.to_le_bytes());
            self.bytes.extend((FORMAT.segment_size.bytes() as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    /// A record with this main data; where it begins.
    pub(super) fn record(&mut self, xid: u32, manager: u8, info: u8, data: &[u8]) -> Lsn {
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
        if padded.is_multiple_of(PAGE) {
            self.page_header(0, 0);
        }
        let mut body = match u8::try_from(data.len()) {
            Ok(0) => vec![],
            Ok(short) => vec![255, short],
            Err(_) => [&[254][..], &(data.len() as u32).to_le_bytes()].concat(),
        };
        body.extend(data);
        let previous = self.starts.last().copied().unwrap_or_default();
        let mut header = Vec::new();
        header.extend((24 + body.len() as u32).to_le_bytes());
        header.extend(xid.to_le_bytes());
        header.extend(previous.0.to_le_bytes());
        header.extend([info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &header);
        header.extend(crc.to_le_bytes());
        let start = START.advance(self.bytes.len() as u64);
        let record = [header, body].concat();
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if self.bytes.len().is_multiple_of(PAGE) {
                self.page_header(rest.len(), 0);
            }
            let room = PAGE - self.bytes.len() % PAGE;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(now);
            rest = later;
        }
        self.starts.push(start);
        start
    }

    /// A commit or abort: `parts` is what follows the time.
    pub(super) fn ends(&mut self, xid: u32, info: u8, parts: &[u32]) -> Lsn {
        let parts: Vec<u8> = parts.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.record(xid, 1, info, &[&SEVEN.to_le_bytes()[..], &parts].concat())
    }

    /// `XLOG_SMGR_CREATE`.
    pub(super) fn creates(&mut self, xid: u32, fork: u32) {
        let data: Vec<u8> =
            [1663, 5, 16384, fork].iter().flat_map(|n: &u32| n.to_le_bytes()).collect();
        self.record(xid, 2, 0x10, &data);
    }

    /// As after a crash: the last record loses all behind its first page, and what follows begins
    /// on the next one, which says so.
    pub(super) fn abandon_last_record(&mut self) {
        let start = self.starts.pop().unwrap().bytes_since(START) as usize;
        self.bytes.truncate((start + 1).next_multiple_of(PAGE));
        self.page_header(0, OVERWRITES);
    }
}
