//! What the sidecar tells: the status report, and the HTTP service that gives it.

mod catalog;
mod http;
mod report;
mod slot;

pub use http::{Service, ask};
pub use report::{
    BackupStatus, ClusterStatus, GapStatus, NextBackup, ObjectiveStatus, Objectives, RegionStatus,
    StatusReport, status_from_regions,
};
pub use slot::watch_slot;
