//! Repair by hand: every region is made to hold what any region holds, byte for byte, without the
//! server.
//!
//! Each region that is to be repaired (a target) lists what it and the others (the sources) have,
//! and copies what it lacks. Nothing is written that was not verified: pieces, history files and
//! roll-ups by the hash in their name, objects of backups by the size and hash that `backup.json`
//! and `files.idx` give. A damaged copy is told and the next source is asked; a damaged object in
//! the target is overwritten from a good one. Two different contents for one name or one range of
//! WAL mean that two histories met: told, and nothing from there on is copied across.
//!
//! Targets work at the same time, each in an order in which a crash leaves nothing wrong: history
//! files and gaps, WAL in its own order, then backup by backup the packs, the indexes and last
//! `backup.json` (invariant I3); a region that was empty gets its `lineage.json` when all else is
//! there, and counts from then on. What is there already is not copied again, so a repair that was
//! interrupted goes on where it was.
//!
//! The sidecar may run meanwhile: it replaces small pieces by larger ones. What is gone when it is
//! read is looked for again in another pass.

mod backup;
mod ledger;
mod lineage;
mod object;
mod plan;
mod report;
mod wal;

use futures_util::future::join_all;

use super::{FailureKind, Region, Regions, StoreError};
use crate::progress::Progress;
use crate::repo::{ContentKey, LINEAGE_FILE, Lineage};
use ledger::Ledger;
use lineage::{Found, Holding, find_lineages};

pub use lineage::RepairError;
pub use report::{
    DamageOutcome, DamagedObject, ObjectKind, RegionReport, RegionState, RepairReport, Tally,
    WalHole,
};

/// How often all is looked at again while something has moved or was found damaged.
const PASSES: usize = 3;
/// Objects of one target on their way at once. One is at most 16 MiB of WAL or a part of a pack.
const COPIES_AT_ONCE: usize = 2;
/// Objects of one target that are verified at once.
const CHECKS_AT_ONCE: usize = 3;

/// What is to be repaired, and how.
#[derive(Clone, Debug, Default)]
pub struct RepairOptions {
    /// Only this lineage.
    pub lineage: Option<u64>,
    /// Only these regions are written to; empty: all that hold the lineage.
    pub targets: Vec<String>,
    /// Regions that are filled although they hold nothing of the lineage; so are those in `targets`.
    pub new_regions: Vec<String>,
    /// Only these regions are read from; empty: all.
    pub sources: Vec<String>,
    /// Read and verify what is there too.
    pub deep: bool,
    /// Write nothing.
    pub dry_run: bool,
}

/// A repair of one lineage.
struct Work<'a> {
    lineage: Lineage,
    lineage_bytes: bytes::Bytes,
    key: ContentKey,
    /// All regions, at the lineage's folder.
    regions: Vec<Region>,
    options: &'a RepairOptions,
    progress: &'a Progress,
    ledger: Ledger,
}

/// Repairs all lineages of a cluster; `cluster` are the regions at the cluster's folder.
///
/// # Errors
/// When no region can be read, or none holds the lineage that is asked for.
pub async fn repair(
    cluster: &Regions,
    options: &RepairOptions,
    progress: &Progress,
) -> Result<Vec<RepairReport>, RepairError> {
    let regions: Vec<Region> = cluster.iter().cloned().collect();
    let mut reports = Vec::new();
    for found in find_lineages(&regions, options.lineage).await? {
        reports.push(repair_lineage(&regions, found, options, progress).await);
    }
    Ok(reports)
}

async fn repair_lineage(
    cluster: &[Region],
    found: Found,
    options: &RepairOptions,
    progress: &Progress,
) -> RepairReport {
    let id = found.lineage.system_identifier.clone();
    let regions: Vec<Region> = cluster.iter().map(|region| region.within(&id)).collect();
    let ledger = Ledger::new(regions.len());
    let mut states = Vec::new();
    for (index, (region, holding)) in regions.iter().zip(&found.holdings).enumerate() {
        let named = |names: &[String]| names.iter().any(|name| name == region.name());
        let wanted = options.targets.is_empty() || named(&options.targets);
        let accepted = named(&options.targets) || named(&options.new_regions);
        states.push(match holding {
            Holding::Silent(error) => {
                ledger.down(index, error);
                Some(RegionState::Unreachable)
            }
            _ if !wanted && !named(&options.new_regions) => Some(RegionState::NotRepaired),
            Holding::Nothing if !accepted => Some(RegionState::NewOrLost),
            _ => None,
        });
        if let Holding::Damaged(problem) = holding {
            ledger.damage(index, LINEAGE_FILE, problem);
        }
    }
    let work = Work {
        key: ContentKey::for_system(found.lineage.system_id()),
        lineage: found.lineage,
        lineage_bytes: found.bytes,
        regions,
        options,
        progress,
        ledger,
    };
    let targets: Vec<usize> = (0..states.len()).filter(|index| states[*index].is_none()).collect();
    for pass in 0..PASSES {
        work.ledger.begin_pass();
        let going = targets.iter().filter(|target| !work.ledger.has_failed(**target));
        join_all(going.map(|target| work.repair_target(*target, pass == 0))).await;
        if options.dry_run || !work.ledger.is_unsettled() {
            break;
        }
    }
    let Work { ledger, regions, .. } = work;
    ledger.report(&id, options.dry_run, &regions, &states)
}

impl Work<'_> {
    /// A failure of the target ends its repair, and no other's.
    async fn repair_target(&self, target: usize, first_pass: bool) {
        let deep = self.options.deep && first_pass;
        if let Err(error) = self.repair_all(target, deep).await {
            self.ledger.failed(target, &error);
        }
    }

    async fn repair_all(&self, target: usize, deep: bool) -> Result<(), StoreError> {
        let listed = self.ask(target, |region| async move { region.size(LINEAGE_FILE).await });
        let holds_lineage = listed.await?[target].flatten().is_some();
        self.repair_histories(target).await?;
        self.repair_gaps(target).await?;
        self.repair_wal(target, deep).await?;
        self.repair_backups(target, deep).await?;
        let complete = !self.ledger.is_lacking(target) && !self.ledger.has_diverged();
        if holds_lineage && !self.ledger.is_damaged(target, LINEAGE_FILE) {
            return Ok(());
        }
        if !holds_lineage && !complete {
            let what = "lineage.json is written once all else is there: repair it again";
            self.ledger.lacking(target, what.to_owned());
            return Ok(());
        }
        let bytes = self.lineage_bytes.clone();
        self.write(target, ObjectKind::Lineage, LINEAGE_FILE, bytes).await
    }

    fn is_source(&self, index: usize, target: usize) -> bool {
        let names = &self.options.sources;
        let name = self.regions[index].name();
        index != target
            && !self.ledger.is_down(index)
            && (names.is_empty() || names.iter().any(|source| source == name))
    }

    /// The regions from which the target may be filled.
    fn sources(&self, target: usize) -> impl Iterator<Item = usize> {
        (0..self.regions.len()).filter(move |index| self.is_source(*index, target))
    }

    /// Asks the target and its sources the same; the answers are in the order of the regions. A
    /// source that fails is asked no more.
    async fn ask<T, F>(
        &self,
        target: usize,
        ask: impl Fn(Region) -> F,
    ) -> Result<Vec<Option<T>>, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let asked = self.regions.iter().enumerate().map(|(index, region)| {
            let answer =
                (index == target || self.is_source(index, target)).then(|| ask(region.clone()));
            async move {
                match answer {
                    Some(answer) => answer.await.map(Some),
                    None => Ok(None),
                }
            }
        });
        let mut answers = Vec::new();
        for (index, answer) in join_all(asked).await.into_iter().enumerate() {
            match answer {
                Ok(answer) => answers.push(answer),
                Err(error) if index == target => return Err(error),
                Err(error) => {
                    self.ledger.down(index, &error);
                    answers.push(None);
                }
            }
        }
        Ok(answers)
    }

    /// Sorts the failure of a read in any region but the target: the next source is asked.
    fn source_failed(&self, source: usize, key: &str, error: &StoreError) {
        match error.kind {
            FailureKind::Damaged => self.ledger.damage(source, key, &error.message),
            FailureKind::NotFound => self.ledger.unsettle(),
            _ => self.ledger.down(source, error),
        }
    }
}
