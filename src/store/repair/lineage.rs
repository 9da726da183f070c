//! Which lineages the regions hold, and which region holds which.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures_util::future::join_all;

use super::super::ask_all;
use super::{FailureKind, Region, StoreError};
use crate::repo::{FORMAT_VERSION, LINEAGE_FILE, Lineage};
use crate::store::ReadError;

/// Why nothing can be repaired.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// No region answers, or no `lineage.json` is whole.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no such archive.
    #[error("the regions hold no archive of this cluster")]
    NoArchive,
    /// Two regions do not agree on what the lineage is.
    #[error("lineage.json of {system_identifier} says different things in {one} and {other}")]
    Disagreement {
        /// The lineage.
        system_identifier: String,
        /// A region.
        one: String,
        /// Another region.
        other: String,
    },
}

/// What a region has of a lineage.
pub(super) enum Holding {
    /// Its `lineage.json`.
    Good,
    /// No `lineage.json`: it is new or lost.
    Nothing,
    /// A damaged `lineage.json`.
    Damaged(String),
    /// It does not answer.
    Silent(StoreError),
}

/// A lineage that at least one region holds.
pub(super) struct Found {
    pub(super) lineage: Lineage,
    pub(super) bytes: Bytes,
    /// In the order of the regions.
    pub(super) holdings: Vec<Holding>,
}

/// Looks up the lineages of a cluster, or the wanted one.
pub(super) async fn find_lineages(
    cluster: &[Region],
    wanted: Option<u64>,
) -> Result<Vec<Found>, RepairError> {
    let mut ids = BTreeSet::new();
    let mut silent: Vec<Option<StoreError>> = Vec::new();
    let lists = ask_all(cluster, |region| async move { region.list_folder("").await }).await;
    for list in lists {
        match list {
            Ok((folders, _)) => {
                ids.extend(folders.iter().filter_map(|name| name.parse::<u64>().ok()));
                silent.push(None);
            }
            Err(error) => silent.push(Some(error)),
        }
    }
    if silent.iter().all(Option::is_some) {
        return Err(ReadError { errors: silent.into_iter().flatten().collect() }.into());
    }
    ids.retain(|id| wanted.is_none_or(|wanted| wanted == *id));
    let mut found = Vec::new();
    for id in ids {
        found.extend(find_lineage(cluster, &silent, &id.to_string()).await?);
    }
    if found.is_empty() {
        return Err(RepairError::NoArchive);
    }
    Ok(found)
}

async fn find_lineage(
    cluster: &[Region],
    silent: &[Option<StoreError>],
    id: &str,
) -> Result<Option<Found>, RepairError> {
    let reads = cluster.iter().zip(silent).map(|(region, silent)| async move {
        match silent {
            Some(error) => Err(error.clone()),
            None => read_lineage(&region.within(id), id).await,
        }
    });
    let mut chosen: Option<(Lineage, Bytes, &Region)> = None;
    let mut holdings = Vec::new();
    let mut errors = Vec::new();
    for (region, read) in cluster.iter().zip(join_all(reads).await) {
        holdings.push(match read {
            Ok((lineage, bytes)) => {
                match &chosen {
                    Some((first, _, one)) if *first != lineage => {
                        return Err(RepairError::Disagreement {
                            system_identifier: id.to_owned(),
                            one: one.name().to_owned(),
                            other: region.name().to_owned(),
                        });
                    }
                    Some(_) => {}
                    None => chosen = Some((lineage, bytes, region)),
                }
                Holding::Good
            }
            Err(error) if error.kind == FailureKind::NotFound => Holding::Nothing,
            Err(error) if error.kind == FailureKind::Damaged => {
                errors.push(error.clone());
                Holding::Damaged(error.message)
            }
            Err(error) => {
                errors.push(error.clone());
                Holding::Silent(error)
            }
        });
    }
    match chosen {
        Some((lineage, bytes, _)) => Ok(Some(Found { lineage, bytes, holdings })),
        None if errors.is_empty() => {
            tracing::warn!("the folder {id} has no lineage.json in any region: it is left alone");
            Ok(None)
        }
        None => Err(ReadError { errors }.into()),
    }
}

async fn read_lineage(region: &Region, id: &str) -> Result<(Lineage, Bytes), StoreError> {
    let bytes = region.get(LINEAGE_FILE).await?;
    let lineage: Lineage = serde_json::from_slice(&bytes)
        .map_err(|error| region.damaged(LINEAGE_FILE, format!("it cannot be read: {error}")))?;
    if lineage.format > FORMAT_VERSION {
        let message = format!(
            "it was written by a newer pgkeep (format {}); use that version",
            lineage.format
        );
        return Err(region.error("use", LINEAGE_FILE, FailureKind::Permanent, message));
    }
    if lineage.system_identifier != id {
        let message = format!("it lies in {id} and names {}", lineage.system_identifier);
        return Err(region.damaged(LINEAGE_FILE, message));
    }
    Ok((lineage, bytes))
}
