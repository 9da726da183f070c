//! WAL page headers (`src/include/access/xlog_internal.h`, `XLogPageHeaderData`).
//!
//! ```text
//! offset  size
//!      0     2  xlp_magic      differs in every major version
//!      2     2  xlp_info       flags
//!      4     4  xlp_tli        timeline of the first record on the page
//!      8     8  xlp_pageaddr   LSN of the page
//!     16     4  xlp_rem_len    bytes of a record that goes on from the page before
//!     20     4  padding
//!     24     8  xlp_sysid      only on the first page of a segment, as the next two
//!     32     4  xlp_seg_size
//!     36     4  xlp_xlog_blcksz
//! ```
//! Numbers are in the server's byte order; little-endian is the only one that is supported.

use super::{Lsn, SegmentSize, TimelineId};

/// `XLOG_BLCKSZ`: 8 KiB unless the server was built otherwise, which is refused.
pub const WAL_PAGE_SIZE: u64 = 8192;

/// Length of the header of an ordinary page.
pub(super) const SHORT_HEADER: usize = 24;
/// Length of the header of a segment's first page.
pub(super) const LONG_HEADER: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x0001;
const LONG_HEADER_FLAG: u16 = 0x0002;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
const ALL_FLAGS: u16 = 0x000F;

/// What is known of a cluster's WAL before its first byte is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalFormat {
    /// PostgreSQL's major version.
    pub major: u32,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The cluster's system identifier.
    pub system_id: u64,
}

impl WalFormat {
    /// `XLOG_PAGE_MAGIC` of the release of each supported major version.
    pub fn page_magic(&self) -> Option<u16> {
        Some(match self.major {
            13 => 0xD106,
            14 => 0xD10D,
            15 => 0xD110,
            16 => 0xD113,
            17 => 0xD116,
            18 => 0xD118,
            _ => return None,
        })
    }

    /// The length of the header of the page that starts at `lsn`.
    pub fn header_length(&self, lsn: Lsn) -> usize {
        if self.segment_size.offset(lsn) == 0 { LONG_HEADER } else { SHORT_HEADER }
    }
}

/// A page header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// `xlp_tli`.
    pub timeline: TimelineId,
    /// `xlp_rem_len` when the page begins with the rest of a record, else `None`.
    pub continuation: Option<u32>,
    /// The record that the page before left unfinished was given up after a crash, and this page
    /// begins with the record that says so.
    pub overwrites_record: bool,
}

/// Why a page is not the WAL page that is expected at an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The magic number is another one.
    #[error(
        "WAL page {lsn} has the magic number {found:04X}, PostgreSQL {major} writes {expected:04X}"
    )]
    Magic {
        /// The page.
        lsn: Lsn,
        /// What it has.
        found: u16,
        /// What it should have.
        expected: u16,
        /// The server's major version.
        major: u32,
    },
    /// The page says that it lies elsewhere: a recycled segment, or damage.
    #[error("WAL page {lsn} says that it is page {found}")]
    Address {
        /// The page.
        lsn: Lsn,
        /// What its header says.
        found: Lsn,
    },
    /// The page belongs to another cluster.
    #[error("WAL page {lsn} belongs to system identifier {found}, not to {expected}")]
    SystemId {
        /// The page.
        lsn: Lsn,
        /// What it has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// Sizes or flags that do not fit the cluster.
    #[error("WAL page {lsn} has a header that does not fit this cluster: {problem}")]
    Header {
        /// The page.
        lsn: Lsn,
        /// What is wrong.
        problem: String,
    },
}

impl PageHeader {
    /// Checks the header bytes of the page at `lsn`: 24 of them, or 40 for a segment's first page.
    pub fn parse(bytes: &[u8], lsn: Lsn, format: &WalFormat) -> Result<PageHeader, PageError> {
        let bad = |problem: &str| PageError::Header { lsn, problem: problem.to_owned() };
        let length = format.header_length(lsn);
        if bytes.len() < length {
            return Err(bad("it is too short"));
        }
        let magic = u16_at(bytes, 0);
        let info = u16_at(bytes, 2);
        if let Some(expected) = format.page_magic().filter(|expected| *expected != magic) {
            return Err(PageError::Magic { lsn, found: magic, expected, major: format.major });
        }
        let address = Lsn(u64_at(bytes, 8));
        if address != lsn {
            return Err(PageError::Address { lsn, found: address });
        }
        if info & !ALL_FLAGS != 0 {
            return Err(bad(&format!("unknown flags {info:04X}")));
        }
        let is_long = length == LONG_HEADER;
        if is_long != (info & LONG_HEADER_FLAG != 0) {
            return Err(bad("a long header is missing, or stands inside a segment"));
        }
        if is_long {
            check_long_header(bytes, lsn, format)?;
        }
        let timeline = TimelineId(u32_at(bytes, 4));
        let continuation = (info & FIRST_IS_CONTRECORD != 0).then(|| u32_at(bytes, 16));
        let overwrites_record = info & FIRST_IS_OVERWRITE_CONTRECORD != 0;
        Ok(PageHeader { timeline, continuation, overwrites_record })
    }
}

fn check_long_header(bytes: &[u8], lsn: Lsn, format: &WalFormat) -> Result<(), PageError> {
    let system_id = u64_at(bytes, 24);
    if system_id != format.system_id {
        return Err(PageError::SystemId { lsn, found: system_id, expected: format.system_id });
    }
    let segment_size = u64::from(u32_at(bytes, 32));
    let page_size = u64::from(u32_at(bytes, 36));
    if segment_size != format.segment_size.bytes() || page_size != WAL_PAGE_SIZE {
        let problem = format!("segments of {segment_size} bytes, pages of {page_size}");
        return Err(PageError::Header { lsn, problem });
    }
    Ok(())
}

#[inline]
pub(super) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    let mut value = [0; 2];
    value.copy_from_slice(&bytes[offset..offset + 2]);
    u16::from_le_bytes(value)
}

#[inline]
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(value)
}

#[inline]
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(value)
}
