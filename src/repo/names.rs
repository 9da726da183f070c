//! Names of objects, relative to `<region url>/<cluster name>/<system identifier>/`.
//!
//! ```text
//! lineage.json
//! timeline/00000002-<hash16>.history
//! wal/<TLI8>/<LOG8>/<SEGMENT24>-<from8>-<to8>-<hash16>.zst      a piece: bytes [from, to) of the segment
//! wal/<TLI8>/<LOG8>/index-<hash16>.zst                         the roll-up of a finished folder
//! gap/<TLI8>/<from16>-<to16>.json
//! backup/<label>/{backup.json, files.idx, backup_manifest, pack-<n6>.zst}
//! lease/<label>-<n6>.json
//! alive/<archiver>.json
//! ```
//! A name never stands for two different contents: it carries a hash of the content, or lies in a
//! folder whose name is unique (invariant I2). `alive/` is the one exception.

use std::fmt;

use super::{BackupLabel, ShortHash};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

/// The file that says what lives under a prefix.
pub const LINEAGE_FILE: &str = "lineage.json";
/// The folder of timeline history files.
pub const TIMELINE_FOLDER: &str = "timeline";
/// The folder of WAL pieces.
pub const WAL_FOLDER: &str = "wal";
/// The folder of recorded gaps.
pub const GAP_FOLDER: &str = "gap";
/// The folder of backups.
pub const BACKUP_FOLDER: &str = "backup";
/// The folder of leases.
pub const LEASE_FOLDER: &str = "lease";
/// The folder of the archivers' last words.
pub const ALIVE_FOLDER: &str = "alive";

/// The most WAL that one piece holds. Segments larger than this are runs of such pieces.
pub const PIECE_SIZE: u64 = 16 << 20;

/// The name of an object that holds WAL bytes `[from, to)` of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceName {
    /// The segment.
    pub segment: SegmentName,
    /// Offset of the first byte in the segment.
    pub from: u32,
    /// Offset behind the last byte in the segment.
    pub to: u32,
    /// Hash of the raw content.
    pub hash: ShortHash,
}

impl PieceName {
    /// The key of the object.
    pub fn key(&self) -> String {
        format!("{}/{self}", log_folder(self.segment.timeline, self.segment.log))
    }

    /// Reads a file name (without its folders). `None` for anything that is no piece.
    pub fn parse(file_name: &str) -> Option<PieceName> {
        let stem = file_name.strip_suffix(".zst")?;
        let mut parts = stem.split('-');
        let segment = parts.next()?.parse().ok()?;
        let from = hex8(parts.next()?)?;
        let to = hex8(parts.next()?)?;
        let hash = parts.next()?.parse().ok()?;
        let whole = parts.next().is_none() && from < to && u64::from(to - from) <= PIECE_SIZE;
        whole.then_some(PieceName { segment, from, to, hash })
    }

    /// Where the piece begins in the WAL; `None` if the name does not fit the segment size.
    pub fn start(&self, size: SegmentSize) -> Option<Lsn> {
        let segment = size.number(self.segment)?;
        let fits = u64::from(self.to) <= size.bytes();
        fits.then(|| size.start_of(segment).advance(u64::from(self.from)))
    }

    /// Where the piece ends.
    pub fn end(&self, size: SegmentSize) -> Option<Lsn> {
        self.start(size).map(|start| start.advance(self.len()))
    }

    /// How many bytes of WAL it holds; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a piece is never empty")]
    pub fn len(&self) -> u64 {
        u64::from(self.to - self.from)
    }

    /// Whether this piece holds all that `other` holds, and more.
    pub fn covers(&self, other: &PieceName) -> bool {
        self.segment == other.segment
            && self.from <= other.from
            && other.to <= self.to
            && self.len() > other.len()
    }
}

impl fmt::Display for PieceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:08X}-{:08X}-{}.zst", self.segment, self.from, self.to, self.hash)
    }
}

fn hex8(text: &str) -> Option<u32> {
    let upper_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    let valid = text.len() == 8 && text.bytes().all(upper_hex);
    if valid { u32::from_str_radix(text, 16).ok() } else { None }
}

/// The folder of all WAL of a timeline.
pub fn timeline_folder(timeline: TimelineId) -> String {
    format!("{WAL_FOLDER}/{}", timeline.to_hex8())
}

/// The folder of the pieces whose segment names share timeline and log number.
pub fn log_folder(timeline: TimelineId, log: u32) -> String {
    format!("{WAL_FOLDER}/{}/{log:08X}", timeline.to_hex8())
}

/// The key of a finished folder's roll-up.
pub fn index_key(timeline: TimelineId, log: u32, hash: ShortHash) -> String {
    format!("{}/index-{hash}.zst", log_folder(timeline, log))
}

/// Reads the file name of a roll-up.
pub fn parse_index_name(file_name: &str) -> Option<ShortHash> {
    file_name.strip_prefix("index-")?.strip_suffix(".zst")?.parse().ok()
}

/// The key of a timeline's history file.
pub fn history_key(timeline: TimelineId, hash: ShortHash) -> String {
    format!("{TIMELINE_FOLDER}/{}-{hash}.history", timeline.to_hex8())
}

/// Reads the file name of a history file.
pub fn parse_history_name(file_name: &str) -> Option<(TimelineId, ShortHash)> {
    let (timeline, hash) = file_name.strip_suffix(".history")?.split_once('-')?;
    Some((TimelineId::from_hex8(timeline)?, hash.parse().ok()?))
}

/// The key of a recorded gap.
pub fn gap_key(timeline: TimelineId, from: Lsn, to: Lsn) -> String {
    format!("{GAP_FOLDER}/{}/{}-{}.json", timeline.to_hex8(), from.to_hex16(), to.to_hex16())
}

/// Reads the key of a recorded gap.
pub fn parse_gap_key(key: &str) -> Option<(TimelineId, Lsn, Lsn)> {
    let mut parts = key.strip_prefix(GAP_FOLDER)?.strip_prefix('/')?.split('/');
    let timeline = TimelineId::from_hex8(parts.next()?)?;
    let (from, to) = parts.next()?.strip_suffix(".json")?.split_once('-')?;
    let lsn = |text: &str| u64::from_str_radix(text, 16).ok().map(Lsn);
    (parts.next().is_none()).then_some((timeline, lsn(from)?, lsn(to)?))
}

/// The folder of a backup.
pub fn backup_folder(label: &BackupLabel) -> String {
    format!("{BACKUP_FOLDER}/{label}")
}

/// The key of a backup's commit point.
pub fn backup_json_key(label: &BackupLabel) -> String {
    format!("{BACKUP_FOLDER}/{label}/backup.json")
}

/// The key of a backup's file index.
pub fn files_idx_key(label: &BackupLabel) -> String {
    format!("{BACKUP_FOLDER}/{label}/files.idx")
}

/// The key of the manifest that PostgreSQL sent with a backup.
pub fn manifest_key(label: &BackupLabel) -> String {
    format!("{BACKUP_FOLDER}/{label}/backup_manifest")
}

/// The key of the files from outside the data directory that were captured with a backup.
pub fn include_key(label: &BackupLabel) -> String {
    format!("{BACKUP_FOLDER}/{label}/include.tar.zst")
}

/// The key of a backup's `number`-th pack.
pub fn pack_key(label: &BackupLabel, number: u32) -> String {
    format!("{BACKUP_FOLDER}/{label}/pack-{number:06}.zst")
}

/// The key of the `number`-th lease of the process that takes a backup.
pub fn lease_key(label: &BackupLabel, number: u32) -> String {
    format!("{LEASE_FOLDER}/{label}-{number:06}.json")
}

/// The key of an archiver's last word.
pub fn alive_key(archiver: &str) -> String {
    format!("{ALIVE_FOLDER}/{archiver}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece() -> PieceName {
        PieceName {
            segment: "0000000200000016000000B3".parse().unwrap(),
            from: 0,
            to: 16 << 20,
            hash: ShortHash(0x0123_4567_89ab_cdef),
        }
    }

    #[test]
    fn a_piece_name_says_where_it_lies() {
        let name = "0000000200000016000000B3-00000000-01000000-0123456789abcdef.zst";
        assert_eq!(piece().to_string(), name);
        assert_eq!(piece().key(), format!("wal/00000002/00000016/{name}"));
        assert_eq!(PieceName::parse(name), Some(piece()));
        assert_eq!(piece().start(SegmentSize::DEFAULT), Some("16/B3000000".parse().unwrap()));
        assert_eq!(piece().end(SegmentSize::DEFAULT), Some("16/B4000000".parse().unwrap()));
    }

    #[test]
    fn names_that_are_not_ours_are_left_alone() {
        for name in [
            "index-0123456789abcdef.zst",
            "0000000200000016000000B3-00000000-01000000-0123456789abcdef.zst#1",
            "0000000200000016000000B3-01000000-01000000-0123456789abcdef.zst",
            "0000000200000016000000B3-00000000-01000001-0123456789abcdef.zst",
            "0000000200000016000000B3-00000000-01000000.zst",
            "0000000200000016000000B3-0000000-01000000-0123456789abcdef.zst",
        ] {
            assert_eq!(PieceName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_piece_covers_only_smaller_ones_of_its_segment() {
        let small = PieceName { from: 100, to: 200, ..piece() };
        assert!(piece().covers(&small));
        assert!(!small.covers(&piece()));
        assert!(!piece().covers(&piece()));
        let elsewhere = PieceName { segment: "0000000200000016000000B4".parse().unwrap(), ..small };
        assert!(!piece().covers(&elsewhere));
    }

    #[test]
    fn gap_history_and_index_names_survive() {
        let key = index_key(TimelineId(3), 0x16, ShortHash(9));
        assert_eq!(key, "wal/00000003/00000016/index-0000000000000009.zst");
        let name = key.rsplit('/').next().unwrap();
        assert_eq!(parse_index_name(name), Some(ShortHash(9)));
        assert_eq!(parse_index_name("index-0000000000000009.zst#1"), None);
        assert_eq!(parse_index_name(&piece().to_string()), None);
        let key = gap_key(TimelineId(3), Lsn(16), Lsn(1 << 40));
        assert_eq!(parse_gap_key(&key), Some((TimelineId(3), Lsn(16), Lsn(1 << 40))));
        let key = history_key(TimelineId(3), ShortHash(9));
        assert_eq!(
            parse_history_name(key.strip_prefix("timeline/").unwrap()),
            Some((TimelineId(3), ShortHash(9)))
        );
    }
}
