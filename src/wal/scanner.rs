//! Reads WAL as it passes, in chunks of any size, and tells what it says.
//!
//! The scanner checks every page header and the CRC of every record, and reports the events that
//! the archive's index needs. It keeps a few KiB whatever the size of a record: bodies are hashed
//! as they pass and only the beginning of a wanted one is captured.
//!
//! Started inside a record (at a page that continues one) it skips to the next; the caller who
//! wants that record too starts it where the record begins ([`ScanSummary::open_record`]).

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::page::{LONG_HEADER, u32_at};
use super::record::{CRC_OFFSET, RECORD_HEADER, decode, is_switch, is_wanted};
use super::{Event, EventKind, Lsn, PageError, PageHeader, WAL_PAGE_SIZE, WalFormat};

/// How much of a wanted record is captured: the fixed parts of every kind lie within it.
const CAPTURE_LIMIT: usize = 4096;
/// `MAXIMUM_ALIGNOF`: records begin at multiples of this.
const RECORD_ALIGNMENT: u64 = 8;

/// What the WAL of one range says, for the index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanSummary {
    /// Records that ended in the range.
    pub records: u64,
    /// Transactions committed.
    pub commits: u64,
    /// Transactions rolled back.
    pub aborts: u64,
    /// The smallest time of a commit or abort. Times are not monotonic in WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_time: Option<DateTime<Utc>>,
    /// The largest time of a commit or abort.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_time: Option<DateTime<Utc>>,
    /// The smallest transaction identifier that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_xid: Option<u32>,
    /// The largest transaction identifier that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_xid: Option<u32>,
    /// Events other than commits and aborts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<Event>,
    /// Where the record begins that the end of the range cuts through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_record: Option<Lsn>,
    /// Where the last record begins that ended in the range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_record: Option<Lsn>,
    /// Records whose CRC is wrong, and other damage. Empty in healthy WAL.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<String>,
}

impl ScanSummary {
    /// Takes an event into account.
    pub fn add(&mut self, event: Event) {
        let (xid, time) = match &event.kind {
            EventKind::Commit { xid, time } => {
                self.commits += 1;
                (*xid, *time)
            }
            EventKind::Abort { xid, time } => {
                self.aborts += 1;
                (*xid, *time)
            }
            _ => {
                self.events.push(event);
                return;
            }
        };
        self.min_time = Some(self.min_time.map_or(time, |min| min.min(time)));
        self.max_time = Some(self.max_time.map_or(time, |max| max.max(time)));
        if xid != 0 {
            self.min_xid = Some(self.min_xid.map_or(xid, |min| min.min(xid)));
            self.max_xid = Some(self.max_xid.map_or(xid, |max| max.max(xid)));
        }
    }

    /// Adds what a directly following range says.
    pub fn append(&mut self, next: &ScanSummary) {
        let smaller = |a: Option<_>, b: Option<_>| [a, b].into_iter().flatten().min();
        let larger = |a: Option<_>, b: Option<_>| [a, b].into_iter().flatten().max();
        self.records += next.records;
        self.commits += next.commits;
        self.aborts += next.aborts;
        self.min_time = smaller(self.min_time, next.min_time);
        self.max_time = larger(self.max_time, next.max_time);
        self.min_xid = [self.min_xid, next.min_xid].into_iter().flatten().min();
        self.max_xid = [self.max_xid, next.max_xid].into_iter().flatten().max();
        self.events.extend(next.events.iter().cloned());
        self.open_record = next.open_record;
        self.last_record = next.last_record.or(self.last_record);
        self.damage.extend(next.damage.iter().cloned());
    }
}

/// What the bytes at the scanner's position are.
#[derive(Debug)]
enum Expect {
    /// The rest of a record whose beginning was not seen: so many bytes.
    Unknown { left: u64 },
    /// A record begins at the next aligned position.
    Record,
    /// The rest of this record.
    Body(Partial),
    /// Padding up to the end of the segment.
    Padding,
    /// Damage: nothing is understood until a page that begins with a record.
    Lost,
}

/// A record of which some bytes have passed.
#[derive(Debug)]
struct Partial {
    start: Lsn,
    total: u64,
    seen: u64,
    crc: u32,
    wanted: bool,
    head: Vec<u8>,
}

/// A WAL reader that is fed chunks in order.
#[derive(Debug)]
pub struct Scanner {
    format: WalFormat,
    position: Lsn,
    header: Vec<u8>,
    expect: Expect,
}

impl Scanner {
    /// A scanner for the bytes from `start` on. `start` may lie inside a page: then nothing is
    /// understood before the next one.
    pub fn new(format: WalFormat, start: Lsn) -> Scanner {
        Scanner { format, position: start, header: Vec::new(), expect: Expect::Lost }
    }

    /// Where the next byte is expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Where the record begins that has not ended yet.
    pub fn open_record(&self) -> Option<Lsn> {
        match &self.expect {
            Expect::Body(partial) => Some(partial.start),
            _ => None,
        }
    }

    /// Reads the next chunk and adds what it says to `summary`; `on_event` sees every event,
    /// commits included.
    ///
    /// # Errors
    /// A page header that cannot belong to this place of this cluster. Damaged records are no
    /// error: they are noted in the summary.
    pub fn feed(
        &mut self,
        mut chunk: &[u8],
        summary: &mut ScanSummary,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<(), PageError> {
        while !chunk.is_empty() {
            let in_page = self.position.0 % WAL_PAGE_SIZE;
            let page_start = Lsn(self.position.0 - in_page);
            let header_length = self.format.header_length(page_start) as u64;
            let used = if in_page < header_length && (in_page == 0 || !self.header.is_empty()) {
                let take = chunk.len().min((header_length - in_page) as usize);
                self.header.extend_from_slice(&chunk[..take]);
                if self.header.len() as u64 == header_length {
                    self.begin_page(page_start, summary)?;
                }
                take
            } else {
                let left_in_page = (WAL_PAGE_SIZE - in_page) as usize;
                let take = chunk.len().min(left_in_page);
                self.page_data(&chunk[..take], summary, on_event)
            };
            self.position = self.position.advance(used as u64);
            chunk = &chunk[used..];
        }
        summary.open_record = self.open_record();
        Ok(())
    }

    fn begin_page(&mut self, page: Lsn, summary: &mut ScanSummary) -> Result<(), PageError> {
        if matches!(self.expect, Expect::Padding) {
            if self.format.segment_size.offset(page) != 0 {
                self.header.clear();
                return Ok(());
            }
            self.expect = Expect::Record;
        }
        let is_zero = self.header.iter().all(|byte| *byte == 0);
        if is_zero && matches!(self.expect, Expect::Lost) {
            // Begun inside the padding behind a segment switch, which has no page headers.
            self.header.clear();
            self.expect = Expect::Padding;
            return Ok(());
        }
        let header = PageHeader::parse(&self.header, page, &self.format)?;
        self.header.clear();
        let continued = header.continuation.map_or(0, u64::from);
        let next = match &self.expect {
            Expect::Body(partial) if partial.total - partial.seen == continued => return Ok(()),
            Expect::Unknown { left } if *left == continued => return Ok(()),
            Expect::Record if continued == 0 => return Ok(()),
            Expect::Lost if continued == 0 => Expect::Record,
            Expect::Lost => Expect::Unknown { left: continued },
            // After a crash the record that could not be finished is given up here.
            Expect::Body(_) | Expect::Unknown { .. } if header.overwrites_record => Expect::Record,
            _ => {
                summary.damage.push(format!(
                    "the page at {page} continues a record with {continued} bytes, which does not fit what precedes it"
                ));
                if continued == 0 { Expect::Record } else { Expect::Unknown { left: continued } }
            }
        };
        self.expect = next;
        Ok(())
    }

    /// Consumes some of `data`, which lies within one page; returns how much.
    fn page_data(
        &mut self,
        data: &[u8],
        summary: &mut ScanSummary,
        on_event: &mut dyn FnMut(&Event),
    ) -> usize {
        match &mut self.expect {
            Expect::Padding | Expect::Lost => data.len(),
            Expect::Unknown { left } => {
                let take = (*left).min(data.len() as u64);
                *left -= take;
                if *left == 0 {
                    self.expect = Expect::Record;
                }
                take as usize
            }
            Expect::Record => {
                let gap = self.position.round_up(RECORD_ALIGNMENT).bytes_since(self.position);
                if gap > 0 {
                    return (gap as usize).min(data.len());
                }
                self.expect = Expect::Body(Partial::begin(self.position));
                0
            }
            Expect::Body(partial) => {
                let take = partial.take(data);
                if partial.is_nonsense() {
                    // A length of zero: PostgreSQL's own mark for "no record here yet".
                    if partial.total > 0 {
                        summary.damage.push(format!("no record can begin at {}", partial.start));
                    }
                    self.expect = Expect::Lost;
                } else if partial.is_complete() {
                    self.end_record(take, summary, on_event);
                }
                take
            }
        }
    }

    fn end_record(
        &mut self,
        last_bytes: usize,
        summary: &mut ScanSummary,
        on_event: &mut dyn FnMut(&Event),
    ) {
        let expect = std::mem::replace(&mut self.expect, Expect::Record);
        let Expect::Body(partial) = expect else { return };
        summary.records += 1;
        summary.last_record = Some(partial.start);
        let header = &partial.head[..RECORD_HEADER];
        let crc = crc32c::crc32c_append(partial.crc, &header[..CRC_OFFSET]);
        if crc != u32_at(header, CRC_OFFSET) {
            summary.damage.push(format!("the record at {} has a wrong CRC", partial.start));
            return;
        }
        if is_switch(header) {
            self.expect = Expect::Padding;
        }
        if !partial.wanted {
            return;
        }
        let end = self.position.advance(last_bytes as u64).round_up(RECORD_ALIGNMENT);
        match decode(&partial.head, self.format.major) {
            Ok(kind) => {
                let event = Event { lsn: partial.start, end_lsn: end, kind };
                on_event(&event);
                summary.add(event);
            }
            Err(problem) => summary
                .damage
                .push(format!("the record at {} cannot be read: {problem}", partial.start)),
        }
    }
}

impl Partial {
    fn begin(start: Lsn) -> Partial {
        Partial {
            start,
            total: u64::MAX,
            seen: 0,
            crc: 0,
            wanted: false,
            head: Vec::with_capacity(256),
        }
    }

    /// Takes what belongs to the record; never more.
    fn take(&mut self, data: &[u8]) -> usize {
        let mut taken = 0;
        // The length comes first, and never crosses a page: records are aligned.
        if self.head.len() < RECORD_HEADER {
            let limit = if self.head.len() < 4 { 4 } else { RECORD_HEADER };
            let take = (limit - self.head.len()).min(data.len());
            self.head.extend_from_slice(&data[..take]);
            self.seen += take as u64;
            taken = take;
            if self.head.len() >= 4 && self.total == u64::MAX {
                self.total = u64::from(u32_at(&self.head, 0));
            }
            if self.head.len() < RECORD_HEADER {
                return taken;
            }
            self.wanted = is_wanted(&self.head);
        }
        let body = &data[taken..];
        let body = &body[..body.len().min((self.total.saturating_sub(self.seen)) as usize)];
        self.crc = crc32c::crc32c_append(self.crc, body);
        self.seen += body.len() as u64;
        if self.wanted {
            let room = CAPTURE_LIMIT.saturating_sub(self.head.len());
            self.head.extend_from_slice(&body[..body.len().min(room)]);
        }
        taken + body.len()
    }

    fn is_nonsense(&self) -> bool {
        self.head.len() >= 4 && self.total < RECORD_HEADER as u64
    }

    fn is_complete(&self) -> bool {
        self.head.len() >= RECORD_HEADER && self.seen >= self.total
    }
}

// The longest header fits the buffer that collects it.
const _: () = assert!(LONG_HEADER < WAL_PAGE_SIZE as usize);
