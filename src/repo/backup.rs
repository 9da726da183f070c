//! `backup.json`, the commit point of a backup: it exists in a region if and only if this object
//! does (invariant I3). Small, and for people to read.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};

use super::ContentHash;
use crate::wal::{Lsn, SegmentSize, TimelineId};

/// How a backup relates to older ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupType {
    /// Refers to no older backup.
    Full,
    /// Refers to the backup before it.
    Incremental,
    /// Refers to the full backup before it.
    Differential,
}

impl BackupType {
    fn in_label(self) -> &'static str {
        match self {
            BackupType::Full => "full",
            BackupType::Incremental => "incr",
            BackupType::Differential => "diff",
        }
    }
}

impl fmt::Display for BackupType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackupType::Full => "full",
            BackupType::Incremental => "incremental",
            BackupType::Differential => "differential",
        })
    }
}

/// A backup's name: `<UTC time>-<full|incr|diff>-<4 random hex>`. Labels sort by time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupLabel(String);

/// A text that is no backup's label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a backup label, which looks like 20261123T071500Z-full-9c1e")]
pub struct InvalidLabel(pub String);

const LABEL_TIME: &str = "%Y%m%dT%H%M%SZ";

impl BackupLabel {
    /// The label of a backup that begins at `time`; `random` keeps two of the same second apart.
    pub fn new(time: DateTime<Utc>, kind: BackupType, random: u16) -> BackupLabel {
        BackupLabel(format!("{}-{}-{random:04x}", time.format(LABEL_TIME), kind.in_label()))
    }

    /// When the backup began, to the second.
    pub fn time(&self) -> DateTime<Utc> {
        let time = self.0.split('-').next().unwrap_or_default();
        // Every label was checked when it was made.
        NaiveDateTime::parse_from_str(time, LABEL_TIME).unwrap_or_default().and_utc()
    }

    /// Its type.
    pub fn kind(&self) -> BackupType {
        match self.0.split('-').nth(1) {
            Some("incr") => BackupType::Incremental,
            Some("diff") => BackupType::Differential,
            _ => BackupType::Full,
        }
    }

    /// The label as it is printed.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BackupLabel {
    type Err = InvalidLabel;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('-');
        let time = parts.next().unwrap_or_default();
        let kind = parts.next().unwrap_or_default();
        let random = parts.next().unwrap_or_default();
        let lower_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let valid = parts.next().is_none()
            && time.len() == 16
            && NaiveDateTime::parse_from_str(time, LABEL_TIME).is_ok()
            && matches!(kind, "full" | "incr" | "diff")
            && random.len() == 4
            && random.bytes().all(lower_hex);
        if valid { Ok(BackupLabel(text.to_owned())) } else { Err(InvalidLabel(text.to_owned())) }
    }
}

impl fmt::Display for BackupLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for BackupLabel {
    type Error = InvalidLabel;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<BackupLabel> for String {
    fn from(label: BackupLabel) -> String {
        label.0
    }
}

/// An object that is stored as a whole, with what proves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredObject {
    /// Length in bytes, as stored.
    pub size: u64,
    /// Hash of the stored bytes.
    pub hash: ContentHash,
}

/// A tablespace outside the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its OID: the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it lay on the server.
    pub location: String,
}

/// How it was found out which blocks changed since the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangesFrom {
    /// The server read its WAL summaries and sent only those blocks (17 and newer).
    WalSummaries,
    /// The server sent everything; blocks with the parent's hash were not stored.
    BlockHashes,
}

/// The files from outside the data directory that were captured with a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Included {
    /// The paths that were asked for.
    pub paths: Vec<String>,
    /// How many files there are, folders and links not counted.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// What was left out because it has no content: sockets, pipes, devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
    /// `include.tar.zst`.
    #[serde(flatten)]
    pub object: StoredObject,
}

/// What `backup.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// Format version.
    pub format: u32,
    /// The backup's name.
    pub label: BackupLabel,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: BackupType,
    /// The backup that it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupLabel>,
    /// How it was found out what changed since the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes_from: Option<ChangesFrom>,
    /// The version of pgkeep that took it.
    pub pgkeep_version: String,
    /// The server's version, as `server_version` prints it.
    pub server_version: String,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// Whose backup it is; text, because many JSON readers round numbers of this size.
    pub system_identifier: String,
    /// The timeline on which it was taken.
    pub timeline: TimelineId,
    /// The cluster's segment size in bytes.
    pub wal_segment_size: SegmentSize,
    /// Recovery replays from here.
    pub start_lsn: Lsn,
    /// Recovery must replay up to here before the cluster is consistent.
    pub stop_lsn: Lsn,
    /// The server's clock when it began.
    pub start_time: DateTime<Utc>,
    /// The server's clock when it ended.
    pub stop_time: DateTime<Utc>,
    /// Whether the cluster has data checksums, which the server then checked.
    pub data_checksums: bool,
    /// What the server said of pages with wrong checksums.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checksum_failures: Vec<String>,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// Files in the backup.
    pub files: u64,
    /// Bytes of all files.
    pub size: u64,
    /// Bytes that were read for this backup and are not in an older one.
    pub new_size: u64,
    /// Bytes that its own packs take.
    pub stored_size: u64,
    /// Number of packs in which its files lie, those of older backups included.
    pub packs: u32,
    /// Bytes of those packs: the most that a restore reads.
    #[serde(default)]
    pub packs_size: u64,
    /// `files.idx`.
    pub files_idx: StoredObject,
    /// `backup_manifest`.
    pub backup_manifest: StoredObject,
    /// Files from outside the data directory, if any were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub include: Option<Included>,
    /// What of them could not be captured, or not as a whole, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include_failures: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_sort_by_time_and_survive() {
        let time = "2026-11-23T07:15:00Z".parse().unwrap();
        let label = BackupLabel::new(time, BackupType::Full, 0x9c1e);
        assert_eq!(label.as_str(), "20261123T071500Z-full-9c1e");
        assert_eq!((label.time(), label.kind()), (time, BackupType::Full));
        assert_eq!(label.as_str().parse(), Ok(label));
    }

    #[test]
    fn texts_that_are_no_label_are_refused() {
        for text in [
            "",
            "20261123T071500Z-full",
            "20261123T071500Z-whole-9c1e",
            "20261323T071500Z-full-9c1e",
            "20261123T071500Z-full-9C1E",
            "../20261123T071500Z-full-9c1e",
            "20261123T071500Z-full-9c1e-1",
        ] {
            assert!(text.parse::<BackupLabel>().is_err(), "{text}");
        }
    }
}
