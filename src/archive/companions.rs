//! What runs beside a session's stream: the history files of the other hosts are stored, slots are
//! kept on the standbys, and it is watched whether commits wait for this archiver. Nothing of it
//! delays the stream, and it ends with the session.

use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::session::{Server, Session};
use super::state::ArchiveState;
use super::timelines::{KnownTimelines, read_histories};
use crate::pg::{
    Connector, HostSpec, PgError, Sql, SynchronousRole, SynchronousVerdict, keep_slots_on_standbys,
};
use crate::repo::{ContentKey, history_key};
use crate::store::Region;
use crate::wal::{Lsn, TimelineId};

/// How long a host may take.
const HOST_PATIENCE: Duration = Duration::from_secs(15);
/// How long it is waited before hosts or regions that failed are asked again.
const PAUSE: Duration = Duration::from_secs(60);
/// How often the slots on the standbys follow the archive.
const SLOT_PAUSE: Duration = Duration::from_secs(10);
/// How often the server's settings for synchronous replication are looked at.
const SYNCHRONOUS_PAUSE: Duration = Duration::from_secs(30);

/// The tasks; they end when this is dropped.
pub(super) struct Companions {
    tasks: Vec<JoinHandle<()>>,
}

impl Companions {
    pub(super) fn start(session: &Session<'_>, server: &Server) -> Companions {
        let histories = OtherHistories {
            connector: session.connector.clone(),
            state: session.state.clone(),
            hosts: session.connector.other_hosts(&server.host),
            regions: server.regions.clone(),
            key: server.key.clone(),
            system_id: server.identity.system_id,
        };
        let slots = StandbySlots {
            connector: session.connector.clone(),
            state: session.state.clone(),
            primary: server.host.clone(),
            slot: session.settings.slot.clone(),
            system_id: server.identity.system_id,
        };
        let synchronous = Synchronous {
            connector: session.connector.clone(),
            state: session.state.clone(),
            host: server.host.clone(),
            last: None,
        };
        Companions {
            tasks: vec![
                tokio::spawn(histories.run()),
                tokio::spawn(slots.run()),
                tokio::spawn(synchronous.run()),
            ],
        }
    }
}

impl Drop for Companions {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Slots on the standbys, so that one that is promoted still has the WAL that the archive lacks.
struct StandbySlots {
    connector: Connector,
    state: ArchiveState,
    primary: HostSpec,
    slot: String,
    system_id: u64,
}

impl StandbySlots {
    async fn run(self) {
        let mut last_trouble = String::new();
        while !self.connector.other_hosts(&self.primary).is_empty() {
            tokio::time::sleep(SLOT_PAUSE).await;
            let durable: Lsn = *self.state.durable().borrow();
            if durable == Lsn::INVALID {
                continue;
            }
            let (connector, primary) = (&self.connector, &self.primary);
            let kept =
                keep_slots_on_standbys(connector, primary, self.system_id, &self.slot, durable);
            let troubles = kept.await.into_iter().filter_map(|(host, outcome)| {
                outcome.err().map(|error| format!("no slot is kept on {host}: {error}"))
            });
            let trouble = troubles.collect::<Vec<_>>().join("; ");
            if trouble != last_trouble {
                if !trouble.is_empty() {
                    tracing::warn!("{trouble}");
                }
                last_trouble = trouble;
            }
        }
    }
}

/// Whether commits wait for this archiver: then its durability policy never gives way. What would
/// make them wait for ever is told once.
struct Synchronous {
    connector: Connector,
    state: ArchiveState,
    host: HostSpec,
    last: Option<SynchronousVerdict>,
}

impl Synchronous {
    async fn run(mut self) {
        loop {
            if let Err(error) = self.watch().await {
                tracing::debug!("synchronous settings: {error}");
            }
            tokio::time::sleep(SYNCHRONOUS_PAUSE).await;
        }
    }

    async fn watch(&mut self) -> Result<(), PgError> {
        let sql = self.connector.sql(&self.host).await?;
        loop {
            self.look(&sql).await?;
            tokio::time::sleep(SYNCHRONOUS_PAUSE).await;
        }
    }

    async fn look(&mut self, sql: &Sql) -> Result<(), PgError> {
        let query = "SELECT current_setting('synchronous_standby_names'), current_setting('synchronous_commit')";
        let rows = sql.rows(query).await?;
        let text =
            |index: usize| rows.first().and_then(|row| row.get(index)?.clone()).unwrap_or_default();
        let own = self.connector.conninfo().application_name.as_deref().unwrap_or("pgkeep");
        let role = SynchronousRole::of(&text(0), own);
        self.state.set_synchronous(role != SynchronousRole::NotNamed);
        let verdict = role.verdict(&text(1));
        if self.last.as_ref() != Some(&verdict) {
            match &verdict {
                SynchronousVerdict::Fine(detail) => tracing::info!("{detail}"),
                SynchronousVerdict::Warning { detail, hint } => {
                    tracing::warn!("{detail}: {hint}");
                }
                SynchronousVerdict::Broken { detail, hint } => {
                    tracing::error!("{detail}: {hint}");
                    self.state.alarm(format!("{detail}: {hint}"));
                }
            }
            self.last = Some(verdict);
        }
        Ok(())
    }
}

/// History files that only another host has: of a promotion that was thrown away, say. PostgreSQL
/// probes numbers upward and stops at the first hole.
struct OtherHistories {
    connector: Connector,
    state: ArchiveState,
    hosts: Vec<HostSpec>,
    regions: Vec<Region>,
    key: ContentKey,
    system_id: u64,
}

impl OtherHistories {
    async fn run(mut self) {
        while !self.hosts.is_empty() {
            let mut again = Vec::new();
            for host in std::mem::take(&mut self.hosts) {
                let read = tokio::time::timeout(HOST_PATIENCE, self.read(&host)).await;
                let stored = match read {
                    Ok(Ok(files)) => self.store(files).await,
                    Ok(Err(error)) => {
                        tracing::debug!("history files of {host}: {error}");
                        false
                    }
                    Err(_) => false,
                };
                if !stored {
                    again.push(host);
                }
            }
            self.hosts = again;
            if !self.hosts.is_empty() {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn read(&self, host: &HostSpec) -> Result<Vec<(TimelineId, Bytes)>, super::ArchiveError> {
        let mut connection = self.connector.connect_any_role(host, &[]).await?;
        let identity = connection.identify_system().await?;
        if identity.system_id != self.system_id {
            tracing::warn!(
                "{host} in conninfo is another cluster (system identifier {})",
                identity.system_id
            );
            return Ok(Vec::new());
        }
        let (_, files) = read_histories(&mut connection, identity.timeline).await?;
        connection.close().await;
        Ok(files)
    }

    /// Whether every region has all of them now.
    async fn store(&self, files: Vec<(TimelineId, Bytes)>) -> bool {
        let mut complete = true;
        for region in &self.regions {
            let Some(known) = KnownTimelines::read_one(region).await else {
                complete = false;
                continue;
            };
            for (timeline, content) in &files {
                let hash = self.key.hash(content).short();
                if known.contradicts(*timeline, hash) {
                    let alarm = format!(
                        "two servers were promoted to timeline {timeline}: region {} has one history file, another host of conninfo has another",
                        region.name()
                    );
                    if self.state.alarm(alarm.clone()) {
                        tracing::error!("{alarm}");
                    }
                    continue;
                }
                if known.has(*timeline, hash) {
                    continue;
                }
                if let Err(error) = region.put(&history_key(*timeline, hash), content.clone()).await
                {
                    tracing::debug!("{error}");
                    complete = false;
                }
            }
        }
        complete
    }
}
