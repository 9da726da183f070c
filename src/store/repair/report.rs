//! What a repair found and did.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::wal::{Lsn, TimelineId};

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectKind {
    /// `lineage.json`.
    Lineage,
    /// A timeline's history file.
    History,
    /// A recorded gap.
    Gap,
    /// A piece of WAL.
    Wal,
    /// The roll-up of a finished folder.
    RollUp,
    /// Data of a backup.
    Pack,
    /// `files.idx`, `backup_manifest` and `include.tar.zst`.
    BackupIndex,
    /// Another file in a backup's folder.
    BackupExtra,
    /// `backup.json`.
    Backup,
}

/// Objects and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// How many.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

/// How a region came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RegionState {
    /// It holds what any region holds.
    Whole,
    /// It still lacks something, or has something damaged.
    Lacking,
    /// It has nothing of this lineage, and was not named: it is not filled.
    NewOrLost,
    /// It could not be reached.
    Unreachable,
    /// It was read from; nothing was to be written into it.
    NotRepaired,
}

/// One region.
#[derive(Clone, Debug, Serialize)]
pub struct RegionReport {
    /// Its name.
    pub name: String,
    /// How it came out.
    pub state: RegionState,
    /// What was copied into it, or, in a dry run, would be.
    pub copied: BTreeMap<ObjectKind, Tally>,
    /// What was read and verified in it, beside the copies.
    pub verified: Tally,
    /// What it still lacks, and why.
    pub lacking: Vec<String>,
}

/// What became of a damaged object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DamageOutcome {
    /// Overwritten from a good copy.
    Replaced,
    /// A good copy exists: a dry run, or a region that is not repaired now.
    Remains,
    /// Other objects in the region hold the same, so nothing reads it.
    Covered,
    /// No region that was read has a good copy.
    Lost,
}

/// A damaged object.
#[derive(Clone, Debug, Serialize)]
pub struct DamagedObject {
    /// The region.
    pub region: String,
    /// The object, in the lineage's folder.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
    /// What became of it.
    pub outcome: DamageOutcome,
}

/// WAL between other WAL that no region has, and that no recorded gap explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct WalHole {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first byte that is missing.
    pub from: Lsn,
    /// Behind the last byte that is missing.
    pub to: Lsn,
}

/// One lineage.
#[derive(Clone, Debug, Serialize)]
pub struct RepairReport {
    /// Whose archive it is.
    pub system_identifier: String,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Region by region.
    pub regions: Vec<RegionReport>,
    /// Damaged objects.
    pub damaged: Vec<DamagedObject>,
    /// Histories that met; nothing of them was copied across.
    pub diverged: Vec<String>,
    /// WAL that no region has.
    pub wal_holes: Vec<WalHole>,
    /// Objects of backups that no region has whole.
    pub lost_objects: Vec<String>,
}

impl RepairReport {
    /// Whether something stored is damaged, or missing, in every region.
    pub fn has_lost(&self) -> bool {
        let lost = |object: &DamagedObject| object.outcome == DamageOutcome::Lost;
        !self.lost_objects.is_empty() || self.damaged.iter().any(lost)
    }

    /// Whether every region that was asked for holds all, and nothing is missing.
    pub fn is_whole(&self) -> bool {
        let fine = |region: &RegionReport| {
            matches!(region.state, RegionState::Whole | RegionState::NotRepaired)
        };
        let remains = |object: &DamagedObject| object.outcome == DamageOutcome::Remains;
        self.regions.iter().all(fine)
            && self.wal_holes.is_empty()
            && !self.damaged.iter().any(remains)
    }
}
