//! What lies in a region: names, the object format and the types written into it.
//!
//! Pure, like [`crate::wal`]: bytes in, values out, and back. `docs/FORMAT.md` gives the same
//! layouts for people and for other programs; golden files in the tests keep both honest.

mod alive;
mod backup;
mod blocks;
mod container;
mod coverage;
mod files;
mod gap;
mod hash;
mod include;
mod lease;
mod lineage;
mod names;
mod piece;
mod rollup;
mod varint;

pub use alive::{Alive, RegionWord};
pub use backup::{
    BackupInfo, BackupLabel, BackupType, ChangesFrom, Included, InvalidLabel, StoredObject,
    Tablespace,
};
pub use blocks::{BLOCK_SIZE, Block, BlockHashes, BlockHashesWriter};
pub use container::{
    Container, ContainerError, ContainerWriter, FRAME_SIZE, Frame, FrameRange, TRAILER_GUESS,
    Trailer, TrailerRead, compress_frame, compress_wal_frame, decompress_frame,
    decompress_frame_into,
};
pub use coverage::{CoverPart, Coverage, Divergence};
pub use files::{
    Extent, FileEntry, FileIndex, FileIndexError, FileIndexSummary, FileIndexWriter, FileKind,
    FileLookup, PackEntry, PackFrame,
};
pub use gap::Gap;
pub use hash::{ContentHash, ContentHasher, ContentKey, ShortHash};
pub use include::{
    CapturedEntry, CapturedKind, INCLUDE_MAX_BYTES, INCLUDE_MAX_ENTRIES, IncludeError,
    LocatedEntry, append_captured, read_captured,
};
pub use lease::{LEASE_LIFETIME, Lease, LeaseKind, is_abandoned};
pub use lineage::{FORMAT_VERSION, Lineage};
pub use names::{
    ALIVE_FOLDER, BACKUP_FOLDER, GAP_FOLDER, LEASE_FOLDER, LINEAGE_FILE, PIECE_SIZE, PieceName,
    TIMELINE_FOLDER, WAL_FOLDER, alive_key, backup_folder, backup_json_key, files_idx_key, gap_key,
    history_key, include_key, index_key, lease_key, log_folder, manifest_key, pack_key,
    parse_gap_key, parse_history_name, parse_index_name, timeline_folder,
};
pub use piece::PieceMeta;
pub use rollup::{RollUp, RollUpError, build_roll_up, read_roll_up};
