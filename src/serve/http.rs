//! The sidecar's HTTP service: `/status` (the report) and `/healthz` (200 while WAL is streamed,
//! 503 otherwise). Archiving never depends on it: a port that cannot be had is a warning.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing::get};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::report::{Objectives, StatusReport, status_from_sidecar};
use crate::archive::ArchiveState;
use crate::store::{Catalog, Regions, list_lineages};

/// How long what was read from the regions is used again.
const CATALOG_AGE: Duration = Duration::from_secs(10);
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
    /// What must be met.
    pub objectives: Objectives,
}

struct Shared {
    service: Service,
    catalog: Mutex<Option<(Instant, Arc<Catalog>)>>,
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
        let shared = Arc::new(Shared { service: self, catalog: Mutex::new(None) });
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
    let archive = shared.service.archive.report();
    let catalog = shared.catalog(archive.system_id).await;
    let service = &shared.service;
    let report =
        status_from_sidecar(&service.cluster, &archive, catalog.as_deref(), service.objectives);
    match report.await {
        Ok(report) => Json(report).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

async fn healthz(State(shared): State<Arc<Shared>>) -> (StatusCode, String) {
    let archive = shared.service.archive.report();
    if archive.streaming {
        return (StatusCode::OK, "streaming\n".into());
    }
    let trouble = archive.trouble.unwrap_or_else(|| "starting".into());
    (StatusCode::SERVICE_UNAVAILABLE, format!("not streaming: {trouble}\n"))
}

impl Shared {
    async fn catalog(&self, system_id: Option<u64>) -> Option<Arc<Catalog>> {
        let own = system_id?.to_string();
        let mut cached = self.catalog.lock().await;
        if let Some((read, catalog)) = &*cached
            && read.elapsed() < CATALOG_AGE
        {
            return Some(catalog.clone());
        }
        let lineages = list_lineages(&self.service.regions).await.ok()?;
        let lineage = lineages.into_iter().find(|lineage| lineage.system_identifier == own)?;
        let catalog = Arc::new(Catalog::read(&self.service.regions, lineage).await.ok()?);
        *cached = Some((Instant::now(), catalog.clone()));
        Some(catalog)
    }
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
