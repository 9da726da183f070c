//! Replication slots: on the primary and its standbys, in `slot`, `check` and `status`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pgkeep::pg::{
    ConnInfo, Connector, HostSpec, PgError, SlotFacts, Surroundings, WalStream,
    keep_slots_on_standbys,
};
use pgkeep::wal::{Lsn, TimelineId};
use rustix::process::Signal;

use crate::support::{Folder, Keeper, S3Server, Server, ServerOptions, user_command, wait_until};

/// A streaming standby of a server: by `pg_basebackup` where its major has it, else a copy.
fn standby_of(folder: &Folder, primary: &mut Server, name: &str) -> Server {
    let data = folder.path().join(name);
    if primary.has("pg_basebackup") {
        let mut backup = user_command(primary.bin("pg_basebackup"));
        backup.args(["-U", "postgres", "-c", "fast", "-D"]).arg(&data);
        backup.arg("-h").arg(&primary.socket).arg("-p").arg(primary.port.to_string());
        assert!(backup.current_dir(folder.path()).status().unwrap().success());
    } else {
        primary.stop();
        let copied = user_command("/bin/cp").arg("-a").arg(&primary.data).arg(&data).status();
        assert!(copied.unwrap().success());
        primary.start();
    }
    follow(&data);
    let mut standby = Server::at(folder, primary.major, &data);
    let conninfo = format!("host={} port={} user=postgres", primary.socket.display(), primary.port);
    standby.configure(&format!("primary_conninfo = '{conninfo} application_name={name}'"));
    standby.start();
    standby
}

fn follow(data: &Path) {
    let signal = data.join("standby.signal");
    assert!(user_command("/usr/bin/touch").arg(signal).status().unwrap().success());
}

/// A connection string with both.
fn both(one: &Server, other: &Server) -> String {
    format!(
        "host={},{} port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
        one.socket.display(),
        other.socket.display(),
        one.port,
        other.port
    )
}

fn wait_replayed(primary: &Server, standby: &Server) -> Lsn {
    let end: Lsn = primary.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
    wait_until("the standby to replay", || {
        let replayed = standby.sql("SELECT coalesce(pg_last_wal_replay_lsn(), '0/0')");
        replayed.parse::<Lsn>().unwrap() >= end
    });
    end
}

/// Passes over the only other host, from tests that are not asynchronous.
struct Passes {
    runtime: tokio::runtime::Runtime,
    connector: Connector,
    primary: HostSpec,
    system_id: u64,
}

impl Passes {
    fn new(conninfo: &str) -> Passes {
        let connector =
            Connector::new(ConnInfo::parse(conninfo, &Surroundings::from_process()).unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (primary, system_id) = runtime.block_on(async {
            let sql = connector.first_sql().await.unwrap();
            (sql.host().clone(), sql.system_id().await.unwrap())
        });
        Passes { runtime, connector, primary, system_id }
    }

    fn pass(&self, durable: Lsn) -> Result<SlotFacts, PgError> {
        let Passes { connector, primary, system_id, .. } = self;
        let passes = keep_slots_on_standbys(connector, primary, *system_id, "pgkeep", durable);
        let mut outcomes = self.runtime.block_on(passes);
        assert_eq!(outcomes.len(), 1);
        outcomes.remove(0).1
    }

    /// Streams from the standby's slot.
    fn hold(&self, start: Lsn) -> WalStream {
        let standby = self.connector.other_hosts(&self.primary).remove(0);
        self.runtime.block_on(async {
            let mut connection = self.connector.connect_any_role(&standby, &[]).await.unwrap();
            connection.identify_system().await.unwrap();
            let started =
                connection.start_replication(Some("pgkeep"), start, TimelineId::FIRST).await;
            started.map_err(|(error, _)| error).unwrap().expect("a stream")
        })
    }
}

#[test]
fn a_slot_on_a_standby_is_made_and_follows_the_archive() {
    for major in [13, 15, 17, 18] {
        let folder = Folder::new();
        let mut primary = Server::new(&folder, major, &ServerOptions::default());
        let standby = standby_of(&folder, &mut primary, "node2");
        slot_follows(&primary, &standby);
        assert_eq!(standby.sql("SELECT count(*) FROM pg_replication_slots"), "1", "{major}");
    }
}

fn slot_follows(primary: &Server, standby: &Server) {
    let mut passes = Passes::new(&both(primary, standby));
    wait_replayed(primary, standby);
    let begin = passes.pass(Lsn::INVALID).unwrap().restart_lsn.expect("it keeps WAL at once");
    primary.sql("CREATE TABLE t AS SELECT generate_series(1, 50000) AS n");
    let durable = wait_replayed(primary, standby);
    primary.sql("INSERT INTO t SELECT generate_series(1, 50000)");
    let end = wait_replayed(primary, standby);
    assert!(begin < durable && durable < end);
    let moved = passes.pass(durable).unwrap();
    assert_eq!(moved.restart_lsn, Some(durable));
    assert!(moved.retained_bytes().unwrap() > 0);
    // It never goes back, and never beyond what the standby has.
    assert_eq!(passes.pass(begin).unwrap().restart_lsn, Some(durable));
    let ahead = passes.pass(end.advance(1 << 30)).unwrap().restart_lsn.unwrap();
    assert!(ahead >= end && ahead < end.advance(1 << 20), "{ahead}");
    // Whoever streams from it moves it.
    let stream = passes.hold(ahead);
    let held = passes.pass(ahead.advance(1)).unwrap();
    assert!(held.held_by().is_some_and(|holder| holder.contains("pgkeep")), "{held:?}");
    drop(stream);
    wait_until("the slot to be free", || {
        standby.sql("SELECT active FROM pg_replication_slots") == "f"
    });
    // One that keeps no WAL is worth nothing.
    standby.sql("SELECT pg_drop_replication_slot('pgkeep')");
    standby.sql("SELECT pg_create_physical_replication_slot('pgkeep')");
    assert!(passes.pass(Lsn::INVALID).unwrap().restart_lsn.is_some());
    // Strangers and primaries are left alone.
    passes.system_id += 1;
    let stranger = passes.pass(Lsn::INVALID);
    assert!(matches!(stranger, Err(PgError::OtherSystem { .. })), "{stranger:?}");
    passes.system_id -= 1;
    standby.sql("SELECT pg_promote()");
    let promoted = passes.pass(Lsn::INVALID);
    assert!(matches!(promoted, Err(PgError::NotAStandby)), "{promoted:?}");
}

#[test]
fn a_standby_that_is_down_is_an_outcome_of_its_own() {
    let folder = Folder::new();
    let mut primary = Server::new(&folder, 17, &ServerOptions::default());
    let mut standby = standby_of(&folder, &mut primary, "node2");
    standby.stop();
    let down = Passes::new(&both(&standby, &primary)).pass(Lsn::INVALID);
    assert!(matches!(down, Err(PgError::Host { .. })), "{down:?}");
}

#[test]
fn slots_are_shown_created_and_dropped_on_all_servers() {
    let folder = Folder::new();
    let mut primary = Server::new(&folder, 15, &ServerOptions::default());
    let standby = standby_of(&folder, &mut primary, "node2");
    let url = format!("file://{}", folder.make("region-eu").display());
    let region = format!("[[region]]\nname = \"eu\"\nurl = \"{url}\"\n");
    let mut keeper = Keeper::with(&folder, &both(&standby, &primary), &region);
    let shown = keeper.run(&["slot", "--json"]).expect(0).json();
    assert_eq!(shown["slot"], "pgkeep");
    assert_eq!(shown["hosts"][0]["role"], "standby");
    assert_eq!(shown["hosts"][1]["role"], "primary");
    assert!(shown["hosts"][1]["slot"].is_null());

    let made = keeper.run(&["slot", "create", "--standbys", "--json"]).expect(0).json();
    assert_eq!((&made[0]["outcome"], &made[1]["outcome"]), (&"created".into(), &"created".into()));
    let again = keeper.run(&["slot", "create"]).expect(0);
    assert!(again.stdout.contains("exists: it keeps WAL from"), "{}", again.stdout);
    primary.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'");
    primary.sql("SELECT pg_reload_conf()");
    primary.sql("CREATE TABLE t (n int)");
    let shown =
        while_writing(&primary, || keeper.run(&["slot", "show", "--json"]).expect(0).json());
    let slot = &shown["hosts"][1]["slot"];
    assert_eq!(slot["limit_bytes"], 1u64 << 30);
    assert!(slot["retained_bytes"].as_u64().unwrap() > 0, "{shown:#}");
    assert!(slot["wal_bytes_per_second"].as_u64().unwrap() > 0, "{shown:#}");
    assert!(slot["seconds_until_limit"].is_u64(), "{shown:#}");
    assert!(shown["hosts"][0]["slot"]["restart_lsn"].is_string(), "{shown:#}");

    // What keeps WAL goes only when that is said, what is in use not at all.
    let kept = keeper.run(&["slot", "drop"]).expect(2);
    assert!(kept.stderr.contains("gap") && kept.stderr.contains("--yes"), "{}", kept.stderr);
    keeper.start();
    keeper.wait_archived(&primary, &["eu"]);
    let held = keeper.run(&["slot", "drop", "--yes"]).expect(1);
    assert!(held.stderr.contains("in use by pgkeep"), "{}", held.stderr);
    let text = keeper.run(&["slot"]).expect(0).stdout;
    assert!(text.contains("in use by pgkeep") && text.contains("standby"), "{text}");
    keeper.stop();
    keeper.run(&["slot", "drop", "--yes", "--standbys"]).expect(0);
    for server in [&primary, &standby] {
        assert_eq!(server.sql("SELECT count(*) FROM pg_replication_slots"), "0");
    }
    let absent = keeper.run(&["slot", "drop"]).expect(0);
    assert!(absent.stdout.contains("absent"), "{}", absent.stdout);
}

/// Runs something while WAL is written.
fn while_writing<T>(server: &Server, run: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = server.connect().unwrap();
            while !done.load(Ordering::Relaxed) {
                client.batch_execute("INSERT INTO t SELECT generate_series(1, 1000)").unwrap();
            }
        });
        let outcome = run();
        done.store(true, Ordering::Relaxed);
        outcome
    })
}

#[test]
fn servers_that_are_down_are_shown_as_such() {
    let folder = Folder::new();
    let mut primary = Server::new(&folder, 13, &ServerOptions::default());
    let mut standby = standby_of(&folder, &mut primary, "node2");
    standby.stop();
    let keeper = Keeper::new(&folder, &primary, &["eu"]);
    keeper.edit_config(&primary.conninfo(), &both(&primary, &standby));
    let shown = keeper.run(&["slot", "show", "--json"]).expect(0).json();
    assert_eq!(shown["hosts"][0]["role"], "primary");
    assert!(shown["hosts"][1]["error"].is_string(), "{shown:#}");
    let made = keeper.run(&["slot", "create", "--standbys"]).expect(1);
    assert!(made.stdout.contains("created") && made.stdout.contains("failed"), "{}", made.stdout);
    primary.stop();
    keeper.run(&["slot"]).expect(1);
}

// CASES 40, and the time until the primary's limit (CASES 21).
#[test]
fn check_tells_of_slots_standbys_and_synchronous_names() {
    let folder = Folder::new();
    let mut primary = Server::new(&folder, 17, &ServerOptions::default());
    let standby = standby_of(&folder, &mut primary, "node2");
    let keeper = Keeper::new(&folder, &primary, &["eu"]);
    keeper.edit_config(&primary.conninfo(), &both(&primary, &standby));
    let check = |code: i32| keeper.run(&["check"]).expect(code).stdout;
    let text = check(0);
    assert!(text.contains("there is no slot pgkeep yet"), "{text}");
    assert!(text.contains("commits do not wait for this archiver"), "{text}");
    keeper.run(&["slot", "create", "--standbys"]).expect(0);
    primary.sql("CREATE TABLE t (n int)");
    primary.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'");
    primary.sql("SELECT pg_reload_conf()");
    let text = while_writing(&primary, || check(0));
    assert!(text.contains("at the present rate the limit is reached in"), "{text}");
    assert!(text.contains("max_slot_wal_keep_size: 1.0 GiB"), "{text}");
    let on_standby = format!("standby {}", standby.socket.join(".s.PGSQL").display());
    assert!(text.contains(&on_standby) && text.contains("the slot pgkeep keeps"), "{text}");
    for (names, commit, code, words) in [
        ("\"node-1\", pgkeep", "on", 0, "this archiver is number 2"),
        ("ANY 1 (node2, pgkeep)", "on", 0, "commits wait for any 1 of 2 names"),
        ("my_pgkeep, \"pgkeep-2\"", "remote_apply", 0, "commits do not wait"),
        ("*", "on", 0, "WARNING  synchronous replication"),
        ("FIRST 2 (pgkeep, node2)", "remote_apply", 1, "FAILED   synchronous replication"),
    ] {
        primary.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
        primary.sql(&format!("ALTER SYSTEM SET synchronous_commit = '{commit}'"));
        primary.sql("SELECT pg_reload_conf()");
        wait_until("the settings", || primary.sql("SHOW synchronous_standby_names") == names);
        let text = check(code);
        assert!(text.contains(words), "{names} {commit}\n{text}");
    }
}

#[test]
fn status_answers_with_slot_and_age_while_a_region_hangs() {
    let folder = Folder::new();
    let s3 = S3Server::start(&folder);
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let local = folder.make("region-eu");
    let regions = format!(
        "[[region]]\nname = \"eu\"\nurl = \"file://{}\"\n{}",
        local.display(),
        s3.region("us", "prod")
    );
    let mut keeper = Keeper::with(&folder, &server.conninfo(), &regions);
    keeper.start();
    keeper.backup();
    keeper.wait_archived(&server, &["eu", "us"]);
    wait_until("both regions and the slot in the report", || {
        let status = keeper.status();
        status["last_backup"]["regions"].as_array().is_some_and(|regions| regions.len() == 2)
            && status["slot"]["wal_status"] == "reserved"
    });
    let status = keeper.status();
    assert_eq!(status["slot"]["name"], "pgkeep");
    assert!(status["slot"]["retained_bytes"].is_u64(), "{status:#}");
    assert!(status["catalog_age_seconds"].is_f64(), "{status:#}");
    let text = keeper.run(&["status"]).expect(0).stdout;
    assert!(text.contains("slot pgkeep on ") && text.contains("no limit"), "{text}");
    // It takes connections, and answers nothing.
    s3.signal(Signal::STOP);
    wait_until("the region that hangs to be left out", || {
        let status = keeper.status();
        // A sidecar that does not answer in time is passed over for the regions.
        assert_eq!(status["source"], "sidecar", "{status:#}");
        assert!(status["recovery_window"]["latest_lsn"].is_string(), "{status:#}");
        status["last_backup"]["regions"] == serde_json::json!(["eu"])
    });
    s3.signal(Signal::CONT);
    keeper.stop();
}
