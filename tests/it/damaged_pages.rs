//! Pages with wrong checksums on the server's disk: named, or refused, as the policy says.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::support::{Folder, Keeper, Server, ServerOptions, files_below, wait_until};

/// Breaks a page of a table while the server is stopped; the file's path in the data directory.
fn damage_a_page(server: &mut Server, table: &str, block: u64) -> String {
    server.sql("CHECKPOINT");
    let path = server.sql(&format!("SELECT pg_relation_filepath('{table}')"));
    server.stop();
    let file = fs::OpenOptions::new().read(true).write(true).open(server.data.join(&path)).unwrap();
    let place = block * 8192 + 5000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1], place).unwrap();
    drop(file);
    server.start();
    path
}

fn labels(keeper: &Keeper) -> usize {
    keeper.run(&["list", "--json"]).expect(0).json()["backups"].as_array().unwrap().len()
}

fn damage_is_told(major: u32) {
    let folder = Folder::new();
    let mut server =
        Server::new(&folder, major, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.sql("CREATE TABLE good AS SELECT n FROM generate_series(1, 5000) n");
    server.sql("CREATE TABLE bad AS SELECT n FROM generate_series(1, 5000) n");
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.edit_config("[http]", "[backup]\non_checksum_failure = \"keep\"\n[http]");

    // A healthy server: not a word.
    let output = keeper.run(&["backup"]).expect(0);
    assert!(!output.stderr.contains("checksum"), "{}", output.stderr);
    let listed = keeper.run(&["list"]).expect(0).stdout;
    assert!(!listed.contains("checksum") && !listed.contains("DAMAGE"), "{listed}");

    let file = damage_a_page(&mut server, "bad", 3);
    let named = |text: &str| text.contains(&format!("/{file}\"")) && text.contains("block 3");
    let good = server.sql("SELECT pg_relation_filepath('good')");

    // Kept, and said everywhere.
    let output = keeper.run(&["backup", "--json"]).expect(5);
    assert!(named(&output.stderr), "{}", output.stderr);
    let report = output.json();
    let failures = report["checksum_failures"].as_array().unwrap();
    assert!(named(failures[0].as_str().unwrap()), "{failures:?}");
    let label = report["label"].as_str().unwrap();
    let listed = keeper.run(&["list"]).expect(0).stdout;
    let line = listed.lines().find(|line| line.contains("DAMAGE")).unwrap();
    assert!(line.contains(label) && named(line), "{listed}");
    assert!(!listed.contains(&good), "{listed}");
    assert_eq!(labels(&keeper), 2);
    // Both regions have it, and it can be restored.
    assert_eq!(report["regions"].as_array().unwrap().len(), 2);
    let copy = folder.path().join("copy");
    keeper.run(&["restore", "--pgdata", copy.to_str().unwrap(), "--backup", label]).expect(0);

    // Refused: no backup, and nothing of it in any region.
    keeper.edit_config("\"keep\"", "\"fail\"");
    let before = files_below(folder.path(), &|path| path.to_string_lossy().contains("/backup/"));
    let output = keeper.run(&["backup"]).expect(5);
    assert_eq!(output.stdout, "");
    let error = output.stderr.lines().find(|line| line.contains("on_checksum_failure")).unwrap();
    assert!(named(error), "{}", output.stderr);
    assert_eq!(labels(&keeper), 2);
    let after = files_below(folder.path(), &|path| path.to_string_lossy().contains("/backup/"));
    assert_eq!(after, before);
    keeper.start();
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
}

#[test]
fn damaged_pages_are_named_or_refused_on_13() {
    damage_is_told(13);
}

#[test]
fn damaged_pages_are_named_or_refused_on_18() {
    damage_is_told(18);
}

// Nobody reads the log of a backup that was taken at night.
#[test]
fn damaged_pages_in_a_scheduled_backup_are_an_alarm() {
    let folder = Folder::new();
    let mut server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.sql("CREATE TABLE bad AS SELECT n FROM generate_series(1, 5000) n");
    let file = damage_a_page(&mut server, "bad", 2);
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.edit_config("[http]", "[backup]\nfull = \"0 3 * * 0\"\n[http]");
    keeper.start();
    let mut alarms = String::new();
    wait_until("the alarm", || {
        keeper.assert_runs();
        // Before the sidecar listens and the region has anything, `status` has nobody to ask.
        let output = keeper.run(&["status", "--json"]);
        output.code == 0 && {
            alarms = output.json()["alarms"].to_string();
            alarms.contains("checksum")
        }
    });
    assert!(alarms.contains(&file) && alarms.contains("block 2"), "{alarms}");
    wait_until("the backup", || keeper.status()["last_attempt"]["label"].is_string());
    keeper.stop();
}
