//! What really lies in a region: read from the store itself, not from what pgkeep says of it.

use std::collections::BTreeMap;

use pgkeep::config::Config;
use pgkeep::repo::{ContentKey, Coverage, parse_history_name};
use pgkeep::store::{Region, RegionSpec, list_histories, list_pieces, open_region, read_piece};
use pgkeep::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};
use tokio::runtime::Runtime;

use super::{Keeper, Server, wait_until};

/// One lineage in one region.
pub struct Content {
    region: Region,
    key: ContentKey,
    runtime: Runtime,
}

impl Content {
    /// The archive of a server's lineage in a region, by its name in the configuration.
    pub fn of(keeper: &Keeper, region: &str, system_id: u64) -> Content {
        let config = Config::load(&keeper.config).unwrap();
        let found = config.regions.iter().find(|entry| entry.name == region).unwrap();
        let spec = RegionSpec {
            name: found.name.clone(),
            url: found.url.clone(),
            options: found.option_texts(),
        };
        Content::at(&spec, system_id)
    }

    /// The archive of a lineage in a region that the caller describes.
    pub fn at(spec: &RegionSpec, system_id: u64) -> Content {
        let region = open_region(spec).unwrap().within("orders").within(&system_id.to_string());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Content { region, key: ContentKey::for_system(system_id), runtime }
    }

    fn coverage(&self, timeline: TimelineId) -> Option<Coverage> {
        let size = SegmentSize::DEFAULT;
        let listing = list_pieces(&self.region, timeline, size, Lsn(0), None);
        let found = self.runtime.block_on(listing).ok()?;
        Some(found.coverage)
    }

    /// Where the first stretch of WAL without a hole that reaches beyond `from` ends.
    pub fn end_after(&self, timeline: TimelineId, from: Lsn) -> Lsn {
        let Some(coverage) = self.coverage(timeline) else { return Lsn(0) };
        let start = coverage.start().unwrap_or(Lsn(0)).max(from);
        coverage.contiguous_end(start)
    }

    /// Where the WAL of a timeline ends, without a hole from its first byte on.
    pub fn end(&self, timeline: TimelineId) -> Lsn {
        self.end_after(timeline, Lsn(0))
    }

    /// All WAL of a timeline without a hole from its first byte on, and where it begins. Every piece
    /// is checked against its name.
    pub fn wal(&self, timeline: TimelineId) -> (Lsn, Vec<u8>) {
        let coverage = self.coverage(timeline).expect("the region can be read");
        let start = coverage.start().unwrap_or(Lsn(0));
        let mut wal = Vec::new();
        for part in coverage.cover(start, coverage.contiguous_end(start)) {
            let raw = self.runtime.block_on(read_piece(&self.region, &part.piece, &self.key));
            let begin = part.piece.start(SegmentSize::DEFAULT).unwrap();
            let skip = part.from.bytes_since(begin) as usize;
            let length = part.to.bytes_since(part.from) as usize;
            wal.extend_from_slice(&raw.unwrap()[skip..skip + length]);
        }
        (start, wal)
    }

    /// Keys and sizes of all objects but the archivers' last words.
    pub fn objects(&self) -> BTreeMap<String, u64> {
        let listed = self.runtime.block_on(self.region.list("")).unwrap();
        let kept = listed.into_iter().filter(|object| !object.key.starts_with("alive/"));
        kept.map(|object| (object.key, object.size)).collect()
    }

    /// A timeline's history file.
    pub fn history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        let stored = self.runtime.block_on(list_histories(&self.region, &self.key)).unwrap();
        stored.into_iter().map(|(history, _)| history).find(|found| found.timeline == timeline)
    }

    /// The timelines whose history files are stored.
    pub fn histories(&self) -> Vec<u32> {
        let listed = self.runtime.block_on(self.region.list("timeline")).unwrap();
        let names = listed.iter().filter_map(|object| parse_history_name(object.file_name()));
        let mut timelines: Vec<u32> = names.map(|(timeline, _)| timeline.0).collect();
        timelines.sort_unstable();
        timelines
    }
}

impl Keeper {
    /// Waits until regions hold the WAL of a timeline up to an LSN, without a hole. Unlike
    /// [`Keeper::wait_archived`] it asks neither pgkeep nor the other regions.
    pub fn wait_stored(&mut self, server: &Server, regions: &[&str]) -> Lsn {
        let (timeline, lsn, id) = (server.timeline(), server.flushed(), server.system_id());
        self.wait_stored_up_to(id, timeline, lsn, regions);
        lsn
    }

    pub fn wait_stored_up_to(
        &mut self,
        system_id: u64,
        timeline: TimelineId,
        lsn: Lsn,
        regions: &[&str],
    ) {
        for region in regions {
            let content = Content::of(self, region, system_id);
            wait_until(&format!("WAL of timeline {timeline} up to {lsn} in {region}"), || {
                self.assert_runs();
                content.end(timeline) >= lsn
            });
        }
    }

    /// Compares the WAL of regions, byte for byte.
    pub fn assert_same_wal(&self, system_id: u64, timeline: TimelineId, regions: &[&str]) {
        let (first, others) = regions.split_first().unwrap();
        let (start, wal) = Content::of(self, first, system_id).wal(timeline);
        assert!(!wal.is_empty(), "{first} holds no WAL of timeline {timeline}");
        for other in others {
            let (other_start, other_wal) = Content::of(self, other, system_id).wal(timeline);
            assert_eq!(other_start, start, "{other} begins elsewhere than {first}");
            assert_eq!(other_wal.len(), wal.len(), "{other} ends elsewhere than {first}");
            let same = wal.iter().zip(&other_wal).take_while(|(a, b)| a == b).count();
            assert_eq!(
                same,
                wal.len(),
                "{other} differs from {first} at {}",
                start.advance(same as u64)
            );
        }
    }
}
