//! Backups by the clock, in the running sidecar.

use std::fs;

use crate::support::{Folder, Keeper, Server, ServerOptions, wait_until};

fn server(folder: &Folder, settings: &str) -> Server {
    let settings = settings.to_owned();
    Server::new(folder, 17, &ServerOptions { no_fsync: true, settings, ..ServerOptions::default() })
}

fn keeper(folder: &Folder, server: &Server, backup: &str) -> Keeper {
    let keeper = Keeper::new(folder, server, &["eu", "us"]);
    keeper.edit_config("[http]", &format!("[backup]\n{backup}\n[http]"));
    keeper
}

fn labels(keeper: &Keeper) -> Vec<String> {
    let listed = keeper.run(&["list", "--json"]);
    if listed.code != 0 {
        return Vec::new();
    }
    let backups = listed.json()["backups"].as_array().unwrap().clone();
    backups.iter().map(|backup| backup["label"].as_str().unwrap().to_owned()).collect()
}

// Also: the rate goes to the server, which logs the command.
#[test]
fn a_backup_that_was_missed_is_made_up_for_once() {
    let folder = Folder::new();
    let server = server(&folder, "log_replication_commands = on");
    let mut keeper = keeper(&folder, &server, "full = \"0 3 * * 0\"\nmax_rate = \"50MB\"");
    keeper.start();
    wait_until("the first backup", || {
        keeper.assert_runs();
        labels(&keeper).len() == 1
    });
    let first = labels(&keeper);
    wait_until("the outcome in the status", || {
        let status = keeper.status();
        status["last_attempt"]["label"] == first[0] && status["next_backup"]["time"].is_string()
    });
    let status = keeper.status();
    assert_eq!(status["next_backup"]["type"], "full");
    assert!(status["next_backup"]["time"].as_str().unwrap().contains("T03:00:00"), "{status:#}");
    let text = keeper.run(&["status"]).expect(0).stdout;
    assert!(text.contains("next backup: full") && !text.contains("overdue"), "{text}");
    assert!(server.log().contains("MAX_RATE 48828"), "{}", server.log());
    keeper.stop();
    // Another start finds that it was taken.
    keeper.start();
    wait_until("the next one in the status", || {
        keeper.assert_runs();
        keeper.status()["next_backup"]["time"].is_string()
    });
    let status = keeper.status();
    assert!(status["next_backup"]["time"].as_str() > status["time"].as_str(), "{status:#}");
    assert_eq!(labels(&keeper), first);
    // By hand, another rate.
    keeper.run(&["backup", "--max-rate", "1000000"]).expect(0);
    assert!(server.log().contains("MAX_RATE 1000000"), "{}", server.log());
    keeper.stop();
}

#[test]
fn a_failed_backup_is_an_alarm_until_one_succeeds() {
    let folder = Folder::new();
    let server = server(&folder, "");
    // The server refuses a backup while a file cannot be read.
    let wall = server.data.join("base/unreadable");
    fs::write(&wall, "x").unwrap();
    fs::set_permissions(&wall, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let mut keeper = keeper(&folder, &server, "full = \"0 3 * * 0\"");
    keeper.start();
    let alarms = |keeper: &Keeper| keeper.run(&["status", "--json"]).json()["alarms"].to_string();
    wait_until("the alarm", || {
        keeper.assert_runs();
        let output = keeper.run(&["status", "--json"]);
        output.code == 0 && output.json()["alarms"].to_string().contains("full backup failed")
    });
    let text = keeper.run(&["status"]).expect(0).stdout;
    assert!(text.contains("FAILED") && text.contains("overdue"), "{text}");
    fs::remove_file(&wall).unwrap();
    wait_until("the backup", || {
        keeper.assert_runs();
        labels(&keeper).len() == 1
    });
    wait_until("the end of the alarm", || !alarms(&keeper).contains("full backup failed"));
    keeper.stop();
}

#[test]
fn a_hot_spare_takes_no_backups_before_it_takes_over() {
    let folder = Folder::new();
    let server = server(&folder, "");
    let mut first = keeper(&folder, &server, "wal_timeout = \"5m\"");
    first.start();
    first.wait_archived(&server, &["eu", "us"]);
    let mut spare = first.second(&server, &server, "spare");
    spare.edit_config("wal_timeout = \"5m\"", "full = \"0 3 * * 0\"");
    spare.start();
    wait_until("the spare to wait", || {
        spare.ask_sidecar(std::time::Duration::from_secs(5)).is_some_and(|status| {
            status["trouble"].as_str().is_some_and(|trouble| trouble.contains("is held by"))
        })
    });
    let status = spare.ask_sidecar(std::time::Duration::from_secs(5)).unwrap();
    assert_eq!(status["next_backup"], serde_json::Value::Null);
    assert_eq!(status["last_attempt"], serde_json::Value::Null);
    assert_eq!(labels(&first), Vec::<String>::new());
    first.stop();
    wait_until("the backup of the spare", || {
        spare.assert_runs();
        labels(&spare).len() == 1
    });
    spare.stop();
}

#[test]
fn a_schedule_that_is_none_is_an_error_of_the_configuration() {
    let folder = Folder::new();
    let server = server(&folder, "");
    let keeper = keeper(&folder, &server, "full = \"0 3 * *\"");
    let output = keeper.run(&["run"]).expect(3);
    for part in ["pgkeep.toml", "full = ", "five fields"] {
        assert!(output.stderr.contains(part), "{}", output.stderr);
    }
    keeper.edit_config("full = \"0 3 * *\"", "full = \"\"");
    let checked = keeper.run(&["check"]).expect(0).stdout;
    assert!(checked.contains("ok       backup schedule: nothing is scheduled"), "{checked}");
    keeper.edit_config("full = \"\"", "full = \"0 3 * * 0\"");
    let checked = keeper.run(&["check"]).expect(0).stdout;
    assert!(checked.contains("full at \"0 3 * * 0\" (UTC)"), "{checked}");
}
