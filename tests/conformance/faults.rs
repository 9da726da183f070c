//! What every store must survive: the proxy in front of it plays the network.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pgkeep::store::{FailureKind, Patience, Region};

use crate::checks::content;
use crate::proxy::Plan;
use crate::stores::{Creation, Store, files_in};

pub async fn run(store: &Store) {
    let region = store.region();
    let Some(proxy) = &store.proxy else {
        return cut_file(store, &region).await;
    };
    let plan = proxy.plan.as_ref();
    let within = |name: &str| {
        println!("{}: {name}", store.name);
        region.within(name)
    };
    lost_answer(&within("lost answer"), plan, store.creation).await;
    cut_body(&within("cut body"), plan).await;
    busy(&within("busy"), plan).await;
    match store.no_parts {
        None => lost_end_of_upload(&within("lost end of upload"), plan).await,
        Some(reason) => crate::skipped(&format!("{}: lost end of upload", store.name), reason),
    }
    stalled_answer(&within("stalled answer"), plan).await;
}

fn is_used_up(count: &std::sync::atomic::AtomicU32) -> bool {
    count.load(SeqCst) == 0
}

// I10, CASES 28: the write landed, its answer was lost, and the retry finds the object.
async fn lost_answer(region: &Region, plan: &Plan, creation: Creation) {
    let object = content(40_000, 11);
    // Where the store is asked first, the second attempt writes nothing.
    let answers = if creation == Creation::Refused { 1 } else { 2 };
    plan.lose_answers.store(answers, SeqCst);
    region.put("object", object.clone()).await.unwrap();
    assert!(is_used_up(&plan.lose_answers));
    assert_eq!(region.get("object").await.unwrap(), object);
    // The caller's own rhythm: the first attempt fails, the second succeeds.
    plan.lose_answers.store(1, SeqCst);
    let error = region.put_once("another", object.clone()).await.unwrap_err();
    assert_eq!(error.kind, FailureKind::Transient, "{error}");
    region.put_once("another", object.clone()).await.unwrap();
    assert_eq!(region.get("another").await.unwrap(), object);
}

// I10: what was cut off is not there, or is replaced.
async fn cut_body(region: &Region, plan: &Plan) {
    let object = content(400_000, 12);
    plan.cut_bodies.store(1, SeqCst);
    region.put("object", object.clone()).await.unwrap();
    assert!(is_used_up(&plan.cut_bodies));
    assert_eq!(region.get("object").await.unwrap(), object);
}

async fn busy(region: &Region, plan: &Plan) {
    let object = content(1_000, 13);
    plan.busy.store(2, SeqCst);
    region.put("object", object.clone()).await.unwrap();
    plan.busy.store(2, SeqCst);
    assert_eq!(region.get("object").await.unwrap(), object);
    plan.busy.store(2, SeqCst);
    assert_eq!(region.list("").await.unwrap().len(), 1);
    // Attempts are bounded (I9), and what the store said is told.
    plan.busy.store(Patience::LOOKUP.attempts, SeqCst);
    let error = region.with_patience(Patience::LOOKUP).get("object").await.unwrap_err();
    assert_eq!(error.kind, FailureKind::Transient);
    assert!(error.message.contains("wants fewer requests"), "{error}");
    assert!(is_used_up(&plan.busy));
}

// I10, CASES 27.
async fn lost_end_of_upload(region: &Region, plan: &Plan) {
    let object = content(9 << 20, 14);
    let mut upload = region.upload("pack").await.unwrap();
    upload.write(object.slice(..8 << 20)).await.unwrap();
    upload.write(object.slice(8 << 20..)).await.unwrap();
    // The last part's answer, and then that of the end.
    plan.lose_answers.store(2, SeqCst);
    upload.finish().await.unwrap();
    assert!(is_used_up(&plan.lose_answers));
    assert_eq!(region.get("pack").await.unwrap(), object);
}

// I9, CASES 24: an answer that stops in the middle is given up and asked for again.
async fn stalled_answer(region: &Region, plan: &Plan) {
    let object = content(100_000, 15);
    region.put("object", object.clone()).await.unwrap();
    let hasty = region.with_patience(Patience {
        attempts: 2,
        idle: Duration::from_millis(300),
        ..Patience::WORK
    });
    plan.stall_answers.store(1, SeqCst);
    assert_eq!(hasty.get("object").await.unwrap(), object);
    plan.stall_answers.store(2, SeqCst);
    let error = hasty.get("object").await.unwrap_err();
    assert_eq!(error.kind, FailureKind::Transient);
    assert!(error.message.contains("nothing came for 0.3 s"), "{error}");
    assert!(is_used_up(&plan.stall_answers));
}

// I10: a killed process leaves a part of a file beside the name, never under it.
async fn cut_file(store: &Store, region: &Region) {
    let region = region.within("cut");
    let folder = store.folder.path().join("region/cut");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("object#1"), "half").unwrap();
    assert_eq!(region.list("").await.unwrap(), []);
    assert_eq!(region.size("object").await.unwrap(), None);
    let object = content(10_000, 16);
    region.put("object", object.clone()).await.unwrap();
    assert_eq!(region.get("object").await.unwrap(), object);
    assert_eq!(region.list("").await.unwrap().len(), 1);
    assert_eq!(files_in(&folder), 2);
}
