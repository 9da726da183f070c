//! The archiver under a seeded simulator: the real code, a fake server that speaks PostgreSQL's
//! protocol, stores in memory that fail in every way that can be survived, and virtual time.
//!
//! ```text
//! cargo test --test sim                         a thousand seeds
//! PGKEEP_SIM_SEEDS=100000 cargo test --test sim a hundred thousand
//! PGKEEP_SIM_FIRST=5000 …                       from this seed on
//! PGKEEP_SIM_SEED=1234 cargo test --test sim -- --nocapture    one, with everything that happens
//! ```
//! A seed that fails is printed with what it broke. `known.rs` names the kinds of faults that are
//! left out because the archiver is known not to survive them yet.
//!
//! One seed runs on one thread, and the same seed gives the same trace: the runtime's clock stands
//! still while anything can run, draws do not depend on the order of requests, and the thread does
//! itself what a pool would do (`pgkeep::offload`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod dice;
mod invariants;
mod known;
mod plan;
mod process;
mod scenario;
mod server;
mod servers;
mod sql;
mod store;
mod wal;
mod walsender;
mod watch;
mod wire;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use scenario::{Outcome, simulate};

const THREADS: usize = 2;
const DEFAULT_SEEDS: u64 = 1000;
/// After so many seeds that failed the rest tells nothing new.
const MOST_FAILURES: usize = 10;
/// A seed takes a fraction of a second.
const STUCK_AFTER: Duration = Duration::from_secs(120);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn archives_survive_whatever_the_seeds_bring() {
    if let Some(seed) = number("PGKEEP_SIM_SEED") {
        let outcome = simulate(seed, true);
        assert_eq!(outcome.violations, Vec::<String>::new(), "seed {seed}");
        return;
    }
    let first = number("PGKEEP_SIM_FIRST").unwrap_or(0);
    let end = first + number("PGKEEP_SIM_SEEDS").unwrap_or(DEFAULT_SEEDS);
    let next = AtomicU64::new(first);
    let outcomes: Mutex<Vec<(u64, Outcome)>> = Mutex::new(Vec::new());
    let running: Mutex<BTreeMap<u64, Instant>> = Mutex::new(BTreeMap::new());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| run_seeds(&next, end, &outcomes, &running)))
            .collect();
        scope.spawn(|| watch_for_busy_loops(&running, &done));
        for worker in workers {
            worker.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    report(outcomes.into_inner().unwrap());
}

fn run_seeds(
    next: &AtomicU64,
    end: u64,
    outcomes: &Mutex<Vec<(u64, Outcome)>>,
    running: &Mutex<BTreeMap<u64, Instant>>,
) {
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        let failed = |one: &&(u64, Outcome)| !one.1.violations.is_empty();
        let failures = outcomes.lock().unwrap().iter().filter(failed).count();
        if seed >= end || failures >= MOST_FAILURES {
            return;
        }
        running.lock().unwrap().insert(seed, Instant::now());
        let mut outcome = simulate(seed, false);
        running.lock().unwrap().remove(&seed);
        // What is not looked at any more would fill the memory.
        outcome.lines = Vec::new();
        outcomes.lock().unwrap().push((seed, outcome));
    }
}

/// Whoever runs without ever waiting stops virtual time: nothing inside the simulation can notice.
fn watch_for_busy_loops(running: &Mutex<BTreeMap<u64, Instant>>, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(200));
        let stuck: Vec<u64> = {
            let running = running.lock().unwrap();
            let stuck = running.iter().filter(|(_, since)| since.elapsed() > STUCK_AFTER);
            stuck.map(|(seed, _)| *seed).collect()
        };
        if !stuck.is_empty() {
            eprintln!("seeds {stuck:?} stand still: something runs without ever waiting");
            std::process::exit(101);
        }
    }
}

/// Prints what all seeds did, and fails with those that broke something.
fn report(mut outcomes: Vec<(u64, Outcome)>) {
    outcomes.sort_by_key(|one| one.0);
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(|one| of(&one.1)).sum::<u64>();
    let slowest = outcomes.iter().max_by_key(|one| one.1.recovery);
    println!(
        "{} seeds: {} virtual seconds, {} MiB of WAL, {} requests, {} kills, {} timelines, {} gaps, {} pieces stored again with other metadata; the slowest recovery took {:?} (seed {:?})",
        outcomes.len(),
        sum(|outcome| outcome.time.as_secs()),
        sum(|outcome| outcome.wal) >> 20,
        sum(|outcome| outcome.requests),
        sum(|outcome| outcome.kills),
        sum(|outcome| outcome.timelines),
        sum(|outcome| outcome.gaps),
        sum(|outcome| outcome.redressed),
        slowest.map(|one| one.1.recovery),
        slowest.map(|one| one.0),
    );
    let unknown: std::collections::BTreeSet<_> =
        outcomes.iter().flat_map(|one| &one.1.unknown).collect();
    for line in unknown {
        println!("the simulated server was asked what it does not know: {line}");
    }
    let failed: Vec<_> = outcomes.iter().filter(|one| !one.1.violations.is_empty()).collect();
    for (seed, outcome) in &failed {
        println!("seed {seed} failed; PGKEEP_SIM_SEED={seed} replays it");
        for violation in outcome.violations.iter().take(5) {
            println!("    {violation}");
        }
    }
    let seeds: Vec<_> = failed.iter().map(|one| one.0).collect();
    assert!(seeds.is_empty(), "seeds {seeds:?} failed");
}

#[test]
fn a_seed_gives_the_same_trace_twice() {
    for seed in 0..40 {
        let (one, other) = (simulate(seed, false), simulate(seed, false));
        let same = one.lines.iter().zip(&other.lines).take_while(|(a, b)| a == b).count();
        assert!(
            one.hash == other.hash,
            "seed {seed}: after {same} lines came\n{:?}\nand\n{:?}",
            one.lines.get(same),
            other.lines.get(same)
        );
    }
}
