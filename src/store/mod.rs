//! Object stores: opening URLs, one region, reading with fallback from several.
//!
//! Every request has deadlines of its own, by which a store that hangs is known within seconds,
//! failures are sorted into what may pass and what will not, and whatever is read is verified by
//! the caller's own hash before it is used (invariants I5, I9, I10).

mod ask;
mod block_hashes;
mod catalog;
mod copy;
mod counts;
mod delete;
mod error;
mod fallback;
mod folder;
mod listing;
mod open;
mod patience;
mod read;
mod region;
pub mod repair;
mod upload;
mod wal;
mod write;

pub use ask::ask_all;
pub use block_hashes::read_block_hashes;
pub use catalog::{Catalog, list_lineages};
pub use copy::{Copied, WalRange, copy_wal};
pub use counts::RequestCounts;
pub use error::{FailureKind, StoreError};
pub use fallback::{Damage, ReadError, Regions};
pub use listing::ObjectInfo;
pub use open::{RegionSpec, open_region};
pub use patience::Patience;
pub use region::Region;
pub use upload::{PART_SIZE, Upload};
pub use wal::{
    Frontier, PieceIndex, frontier_of, list_gaps, list_histories, list_pieces, list_timelines,
    lowest_of, piece_metadata, read_cover, read_piece, read_piece_object, read_wal,
};
pub use write::Put;
