//! The sidecar's HTTP service: `/status` (the report) and `/healthz` (200 while WAL is streamed,
//! 503 otherwise). Archiving never depends on it: a port that cannot be had is a warning. Both
//! answer within a second, whatever the regions do.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing::get};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::catalog::CatalogCache;
use super::report::{Objectives, StatusReport, status_from_sidecar};
use super::slot::watch_slot;
use crate::archive::ArchiveState;
use crate::backup::BackupTurns;
use crate::pg::{Connector, SlotWatch};
use crate::store::Regions;

/// How long an answer of a sidecar is waited for.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// What the service needs.
pub struct Service {
    /// The cluster's name.
    pub cluster: String,
    /// The regions, at the cluster's folder.
    pub regions: Regions,
    /// The archiver.
    pub archive: ArchiveState,
    /// The backups that are taken by themselves.
    pub turns: BackupTurns,
    /// The way to the server.
    pub connector: Connector,
    /// The name of the replication slot.
    pub slot: String,
    /// What is known of the slot.
    pub slot_watch: SlotWatch,
    /// What must be met.
    pub objectives: Objectives,
}

struct Shared {
    service: Service,
    catalog: CatalogCache,
}

impl Service {
    /// Serves until cancelled.
    pub async fn run(self, listen: String, cancelled: CancellationToken) {
        let listener = match TcpListener::bind(&listen).await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(
                    "no status service: cannot listen on {listen}: {error} (http.listen)"
                );
                return;
            }
        };
        let catalog = CatalogCache::new(self.regions.clone());
        let shared = Arc::new(Shared { service: self, catalog });
        let (readers, stop) = (shared.clone(), cancelled.clone());
        tokio::spawn(async move {
            let system_id = || readers.service.archive.report().system_id;
            readers.catalog.keep(system_id, &stop).await;
        });
        let (looking, stop) = (shared.clone(), cancelled.clone());
        tokio::spawn(async move {
            let service = &looking.service;
            watch_slot(&service.connector, &service.slot, &service.slot_watch, &stop).await;
        });
        let router = Router::new()
            .route("/status", get(status))
            .route("/healthz", get(healthz))
            .with_state(shared);
        let served = axum::serve(listener, router)
            .with_graceful_shutdown(async move { cancelled.cancelled().await })
            .await;
        if let Err(error) = served {
            tracing::warn!("the status service ended: {error}");
        }
    }
}

async fn status(State(shared): State<Arc<Shared>>) -> Response {
    let known = shared.catalog.get().await;
    let service = &shared.service;
    let archive = service.archive.report();
    let slot = service.slot_watch.get();
    let (name, objectives) = (&service.cluster, service.objectives);
    let mut report = status_from_sidecar(name, &archive, known.as_ref(), slot, objectives);
    report.add_backups(&service.turns);
    Json(report).into_response()
}

async fn healthz(State(shared): State<Arc<Shared>>) -> (StatusCode, String) {
    let archive = shared.service.archive.report();
    if archive.streaming {
        return (StatusCode::OK, "streaming\n".into());
    }
    let trouble = archive.trouble.unwrap_or_else(|| "starting".into());
    (StatusCode::SERVICE_UNAVAILABLE, format!("not streaming: {trouble}\n"))
}

/// Asks a sidecar for its report.
///
/// # Errors
/// When none answers there, as text.
pub async fn ask(listen: &str) -> Result<StatusReport, String> {
    // An address to listen on everywhere is reached here.
    let address = listen.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]");
    let client = reqwest::Client::builder()
        .timeout(ASK_TIMEOUT)
        .no_proxy()
        .build()
        .map_err(|error| error.to_string())?;
    let response = client.get(format!("http://{address}/status")).send().await;
    let response = response.map_err(|error| error.to_string())?;
    let response = response.error_for_status().map_err(|error| error.to_string())?;
    response.json().await.map_err(|error| error.to_string())
}
