//! What the targets of a repair, which work at the same time, know together: objects found
//! damaged, regions that fell silent, histories that met, and what was done.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::report::{
    DamageOutcome, DamagedObject, ObjectKind, RegionReport, RegionState, RepairReport, Tally,
    WalHole,
};
use super::{Region, StoreError};
use crate::wal::{Lsn, TimelineId};

/// Lines about one region that are kept: the rest is counted.
const MAX_LACKING: usize = 100;

struct Damage {
    problem: String,
    outcome: DamageOutcome,
}

#[derive(Default)]
struct Account {
    copied: BTreeMap<ObjectKind, Tally>,
    verified: Tally,
    lacking: Vec<String>,
    unlisted: usize,
    /// WAL that could not be copied in this pass.
    wal_lacking: Vec<(TimelineId, Lsn, Lsn)>,
    /// Why its repair ended early.
    failed: Option<String>,
    /// Why it is not read from any more.
    down: Option<String>,
}

#[derive(Default)]
struct Inner {
    accounts: Vec<Account>,
    damage: BTreeMap<(usize, String), Damage>,
    verified: HashSet<(usize, String)>,
    diverged: BTreeSet<String>,
    diverged_from: BTreeMap<TimelineId, Lsn>,
    holes: BTreeSet<WalHole>,
    lost: BTreeSet<String>,
    unsettled: bool,
}

/// Regions are named by their place in the list.
pub(super) struct Ledger(Mutex<Inner>);

impl Ledger {
    pub(super) fn new(regions: usize) -> Ledger {
        let accounts = (0..regions).map(|_| Account::default()).collect();
        Ledger(Mutex::new(Inner { accounts, ..Inner::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass begins: what is still missing is found out anew.
    pub(super) fn begin_pass(&self) {
        let mut inner = self.lock();
        inner.unsettled = false;
        inner.holes.clear();
        inner.lost.clear();
        for account in &mut inner.accounts {
            account.lacking.clear();
            account.unlisted = 0;
            account.wal_lacking.clear();
        }
    }

    /// Whether another pass may find what this one did not.
    pub(super) fn is_unsettled(&self) -> bool {
        self.lock().unsettled
    }

    /// Something moved while this pass looked at it.
    pub(super) fn unsettle(&self) {
        self.lock().unsettled = true;
    }

    /// Notes a damaged object; it is no source from now on, until it was replaced.
    pub(super) fn damage(&self, region: usize, key: &str, problem: &str) {
        let mut inner = self.lock();
        let place = (region, key.to_owned());
        let known = inner.damage.get(&place);
        if known.is_some_and(|damage| damage.outcome != DamageOutcome::Replaced) {
            return;
        }
        tracing::error!(object = key, "damaged object: {problem}");
        let outcome = DamageOutcome::Remains;
        inner.damage.insert(place, Damage { problem: problem.to_owned(), outcome });
        inner.unsettled = true;
    }

    /// Whether the object is known to be damaged.
    pub(super) fn is_damaged(&self, region: usize, key: &str) -> bool {
        let inner = self.lock();
        let damage = inner.damage.get(&(region, key.to_owned()));
        damage.is_some_and(|damage| damage.outcome != DamageOutcome::Replaced)
    }

    /// What became of a damaged object.
    pub(super) fn outcome(&self, region: usize, key: &str, outcome: DamageOutcome) {
        if let Some(damage) = self.lock().damage.get_mut(&(region, key.to_owned())) {
            damage.outcome = outcome;
        }
    }

    /// Notes an object that was read and found whole.
    pub(super) fn verified(&self, region: usize, key: &str, bytes: u64) {
        let mut inner = self.lock();
        if inner.verified.insert((region, key.to_owned())) {
            let tally = &mut inner.accounts[region].verified;
            tally.objects += 1;
            tally.bytes += bytes;
        }
    }

    /// Whether the object was read and found whole before.
    pub(super) fn is_verified(&self, region: usize, key: &str) -> bool {
        self.lock().verified.contains(&(region, key.to_owned()))
    }

    pub(super) fn copied(&self, region: usize, kind: ObjectKind, bytes: u64) {
        let mut inner = self.lock();
        let tally = inner.accounts[region].copied.entry(kind).or_default();
        tally.objects += 1;
        tally.bytes += bytes;
    }

    /// Notes what a region still lacks.
    pub(super) fn lacking(&self, region: usize, what: String) {
        let account = &mut self.lock().accounts[region];
        if account.lacking.len() < MAX_LACKING {
            account.lacking.push(what);
        } else {
            account.unlisted += 1;
        }
    }

    /// Whether the region lacks something that a source may still give.
    pub(super) fn is_lacking(&self, region: usize) -> bool {
        !self.lock().accounts[region].lacking.is_empty()
    }

    pub(super) fn wal_lacking(&self, region: usize, timeline: TimelineId, from: Lsn, to: Lsn) {
        self.lock().accounts[region].wal_lacking.push((timeline, from, to));
    }

    /// Whether WAL of this range could not be copied.
    pub(super) fn lacks_wal(&self, region: usize, tli: TimelineId, from: Lsn, to: Lsn) -> bool {
        let inner = self.lock();
        let lacking = &inner.accounts[region].wal_lacking;
        lacking.iter().any(|(t, f, e)| *t == tli && *f < to && from < *e)
    }

    /// A region's repair ended early.
    pub(super) fn failed(&self, region: usize, error: &StoreError) {
        tracing::error!("{error}");
        self.lock().accounts[region].failed = Some(error.to_string());
    }

    pub(super) fn has_failed(&self, region: usize) -> bool {
        self.lock().accounts[region].failed.is_some()
    }

    /// A region does not answer: it is read no more.
    pub(super) fn down(&self, region: usize, error: &StoreError) {
        let account = &mut self.lock().accounts[region];
        if account.down.is_none() {
            tracing::warn!("this region is not read any more: {error}");
            account.down = Some(error.to_string());
        }
    }

    pub(super) fn is_down(&self, region: usize) -> bool {
        self.lock().accounts[region].down.is_some()
    }

    /// Two histories met on a timeline.
    pub(super) fn diverge(&self, timeline: TimelineId, from: Lsn, what: String) {
        let mut inner = self.lock();
        if inner.diverged.insert(what.clone()) {
            tracing::error!("two histories met: {what}");
        }
        let limit = inner.diverged_from.entry(timeline).or_insert(from);
        *limit = (*limit).min(from);
    }

    /// From where on a timeline's WAL is not one history.
    pub(super) fn diverged_from(&self, timeline: TimelineId) -> Option<Lsn> {
        self.lock().diverged_from.get(&timeline).copied()
    }

    pub(super) fn hole(&self, hole: WalHole) {
        self.lock().holes.insert(hole);
    }

    /// An object of a backup that no region has whole.
    pub(super) fn lost(&self, what: String) {
        self.lock().lost.insert(what);
    }

    pub(super) fn has_diverged(&self) -> bool {
        !self.lock().diverged.is_empty()
    }

    /// The report; `states` are those of regions that were no targets.
    pub(super) fn report(
        self,
        system_identifier: &str,
        dry_run: bool,
        regions: &[Region],
        states: &[Option<RegionState>],
    ) -> RepairReport {
        let inner = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let has_damage = |region: usize| {
            let here = inner.damage.iter().filter(|((index, _), _)| *index == region);
            let harmless = [DamageOutcome::Replaced, DamageOutcome::Covered];
            here.into_iter().any(|(_, damage)| !harmless.contains(&damage.outcome))
        };
        let named = regions.iter().zip(inner.accounts).zip(states).enumerate();
        let reports = named.map(|(index, ((region, account), state))| {
            let mut lacking = account.lacking;
            if account.unlisted > 0 {
                lacking.push(format!("{} objects more", account.unlisted));
            }
            let is_short = dry_run && !account.copied.is_empty() || has_damage(index);
            let state = match state {
                _ if account.down.is_some() => RegionState::Unreachable,
                Some(state) => *state,
                None if is_short || account.failed.is_some() || !lacking.is_empty() => {
                    RegionState::Lacking
                }
                None => RegionState::Whole,
            };
            lacking.extend(account.failed);
            lacking.extend(account.down);
            RegionReport {
                name: region.name().to_owned(),
                state,
                copied: account.copied,
                verified: account.verified,
                lacking,
            }
        });
        let reports: Vec<_> = reports.collect();
        let damaged = inner.damage.into_iter().map(|((region, key), damage)| DamagedObject {
            region: regions[region].name().to_owned(),
            key,
            problem: damage.problem,
            outcome: damage.outcome,
        });
        RepairReport {
            system_identifier: system_identifier.to_owned(),
            dry_run,
            regions: reports,
            damaged: damaged.collect(),
            diverged: inner.diverged.into_iter().collect(),
            wal_holes: inner.holes.into_iter().collect(),
            lost_objects: inner.lost.into_iter().collect(),
        }
    }
}
