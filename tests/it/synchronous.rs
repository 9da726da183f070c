//! Synchronous mode, RPO 0: a commit that returned is in enough regions, whatever is lost together.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use pgkeep::wal::{Lsn, TimelineId};
use rand::RngExt;

use crate::support::{
    Content, Folder, Keeper, S3Server, Server, ServerOptions, rounds, wait_until,
};

/// Two local regions, one in an S3 server; commits wait for two of three.
fn site(folder: &Folder) -> (Server, S3Server, Keeper) {
    let s3 = S3Server::start(folder);
    let server =
        Server::new(folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    let mut regions = s3.region("ap", "prod");
    for name in ["eu", "us"] {
        let url = folder.make(&format!("region-{name}"));
        let url = url.display();
        regions.push_str(&format!("[[region]]\nname = \"{name}\"\nurl = \"file://{url}\"\n"));
    }
    let keeper = Keeper::with(folder, &server.conninfo(), &regions);
    let continuous = "flush_interval = \"0s\"\ndurability = \"majority\"";
    keeper.edit_config("flush_interval = \"200ms\"", continuous);
    (server, s3, keeper)
}

fn make_synchronous(server: &Server, names: &str) {
    server.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
    server.sql("SELECT pg_reload_conf()");
}

/// A client that inserts numbered rows and remembers those whose commit returned.
struct Client {
    acknowledged: JoinHandle<Vec<u64>>,
    count: Arc<AtomicU64>,
}

impl Client {
    fn start(server: &Server, first: u64) -> Client {
        let mut connection = server.connect().unwrap();
        let count = Arc::new(AtomicU64::new(0));
        let noted = count.clone();
        let work = move || {
            let mut acknowledged = Vec::new();
            for id in first.. {
                let insert = format!("INSERT INTO ledger VALUES ({id}, repeat('x', 200))");
                if connection.batch_execute(&insert).is_err() {
                    break;
                }
                acknowledged.push(id);
                noted.fetch_add(1, Ordering::Relaxed);
            }
            acknowledged
        };
        Client { acknowledged: std::thread::spawn(work), count }
    }
}

/// A local region whose folder is moved away, or the S3 server killed.
enum Loss {
    Folder(PathBuf),
    S3,
}

impl Loss {
    fn happens(&self, s3: &mut S3Server) {
        match self {
            Loss::Folder(path) => std::fs::rename(path, path.with_extension("lost")).unwrap(),
            Loss::S3 => s3.kill9(),
        }
    }

    fn ends(&self, s3: &mut S3Server) {
        match self {
            Loss::Folder(path) => std::fs::rename(path.with_extension("lost"), path).unwrap(),
            Loss::S3 => s3.restart(),
        }
    }
}

// CASES 40. Primary, archiver and one of three regions die together.
#[test]
fn no_acknowledged_commit_is_lost_with_primary_archiver_and_a_region() {
    let folder = Folder::new();
    let (mut server, mut s3, mut keeper) = site(&folder);
    server.sql("CREATE TABLE ledger (id bigint PRIMARY KEY, filler text)");
    keeper.start();
    keeper.wait_stored(&server, &["eu", "us", "ap"]);
    keeper.backup();
    make_synchronous(&server, "pgkeep");
    let mut acknowledged = BTreeSet::new();
    let mut random = rand::rng();
    for round in 0..rounds("PGKEEP_SYNC_ROUNDS", 5) {
        let base = round as u64 * 1_000_000;
        let clients = [base, base + 500_000].map(|first| Client::start(&server, first + 1));
        let enough = random.random_range(10..120);
        wait_until("acknowledged rows", || {
            keeper.assert_runs();
            clients.iter().all(|client| client.count.load(Ordering::Relaxed) > enough)
        });
        let (loss, left) = match round % 3 {
            0 => (Loss::Folder(keeper.region("eu")), ["us", "ap"]),
            1 => (Loss::S3, ["eu", "us"]),
            _ => (Loss::Folder(keeper.region("us")), ["eu", "ap"]),
        };
        // Together, as nearly as can be; who goes first changes.
        if random.random() {
            loss.happens(&mut s3);
            keeper.kill9();
            server.kill9_all();
        } else {
            server.kill9_all();
            keeper.kill9();
            loss.happens(&mut s3);
        }
        for client in clients {
            acknowledged.extend(client.acknowledged.join().unwrap());
        }
        check(&folder, &keeper, left, &acknowledged, round);
        loss.ends(&mut s3);
        server.start();
        keeper.start();
    }
    keeper.wait_stored(&server, &["eu", "us", "ap"]);
    keeper.stop();
    keeper.assert_same_wal(server.system_id(), TimelineId(1), &["eu", "us", "ap"]);
}

fn check(
    folder: &Folder,
    keeper: &Keeper,
    left: [&str; 2],
    acknowledged: &BTreeSet<u64>,
    round: usize,
) {
    let regions = ["--region", left[0], "--region", left[1]];
    let mut copy = keeper.restore_and_start(folder, 17, &format!("round-{round}"), &regions);
    copy.wait_until_writable();
    let rows = copy.sql("SELECT id FROM ledger");
    let present: BTreeSet<u64> = rows.lines().map(|line| line.parse().unwrap()).collect();
    let lost: Vec<_> = acknowledged.difference(&present).collect();
    assert!(lost.is_empty(), "round {round}: {} commits are lost: {lost:?}", lost.len());
    copy.stop();
    std::fs::remove_dir_all(&copy.data).unwrap();
}

// Invariant I1: with one of three regions nothing is acknowledged, and nothing hangs for ever.
#[test]
fn a_commit_waits_for_the_majority() {
    let folder = Folder::new();
    let mut s3 = S3Server::start(&folder);
    let server =
        Server::new(&folder, 17, &ServerOptions { no_fsync: true, ..ServerOptions::default() });
    let eu = folder.make("region-eu");
    let regions = format!(
        "[[region]]\nname = \"eu\"\nurl = \"file://{}\"\n{}{}",
        eu.display(),
        s3.region("us", "us"),
        s3.region("ap", "ap")
    );
    let mut keeper = Keeper::with(&folder, &server.conninfo(), &regions);
    let continuous = "flush_interval = \"0s\"\ndurability = \"majority\"";
    keeper.edit_config("flush_interval = \"200ms\"", continuous);
    server.sql("CREATE TABLE t (n int)");
    keeper.start();
    keeper.wait_stored(&server, &["eu", "us", "ap"]);
    make_synchronous(&server, "pgkeep");
    s3.kill9();
    let done = Arc::new(AtomicBool::new(false));
    let returned = done.clone();
    let mut client = server.connect().unwrap();
    let commit = std::thread::spawn(move || {
        client.batch_execute("INSERT INTO t VALUES (1)").unwrap();
        returned.store(true, Ordering::Release);
    });
    wait_until("the commit to wait", || {
        server.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == "1"
    });
    let committed = server.flushed();
    let content = Content::of(&keeper, "eu", server.system_id());
    wait_until("the commit in one region", || content.end(TimelineId(1)) >= committed);
    // The archiver has spoken since then.
    let spoken = "SELECT reply_time FROM pg_stat_replication WHERE application_name = 'pgkeep'";
    let before = server.sql(spoken);
    wait_until("the archiver to report", || server.sql(spoken) != before);
    let flush = "SELECT flush_lsn FROM pg_stat_replication WHERE application_name = 'pgkeep'";
    let flush: Lsn = server.sql(flush).parse().unwrap();
    assert!(flush < committed, "{flush} is reported, {committed} is in one region of three");
    assert!(!done.load(Ordering::Acquire), "the commit returned with one region of three");
    s3.restart();
    commit.join().unwrap();
    keeper.stop();
}

// CASES 40: it is told where the operator looks: by `check`, and in the log at start.
#[test]
fn remote_apply_is_reported_by_check() {
    let folder = Folder::new();
    let (server, _s3, keeper) = site(&folder);
    make_synchronous(&server, "pgkeep");
    server.sql("ALTER SYSTEM SET synchronous_commit = 'remote_apply'");
    server.sql("SELECT pg_reload_conf()");
    let output = keeper.run(&["check"]).expect(1);
    assert!(output.stdout.contains("remote_apply"), "{}", output.stdout);
}

#[test]
fn remote_apply_is_reported_at_start() {
    let folder = Folder::new();
    let (server, _s3, mut keeper) = site(&folder);
    make_synchronous(&server, "pgkeep");
    server.sql("ALTER SYSTEM SET synchronous_commit = 'remote_apply'");
    server.sql("SELECT pg_reload_conf()");
    keeper.start();
    wait_until("a word on remote_apply", || {
        keeper.assert_runs();
        keeper.log().contains("remote_apply")
    });
    keeper.stop();
}

#[test]
fn an_accidental_star_is_reported_by_check() {
    let folder = Folder::new();
    let (server, _s3, keeper) = site(&folder);
    make_synchronous(&server, "*");
    let output = keeper.run(&["check"]).expect(0);
    assert!(output.stdout.contains("synchronous_standby_names = '*'"), "{}", output.stdout);
}

#[test]
fn an_accidental_star_is_reported_at_start() {
    let folder = Folder::new();
    let (server, _s3, mut keeper) = site(&folder);
    make_synchronous(&server, "*");
    keeper.start();
    wait_until("a word on the star", || {
        keeper.assert_runs();
        keeper.log().contains("synchronous_standby_names")
    });
    keeper.stop();
}
