//! Promotions, switchovers and what they leave behind: the archive stays whole along every path,
//! and every moment of every timeline comes back from every region.

use pgkeep::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};

use crate::support::{
    Content, Folder, Keeper, Server, ServerOptions, conninfo_of, rounds, wait_until,
};

const REGIONS: [&str; 2] = ["eu", "us"];

/// A server that lets standbys catch up from its own files.
pub fn primary(folder: &Folder, major: u32) -> Server {
    let settings = "wal_keep_size = 512MB\nmax_wal_size = 1GB".to_owned();
    let server = Server::new(
        folder,
        major,
        &ServerOptions { settings, no_fsync: true, ..ServerOptions::default() },
    );
    server.sql("CREATE TABLE story (row int PRIMARY KEY)");
    server
}

/// An archiver that knows all of these servers and looks for the primary.
pub fn keeper_of(folder: &Folder, servers: &[&Server]) -> Keeper {
    let keeper = Keeper::new(folder, servers[0], &REGIONS);
    keeper.edit_config(&servers[0].conninfo(), &conninfo_of(servers));
    keeper
}

/// What happened: rows along one path, and a restore point after each.
#[derive(Clone, Debug, Default)]
pub struct Story {
    rows: Vec<i32>,
    /// What to ask for, and how many of the rows must then be there.
    moments: Vec<(String, usize)>,
}

impl Story {
    pub fn write(&mut self, server: &Server, row: i32) -> Lsn {
        server.sql(&format!("INSERT INTO story VALUES ({row})"));
        let name = format!("after row {row}");
        server.sql(&format!("SELECT pg_create_restore_point('{name}')"));
        // A restore point is not flushed by itself.
        server.sql("SELECT pg_logical_emit_message(true, '', '')");
        self.rows.push(row);
        self.moments.push((name, self.rows.len()));
        server.flushed()
    }

    /// Restores the end from every region, and the moments from the last on from one region after
    /// the other (from each of them with `PGKEEP_TIMELINE_ROUNDS` above 1).
    pub fn verify(&self, folder: &Folder, keeper: &Keeper, major: u32, timeline: &str) {
        for region in REGIONS {
            self.restore(
                folder,
                keeper,
                major,
                &["--target-timeline", timeline],
                region,
                &self.rows,
            );
        }
        let thorough = rounds("PGKEEP_TIMELINE_ROUNDS", 1) > 1;
        for (index, (name, count)) in self.moments.iter().enumerate() {
            for (place, region) in REGIONS.iter().enumerate() {
                if thorough || index % REGIONS.len() == place {
                    let target = ["--target-timeline", timeline, "--target-name", name];
                    self.restore(folder, keeper, major, &target, region, &self.rows[..*count]);
                }
            }
        }
    }

    fn restore(
        &self,
        folder: &Folder,
        keeper: &Keeper,
        major: u32,
        target: &[&str],
        region: &str,
        expected: &[i32],
    ) {
        let arguments = [target, &["--region", region]].concat();
        let mut copy = keeper.restore_and_start(folder, major, "copy", &arguments);
        copy.wait_until_writable();
        let found = copy.sql("SELECT row FROM story ORDER BY row");
        let found: Vec<i32> = found.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(found, expected, "{arguments:?}\n{}", copy.log());
        copy.kill9_all();
        std::fs::remove_dir_all(&copy.data).unwrap();
    }
}

fn history(keeper: &Keeper, server: &Server, timeline: TimelineId) -> TimelineHistory {
    let mut found = None;
    for region in REGIONS {
        let content = Content::of(keeper, region, server.system_id());
        found = content.history(timeline);
        assert!(found.is_some(), "{region} has no history of timeline {timeline}");
    }
    found.unwrap()
}

/// A standby is promoted while pgkeep streams, or at a moment when it does not.
fn promotion(major: u32) {
    let folder = Folder::new();
    let mut a = primary(&folder, major);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut keeper = keeper_of(&folder, &[&a, &b]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    let lsn = story.write(&a, 1);
    b.wait_replayed(lsn);
    a.kill9_all();
    b.promote();
    story.write(&b, 2);
    keeper.wait_stored(&b, &REGIONS);
    keeper.stop();
    let fork = history(&keeper, &b, TimelineId(2)).ancestors[0].end;
    assert!(SegmentSize::DEFAULT.offset(fork) > 0, "the fork {fork} lies on a boundary");
    for timeline in [TimelineId(1), TimelineId(2)] {
        keeper.assert_same_wal(b.system_id(), timeline, &REGIONS);
    }
    story.verify(&folder, &keeper, major, "latest");
}

// CASES 9 to 12, 18: the host list leads to the new primary.
#[test]
fn a_promotion_is_followed_on_13() {
    promotion(13);
}

#[test]
fn a_promotion_is_followed_on_15() {
    promotion(15);
}

#[test]
fn a_promotion_is_followed_on_17() {
    promotion(17);
}

#[test]
fn a_promotion_is_followed_on_18() {
    promotion(18);
}

// CASES 9 and 10: the old primary shuts down although pgkeep hangs on it, comes back as a standby,
// and becomes the primary again.
#[test]
fn planned_switchovers_there_and_back_do_not_hang() {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut keeper = keeper_of(&folder, &[&a, &b]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    story.write(&a, 1);
    keeper.wait_stored(&a, &REGIONS);
    // A fast shutdown: it waits until both the standby and pgkeep have its last record.
    a.stop();
    b.promote();
    story.write(&b, 2);
    keeper.wait_stored(&b, &REGIONS);
    a.follow(&b, None);
    a.start();
    let lsn = story.write(&b, 3);
    a.wait_replayed(lsn);
    keeper.wait_stored(&b, &REGIONS);
    b.stop();
    a.promote();
    assert_eq!(a.timeline(), TimelineId(3));
    story.write(&a, 4);
    keeper.wait_stored(&a, &REGIONS);
    keeper.stop();
    let path = history(&keeper, &a, TimelineId(3)).path();
    assert_eq!(path.len(), 3, "{path:?}");
    // The shutdown checkpoint of each old primary is part of the archive.
    for (timeline, _, end) in path {
        let Some(end) = end else { continue };
        let reached = Content::of(&keeper, "eu", a.system_id()).end(timeline);
        assert!(reached >= end, "timeline {timeline} reaches {reached}, the fork is at {end}");
    }
    story.verify(&folder, &keeper, 17, "latest");
}

// CASES 3 and 11: WAL that the dead primaries never shipped is fetched from the living one, on the
// old timelines, and every history file is stored.
#[test]
fn two_promotions_while_pgkeep_was_away_leave_no_hole() {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut c = Server::standby_of(&folder, &mut b, "c");
    let mut keeper = keeper_of(&folder, &[&a, &b, &c]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    story.write(&a, 1);
    keeper.wait_stored(&a, &REGIONS);
    keeper.kill9();
    a.write_bulk(20);
    let lsn = story.write(&a, 2);
    c.wait_replayed(lsn);
    a.kill9_all();
    b.promote();
    b.write_bulk(20);
    let lsn = story.write(&b, 3);
    c.wait_replayed(lsn);
    b.kill9_all();
    c.promote();
    assert_eq!(c.timeline(), TimelineId(3));
    story.write(&c, 4);
    keeper.start();
    keeper.wait_stored(&c, &REGIONS);
    keeper.stop();
    for region in REGIONS {
        assert_eq!(Content::of(&keeper, region, c.system_id()).histories(), [2, 3]);
    }
    let listed = keeper.run(&["list", "--json"]).expect(0).json();
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "{listed}");
    story.verify(&folder, &keeper, 17, "latest");
}

/// Timelines 1 → 2 → 4: timeline 3 was begun by `d`, directly from 1, and thrown away. Where
/// `c_knows` is set, the server that goes on has a copy of its history file, else only `d` has it.
fn one_two_four(c_knows: bool) {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut c = Server::standby_of(&folder, &mut b, "c");
    let mut d = Server::standby_of(&folder, &mut a, "d");
    d.sql("ALTER SYSTEM SET recovery_target_timeline = 'current'");
    d.stop();
    d.start();
    let mut keeper = keeper_of(&folder, &[&a, &b, &c, &d]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    let lsn = story.write(&a, 1);
    for standby in [&b, &c, &d] {
        standby.wait_replayed(lsn);
    }
    a.kill9_all();
    b.promote();
    let lsn = story.write(&b, 2);
    keeper.wait_stored(&b, &REGIONS);
    c.wait_replayed(lsn);
    // `d` knows of timeline 2, and so begins timeline 3.
    copy_history(&b, 2, &d.data.join("pg_wal"));
    d.promote();
    assert_eq!(d.timeline(), TimelineId(3));
    d.sql("INSERT INTO story VALUES (-1)");
    d.stop();
    d.follow(&c, None);
    d.configure("recovery_target_timeline = 'current'");
    // Likewise `c` learns of 3 when it looks for a number, and begins 4.
    copy_history(&d, 3, &c.data.join("pg_wal"));
    d.start();
    b.kill9_all();
    c.promote();
    assert_eq!(c.timeline(), TimelineId(4));
    if !c_knows {
        std::fs::remove_file(c.data.join("pg_wal/00000003.history")).unwrap();
    }
    story.write(&c, 3);
    keeper.wait_stored(&c, &REGIONS);
    keeper.stop();
    for region in REGIONS {
        assert_eq!(Content::of(&keeper, region, c.system_id()).histories(), [2, 3, 4], "{region}");
    }
    story.verify(&folder, &keeper, 17, "latest");
}

/// What an `archive_command` or an operator would have done.
fn copy_history(from: &Server, timeline: u32, to: &std::path::Path) {
    let name = format!("{timeline:08X}.history");
    let mut copy = crate::support::user_command("cp");
    copy.arg(from.data.join("pg_wal").join(&name)).arg(to);
    assert!(copy.status().unwrap().success());
}

// CASES 3 and 18.
#[test]
fn every_history_file_of_timelines_1_2_4_is_stored() {
    one_two_four(true);
}

#[test]
fn a_history_file_that_only_another_host_knows_is_stored() {
    one_two_four(false);
}

// CASES 14: both standbys call their timeline 2. The second one is refused, nothing is overwritten.
#[test]
fn two_standbys_promoted_to_one_timeline_number_are_a_divergence() {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut c = Server::standby_of(&folder, &mut a, "c");
    let mut keeper = keeper_of(&folder, &[&a, &b, &c]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    let lsn = story.write(&a, 1);
    b.wait_replayed(lsn);
    c.wait_replayed(lsn);
    a.kill9_all();
    b.promote();
    story.write(&b, 2);
    keeper.wait_stored(&b, &REGIONS);
    keeper.stop();
    let id = b.system_id();
    b.stop();
    c.promote();
    assert_eq!(c.timeline(), TimelineId(2));
    // More than the other one wrote: it is not merely behind.
    for row in 100..120 {
        c.sql(&format!("INSERT INTO story VALUES ({row})"));
    }
    let before = REGIONS.map(|region| Content::of(&keeper, region, id).objects());
    let output = keeper.run(&["run"]).expect(6);
    assert!(output.stderr.contains("timeline 2"), "{}", output.stderr);
    for (region, before) in REGIONS.iter().zip(&before) {
        let after = Content::of(&keeper, region, id).objects();
        assert_eq!(&after, before, "{region} was changed");
    }
    story.verify(&folder, &keeper, 17, "latest");
}

// CASES 18: the fork lies exactly on a boundary of segments.
#[test]
fn a_fork_on_a_segment_boundary_leaves_no_hole() {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut keeper = keeper_of(&folder, &[&a, &b]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    story.write(&a, 1);
    let switched: Lsn = a.sql("SELECT pg_switch_wal()").parse().unwrap();
    b.wait_replayed(switched);
    a.kill9_all();
    b.promote();
    story.write(&b, 2);
    keeper.wait_stored(&b, &REGIONS);
    keeper.stop();
    let fork = history(&keeper, &b, TimelineId(2)).ancestors[0].end;
    assert_eq!(SegmentSize::DEFAULT.offset(fork), 0, "the fork is at {fork}");
    story.verify(&folder, &keeper, 17, "latest");
}

// CASES 15: a primary that comes back from the dead on timeline 1 while the archive is on 2.
#[test]
fn an_old_primary_that_comes_back_is_not_archived_in_silence() {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut keeper = keeper_of(&folder, &[&a, &b]);
    let mut story = Story::default();
    keeper.start();
    keeper.backup();
    let lsn = story.write(&a, 1);
    b.wait_replayed(lsn);
    a.kill9_all();
    b.promote();
    story.write(&b, 2);
    keeper.wait_stored(&b, &REGIONS);
    let id = b.system_id();
    let old_end = Content::of(&keeper, "eu", id).end(TimelineId(1));
    b.stop();
    a.start();
    // It has more on timeline 1 than the archive.
    a.write_bulk(2);
    wait_until("an alarm about the old primary", || {
        let ended = keeper.sidecar().exited();
        if let Some(status) = ended {
            assert_eq!(status.code(), Some(6), "{}", keeper.log());
            return true;
        }
        let status = keeper.ask_sidecar(std::time::Duration::from_secs(5)).unwrap_or_default();
        status["trouble"].as_str().is_some_and(|trouble| trouble.contains("timeline"))
    });
    // What it wrote since is no part of any path; the archive of timeline 2 is untouched.
    assert_eq!(Content::of(&keeper, "eu", id).end(TimelineId(1)), old_end);
    keeper.kill9();
    story.verify(&folder, &keeper, 17, "latest");
}

// CASES 7: the old timeline stays reachable by its number, up to what was archived of it.
#[test]
fn the_old_timeline_is_restored_by_its_number() {
    let folder = Folder::new();
    let mut a = primary(&folder, 17);
    let mut b = Server::standby_of(&folder, &mut a, "b");
    let mut keeper = keeper_of(&folder, &[&a, &b]);
    let (mut old, mut new) = (Story::default(), Story::default());
    keeper.start();
    keeper.backup();
    let lsn = old.write(&a, 1);
    new.clone_from(&old);
    b.wait_replayed(lsn);
    // From here on only the archive sees what the primary writes.
    b.stop();
    old.write(&a, 2);
    keeper.wait_stored(&a, &REGIONS);
    a.kill9_all();
    b.follow(&a, None);
    b.start();
    b.promote();
    new.write(&b, 3);
    keeper.wait_stored(&b, &REGIONS);
    keeper.stop();
    new.verify(&folder, &keeper, 17, "latest");
    old.verify(&folder, &keeper, 17, "1");
}
