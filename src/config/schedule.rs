//! When something is due, as cron says it: `minute hour day-of-month month day-of-week`, in UTC.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

/// A moment from which every schedule must come round again.
const PROBE: DateTime<Utc> = DateTime::UNIX_EPOCH;

/// A cron expression of five fields.
#[derive(Clone, PartialEq, Eq)]
pub struct Schedule(Cron);

impl Schedule {
    /// The first moment after `time`.
    pub fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.0.find_next_occurrence(&time, false).ok()
    }

    /// The last moment up to `time`, itself included.
    pub fn last_until(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.0.find_previous_occurrence(&time, true).ok()
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |problem: &str| {
            format!(
                "{text:?} is no schedule: {problem}; write the five fields of cron, minute, hour, day of month, month, day of week, e.g. \"0 3 * * 0\""
            )
        };
        let fields = text.split_whitespace().count();
        if fields != 5 {
            return Err(wrong(&format!("it has {fields} of five fields")));
        }
        let parser =
            CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| wrong(&error.to_string()))?;
        let schedule = Schedule(cron);
        match schedule.next_after(PROBE) {
            Some(_) => Ok(schedule),
            None => Err(wrong("that moment never comes")),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn next(schedule: &str, after: &str) -> String {
        let schedule: Schedule = schedule.parse().unwrap();
        schedule.next_after(time(after)).unwrap().to_rfc3339()
    }

    #[test]
    fn expressions_mean_what_cron_means() {
        // 2026-11-22 was a Sunday.
        assert_eq!(next("0 3 * * 0", "2026-11-22T03:00:00Z"), "2026-11-29T03:00:00+00:00");
        assert_eq!(next("0 3 * * 7", "2026-11-22T02:59:59Z"), "2026-11-22T03:00:00+00:00");
        assert_eq!(next("0 3 * * SUN", "2026-11-16T00:00:00Z"), "2026-11-22T03:00:00+00:00");
        assert_eq!(next("*/15 * * * *", "2026-11-22T03:07:00Z"), "2026-11-22T03:15:00+00:00");
        assert_eq!(next("0 3 * * 1-6", "2026-11-21T03:00:00Z"), "2026-11-23T03:00:00+00:00");
        assert_eq!(next("30 1 29 2 *", "2025-01-01T00:00:00Z"), "2028-02-29T01:30:00+00:00");
        // Both days are given: either will do.
        assert_eq!(next("0 0 1 * 1", "2026-11-24T00:00:00Z"), "2026-11-30T00:00:00+00:00");
        assert_eq!(next("0 0 1 * 1", "2026-11-30T00:00:00Z"), "2026-12-01T00:00:00+00:00");
    }

    #[test]
    fn the_last_moment_may_be_now() {
        let schedule: Schedule = "0 3 * * 0".parse().unwrap();
        let sunday = time("2026-11-22T03:00:00Z");
        assert_eq!(schedule.last_until(sunday), Some(sunday));
        assert_eq!(schedule.last_until(time("2026-11-29T02:59:59Z")), Some(sunday));
        assert_eq!(schedule.last_until(time("2026-11-22T03:00:00.5Z")), Some(sunday));
        assert_eq!(schedule.next_after(time("2026-11-22T02:59:59.5Z")), Some(sunday));
    }
}
