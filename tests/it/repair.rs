//! `pgkeep repair`: every region holds what any region holds, and can be restored from alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pgkeep::repo::PieceName;

use crate::support::{
    Folder, Keeper, S3Server, Server, ServerOptions, Spawned, files_below, user_command, wait_until,
};

const CONTENT: &str = "SELECT md5(string_agg(t::text, '' ORDER BY n, text)) FROM t";
/// Hardly compressible: packs of several parts, and more than one segment of WAL.
const BULKY: &str = "CREATE TABLE t AS SELECT n, encode(sha512((n || 'x')::bytea), 'hex') || \
                     encode(sha512((n || 'y')::bytea), 'hex') AS text FROM generate_series(1, 120000) n";

/// Everything in a local region but the archivers' last words.
fn objects(region: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let of_archive = |path: &Path| !path.to_string_lossy().contains("/alive/");
    let files = files_below(region, &of_archive);
    let named = |file: PathBuf| {
        let name = file.strip_prefix(region).unwrap().to_owned();
        (name, fs::read(&file).unwrap())
    };
    let mut objects: BTreeMap<PathBuf, Vec<u8>> = files.into_iter().map(named).collect();
    // Small pieces that a larger one covers may stand for a moment more, or not.
    let piece = |name: &PathBuf| PieceName::parse(&name.file_name()?.to_string_lossy());
    let pieces: Vec<PieceName> = objects.keys().filter_map(piece).collect();
    let is_covered =
        |name: &PathBuf| piece(name).is_some_and(|small| pieces.iter().any(|p| p.covers(&small)));
    objects.retain(|name, _| !is_covered(name));
    objects
}

fn assert_alike(one: &BTreeMap<PathBuf, Vec<u8>>, other: &BTreeMap<PathBuf, Vec<u8>>) {
    let names = |all: &BTreeMap<PathBuf, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(one), names(other));
    for (name, content) in one {
        assert!(other[name] == *content, "{} differs", name.display());
    }
}

fn flip_a_bit(file: &Path) {
    let mut content = fs::read(file).unwrap();
    let middle = content.len() / 3;
    content[middle] ^= 4;
    fs::write(file, content).unwrap();
}

fn named(region: &Path, part: &str) -> Vec<PathBuf> {
    let found = files_below(region, &|path: &Path| path.to_string_lossy().contains(part));
    assert!(!found.is_empty(), "nothing has {part} in its name");
    found
}

/// A cluster in local regions, with a backup and WAL behind it; server and sidecar are stopped.
fn archive(folder: &Folder, regions: &[&str]) -> (Keeper, String) {
    let mut server = Server::new(folder, 17, &ServerOptions::default());
    server.sql(BULKY);
    let mut keeper = Keeper::new(folder, &server, regions);
    keeper.start();
    keeper.backup();
    server.sql(
        "INSERT INTO t SELECT n, sha512((n || 'z')::bytea)::text FROM generate_series(1, 150000) n",
    );
    let content = server.sql(CONTENT);
    keeper.wait_archived(&server, regions);
    keeper.stop();
    server.stop();
    (keeper, content)
}

fn assert_restores(folder: &Folder, keeper: &Keeper, region: &str, content: &str) {
    let name = format!("from-{region}");
    let mut copy = keeper.restore_and_start(folder, 17, &name, &["--region", region]);
    copy.wait_until_writable();
    assert_eq!(copy.sql(CONTENT), content, "restored from {region}");
}

#[test]
fn a_region_that_lost_everything_is_filled_once_it_is_named() {
    let folder = Folder::new();
    let (keeper, content) = archive(&folder, &["eu", "us"]);
    let healthy = objects(&keeper.region("eu"));
    keeper.run(&["repair"]).expect(0);
    fs::remove_dir_all(keeper.region("us").join("orders")).unwrap();
    let output = keeper.run(&["repair"]).expect(7);
    assert!(output.stdout.contains("--new-region us"), "{}", output.stdout);
    let report = keeper.run(&["repair", "--region", "us", "--dry-run", "--json"]).expect(7).json();
    let planned = &report["lineages"][0]["regions"][1];
    assert_eq!(planned["state"], "lacking");
    assert_eq!(planned["copied"]["backup"]["objects"], 1);
    assert!(objects(&keeper.region("us")).is_empty(), "a dry run wrote something");
    let report = keeper.run(&["repair", "--new-region", "us", "--json"]).expect(0).json();
    let region = &report["lineages"][0]["regions"][1];
    assert_eq!(region["state"], "whole");
    // What was announced is what was done.
    assert_eq!(region["copied"], planned["copied"]);
    assert_alike(&objects(&keeper.region("us")), &healthy);
    assert_restores(&folder, &keeper, "us", &content);
    // A folder that does not exist is never made.
    fs::rename(keeper.region("us"), folder.path().join("elsewhere")).unwrap();
    keeper.run(&["repair", "--region", "us"]).expect(7);
    assert!(!keeper.region("us").exists());
}

#[test]
fn what_was_deleted_or_damaged_here_and_there_comes_from_whoever_has_it() {
    let folder = Folder::new();
    let (keeper, content) = archive(&folder, &["eu", "us", "asia"]);
    let healthy = objects(&keeper.region("eu"));
    let regions = ["eu", "us", "asia"].map(|name| keeper.region(name));
    // Every object is whole in one region at least.
    for (index, name) in healthy.keys().enumerate() {
        let hurt = &regions[index % 2];
        match name.to_string_lossy().ends_with("lineage.json") {
            true => {}
            false if index % 4 < 2 => fs::remove_file(hurt.join(name)).unwrap(),
            false => flip_a_bit(&hurt.join(name)),
        }
    }
    let piece = named(&regions[2], "/wal/").pop().unwrap();
    let cut = fs::read(&piece).unwrap();
    let elsewhere = piece.strip_prefix(&regions[2]).unwrap();
    if fs::read(regions[0].join(elsewhere)).is_ok_and(|copy| copy == cut) {
        fs::write(&piece, &cut[..cut.len() / 2]).unwrap();
    }
    let before: Vec<_> = regions.iter().map(|region| objects(region)).collect();
    keeper.run(&["repair", "--deep", "--dry-run"]).expect(7);
    for (region, before) in regions.iter().zip(&before) {
        assert_alike(&objects(region), before);
    }
    let report = keeper.run(&["repair", "--deep", "--json"]).expect(0).json();
    let damaged = report["lineages"][0]["damaged"].as_array().unwrap();
    assert!(damaged.len() > 2, "{damaged:?}");
    assert!(damaged.iter().all(|object| object["outcome"] == "replaced"), "{damaged:?}");
    for region in &regions {
        assert_alike(&objects(region), &healthy);
    }
    let again = keeper.run(&["repair", "--deep", "--json"]).expect(0).json();
    assert!(again["lineages"][0]["damaged"].as_array().unwrap().is_empty());
    assert_restores(&folder, &keeper, "us", &content);
}

#[test]
fn what_is_damaged_in_every_region_is_told_and_left() {
    let folder = Folder::new();
    let (keeper, _) = archive(&folder, &["eu", "us"]);
    for region in ["eu", "us"] {
        flip_a_bit(&named(&keeper.region(region), "pack-000000")[0]);
        flip_a_bit(&named(&keeper.region(region), "/wal/")[0]);
    }
    let before = objects(&keeper.region("eu"));
    // Listings alone do not tell.
    keeper.run(&["repair"]).expect(0);
    let report = keeper.run(&["repair", "--check", "--json"]).expect(5).json();
    let lost = report["lineages"][0]["lost_objects"].to_string();
    assert!(lost.contains("pack-000000"), "{report}");
    let hole = &report["lineages"][0]["wal_holes"];
    let damaged = report["lineages"][0]["damaged"].as_array().unwrap();
    assert_eq!(damaged.len(), 4, "{hole} {damaged:?}");
    assert!(damaged.iter().all(|object| object["outcome"] == "lost"), "{damaged:?}");
    assert_alike(&objects(&keeper.region("eu")), &before);
}

#[test]
fn a_backup_that_an_s3_region_missed_is_brought_there() {
    let folder = Folder::new();
    let mut s3 = S3Server::start(&folder);
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    server.sql(BULKY);
    let local = folder.make("region-eu");
    let regions = format!(
        "[[region]]\nname = \"eu\"\nurl = \"file://{}\"\n{}",
        local.display(),
        s3.region("us", "prod")
    );
    let mut keeper = Keeper::with(&folder, &server.conninfo(), &regions);
    keeper.start();
    keeper.wait_archived(&server, &["eu", "us"]);
    s3.kill9();
    let label = keeper.run(&["backup"]).expect(7).stdout.trim().to_owned();
    keeper.run(&["repair"]).expect(7);
    s3.restart();
    let content = server.sql(CONTENT);
    keeper.wait_archived(&server, &["eu", "us"]);
    // While the sidecar runs.
    let report = keeper.run(&["repair", "--json"]).expect(0).json();
    assert_eq!(report["lineages"][0]["regions"][1]["copied"]["backup"]["objects"], 1, "{report}");
    keeper.stop();
    server.stop();
    let listed = keeper.run(&["list", "--json", "--region", "us"]).expect(0).json();
    assert_eq!(listed["backups"][0]["label"], label.as_str());
    // Every byte there is what the backup says.
    keeper.run(&["repair", "--deep"]).expect(0);
    assert_restores(&folder, &keeper, "us", &content);
}

#[test]
fn a_repair_that_was_killed_leaves_nothing_wrong_and_goes_on() {
    let folder = Folder::new();
    let (keeper, content) = archive(&folder, &["eu", "us"]);
    let healthy = objects(&keeper.region("eu"));
    let us = keeper.region("us");
    for stage in ["/wal/", "pack-", "files.idx"] {
        fs::remove_dir_all(us.join("orders")).unwrap();
        let log = folder.path().join("repair.log");
        let mut repair = Spawned::start(keeper.command(&["repair", "--region", "us"]), &log);
        wait_until("the repair to begin", || {
            let begun = |path: &Path| path.to_string_lossy().contains(stage);
            !files_below(&us, &begun).is_empty() || repair.exited().is_some()
        });
        repair.kill9();
        let left = objects(&us);
        let has = |name: &str| left.keys().any(|path| path.to_string_lossy().ends_with(name));
        let packs = |all: &BTreeMap<PathBuf, Vec<u8>>| {
            all.keys().filter(|path| path.to_string_lossy().contains("pack-0")).count()
        };
        if has("backup.json") {
            assert!(has("files.idx") && has("backup_manifest"));
            assert_eq!(packs(&left), packs(&healthy), "a backup without its data");
        }
        if has("lineage.json") {
            assert!(has("backup.json"), "the region counts before it is whole");
        }
        keeper.run(&["repair", "--region", "us"]).expect(0);
    }
    // What an unfinished write has left beside does not count.
    let mut filled = objects(&us);
    filled.retain(|name, _| !name.to_string_lossy().contains('#'));
    assert_alike(&filled, &healthy);
    assert_restores(&folder, &keeper, "us", &content);
}

#[test]
fn two_histories_are_not_copied_across() {
    let folder = Folder::new();
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE t (n int, text text)");
    server.stop();
    let cloned = folder.path().join("clone");
    let copied = user_command("cp").arg("-a").arg(&server.data).arg(&cloned).status().unwrap();
    assert!(copied.success());
    server.start();
    let mut clone = Server::at(&folder, 17, &cloned);
    clone.configure("");
    clone.start();
    let elsewhere = Folder::new();
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    let mut other = Keeper::new(&elsewhere, &clone, &["us"]);
    keeper.start();
    other.start();
    server.sql("INSERT INTO t SELECT n, 'here' FROM generate_series(1, 1000) n");
    clone.sql("INSERT INTO t SELECT n, 'there' FROM generate_series(1, 1000) n");
    server.sql("SELECT pg_switch_wal()");
    clone.sql("SELECT pg_switch_wal()");
    server.sql("INSERT INTO t SELECT n, 'here' FROM generate_series(1, 1000) n");
    keeper.wait_archived(&server, &["eu"]);
    other.wait_archived(&clone, &["us"]);
    keeper.stop();
    other.stop();
    keeper.edit_config(
        "[http]",
        &format!(
            "[[region]]\nname = \"us\"\nurl = \"file://{}\"\n[http]",
            other.region("us").display()
        ),
    );
    let before = [objects(&keeper.region("eu")), objects(&other.region("us"))];
    let output = keeper.run(&["repair"]).expect(6);
    assert!(output.stdout.contains("DIVERGED"), "{}", output.stdout);
    keeper.run(&["repair", "--deep"]).expect(6);
    assert_alike(&objects(&keeper.region("eu")), &before[0]);
    assert_alike(&objects(&other.region("us")), &before[1]);
}
