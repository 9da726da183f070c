//! `pgkeep check`: tests all that the configuration needs, item by item.

use bytes::Bytes;
use chrono::Utc;
use clap::Args as ClapArgs;
use serde::Serialize;

use super::context::{Context, conninfo};
use super::{CliError, Exit, output};
use crate::config::{Config, RegionConfig};
use crate::pg::{ConnInfo, Connector, ServerFacts, SlotFacts};
use crate::store::{Patience, Put, Region, RegionSpec, open_region};

/// A server's clock may differ from this machine's by so many seconds without a word.
const CLOCK_TOLERANCE_SECONDS: f64 = 5.0;

/// Arguments of `check`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// How an item turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Failed,
}

#[derive(Debug, Serialize)]
struct Item {
    item: String,
    state: State,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct Items {
    items: Vec<Item>,
}

impl Items {
    fn add(&mut self, item: &str, state: State, detail: impl Into<String>, hint: Option<String>) {
        self.items.push(Item { item: item.to_owned(), state, detail: detail.into(), hint });
    }

    fn ok(&mut self, item: &str, detail: impl Into<String>) {
        self.add(item, State::Ok, detail, None);
    }

    fn warn(&mut self, item: &str, detail: impl Into<String>, hint: &str) {
        self.add(item, State::Warning, detail, Some(hint.to_owned()));
    }

    fn fail(&mut self, item: &str, detail: impl Into<String>, hint: Option<String>) {
        self.add(item, State::Failed, detail, hint);
    }
}

/// Checks; exit code 1 when anything failed.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    check(&config, args.json).await
}

/// Checks a configuration that was loaded.
pub async fn check(config: &Config, as_json: bool) -> Result<Exit, CliError> {
    let mut items = Items::default();
    items.ok("configuration", format!("cluster {}", config.cluster.name));
    match conninfo(config) {
        Ok(conninfo) => check_server(config, &conninfo, &mut items).await,
        Err(error) => items.fail("connection string", error.message, error.hint),
    }
    for region in &config.regions {
        check_region(config, region, &mut items).await;
    }
    if as_json {
        output::json(&items)?;
    } else {
        print(&items);
    }
    let failed = items.items.iter().any(|item| item.state == State::Failed);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn print(items: &Items) {
    for item in &items.items {
        let state = match item.state {
            State::Ok => "ok     ",
            State::Warning => "WARNING",
            State::Failed => "FAILED ",
        };
        output::line(&format!("{state}  {}: {}", item.item, item.detail));
        if let Some(hint) = &item.hint {
            output::line(&format!("           -> {hint}"));
        }
    }
}

async fn check_server(config: &Config, conninfo: &ConnInfo, items: &mut Items) {
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
    match sql.slot(&config.cluster.slot).await {
        Ok(slot) => check_slot(&config.cluster.slot, slot, items),
        Err(error) => items.fail("replication slot", error.to_string(), error.hint()),
    }
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
    let names = &facts.synchronous_standby_names;
    let own = conninfo.application_name.as_deref().unwrap_or("pgkeep");
    let star = names.contains('*');
    let named = names
        .split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '-'))
        .any(|word| word.eq_ignore_ascii_case(own));
    match (named || star, facts.synchronous_commit.as_str()) {
        (true, "remote_apply") => items.fail(
            "synchronous replication",
            format!("synchronous_commit = remote_apply and synchronous_standby_names = '{names}'"),
            Some("an archiver applies nothing: commits would wait for ever. Set synchronous_commit = on, or name only standbys".into()),
        ),
        (true, _) if star => items.warn(
            "synchronous replication",
            format!("synchronous_standby_names = '{names}'"),
            "'*' makes this archiver a synchronous standby; name the standbys instead if that is not meant",
        ),
        (true, _) => items.ok("synchronous replication", format!("commits wait for {own}")),
        (false, _) => items.ok("synchronous replication", "commits do not wait for this archiver"),
    }
}

fn check_slot(name: &str, slot: Option<SlotFacts>, items: &mut Items) {
    let Some(slot) = slot else {
        return items.ok(
            "replication slot",
            format!("{name} does not exist yet; \"pgkeep run\" creates it"),
        );
    };
    let keeps = slot.restart_lsn.map_or("nothing".into(), |lsn| format!("WAL from {lsn} on"));
    if slot.wal_status.as_deref() == Some("lost") {
        return items.fail(
            "replication slot",
            format!("{name} has lost WAL (max_slot_wal_keep_size)"),
            Some(format!("SELECT pg_drop_replication_slot('{name}'); \"pgkeep run\" then creates it anew, records the gap, and a new base backup is needed")),
        );
    }
    let used = match (slot.active_pid, slot.holder) {
        (Some(pid), holder) => {
            format!(", in use by {} (process {pid})", holder.unwrap_or_default())
        }
        _ => String::new(),
    };
    items.ok("replication slot", format!("{name} keeps {keeps}{used}"));
}

async fn check_region(config: &Config, region: &RegionConfig, items: &mut Items) {
    let item = format!("region {}", region.name);
    let spec = RegionSpec {
        name: region.name.clone(),
        url: region.url.clone(),
        options: region.option_texts(),
    };
    let opened = match open_region(&spec) {
        Ok(opened) => opened.within(&config.cluster.name),
        Err(error) => return items.fail(&item, error.message, None),
    };
    match try_region(&opened.with_patience(Patience::LOOKUP)).await {
        Ok(conditional) => {
            let create = match conditional {
                _ if opened.refuses_creation() => "refuses",
                true => "honours",
                false => "ignores",
            };
            items.ok(&item, format!("{}: write, read, list and delete work; it {create} conditional creation", region.url));
        }
        // What a local folder lacks is in its message.
        Err(error) if region.url.starts_with("file:") => items.fail(&item, error.to_string(), None),
        Err(error) => items.fail(
            &item,
            error.to_string(),
            Some("check the URL, the credentials (the provider's usual environment variables, or keys of this [[region]]), and that they allow to write, read, list and delete".into()),
        ),
    }
}

/// Writes, reads, lists and deletes one small object. Gives whether the store honours conditional
/// creation, on which nothing depends.
async fn try_region(region: &Region) -> Result<bool, crate::store::StoreError> {
    let key = format!("check/{:016x}", rand::random::<u64>());
    let content = Bytes::from_static(b"pgkeep check: this object may be deleted\n");
    region.put(&key, content.clone()).await?;
    let outcome = async {
        let read = region.get(&key).await?;
        if read != content {
            return Err(region.damaged(&key, "what was read is not what was written"));
        }
        let listed = region.list("check").await?;
        if !listed.iter().any(|object| object.key == key) {
            return Err(region.damaged(&key, "what was written is not listed"));
        }
        Ok(region.put_once(&key, content.clone()).await? == Put::AlreadyThere)
    };
    let outcome = outcome.await;
    region.delete(&key).await?;
    outcome
}
