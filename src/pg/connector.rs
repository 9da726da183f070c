//! The way to the servers of a connection string: which host, with or without encryption, who
//! opens the socket.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::connection::Purpose;
use super::conninfo::LoadBalance;
use super::{
    ConnInfo, Connection, Dial, HostSpec, Network, PgError, Secret, Sql, SslMode, Surroundings,
    TargetSessionAttrs,
};

/// How long one address may take to connect and authenticate, unless `connect_timeout` says
/// otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection string, and who opens sockets for it.
#[derive(Clone)]
pub struct Connector {
    conninfo: ConnInfo,
    dial: Arc<dyn Dial>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connector({:?})", self.conninfo)
    }
}

impl Connector {
    /// Connections over the network.
    pub fn new(conninfo: ConnInfo) -> Connector {
        Connector::with_dial(conninfo, Arc::new(Network))
    }

    /// Connections over what somebody else opens.
    pub fn with_dial(conninfo: ConnInfo, dial: Arc<dyn Dial>) -> Connector {
        Connector { conninfo, dial }
    }

    /// The connection string.
    pub fn conninfo(&self) -> &ConnInfo {
        &self.conninfo
    }

    /// The same way without the hosts that are to be avoided and, where `primary` is wanted and the
    /// connection string names several hosts and no `target_session_attrs`, to the primary among
    /// them.
    pub fn narrowed(&self, primary: bool, avoid: &[HostSpec]) -> Connector {
        let mut narrowed = self.clone();
        let conninfo = &mut narrowed.conninfo;
        let any = conninfo.target_session_attrs == TargetSessionAttrs::Any;
        if primary && any && conninfo.hosts.len() > 1 {
            conninfo.target_session_attrs = TargetSessionAttrs::Primary;
        }
        for host in avoid {
            narrowed.conninfo.hosts = narrowed.other_hosts(host);
        }
        narrowed
    }

    /// Connects for replication to the first host that will do. `settings` are server settings
    /// for the session.
    ///
    /// # Errors
    /// Why each host would not do.
    pub async fn connect(&self, settings: &[(&str, &str)]) -> Result<Connection, PgError> {
        self.first_host(Purpose::Replication, settings).await
    }

    /// Connects for plain SQL to the first host that will do; no place of `max_wal_senders` is
    /// taken.
    ///
    /// # Errors
    /// Why each host would not do.
    pub async fn first_sql(&self) -> Result<Sql, PgError> {
        Sql::over(self.first_host(Purpose::Sql(self.database()), &[]).await?).await
    }

    /// Connects for replication to one host, whatever its role.
    ///
    /// # Errors
    /// Why it would not do.
    pub async fn connect_any_role(
        &self,
        host: &HostSpec,
        settings: &[(&str, &str)],
    ) -> Result<Connection, PgError> {
        let wanted = TargetSessionAttrs::Any;
        let outcome = self.connect_host(host, Purpose::Replication, settings, wanted).await;
        outcome.map_err(one_or_all)
    }

    /// Connects to one host for plain SQL: the one that a replication connection has found good.
    ///
    /// # Errors
    /// Why it would not do.
    pub async fn sql(&self, host: &HostSpec) -> Result<Sql, PgError> {
        let purpose = Purpose::Sql(self.database());
        let opened = self.connect_host(host, purpose, &[], TargetSessionAttrs::Any).await;
        let over = Sql::over(opened.map_err(one_or_all)?).await;
        over.map_err(|error| PgError::Host { host: host.clone(), source: Box::new(error) })
    }

    /// The hosts of the connection string but for this one: where a standby may be. A name counts
    /// as one host, however many addresses it has.
    pub fn other_hosts(&self, primary: &HostSpec) -> Vec<HostSpec> {
        let is_primary = |host: &HostSpec| {
            host.host == primary.host
                && host.port == primary.port
                && (host.hostaddr.is_none() || host.hostaddr == primary.hostaddr)
        };
        self.conninfo.hosts.iter().filter(|host| !is_primary(host)).cloned().collect()
    }

    /// The database for plain SQL.
    fn database(&self) -> &str {
        self.conninfo.dbname.as_deref().unwrap_or("postgres")
    }

    async fn first_host(
        &self,
        purpose: Purpose<'_>,
        settings: &[(&str, &str)],
    ) -> Result<Connection, PgError> {
        let mut failures = Vec::new();
        // prefer-standby takes anything on its second way through the list.
        let attrs = self.conninfo.target_session_attrs;
        let rounds: &[TargetSessionAttrs] = match attrs {
            TargetSessionAttrs::PreferStandby => {
                &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any]
            }
            _ => &[attrs],
        };
        for wanted in rounds {
            for host in self.shuffled(self.conninfo.hosts.clone()) {
                match self.connect_host(&host, purpose, settings, *wanted).await {
                    Ok(connection) => return Ok(connection),
                    Err(errors) => failures.extend(errors),
                }
            }
        }
        Err(one_or_all(failures))
    }

    /// Tries the addresses of one host. Each has its own time, and its own role: a name may stand
    /// for all servers of a cluster.
    async fn connect_host(
        &self,
        host: &HostSpec,
        purpose: Purpose<'_>,
        settings: &[(&str, &str)],
        wanted: TargetSessionAttrs,
    ) -> Result<Connection, Vec<PgError>> {
        let failed = |host: &HostSpec, error: PgError| PgError::Host {
            host: host.clone(),
            source: Box::new(error),
        };
        let looked_up = self.in_time("looking up the host", self.dial.addresses(host)).await;
        let addresses = looked_up.map_err(|error| vec![failed(host, error)])?;
        let mut failures = Vec::new();
        for address in self.shuffled(addresses) {
            let attempt = async {
                let mut connection = self.open(&address, purpose, settings).await?;
                connection.check_role(wanted).await?;
                Ok(connection)
            };
            match self.in_time("connecting", attempt).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failures.push(failed(&address, error)),
            }
        }
        Err(failures)
    }

    async fn in_time<T>(
        &self,
        doing: &'static str,
        attempt: impl Future<Output = Result<T, PgError>>,
    ) -> Result<T, PgError> {
        let timeout = self.conninfo.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
        tokio::time::timeout(timeout, attempt).await.map_err(|_| PgError::Timeout(doing))?
    }

    /// In the order in which they are tried (`load_balance_hosts`).
    fn shuffled(&self, mut hosts: Vec<HostSpec>) -> Vec<HostSpec> {
        if self.conninfo.load_balance_hosts == LoadBalance::Random {
            use rand::seq::SliceRandom;
            hosts.shuffle(&mut rand::rng());
        }
        hosts
    }

    /// Tries the ways that `sslmode` allows, one after the other.
    async fn open(
        &self,
        host: &HostSpec,
        purpose: Purpose<'_>,
        settings: &[(&str, &str)],
    ) -> Result<Connection, PgError> {
        let surroundings = Surroundings::from_process();
        let database = match purpose {
            Purpose::Replication => ConnInfo::REPLICATION_DATABASE,
            Purpose::Sql(database) => database,
        };
        let password = password_for(&self.conninfo, host, database, &surroundings);
        let mut last = PgError::Closed;
        for encrypted in encryption_order(&self.conninfo, host) {
            let opened = self.dial.dial(&self.conninfo, host, *encrypted).await;
            let outcome = match opened {
                Ok(Some(socket)) => {
                    let password = password.as_ref();
                    Connection::start(&self.conninfo, host, socket, password, purpose, settings)
                        .await
                }
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// A single failure stands for itself.
fn one_or_all(mut failures: Vec<PgError>) -> PgError {
    match failures.len() {
        1 => failures.remove(0),
        _ => PgError::NoHost(failures),
    }
}

/// The password for a host; a passfile that cannot be used is a warning, as in libpq.
fn password_for(
    conninfo: &ConnInfo,
    host: &HostSpec,
    database: &str,
    surroundings: &Surroundings<'_>,
) -> Option<Secret> {
    match conninfo.password_for(host, database, surroundings) {
        Ok(password) => password,
        Err(problem) => {
            tracing::warn!("{problem}");
            None
        }
    }
}

/// With or without encryption, in the order that `sslmode` asks for.
fn encryption_order(conninfo: &ConnInfo, host: &HostSpec) -> &'static [bool] {
    match conninfo.ssl_mode {
        _ if host.socket_path().is_some() => &[false],
        SslMode::Disable => &[false],
        SslMode::Allow => &[false, true],
        SslMode::Prefer => &[true, false],
        _ => &[true],
    }
}
