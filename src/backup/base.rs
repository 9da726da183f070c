//! What a backup builds on, and the stream that fits: decided before the server is asked for files.
//!
//! An incremental backup has two ways to find out what changed since its parent. A server that
//! keeps WAL summaries (17 and newer, `summarize_wal`) reads and sends only those blocks. When it
//! cannot, it sends everything, and blocks that have the parent's hash are not stored.

use futures_util::future::join_all;

use super::parent::{Parent, UploadError, choose};
use super::{BackupError, BackupType};
use crate::pg::{BackupOptions, BackupStream, Connection, Connector, IdentifySystem, PgError};
use crate::repo::{BLOCK_SIZE, BackupLabel, ChangesFrom, ContentKey, backup_json_key};
use crate::store::{Catalog, FailureKind, Region, Regions, StoreError, list_lineages};

/// The first major version that knows `UPLOAD_MANIFEST`.
const FIRST_WITH_SUMMARIES: u32 = 17;

/// What a backup builds on.
pub(super) struct Base {
    /// The type that can be taken.
    pub(super) kind: BackupType,
    pub(super) parent: Option<Parent>,
    /// The regions that can hold it, at the lineage's folder.
    pub(super) regions: Vec<Region>,
    /// All regions.
    pub(super) everywhere: Vec<Region>,
    /// Why the others cannot.
    pub(super) failures: Vec<StoreError>,
}

/// Finds the parent for a backup of this type; without one it is a full backup.
///
/// # Errors
/// When no region can be read, or the parent's index is damaged in all of them.
pub(super) async fn choose_base(
    kind: BackupType,
    cluster: &Regions,
    identity: &IdentifySystem,
    key: &ContentKey,
    major: u32,
) -> Result<Base, BackupError> {
    let all = cluster.within(&identity.system_id.to_string());
    let all: Vec<Region> = all.iter().cloned().collect();
    let everywhere = all.clone();
    let full = |regions| Base {
        kind: BackupType::Full,
        parent: None,
        regions,
        everywhere: everywhere.clone(),
        failures: Vec::new(),
    };
    if kind == BackupType::Full {
        return Ok(full(all));
    }
    let lineages = list_lineages(cluster).await?;
    let lineage = lineages.into_iter().find(|lineage| lineage.system_id() == identity.system_id);
    let found = match lineage {
        None => None,
        Some(lineage) => {
            let catalog = Catalog::read(cluster, lineage).await?;
            choose(&catalog, kind, major).map(|info| (catalog.backups[&info.label].1.clone(), info))
        }
    };
    let Some((holders, info)) = found else {
        tracing::warn!("there is no backup that a {kind} one could build on: taking a full backup");
        return Ok(full(all));
    };
    let (regions, others): (Vec<Region>, Vec<Region>) =
        all.into_iter().partition(|region| holders.iter().any(|name| name == region.name()));
    let lacking = |region: &Region| StoreError {
        kind: FailureKind::NotFound,
        region: region.name().to_owned(),
        operation: "write",
        key: info.label.to_string(),
        message: "the backup that this one builds on is not there; \"pgkeep repair\" brings both"
            .into(),
    };
    let failures = others.iter().map(lacking).collect();
    let parent = Parent::open(info, Regions::new(regions.clone()), key.clone()).await?;
    Ok(Base { kind, parent: Some(parent), regions, everywhere, failures })
}

/// Looks again, now that a lease names it, whether the parent is there.
///
/// # Errors
/// When somebody removed it meanwhile.
pub(super) async fn require_parent(
    regions: &[Region],
    parent: &BackupLabel,
) -> Result<(), BackupError> {
    let key = &backup_json_key(parent);
    for found in join_all(regions.iter().map(|region| region.size(key))).await {
        // A region that cannot be asked fails later, by itself.
        if let Ok(None) = found {
            let problem = "it was removed while this backup began".into();
            return Err(BackupError::Parent(parent.clone(), problem));
        }
    }
    Ok(())
}

/// Asks the server for the files: only what changed since the parent where it can, or all.
///
/// # Errors
/// When the server refuses both or the connection breaks.
pub(super) async fn open_stream(
    connector: &Connector,
    mut connection: Connection,
    options: BackupOptions,
    parent: Option<Parent>,
) -> Result<(BackupStream, Option<(Parent, ChangesFrom)>), BackupError> {
    let Some(parent) = parent else {
        return Ok((connection.base_backup(&options).await?, None));
    };
    let host = connection.host().clone();
    match why_not_summaries(&mut connection).await? {
        Some(reason) => tracing::info!("{reason}: comparing all blocks with the parent's hashes"),
        None => match ask_for_changes(connection, &options, &parent).await {
            Ok(stream) => return Ok((stream, Some((parent, ChangesFrom::WalSummaries)))),
            Err(error) => {
                tracing::warn!(
                    "the server cannot tell what changed since {}: {error}; comparing all blocks with its hashes",
                    parent.info.label
                );
                connection = connector.connect_any_role(&host, &[]).await?;
            }
        },
    }
    let stream = connection.base_backup(&options).await?;
    Ok((stream, Some((parent, ChangesFrom::BlockHashes))))
}

/// Why the server need not even be asked for changed blocks.
async fn why_not_summaries(connection: &mut Connection) -> Result<Option<String>, PgError> {
    if connection.major() < FIRST_WITH_SUMMARIES {
        return Ok(Some(format!("PostgreSQL {} has no WAL summaries", connection.major())));
    }
    if connection.show("summarize_wal").await? != "on" {
        return Ok(Some("summarize_wal is off on the server".into()));
    }
    if connection.show("block_size").await? != BLOCK_SIZE.to_string() {
        return Ok(Some("the server's block_size is not 8192".into()));
    }
    Ok(None)
}

async fn ask_for_changes(
    mut connection: Connection,
    options: &BackupOptions,
    parent: &Parent,
) -> Result<BackupStream, UploadError> {
    parent.upload_manifest(&mut connection).await?;
    let options = BackupOptions { incremental: true, ..options.clone() };
    Ok(connection.base_backup(&options).await?)
}
