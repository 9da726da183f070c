//! What the regions hold of one cluster, put together: lineages, backups, timelines, gaps, last
//! words. Regions that cannot be read are named, not fatal, as long as one can.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures_util::future::join_all;
use serde::de::DeserializeOwned;

use super::wal::{list_gaps, list_histories, list_pieces, list_timelines};
use super::{ReadError, Region, Regions, StoreError};
use crate::repo::{
    ALIVE_FOLDER, Alive, BACKUP_FOLDER, BackupInfo, BackupLabel, ContentKey, Coverage,
    FORMAT_VERSION, LINEAGE_FILE, Lineage, PieceName, backup_json_key,
};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// Everything that the readable regions say about one lineage.
#[derive(Clone, Debug)]
pub struct Catalog {
    /// Whose archive it is.
    pub lineage: Lineage,
    /// The regions, at the lineage's folder, in the order of preference.
    pub regions: Regions,
    /// Backups, oldest first, with the names of the regions that have them.
    pub backups: BTreeMap<BackupLabel, (BackupInfo, Vec<String>)>,
    /// History files by timeline, parsed and raw. Timeline 1 has none.
    pub histories: BTreeMap<TimelineId, (TimelineHistory, Bytes)>,
    /// Timelines of which the regions have different history files: two servers were promoted to
    /// one number.
    pub conflicts: BTreeSet<TimelineId>,
    /// Timelines that have WAL.
    pub timelines: Vec<TimelineId>,
    /// Recorded gaps.
    pub gaps: Vec<(TimelineId, Lsn, Lsn)>,
    /// The archivers' last words.
    pub alive: Vec<Alive>,
    /// What could not be read.
    pub failures: Vec<StoreError>,
}

/// What one region says.
#[derive(Default)]
struct Part {
    backups: Vec<BackupInfo>,
    histories: Vec<(TimelineHistory, Bytes)>,
    timelines: Vec<TimelineId>,
    gaps: Vec<(TimelineId, Lsn, Lsn)>,
    alive: Vec<Alive>,
    failures: Vec<StoreError>,
}

/// The system identifiers under a cluster's name, with what their `lineage.json` says, in all
/// readable regions.
///
/// # Errors
/// When no region can be read.
pub async fn list_lineages(cluster: &Regions) -> Result<Vec<Lineage>, ReadError> {
    let lookups = cluster.iter().map(|region| async {
        let (folders, _) = region.list_folder("").await?;
        let mut lineages = Vec::new();
        // Lineages have folders named by numbers.
        for folder in folders.iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
            let bytes = match region.within(folder).get(LINEAGE_FILE).await {
                Ok(bytes) => bytes,
                Err(error) if error.kind == super::FailureKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let lineage: Lineage = parse(region, LINEAGE_FILE, &bytes)?;
            check_format(region, LINEAGE_FILE, lineage.format)?;
            if lineage.system_identifier != *folder {
                let message =
                    format!("it lies in {folder} and names {}", lineage.system_identifier);
                return Err(region.damaged(LINEAGE_FILE, message));
            }
            lineages.push(lineage);
        }
        Ok(lineages)
    });
    let mut found: Vec<Lineage> = Vec::new();
    let mut errors = Vec::new();
    for lookup in join_all(lookups).await {
        match lookup {
            Ok(lineages) => found.extend(lineages),
            Err(error) => errors.push(error),
        }
    }
    if errors.len() == cluster.len() {
        return Err(ReadError { errors });
    }
    found.sort_by_key(Lineage::system_id);
    found.dedup_by_key(|lineage| lineage.system_id());
    Ok(found)
}

fn parse<T: DeserializeOwned>(region: &Region, key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes)
        .map_err(|error| region.damaged(key, format!("it cannot be read: {error}")))
}

fn check_format(region: &Region, key: &str, format: u32) -> Result<(), StoreError> {
    if format <= FORMAT_VERSION {
        return Ok(());
    }
    let message = format!("it was written by a newer pgkeep (format {format}); use that version");
    Err(region.damaged(key, message))
}

impl Catalog {
    /// Reads the catalog of one lineage; `cluster` are the regions at the cluster's folder.
    ///
    /// # Errors
    /// When no region can be read.
    pub async fn read(cluster: &Regions, lineage: Lineage) -> Result<Catalog, ReadError> {
        let regions = cluster.within(&lineage.system_identifier);
        let key = ContentKey::for_system(lineage.system_id());
        let parts = join_all(regions.iter().map(|region| read_part(region, &key))).await;
        let mut catalog = Catalog {
            lineage,
            regions: regions.clone(),
            backups: BTreeMap::new(),
            histories: BTreeMap::new(),
            conflicts: BTreeSet::new(),
            timelines: Vec::new(),
            gaps: Vec::new(),
            alive: Vec::new(),
            failures: Vec::new(),
        };
        let mut unreadable = Vec::new();
        for (region, part) in regions.iter().zip(parts) {
            match part {
                Ok(part) => catalog.add(region.name(), part),
                Err(error) => unreadable.push(error),
            }
        }
        if unreadable.len() == regions.len() {
            return Err(ReadError { errors: unreadable });
        }
        catalog.failures.extend(unreadable);
        catalog.timelines.sort_unstable();
        catalog.timelines.dedup();
        catalog.gaps.sort_unstable();
        catalog.gaps.dedup();
        Ok(catalog)
    }

    fn add(&mut self, region: &str, part: Part) {
        for info in part.backups {
            let entry =
                self.backups.entry(info.label.clone()).or_insert_with(|| (info, Vec::new()));
            entry.1.push(region.to_owned());
        }
        for (history, bytes) in part.histories {
            let timeline = history.timeline;
            let known = self.histories.entry(timeline).or_insert((history, bytes.clone()));
            if known.1 != bytes {
                self.conflicts.insert(timeline);
            }
        }
        self.timelines.extend(part.timelines);
        self.gaps.extend(part.gaps);
        self.alive.extend(part.alive);
        self.failures.extend(part.failures);
    }

    /// The backups with their regions, oldest first. Labels of the same second do not tell.
    pub fn backups_by_time(&self) -> Vec<&(BackupInfo, Vec<String>)> {
        let mut backups: Vec<_> = self.backups.values().collect();
        backups.sort_by_key(|(info, _)| info.start_time);
        backups
    }

    /// The ancestry of a timeline; `None` when its history file is missing.
    pub fn history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        if timeline == TimelineId::FIRST {
            return Some(TimelineHistory::without_ancestors(timeline));
        }
        self.histories.get(&timeline).map(|(history, _)| history.clone())
    }

    /// The newest timeline that the archive knows of.
    pub fn newest_timeline(&self) -> TimelineId {
        let from_histories = self.histories.keys().next_back().copied();
        let from_wal = self.timelines.last().copied();
        from_histories.max(from_wal).unwrap_or(TimelineId::FIRST)
    }

    /// The pieces of a timeline in `[from, to)` that any readable region has.
    ///
    /// # Errors
    /// When no region can be read.
    pub async fn coverage(
        &self,
        timeline: TimelineId,
        from: Lsn,
        to: Option<Lsn>,
    ) -> Result<(Coverage, u64), ReadError> {
        let size: SegmentSize = self.lineage.wal_segment_size;
        let lists = self.regions.iter().map(|r| list_pieces(r, timeline, size, from, to));
        let mut pieces: Vec<PieceName> = Vec::new();
        let mut stored = 0;
        let mut errors = Vec::new();
        for list in join_all(lists).await {
            match list {
                Ok(found) => {
                    stored = stored.max(found.stored_size);
                    pieces.extend(found.coverage.pieces().copied());
                }
                Err(error) => {
                    tracing::warn!("this region is left out: {error}");
                    errors.push(error);
                }
            }
        }
        if errors.len() == self.regions.len() {
            return Err(ReadError { errors });
        }
        Ok((Coverage::new(pieces, size), stored))
    }
}

async fn read_part(region: &Region, key: &ContentKey) -> Result<Part, StoreError> {
    let mut part = Part { timelines: list_timelines(region).await?, ..Part::default() };
    let (labels, _) = region.list_folder(BACKUP_FOLDER).await?;
    let labels = labels.iter().filter_map(|label| label.parse::<BackupLabel>().ok());
    let reads = labels.map(|label| async move {
        let key = backup_json_key(&label);
        match region.get(&key).await {
            Ok(bytes) => {
                let info: BackupInfo = parse(region, &key, &bytes)?;
                check_format(region, &key, info.format)?;
                Ok(Some(info))
            }
            // Running, given up, or being removed.
            Err(error) if error.kind == super::FailureKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    });
    for read in join_all(reads).await {
        match read {
            Ok(info) => part.backups.extend(info),
            Err(error) => part.failures.push(error),
        }
    }
    match list_histories(region, key).await {
        Ok(histories) => part.histories = histories,
        Err(error) => part.failures.push(error),
    }
    part.gaps = list_gaps(region).await?;
    for object in region.list(ALIVE_FOLDER).await? {
        // Being overwritten, or of a newer version: it is only a hint.
        if let Ok(bytes) = region.get(&object.key).await
            && let Ok(alive) = serde_json::from_slice(&bytes)
        {
            part.alive.push(alive);
        }
    }
    Ok(part)
}
