//! One list of checks for every kind of store, on real servers: what the request layer promises
//! must hold on each, whatever its habits are.
//!
//! Every HTTP store is reached through a small proxy in the test, which is how answers get lost,
//! bodies are cut off and stores become busy. The checks name the invariants (I2, I9, I10) and the
//! field failures (CASES 24, 25, 27, 28) that they defend.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]
#![allow(missing_docs, reason = "tests")]

mod checks;
mod errors;
mod faults;
#[path = "../it/support/process.rs"]
#[allow(dead_code, reason = "shared with tests/it")]
mod process;
mod proxy;
mod stores;

use std::io::Write;

use stores::Store;

/// Says what cannot be checked here, past what captures the output of tests that pass.
fn skipped(what: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}: {reason}");
}

fn conforms(store: Store) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        checks::run(&store).await;
        faults::run(&store).await;
    });
}

#[test]
fn a_local_folder_conforms() {
    conforms(stores::folder());
}

#[test]
fn s3_that_honours_conditional_creation_conforms() {
    conforms(stores::seaweedfs());
}

#[test]
fn another_s3_that_honours_conditional_creation_conforms() {
    conforms(stores::moto("moto"));
}

// Like Garage, which answers 200 and overwrites.
#[test]
fn s3_that_ignores_conditional_creation_conforms() {
    conforms(stores::moto_that_ignores_conditions());
}

#[test]
fn s3_that_refuses_conditional_creation_conforms() {
    conforms(stores::moto_that_refuses_conditions());
}

#[test]
fn google_cloud_storage_conforms() {
    conforms(stores::fake_gcs());
}

#[test]
fn azure_conforms() {
    conforms(stores::azurite());
}

#[test]
fn garage_conforms() {
    match stores::garage() {
        Ok(garage) => conforms(garage),
        Err(reason) => skipped("garage_conforms", &reason),
    }
}
