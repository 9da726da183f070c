//! pgkeep: a continuous archiver for PostgreSQL.
//!
//! It streams WAL out of the primary as it is written, puts it into object stores in several
//! regions at once, takes base backups over the same protocol, and restores any moment of the
//! recovery window. `docs/DESIGN.md` tells how and why.
//!
//! ```text
//! cli ──► archive, backup, restore, serve ──► store ──► repo
//!         archive, backup ──► pg ──► wal      wal, repo, config: pure, no I/O, no clock
//! ```

mod accounts;
pub mod archive;
pub mod backup;
pub mod cli;
pub mod config;
pub mod jitter;
pub mod offload;
pub mod pg;
pub mod progress;
pub mod repo;
pub mod restore;
pub mod serve;
pub mod store;
pub mod wal;
