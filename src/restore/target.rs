//! What a recovery is to reach.

use std::fmt;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::wal::{Lsn, TimelineId};

/// What a recovery is to reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// All WAL that the archive has.
    End,
    /// The end of the backup.
    Immediate,
    /// A moment, by the server's clock.
    Time(DateTime<Utc>),
    /// A position in the WAL.
    Lsn(Lsn),
    /// The end of a transaction.
    Xid(u32),
    /// A named restore point.
    Name(String),
}

/// Which history to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimelineChoice {
    /// The newest one in the archive.
    #[default]
    Latest,
    /// The backup's own.
    Current,
    /// This one.
    Number(TimelineId),
}

/// What PostgreSQL does once the target is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TargetAction {
    /// Open for reading and writing, on a new timeline.
    #[default]
    Promote,
    /// Open for reading, until told to go on.
    Pause,
    /// Stop.
    Shutdown,
}

impl TargetAction {
    /// PostgreSQL's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            TargetAction::Promote => "promote",
            TargetAction::Pause => "pause",
            TargetAction::Shutdown => "shutdown",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::End => f.write_str("the end of the archive"),
            Target::Immediate => f.write_str("the end of the backup"),
            Target::Time(time) => write!(f, "time {}", time.format("%Y-%m-%d %H:%M:%S%.6f UTC")),
            Target::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Target::Xid(xid) => write!(f, "transaction {xid}"),
            Target::Name(name) => write!(f, "restore point {name:?}"),
        }
    }
}

/// Reads a moment. It must say its offset from UTC: `2026-11-23 14:05:00+01:00`, `…Z`, `… UTC`.
///
/// # Errors
/// A text that is no moment, or one whose offset is missing: nobody may guess it.
pub fn parse_time(text: &str) -> Result<DateTime<Utc>, String> {
    let text = text.trim();
    let spaced = text
        .strip_suffix("UTC")
        .map_or_else(|| text.to_owned(), |before| format!("{}+00:00", before.trim_end()));
    for format in ["%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f%#z"] {
        for candidate in [spaced.clone(), spaced.replacen(" +", "+", 1).replacen(" -", "-", 1)] {
            if let Ok(time) = DateTime::parse_from_str(&candidate, format) {
                return Ok(time.with_timezone(&Utc));
            }
        }
    }
    for format in ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f"] {
        if NaiveDateTime::parse_from_str(text, format).is_ok() {
            return Err(format!(
                "{text:?} does not say its time zone; add the offset, e.g. \"{text}+01:00\", or \"{text} UTC\""
            ));
        }
    }
    Err(format!(
        "{text:?} is not a moment; write it as \"2026-11-23 14:05:00+01:00\", with the offset from UTC"
    ))
}

/// Reads `current`, `latest` or a number; hexadecimal numbers begin with `0x`, as in PostgreSQL.
///
/// # Errors
/// Anything else.
pub fn parse_timeline(text: &str) -> Result<TimelineChoice, String> {
    match text {
        "latest" => return Ok(TimelineChoice::Latest),
        "current" => return Ok(TimelineChoice::Current),
        _ => {}
    }
    let number = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    match number {
        Some(number) if number > 0 => Ok(TimelineChoice::Number(TimelineId(number))),
        _ => Err(format!("{text:?} is not a timeline; write a number, \"latest\" or \"current\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_with_an_offset_are_read() {
        let expected: DateTime<Utc> = "2026-11-23T13:05:00.250Z".parse().unwrap();
        for text in [
            "2026-11-23 14:05:00.250+01:00",
            "2026-11-23 14:05:00.25+01",
            "2026-11-23 14:05:00.25+0100",
            "2026-11-23 14:05:00.25 +01",
            "2026-11-23T14:05:00.250+01:00",
            "2026-11-23T13:05:00.250Z",
            "2026-11-23 13:05:00.250 UTC",
            " 2026-11-23 13:05:00.250+00 ",
        ] {
            assert_eq!(parse_time(text), Ok(expected), "{text}");
        }
    }

    // CASES 8: times without a zone, and malformed ones.
    #[test]
    fn a_moment_without_its_zone_is_refused_and_says_so() {
        let error = parse_time("2026-11-23 14:05:00").unwrap_err();
        assert!(error.contains("time zone"), "{error}");
        for text in
            ["13am", "2026-11-23", "yesterday", "2026-13-01 00:00:00Z", "2026-11-23 25:00:00Z", ""]
        {
            let error = parse_time(text).unwrap_err();
            assert!(error.contains("is not a moment"), "{error}");
        }
    }

    #[test]
    fn timelines_are_read_as_postgresql_reads_them() {
        assert_eq!(parse_timeline("latest"), Ok(TimelineChoice::Latest));
        assert_eq!(parse_timeline("current"), Ok(TimelineChoice::Current));
        assert_eq!(parse_timeline("0x10"), Ok(TimelineChoice::Number(TimelineId(16))));
        assert_eq!(parse_timeline("10"), Ok(TimelineChoice::Number(TimelineId(10))));
        for text in ["0", "-1", "newest", ""] {
            assert!(parse_timeline(text).is_err(), "{text}");
        }
    }
}
