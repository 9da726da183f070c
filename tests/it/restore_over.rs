//! Restores into directories that hold something already: `--delta`, restores that were
//! interrupted, and what is refused. What comes out is what a restore into nothing gives.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rand::RngExt;
use serde_json::Value;

use crate::support::{
    Fault, Folder, Keeper, Proxy, S3Server, Server, ServerOptions, Spawned, cache, rounds,
    user_command, wait_until,
};

/// Every path below a folder, links followed, with mode and content.
fn tree(folder: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::metadata(&path).unwrap();
            let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
            let content = if metadata.is_dir() { Vec::new() } else { fs::read(&path).unwrap() };
            found.insert(name, (metadata.mode(), content));
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

/// Two restores of one plan differ in nothing but when they were made.
fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (tree(one), tree(other));
    let names = |tree: &BTreeMap<String, _>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&one), names(&other));
    for (name, (mode, content)) in &one {
        let (other_mode, other_content) = &other[name];
        assert_eq!(mode, other_mode, "mode of {name}");
        let differs = ["backup_manifest", "pgkeep-restore.json"].contains(&name.as_str());
        assert!(differs || content == other_content, "{name} differs");
    }
}

/// By the major's own `pg_verifybackup`, or where the package lacks it, by a later one that reads
/// the same manifests.
fn verify(major: u32, data: &Path) {
    let tool = |major: u32| cache().join(format!("pg/{major}/bin/pg_verifybackup"));
    let tool = if tool(major).exists() { tool(major) } else { tool(15) };
    let mut verify = user_command(tool);
    let output = verify.arg("-n").arg(data).current_dir("/tmp").output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn restore_to(keeper: &Keeper, data: &Path, more: &[&str]) -> Value {
    let mut arguments = vec!["restore", "--json", "--pgdata", data.to_str().unwrap()];
    arguments.extend(more);
    keeper.run(&arguments).expect(0).json()
}

const CONTENT: &str = "SELECT count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY n)) FROM t";

fn fill(server: &Server) {
    server
        .sql("CREATE TABLE t AS SELECT n, md5(n::text) AS text FROM generate_series(1, 200000) n");
    server.sql("CREATE INDEX ON t (n); CREATE TABLE dropped AS SELECT * FROM t LIMIT 50000");
    server.sql("CREATE TABLE cut AS SELECT * FROM t LIMIT 50000; CREATE TABLE still AS TABLE t");
    // Otherwise the first reader changes every page.
    server.sql("VACUUM");
    server.sql("CHECKPOINT");
}

fn change(server: &Server) {
    server.sql("UPDATE t SET text = 'changed' WHERE n < 100; DROP TABLE dropped");
    server.sql("TRUNCATE cut; CREATE TABLE added AS SELECT * FROM t LIMIT 50000");
    server.sql("INSERT INTO t SELECT n, 'more' FROM generate_series(200001, 250000) n; CHECKPOINT");
}

fn delta(major: u32) {
    let folder = Folder::new();
    let mut server = Server::new(&folder, major, &ServerOptions::default());
    let (space, late) = (folder.make("space"), folder.make("late"));
    server.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", space.display()));
    fill(&server);
    server.sql("CREATE TABLE far TABLESPACE space AS SELECT * FROM t LIMIT 50000");
    let expected = server.sql(CONTENT);
    let keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.backup();
    change(&server);
    server.sql("UPDATE far SET text = 'x' WHERE n = 1");
    server.sql(&format!("CREATE TABLESPACE late LOCATION '{}'", late.display()));
    server.sql("CREATE TABLE later TABLESPACE late AS SELECT 1; CHECKPOINT");

    let immediate = "--target-immediate";
    let data = server.data.clone();
    let running = ["restore", "--pgdata", data.to_str().unwrap(), "--delta", immediate];
    let refused = keeper.run(&running).expect(1);
    assert!(refused.stderr.contains("a PostgreSQL server runs in it"), "{}", refused.stderr);
    assert_eq!(server.sql("SELECT count(*) FROM added"), "50000");
    server.stop();

    let map = format!("{}={}", space.display(), folder.path().join("fresh-space").display());
    let fresh = folder.path().join("fresh");
    let whole = restore_to(&keeper, &fresh, &[immediate, "--tablespace-map", &map]);
    verify(major, &fresh);
    fs::write(data.join("base/stray"), "not PostgreSQL's").unwrap();
    let report = restore_to(&keeper, &data, &["--delta", immediate]);
    let number = |report: &Value, name: &str| report[name].as_u64().unwrap();
    assert_eq!(number(&whole, "kept_bytes"), 0);
    assert!(number(&report, "kept_bytes") > 10 << 20, "{report}");
    assert!(number(&report, "fetched_bytes") < number(&whole, "fetched_bytes") / 2, "{report}");
    assert!(number(&report, "removed_files") > 0, "{report}");
    assert_same(&fresh, &data);
    verify(major, &data);
    assert_eq!(fs::read_dir(data.join("pg_tblspc")).unwrap().count(), 1);
    assert!(fs::read_dir(&late).unwrap().count() > 0, "what lies behind a link is not ours");

    server.configure("");
    server.start();
    server.wait_until_writable();
    assert_eq!(server.sql(CONTENT), expected);
    assert_eq!(server.sql("SELECT count(*) FROM far JOIN dropped USING (n)"), "50000");
    server.check_integrity();
}

#[test]
fn a_delta_restore_on_postgresql_13() {
    delta(13);
}

#[test]
fn a_delta_restore_on_postgresql_15() {
    delta(15);
}

#[test]
fn a_delta_restore_on_postgresql_17() {
    delta(17);
}

#[test]
fn a_delta_restore_on_postgresql_18() {
    delta(18);
}

#[test]
fn what_delta_must_not_touch_is_refused() {
    let folder = Folder::new();
    let other = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.backup();
    let refused = |data: &Path, delta: bool| {
        let before = tree(data);
        let mut arguments = vec!["restore", "--pgdata", data.to_str().unwrap()];
        arguments.extend(delta.then_some("--delta"));
        let output = keeper.run(&arguments).expect(1);
        assert!(tree(data) == before, "something was changed");
        output.stderr
    };
    let mut foreign = Server::new(&other, 17, &ServerOptions::default());
    foreign.stop();
    let message = refused(&foreign.data, true);
    assert!(message.contains("it belongs to another cluster"), "{message}");
    let message = refused(&foreign.data, false);
    assert!(message.contains("it is not empty"), "{message}");
    let home = folder.make("home");
    fs::write(home.join("thesis"), "years of work").unwrap();
    let message = refused(&home, true);
    assert!(message.contains("neither empty nor a data directory"), "{message}");
}

/// Kills a restore once it has come `enough` bytes far; whether it was still at work.
fn kill_at(keeper: &Keeper, folder: &Folder, data: &Path, arguments: &[&str], enough: u64) -> bool {
    let mut all = vec!["restore", "--pgdata", data.to_str().unwrap()];
    all.extend(arguments);
    let mut restore = Spawned::start(keeper.command(&all), &folder.path().join("restore.log"));
    wait_until("a part of the restore", || {
        restore.exited().is_some() || written(&folder.path().join("restored"), data) >= enough
    });
    let at_work = restore.exited().is_none();
    restore.kill9();
    at_work
}

/// Blocks in use below two folders, as they are while somebody writes.
fn written(one: &Path, other: &Path) -> u64 {
    fn below(folder: &Path) -> u64 {
        let Ok(entries) = fs::read_dir(folder) else { return 0 };
        entries
            .flatten()
            .map(|entry| match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => below(&entry.path()),
                Ok(metadata) => metadata.len().min(metadata.blocks() * 512),
                Err(_) => 0,
            })
            .sum()
    }
    below(one) + below(other)
}

#[test]
fn a_restore_that_is_killed_is_ended_by_the_same_command() {
    let folder = Folder::new();
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    fill(&server);
    server.write_bulk(20);
    let keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.backup();
    change(&server);
    keeper.backup();
    let fresh = folder.path().join("fresh");
    let arguments = ["--target-immediate"];
    restore_to(&keeper, &fresh, &arguments);
    let all = written(&fresh, Path::new("/nonexistent"));
    let mut killed = 0;
    for round in 0..rounds("PGKEEP_RESTORE_ROUNDS", 6) {
        let data = folder.path().join(format!("copy-{round}"));
        // Several times in a row: what continues is killed too.
        for _ in 0..2 {
            let enough = rand::rng().random_range(0..all);
            killed += usize::from(kill_at(&keeper, &folder, &data, &arguments, enough));
        }
        if data.join("pgkeep-restore.json").exists() && !data.join("recovery.signal").exists() {
            assert!(!data.join("global/pg_control").exists(), "a server could start on it");
        }
        let output = keeper
            .run(&["restore", "--pgdata", data.to_str().unwrap(), "--target-immediate"])
            .expect(0);
        assert!(output.stderr.contains("now start PostgreSQL"), "{}", output.stderr);
        assert_same(&fresh, &data);
        verify(17, &data);
        fs::remove_dir_all(&data).unwrap();
    }
    assert!(killed > 0, "every restore was faster than the kill");
}

// Surely in the middle: the store is too slow for more.
#[test]
fn a_restore_that_is_killed_halfway_keeps_its_backup_and_its_plan() {
    let folder = Folder::new();
    let s3 = S3Server::start(&folder);
    let proxy = Proxy::http(s3.port());
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.write_bulk(40);
    let region = S3Server::region_at("ap", "prod", proxy.port());
    let keeper = Keeper::with(&folder, &server.conninfo(), &region);
    let first = keeper.backup();
    let data = folder.path().join("copy");
    proxy.set(Fault::Throttle(4_000_000));
    assert!(kill_at(&keeper, &folder, &data, &[], 4 << 20), "the restore was faster than the kill");
    proxy.set(Fault::None);
    assert!(!data.join("global/pg_control").exists());
    // A newer backup does not make it another plan, but another target does.
    let second = keeper.backup();
    let lsn = server.sql("SELECT pg_current_wal_lsn()");
    let elsewhere = |more: &[&str]| {
        let mut all = vec!["restore", "--pgdata", data.to_str().unwrap(), "--target-lsn", &lsn];
        all.extend(more);
        keeper.run(&all)
    };
    // The end of the last backup's WAL is the end of the archive.
    let refused = elsewhere(&[]).expect(1);
    assert!(refused.stderr.contains("was interrupted in it"), "{}", refused.stderr);
    assert!(refused.stderr.contains(&first), "{}", refused.stderr);
    let report = restore_to(&keeper, &data, &[]);
    assert_eq!(report["plan"]["backup"], first.as_str());
    assert!(report["kept_bytes"].as_u64().unwrap() > 0, "{report}");
    verify(17, &data);
    // What is whole is no longer continued, as soon as a server ran in it.
    let mut copy = Server::at(&folder, 17, &data);
    copy.configure("");
    copy.start();
    copy.wait_until_writable();
    copy.check_integrity();
    let refused = keeper.run(&["restore", "--pgdata", data.to_str().unwrap()]).expect(1);
    assert!(refused.stderr.contains("it is not empty"), "{}", refused.stderr);
    let report = restore_to(&keeper, &data, &["--delta"]);
    assert_eq!(report["plan"]["backup"], second.as_str());
}

// The first region gives a trickle; what it would take minutes for comes from the second.
#[test]
fn what_one_region_is_slow_to_give_is_read_from_another() {
    let folder = Folder::new();
    let s3 = S3Server::start(&folder);
    let proxy = Proxy::http(s3.port());
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.write_bulk(60);
    let local = folder.make("region-us");
    let regions = format!(
        "{}[[region]]\nname = \"us\"\nurl = \"file://{}\"\n",
        S3Server::region_at("ap", "prod", proxy.port()),
        local.display()
    );
    let keeper = Keeper::with(&folder, &server.conninfo(), &regions);
    keeper.backup();
    let expected = server.sql("SELECT count(*) || ' ' || sum(n) FROM bulk");
    proxy.set(Fault::Throttle(100_000));
    let before = proxy.passed();
    let data = folder.path().join("copy");
    let report = restore_to(&keeper, &data, &[]);
    let passed = proxy.passed() - before;
    let fetched = report["fetched_bytes"].as_u64().unwrap();
    assert!(passed < fetched / 2, "{passed} of {fetched} bytes came from the slow region");
    proxy.set(Fault::None);
    verify(17, &data);
    let mut copy = Server::at(&folder, 17, &data);
    copy.configure("");
    copy.start();
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT count(*) || ' ' || sum(n) FROM bulk"), expected);
}
