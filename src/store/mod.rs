//! Object stores: opening URLs, one region, reading with fallback from several.
//!
//! Every request has a deadline of its own that grows with its size, failures are sorted into what
//! may pass and what will not, and whatever is read is verified by the caller's own hash before it
//! is used (invariants I5, I9, I10).

mod ask;
mod catalog;
mod copy;
mod error;
mod fallback;
mod open;
mod region;
pub mod repair;
mod upload;
mod wal;

pub use ask::ask_all;
pub use catalog::{Catalog, list_lineages};
pub use copy::{Copied, WalRange, copy_wal};
pub use error::{FailureKind, StoreError};
pub use fallback::{Damage, ReadError, Regions};
pub use open::{RegionSpec, open_region};
pub use region::{ObjectInfo, Put, Region};
pub use upload::{PART_SIZE, Upload};
pub use wal::{
    Frontier, PieceIndex, frontier_of, list_gaps, list_histories, list_pieces, list_timelines,
    lowest_of, piece_metadata, read_cover, read_piece, read_piece_object, read_wal,
};
