//! The way to the servers of a connection string: which host, with or without encryption, who
//! opens the socket.

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

    /// Connects for replication to the first host that will do. `settings` are server settings
    /// for the session.
    ///
    /// # Errors
    /// Why each host would not do.
    pub async fn connect(&self, settings: &[(&str, &str)]) -> Result<Connection, PgError> {
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
            for host in ordered_hosts(&self.conninfo) {
                match self.connect_host(&host, settings, *wanted).await {
                    Ok(connection) => return Ok(connection),
                    Err(error) => {
                        failures.push(PgError::Host { host, source: Box::new(error) });
                    }
                }
            }
        }
        match failures.len() {
            1 => Err(failures.remove(0)),
            _ => Err(PgError::NoHost(failures)),
        }
    }

    /// Connects for replication to one host.
    ///
    /// # Errors
    /// Why it would not do.
    pub async fn connect_host(
        &self,
        host: &HostSpec,
        settings: &[(&str, &str)],
        wanted: TargetSessionAttrs,
    ) -> Result<Connection, PgError> {
        let mut connection = self.open(host, Purpose::Replication, settings).await?;
        connection.check_role(wanted).await?;
        Ok(connection)
    }

    /// Connects to one host for plain SQL: the one that a replication connection has found good.
    ///
    /// # Errors
    /// Why it would not do.
    pub async fn sql(&self, host: &HostSpec) -> Result<Sql, PgError> {
        let open = async {
            let database = self.conninfo.dbname.as_deref().unwrap_or("postgres");
            let connection = self.open(host, Purpose::Sql(database), &[]).await?;
            Sql::over(connection).await
        };
        open.await.map_err(|error| PgError::Host { host: host.clone(), source: Box::new(error) })
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
        let attempt = async {
            let mut last = PgError::Closed;
            for encrypted in encryption_order(&self.conninfo, host) {
                let opened = self.dial.dial(&self.conninfo, host, *encrypted).await;
                let outcome = match opened {
                    Ok(Some(socket)) => {
                        let start = Connection::start(
                            &self.conninfo,
                            host,
                            socket,
                            password.as_ref(),
                            purpose,
                            settings,
                        );
                        start.await
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
        };
        let timeout = self.conninfo.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
        tokio::time::timeout(timeout, attempt).await.map_err(|_| PgError::Timeout("connecting"))?
    }
}

/// The hosts in the order in which they are tried.
fn ordered_hosts(conninfo: &ConnInfo) -> Vec<HostSpec> {
    let mut hosts = conninfo.hosts.clone();
    if conninfo.load_balance_hosts == LoadBalance::Random {
        use rand::seq::SliceRandom;
        hosts.shuffle(&mut rand::rng());
    }
    hosts
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
