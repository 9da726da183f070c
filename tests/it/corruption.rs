//! One flipped bit: the other region serves, and the damaged object is named.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Folder, Keeper, Server, ServerOptions, files_below};

fn flip_a_bit(file: &Path) {
    let mut content = fs::read(file).unwrap();
    let middle = content.len() / 3;
    content[middle] ^= 4;
    fs::write(file, content).unwrap();
}

/// A cluster in two regions, stopped, with its backup.
fn archive(folder: &Folder) -> (Keeper, String) {
    let mut server = Server::new(folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE t AS SELECT n, md5(n::text) AS text FROM generate_series(1, 20000) n");
    let mut keeper = Keeper::new(folder, &server, &["eu", "us"]);
    keeper.start();
    keeper.backup();
    server.sql("INSERT INTO t SELECT n, 'later' FROM generate_series(1, 1000) n");
    let content = server.sql("SELECT md5(string_agg(t::text, '' ORDER BY n, text)) FROM t");
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
    server.stop();
    (keeper, content)
}

fn round(find: impl Fn(&Path) -> bool) {
    let folder = Folder::new();
    let (keeper, content) = archive(&folder);
    let damaged: Vec<PathBuf> = files_below(&keeper.region("eu"), &find);
    assert!(!damaged.is_empty());
    for file in &damaged {
        flip_a_bit(file);
    }
    // Without a second region: integrity, and nothing that could start.
    let alone = folder.path().join("alone");
    let output =
        keeper.run(&["restore", "--pgdata", alone.to_str().unwrap(), "--region", "eu"]).expect(5);
    let named = |text: &str| {
        damaged.iter().any(|file| text.contains(&*file.file_name().unwrap().to_string_lossy()))
    };
    assert!(named(&output.stderr), "{}", output.stderr);
    assert!(!alone.join("global/pg_control").exists(), "a server could start on it");

    let data = folder.path().join("copy");
    let output = keeper.run(&["restore", "--pgdata", data.to_str().unwrap(), "--json"]).expect(0);
    let report = output.json();
    let objects = report["damaged_objects"].as_array().unwrap();
    let told = objects.iter().any(|object| {
        let text = object.as_str().unwrap();
        text.contains("eu") && named(text)
    });
    assert!(told, "the damaged object is not named: {objects:?}");
    let mut copy = Server::at(&folder, 17, &data);
    copy.configure("");
    copy.start();
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT md5(string_agg(t::text, '' ORDER BY n, text)) FROM t"), content);
    copy.check_integrity();
}

#[test]
fn a_flipped_bit_in_wal() {
    round(|path| path.to_string_lossy().contains("/wal/"));
}

#[test]
fn a_flipped_bit_in_a_pack() {
    round(|path| path.to_string_lossy().contains("pack-"));
}

#[test]
fn a_flipped_bit_in_the_file_index() {
    round(|path| path.ends_with("files.idx"));
}
