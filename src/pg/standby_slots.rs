//! Slots for later: a slot of the archiver's name on each standby that the connection string names,
//! advanced as the archive grows. So a standby that is promoted still has the WAL that the archive
//! lacks, whatever it would have recycled.
//!
//! PostgreSQL (13 to 18, tried) advances a physical slot on a standby too, never beyond what it has
//! replayed; it refuses to go back, and to move a slot that somebody streams from. A position that
//! was advanced is written at the next restartpoint: a crash may set it back, never forward.

use std::time::Duration;

use futures_util::future::join_all;

use super::{Connector, HostSpec, PgError, SlotFacts, Sql};
use crate::wal::Lsn;

/// How long one standby may take in all, so that one that hangs is tried again soon.
const HOST_TIMEOUT: Duration = Duration::from_secs(20);

/// One pass over the hosts of the connection string but the primary's: where the slot is missing or
/// lost its WAL it is made, and then advanced to `durable_lsn`, as far as the standby has replayed.
/// Every host has its own outcome and its own deadline.
pub async fn keep_slots_on_standbys(
    connector: &Connector,
    primary: &HostSpec,
    system_id: u64,
    slot: &str,
    durable_lsn: Lsn,
) -> Vec<(HostSpec, Result<SlotFacts, PgError>)> {
    let passes = connector.other_hosts(primary).into_iter().map(|host| async {
        let pass = keep_slot(connector, &host, system_id, slot, durable_lsn);
        let outcome = match tokio::time::timeout(HOST_TIMEOUT, pass).await {
            Ok(outcome) => outcome,
            Err(_) => Err(PgError::Timeout("keeping the slot")),
        };
        (host, outcome)
    });
    join_all(passes).await
}

async fn keep_slot(
    connector: &Connector,
    host: &HostSpec,
    system_id: u64,
    slot: &str,
    durable_lsn: Lsn,
) -> Result<SlotFacts, PgError> {
    let sql = connector.sql(host).await?;
    check_standby(&sql, system_id).await?;
    let mut facts = match sql.slot(slot).await? {
        // Somebody streams from it, and moves it.
        Some(facts) if facts.active_pid.is_some() => return Ok(facts),
        Some(facts) if facts.restart_lsn.is_some() && !facts.is_lost() => facts,
        found => make_slot(connector, &sql, slot, found.is_some()).await?,
    };
    if facts.restart_lsn.is_some_and(|lsn| lsn < durable_lsn) {
        facts.restart_lsn = Some(sql.advance_slot(slot, durable_lsn).await?);
    }
    Ok(facts)
}

/// Whether a server is a standby of the cluster.
///
/// # Errors
/// When it is not, or the connection breaks.
pub async fn check_standby(sql: &Sql, system_id: u64) -> Result<(), PgError> {
    let found = sql.system_id().await?;
    if found != system_id {
        return Err(PgError::OtherSystem { found, expected: system_id });
    }
    if sql.is_in_recovery().await? { Ok(()) } else { Err(PgError::NotAStandby) }
}

/// Makes the slot, in place of one that keeps no WAL (any more).
async fn make_slot(
    connector: &Connector,
    sql: &Sql,
    slot: &str,
    exists: bool,
) -> Result<SlotFacts, PgError> {
    let mut connection = connector.connect_any_role(sql.host(), &[]).await?;
    if exists {
        connection.drop_slot(slot).await?;
    }
    connection.create_slot(slot).await?;
    connection.close().await;
    tracing::info!(host = %sql.host(), slot, "made a slot on a standby, for the day it is promoted");
    sql.slot(slot).await?.ok_or_else(|| PgError::Protocol("the new slot is not there".into()))
}
