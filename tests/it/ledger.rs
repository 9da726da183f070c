//! The ledger: what was acknowledged and archived comes back, whatever is killed, whenever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use pgkeep::wal::Lsn;
use rand::RngExt;

use crate::support::{Folder, Keeper, Server, ServerOptions, rounds, wait_until};

/// One acknowledged row: its number, and an LSN that its commit does not lie behind.
type Entry = (u64, Lsn);

/// A client that inserts numbered rows and notes each acknowledged commit.
struct Client {
    acknowledged: JoinHandle<(Vec<Entry>, u64)>,
    noted: Arc<AtomicU64>,
}

impl Client {
    fn start(server: &Server, stop: &Arc<AtomicBool>, number: u64, sent_before: u64) -> Client {
        let conninfo = server.conninfo();
        let stop = stop.clone();
        let noted = Arc::new(AtomicU64::new(0));
        let count = noted.clone();
        let work = move || {
            let mut entries = Vec::new();
            let mut sent = sent_before;
            let Ok(mut connection) = postgres::Client::connect(&conninfo, postgres::NoTls) else {
                return (entries, sent);
            };
            while !stop.load(Ordering::Relaxed) {
                sent += 1;
                let id = sent * 10 + number;
                let insert = format!("INSERT INTO ledger VALUES ({id}, repeat('x', 200))");
                if connection.batch_execute(&insert).is_err() {
                    break;
                }
                let Ok(row) = connection.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
                else {
                    break;
                };
                let lsn: String = row.get(0);
                entries.push((id, lsn.parse().unwrap()));
                count.fetch_add(1, Ordering::Relaxed);
            }
            (entries, sent)
        };
        Client { acknowledged: std::thread::spawn(work), noted }
    }
}

// The row may be there without its acknowledgement having been seen; never the other way round.
#[test]
fn no_acknowledged_row_before_a_regions_frontier_is_lost() {
    let folder = Folder::new();
    let mut server = Server::new(&folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE ledger (id bigint PRIMARY KEY, filler text)");
    let regions = ["eu", "us"];
    let mut keeper = Keeper::new(&folder, &server, &regions);
    keeper.start();
    keeper.backup();
    let mut all: Vec<Entry> = Vec::new();
    let mut sent = [0_u64; 2];
    let mut random = rand::rng();
    for round in 0..rounds("PGKEEP_LEDGER_ROUNDS", 20) {
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Vec<Client> =
            (0..2).map(|n| Client::start(&server, &stop, n, sent[n as usize])).collect();
        let enough = random.random_range(20..300);
        wait_until("rows", || {
            clients.iter().all(|client| client.noted.load(Ordering::Relaxed) > enough)
        });
        let kill_server = round % 2 == 0;
        if kill_server {
            server.kill9();
        } else {
            keeper.kill9();
        }
        stop.store(true, Ordering::Relaxed);
        for (number, client) in clients.into_iter().enumerate() {
            let (entries, last) = client.acknowledged.join().unwrap();
            all.extend(entries);
            sent[number] = last;
        }
        let region = regions[round % 2];
        let frontier = keeper.frontier(region);
        check(&folder, &keeper, region, frontier, &all, &sent, round);
        if kill_server {
            server.start();
        } else {
            keeper.start();
        }
    }
    // Both survived all of it, and the regions end up with everything.
    keeper.wait_archived(&server, &regions);
    for region in regions {
        let frontier = keeper.frontier(region);
        assert!(all.iter().all(|(_, lsn)| *lsn <= frontier), "{region} lags behind at {frontier}");
    }
}

fn check(
    folder: &Folder,
    keeper: &Keeper,
    region: &str,
    frontier: Lsn,
    all: &[Entry],
    sent: &[u64; 2],
    round: usize,
) {
    let name = format!("round-{round}");
    let mut copy = keeper.restore_and_start(folder, 17, &name, &["--region", region]);
    copy.wait_until_writable();
    let present: std::collections::BTreeSet<u64> =
        copy.sql("SELECT id FROM ledger").lines().map(|line| line.parse().unwrap()).collect();
    let missing: Vec<&Entry> =
        all.iter().filter(|(id, lsn)| *lsn <= frontier && !present.contains(id)).collect();
    assert!(
        missing.is_empty(),
        "round {round}: {} rows before the frontier {frontier} of {region} are lost, e.g. {:?}",
        missing.len(),
        missing[0]
    );
    let invented = present.iter().find(|id| *id / 10 > sent[(*id % 10) as usize]);
    assert_eq!(invented, None, "round {round}: a row is there that was never sent");
    copy.stop();
    std::fs::remove_dir_all(&copy.data).unwrap();
}
