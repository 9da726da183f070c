//! Read once, written everywhere: the same bytes go to an upload in every region.
//!
//! A region that fails drops out of this backup and holds up nothing; what it has of it does not
//! count, because its `backup.json` is never written. So does one that takes nothing for long while
//! another does: the server's stream waits for no single region.
//!
//! An object that is complete is made durable while the next one is being written: a local folder
//! syncs the whole object then, which takes as long as writing it.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::store::{FailureKind, Region, StoreError, Upload};

/// Frames and parts waiting for one region.
const QUEUE: usize = 16;
/// How long a region may take nothing while another is ready for more.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a region has to forget an upload that is given up.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

enum Order {
    Begin(String),
    Bytes(Bytes),
    End,
}

struct Lane {
    name: String,
    orders: Option<mpsc::Sender<Order>>,
    left_behind: CancellationToken,
    task: JoinHandle<Result<(), StoreError>>,
}

/// One writer into several regions.
pub(super) struct Fanout {
    lanes: Vec<Lane>,
}

impl Fanout {
    pub(super) fn new(regions: &[Region]) -> Fanout {
        let lanes = regions.iter().map(|region| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            let left_behind = CancellationToken::new();
            let task = tokio::spawn(work(region.clone(), receiver, left_behind.clone()));
            Lane { name: region.name().to_owned(), orders: Some(sender), left_behind, task }
        });
        Fanout { lanes: lanes.collect() }
    }

    async fn order(&mut self, make: impl Fn() -> Order) {
        let mut sends = FuturesUnordered::new();
        for (index, lane) in self.lanes.iter().enumerate() {
            if let Some(orders) = &lane.orders {
                let order = make();
                sends.push(async move { (index, orders.send(order).await.is_ok()) });
            }
        }
        let mut taken = vec![None; self.lanes.len()];
        loop {
            match tokio::time::timeout(PATIENCE, sends.next()).await {
                Ok(None) => break,
                Ok(Some((index, is_taken))) => taken[index] = Some(is_taken),
                Err(_) if taken.contains(&Some(true)) => break,
                Err(_) => {}
            }
        }
        drop(sends);
        for (lane, taken) in self.lanes.iter_mut().zip(taken) {
            match taken {
                Some(true) => {}
                // Its task ended with an error, which `finish` reports.
                Some(false) => {
                    tracing::warn!(region = lane.name, "dropped out of this backup");
                    lane.orders = None;
                }
                None if lane.orders.is_some() => {
                    tracing::warn!(region = lane.name, "too slow: left out of this backup");
                    lane.left_behind.cancel();
                    lane.orders = None;
                }
                None => {}
            }
        }
    }

    /// An object begins.
    pub(super) async fn begin(&mut self, key: &str) {
        self.order(|| Order::Begin(key.to_owned())).await;
    }

    /// Its next bytes.
    pub(super) async fn write(&mut self, bytes: &Bytes) {
        self.order(|| Order::Bytes(bytes.clone())).await;
    }

    /// It is whole.
    pub(super) async fn end(&mut self) {
        self.order(|| Order::End).await;
    }

    /// Whether any region still takes part.
    pub(super) fn is_alive(&self) -> bool {
        self.lanes.iter().any(|lane| lane.orders.is_some())
    }

    /// Waits for all uploads; what became of each region, in order.
    pub(super) async fn finish(self) -> Vec<Result<(), StoreError>> {
        let waits = self.lanes.into_iter().map(|lane| async {
            drop(lane.orders);
            match lane.task.await {
                Ok(outcome) => outcome,
                Err(error) => Err(StoreError {
                    kind: FailureKind::Permanent,
                    region: lane.name,
                    operation: "write",
                    key: String::new(),
                    message: error.to_string(),
                }),
            }
        });
        join_all(waits).await
    }
}

async fn work(
    region: Region,
    mut orders: mpsc::Receiver<Order>,
    left_behind: CancellationToken,
) -> Result<(), StoreError> {
    let mut upload = None;
    let mut finishing = Finishing::default();
    loop {
        let done = tokio::select! {
            done = next(&region, &mut orders, &mut upload, &mut finishing) => done,
            () = left_behind.cancelled() => Err(StoreError {
                kind: FailureKind::Transient,
                region: region.name().to_owned(),
                operation: "write",
                key: String::new(),
                message: format!(
                    "it took nothing for {} s while others did; \"pgkeep repair\" brings the backup there",
                    PATIENCE.as_secs()
                ),
            }),
        };
        match done {
            Ok(true) => {}
            // The orders ended, inside an object if the backup was given up.
            Ok(false) => return give_up(upload, Ok(())).await,
            Err(error) => return give_up(upload, Err(error)).await,
        }
    }
}

/// The object before the one being written, while the store makes it durable. Never more than one,
/// so that a store that is slow at it slows the stream and gathers nothing.
#[derive(Default)]
struct Finishing {
    task: JoinSet<Result<(), StoreError>>,
}

impl Finishing {
    /// Waits for the object before.
    async fn wait(&mut self, region: &Region) -> Result<(), StoreError> {
        match self.task.join_next().await {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => Err(StoreError {
                kind: FailureKind::Permanent,
                region: region.name().to_owned(),
                operation: "write",
                key: String::new(),
                message: error.to_string(),
            }),
        }
    }
}

/// Carries the next order out; `false` when there is none and all objects are durable.
async fn next(
    region: &Region,
    orders: &mut mpsc::Receiver<Order>,
    upload: &mut Option<Upload>,
    finishing: &mut Finishing,
) -> Result<bool, StoreError> {
    match (orders.recv().await, &mut *upload) {
        (None, _) => {
            finishing.wait(region).await?;
            return Ok(false);
        }
        (Some(Order::Begin(key)), _) => *upload = Some(region.upload(&key).await?),
        (Some(Order::Bytes(bytes)), Some(current)) => current.write(bytes).await?,
        (Some(Order::Bytes(_)), None) => {}
        (Some(Order::End), _) => {
            finishing.wait(region).await?;
            if let Some(current) = upload.take() {
                finishing.task.spawn(current.finish());
            }
        }
    }
    Ok(true)
}

async fn give_up(
    upload: Option<Upload>,
    outcome: Result<(), StoreError>,
) -> Result<(), StoreError> {
    if let Some(upload) = upload {
        let _ = tokio::time::timeout(ABORT_PATIENCE, upload.abort()).await;
    }
    outcome
}
