//! The end of a backup: its index, then, region by region, the commit point.

use std::time::Instant;

use bytes::Bytes;
use futures_util::future::join_all;

use super::lease::BackupLease;
use super::packer::Sums;
use super::receive::Received;
use super::wal::wait_for_wal;
use super::{BackupError, BackupOutcome};
use crate::repo::{BackupInfo, ContentKey, StoredObject, backup_json_key, files_idx_key};
use crate::store::{Region, StoreError};
use crate::wal::Lsn;

/// What `backup.json` is made of.
pub(super) struct Parts {
    pub(super) sums: Sums,
    pub(super) files_idx: StoredObject,
    pub(super) manifest: StoredObject,
    pub(super) stop_lsn: Lsn,
    pub(super) new_size: u64,
    pub(super) checksum_failures: Vec<String>,
}

/// Stores `files.idx`; says which regions have everything but the commit point.
pub(super) async fn store_index(
    received: Received,
    key: &ContentKey,
    make: impl FnOnce(Parts) -> BackupInfo,
) -> Result<(BackupInfo, Vec<Result<(), StoreError>>), BackupError> {
    let Received { packer, packs, mut fanout, older_packs, manifest, stop_lsn, checksum_failures } =
        received;
    let new_size = packer.new_bytes();
    let index = tokio::task::spawn_blocking(move || packer.index(packs, older_packs));
    let (bytes, sums) = index.await.map_err(std::io::Error::other)??;
    let files_idx = StoredObject { size: bytes.len() as u64, hash: key.hash(&bytes) };
    let parts = Parts { sums, files_idx, manifest, stop_lsn, new_size, checksum_failures };
    let info = make(parts);
    fanout.begin(&files_idx_key(&info.label)).await;
    fanout.write(&bytes).await;
    fanout.end().await;
    Ok((info, fanout.finish().await))
}

/// Writes `backup.json` into every region that has everything else.
pub(super) async fn publish(
    info: &BackupInfo,
    regions: &[Region],
    stored: Vec<Result<(), StoreError>>,
    lease: &BackupLease,
    deadline: tokio::time::Instant,
) -> Vec<Result<(), StoreError>> {
    let bytes = serde_json::to_vec_pretty(info).map(Bytes::from).unwrap_or_default();
    let key = backup_json_key(&info.label);
    let publications = regions.iter().zip(stored).map(|(region, stored)| {
        let (bytes, key) = (bytes.clone(), key.clone());
        async move {
            stored?;
            wait_for_wal(region, info, deadline).await?;
            lease.check(region)?;
            region.put(&key, bytes).await.map(|_| ())
        }
    });
    join_all(publications).await
}

/// Says what became of it.
pub(super) fn finish(
    info: BackupInfo,
    published: Vec<Result<(), StoreError>>,
    regions: &[Region],
    mut failures: Vec<StoreError>,
    began: Instant,
) -> Result<BackupOutcome, BackupError> {
    let mut names = Vec::new();
    for (region, outcome) in regions.iter().zip(published) {
        match outcome {
            Ok(()) => names.push(region.name().to_owned()),
            Err(error) => failures.push(error),
        }
    }
    if names.is_empty() {
        return Err(BackupError::NoRegion(failures));
    }
    Ok(BackupOutcome { info, regions: names, failures, elapsed: began.elapsed() })
}
