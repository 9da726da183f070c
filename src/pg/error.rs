//! What can go wrong with a server, and what the user can do about it.

use std::io;

use super::{ConnInfoError, HostSpec};

/// An error that the server reported (`ErrorResponse`,
/// `src/backend/utils/error/elog.c`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `WARNING` …
    pub severity: String,
    /// The SQLSTATE.
    pub code: String,
    /// The message, in the server's language.
    pub message: String,
    /// Its detail, or empty.
    pub detail: String,
    /// Its hint, or empty.
    pub hint: String,
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} (SQLSTATE {})", self.severity, self.message, self.code)?;
        if !self.detail.is_empty() {
            write!(f, "; {}", self.detail)?;
        }
        if !self.hint.is_empty() {
            write!(f, "; {}", self.hint)?;
        }
        Ok(())
    }
}

/// Why something on a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// The connection string cannot be used.
    #[error(transparent)]
    ConnInfo(#[from] ConnInfoError),
    /// No host of the connection string would do; one line for each.
    #[error("no server could be used: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoHost(Vec<PgError>),
    /// One host would not do.
    #[error("{host}: {source}")]
    Host {
        /// The host.
        host: HostSpec,
        /// Why.
        source: Box<PgError>,
    },
    /// The network.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// TLS could not be set up.
    #[error("TLS: {0}")]
    Tls(String),
    /// The server wants a way of authentication that cannot be given.
    #[error("authentication: {0}")]
    Authentication(String),
    /// The server is not of the kind asked for with `target_session_attrs`.
    #[error("it is {found}, and target_session_attrs asks for {wanted}")]
    WrongRole {
        /// What it is.
        found: &'static str,
        /// What was asked for.
        wanted: &'static str,
    },
    /// A slot can be kept for later only on a standby.
    #[error("it is not a standby")]
    NotAStandby,
    /// Another cluster's server.
    #[error("it belongs to another cluster: its system identifier is {found}, not {expected}")]
    OtherSystem {
        /// Its system identifier.
        found: u64,
        /// The one that it should have.
        expected: u64,
    },
    /// The server reported an error.
    #[error("{0}")]
    Server(ServerError),
    /// The server said something that the protocol does not allow here.
    #[error("unexpected answer from the server: {0}")]
    Protocol(String),
    /// The connection was closed.
    #[error("the server closed the connection")]
    Closed,
    /// No answer in time.
    #[error("{0}: no answer in time")]
    Timeout(&'static str),
    /// Plain SQL failed.
    #[error("SQL: {0}")]
    Sql(#[from] tokio_postgres::Error),
}

impl PgError {
    /// The SQLSTATE, when the server reported an error.
    pub fn code(&self) -> Option<&str> {
        match self {
            PgError::Server(error) => Some(&error.code),
            PgError::Sql(error) => error.code().map(|code| code.code()),
            PgError::Host { source, .. } => source.code(),
            PgError::NoHost(errors) => errors.iter().find_map(PgError::code),
            _ => None,
        }
    }

    /// The server's message, when it reported an error.
    fn server_message(&self) -> &str {
        match self {
            PgError::Server(error) => &error.message,
            PgError::Sql(error) => error.as_db_error().map_or("", |error| error.message()),
            PgError::Host { source, .. } => source.server_message(),
            PgError::NoHost(errors) => errors
                .iter()
                .map(PgError::server_message)
                .find(|text| !text.is_empty())
                .unwrap_or(""),
            _ => "",
        }
    }

    /// Whether it may pass by itself: a network that is down, a server that is starting,
    /// stopping, recovering or full, a slot that another client holds.
    pub fn is_transient(&self) -> bool {
        match self {
            PgError::Io { .. } | PgError::Closed | PgError::Timeout(_) => true,
            PgError::WrongRole { .. } => true,
            PgError::Host { source, .. } => source.is_transient(),
            PgError::NoHost(errors) => errors.iter().any(PgError::is_transient),
            // No replication connection is allowed at all: that is a setting, not a crowd.
            PgError::Server(error) if is_replication_off(&error.code, &error.message) => false,
            PgError::Server(_) | PgError::Sql(_) => match self.code() {
                // Connection exceptions, resources, operator intervention, system errors; slot in use.
                Some(code) => {
                    matches!(code.get(..2), Some("08" | "53" | "57" | "58")) || code == "55006"
                }
                None => true,
            },
            _ => false,
        }
    }

    /// What the user can do, if something is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            PgError::Host { source, .. } => return source.hint(),
            PgError::NoHost(errors) => return errors.iter().find_map(PgError::hint),
            PgError::Tls(message) => return Some(tls_hint(message)),
            PgError::Io { source, .. } => {
                return match source.kind() {
                    io::ErrorKind::ConnectionRefused => Some("is the server running, and does it listen there (listen_addresses, port, unix_socket_directories)?".into()),
                    io::ErrorKind::NotFound => Some("the socket does not exist: is the server running, and is unix_socket_directories the folder given as host?".into()),
                    io::ErrorKind::PermissionDenied => Some("the socket may not be used by this user: see unix_socket_permissions".into()),
                    _ => None,
                };
            }
            _ => {}
        }
        server_hint(self.code()?, self.server_message())
    }
}

/// `wal_level = minimal` shows up only as `max_wal_senders` being exceeded at 0.
fn is_replication_off(code: &str, message: &str) -> bool {
    code == "53300" && message.contains("currently 0")
}

fn tls_hint(message: &str) -> String {
    if message.contains("ALPN") {
        return "servers before PostgreSQL 17 know no sslnegotiation=direct, and a proxy in front of the server may not either: leave it out".into();
    }
    if message.contains("does not support") {
        return "set ssl = on in the server, or sslmode=disable here if the network is trusted"
            .into();
    }
    "sslrootcert must name the certificate of the authority that signed the server's certificate, and with sslmode=verify-full the host must be one of the names in it".into()
}

/// Advice for an error of the server, by its SQLSTATE and, where one code serves many cases, its
/// message.
fn server_hint(code: &str, message: &str) -> Option<String> {
    let text = match code {
        "28P01" => {
            "the password is wrong: check PGPASSWORD, passfile and ~/.pgpass, and that the role has a password of the kind that pg_hba.conf asks for"
        }
        "28000" if message.contains("pg_hba.conf") => {
            "pg_hba.conf of the server has no line that lets this role in from here for replication; add e.g.\n    host replication pgkeep <this address>/32 scram-sha-256\n(a line for \"all\" databases does not cover replication) and run SELECT pg_reload_conf()"
        }
        "28000" => {
            "the role does not exist or may not log in: CREATE ROLE pgkeep LOGIN REPLICATION PASSWORD '…'"
        }
        "42501" => {
            "the role lacks a right: ALTER ROLE pgkeep REPLICATION; GRANT pg_monitor TO pgkeep"
        }
        "3D000" => "the database for plain SQL does not exist: set dbname in conninfo",
        _ if is_replication_off(code, message) => {
            "the server allows no replication (max_wal_senders = 0, as wal_level = minimal demands): set wal_level = replica and max_wal_senders = 10, and restart it"
        }
        "53300" => {
            "the server has no free connection for replication: raise max_wal_senders (and max_connections)"
        }
        "55006" => "another client uses the replication slot",
        "58P01" | "42704" if message.contains("replication slot") => {
            "the slot does not exist: run \"pgkeep run\", which creates it"
        }
        "55000" if message.contains("wal_level") => {
            "set wal_level = replica in the server and restart it: at minimal, WAL cannot be archived"
        }
        "53400" | "54000" if message.contains("replication slots") => {
            "raise max_replication_slots and restart the server"
        }
        _ if message.contains("wal_level") => {
            "set wal_level = replica in the server and restart it: at minimal, WAL cannot be archived"
        }
        _ if message.contains("max_replication_slots") => {
            "raise max_replication_slots in the server and restart it"
        }
        _ => return None,
    };
    Some(text.to_owned())
}
