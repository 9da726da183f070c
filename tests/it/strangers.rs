//! Split brain: clones, and two archivers of one cluster (invariant I8).

use std::time::Duration;

use pgkeep::wal::TimelineId;

use crate::support::{Content, Fault, Folder, Keeper, Proxy, Server, ServerOptions, wait_until};

const REGIONS: [&str; 2] = ["eu", "us"];
const FIRST: TimelineId = TimelineId(1);

/// A server that is archived, and a copy of it, not started, that parted from it just now.
fn original_and_clone(folder: &Folder) -> (Server, Server, Keeper) {
    let mut server =
        Server::new(folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.sql("CREATE TABLE t (n int)");
    let mut keeper = Keeper::new(folder, &server, &REGIONS);
    keeper.start();
    keeper.backup();
    keeper.wait_stored(&server, &REGIONS);
    server.stop();
    let data = folder.path().join("clone");
    server.copy_to(&data);
    server.start();
    // Its archiver is there first.
    wait_until("the archiver to be back", || {
        keeper.assert_runs();
        keeper.ask_sidecar(Duration::from_secs(5)).unwrap_or_default()["streaming"] == true
    });
    let clone = Server::at(folder, 17, &data);
    clone.configure("");
    (server, clone, keeper)
}

fn rows_of_copy(folder: &Folder, keeper: &Keeper, region: &str) -> String {
    let name = format!("from-{region}");
    let mut copy = keeper.restore_and_start(folder, 17, &name, &["--region", region]);
    copy.wait_until_writable();
    copy.sql("SELECT n FROM t ORDER BY n")
}

// CASES 14 and 16: the clone has the right system identifier and timeline, and other WAL.
#[test]
fn a_clone_is_refused_while_the_original_goes_on() {
    let folder = Folder::new();
    let (server, mut clone, mut keeper) = original_and_clone(&folder);
    server.sql("INSERT INTO t VALUES (1)");
    keeper.wait_stored(&server, &REGIONS);
    clone.start();
    // More than the original wrote: the clone is not merely behind.
    clone.sql("INSERT INTO t SELECT generate_series(100, 5000)");
    let id = server.system_id();
    let before = REGIONS.map(|region| Content::of(&keeper, region, id).objects());
    let stranger = keeper.second(&server, &clone, "stranger");
    let output = stranger.run(&["run"]).expect(6);
    assert!(output.stderr.contains("timeline 1"), "{}", output.stderr);
    for (region, before) in REGIONS.iter().zip(before) {
        let after = Content::of(&keeper, region, id).objects();
        let changed = before.iter().find(|(key, size)| after.get(*key).is_some_and(|s| s != *size));
        assert_eq!(changed, None, "{region}");
    }
    server.sql("INSERT INTO t VALUES (2)");
    keeper.wait_stored(&server, &REGIONS);
    keeper.stop();
    for region in REGIONS {
        assert_eq!(rows_of_copy(&folder, &keeper, region), "1\n2", "from {region}");
    }
}

// Both were archived from the moment on at which they parted, so that there was no overlap to
// compare, and none of them came second: it is found out when their WAL meets in a region, and both
// say so. Which one is the database only its operators know.
#[test]
fn two_servers_that_part_while_both_are_archived_are_found_out() {
    let folder = Folder::new();
    let (server, mut clone, mut keeper) = original_and_clone(&folder);
    clone.start();
    let mut stranger = keeper.second(&server, &clone, "stranger");
    stranger.start();
    keeper.wait_stored(&server, &REGIONS);
    let mut number = 0;
    let says_so = |keeper: &mut Keeper| {
        keeper.assert_runs();
        let status = keeper.ask_sidecar(Duration::from_secs(5)).unwrap_or_default();
        let alarms = status["alarms"].as_array().cloned().unwrap_or_default();
        let mut texts = alarms.iter().filter_map(|alarm| alarm.as_str());
        texts.any(|alarm| alarm.contains("somebody else archives different WAL"))
    };
    wait_until("both to say so", || {
        number += 1;
        server.sql(&format!("INSERT INTO t VALUES ({number})"));
        clone.sql(&format!("INSERT INTO t VALUES ({})", number + 1_000_000));
        says_so(&mut keeper) && says_so(&mut stranger)
    });
    // Both go on; what either stored is there under a name of its own.
    server.sql("INSERT INTO t VALUES (0)");
    keeper.wait_stored(&server, &REGIONS);
    let id = server.system_id();
    let before = REGIONS.map(|region| Content::of(&keeper, region, id).objects());
    stranger.kill9();
    clone.stop();
    keeper.wait_stored(&server, &REGIONS);
    for (region, before) in REGIONS.iter().zip(before) {
        let after = Content::of(&keeper, region, id).objects();
        let changed = before.iter().find(|(key, size)| {
            !key.contains("alive/") && after.get(*key).is_some_and(|now| now != *size)
        });
        assert_eq!(changed, None, "{region}");
    }
    keeper.stop();
}

// CASES 20: the second one waits, says for whom, and takes over when the first is killed.
#[test]
fn a_hot_spare_takes_over_and_nothing_is_lost() {
    let folder = Folder::new();
    let settings = "wal_keep_size = 512MB".to_owned();
    let server = Server::new(
        &folder,
        17,
        &ServerOptions { settings, no_fsync: true, ..ServerOptions::default() },
    );
    server.sql("CREATE TABLE t (n int)");
    let mut active = Keeper::new(&folder, &server, &REGIONS);
    let mut spare = active.second(&server, &server, "spare");
    active.start();
    active.backup();
    active.wait_stored(&server, &REGIONS);
    let mut expected = Vec::new();
    for round in 0..3 {
        spare.start();
        let said = spare.log().len();
        wait_until("the spare to wait", || {
            spare.assert_runs();
            let status = spare.ask_sidecar(Duration::from_secs(5)).unwrap_or_default();
            status["streaming"] == false
                && status["trouble"].as_str().is_some_and(|trouble| trouble.contains("held by"))
        });
        let log = spare.log();
        assert!(log[said..].contains("pgkeep") && log[said..].contains("held by"), "{log}");
        server.write_bulk(3);
        server.sql(&format!("INSERT INTO t VALUES ({round})"));
        expected.push(round.to_string());
        active.kill9();
        server.sql(&format!("INSERT INTO t VALUES ({})", round + 100));
        expected.push((round + 100).to_string());
        spare.wait_stored(&server, &REGIONS);
        std::mem::swap(&mut active, &mut spare);
    }
    active.stop();
    active.assert_same_wal(server.system_id(), FIRST, &REGIONS);
    expected.sort_by_key(|n| n.parse::<i32>().unwrap());
    assert_eq!(rows_of_copy(&folder, &active, "us"), expected.join("\n"));
}

// CASES 20: a slot that is active for a client whose host vanished without a word.
#[test]
fn a_hot_spare_takes_over_from_a_host_that_vanished() {
    let folder = Folder::new();
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    server.sql("CREATE TABLE t (n int)");
    let proxy = Proxy::tcp(server.port);
    let mut active = Keeper::new(&folder, &server, &REGIONS);
    let mut spare = active.second(&server, &server, "spare");
    let through = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", proxy.port());
    active.edit_config(&server.conninfo(), &through);
    active.start();
    active.backup();
    active.wait_stored(&server, &REGIONS);
    spare.start();
    let streams = |keeper: &Keeper| {
        let status = keeper.ask_sidecar(Duration::from_secs(5)).unwrap_or_default();
        status["streaming"] == true
    };
    proxy.set(Fault::Hang);
    server.sql("INSERT INTO t VALUES (1)");
    wait_until("the spare to take over", || {
        spare.assert_runs();
        streams(&spare)
    });
    spare.wait_stored(&server, &REGIONS);
    // The first one is back, and now it waits.
    proxy.set(Fault::None);
    server.sql("INSERT INTO t VALUES (2)");
    wait_until("the first one to wait", || {
        active.assert_runs();
        let status = active.ask_sidecar(Duration::from_secs(5)).unwrap_or_default();
        status["trouble"].as_str().is_some_and(|trouble| trouble.contains("held by"))
    });
    spare.wait_stored(&server, &REGIONS);
    assert!(streams(&spare));
    active.kill9();
    spare.stop();
    spare.assert_same_wal(server.system_id(), FIRST, &REGIONS);
    assert_eq!(rows_of_copy(&folder, &spare, "us"), "1\n2");
}
