//! Timelines and their history files.
//!
//! A history file `00000003.history` names each ancestor of timeline 3 with the LSN at which the
//! next one branched off, oldest first: `<tli> TAB <lsn> TAB <reason>`, with `#` comments and blank
//! lines (`src/backend/access/transam/timeline.c`, `readTimeLineHistory`).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Lsn, SegmentNo, SegmentSize};

/// A timeline, PostgreSQL's `TimeLineID`; 1 is the first, 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl TimelineId {
    /// The timeline of a cluster that was never promoted or recovered to a point in time.
    pub const FIRST: TimelineId = TimelineId(1);

    /// The eight hex digits used in file names.
    pub fn to_hex8(self) -> String {
        format!("{:08X}", self.0)
    }

    /// Reads the eight hex digits used in file names; timeline 0 does not exist.
    pub fn from_hex8(text: &str) -> Option<TimelineId> {
        let digits = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let value = if digits { u32::from_str_radix(text, 16).ok()? } else { 0 };
        (value > 0).then_some(TimelineId(value))
    }

    /// The name of this timeline's history file.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One ancestor in a history file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// Where the next timeline branched off: the ancestor's WAL counts up to here.
    pub end: Lsn,
    /// What PostgreSQL noted as the reason.
    pub reason: String,
}

/// The ancestry of one timeline, oldest ancestor first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineHistory {
    /// The timeline whose ancestry this is.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first; empty for timeline 1.
    pub ancestors: Vec<HistoryEntry>,
}

/// Why a history file cannot be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("timeline history file {file}, line {line}: {problem}")]
pub struct HistoryError {
    /// The file's name.
    pub file: String,
    /// The line, from 1; 0 when the file as a whole is meant.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

impl TimelineHistory {
    /// The history of a timeline that has no ancestors.
    pub fn without_ancestors(timeline: TimelineId) -> TimelineHistory {
        TimelineHistory { timeline, ancestors: Vec::new() }
    }

    /// Parses the content of `timeline`'s history file.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<TimelineHistory, HistoryError> {
        let error = |line: usize, problem: String| HistoryError {
            file: timeline.history_file_name(),
            line,
            problem,
        };
        let mut ancestors: Vec<HistoryEntry> = Vec::new();
        for (index, line) in content.split(|byte| *byte == b'\n').enumerate() {
            let line = String::from_utf8_lossy(line);
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (number, rest) = line
                .split_once(char::is_whitespace)
                .ok_or_else(|| error(index + 1, format!("{line:?} has no switch point")))?;
            let rest = rest.trim_start();
            let (end, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let ancestor = number
                .parse()
                .ok()
                .filter(|number| *number > 0)
                .map(TimelineId)
                .ok_or_else(|| error(index + 1, format!("{number:?} is not a timeline")))?;
            let end: Lsn = end.parse().map_err(|e| error(index + 1, format!("{e}")))?;
            if ancestors.last().is_some_and(|last| ancestor <= last.timeline) {
                return Err(error(index + 1, "timelines must increase".to_owned()));
            }
            ancestors.push(HistoryEntry {
                timeline: ancestor,
                end,
                reason: reason.trim().to_owned(),
            });
        }
        match ancestors.last() {
            Some(last) if last.timeline >= timeline => Err(error(
                0,
                format!("names timeline {} as an ancestor of {timeline}", last.timeline),
            )),
            _ => {
                // A recovery to a point before an older fork writes switch points that go back: what
                // an ancestor has behind a later switch point is not part of the path.
                let mut limit = Lsn(u64::MAX);
                for entry in ancestors.iter_mut().rev() {
                    limit = limit.min(entry.end);
                    entry.end = limit;
                }
                Ok(TimelineHistory { timeline, ancestors })
            }
        }
    }

    /// Where the WAL of `timeline` begins on this path: the switch point of the ancestor before it.
    /// `None` when the timeline is not on the path.
    pub fn begin_of(&self, timeline: TimelineId) -> Option<Lsn> {
        let index = self.index_of(timeline)?;
        Some(match index {
            0 => Lsn::INVALID,
            _ => self.ancestors[index - 1].end,
        })
    }

    /// Where the WAL of `timeline` ends on this path: its switch point, or `None` for the last one,
    /// which has no end. The outer `None` means that the timeline is not on the path.
    pub fn end_of(&self, timeline: TimelineId) -> Option<Option<Lsn>> {
        let index = self.index_of(timeline)?;
        Some(self.ancestors.get(index).map(|entry| entry.end))
    }

    /// The timeline that `lsn` belongs to on this path. A switch point belongs to the newer one.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.ancestors
            .iter()
            .find(|entry| lsn < entry.end)
            .map_or(self.timeline, |entry| entry.timeline)
    }

    /// The newest timeline of this path whose files hold `lsn`: a timeline's first segment begins
    /// with a copy of what its ancestor wrote there.
    pub fn holding(&self, lsn: Lsn, size: SegmentSize) -> TimelineId {
        let path = self.path();
        let holds =
            |(_, begin, _): &&(TimelineId, Lsn, Option<Lsn>)| begin.round_down(size.bytes()) <= lsn;
        path.iter().rev().find(holds).map_or(self.timeline, |(timeline, _, _)| *timeline)
    }

    /// The timeline that follows this one on the path.
    pub fn after(&self, timeline: TimelineId) -> Option<TimelineId> {
        let next = self.index_of(timeline)? + 1;
        let newest = (next == self.ancestors.len()).then_some(self.timeline);
        self.ancestors.get(next).map(|entry| entry.timeline).or(newest)
    }

    /// All timelines of the path with the LSNs between which each of them counts, oldest first.
    pub fn path(&self) -> Vec<(TimelineId, Lsn, Option<Lsn>)> {
        let mut begin = Lsn::INVALID;
        let mut path = Vec::with_capacity(self.ancestors.len() + 1);
        for entry in &self.ancestors {
            path.push((entry.timeline, begin, Some(entry.end)));
            begin = entry.end;
        }
        path.push((self.timeline, begin, None));
        path
    }

    /// Whether a recovery that has reached `lsn` on `timeline` can go on along this path.
    pub fn reachable_from(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        match self.end_of(timeline) {
            Some(Some(end)) => lsn <= end,
            Some(None) => true,
            None => false,
        }
    }

    /// The segments of `timeline` in which this path has bytes: first and, unless it is the last
    /// timeline, the last one.
    pub fn segments_of(
        &self,
        timeline: TimelineId,
        size: SegmentSize,
    ) -> Option<(SegmentNo, Option<SegmentNo>)> {
        let begin = self.begin_of(timeline)?;
        let end = self.end_of(timeline)?;
        Some((size.segment_of(begin), end.map(|end| size.segment_before(end))))
    }

    fn index_of(&self, timeline: TimelineId) -> Option<usize> {
        if timeline == self.timeline {
            return Some(self.ancestors.len());
        }
        self.ancestors.iter().position(|entry| entry.timeline == timeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: &[u8] = b"1\t0/3000060\tno recovery target specified\n\n# a comment\n2\t0/5000000\tbefore 2000-01-01 00:00:00+00\n";

    #[test]
    fn a_history_file_gives_the_path_of_its_timeline() {
        let history = TimelineHistory::parse(TimelineId(3), THREE).unwrap();
        assert_eq!(history.ancestors.len(), 2);
        assert_eq!(history.ancestors[1].reason, "before 2000-01-01 00:00:00+00");
        assert_eq!(history.timeline_at(Lsn(0x3000059)), TimelineId(1));
        assert_eq!(history.timeline_at(Lsn(0x3000060)), TimelineId(2));
        assert_eq!(history.timeline_at(Lsn(0x5000000)), TimelineId(3));
        assert_eq!(history.begin_of(TimelineId(2)), Some(Lsn(0x3000060)));
        assert_eq!(history.end_of(TimelineId(2)), Some(Some(Lsn(0x5000000))));
        assert_eq!(history.end_of(TimelineId(3)), Some(None));
        assert_eq!(history.end_of(TimelineId(4)), None);
        assert_eq!(history.after(TimelineId(1)), Some(TimelineId(2)));
        assert_eq!(history.after(TimelineId(2)), Some(TimelineId(3)));
        assert_eq!(history.after(TimelineId(3)), None);
        let size = SegmentSize::new(1 << 20).unwrap();
        assert_eq!(history.holding(Lsn(0x2FFFFFF), size), TimelineId(1));
        assert_eq!(history.holding(Lsn(0x3000000), size), TimelineId(2));
        assert_eq!(history.holding(Lsn(0x4FFFFFF), size), TimelineId(2));
        assert_eq!(history.holding(Lsn(0x5000000), size), TimelineId(3));
        assert!(history.reachable_from(TimelineId(1), Lsn(0x3000060)));
        assert!(!history.reachable_from(TimelineId(1), Lsn(0x3000061)));
    }

    #[test]
    fn a_timeline_may_skip_numbers() {
        let history = TimelineHistory::parse(TimelineId(4), b"1\t0/1000000\tx\n2\t0/2000000\ty\n");
        assert_eq!(history.unwrap().timeline_at(Lsn(0x2000000)), TimelineId(4));
    }

    // PostgreSQL itself writes such a file when it recovers to a point before an older fork.
    #[test]
    fn what_lies_behind_a_later_switch_point_does_not_count() {
        let history =
            TimelineHistory::parse(TimelineId(3), b"1\t0/5000\tx\n2\t0/2000\ty\n").unwrap();
        assert_eq!(history.end_of(TimelineId(1)), Some(Some(Lsn(0x2000))));
        assert_eq!(history.timeline_at(Lsn(0x2000)), TimelineId(3));
        assert!(!history.reachable_from(TimelineId(1), Lsn(0x3000)));
    }

    #[test]
    fn damaged_history_files_are_refused_with_their_line() {
        for (content, line) in [
            (&b"1 \n"[..], 1),
            (b"x\t0/1\t\n", 1),
            (b"1\t0/z\t\n", 1),
            (b"0\t0/1\t\n", 1),
            (b"2\t0/1\t\n1\t0/2\t\n", 2),
            (b"3\t0/1\t\n", 0),
        ] {
            assert_eq!(TimelineHistory::parse(TimelineId(3), content).unwrap_err().line, line);
        }
    }
}
