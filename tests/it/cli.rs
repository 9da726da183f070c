//! The command line: exit codes, JSON, what people read.

use std::fs;

use crate::support::{Folder, Keeper, Server, ServerOptions, user_command};

#[test]
fn init_writes_a_configuration_that_works() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let mut keeper = Keeper::new(&folder, &server, &["unused"]);
    keeper.config = folder.path().join("made/pgkeep.toml");
    folder.make("made");
    let region = format!("eu=file://{}/archive/eu", folder.path().display());
    let conninfo = server.conninfo();
    let arguments = ["init", "--name", "shop", "--conninfo", &conninfo, "--region", &region];
    let output = keeper.run(&arguments).expect(0);
    assert!(output.stdout.contains("ok       region eu"), "{}", output.stdout);
    assert!(output.stdout.contains("write, read, list and delete work"), "{}", output.stdout);
    assert!(folder.path().join("archive/eu").is_dir());
    let again = keeper.run(&arguments).expect(1);
    assert!(again.stderr.contains("--force"), "{}", again.stderr);
    keeper.edit_config("127.0.0.1:9847", "");
    keeper.backup();
    let status = keeper.status();
    assert_eq!(status["source"], "regions");
    assert_eq!(status["cluster"]["name"], "shop");
    assert!(status["recovery_window"]["latest_lsn"].is_string(), "{status:#}");
}

#[test]
fn errors_have_the_exit_codes_of_the_contract() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.run(&["no-such-command"]).expect(2);
    keeper.run(&["list", "--no-such-option"]).expect(2);
    let output = keeper.run(&["list"]).expect(1);
    assert!(output.stderr.contains("hold no archive"), "{}", output.stderr);
    let output = keeper.run(&["list", "--region", "mars"]).expect(2);
    assert!(output.stderr.contains("mars"), "{}", output.stderr);
    fs::remove_dir(keeper.region("eu")).unwrap();
    let output = keeper.run(&["backup"]).expect(3);
    assert!(
        output.stderr.contains("does not exist") && output.stderr.contains("mounted"),
        "{}",
        output.stderr
    );
    keeper.edit_config("flush_interval", "flush_intervall");
    let output = keeper.run(&["run"]).expect(3);
    assert!(
        output.stderr.contains("flush_intervall") && output.stderr.contains("pgkeep.toml"),
        "{}",
        output.stderr
    );
}

// CASES 16: a clone's or another cluster's WAL in production's prefix.
#[test]
fn another_cluster_is_refused_by_name() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    let elsewhere = Folder::new();
    let stranger = Server::new(&elsewhere, 17, &ServerOptions::default());
    keeper.edit_config(&server.conninfo(), &stranger.conninfo());
    let output = keeper.run(&["run"]).expect(6);
    let known = server.sql("SELECT system_identifier FROM pg_control_system()");
    assert!(
        output.stderr.contains(&known) && output.stderr.contains("--new-lineage"),
        "{}",
        output.stderr
    );
    keeper.start_with(&["--new-lineage"]);
    keeper.wait_archived(&stranger, &["eu"]);
    keeper.stop();
    let output = keeper.run(&["list"]).expect(2);
    assert!(output.stderr.contains("--lineage"), "{}", output.stderr);
    keeper.run(&["list", "--lineage", &known]).expect(0);
}

// CASES 14 and 16: the clone has the right system identifier, and other WAL.
#[test]
fn a_clone_that_diverged_is_refused_and_nothing_is_overwritten() {
    let folder = Folder::new();
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    server.sql("CREATE TABLE t (n int)");
    server.stop();
    let data = folder.path().join("clone");
    let copied = user_command("/bin/cp").arg("-a").arg(&server.data).arg(&data).status().unwrap();
    assert!(copied.success());
    server.start();
    keeper.start();
    server.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    let end = keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    server.stop();
    let mut clone = Server::at(&folder, 17, &data);
    clone.configure("");
    clone.start();
    clone.sql("INSERT INTO t SELECT generate_series(5000, 9000)");
    keeper.edit_config(&server.conninfo(), &clone.conninfo());
    let output = keeper.run(&["run"]).expect(6);
    assert!(output.stderr.contains("clone"), "{}", output.stderr);
    assert!(keeper.frontier("eu") >= end);
    // The rightful server goes on.
    clone.stop();
    keeper.edit_config(&clone.conninfo(), &server.conninfo());
    server.start();
    keeper.start();
    server.sql("INSERT INTO t VALUES (0)");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
}

#[test]
fn a_restore_refuses_a_directory_in_use() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.backup();
    let output = keeper.run(&["restore", "--pgdata", server.data.to_str().unwrap()]).expect(1);
    assert!(output.stderr.contains("postmaster.pid"), "{}", output.stderr);
    assert_eq!(server.sql("SELECT 1"), "1");
}

#[test]
fn status_is_the_same_contract_from_sidecar_and_regions() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    keeper.backup();
    keeper.wait_archived(&server, &["eu", "us"]);
    let live = keeper.status();
    assert_eq!(live["source"], "sidecar");
    assert_eq!(live["streaming"], true);
    assert_eq!(live["objectives"]["rpo_met"], true);
    let stored = keeper.run(&["status", "--json", "--from-regions"]).expect(0).json();
    assert_eq!(stored["source"], "regions");
    for status in [&live, &stored] {
        assert_eq!(status["regions"].as_array().unwrap().len(), 2);
        assert_eq!(status["regions"][0]["name"], "eu");
        assert_eq!(status["regions"][0]["state"], "healthy", "{status:#}");
        assert_eq!(status["cluster"]["timeline"], 1);
        assert_eq!(status["gaps"].as_array().unwrap().len(), 0);
        assert_eq!(status["last_backup"]["type"], "full");
        assert_eq!(status["objectives"]["rto_met"], serde_json::Value::Null);
    }
    let text = keeper.run(&["status"]).expect(0).stdout;
    assert!(text.contains("recovery window: 2") && text.contains("RPO 15m 0s met"), "{text}");
    keeper.stop();
}
