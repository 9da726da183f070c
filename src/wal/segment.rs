//! WAL segments: sizes, numbers and file names.
//!
//! A file name is `<timeline:8><log:8><segment:8>` in upper-case hex, where `log` counts units of
//! 4 GiB and `segment` the segments inside one (`src/include/access/xlog_internal.h`,
//! `XLogFileName`). Names are always computed from LSNs: what PostgreSQL's own functions answer at
//! an exact boundary changed in version 17.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Lsn, TimelineId};

/// The size of a WAL segment in bytes: a power of two from 1 MiB to 1 GiB, fixed by `initdb`
/// (`IsValidWalSegSize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u64);

/// A number that is no WAL segment size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a WAL segment size: PostgreSQL knows powers of two from 1 MiB to 1 GiB")]
pub struct InvalidSegmentSize(pub u64);

/// The number of a segment, counted from the start of the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNo(pub u64);

/// The name of one segment file on one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The first eight hex digits.
    pub timeline: TimelineId,
    /// The middle eight.
    pub log: u32,
    /// The last eight.
    pub segment: u32,
}

impl SegmentSize {
    /// The default of `initdb`.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    /// Checks a size given in bytes.
    pub fn new(bytes: u64) -> Result<SegmentSize, InvalidSegmentSize> {
        let valid = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        if valid { Ok(SegmentSize(bytes)) } else { Err(InvalidSegmentSize(bytes)) }
    }

    /// Reads what `SHOW wal_segment_size` prints: a number with the unit `MB` or `GB`
    /// (`B` and `kB` are accepted too).
    pub fn from_setting(text: &str) -> Result<SegmentSize, InvalidSegmentSize> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" | "B" => 1,
            "kB" => 1 << 10,
            "MB" => 1 << 20,
            "GB" => 1 << 30,
            _ => 0,
        };
        let number: u64 = digits.trim().parse().unwrap_or(0);
        SegmentSize::new(number.saturating_mul(unit))
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// The segment that holds the byte at `lsn`.
    pub fn segment_of(self, lsn: Lsn) -> SegmentNo {
        SegmentNo(lsn.0 / self.0)
    }

    /// The segment that holds the byte before `lsn`: at an exact boundary the segment that ends
    /// there (PostgreSQL's `XLByteToPrevSeg`).
    pub fn segment_before(self, lsn: Lsn) -> SegmentNo {
        SegmentNo(lsn.0.saturating_sub(1) / self.0)
    }

    /// Where a segment begins.
    pub fn start_of(self, segment: SegmentNo) -> Lsn {
        Lsn(segment.0.saturating_mul(self.0))
    }

    /// The offset of `lsn` inside its segment.
    pub fn offset(self, lsn: Lsn) -> u64 {
        lsn.0 % self.0
    }

    /// The name of the segment on a timeline.
    pub fn name(self, timeline: TimelineId, segment: SegmentNo) -> SegmentName {
        let per_log = self.segments_per_log();
        SegmentName {
            timeline,
            // An LSN has 64 bits, so its 4 GiB unit has 32.
            log: (segment.0 / per_log) as u32,
            segment: (segment.0 % per_log) as u32,
        }
    }

    /// The number of the segment that a name stands for, or `None` when its last part is too large
    /// for this segment size.
    pub fn number(self, name: SegmentName) -> Option<SegmentNo> {
        let per_log = self.segments_per_log();
        let segment = u64::from(name.segment);
        (segment < per_log).then(|| SegmentNo(u64::from(name.log) * per_log + segment))
    }

    /// How many segments share one `log` number.
    pub fn segments_per_log(self) -> u64 {
        (1 << 32) / self.0
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = InvalidSegmentSize;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        SegmentSize::new(bytes)
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> u64 {
        size.0
    }
}

impl SegmentNo {
    /// The segment after this one.
    pub fn next(self) -> SegmentNo {
        SegmentNo(self.0.saturating_add(1))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.log, self.segment)
    }
}

/// A text that is no segment's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a WAL segment (24 hexadecimal digits)")]
pub struct InvalidSegmentName(pub String);

impl FromStr for SegmentName {
    type Err = InvalidSegmentName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidSegmentName(text.to_owned());
        let upper_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
        if text.len() != 24 || !text.bytes().all(upper_hex) {
            return Err(invalid());
        }
        let part = |range: std::ops::Range<usize>| {
            u32::from_str_radix(&text[range], 16).map_err(|_| invalid())
        };
        let timeline = TimelineId::from_hex8(&text[..8]).ok_or_else(invalid)?;
        Ok(SegmentName { timeline, log: part(8..16)?, segment: part(16..24)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(mebibytes: u64) -> SegmentSize {
        SegmentSize::new(mebibytes << 20).unwrap()
    }

    #[test]
    fn names_are_those_of_postgresql_for_every_segment_size() {
        // From pg_walfile_name('16/B374D848') on clusters made with --wal-segsize.
        for (mebibytes, name) in [
            (1, "000000030000001600000B37"),
            (16, "0000000300000016000000B3"),
            (64, "00000003000000160000002C"),
            (1024, "000000030000001600000002"),
        ] {
            let size = size(mebibytes);
            let number = size.segment_of("16/B374D848".parse().unwrap());
            let printed = size.name(TimelineId(3), number).to_string();
            assert_eq!(printed, name);
            assert_eq!(size.number(printed.parse().unwrap()), Some(number));
        }
    }

    // CASES 35: segment names at exact boundaries changed in PostgreSQL 17.
    #[test]
    fn a_boundary_belongs_to_the_segment_that_starts_there() {
        let size = size(16);
        let boundary = Lsn(0x300_0000);
        assert_eq!(size.segment_of(boundary), SegmentNo(3));
        assert_eq!(size.segment_before(boundary), SegmentNo(2));
        assert_eq!(size.start_of(SegmentNo(3)), boundary);
        assert_eq!(size.offset(boundary), 0);
    }

    #[test]
    fn the_last_segment_of_a_log_number_is_followed_by_the_first_of_the_next() {
        let size = size(16);
        let last: SegmentName = "0000000100000000000000FF".parse().unwrap();
        let number = size.number(last).unwrap();
        assert_eq!(size.name(TimelineId(1), number.next()).to_string(), "000000010000000100000000");
        assert_eq!(size.number("000000010000000000000100".parse().unwrap()), None);
    }

    #[test]
    fn sizes_and_names_that_postgresql_does_not_know_are_refused() {
        for bytes in [0, 1, 1 << 19, (1 << 20) + 1, 3 << 20, 1 << 31] {
            assert!(SegmentSize::new(bytes).is_err());
        }
        assert_eq!(SegmentSize::from_setting("16MB"), Ok(size(16)));
        assert_eq!(SegmentSize::from_setting("1GB"), Ok(size(1024)));
        assert!(SegmentSize::from_setting("sixteen").is_err());
        for name in [
            "",
            "000000010000000000000001.partial",
            "00000001000000000000000g",
            "000000000000000000000001",
        ] {
            assert!(name.parse::<SegmentName>().is_err());
        }
    }
}
