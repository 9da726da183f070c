//! What must hold, worked out from what the stores really hold and the servers really were told.
//!
//! Nothing here asks the archiver: pieces are known by their names as they land and as they are
//! deleted, and at the end every one of them is opened and compared with the servers' WAL.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use pgkeep::config::Durability;
use pgkeep::repo::{
    Container, ContentKey, PieceMeta, PieceName, parse_gap_key, parse_history_name,
    parse_index_name, read_roll_up,
};
use pgkeep::wal::{Lsn, SegmentSize};

use crate::wal::{SEGMENT, SYSTEM_ID, Wal};
use crate::wire::Status;
use crate::world::{HostState, Sim, World};

/// The cluster's name in the regions.
pub const CLUSTER: &str = "orders";

/// What a region holds of WAL, by the names of its objects.
#[derive(Default)]
struct RegionLedger {
    /// For each timeline the ranges of its pieces, and how many objects each has.
    pieces: BTreeMap<u32, BTreeMap<(Lsn, Lsn), u32>>,
    histories: BTreeSet<u32>,
    /// Pieces that it claimed to have stored.
    lies: BTreeSet<String>,
}

/// What is known of the archive.
pub struct Ledger {
    pub violations: Vec<String>,
    pub policy: Durability,
    regions: Vec<RegionLedger>,
    pub gaps: BTreeSet<(u32, Lsn, Lsn)>,
    /// The lowest LSN that was ever archived.
    begin: Option<Lsn>,
    /// For each timeline the furthest LSN that a server was told to be flushed.
    pub acked: BTreeMap<u32, Lsn>,
    /// Objects that are the same WAL in other clothes.
    pub redressed: u64,
    pub deletes: u64,
}

fn size() -> SegmentSize {
    SegmentSize::new(SEGMENT).unwrap()
}

fn relative(key: &str) -> Option<&str> {
    key.strip_prefix(&format!("{CLUSTER}/{SYSTEM_ID}/"))
}

fn piece_of(key: &str) -> Option<(PieceName, Lsn, Lsn)> {
    let piece = PieceName::parse(relative(key)?.strip_prefix("wal/")?.rsplit('/').next()?)?;
    Some((piece, piece.start(size())?, piece.end(size())?))
}

impl Ledger {
    pub fn new(regions: usize) -> Ledger {
        Ledger {
            violations: Vec::new(),
            policy: Durability::Any,
            regions: (0..regions).map(|_| RegionLedger::default()).collect(),
            gaps: BTreeSet::new(),
            begin: None,
            acked: BTreeMap::new(),
            redressed: 0,
            deletes: 0,
        }
    }

    /// An archiver streams from here on: nothing before the first such place is asked for.
    pub fn begins(&mut self, at: Lsn) {
        self.begin.get_or_insert(at);
    }

    pub fn lied(&mut self, region: usize, key: &str) {
        self.regions[region].lies.insert(key.to_owned());
    }

    /// How far a region's WAL goes from the archive's begin without a hole, along a path.
    pub fn frontier(&self, region: usize, wal: &Wal, tli: u32) -> Lsn {
        let region = &self.regions[region];
        let Some(mut at) = self.begin else { return Lsn::INVALID };
        let path = wal.path(tli);
        for (index, (timeline, _, end)) in path.iter().enumerate() {
            if end.is_some_and(|end| end <= at) {
                continue;
            }
            loop {
                let before = at;
                // Up to the fork the next timeline's first segment holds the same.
                for tli in [Some(*timeline), path.get(index + 1).map(|next| next.0)] {
                    let pieces = tli.and_then(|tli| region.pieces.get(&tli));
                    for (from, to) in pieces.into_iter().flat_map(BTreeMap::keys) {
                        if *from > at {
                            break;
                        }
                        at = at.max(*to);
                    }
                }
                for (tli, from, to) in &self.gaps {
                    if tli == timeline && *from <= at {
                        at = at.max(*to);
                    }
                }
                if at == before {
                    break;
                }
            }
            // What lies behind the fork counts only on the next timeline.
            match end {
                Some(end) if at >= *end => at = *end,
                _ => return at,
            }
        }
        at
    }

    /// How many regions hold everything up to an LSN, and how many must.
    fn holders(&self, wal: &Wal, tli: u32, lsn: Lsn) -> (usize, usize) {
        let total = self.regions.len();
        let holders = (0..total).filter(|region| self.frontier(*region, wal, tli) >= lsn).count();
        let needed = match self.policy {
            Durability::Any => 1,
            Durability::Majority => total / 2 + 1,
            Durability::All => total,
        };
        (holders, needed)
    }
}

impl World {
    fn unsafe_ack(&self, tli: u32, lsn: Lsn) -> Option<String> {
        let begin = self.ledger.begin.unwrap_or(Lsn::INVALID);
        let (holders, needed) = self.ledger.holders(&self.wal, tli, lsn);
        let frontiers: Vec<_> = (0..self.ledger.regions.len())
            .map(|region| self.ledger.frontier(region, &self.wal, tli).to_string())
            .collect();
        (lsn > begin && holders < needed).then(|| {
            format!("{lsn} on timeline {tli} was called flushed; the regions hold {frontiers:?}")
        })
    }
}

impl Sim {
    /// A server was told how far its WAL is safe (I1).
    pub fn acknowledged(&self, clone: bool, tli: u32, sent: Lsn, status: Status) {
        let mut broken = Vec::new();
        {
            let mut world = self.world();
            if status.applied != Lsn::INVALID {
                broken.push(format!("apply was reported as {}", status.applied));
            }
            if status.flushed > sent || status.written > sent {
                broken.push(format!("{status:?} was reported, and only {sent} sent"));
            }
            if clone {
                if status.flushed > Lsn::INVALID {
                    broken
                        .push(format!("WAL of a clone was acknowledged up to {}", status.flushed));
                }
            } else if world.ledger.acked.get(&tli).is_none_or(|acked| *acked < status.flushed) {
                broken.extend(world.unsafe_ack(tli, status.flushed));
                world.ledger.acked.insert(tli, status.flushed);
            }
        }
        for what in broken {
            self.violated("I1", what);
        }
    }

    /// What was acknowledged is still there.
    pub fn check_acknowledged(&self, when: &str) {
        let lost: Vec<_> = {
            let world = self.world();
            let acked = &world.ledger.acked;
            acked.iter().filter_map(|(tli, lsn)| world.unsafe_ack(*tli, *lsn)).collect()
        };
        for what in lost {
            self.violated("I1", format!("{when}: {what}"));
        }
    }

    /// An object was stored, by an archiver that streams from a clone or by one that does not.
    pub fn stored(
        &self,
        (clone, region): (bool, usize),
        key: &str,
        before: Option<&Bytes>,
        content: &Bytes,
    ) {
        let mut broken = None;
        if clone && piece_of(key).is_some() {
            broken = Some(("I8", format!("WAL of a clone was stored: {key}")));
        } else {
            let mut world = self.world();
            let ledger = &mut world.ledger;
            if let Some((piece, from, to)) = piece_of(key) {
                let pieces = &mut ledger.regions[region].pieces;
                let count = pieces.entry(piece.segment.timeline.0).or_default();
                if before.is_none() {
                    *count.entry((from, to)).or_default() += 1;
                }
                ledger.begin = Some(ledger.begin.map_or(from, |begin| begin.min(from)));
            } else if let Some(key) = relative(key) {
                let history = key.strip_prefix("timeline/").and_then(parse_history_name);
                ledger.regions[region].histories.extend(history.map(|(tli, _)| tli.0));
                if let Some((tli, from, to)) = parse_gap_key(key) {
                    ledger.gaps.insert((tli.0, from, to));
                    broken = world.needless_gap(tli.0, from, to).map(|what| ("I7", what));
                }
            }
            if let Some(before) =
                before.filter(|before| *before != content && !key.contains("/alive/"))
            {
                match (raw(before), raw(content)) {
                    (Some(before), Some(now)) if before == now => world.ledger.redressed += 1,
                    _ => broken = Some(("I2", format!("{key} was overwritten with other content"))),
                }
            }
        }
        if let Some((invariant, what)) = broken {
            self.violated(invariant, what);
        }
    }

    /// An object was deleted.
    pub fn deleted(&self, region: usize, key: &str) {
        {
            let mut world = self.world();
            world.ledger.deletes += 1;
            if let Some((piece, from, to)) = piece_of(key) {
                let pieces = &mut world.ledger.regions[region].pieces;
                let of_timeline = pieces.entry(piece.segment.timeline.0).or_default();
                let count = of_timeline.entry((from, to)).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    of_timeline.remove(&(from, to));
                }
            }
        }
        match piece_of(key) {
            Some(_) => self.check_acknowledged(&format!("after {key} was deleted")),
            None => self.violated("I2", format!("the archiver deleted {key}")),
        }
    }
}

/// The WAL in a piece.
fn raw(object: &Bytes) -> Option<Vec<u8>> {
    Container::open(object.clone()).ok()?.raw().ok()
}

impl World {
    /// A gap was recorded: could nobody have given that WAL (I7)?
    fn needless_gap(&self, tli: u32, from: Lsn, to: Lsn) -> Option<String> {
        let has = |index: usize| {
            let host = &self.hosts[index];
            let path = self.wal.path(host.timeline);
            let on_path =
                path.iter().any(|step| step.0 == tli && step.2.unwrap_or(host.flushed) >= to);
            !host.is_clone
                && host.state == HostState::Up
                && on_path
                && host.oldest <= from.round_down(SEGMENT)
        };
        let host = (0..self.hosts.len()).find(|index| has(*index))?;
        let name = &self.hosts[host].name;
        Some(format!("{from} to {to} on timeline {tli} was called lost, and {name} has it"))
    }

    /// What the archive still lacks, given that nothing is wrong any more.
    pub fn lacking(&self) -> Vec<String> {
        let Some(primary) = self.primary() else { return vec!["there is no primary".into()] };
        let host = &self.hosts[primary];
        let mut lacking = Vec::new();
        for (index, region) in self.ledger.regions.iter().enumerate() {
            let frontier = self.ledger.frontier(index, &self.wal, host.timeline);
            if frontier < host.flushed {
                let what = format!("r{index} reaches {frontier}, the primary {}", host.flushed);
                lacking.push(format!("{what} on timeline {}", host.timeline));
            }
            for (tli, timeline) in self.wal.timelines() {
                if timeline.parent.is_some() && !region.histories.contains(&tli) {
                    lacking.push(format!("r{index} has no history of timeline {tli}"));
                }
            }
        }
        lacking
    }
}

impl Sim {
    /// Every object of every region against what the servers wrote.
    pub fn check_everything(&self) {
        self.check_acknowledged("at the end");
        let key = ContentKey::for_system(SYSTEM_ID);
        let mut contents: BTreeMap<String, Bytes> = BTreeMap::new();
        for region in &self.regions {
            let objects = region.state().objects.clone();
            for (name, content) in &objects {
                if let Err(what) = self.check_object(&key, name, content) {
                    self.violated("I8", format!("{} in {}: {what}", name, region.name));
                }
                match contents.get(name) {
                    Some(other) if other != content && !name.contains("/alive/") => {
                        match (raw(other), raw(content)) {
                            (Some(a), Some(b)) if a == b => self.world().ledger.redressed += 1,
                            _ => self.violated("I2", format!("{name} differs between regions")),
                        }
                    }
                    Some(_) => {}
                    None => drop(contents.insert(name.clone(), content.clone())),
                }
            }
            self.check_small_pieces(&region.name, &objects);
        }
    }

    fn check_object(&self, key: &ContentKey, name: &str, content: &Bytes) -> Result<(), String> {
        let relative = relative(name).ok_or("it lies outside of the lineage")?;
        let world = self.world();
        if let Some((piece, from, to)) = piece_of(name) {
            let tli = piece.segment.timeline.0;
            let container = Container::open(content.clone()).map_err(|e| e.to_string())?;
            let raw = container.raw().map_err(|e| e.to_string())?;
            let metadata: PieceMeta =
                serde_json::from_slice(&container.trailer().metadata).map_err(|e| e.to_string())?;
            if (metadata.start, metadata.end, metadata.timeline.0) != (from, to, tli) {
                return Err("its metadata names another place".into());
            }
            if key.hash(&raw).short() != piece.hash || metadata.hash.short() != piece.hash {
                return Err("its hash is wrong".into());
            }
            if !metadata.wal.damage.is_empty() {
                return Err(format!(
                    "its metadata calls good WAL damaged: {:?}",
                    metadata.wal.damage
                ));
            }
            return match world.wal.read(tli, from, to) {
                Some(wal) if wal == raw => Ok(()),
                Some(_) => Err("its WAL is not the server's".into()),
                None => Err("the server has no such WAL".into()),
            };
        }
        if let Some(history) = relative.strip_prefix("timeline/").and_then(parse_history_name) {
            let expected = world.wal.history(history.0.0).ok_or("no server has that timeline")?;
            let same = expected == *content && key.hash(content).short() == history.1;
            return if same { Ok(()) } else { Err("it is not the server's".into()) };
        }
        let name = relative.rsplit('/').next().unwrap_or_default();
        if relative.starts_with("wal/") && parse_index_name(name).is_some() {
            let read = read_roll_up(content.clone(), relative, key);
            return read.map(drop).map_err(|error| error.to_string());
        }
        let known = relative == "lineage.json"
            || relative.starts_with("alive/")
            || relative.rsplit('/').next().is_some_and(|name| name.starts_with("index-"))
            || parse_gap_key(relative).is_some();
        if known { Ok(()) } else { Err("the archiver made up a name".into()) }
    }

    /// The small pieces that a larger one covers do not pile up.
    fn check_small_pieces(&self, region: &str, objects: &BTreeMap<String, Bytes>) {
        const MOST_SMALL_PIECES: usize = 40;
        let mut small: BTreeMap<String, usize> = BTreeMap::new();
        let pieces: Vec<_> = objects.keys().filter_map(|name| Some(piece_of(name)?.0)).collect();
        for piece in &pieces {
            // What an archiver that died had not removed yet may stay.
            if piece.len() < SEGMENT && !pieces.iter().any(|other| other.covers(piece)) {
                *small.entry(piece.segment.to_string()).or_default() += 1;
            }
        }
        for (segment, count) in small {
            if count > MOST_SMALL_PIECES {
                self.violated("I9", format!("{region} has {count} small pieces of {segment}"));
            }
        }
    }

    /// Small pieces that a larger one in the same region covers, over all regions.
    pub fn covered_pieces(&self) -> usize {
        let mut covered = 0;
        for region in &self.regions {
            let objects = region.state().objects.clone();
            let pieces: Vec<_> = objects.keys().filter_map(|name| piece_of(name)).collect();
            let is_covered = |one: &PieceName| pieces.iter().any(|other| other.0.covers(one));
            covered += pieces.iter().filter(|piece| is_covered(&piece.0)).count();
        }
        covered
    }
}
