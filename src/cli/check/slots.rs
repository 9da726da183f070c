//! The slot on the primary and on its standbys: whether it holds what it should, and how long the
//! server's disk or its limit bears that.

use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::super::output;
use super::Items;
use crate::config::Config;
use crate::pg::{
    Connector, HostSpec, PgError, SlotFacts, Sql, check_standby, time_until_limit, wal_rate,
};

/// The rate of WAL is measured over so much time.
const RATE_TIME: Duration = Duration::from_secs(1);
/// How long a standby may take.
const STANDBY_DEADLINE: Duration = Duration::from_secs(20);

/// Checks the slots.
pub(super) async fn check(config: &Config, connector: &Connector, sql: &Sql, items: &mut Items) {
    let name = &config.cluster.slot;
    match look(sql, name).await {
        Ok(Some((slot, rate))) => check_slot(name, &slot, rate, items),
        Ok(None) => items.ok(
            "replication slot",
            format!("{name} does not exist yet; \"pgkeep run\" creates it"),
        ),
        Err(error) => items.fail("replication slot", error.to_string(), error.hint()),
    }
    if let Err(error) = check_idle_timeout(sql, items).await {
        items.fail("idle_replication_slot_timeout", error.to_string(), error.hint());
    }
    let system_id = match sql.system_id().await {
        Ok(system_id) => system_id,
        Err(error) => return items.fail("standbys", error.to_string(), error.hint()),
    };
    let hosts = connector.other_hosts(sql.host());
    let looks = join_all(hosts.iter().map(|host| async move {
        let look = look_at_standby(connector, host, system_id, name);
        let looked = tokio::time::timeout(STANDBY_DEADLINE, look).await;
        looked.unwrap_or(Err(PgError::Timeout("asking the server")))
    }));
    for (host, slot) in hosts.iter().zip(looks.await) {
        check_standby_slot(name, host, slot, items);
    }
}

/// The slot, and how fast WAL is written.
async fn look(sql: &Sql, name: &str) -> Result<Option<(SlotFacts, Option<f64>)>, PgError> {
    let Some(first) = sql.slot(name).await? else { return Ok(None) };
    let begun = Instant::now();
    tokio::time::sleep(RATE_TIME).await;
    let Some(slot) = sql.slot(name).await? else { return Ok(None) };
    let rate = wal_rate(first.wal_end, slot.wal_end, begun.elapsed());
    Ok(Some((slot, rate)))
}

fn check_slot(name: &str, slot: &SlotFacts, rate: Option<f64>, items: &mut Items) {
    let item = "replication slot";
    if slot.is_lost() {
        return items.fail(
            item,
            format!("{name} has lost WAL (max_slot_wal_keep_size)"),
            Some("\"pgkeep run\" makes it anew and records the gap; then a new base backup is needed".into()),
        );
    }
    let keeps = match (slot.restart_lsn, slot.retained_bytes()) {
        (Some(lsn), Some(bytes)) => format!("{} of WAL, from {lsn} on", output::bytes(bytes)),
        _ => "no WAL".into(),
    };
    let used = slot.held_by().map_or_else(String::new, |holder| format!(", in use by {holder}"));
    let left = time_until_limit(slot.bytes_until_limit(), rate).map_or_else(String::new, |left| {
        format!(
            "; at the present rate the limit is reached in {} if nothing is archived",
            output::duration(left)
        )
    });
    let detail = format!("{name} keeps {keeps}{used}{left}");
    match slot.wal_status.as_deref() {
        Some("unreserved") => items.warn(
            item,
            detail,
            "max_slot_wal_keep_size is reached: the server drops this WAL at its next checkpoint. Is the archiver running, and do the regions take WAL?",
        ),
        _ => items.ok(item, detail),
    }
}

/// PostgreSQL 18 can give up slots that nobody uses for long: after an outage of the archiver its
/// WAL is gone.
async fn check_idle_timeout(sql: &Sql, items: &mut Items) -> Result<(), PgError> {
    let value = sql
        .value(
            "SELECT current_setting(name) FROM pg_settings \
             WHERE name = 'idle_replication_slot_timeout' AND setting <> '0'",
        )
        .await?;
    if let Some(value) = value {
        items.warn(
            "idle_replication_slot_timeout",
            value,
            "an archiver that is away for longer loses its slot and the WAL behind it: set it to 0",
        );
    }
    Ok(())
}

async fn look_at_standby(
    connector: &Connector,
    host: &HostSpec,
    system_id: u64,
    name: &str,
) -> Result<Option<SlotFacts>, PgError> {
    let sql = connector.sql(host).await?;
    check_standby(&sql, system_id).await?;
    sql.slot(name).await
}

fn check_standby_slot(
    name: &str,
    host: &HostSpec,
    slot: Result<Option<SlotFacts>, PgError>,
    items: &mut Items,
) {
    let item = format!("standby {host}");
    match slot {
        Ok(Some(slot)) if slot.is_lost() || slot.restart_lsn.is_none() => items.warn(
            &item,
            format!("the slot {name} keeps no WAL (any more)"),
            "\"pgkeep run\" makes it anew",
        ),
        Ok(Some(slot)) => items.ok(
            &item,
            format!(
                "the slot {name} keeps {} of WAL",
                output::bytes(slot.retained_bytes().unwrap_or(0))
            ),
        ),
        Ok(None) => items.ok(&item, format!("there is no slot {name} yet; \"pgkeep run\" makes it")),
        Err(error @ PgError::OtherSystem { .. }) => items.fail(
            &item,
            error.to_string(),
            Some("conninfo must name servers of one cluster only".into()),
        ),
        Err(error @ PgError::NotAStandby) => items.warn(
            &item,
            error.to_string(),
            "it is the primary by another name, or was promoted: two primaries of one cluster diverge",
        ),
        Err(error) => items.warn(
            &item,
            error.to_string(),
            "without a slot there, WAL that is not archived when it is promoted may be lost",
        ),
    }
}
