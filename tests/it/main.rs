//! Tests on real programs: PostgreSQL of every supported major, an S3 server, `zstd`.
//!
//! `scripts/setup` gets them into a cache folder. Each test starts its own servers, on its own port
//! and in its own folder, and stops them. As root, everything runs as the user `nobody`, because
//! PostgreSQL must not run as root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod support;

mod cli;
mod connection;
mod corruption;
mod damaged_pages;
mod gaps;
mod include;
mod incremental;
mod interrupted;
mod ledger;
mod main_path;
mod region_faults;
mod regions;
mod repair;
mod restore_over;
mod schedules;
mod segments;
mod server_faults;
mod shapes;
mod slot;
mod strangers;
mod synchronous;
mod targets;
mod timelines;
mod wal_fetch;
mod wal_truth;
