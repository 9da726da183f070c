//! Incremental and differential backups: every one of a chain restores by itself, in one pass, to
//! the bytes that a full backup of the same moment gives.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{
    Folder, Keeper, Server, ServerOptions, cache, files_below, rounds, user_command, wait_until,
};

const SUMMARIES: &str = "autovacuum = off\nsummarize_wal = on\n";
const QUIET: &str = "autovacuum = off\n";

fn options(settings: &str) -> ServerOptions {
    ServerOptions { no_fsync: true, settings: settings.into(), ..ServerOptions::default() }
}

fn take(keeper: &Keeper, kind: &str) -> Value {
    keeper.run(&["backup", "--json", "--type", kind]).expect(0).json()
}

fn label(backup: &Value) -> &str {
    backup["label"].as_str().unwrap()
}

fn restore(keeper: &Keeper, backup: &str, data: &Path, more: &[&str]) {
    let mut arguments = vec!["restore", "--pgdata", data.to_str().unwrap(), "--backup", backup];
    arguments.extend(["--target-immediate"]);
    arguments.extend(more);
    keeper.run(&arguments).expect(0);
}

/// By the major's own `pg_verifybackup`, or where the package lacks it, by a later one that reads
/// the same manifests.
fn verify(major: u32, data: &Path) {
    let tool = |major: u32| cache().join(format!("pg/{major}/bin/pg_verifybackup"));
    let tool = if tool(major).exists() { tool(major) } else { tool(15) };
    let mut verify = user_command(tool);
    let output = verify.arg("-n").arg(data).current_dir("/tmp").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
}

/// All files that must not depend on how the backup was taken.
fn files(data: &Path) -> BTreeMap<String, Vec<u8>> {
    let own = [
        "backup_label",
        "backup_manifest",
        "global/pg_control",
        "pgkeep-restore.json",
        "postgresql.auto.conf",
    ];
    let mut found = BTreeMap::new();
    for folder in std::iter::once(data.to_owned()).chain(tablespaces(data)) {
        for path in files_below(&folder, &|_| true) {
            let name = match path.strip_prefix(data) {
                Ok(name) => name.to_string_lossy().into_owned(),
                Err(_) => path.file_name().unwrap().to_string_lossy().into_owned(),
            };
            if !own.contains(&name.as_str()) {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn tablespaces(data: &Path) -> Vec<std::path::PathBuf> {
    let links = fs::read_dir(data.join("pg_tblspc")).unwrap();
    links.map(|link| fs::canonicalize(link.unwrap().path()).unwrap()).collect()
}

fn fill(server: &Server, folder: &Folder) {
    let space = folder.make("space");
    server.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", space.display()));
    server.sql("CREATE TABLE t AS SELECT n, repeat(md5(n::text), 4) AS text, 0 AS v FROM generate_series(1, 60000) n");
    server.sql("CREATE INDEX ON t (n); CREATE INDEX ON t (v)");
    server.sql("CREATE TABLE far TABLESPACE space AS SELECT * FROM t LIMIT 20000");
    server.sql("CREATE TABLE shrinks AS TABLE t; CREATE TABLE still AS TABLE t");
    server.sql("VACUUM");
}

/// What happens between two backups: scattered updates, growth, files that shrink, go and come.
fn change(server: &Server, round: usize) {
    server.sql(&format!("UPDATE t SET v = {round} WHERE n % 997 = {round}"));
    server.sql(&format!("UPDATE far SET v = {round} WHERE n % 1999 = {round}"));
    server.sql(&format!("INSERT INTO t SELECT n, 'more', {round} FROM generate_series(1, 3000) n"));
    server.sql(&format!("CREATE TABLE new_{round} AS SELECT * FROM t LIMIT 3000"));
    match round % 4 {
        0 => server.sql("DELETE FROM shrinks WHERE n > 20000 - random() * 1000"),
        1 => server.sql("TRUNCATE shrinks; INSERT INTO shrinks SELECT * FROM t LIMIT 5000"),
        2 => server.sql("CREATE DATABASE copy TEMPLATE template0"),
        _ => server.sql("DROP DATABASE IF EXISTS copy"),
    };
    if round > 2 {
        server.sql(&format!("DROP TABLE new_{}", round - 2));
    }
    // Shortens files, and fills free space maps.
    server.sql("VACUUM");
}

const CONTENT: &str =
    "SELECT count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY n, v, text)) FROM t";

fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (files(one), files(other));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, content) in &one {
        assert!(content == &other[name], "{name} differs");
    }
}

/// Restores an older backup over a newer one's directory: most of it is there already, also where
/// only some blocks of a frame are needed.
fn go_back(keeper: &Keeper, folder: &Folder, data: &Path, backup: &str) {
    let space = folder.path().join("space");
    let fresh = folder.path().join("fresh");
    let restored = |data: &Path, space_to: &Path, more: &[&str]| {
        let map = format!("{}={}", space.display(), space_to.display());
        let arguments = ["restore", "--json", "--target-immediate", "--backup", backup, "--pgdata"];
        let arguments =
            [&arguments[..], &[data.to_str().unwrap(), "--tablespace-map", &map], more].concat();
        keeper.run(&arguments).expect(0).json()
    };
    let whole = restored(&fresh, &folder.path().join("fresh-space"), &[]);
    let space_to = Path::new(&format!("{}-space", data.display())).to_owned();
    let report = restored(data, &space_to, &["--delta"]);
    assert_same(&fresh, data);
    let number = |report: &Value, name: &str| report[name].as_u64().unwrap();
    let (few, all) = (number(&report, "fetched_bytes"), number(&whole, "fetched_bytes"));
    assert!(few < all / 2, "{report}\n{whole}");
    assert!(number(&report, "kept_bytes") > 10 << 20, "{report}");
}

fn a_chain(major: u32, settings: &str, changes_from: &str) {
    let folder = Folder::new();
    let server = Server::new(&folder, major, &options(settings));
    fill(&server, &folder);
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    let full = take(&keeper, "full");
    let mut contents = Vec::new();
    for round in 1..=rounds("PGKEEP_CHAIN_ROUNDS", 4) {
        change(&server, round);
        let kind = if round == 3 { "differential" } else { "incremental" };
        let backup = take(&keeper, kind);
        assert_eq!(backup["type"], kind);
        assert_eq!(backup["changes_from"], changes_from, "{backup}");
        let number = |backup: &Value, name: &str| backup[name].as_u64().unwrap();
        assert!(number(&backup, "new_size") < number(&backup, "size") / 2, "{backup}");
        assert!(number(&backup, "stored_size") < number(&full, "stored_size") / 2, "{backup}");
        if kind == "differential" {
            assert_eq!(backup["parent"], full["label"]);
        }
        contents.push((label(&backup).to_owned(), server.sql(CONTENT)));
    }
    // The same moment twice: nothing happens between these two.
    let last = take(&keeper, "incremental");
    let whole = take(&keeper, "full");
    assert_eq!(whole["packs"].as_u64().unwrap(), 1);
    keeper.stop();
    let (merged, plain) = (folder.path().join("merged"), folder.path().join("plain"));
    for (backup, data) in [(&last, &merged), (&whole, &plain)] {
        let space = folder.path().join("space");
        let map = format!("{}={}-space", space.display(), data.display());
        restore(&keeper, label(backup), data, &["--tablespace-map", &map]);
        verify(major, data);
    }
    assert_same(&merged, &plain);
    go_back(&keeper, &folder, &merged, &contents[0].0);
    verify(major, &merged);
    // Each of the chain by itself, from one region.
    for (number, (backup, expected)) in contents.iter().enumerate() {
        let region = ["eu", "us"][number % 2];
        let space = folder.path().join("space");
        let map = format!("{}={}-{number}", space.display(), space.display());
        let arguments = ["--backup", backup, "--target-immediate", "--region", region];
        let name = format!("copy-{number}");
        let arguments = [arguments.as_slice(), &["--tablespace-map", &map]].concat();
        let mut copy = keeper.restore_and_start(&folder, major, &name, &arguments);
        copy.wait_until_writable();
        assert_eq!(&copy.sql(CONTENT), expected, "{backup}");
        copy.check_integrity();
    }
}

#[test]
fn a_chain_restores_like_a_full_backup_on_postgresql_13() {
    a_chain(13, QUIET, "block-hashes");
}

#[test]
fn a_chain_restores_like_a_full_backup_on_postgresql_14() {
    a_chain(14, QUIET, "block-hashes");
}

#[test]
fn a_chain_restores_like_a_full_backup_on_postgresql_15() {
    a_chain(15, QUIET, "block-hashes");
}

#[test]
fn a_chain_restores_like_a_full_backup_on_postgresql_16() {
    a_chain(16, QUIET, "block-hashes");
}

#[test]
fn a_chain_restores_like_a_full_backup_on_postgresql_17() {
    a_chain(17, SUMMARIES, "wal-summaries");
}

#[test]
fn a_chain_restores_like_a_full_backup_on_postgresql_18() {
    a_chain(18, SUMMARIES, "wal-summaries");
}

// Summaries that are missing are said to be, and the blocks are compared instead.
#[test]
fn without_summaries_blocks_are_compared() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &options(QUIET));
    fill(&server, &folder);
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    take(&keeper, "full");
    change(&server, 1);
    let off = keeper.run(&["backup", "--json", "--type", "incremental"]).expect(0);
    assert!(off.stderr.contains("summarize_wal is off"), "{}", off.stderr);
    assert_eq!(off.json()["changes_from"], "block-hashes");
    // Summaries begin only now: those that the parent needs are not there.
    server.sql("ALTER SYSTEM SET summarize_wal = on");
    server.sql("SELECT pg_reload_conf()");
    server.sql("CHECKPOINT; SELECT pg_switch_wal()");
    wait_until("the setting", || server.sql("SHOW summarize_wal") == "on");
    change(&server, 2);
    server.sql("CHECKPOINT");
    wait_until("summaries", || {
        server.sql("SELECT count(*) > 0 FROM pg_available_wal_summaries()") == "t"
    });
    let removed = server.data.join("pg_wal/summaries");
    for summary in files_below(&removed, &|_| true) {
        fs::remove_file(summary).unwrap();
    }
    let fallen_back = keeper.run(&["backup", "--json", "--type", "incremental"]).expect(0);
    assert!(fallen_back.stderr.contains("cannot tell what changed"), "{}", fallen_back.stderr);
    assert_eq!(fallen_back.json()["changes_from"], "block-hashes");
    // From here on the server can.
    change(&server, 3);
    let summarised = take(&keeper, "incremental");
    assert_eq!(summarised["changes_from"], "wal-summaries");
    let expected = server.sql(CONTENT);
    keeper.stop();
    let space = folder.path().join("space");
    let map = format!("{}={}-copy", space.display(), space.display());
    let arguments = ["--target-immediate", "--backup", label(&summarised)];
    let arguments = [arguments.as_slice(), &["--tablespace-map", &map]].concat();
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &arguments);
    copy.wait_until_writable();
    assert_eq!(copy.sql(CONTENT), expected);
    copy.check_integrity();
}

// A region without the parent cannot hold the child; repair brings both, the parent first.
#[test]
fn a_region_without_the_parent_is_named_and_repaired() {
    let folder = Folder::new();
    let server = Server::new(&folder, 15, &options(QUIET));
    fill(&server, &folder);
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    let first = keeper.run(&["backup", "--type", "incremental"]).expect(0);
    assert!(first.stderr.contains("taking a full backup"), "{}", first.stderr);
    let parent = first.stdout.trim().to_owned();
    assert!(parent.contains("-full-"), "{parent}");
    let of_parent = |path: &Path| path.to_string_lossy().contains(&parent);
    let gone = files_below(&keeper.region("us"), &of_parent);
    assert!(!gone.is_empty());
    gone.iter().for_each(|path| fs::remove_file(path).unwrap());
    change(&server, 1);
    let taken = keeper.run(&["backup", "--json", "--type", "incremental"]).expect(7);
    let backup = taken.json();
    assert_eq!(backup["parent"], parent.as_str());
    assert_eq!(backup["regions"], serde_json::json!(["eu"]));
    assert!(taken.stderr.contains("pgkeep repair"), "{}", taken.stderr);
    keeper.run(&["repair"]).expect(0);
    let expected = server.sql(CONTENT);
    keeper.stop();
    let space = folder.path().join("space");
    let map = format!("{}={}-copy", space.display(), space.display());
    let arguments = ["--target-immediate", "--region", "us", "--backup", label(&backup)];
    let arguments = [arguments.as_slice(), &["--tablespace-map", &map]].concat();
    let mut copy = keeper.restore_and_start(&folder, 15, "copy", &arguments);
    copy.wait_until_writable();
    assert_eq!(copy.sql(CONTENT), expected);
}
