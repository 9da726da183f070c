//! The way into a session: which host, is it the archive's, is the slot free and ready.

use super::ArchiveError;
use super::receiver::SENDER_TIMEOUT;
use super::session::{Server, Session};
use super::start::is_missing;
use super::timelines::{KnownTimelines, read_histories};
use crate::pg::{Connection, HostSpec, PgError, ServerError, Sql};
use crate::repo::{ContentKey, FORMAT_VERSION, LINEAGE_FILE, Lineage};
use crate::store::{Region, ask_all};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, WalFormat};

impl Session<'_> {
    /// Connects to the first host whose timelines are the archive's: one that is not may be an old
    /// primary that came back.
    pub(super) async fn connect(&self) -> Result<(Connection, Server), ArchiveError> {
        let mut refused: Vec<HostSpec> = Vec::new();
        let mut refusal = None;
        loop {
            let connector = self.connector.narrowed(!self.settings.allow_standby, &refused);
            let settings = [("wal_sender_timeout", SENDER_TIMEOUT)];
            let connection = match connector.connect(&settings).await {
                Ok(connection) => connection,
                Err(error) => return Err(refusal.unwrap_or(error.into())),
            };
            let host = connection.host().clone();
            let error = match self.get_to_know(connection).await {
                Err(error @ ArchiveError::Diverged { .. }) => error,
                outcome => return outcome,
            };
            tracing::debug!("{host} will not do: {error}");
            let error = refusal.take().unwrap_or(error);
            refused.push(host);
            if refused.len() >= self.connector.conninfo().hosts.len() {
                return Err(error);
            }
            refusal = Some(error);
        }
    }

    /// Checks that the server is the archive's, and makes its slot ready.
    async fn get_to_know(
        &self,
        mut connection: Connection,
    ) -> Result<(Connection, Server), ArchiveError> {
        let identity = connection.identify_system().await?;
        let segment_size = SegmentSize::from_setting(&connection.show("wal_segment_size").await?)
            .map_err(|error| PgError::Protocol(error.to_string()))?;
        let (major, system_id) = (connection.major(), identity.system_id);
        let format = WalFormat { major, segment_size, system_id };
        if format.page_magic().is_none() {
            return Err(ArchiveError::UnknownVersion(connection.server_version().to_owned()));
        }
        let sql = self.connector.sql(connection.host()).await?;
        let in_recovery = sql.value("SELECT pg_is_in_recovery()").await?.as_deref() == Some("t");
        if in_recovery && !self.settings.allow_standby {
            return Err(ArchiveError::Standby(connection.host().to_string()));
        }
        self.check_slot_is_free(&sql).await?;
        let established = self.check_lineage(system_id).await?;
        if !established {
            self.memory.begin_in(self.cluster.iter().map(|region| region.name().to_owned()));
        }
        let lineage = Lineage {
            format: FORMAT_VERSION,
            cluster: self.settings.cluster.clone(),
            system_identifier: system_id.to_string(),
            postgres_major: major,
            wal_segment_size: segment_size,
        };
        let regions = self.cluster.within(&system_id.to_string()).iter().cloned().collect();
        let mut server = Server {
            host: connection.host().clone(),
            version: connection.server_version().to_owned(),
            history: TimelineHistory::without_ancestors(identity.timeline),
            histories: Vec::new(),
            identity,
            in_recovery,
            restart_lsn: None,
            format,
            key: ContentKey::for_system(system_id),
            lineage,
            regions,
            established,
        };
        self.learn_timelines(&mut connection, &mut server).await?;
        // Only now: a server that is refused shall not keep WAL for nobody.
        server.restart_lsn = self.prepare_slot(&mut connection, &sql).await?;
        Ok((connection, server))
    }

    /// Makes the slot if it is not there, or has lost its WAL; where its WAL begins.
    async fn prepare_slot(
        &self,
        connection: &mut Connection,
        sql: &Sql,
    ) -> Result<Option<Lsn>, ArchiveError> {
        let name = &self.settings.slot;
        connection.create_slot(name).await?;
        let mut slot = sql.slot(name).await?;
        if slot.as_ref().is_some_and(|slot| slot.wal_status.as_deref() == Some("lost")) {
            tracing::error!("the slot has lost WAL (max_slot_wal_keep_size): making it anew");
            connection.drop_slot(name).await?;
            connection.create_slot(name).await?;
            slot = sql.slot(name).await?;
        }
        Ok(slot.and_then(|slot| slot.restart_lsn))
    }

    /// A hot spare asks the server only, and no region.
    async fn check_slot_is_free(&self, sql: &Sql) -> Result<(), ArchiveError> {
        let Some(slot) = sql.slot(&self.settings.slot).await? else { return Ok(()) };
        let Some(pid) = slot.active_pid else { return Ok(()) };
        let holder = slot.holder.unwrap_or_default();
        Err(ArchiveError::Server(PgError::Server(ServerError {
            severity: "ERROR".into(),
            code: "55006".into(),
            message: format!(
                "the replication slot {} is held by {holder} (process {pid})",
                self.settings.slot
            ),
            detail: String::new(),
            hint: String::new(),
        })))
    }

    /// Whether any region holds this lineage. A name under which only other lineages live is
    /// somebody else's (invariant I8).
    async fn check_lineage(&self, system_id: u64) -> Result<bool, ArchiveError> {
        let own = &system_id.to_string();
        let regions: Vec<Region> = self.cluster.iter().cloned().collect();
        let lookups = ask_all(&regions, |region| async move {
            let (mut folders, _) = region.list_folder("").await?;
            // Only lineages: their folders are named by numbers.
            folders.retain(|name| name != own && name.bytes().all(|byte| byte.is_ascii_digit()));
            match region.within(own).get(LINEAGE_FILE).await {
                Ok(_) => Ok((folders, true)),
                Err(error) if is_missing(&error) => Ok((folders, false)),
                Err(error) => Err(error),
            }
        });
        let mut failures = Vec::new();
        let mut foreign = None;
        let mut established = false;
        for (region, lookup) in regions.iter().zip(lookups.await) {
            match lookup {
                Ok((_, true)) => established = true,
                Ok((folders, false)) if !folders.is_empty() => {
                    foreign = Some((region.name().to_owned(), folders.join(", ")));
                }
                Ok(_) => {}
                Err(error) => failures.push(error),
            }
        }
        // An archive may not be begun, nor a region filled, while one that is silent may hold it.
        if !failures.is_empty() && !established {
            return Err(ArchiveError::NoRegion(failures));
        }
        match foreign {
            Some((region, found)) if !established && !self.settings.new_lineage => {
                let cluster = self.settings.cluster.clone();
                Err(ArchiveError::Foreign { cluster, region, found, server: system_id })
            }
            _ => Ok(established),
        }
    }

    /// Reads the server's histories and checks them against the archive's. The uploaders store
    /// them before anything else.
    pub(super) async fn learn_timelines(
        &self,
        connection: &mut Connection,
        server: &mut Server,
    ) -> Result<(), ArchiveError> {
        let (history, files) = read_histories(connection, server.identity.timeline).await?;
        let known = KnownTimelines::read(&server.regions).await;
        let takes_writes = self.refuses_newer(server);
        server.histories = known.check(&history, files, &server.key, takes_writes)?;
        server.history = history;
        Ok(())
    }

    /// Whether an archive that has gone on with a newer timeline than the server's is not this
    /// server's: it takes writes, and nobody said that it may.
    pub(super) fn refuses_newer(&self, server: &Server) -> bool {
        !server.in_recovery && !self.settings.accept_timeline
    }
}
