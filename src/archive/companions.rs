//! What runs beside a session's stream: the history files of the other hosts are stored. Nothing of
//! it delays the stream, and it ends with the session.

use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::session::{Server, Session};
use super::state::ArchiveState;
use super::timelines::{KnownTimelines, read_histories};
use crate::pg::{Connector, HostSpec, TargetSessionAttrs};
use crate::repo::{ContentKey, history_key};
use crate::store::Region;
use crate::wal::TimelineId;

/// How long a host may take.
const HOST_PATIENCE: Duration = Duration::from_secs(15);
/// How long it is waited before hosts or regions that failed are asked again.
const PAUSE: Duration = Duration::from_secs(60);

/// The tasks; they end when this is dropped.
pub(super) struct Companions {
    tasks: Vec<JoinHandle<()>>,
}

impl Companions {
    pub(super) fn start(session: &Session<'_>, server: &Server) -> Companions {
        let others: Vec<_> = session.connector.conninfo().hosts.iter().cloned().collect();
        let others: Vec<_> = others.into_iter().filter(|host| *host != server.host).collect();
        let histories = OtherHistories {
            connector: session.connector.clone(),
            state: session.state.clone(),
            hosts: others,
            regions: server.regions.clone(),
            key: server.key.clone(),
            system_id: server.identity.system_id,
        };
        Companions { tasks: vec![tokio::spawn(histories.run())] }
    }
}

impl Drop for Companions {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
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
        let mut connection =
            self.connector.connect_host(host, &[], TargetSessionAttrs::Any).await?;
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
            let known = KnownTimelines::read(std::slice::from_ref(region)).await;
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
