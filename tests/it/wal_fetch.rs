//! `wal-fetch` under PostgreSQL: a one-shot recovery never ends early in silence, a standby waits.

use std::fs;

use pgkeep::cli::WalFetchMode;
use pgkeep::repo::{ContentKey, history_key};

use crate::support::{Folder, Keeper, Server, ServerOptions, user_command, wait_until};

const MAJORS: [u32; 4] = [13, 15, 17, 18];
/// Set in a process that stands in for a `wal-fetch` that panics.
const PANIC: &str = "PGKEEP_TEST_PANICS_AS";

/// A cluster and its archive; the original is stopped.
fn archive(folder: &Folder, major: u32) -> Keeper {
    let mut server = Server::new(folder, major, &ServerOptions::default());
    server.sql("CREATE TABLE t (n int)");
    let mut keeper = Keeper::new(folder, &server, &["eu"]);
    keeper.start();
    keeper.backup();
    server.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    server.stop();
    keeper
}

fn restore(keeper: &Keeper, folder: &Folder, major: u32, name: &str) -> Server {
    let data = folder.path().join(name);
    keeper.run(&["restore", "--pgdata", data.to_str().unwrap()]).expect(0);
    let server = Server::at(folder, major, &data);
    server.configure("wal_retrieve_retry_interval = '100ms'");
    server
}

/// The server stopped, and did not promote.
fn assert_stopped(server: &mut Server, what: &str) {
    server.launch();
    let log = server.wait_for_end();
    assert!(log.contains("FATAL"), "{what} on {}: {log}", server.major);
    assert!(
        !log.contains("selected new timeline"),
        "{what} on {}: it promoted\n{log}",
        server.major
    );
    assert!(!server.data.join("pg_wal/00000002.history").exists(), "{what}: it promoted");
}

// CASES 1: network and configuration errors looked like the end of the WAL.
#[test]
fn a_one_shot_recovery_stops_when_the_regions_cannot_be_read() {
    for major in MAJORS {
        let folder = Folder::new();
        let keeper = archive(&folder, major);
        let mut copy = restore(&keeper, &folder, major, "copy");
        let away = folder.path().join("away");
        fs::rename(keeper.region("eu"), &away).unwrap();
        assert_stopped(&mut copy, "no region");
        // Once it is back, the same directory recovers.
        fs::rename(&away, keeper.region("eu")).unwrap();
        copy.start();
        copy.wait_until_writable();
        assert_eq!(copy.sql("SELECT count(*) FROM t"), "1000");
    }
}

#[test]
fn a_one_shot_recovery_stops_when_the_configuration_is_broken() {
    for major in MAJORS {
        let folder = Folder::new();
        let keeper = archive(&folder, major);
        let mut copy = restore(&keeper, &folder, major, "copy");
        fs::write(&keeper.config, "this is [no TOML").unwrap();
        assert_stopped(&mut copy, "broken configuration");
    }
}

#[test]
fn a_one_shot_recovery_stops_when_an_object_that_was_promised_is_gone() {
    let folder = Folder::new();
    let keeper = archive(&folder, 17);
    let mut copy = restore(&keeper, &folder, 17, "copy");
    fs::remove_dir_all(keeper.region("eu").join("orders")).unwrap();
    assert_stopped(&mut copy, "objects gone");
}

#[test]
fn a_one_shot_recovery_stops_when_wal_fetch_panics_or_is_misused() {
    if let Ok(mode) = std::env::var(PANIC) {
        // This process is PostgreSQL's restore_command.
        let mode = if mode == "standby" { WalFetchMode::Standby } else { WalFetchMode::OneShot };
        let code = pgkeep::cli::wal_fetch_guarded(mode, || panic!("on purpose"));
        std::process::exit(i32::from(code));
    }
    for major in MAJORS {
        let folder = Folder::new();
        let keeper = archive(&folder, major);
        let test = folder.path().join("test-program");
        fs::copy(std::env::current_exe().unwrap(), &test).unwrap();
        let panicking = format!(
            "{PANIC}=one-shot {} --exact wal_fetch::a_one_shot_recovery_stops_when_wal_fetch_panics_or_is_misused",
            test.display()
        );
        let program = keeper.command(&[]).get_program().to_string_lossy().into_owned();
        let misused = format!("{program} wal-fetch --no-such-option %f %p");
        for (name, command) in [("panics", panicking), ("misused", misused)] {
            let mut copy = restore(&keeper, &folder, major, name);
            copy.configure(&format!("restore_command = '{command}'"));
            assert_stopped(&mut copy, name);
        }
    }
}

#[test]
fn a_standby_waits_while_nothing_can_be_had_and_then_goes_on() {
    for major in MAJORS {
        let folder = Folder::new();
        let keeper = archive(&folder, major);
        let mut copy = restore(&keeper, &folder, major, "copy");
        fs::rename(copy.data.join("recovery.signal"), copy.data.join("standby.signal")).unwrap();
        let settings = fs::read_to_string(copy.data.join("postgresql.auto.conf")).unwrap();
        let command = settings.lines().find(|line| line.starts_with("restore_command")).unwrap();
        copy.configure(&command.replace("wal-fetch", "wal-fetch --standby"));
        let good = fs::read_to_string(&keeper.config).unwrap();
        fs::write(&keeper.config, "this is [no TOML").unwrap();
        copy.launch();
        let attempts = |copy: &Server| copy.log().matches("error: ").count();
        wait_until("several attempts", || attempts(&copy) >= 5);
        assert!(!copy.log().contains("FATAL:  could not restore"), "{}", copy.log());
        fs::write(&keeper.config, good).unwrap();
        wait_until("the standby to catch up", || {
            copy.connect().is_ok_and(|mut client| {
                client
                    .query_one("SELECT count(*) FROM t", &[])
                    .is_ok_and(|row| row.get::<_, i64>(0) == 1000)
            })
        });
        assert_eq!(copy.sql("SELECT pg_is_in_recovery()"), "t");
    }
}

// Measured: a tail of timeline 1 beyond the fork would be replayed silently.
#[test]
fn recovery_ends_at_the_fork_when_the_new_timeline_has_no_wal_yet() {
    for major in [14, 17] {
        let folder = Folder::new();
        let mut server = Server::new(&folder, major, &ServerOptions::default());
        server.sql("CREATE TABLE t (n int)");
        let mut keeper = Keeper::new(&folder, &server, &["eu"]);
        keeper.start();
        keeper.backup();
        server.sql("INSERT INTO t VALUES (1)");
        let fork = server.sql("SELECT pg_current_wal_insert_lsn()");
        server.sql("INSERT INTO t VALUES (2)");
        keeper.wait_archived(&server, &["eu"]);
        let system_id: u64 =
            server.sql("SELECT system_identifier FROM pg_control_system()").parse().unwrap();
        keeper.stop();
        server.stop();
        // A promotion whose history file reached the archive, and nothing else yet.
        let history = format!("1\t{fork}\tno recovery target specified\n");
        let hash = ContentKey::for_system(system_id).hash(history.as_bytes()).short();
        let key = history_key(pgkeep::wal::TimelineId(2), hash);
        let mut write = user_command("/bin/sh");
        let place = keeper.region("eu").join("orders").join(system_id.to_string()).join(key);
        write.arg("-c").arg(format!(
            "mkdir -p '{}' && cat > '{}'",
            place.parent().unwrap().display(),
            place.display()
        ));
        write.stdin(std::process::Stdio::piped());
        let mut child = write.spawn().unwrap();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), history.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());

        let mut copy = keeper.restore_and_start(&folder, major, "copy", &[]);
        copy.wait_until_writable();
        assert_eq!(copy.sql("SELECT string_agg(n::text, ',') FROM t"), "1");
        let mut old = keeper.restore_and_start(&folder, major, "old", &["--target-timeline", "1"]);
        old.wait_until_writable();
        assert_eq!(old.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t"), "1,2");
    }
}
