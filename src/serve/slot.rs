//! Looks at the replication slot on the server, again and again, for the status report. Archiving
//! never depends on it.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::pg::{Connector, PgError, SlotWatch};

/// How often the server is asked.
const INTERVAL: Duration = Duration::from_secs(5);

/// Keeps `watch` up to date until cancelled, over one connection that is made anew when it breaks.
pub async fn watch_slot(
    connector: &Connector,
    slot: &str,
    watch: &SlotWatch,
    cancelled: &CancellationToken,
) {
    let looking = async {
        loop {
            if let Err(error) = look(connector, slot, watch).await {
                tracing::debug!("looking at the slot: {error}");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        () = cancelled.cancelled() => {}
        () = looking => {}
    }
}

/// Looks until something fails.
async fn look(connector: &Connector, slot: &str, watch: &SlotWatch) -> Result<(), PgError> {
    let sql = connector.first_sql().await?;
    let host = sql.host().to_string();
    loop {
        watch.observe(slot, &host, sql.slot(slot).await?.as_ref(), Instant::now());
        tokio::time::sleep(INTERVAL).await;
        // A primary that was demoted keeps its connections; another host may be primary now.
        if sql.is_in_recovery().await? {
            return Ok(());
        }
    }
}
