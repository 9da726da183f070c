//! Read once, written everywhere: the same bytes go to an upload in every region.
//!
//! A region that fails drops out of this backup and holds up nothing; what it has of it does not
//! count, because its `backup.json` is never written.

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::store::{FailureKind, Region, StoreError};

/// Frames and parts waiting for one region.
const QUEUE: usize = 16;

enum Order {
    Begin(String),
    Bytes(Bytes),
    End,
}

struct Lane {
    name: String,
    orders: Option<mpsc::Sender<Order>>,
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
            let task = tokio::spawn(work(region.clone(), receiver));
            Lane { name: region.name().to_owned(), orders: Some(sender), task }
        });
        Fanout { lanes: lanes.collect() }
    }

    async fn order(&mut self, make: impl Fn() -> Order) {
        let sends = self.lanes.iter_mut().map(|lane| {
            let order = make();
            async move {
                if let Some(orders) = &lane.orders
                    && orders.send(order).await.is_err()
                {
                    // The task ended with an error, which `finish` reports.
                    tracing::warn!(region = lane.name, "dropped out of this backup");
                    lane.orders = None;
                }
            }
        });
        join_all(sends).await;
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

async fn work(region: Region, mut orders: mpsc::Receiver<Order>) -> Result<(), StoreError> {
    let mut upload = None;
    while let Some(order) = orders.recv().await {
        let outcome = match (order, &mut upload) {
            (Order::Begin(key), _) => {
                upload = Some(region.upload(&key).await?);
                Ok(())
            }
            (Order::Bytes(bytes), Some(current)) => current.write(bytes).await,
            (Order::End, _) => match upload.take() {
                Some(current) => current.finish().await,
                None => Ok(()),
            },
            (Order::Bytes(_), None) => Ok(()),
        };
        if let Err(error) = outcome {
            if let Some(current) = upload {
                current.abort().await;
            }
            return Err(error);
        }
    }
    // The orders ended inside an object: the backup was given up.
    if let Some(current) = upload {
        current.abort().await;
    }
    Ok(())
}
