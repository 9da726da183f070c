//! Every kind of target restores exactly the rows it should, with clients writing throughout.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::support::{Folder, Keeper, Server, ServerOptions, wait_until};

/// A transaction of which everything is known: the rows committed before it, its place, its row.
struct Mark {
    xid: u32,
    /// Just before it was committed, and just after.
    before: String,
    after: String,
    lsn_after: String,
    row: i64,
}

/// Commits a row while two clients write, and notes moments around it.
fn mark(server: &Server, row: i64) -> Mark {
    let mut client = server.connect().unwrap();
    let text = |client: &mut postgres::Client, sql: &str| -> String {
        client.query_one(sql, &[]).unwrap().get(0)
    };
    let clock =
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'";
    let before = text(&mut client, clock);
    let mut transaction = client.transaction().unwrap();
    let xid: String = transaction.query_one("SELECT txid_current()::text", &[]).unwrap().get(0);
    transaction.batch_execute(&format!("INSERT INTO marks VALUES ({row})")).unwrap();
    transaction.commit().unwrap();
    let lsn_after = text(&mut client, "SELECT pg_current_wal_insert_lsn()::text");
    let after = text(&mut client, clock);
    Mark { xid: xid.parse().unwrap(), before, after, lsn_after, row }
}

fn marks(server: &Server) -> BTreeSet<i64> {
    server.sql("SELECT row FROM marks").lines().map(|line| line.parse().unwrap()).collect()
}

fn round(major: u32) {
    let folder = Folder::new();
    let server = Server::new(&folder, major, &ServerOptions::default());
    server.sql("CREATE TABLE marks (row bigint PRIMARY KEY); CREATE TABLE noise (id bigserial PRIMARY KEY, t text)");
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..2)
        .map(|_| {
            let (stop, written, mut client) =
                (stop.clone(), written.clone(), server.connect().unwrap());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    client
                        .batch_execute("INSERT INTO noise (t) VALUES (repeat('n', 100))")
                        .unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let more = || {
        let now = written.load(Ordering::Relaxed);
        wait_until("more noise", || written.load(Ordering::Relaxed) > now + 50);
    };
    more();
    mark(&server, 1);
    let label = keeper.backup();
    more();
    let first = mark(&server, 2);
    more();
    server.sql("SELECT pg_create_restore_point('here it''s')");
    more();
    let second = mark(&server, 3);
    more();
    let last = mark(&server, 4);
    more();
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let noise = server.sql("SELECT count(*) FROM noise");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();

    let xid = second.xid.to_string();
    let cases: Vec<(&str, Vec<&str>, Vec<i64>)> = vec![
        ("end", vec![], vec![1, 2, 3, 4]),
        ("immediate", vec!["--target-immediate"], vec![1]),
        ("time", vec!["--target-time", &second.before], vec![1, 2]),
        ("time-after", vec!["--target-time", &second.after], vec![1, 2, 3]),
        ("lsn", vec!["--target-lsn", &second.lsn_after], vec![1, 2, 3]),
        ("xid", vec!["--target-xid", &xid], vec![1, 2, 3]),
        ("xid-exclusive", vec!["--target-xid", &xid, "--exclusive"], vec![1, 2]),
        ("name", vec!["--target-name", "here it's"], vec![1, 2]),
    ];
    for (name, arguments, expected) in cases {
        let mut copy = keeper.restore_and_start(&folder, major, name, &arguments);
        copy.wait_until_writable();
        assert_eq!(marks(&copy), expected.iter().copied().collect(), "{name} on {major}");
        if name == "end" {
            assert_eq!(copy.sql("SELECT count(*) FROM noise"), noise);
        }
        copy.check_integrity();
        std::fs::remove_dir_all(&copy.data).unwrap();
    }
    let pause = ["--target-lsn", &first.lsn_after, "--target-action", "pause"];
    let copy = keeper.restore_and_start(&folder, major, "pause", &pause);
    wait_until("the pause", || copy.sql("SELECT pg_is_wal_replay_paused()") == "t");
    assert!(marks(&copy).contains(&first.row));
    assert!(!marks(&copy).contains(&second.row));
    drop(copy);
    refuse(&keeper, &folder, &label, &last);
}

// CASES 6: what cannot be reached is refused before anything is copied.
fn refuse(keeper: &Keeper, folder: &Folder, label: &str, last: &Mark) {
    let data = folder.path().join("refused");
    let refused = |arguments: &[&str]| {
        let mut all = vec!["restore", "--pgdata", data.to_str().unwrap()];
        all.extend(arguments);
        let output = keeper.run(&all).expect(4);
        assert!(!data.exists(), "{arguments:?} left something behind");
        output.stderr
    };
    let early = refused(&["--target-time", "2020-01-01 00:00:00Z"]);
    assert!(early.contains("it ended later") && early.contains(label), "{early}");
    let late = refused(&["--target-time", "2099-01-01 00:00:00Z"]);
    assert!(late.contains("the archive knows nothing after"), "{late}");
    assert!(refused(&["--target-lsn", "FF/0"]).contains("the WAL ends at"));
    assert!(refused(&["--target-xid", "4000000"]).contains("does not end it"));
    assert!(refused(&["--target-name", "nowhere"]).contains("there is none of that name"));
    assert!(refused(&["--target-timeline", "7"]).contains("history file of timeline 7 is missing"));
    let zone =
        keeper.run(&["restore", "--pgdata", "x", "--target-time", "2026-01-01 00:00:00"]).expect(2);
    assert!(zone.stderr.contains("time zone"), "{}", zone.stderr);
    // After the last commit, but before the archiver's last word: that is the end.
    let plan = keeper.run(&[
        "restore",
        "--pgdata",
        data.to_str().unwrap(),
        "--target-lsn",
        &last.lsn_after,
        "--dry-run",
        "--json",
    ]);
    assert_eq!(plan.expect(0).json()["restored"], false);
}

#[test]
fn every_target_on_postgresql_15() {
    round(15);
}

#[test]
fn every_target_on_postgresql_18() {
    round(18);
}

// CASES 6: without this PostgreSQL would stop with FATAL at the end, hours later.
#[test]
fn a_time_in_a_quiet_spell_after_the_last_commit_recovers_to_the_end() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE marks (row bigint PRIMARY KEY)");
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    keeper.backup();
    let only = mark(&server, 1);
    keeper.wait_archived(&server, &["eu"]);
    // Stopping says the last word: its time lies after the commit.
    keeper.stop();
    let output = keeper
        .run(&[
            "restore",
            "--pgdata",
            folder.path().join("c").to_str().unwrap(),
            "--target-time",
            &only.after,
            "--dry-run",
        ])
        .expect(0);
    assert!(output.stderr.contains("no transaction ended after it"), "{}", output.stderr);
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &["--target-time", &only.after]);
    copy.wait_until_writable();
    assert_eq!(marks(&copy), BTreeSet::from([1]));
}

// CASES 7: current, latest and a number, with two timelines.
#[test]
fn two_timelines_are_told_apart() {
    let folder = Folder::new();
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE marks (row bigint PRIMARY KEY)");
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    keeper.backup();
    let first = mark(&server, 1);
    mark(&server, 2);
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    server.stop();
    // A recovery to the first mark begins timeline 2, which is then archived.
    let mut second =
        keeper.restore_and_start(&folder, 17, "second", &["--target-lsn", &first.lsn_after]);
    second.wait_until_writable();
    mark(&second, 3);
    keeper.edit_config(&server.conninfo(), &second.conninfo());
    keeper.start();
    keeper.wait_archived(&second, &["eu"]);
    keeper.stop();
    second.stop();
    for (name, timeline, expected) in [
        ("latest", "latest", vec![1, 3]),
        ("number", "2", vec![1, 3]),
        ("current", "current", vec![1, 2]),
        ("first", "1", vec![1, 2]),
    ] {
        let mut copy =
            keeper.restore_and_start(&folder, 17, name, &["--target-timeline", timeline]);
        copy.wait_until_writable();
        copy.sql("CHECKPOINT");
        assert_eq!(marks(&copy), expected.into_iter().collect(), "--target-timeline {timeline}");
        // CASES 14: the archive's timelines are seen, so the new one takes a number of its own.
        assert_eq!(copy.sql("SELECT timeline_id FROM pg_control_checkpoint()"), "3");
        copy.check_integrity();
    }
}
