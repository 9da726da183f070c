//! A base backup that is killed leaves nothing that counts as one (invariant I3).

use std::fs;
use std::path::{Path, PathBuf};

use rand::RngExt;

use crate::support::{
    Fault, Folder, Keeper, Proxy, S3Server, Server, ServerOptions, Spawned, files_below, rounds,
    wait_until,
};

fn labels(keeper: &Keeper) -> Vec<String> {
    let listed = keeper.run(&["list", "--json"]).expect(0).json();
    let backups = listed["backups"].as_array().unwrap().clone();
    backups.iter().map(|backup| backup["label"].as_str().unwrap().to_owned()).collect()
}

fn stored_bytes(folder: &Path) -> u64 {
    if !folder.exists() {
        return 0;
    }
    let files = files_below(folder, &|path| path.to_string_lossy().contains("/backup/"));
    files.iter().map(|file| file.metadata().map_or(0, |metadata| metadata.len())).sum()
}

// CASES 27 and 37: killed at any moment; what is listed afterwards can be restored, all of it.
#[test]
fn a_backup_that_is_killed_counts_only_if_it_is_whole() {
    let folder = Folder::new();
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.write_bulk(20);
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    let mut known = vec![keeper.backup()];
    let one = stored_bytes(&keeper.region("eu"));
    let expected = server.sql("SELECT count(*) || ' ' || sum(n) FROM bulk");
    let mut killed = 0;
    for round in 0..rounds("PGKEEP_BACKUP_ROUNDS", 4) {
        let before = stored_bytes(&keeper.region("eu"));
        let enough = rand::rng().random_range(1..one);
        let log = folder.path().join("backup.log");
        let mut backup = Spawned::start(keeper.command(&["backup"]), &log);
        wait_until("a part of the backup", || {
            backup.exited().is_some() || stored_bytes(&keeper.region("eu")) >= before + enough
        });
        killed += usize::from(backup.exited().is_none());
        backup.kill9();
        let listed = labels(&keeper);
        assert!(listed.len() <= known.len() + 1, "{listed:?}");
        for label in listed.iter().filter(|label| !known.contains(label)) {
            let name = format!("copy-{round}");
            let mut copy = keeper.restore_and_start(&folder, 17, &name, &["--backup", label]);
            copy.wait_until_writable();
            assert_eq!(copy.sql("SELECT count(*) || ' ' || sum(n) FROM bulk"), expected);
        }
        known = listed;
    }
    assert!(killed > 0, "every backup was faster than the kill");
    // And the next one works.
    let label = keeper.backup();
    let mut copy = keeper.restore_and_start(&folder, 17, "last", &["--backup", &label]);
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT count(*) || ' ' || sum(n) FROM bulk"), expected);
}

/// The only folder of a region that ends with these parts.
fn find(keeper: &Keeper, region: &str, end: &str) -> PathBuf {
    let find = |path: &Path| path.to_string_lossy().contains(&format!("/{end}/"));
    let file = files_below(&keeper.region(region), &find).into_iter().next();
    let mut path = file.unwrap_or_else(|| panic!("no {end} in {region}"));
    while !path.ends_with(end) {
        path.pop();
    }
    path
}

/// Makes a dead backup an old one: its label, and what its lease says. Time passes no other way.
fn grow_old(keeper: &Keeper, region: &str, label: &str) -> PathBuf {
    let old = format!("20200101T000000Z-full-{}", &label[label.len() - 4..]);
    let folder = find(keeper, region, "backup");
    fs::rename(folder.join(label), folder.join(&old)).unwrap();
    for lease in fs::read_dir(find(keeper, region, "lease")).unwrap() {
        let lease = lease.unwrap().path();
        let mut text: serde_json::Value =
            serde_json::from_slice(&fs::read(&lease).unwrap()).unwrap();
        assert_eq!((&text["type"], &text["label"]), (&"backup".into(), &label.into()));
        text["label"] = old.clone().into();
        text["expires"] = "2020-01-01T00:15:00Z".into();
        fs::write(&lease, text.to_string()).unwrap();
    }
    folder.join(old)
}

// CASES 27: the next backup removes what a dead one left, once nobody can be writing it any more.
#[test]
fn what_a_killed_backup_left_is_removed_by_a_later_one() {
    let folder = Folder::new();
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.write_bulk(20);
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    let whole = keeper.backup();
    let leases = |keeper: &Keeper| {
        files_below(&keeper.region("eu"), &|path| path.to_string_lossy().contains("/lease/")).len()
    };
    assert_eq!(leases(&keeper), 0, "the lease of a backup that ended is gone");
    let backups = |region: &str| -> Vec<String> {
        let folders = fs::read_dir(find(&keeper, region, "backup")).unwrap();
        let mut names: Vec<_> =
            folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    // A slow one, so that it is surely killed in the middle.
    let log = folder.path().join("backup.log");
    let mut backup = Spawned::start(keeper.command(&["backup", "--max-rate", "4096"]), &log);
    wait_until("a part of the backup", || {
        assert!(backup.exited().is_none(), "{}", backup.log());
        ["eu", "us"].iter().all(|region| backups(region).len() == 2) && leases(&keeper) > 0
    });
    backup.kill9();
    let all = backups("eu");
    let dead = all.iter().find(|label| **label != whole).unwrap();
    assert_eq!(labels(&keeper), std::slice::from_ref(&whole));
    // It may still live, for all that another process knows.
    let second = keeper.backup();
    assert!(backups("eu").contains(dead) && backups("us").contains(dead));
    for region in ["eu", "us"] {
        grow_old(&keeper, region, dead);
        assert_eq!(backups(region).len(), 3);
    }
    let third = keeper.backup();
    // Labels of one second do not sort by time.
    let mut expected = [whole.clone(), second, third];
    expected.sort();
    for region in ["eu", "us"] {
        assert_eq!(backups(region), expected, "{region}");
    }
    assert_eq!(leases(&keeper), 0);
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &["--backup", &whole]);
    copy.wait_until_writable();
    keeper.stop();
}

// Surely in the middle: the store is too slow for more.
#[test]
fn a_backup_that_is_killed_halfway_is_not_listed() {
    let folder = Folder::new();
    let s3 = S3Server::start(&folder);
    let proxy = Proxy::http(s3.port());
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.write_bulk(20);
    let region = S3Server::region_at("ap", "prod", proxy.port());
    let mut keeper = Keeper::with(&folder, &server.conninfo(), &region);
    keeper.start();
    keeper.wait_stored(&server, &["ap"]);
    proxy.set(Fault::Throttle(1_000_000));
    let passed = proxy.passed();
    let log = folder.path().join("backup.log");
    let mut backup = Spawned::start(keeper.command(&["backup"]), &log);
    wait_until("a part of the backup", || {
        assert!(backup.exited().is_none(), "{}", backup.log());
        proxy.passed() > passed + (1 << 20)
    });
    backup.kill9();
    proxy.set(Fault::None);
    assert_eq!(labels(&keeper), Vec::<String>::new());
    let output = keeper
        .run(&["restore", "--pgdata", folder.path().join("none").to_str().unwrap()])
        .expect(4);
    assert!(output.stderr.contains("no backup"), "{}", output.stderr);
    let label = keeper.backup();
    assert_eq!(labels(&keeper), [label]);
}
