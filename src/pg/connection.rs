//! A connection to a server: startup, messages, simple queries.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::message::Incoming;
use super::socket::{OpenSocket, Socket};
use super::{ConnInfo, HostSpec, PgError, Secret, TargetSessionAttrs};

/// How much is read from the socket at once.
const READ_SIZE: usize = 256 << 10;
/// How long a server may take to answer a command: none of those sent here waits for anything but
/// the server itself. Streams have no such limit.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Bounds a command in time. A connection whose command was given up must not be used again.
pub(super) async fn in_time<T, E: Into<PgError>>(
    doing: &'static str,
    command: impl Future<Output = Result<T, E>>,
) -> Result<T, PgError> {
    match tokio::time::timeout(COMMAND_TIMEOUT, command).await {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(_) => Err(PgError::Timeout(doing)),
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose<'a> {
    /// Physical replication: `replication=true`.
    Replication,
    /// Plain SQL in this database.
    Sql(&'a str),
}

/// A connection that has been authenticated.
pub struct Connection {
    socket: Socket,
    buffer: BytesMut,
    parameters: BTreeMap<String, String>,
    host: HostSpec,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({})", self.host)
    }
}

impl Connection {
    /// Sends the startup message and authenticates.
    pub(super) async fn start(
        conninfo: &ConnInfo,
        host: &HostSpec,
        open: OpenSocket,
        password: Option<&Secret>,
        purpose: Purpose<'_>,
        settings: &[(&str, &str)],
    ) -> Result<Connection, PgError> {
        let mut connection = Connection {
            socket: open.socket,
            buffer: BytesMut::with_capacity(READ_SIZE),
            parameters: BTreeMap::new(),
            host: host.clone(),
        };
        let mut parameters = vec![
            ("user", conninfo.user.as_str()),
            ("client_encoding", "UTF8"),
            // What is parsed must not depend on the server's or the role's settings.
            ("DateStyle", "ISO"),
        ];
        match purpose {
            Purpose::Replication => {
                let name = conninfo.application_name.as_deref().unwrap_or("pgkeep");
                parameters.extend([("replication", "true"), ("application_name", name)]);
            }
            // Not the name that synchronous_standby_names may hold.
            Purpose::Sql(database) => {
                parameters.extend([("database", database), ("application_name", "pgkeep sql")]);
            }
        }
        if let Some(options) = &conninfo.options {
            parameters.push(("options", options));
        }
        parameters.extend_from_slice(settings);
        let mut output = BytesMut::new();
        frontend::startup_message(parameters, &mut output)
            .map_err(|error| PgError::Protocol(error.to_string()))?;
        connection.send(&output).await?;
        connection.authenticate(conninfo, open.binding, password).await?;
        loop {
            match connection.receive().await? {
                Incoming::Ready => return Ok(connection),
                Incoming::Error(error) => return Err(PgError::Server(error)),
                _ => {}
            }
        }
    }

    /// Checks what `target_session_attrs` asks for. Servers from 14 on report it by themselves.
    pub(super) async fn check_role(&mut self, wanted: TargetSessionAttrs) -> Result<(), PgError> {
        let (wanted_name, wants_standby, by_read_only) = match wanted {
            TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => return Ok(()),
            TargetSessionAttrs::ReadWrite => ("read-write", false, true),
            TargetSessionAttrs::ReadOnly => ("read-only", true, true),
            TargetSessionAttrs::Primary => ("primary", false, false),
            TargetSessionAttrs::Standby => ("standby", true, false),
        };
        let is_on = |value: Option<&String>| value.map(|value| value == "on");
        let standby = is_on(self.parameters.get("in_hot_standby"));
        let read_only = is_on(self.parameters.get("default_transaction_read_only"));
        let found = match (standby, read_only) {
            (Some(standby), Some(read_only)) => standby || (by_read_only && read_only),
            _ => self.show("transaction_read_only").await? == "on",
        };
        if found == wants_standby {
            return Ok(());
        }
        let found = if found { "a standby or read-only" } else { "a primary" };
        Err(PgError::WrongRole { found, wanted: wanted_name })
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// The socket, and what was received and not yet looked at.
    pub(super) fn into_socket(self) -> (Socket, BytesMut) {
        (self.socket, self.buffer)
    }

    /// The host that it is connected to.
    pub fn host(&self) -> &HostSpec {
        &self.host
    }

    /// What the server reported of itself, e.g. `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The server's version, as it prints it.
    pub fn server_version(&self) -> &str {
        self.parameter("server_version").unwrap_or("unknown")
    }

    /// The server's major version; 0 when it reports none.
    pub fn major(&self) -> u32 {
        let digits: String =
            self.server_version().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    }

    /// Sends bytes that are already in the wire format.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), PgError> {
        let doing = |source| PgError::Io { doing: "sending to the server", source };
        self.socket.write_all(bytes).await.map_err(doing)?;
        self.socket.flush().await.map_err(doing)
    }

    /// The next message. Cancellation loses nothing: bytes stay in the buffer.
    pub(super) async fn receive(&mut self) -> Result<Incoming, PgError> {
        loop {
            match Incoming::take(&mut self.buffer)? {
                Some(Incoming::Parameter(name, value)) => {
                    self.parameters.insert(name, value);
                }
                Some(message) => return Ok(message),
                None => {
                    self.buffer.reserve(READ_SIZE);
                    let read = self.socket.read_buf(&mut self.buffer).await;
                    match read {
                        Ok(0) => return Err(PgError::Closed),
                        Ok(_) => {}
                        Err(source) => {
                            return Err(PgError::Io { doing: "receiving from the server", source });
                        }
                    }
                }
            }
        }
    }

    /// Runs a simple query or replication command; gives the rows of all its result sets.
    ///
    /// # Errors
    /// When the server refuses it or does not answer in time, or the connection breaks.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<Bytes>>>, PgError> {
        in_time("a replication command", self.query_without_deadline(sql)).await
    }

    async fn query_without_deadline(
        &mut self,
        sql: &str,
    ) -> Result<Vec<Vec<Option<Bytes>>>, PgError> {
        self.send_query(sql).await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            match self.receive().await? {
                Incoming::Row(row) => rows.push(row),
                Incoming::Error(error) if error.severity == "FATAL" => {
                    return Err(PgError::Server(error));
                }
                Incoming::Error(error) => failure = Some(PgError::Server(error)),
                Incoming::Notice(notice) => tracing::debug!("server: {notice}"),
                Incoming::Ready => return failure.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    pub(super) async fn send_query(&mut self, sql: &str) -> Result<(), PgError> {
        let mut output = BytesMut::new();
        frontend::query(sql, &mut output).map_err(|error| PgError::Protocol(error.to_string()))?;
        self.send(&output).await
    }

    /// Says goodbye, as far as the server listens.
    pub async fn close(mut self) {
        let mut output = BytesMut::new();
        frontend::terminate(&mut output);
        let _ = self.send(&output).await;
        let _ = self.socket.shutdown().await;
    }
}

impl std::fmt::Display for HostSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.socket_path() {
            Some(path) => return write!(f, "{}", path.display()),
            None => write!(f, "{}:{}", self.host, self.port)?,
        }
        // A name may stand for several servers.
        match self.hostaddr {
            Some(address) if address.to_string() != self.host.to_string() => {
                write!(f, " ({address})")
            }
            _ => Ok(()),
        }
    }
}
