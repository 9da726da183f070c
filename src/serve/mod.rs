//! What the sidecar tells: the status report, and the HTTP service that gives it.

mod http;
mod report;

pub use http::{Service, ask};
pub use report::{
    BackupStatus, ClusterStatus, GapStatus, ObjectiveStatus, Objectives, RegionStatus,
    StatusReport, status_from_regions, status_from_sidecar,
};
