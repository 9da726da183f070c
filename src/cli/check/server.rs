//! The server: who it is, what it allows, how it is set up.

use chrono::Utc;

use super::super::output;
use super::{Items, slots};
use crate::config::Config;
use crate::pg::{ConnInfo, Connector, ServerFacts, SynchronousRole, SynchronousVerdict};

/// A server's clock may differ from this machine's by so many seconds without a word.
const CLOCK_TOLERANCE_SECONDS: f64 = 5.0;

/// Checks the server, and where it is found, its slots and its standbys.
pub(super) async fn check(config: &Config, conninfo: &ConnInfo, items: &mut Items) {
    let connector = Connector::new(conninfo.clone());
    let connected = connector.connect(&[]).await;
    let mut connection = match connected {
        Ok(connection) => connection,
        Err(error) => return items.fail("replication connection", error.to_string(), error.hint()),
    };
    let version = connection.server_version().to_owned();
    items.ok("replication connection", format!("{}, PostgreSQL {version}", connection.host()));
    if !(13..=18).contains(&connection.major()) {
        items.fail(
            "version",
            format!("PostgreSQL {version}"),
            Some("13 to 18 are supported".into()),
        );
    }
    match connection.identify_system().await {
        Ok(system) => items.ok(
            "system",
            format!(
                "identifier {}, timeline {}, WAL at {}",
                system.system_id, system.timeline, system.flushed
            ),
        ),
        Err(error) => items.fail("system", error.to_string(), error.hint()),
    }
    let host = connection.host().clone();
    connection.close().await;
    let sql = match connector.sql(&host).await {
        Ok(sql) => sql,
        Err(error) => return items.fail("SQL connection", error.to_string(), error.hint()),
    };
    match sql.server_facts().await {
        Ok(facts) => {
            items.ok(
                "SQL connection",
                format!("database {}", conninfo.dbname.as_deref().unwrap_or("postgres")),
            );
            check_facts(config, conninfo, &facts, items);
        }
        Err(error) => items.fail("SQL connection", error.to_string(), error.hint()),
    }
    slots::check(config, &connector, &sql, items).await;
}

fn check_facts(config: &Config, conninfo: &ConnInfo, facts: &ServerFacts, items: &mut Items) {
    match (facts.in_recovery, config.cluster.allow_standby) {
        (false, _) => items.ok("role of the server", "primary"),
        (true, true) => items.ok("role of the server", "standby, which the configuration allows"),
        (true, false) => items.fail(
            "role of the server",
            "it is a standby",
            Some("add target_session_attrs=read-write to conninfo with all hosts, or set cluster.allow_standby = true".into()),
        ),
    }
    match facts.wal_level.as_str() {
        "replica" | "logical" => items.ok("wal_level", &facts.wal_level),
        other => items.fail(
            "wal_level",
            other,
            Some("set wal_level = replica and restart the server".into()),
        ),
    }
    let free = facts.max_wal_senders.saturating_sub(facts.wal_senders);
    let senders = format!("{} of {} free", free, facts.max_wal_senders);
    // The sidecar needs one, a backup another.
    match free {
        0 => items.fail(
            "max_wal_senders",
            senders,
            Some("raise max_wal_senders and restart the server".into()),
        ),
        1 => items.warn(
            "max_wal_senders",
            senders,
            "the sidecar needs one and a backup another: raise max_wal_senders",
        ),
        _ => items.ok("max_wal_senders", senders),
    }
    match facts.max_slot_wal_keep_size {
        None => items.warn(
            "max_slot_wal_keep_size",
            "no limit",
            "if no region takes WAL for long, the slot fills the server's disk; a limit trades that for a gap in the archive",
        ),
        Some(limit) => items.ok("max_slot_wal_keep_size", output::bytes(limit)),
    }
    check_synchronous(conninfo, facts, items);
    if !facts.full_page_writes {
        items.warn("full_page_writes", "off", "a base backup of such a server is safe only because the server turns it on meanwhile; turn it on");
    }
    if facts.data_checksums {
        items.ok("data checksums", "on");
    } else {
        items.warn("data checksums", "off", "damage on the server's disk goes into backups unseen; pg_checksums --enable turns them on");
    }
    let skew = (Utc::now() - facts.clock).as_seconds_f64();
    if skew.abs() <= CLOCK_TOLERANCE_SECONDS {
        items.ok("clock", format!("{skew:+.1} s from the server's"));
    } else {
        items.warn(
            "clock",
            format!("{skew:+.1} s from the server's"),
            "targets in time are the server's; synchronise the clocks",
        );
    }
}

/// CASES 40: `remote_apply` never completes with an archiver, and `*` picks it by accident.
fn check_synchronous(conninfo: &ConnInfo, facts: &ServerFacts, items: &mut Items) {
    let item = "synchronous replication";
    let names = &facts.synchronous_standby_names;
    let own = conninfo.application_name.as_deref().unwrap_or("pgkeep");
    let shown = |detail: String| match names.is_empty() {
        true => detail,
        false => format!("{detail} (synchronous_standby_names = '{names}')"),
    };
    match SynchronousRole::of(names, own).verdict(&facts.synchronous_commit) {
        SynchronousVerdict::Fine(detail) => items.ok(item, shown(detail)),
        SynchronousVerdict::Warning { detail, hint } => items.warn(item, shown(detail), hint),
        SynchronousVerdict::Broken { detail, hint } => {
            items.fail(item, shown(detail), Some(hint.into()));
        }
    }
}
