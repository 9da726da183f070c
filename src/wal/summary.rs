//! What a range of WAL says: the part of a piece's metadata that makes the archive its own index.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{Event, EventKind, Lsn};

/// The most transactions that removed files which a summary names, so that a server that does
/// little but TRUNCATE cannot make the metadata of a piece as large as its WAL.
const REMOVALS_NAMED: usize = 1000;

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
    /// Events of kind [`EventKind::FilesRemoved`] that were left out of `events`, which has the
    /// first ones.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub removals_left_out: u64,
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
            EventKind::FilesRemoved { .. } => return self.add_removal(event),
            _ => return self.events.push(event),
        };
        self.min_time = Some(self.min_time.map_or(time, |min| min.min(time)));
        self.max_time = Some(self.max_time.map_or(time, |max| max.max(time)));
        if xid != 0 {
            self.min_xid = Some(self.min_xid.map_or(xid, |min| min.min(xid)));
            self.max_xid = Some(self.max_xid.map_or(xid, |max| max.max(xid)));
        }
    }

    fn add_removal(&mut self, event: Event) {
        let is_removal = |event: &&Event| matches!(event.kind, EventKind::FilesRemoved { .. });
        // Counted only where there are many.
        let full = self.removals_left_out > 0
            || (self.events.len() >= REMOVALS_NAMED
                && self.events.iter().filter(is_removal).count() >= REMOVALS_NAMED);
        if full {
            self.removals_left_out += 1;
        } else {
            self.events.push(event);
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
        for event in &next.events {
            match event.kind {
                EventKind::FilesRemoved { .. } => self.add_removal(event.clone()),
                _ => self.events.push(event.clone()),
            }
        }
        self.removals_left_out += next.removals_left_out;
        self.open_record = next.open_record;
        self.last_record = next.last_record.or(self.last_record);
        self.damage.extend(next.damage.iter().cloned());
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}
