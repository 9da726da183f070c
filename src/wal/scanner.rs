//! Reads WAL as it passes, in chunks of any size, and tells what it says.
//!
//! The scanner checks every page header, the CRC of every record and that each record names the one
//! before it, and reports the events that the archive's index needs. It keeps a few KiB whatever the
//! size of a record: a record that lies in one page of one chunk is read where it lies, the bodies
//! of others are hashed as they pass.
//!
//! Started inside a record (at a page that continues one) it skips to the next; the caller who
//! wants that record too starts it where the record begins ([`ScanSummary::open_record`]). How many
//! files a transaction created ([`EventKind::FilesRemoved`](super::EventKind::FilesRemoved)) is
//! known from where the scanner began.

use super::created::CreatedFiles;
use super::page::u32_at;
use super::record::{CRC_OFFSET, Decoded, Interest, RECORD_HEADER, Record, Truncated, decode};
use super::transaction::TransactionReader;
use super::{Event, Lsn, PageError, PageHeader, ScanSummary, WAL_PAGE_SIZE, WalFormat};

/// How much of a wanted record that comes in parts is kept; commits and aborts, which may be long,
/// are read as they pass.
const CAPTURE_LIMIT: usize = 4096;
/// `MAXIMUM_ALIGNOF`: records begin at multiples of this.
const RECORD_ALIGNMENT: u64 = 8;

/// What the bytes at the scanner's position are.
#[derive(Debug)]
enum Expect {
    /// The rest of a record whose beginning was not seen: so many bytes.
    Unknown { left: u64 },
    /// A record begins at the next aligned position.
    Record,
    /// The rest of [`Scanner::partial`].
    Body,
    /// Padding up to the end of the segment.
    Padding,
    /// Damage: nothing is understood until a page that begins with a record.
    Lost,
}

/// A record of which some bytes have passed.
#[derive(Debug, Default)]
struct Partial {
    start: Lsn,
    seen: u64,
    crc: u32,
    header: [u8; RECORD_HEADER],
    /// What is kept of the body; the buffer serves one record after the other.
    body: Vec<u8>,
    capture: bool,
    transaction: Option<Box<TransactionReader>>,
}

/// Who is told about what is read.
struct Report<'a, R> {
    summary: &'a mut ScanSummary,
    on_event: &'a mut dyn FnMut(&Event),
    on_record: R,
}

/// A WAL reader that is fed chunks in order.
#[derive(Debug)]
pub struct Scanner {
    format: WalFormat,
    position: Lsn,
    header: Vec<u8>,
    expect: Expect,
    partial: Partial,
    /// Where the record began that ended last, if the next one follows it.
    previous: Option<Lsn>,
    created: CreatedFiles,
}

impl Scanner {
    /// A scanner for the bytes from `start` on. `start` may lie inside a page: then nothing is
    /// understood before the next one.
    pub fn new(format: WalFormat, start: Lsn) -> Scanner {
        Scanner {
            format,
            position: start,
            header: Vec::new(),
            expect: Expect::Lost,
            partial: Partial::default(),
            previous: None,
            created: CreatedFiles::default(),
        }
    }

    /// Where the next byte is expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Where the record begins that has not ended yet.
    pub fn open_record(&self) -> Option<Lsn> {
        matches!(self.expect, Expect::Body).then_some(self.partial.start)
    }

    /// Reads the next chunk and adds what it says to `summary`; `on_event` sees every event,
    /// commits included.
    ///
    /// # Errors
    /// A page header that cannot belong to this place of this cluster; the scanner is of no use
    /// after that. Damaged records are no error: they are noted in the summary.
    pub fn feed(
        &mut self,
        chunk: &[u8],
        summary: &mut ScanSummary,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<(), PageError> {
        self.feed_records(chunk, summary, on_event, |_| ())
    }

    /// As [`Scanner::feed`]; `on_record` sees every record that ended, before its CRC is checked.
    ///
    /// # Errors
    /// As [`Scanner::feed`].
    pub fn feed_records(
        &mut self,
        mut chunk: &[u8],
        summary: &mut ScanSummary,
        on_event: &mut dyn FnMut(&Event),
        on_record: impl FnMut(&Record),
    ) -> Result<(), PageError> {
        let mut report = Report { summary, on_event, on_record };
        while !chunk.is_empty() {
            let in_page = self.position.0 % WAL_PAGE_SIZE;
            let page_start = Lsn(self.position.0 - in_page);
            let header_length = self.format.header_length(page_start) as u64;
            let used = if in_page < header_length && (in_page == 0 || !self.header.is_empty()) {
                let take = chunk.len().min((header_length - in_page) as usize);
                self.header.extend_from_slice(&chunk[..take]);
                if self.header.len() as u64 == header_length {
                    self.begin_page(page_start, report.summary)?;
                }
                take
            } else {
                let left_in_page = (WAL_PAGE_SIZE - in_page) as usize;
                let take = chunk.len().min(left_in_page);
                self.page_data(&chunk[..take], &mut report);
                take
            };
            self.position = self.position.advance(used as u64);
            chunk = &chunk[used..];
        }
        report.summary.open_record = self.open_record();
        Ok(())
    }

    fn begin_page(&mut self, page: Lsn, summary: &mut ScanSummary) -> Result<(), PageError> {
        let bytes = std::mem::take(&mut self.header);
        let verdict = self.read_page_header(&bytes, page, summary);
        // The buffer is kept for the next page.
        self.header = bytes;
        self.header.clear();
        verdict
    }

    fn read_page_header(
        &mut self,
        bytes: &[u8],
        page: Lsn,
        summary: &mut ScanSummary,
    ) -> Result<(), PageError> {
        if matches!(self.expect, Expect::Padding) {
            if self.format.segment_size.offset(page) != 0 {
                return Ok(());
            }
            self.expect = Expect::Record;
        }
        let is_zero = bytes.iter().all(|byte| *byte == 0);
        if is_zero && matches!(self.expect, Expect::Lost) {
            // Begun inside the padding behind a segment switch, which has no page headers.
            self.expect = Expect::Padding;
            return Ok(());
        }
        let header = PageHeader::parse(bytes, page, &self.format)?;
        let continued = header.continuation.map_or(0, u64::from);
        let next = match &self.expect {
            Expect::Body if self.partial.left() == continued => return Ok(()),
            Expect::Unknown { left } if *left == continued => return Ok(()),
            Expect::Record if continued == 0 => return Ok(()),
            Expect::Lost if continued == 0 => Expect::Record,
            Expect::Lost => Expect::Unknown { left: continued },
            // After a crash the record that could not be finished is given up here.
            Expect::Body | Expect::Unknown { .. } if header.overwrites_record => Expect::Record,
            _ => {
                summary.damage.push(format!(
                    "the page at {page} continues a record with {continued} bytes, which does not fit what precedes it"
                ));
                self.previous = None;
                if continued == 0 { Expect::Record } else { Expect::Unknown { left: continued } }
            }
        };
        self.expect = next;
        Ok(())
    }

    /// Reads `data`, which lies within one page.
    fn page_data<R: FnMut(&Record)>(&mut self, data: &[u8], report: &mut Report<'_, R>) {
        let mut rest = data;
        while !rest.is_empty() {
            let here = self.position.advance((data.len() - rest.len()) as u64);
            let used = match &mut self.expect {
                Expect::Padding | Expect::Lost => return,
                Expect::Unknown { left } => {
                    let take = (*left).min(rest.len() as u64);
                    *left -= take;
                    if *left == 0 {
                        self.expect = Expect::Record;
                    }
                    take as usize
                }
                Expect::Record => match here.round_up(RECORD_ALIGNMENT).bytes_since(here) {
                    0 => self.begin_record(here, rest, report),
                    padding => rest.len().min(padding as usize),
                },
                Expect::Body => self.continue_record(here, rest, report),
            };
            rest = &rest[used..];
        }
    }

    /// Reads the record that begins with `data`, as far as it goes; returns its length so far.
    #[inline]
    fn begin_record<R: FnMut(&Record)>(
        &mut self,
        start: Lsn,
        data: &[u8],
        report: &mut Report<'_, R>,
    ) -> usize {
        if let Some((header, body)) = data.split_at_checked(RECORD_HEADER) {
            let record = Record::parse(header, start);
            let length = record.length as usize;
            if (RECORD_HEADER..=data.len()).contains(&length) {
                let body = &body[..length - RECORD_HEADER];
                let crc = crc32c::crc32c_append(crc32c::crc32c(body), &header[..CRC_OFFSET]);
                if self.end_record(&record, crc, report) {
                    let (major, created) = (self.format.major, &mut self.created);
                    let transaction = match record.interest() {
                        Interest::None => return length,
                        Interest::Whole => None,
                        Interest::Transaction => {
                            let mut reader = TransactionReader::new(record.xid, record.info, major);
                            reader.read(body, created);
                            Some(reader)
                        }
                    };
                    self.decode(&record, body, transaction, start.advance(length as u64), report);
                }
                return length;
            }
        }
        self.partial.begin(start);
        self.expect = Expect::Body;
        self.continue_record(start, data, report)
    }

    fn continue_record<R: FnMut(&Record)>(
        &mut self,
        here: Lsn,
        data: &[u8],
        report: &mut Report<'_, R>,
    ) -> usize {
        let used = self.partial.take(data, self.format.major, &mut self.created);
        if self.partial.is_nonsense() {
            // A length of zero: PostgreSQL's own mark for "no record here yet".
            if self.partial.length() > 0 {
                let start = self.partial.start;
                report.summary.damage.push(format!("no record can begin at {start}"));
            }
            self.previous = None;
            self.expect = Expect::Lost;
        } else if self.partial.left() == 0 {
            self.expect = Expect::Record;
            let header = self.partial.header;
            let record = Record::parse(&header, self.partial.start);
            let crc = crc32c::crc32c_append(self.partial.crc, &header[..CRC_OFFSET]);
            if self.end_record(&record, crc, report) && record.interest() != Interest::None {
                let body = std::mem::take(&mut self.partial.body);
                let transaction = self.partial.transaction.take().map(|reader| *reader);
                self.decode(&record, &body, transaction, here.advance(used as u64), report);
                self.partial.body = body;
            }
        }
        used
    }

    /// Checks a record that has passed whole; whether it can be believed.
    #[inline]
    fn end_record<R: FnMut(&Record)>(
        &mut self,
        record: &Record,
        crc: u32,
        report: &mut Report<'_, R>,
    ) -> bool {
        let summary = &mut *report.summary;
        summary.records += 1;
        summary.last_record = Some(record.lsn);
        (report.on_record)(record);
        let previous = self.previous.replace(record.lsn);
        if crc != record.crc {
            summary.damage.push(format!("the record at {} has a wrong CRC", record.lsn));
            return false;
        }
        if let Some(previous) = previous.filter(|previous| *previous != record.previous) {
            summary.damage.push(format!(
                "the record at {} says that it follows the one at {}, but that one begins at {previous}",
                record.lsn, record.previous
            ));
        }
        if record.is_switch() {
            self.expect = Expect::Padding;
        }
        true
    }

    /// Reports the events of a record whose last byte lies before `end`.
    fn decode<R: FnMut(&Record)>(
        &mut self,
        record: &Record,
        body: &[u8],
        transaction: Option<TransactionReader>,
        end: Lsn,
        report: &mut Report<'_, R>,
    ) {
        let end_lsn = end.round_up(RECORD_ALIGNMENT);
        let mut tell = |kind| {
            let event = Event { lsn: record.lsn, end_lsn, kind };
            (report.on_event)(&event);
            report.summary.add(event);
        };
        let verdict: Result<(), Truncated> = match transaction {
            Some(reader) => reader.finish(&mut self.created, &mut tell),
            None => decode(record, body, self.format.major).map(|decoded| match decoded {
                Decoded::Event(event) => tell(event),
                Decoded::Switch(event, switch) => [event, switch].into_iter().for_each(tell),
                Decoded::CreatedFile if record.xid != 0 => self.created.add(record.xid),
                Decoded::CreatedFile | Decoded::Nothing => {}
            }),
        };
        if let Err(problem) = verdict {
            let text = format!("the record at {} cannot be read: {problem}", record.lsn);
            report.summary.damage.push(text);
        }
    }
}

impl Partial {
    fn begin(&mut self, start: Lsn) {
        self.start = start;
        self.seen = 0;
        self.crc = 0;
        self.body.clear();
        self.capture = false;
        self.transaction = None;
    }

    /// Takes what belongs to the record; never more.
    fn take(&mut self, data: &[u8], major: u32, created: &mut CreatedFiles) -> usize {
        let mut taken = 0;
        if self.seen < RECORD_HEADER as u64 {
            // The length comes first, and never crosses a page: records are aligned.
            let limit = if self.seen < 4 { 4 } else { RECORD_HEADER };
            let at = self.seen as usize;
            taken = (limit - at).min(data.len());
            self.header[at..at + taken].copy_from_slice(&data[..taken]);
            self.seen += taken as u64;
            if self.seen < RECORD_HEADER as u64 {
                return taken;
            }
            let record = Record::parse(&self.header, self.start);
            match record.interest() {
                Interest::None => {}
                Interest::Whole => self.capture = true,
                Interest::Transaction => {
                    let reader = TransactionReader::new(record.xid, record.info, major);
                    self.transaction = Some(Box::new(reader));
                }
            }
        }
        let left = usize::try_from(self.left()).unwrap_or(usize::MAX);
        let body = &data[taken..];
        let body = &body[..body.len().min(left)];
        self.crc = crc32c::crc32c_append(self.crc, body);
        self.seen += body.len() as u64;
        if self.capture {
            let room = CAPTURE_LIMIT.saturating_sub(self.body.len());
            self.body.extend_from_slice(&body[..body.len().min(room)]);
        } else if let Some(reader) = &mut self.transaction {
            reader.read(body, created);
        }
        taken + body.len()
    }

    /// `xl_tot_len`, once it is there.
    fn length(&self) -> u64 {
        u64::from(u32_at(&self.header, 0))
    }

    /// How many bytes are missing; more than any record has before that is known.
    fn left(&self) -> u64 {
        if self.seen < 4 { u64::MAX } else { self.length().saturating_sub(self.seen) }
    }

    fn is_nonsense(&self) -> bool {
        self.seen >= 4 && self.length() < RECORD_HEADER as u64
    }
}

#[cfg(test)]
mod tests;
