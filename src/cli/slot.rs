//! `pgkeep slot`: shows, creates and drops the replication slots on the servers of the connection
//! string.

use std::time::{Duration, Instant};

use clap::{Args as ClapArgs, Subcommand};
use futures_util::future::join_all;
use serde::Serialize;

use super::context::{Context, conninfo};
use super::{CliError, Exit, output};
use crate::pg::{
    Connector, HostSpec, PgError, SlotFacts, Sql, check_standby, time_until_limit, wal_rate,
};
use crate::wal::Lsn;

/// How long one server may take.
const HOST_TIMEOUT: Duration = Duration::from_secs(20);
/// The rate of WAL is measured over so much time.
const RATE_TIME: Duration = Duration::from_secs(1);

/// Arguments of `slot`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    /// Print as JSON
    #[arg(long, global = true)]
    json: bool,
}

/// What to do with the slots; by default they are shown.
#[derive(Debug, Subcommand)]
enum Action {
    /// Show the slot on every server of the connection string
    Show,
    /// Create the slot on the primary
    Create {
        /// And on its standbys
        #[arg(long)]
        standbys: bool,
    },
    /// Drop the slot on the primary: the server may then recycle WAL that is not archived
    Drop {
        /// And on its standbys
        #[arg(long)]
        standbys: bool,
        /// Drop it although it keeps WAL
        #[arg(long)]
        yes: bool,
    },
}

/// Runs the action.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    let connector = Connector::new(conninfo(&config)?);
    let slots = Slots { connector, name: config.cluster.slot.clone(), json: args.json };
    match args.action.unwrap_or(Action::Show) {
        Action::Show => slots.show().await,
        Action::Create { standbys } => slots.create(standbys).await,
        Action::Drop { standbys, yes } => slots.drop(standbys, yes).await,
    }
}

/// One server, as it is printed; its fields are a contract.
#[derive(Debug, Serialize)]
struct HostRow {
    host: String,
    /// `primary` or `standby`; `null` when it could not be asked.
    role: Option<&'static str>,
    /// Why it could not be asked.
    error: Option<String>,
    /// `null` when it does not exist there.
    slot: Option<SlotRow>,
}

#[derive(Debug, Serialize)]
struct SlotRow {
    active: bool,
    active_pid: Option<i32>,
    holder: Option<String>,
    restart_lsn: Option<Lsn>,
    wal_status: Option<String>,
    retained_bytes: Option<u64>,
    limit_bytes: Option<u64>,
    wal_bytes_per_second: Option<u64>,
    seconds_until_limit: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    slot: &'a str,
    hosts: Vec<HostRow>,
}

/// What was done on one server, as it is printed; its fields are a contract.
#[derive(Debug, Serialize)]
struct Done {
    host: String,
    /// `created`, `exists`, `dropped`, `absent` or `failed`.
    outcome: &'static str,
    detail: String,
}

struct Slots {
    connector: Connector,
    name: String,
    json: bool,
}

impl Slots {
    async fn show(&self) -> Result<Exit, CliError> {
        let hosts = &self.connector.conninfo().hosts;
        let rows = join_all(hosts.iter().map(|host| async {
            match in_time(self.look(host)).await {
                Ok(row) => row,
                Err(error) => HostRow {
                    host: host.to_string(),
                    role: None,
                    error: Some(without_host(&error)),
                    slot: None,
                },
            }
        }))
        .await;
        let asked = rows.iter().any(|row| row.role.is_some());
        if self.json {
            output::json(&Report { slot: &self.name, hosts: rows })?;
        } else {
            print(&self.name, &rows);
        }
        Ok(if asked { Exit::Done } else { Exit::Failed })
    }

    async fn look(&self, host: &HostSpec) -> Result<HostRow, PgError> {
        let sql = self.connector.sql(host).await?;
        let role = if sql.is_in_recovery().await? { "standby" } else { "primary" };
        let mut slot = None;
        if let Some(first) = sql.slot(&self.name).await? {
            let begun = Instant::now();
            tokio::time::sleep(RATE_TIME).await;
            let last = sql.slot(&self.name).await?.unwrap_or_else(|| first.clone());
            slot = Some(slot_row(&last, wal_rate(first.wal_end, last.wal_end, begun.elapsed())));
        }
        Ok(HostRow { host: host.to_string(), role: Some(role), error: None, slot })
    }

    async fn create(&self, standbys: bool) -> Result<Exit, CliError> {
        let primary = self.primary().await?;
        let mut done = vec![self.outcome(primary.host(), self.create_on(&primary)).await];
        if standbys {
            let system_id = primary.system_id().await?;
            for host in self.connector.other_hosts(primary.host()) {
                let create = async {
                    let standby = self.connector.sql(&host).await?;
                    check_standby(&standby, system_id).await?;
                    self.create_on(&standby).await
                };
                done.push(self.outcome(&host, create).await);
            }
        }
        self.tell(&done)
    }

    async fn create_on(&self, sql: &Sql) -> Result<(&'static str, String), PgError> {
        if let Some(facts) = sql.slot(&self.name).await? {
            return Ok(match facts.restart_lsn {
                Some(lsn) if !facts.is_lost() => ("exists", format!("it keeps WAL from {lsn} on")),
                _ => ("failed", "it exists and keeps no WAL (any more): drop it first".into()),
            });
        }
        let mut connection = self.connector.connect_any_role(sql.host(), &[]).await?;
        connection.create_slot(&self.name).await?;
        connection.close().await;
        let lsn = sql.slot(&self.name).await?.and_then(|facts| facts.restart_lsn);
        Ok(("created", lsn.map_or_else(String::new, |lsn| format!("it keeps WAL from {lsn} on"))))
    }

    async fn drop(&self, standbys: bool, yes: bool) -> Result<Exit, CliError> {
        let primary = self.primary().await?;
        if let Some(facts) = primary.slot(&self.name).await? {
            self.check_droppable(primary.host(), &facts, yes)?;
        }
        let mut done = vec![self.outcome(primary.host(), self.drop_on(&primary)).await];
        if standbys {
            let system_id = primary.system_id().await?;
            for host in self.connector.other_hosts(primary.host()) {
                let dropped = async {
                    let standby = self.connector.sql(&host).await?;
                    check_standby(&standby, system_id).await?;
                    self.drop_on(&standby).await
                };
                done.push(self.outcome(&host, dropped).await);
            }
        }
        self.tell(&done)
    }

    /// Whether the user knows what is lost, and nobody uses it.
    fn check_droppable(
        &self,
        host: &HostSpec,
        facts: &SlotFacts,
        yes: bool,
    ) -> Result<(), CliError> {
        let name = &self.name;
        if let Some(holder) = facts.held_by() {
            return Err(CliError::new(
                Exit::Failed,
                format!("the slot {name} on {host} is in use by {holder}; PostgreSQL drops no slot in use"),
            )
            .hint("stop that archiver first; a running \"pgkeep run\" would make the slot anew"));
        }
        match facts.retained_bytes() {
            Some(bytes) if !yes && !facts.is_lost() => Err(CliError::new(
                Exit::Usage,
                format!(
                    "the slot {name} on {host} keeps {} of WAL; once it is dropped the server may recycle WAL that is not archived yet, which leaves a gap that no restore crosses",
                    output::bytes(bytes)
                ),
            )
            .hint("\"pgkeep status\" tells how far the regions are; --yes drops it")),
            _ => Ok(()),
        }
    }

    async fn drop_on(&self, sql: &Sql) -> Result<(&'static str, String), PgError> {
        if sql.slot(&self.name).await?.is_none() {
            return Ok(("absent", "there is none".into()));
        }
        let mut connection = self.connector.connect_any_role(sql.host(), &[]).await?;
        connection.drop_slot(&self.name).await?;
        connection.close().await;
        Ok(("dropped", String::new()))
    }

    /// The server that the archiver would use.
    async fn primary(&self) -> Result<Sql, CliError> {
        let sql = self.connector.first_sql().await?;
        if self.connector.conninfo().hosts.len() > 1 && sql.is_in_recovery().await? {
            return Err(CliError::new(Exit::Failed, format!("{} is a standby", sql.host())).hint(
                "with several hosts, target_session_attrs=read-write in conninfo finds the primary",
            ));
        }
        Ok(sql)
    }

    async fn outcome(
        &self,
        host: &HostSpec,
        doing: impl Future<Output = Result<(&'static str, String), PgError>>,
    ) -> Done {
        let (outcome, detail) = match in_time(doing).await {
            Ok(done) => done,
            Err(error) => ("failed", without_host(&error)),
        };
        Done { host: host.to_string(), outcome, detail }
    }

    fn tell(&self, done: &[Done]) -> Result<Exit, CliError> {
        if self.json {
            output::json(&done)?;
        } else {
            for Done { host, outcome, detail } in done {
                let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
                output::line(&format!("slot {} on {host}: {outcome}{detail}", self.name));
            }
        }
        let failed = done.iter().any(|done| done.outcome == "failed");
        Ok(if failed { Exit::Failed } else { Exit::Done })
    }
}

async fn in_time<T>(doing: impl Future<Output = Result<T, PgError>>) -> Result<T, PgError> {
    let timeout = tokio::time::timeout(HOST_TIMEOUT, doing);
    timeout.await.unwrap_or(Err(PgError::Timeout("asking the server")))
}

/// The error of a host that is named beside it.
fn without_host(error: &PgError) -> String {
    match error {
        PgError::Host { source, .. } => source.to_string(),
        error => error.to_string(),
    }
}

fn slot_row(facts: &SlotFacts, rate: Option<f64>) -> SlotRow {
    SlotRow {
        active: facts.active_pid.is_some(),
        active_pid: facts.active_pid,
        holder: facts.holder.clone(),
        restart_lsn: facts.restart_lsn,
        wal_status: facts.wal_status.clone(),
        retained_bytes: facts.retained_bytes(),
        limit_bytes: facts.limit_bytes,
        wal_bytes_per_second: rate.map(|rate| rate as u64),
        seconds_until_limit: time_until_limit(facts.bytes_until_limit(), rate).map(|t| t.as_secs()),
    }
}

fn print(name: &str, rows: &[HostRow]) {
    let dash = || "-".to_owned();
    let cells = |row: &HostRow| {
        let mut cells = vec![row.host.clone(), row.role.unwrap_or("-").to_owned()];
        let Some(slot) = &row.slot else {
            cells.extend(std::iter::repeat_n(dash(), 6));
            cells.push(row.error.clone().unwrap_or_else(|| format!("no slot {name}")));
            return cells;
        };
        let left = slot.seconds_until_limit.map(|s| output::duration(Duration::from_secs(s)));
        cells.extend([
            slot.wal_status.clone().unwrap_or_else(dash),
            slot.restart_lsn.map_or_else(dash, |lsn| lsn.to_string()),
            slot.retained_bytes.map_or_else(dash, output::bytes),
            slot.limit_bytes.map_or_else(|| "none".into(), output::bytes),
            slot.wal_bytes_per_second.map_or_else(dash, |rate| output::bytes(rate) + "/s"),
            left.unwrap_or_else(dash),
        ]);
        cells.push(match (&slot.holder, slot.active_pid) {
            (holder, Some(pid)) => {
                format!("in use by {} (process {pid})", holder.as_deref().unwrap_or("?"))
            }
            _ => "not in use".into(),
        });
        cells
    };
    let header = [
        "HOST",
        "ROLE",
        "WAL",
        "FROM",
        "KEPT",
        "LIMIT",
        "RATE",
        "LIMIT IN",
        &format!("SLOT {name}"),
    ];
    output::table(&header, &rows.iter().map(cells).collect::<Vec<_>>());
}
