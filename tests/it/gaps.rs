//! WAL that the server has removed: what any host still has is fetched; the rest is a gap that is
//! recorded, shown, refused by restores, and followed by a new base backup (invariant I7).

use pgkeep::wal::{Lsn, TimelineId};

use crate::support::{Content, Folder, Keeper, Server, ServerOptions, conninfo_of, wait_until};

const REGIONS: [&str; 2] = ["eu", "us"];
const FIRST: TimelineId = TimelineId(1);

/// How the slot stops to keep WAL.
#[derive(Clone, Copy, PartialEq)]
enum Loss {
    Dropped,
    Invalidated,
}

/// A server that keeps little WAL, with a backup, and WAL that was lost while pgkeep was away.
struct Site {
    keeper: Keeper,
    server: Server,
    folder: Folder,
    label: String,
    /// A place in the WAL that was lost.
    inside: Lsn,
}

fn server_that_keeps_little(folder: &Folder, major: u32, more: &str) -> Server {
    let settings = format!("max_wal_size = 48MB\nmin_wal_size = 32MB\n{more}");
    let server = Server::new(
        folder,
        major,
        &ServerOptions { settings, no_fsync: true, ..ServerOptions::default() },
    );
    server.sql("CREATE TABLE t (n int)");
    server
}

impl Site {
    fn new(major: u32, loss: Loss) -> Site {
        let folder = Folder::new();
        let limit = match loss {
            Loss::Dropped => "",
            Loss::Invalidated => "max_slot_wal_keep_size = 48MB",
        };
        let server = server_that_keeps_little(&folder, major, limit);
        let mut keeper = Keeper::new(&folder, &server, &REGIONS);
        keeper.start();
        let label = keeper.backup();
        server.sql("INSERT INTO t VALUES (1)");
        keeper.wait_stored(&server, &REGIONS);
        keeper.stop();
        if loss == Loss::Dropped {
            server.sql("SELECT pg_drop_replication_slot('pgkeep')");
        }
        server.sql("INSERT INTO t VALUES (2)");
        let inside = server.flushed();
        server.recycle_wal(inside);
        if loss == Loss::Invalidated {
            let status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgkeep'";
            assert_eq!(server.sql(status), "lost");
        }
        Site { keeper, server, folder, label, inside }
    }

    /// Starts pgkeep, and gives the gap that it records.
    fn start_and_see_the_gap(&mut self) -> (Lsn, Lsn) {
        self.keeper.start();
        let mut gaps = Vec::new();
        wait_until("the gap in the list", || {
            self.keeper.assert_runs();
            let listed = self.keeper.run(&["list", "--json"]).expect(0).json();
            gaps.clone_from(listed["gaps"].as_array().unwrap());
            !gaps.is_empty()
        });
        assert_eq!(gaps.len(), 1, "{gaps:?}");
        let lsn = |key: &str| gaps[0][key].as_str().unwrap().parse::<Lsn>().unwrap();
        (lsn("from"), lsn("to"))
    }

    /// Waits until both regions have all WAL behind the gap.
    fn wait_behind(&mut self, gap: (Lsn, Lsn)) {
        let end = self.server.flushed();
        for region in REGIONS {
            let content = Content::of(&self.keeper, region, self.server.system_id());
            wait_until("WAL behind the gap", || {
                self.keeper.assert_runs();
                content.end_after(FIRST, gap.1) >= end
            });
        }
    }

    fn restore_is_refused(&self, arguments: &[&str]) {
        let data = self.folder.path().join("refused");
        let mut all = vec!["restore", "--pgdata", data.to_str().unwrap()];
        all.extend(arguments);
        let output = self.keeper.run(&all).expect(4);
        assert!(!data.exists(), "{arguments:?} left something behind");
        assert!(output.stderr.contains("cannot be reached"), "{}", output.stderr);
    }

    fn restore_to_the_end_works(&self, expected: &str) {
        for region in REGIONS {
            let arguments = ["--region", region];
            let name = format!("from-{region}");
            let mut copy =
                self.keeper.restore_and_start(&self.folder, self.server.major, &name, &arguments);
            copy.wait_until_writable();
            assert_eq!(copy.sql("SELECT n FROM t ORDER BY n"), expected, "from {region}");
        }
    }
}

fn a_gap_is_recorded_and_shown(major: u32, loss: Loss) {
    let mut site = Site::new(major, loss);
    let gap = site.start_and_see_the_gap();
    assert!(gap.0 <= site.inside && site.inside < gap.1, "{gap:?} and {}", site.inside);
    site.server.sql("INSERT INTO t VALUES (3)");
    site.wait_behind(gap);
    let shown = |output: &str| output.contains("GAP on timeline 1");
    assert!(shown(&site.keeper.run(&["list"]).expect(0).stdout));
    wait_until("the gap in the status", || shown(&site.keeper.run(&["status"]).stdout));
    let stored = site.keeper.run(&["status", "--from-regions"]).expect(0).stdout;
    assert!(shown(&stored), "{stored}");
    // Across it: to the end, into it, and behind it. Before it: as ever.
    let behind = site.server.flushed().to_string();
    site.restore_is_refused(&["--backup", &site.label]);
    site.restore_is_refused(&["--target-lsn", &site.inside.to_string()]);
    site.restore_is_refused(&["--backup", &site.label, "--target-lsn", &behind]);
    let arguments = ["--backup", &site.label, "--target-lsn", &gap.0.to_string()];
    let mut copy = site.keeper.restore_and_start(&site.folder, major, "before", &arguments);
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT n FROM t"), "1");
    // Another start finds nothing new to say.
    site.keeper.stop();
    site.keeper.start();
    site.wait_behind(gap);
    let log = site.keeper.log();
    assert_eq!(log.matches("GAP").count(), 1, "said once, clearly:\n{log}");
    site.keeper.backup();
    site.server.sql("INSERT INTO t VALUES (4)");
    site.wait_behind(gap);
    site.keeper.stop();
    site.restore_to_the_end_works("1\n2\n3\n4");
}

#[test]
fn a_slot_that_was_dropped_leaves_a_gap_that_is_told_on_17() {
    a_gap_is_recorded_and_shown(17, Loss::Dropped);
}

#[test]
fn a_slot_that_was_invalidated_leaves_a_gap_that_is_told_on_13() {
    a_gap_is_recorded_and_shown(13, Loss::Invalidated);
}

#[test]
fn a_slot_that_was_invalidated_leaves_a_gap_that_is_told_on_17() {
    a_gap_is_recorded_and_shown(17, Loss::Invalidated);
}

// 18 refuses such a slot in words of its own.
#[test]
fn a_slot_that_was_invalidated_leaves_a_gap_that_is_told_on_18() {
    a_gap_is_recorded_and_shown(18, Loss::Invalidated);
}

// CASES 13: a gap is recorded, a backup taken, an alarm raised, all by itself.
#[test]
fn a_gap_is_followed_by_a_new_backup_without_being_asked() {
    let mut site = Site::new(17, Loss::Dropped);
    let gap = site.start_and_see_the_gap();
    wait_until("a new backup in every region", || {
        site.keeper.assert_runs();
        let listed = site.keeper.run(&["list", "--json"]).expect(0).json();
        let backups = listed["backups"].as_array().unwrap();
        backups.len() == 2
            && backups.iter().all(|b| b["regions"].as_array().unwrap().len() == REGIONS.len())
    });
    site.server.sql("INSERT INTO t VALUES (3)");
    site.wait_behind(gap);
    site.keeper.stop();
    site.restore_to_the_end_works("1\n2\n3");
}

// What a standby named in the conninfo still has is no gap.
#[test]
fn wal_that_only_a_standby_has_is_fetched_from_it() {
    let folder = Folder::new();
    let mut a = server_that_keeps_little(&folder, 17, "");
    let b = Server::standby_of(&folder, &mut a, "b");
    b.sql("ALTER SYSTEM SET wal_keep_size = '512MB'");
    b.sql("SELECT pg_reload_conf()");
    let mut keeper = Keeper::new(&folder, &a, &REGIONS);
    keeper.edit_config(&a.conninfo(), &conninfo_of(&[&a, &b]));
    keeper.start();
    keeper.backup();
    a.sql("INSERT INTO t VALUES (1)");
    keeper.wait_stored(&a, &REGIONS);
    keeper.stop();
    a.sql("SELECT pg_drop_replication_slot('pgkeep')");
    a.sql("INSERT INTO t VALUES (2)");
    let lost = a.flushed();
    b.wait_replayed(lost);
    // The standby follows while the primary forgets.
    a.recycle_wal(lost);
    b.wait_replayed(a.flushed());
    assert!(b.wal_file(FIRST, lost).exists());
    a.sql("INSERT INTO t VALUES (3)");
    keeper.start();
    keeper.wait_stored(&a, &REGIONS);
    keeper.stop();
    let listed = keeper.run(&["list", "--json"]).expect(0).json();
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "{listed}");
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &[]);
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT n FROM t ORDER BY n"), "1\n2\n3");
}
