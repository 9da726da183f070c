//! Plain SQL through tokio-postgres, over a connection that this crate opened and authenticated: so
//! that both kinds of connection understand the same connection string, files and environment, and
//! obey the same rules about passwords.

use chrono::{DateTime, Utc};
use tokio::task::JoinHandle;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::connection::in_time;
use super::greeted::Greeted;
use super::replication::quote_literal;
use super::{Connection, HostSpec, PgError, SlotFacts};
use crate::wal::{InvalidLsn, Lsn};

/// A connection for plain SQL.
pub struct Sql {
    client: Client,
    task: JoinHandle<()>,
    host: HostSpec,
}

/// What the configuration and the archive must know of a server.
#[derive(Clone, Debug)]
pub struct ServerFacts {
    /// `server_version`, as it is printed.
    pub version: String,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// `wal_level`.
    pub wal_level: String,
    /// `max_wal_senders`.
    pub max_wal_senders: u32,
    /// Replication connections in use.
    pub wal_senders: u32,
    /// `max_replication_slots`.
    pub max_replication_slots: u32,
    /// Slots that exist.
    pub replication_slots: u32,
    /// `max_slot_wal_keep_size` in bytes; `None` without limit.
    pub max_slot_wal_keep_size: Option<u64>,
    /// `synchronous_standby_names`.
    pub synchronous_standby_names: String,
    /// `synchronous_commit`.
    pub synchronous_commit: String,
    /// `full_page_writes`.
    pub full_page_writes: bool,
    /// `data_checksums`.
    pub data_checksums: bool,
    /// `archive_mode`.
    pub archive_mode: String,
    /// Whether the role may start replication.
    pub may_replicate: bool,
    /// The server's clock.
    pub clock: DateTime<Utc>,
}

impl Sql {
    /// Goes on with an authenticated connection.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn over(connection: Connection) -> Result<Sql, PgError> {
        let host = connection.host().clone();
        let mut config = Config::new();
        // Whatever is named here, the greeting is ours.
        config.user("pgkeep").ssl_mode(SslMode::Disable);
        let greeted = config.connect_raw(Greeted::new(connection), NoTls);
        let (client, connection) = in_time("the SQL connection", greeted).await?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("SQL connection: {error}");
            }
        });
        // It waits while a backup streams. (Servers before 14 do not know the first one.)
        for setting in ["idle_session_timeout", "statement_timeout"] {
            let set = format!("SET {setting} = 0");
            if let Err(error) = in_time("SET", client.batch_execute(&set)).await {
                tracing::debug!("{setting}: {error}");
            }
        }
        Ok(Sql { client, task, host })
    }

    /// The host that it is connected to.
    pub fn host(&self) -> &HostSpec {
        &self.host
    }

    /// Runs SQL and gives the rows of its last statement as text.
    ///
    /// # Errors
    /// When the server refuses it or does not answer in time, or the connection breaks.
    pub async fn rows(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>, PgError> {
        let messages = in_time("SQL", self.client.simple_query(sql)).await?;
        let mut rows = Vec::new();
        for message in messages {
            match message {
                SimpleQueryMessage::Row(row) => {
                    let columns = 0..row.len();
                    rows.push(columns.map(|i| row.get(i).map(str::to_owned)).collect());
                }
                SimpleQueryMessage::RowDescription(_) => rows.clear(),
                _ => {}
            }
        }
        Ok(rows)
    }

    /// The single value that SQL gives, or `None` for NULL or no row.
    ///
    /// # Errors
    /// When the server refuses it or the connection breaks.
    pub async fn value(&self, sql: &str) -> Result<Option<String>, PgError> {
        Ok(self
            .rows(sql)
            .await?
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next())
            .flatten())
    }

    /// Whether the server is a standby, or otherwise in recovery.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn is_in_recovery(&self) -> Result<bool, PgError> {
        Ok(self.value("SELECT pg_is_in_recovery()").await?.as_deref() == Some("t"))
    }

    /// The cluster's system identifier.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn system_id(&self) -> Result<u64, PgError> {
        let text = self.value("SELECT system_identifier FROM pg_control_system()").await?;
        // SQL has no unsigned numbers.
        text.and_then(|text| text.parse::<i64>().ok())
            .map(i64::cast_unsigned)
            .ok_or_else(|| PgError::Protocol("the system identifier cannot be read".into()))
    }

    /// The server's clock.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn clock(&self) -> Result<DateTime<Utc>, PgError> {
        let text =
            self.value("SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint").await?;
        text.and_then(|text| text.parse().ok())
            .and_then(DateTime::from_timestamp_micros)
            .ok_or_else(|| PgError::Protocol("the server's clock cannot be read".into()))
    }

    /// What the configuration and the archive must know.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn server_facts(&self) -> Result<ServerFacts, PgError> {
        let rows = self.rows(FACTS).await?;
        let row = rows.first().ok_or_else(|| PgError::Protocol("no facts".into()))?;
        let text = |index: usize| row.get(index).and_then(Clone::clone).unwrap_or_default();
        let number = |index: usize| text(index).parse().unwrap_or(0);
        let keep: i64 = text(7).parse().unwrap_or(-1);
        Ok(ServerFacts {
            version: text(0),
            in_recovery: text(1) == "t",
            wal_level: text(2),
            max_wal_senders: number(3),
            wal_senders: number(4),
            max_replication_slots: number(5),
            replication_slots: number(6),
            max_slot_wal_keep_size: u64::try_from(keep).ok().map(|mebibytes| mebibytes << 20),
            synchronous_standby_names: text(8),
            synchronous_commit: text(9),
            full_page_writes: text(10) == "on",
            data_checksums: text(11) == "on",
            archive_mode: text(12),
            may_replicate: text(13) == "t",
            clock: self.clock().await?,
        })
    }

    /// What the server knows of a slot; `None` when it does not exist.
    ///
    /// # Errors
    /// When the connection breaks, or the slot is not a physical one.
    pub async fn slot(&self, name: &str) -> Result<Option<SlotFacts>, PgError> {
        let name = quote_literal(name);
        let rows = self.rows(&format!("{SLOT} WHERE s.slot_name = {name}")).await?;
        let Some(row) = rows.into_iter().next() else { return Ok(None) };
        let mut row = row.into_iter();
        let mut next = || row.next().flatten();
        if next().as_deref() != Some("physical") {
            return Err(PgError::Protocol(format!(
                "the replication slot {name} is a logical one; set another name for slot"
            )));
        }
        let active_pid = next().and_then(|pid| pid.parse().ok());
        let restart_lsn = next().map(|text| lsn(&text)).transpose()?;
        let (wal_status, holder) = (next(), next());
        let wal_end = next().map_or(Ok(Lsn::INVALID), |text| lsn(&text))?;
        let number = |text: Option<String>| text.and_then(|text| text.parse::<i64>().ok());
        Ok(Some(SlotFacts {
            active_pid,
            restart_lsn,
            wal_status,
            holder,
            wal_end,
            // Negative behind the limit.
            safe_wal_size: number(next()).map(|size| u64::try_from(size).unwrap_or(0)),
            limit_bytes: number(next())
                .and_then(|mebibytes| u64::try_from(mebibytes).ok())
                .map(|mebibytes| mebibytes << 20),
        }))
    }

    /// Moves a physical slot forward, so that the server may recycle WAL before `target`. Gives
    /// where it stands then: at most where the server's own WAL ends, on a standby where replay
    /// does, and where it stood if that lies behind `target`.
    ///
    /// # Errors
    /// When the slot does not exist, keeps no WAL or is in use, or the connection breaks. The role
    /// needs REPLICATION.
    pub async fn advance_slot(&self, name: &str, target: Lsn) -> Result<Lsn, PgError> {
        let name = quote_literal(name);
        // The server refuses to go back.
        let sql = format!(
            "SELECT CASE WHEN restart_lsn >= '{target}' THEN restart_lsn \
             ELSE (pg_replication_slot_advance(slot_name, '{target}')).end_lsn END \
             FROM pg_replication_slots WHERE slot_name = {name}"
        );
        match self.value(&sql).await? {
            Some(text) => lsn(&text),
            None => Err(PgError::Protocol(format!("the replication slot {name} does not exist"))),
        }
    }
}

fn lsn(text: &str) -> Result<Lsn, PgError> {
    text.parse().map_err(|error: InvalidLsn| PgError::Protocol(error.to_string()))
}

/// `safe_wal_size` is left out where it means nothing: a standby computes it from WAL that it would
/// have written itself.
const SLOT: &str = "SELECT s.slot_type, s.active_pid, s.restart_lsn, s.wal_status, \
    r.application_name || coalesce(' at ' || r.client_addr, ''), \
    CASE WHEN pg_is_in_recovery() \
    THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) \
    ELSE pg_current_wal_lsn() END, \
    CASE WHEN pg_is_in_recovery() THEN NULL ELSE s.safe_wal_size END, \
    (SELECT setting FROM pg_settings WHERE name = 'max_slot_wal_keep_size') \
    FROM pg_replication_slots s LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid";

const FACTS: &str = "SELECT current_setting('server_version'), pg_is_in_recovery(), \
    current_setting('wal_level'), current_setting('max_wal_senders'), \
    (SELECT count(*) FROM pg_stat_replication), current_setting('max_replication_slots'), \
    (SELECT count(*) FROM pg_replication_slots), \
    (SELECT setting FROM pg_settings WHERE name = 'max_slot_wal_keep_size'), \
    current_setting('synchronous_standby_names'), current_setting('synchronous_commit'), \
    current_setting('full_page_writes'), current_setting('data_checksums'), \
    current_setting('archive_mode'), \
    (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user)";

impl Drop for Sql {
    fn drop(&mut self) {
        self.task.abort();
    }
}
