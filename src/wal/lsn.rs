//! Log sequence numbers: byte positions in the write-ahead log.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A byte position in the WAL of one cluster, as PostgreSQL's `XLogRecPtr`
/// (`src/include/access/xlogdefs.h`). Printed and parsed as `%X/%X`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// PostgreSQL's `InvalidXLogRecPtr`: no position.
    pub const INVALID: Lsn = Lsn(0);

    /// The position `bytes` further on; stays at the end of the number range rather than wrapping.
    pub fn advance(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }

    /// The LSN `bytes` earlier; stays at the lowest rather than wrapping.
    pub fn retreat(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_sub(bytes))
    }

    /// How many bytes `self` lies after `earlier`; 0 when it does not.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The last multiple of `unit` bytes at or before this position.
    pub fn round_down(self, unit: u64) -> Lsn {
        Lsn(self.0 - self.0 % unit)
    }

    /// The first multiple of `unit` bytes at or after this position.
    pub fn round_up(self, unit: u64) -> Lsn {
        match self.0 % unit {
            0 => self,
            rest => self.advance(unit - rest),
        }
    }

    /// Sixteen hex digits, for names that must sort by position.
    pub fn to_hex16(self) -> String {
        format!("{:016X}", self.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// A text that is not an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an LSN; PostgreSQL writes them as two hexadecimal numbers, e.g. 16/B374D848")]
pub struct InvalidLsn(pub String);

impl FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidLsn(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(invalid)?;
        let half = |digits: &str| {
            let plain = !digits.is_empty()
                && digits.len() <= 8
                && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            if plain { u64::from_str_radix(digits, 16).ok() } else { None }
        };
        match (half(high), half(low)) {
            (Some(high), Some(low)) => Ok(Lsn(high << 32 | low)),
            _ => Err(invalid()),
        }
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_survives_printing_and_parsing() {
        for value in [0, 1, 0xFFFF_FFFF, 0x1_0000_0000, 0x16_B374_D848, u64::MAX] {
            let lsn = Lsn(value);
            assert_eq!(lsn.to_string().parse(), Ok(lsn));
        }
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
    }

    #[test]
    fn texts_that_are_no_lsn_are_refused() {
        for text in
            ["", "/", "1", "1/", "/1", "1/1/1", "+1/0", "1/-1", "0/123456789", "g/0", " 1/0"]
        {
            assert!(text.parse::<Lsn>().is_err(), "{text:?} was taken for an LSN");
        }
    }

    #[test]
    fn rounding_keeps_multiples_and_never_wraps() {
        assert_eq!(Lsn(16).round_down(16), Lsn(16));
        assert_eq!(Lsn(17).round_down(16), Lsn(16));
        assert_eq!(Lsn(17).round_up(16), Lsn(32));
        assert_eq!(Lsn(16).round_up(16), Lsn(16));
        assert_eq!(Lsn(u64::MAX).advance(5), Lsn(u64::MAX));
    }
}
