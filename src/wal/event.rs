//! What WAL records say, as the archive's index keeps it.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Lsn, TimelineId};

/// Something that a WAL record says, with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Where the record begins.
    pub lsn: Lsn,
    /// Where the next record begins, at the earliest. A recovery that has replayed up to here has
    /// seen the event.
    pub end_lsn: Lsn,
    /// What it says.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The kinds of events. One record may give two: a commit that removes files, a checkpoint that
/// begins a timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A transaction committed (a prepared one too).
    Commit {
        /// Its top-level transaction identifier.
        xid: u32,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A transaction was rolled back.
    Abort {
        /// Its top-level transaction identifier.
        xid: u32,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// Its name.
        name: String,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A checkpoint was completed.
    Checkpoint {
        /// Where a recovery from it starts to replay.
        redo: Lsn,
        /// It was the checkpoint of a clean shutdown.
        shutdown: bool,
    },
    /// A promotion: the first record of a new timeline.
    EndOfRecovery {
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// The record before is the first one of a new timeline, and says which one it left.
    TimelineSwitch {
        /// The new timeline.
        timeline: TimelineId,
        /// The one before.
        previous: TimelineId,
    },
    /// A transaction that committed removed the files of relations. DROP removes and creates none;
    /// TRUNCATE, REINDEX, REFRESH, CLUSTER, VACUUM FULL and ALTER TABLE with a rewrite replace.
    /// Files of temporary relations are not in the WAL.
    FilesRemoved {
        /// Its top-level transaction identifier.
        xid: u32,
        /// When it committed, by the server's clock.
        time: DateTime<Utc>,
        /// The database that it ran in.
        database: u32,
        /// How many relation files it removed.
        removed: u32,
        /// How many it created, as far as was seen: a scanner that began inside the transaction
        /// has not seen all. REINDEX CONCURRENTLY creates in one transaction and removes in a
        /// later one.
        created: u32,
        /// The first of those removed.
        files: Vec<RelationFile>,
    },
    /// A database came to be. That is undone if the transaction is rolled back.
    DatabaseCreated {
        /// The transaction.
        xid: u32,
        /// The database.
        database: u32,
        /// The tablespace of its files.
        tablespace: u32,
        /// What its files were copied from; unknown when they were written to the WAL one by one.
        /// The database itself when ALTER DATABASE moves it to another tablespace.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        template: Option<u32>,
    },
    /// The files of a database were removed: DROP DATABASE, or the end of a move to another
    /// tablespace.
    DatabaseDropped {
        /// The transaction.
        xid: u32,
        /// The database.
        database: u32,
        /// The first of the tablespaces that it had files in.
        tablespaces: Vec<u32>,
    },
    /// Something that a newer pgkeep noted.
    #[serde(other)]
    Unknown,
}

/// `RelFileLocator` (`RelFileNode` before 16): the files of a relation. Printed as `pg_waldump`
/// does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    /// Object identifier of the tablespace.
    pub tablespace: u32,
    /// Object identifier of the database; 0 for relations that all share.
    pub database: u32,
    /// The number that names the file; not always the relation's object identifier.
    pub number: u32,
}

impl fmt::Display for RelationFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.tablespace, self.database, self.number)
    }
}

/// A text that names no relation file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not TABLESPACE/DATABASE/NUMBER")]
pub struct InvalidRelationFile(pub String);

impl FromStr for RelationFile {
    type Err = InvalidRelationFile;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut numbers = text.split('/').map(|digits| {
            let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
            if plain { digits.parse().ok() } else { None }
        });
        let mut next = || numbers.next().flatten();
        match (next(), next(), next(), numbers.next()) {
            (Some(tablespace), Some(database), Some(number), None) => {
                Ok(RelationFile { tablespace, database, number })
            }
            _ => Err(InvalidRelationFile(text.to_owned())),
        }
    }
}

impl Serialize for RelationFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RelationFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relation_files_survive_printing_and_parsing() {
        let file = RelationFile { tablespace: 1663, database: 5, number: u32::MAX };
        assert_eq!(file.to_string(), "1663/5/4294967295");
        assert_eq!(file.to_string().parse(), Ok(file));
        for text in ["", "1/2", "1/2/3/4", "1/+2/3", "1//3", "1/2/4294967296"] {
            assert!(text.parse::<RelationFile>().is_err(), "{text:?}");
        }
    }
}
