//! What to connect to: libpq's connection strings and environment, read as libpq reads them.
//!
//! ```text
//! keyword = value  keyword = 'it\'s a value with spaces'  …
//! postgresql://[user[:password]@][host[:port][,…]][/dbname][?keyword=value[&…]]
//! ```
//! In the first form a backslash takes the next character literally. In the second, which may
//! begin with `postgres://` too, anything may be percent-encoded, an IPv6 address stands in
//! brackets, and a socket directory is a host written `%2Fvar%2Frun`. What the string does not
//! give comes from the service it names (`service=`, `PGSERVICE`), then from the environment, then
//! from defaults. `host`, `hostaddr` and `port` are lists; one port serves all hosts.
//!
//! The rules are those of PostgreSQL 18's `fe-connect.c`. Where they differ here:
//! - What pgkeep cannot honour and what, left out, would weaken the connection is refused. What
//!   libpq finds only when it connects (numbers, ports, addresses, a missing root certificate) is
//!   found here, and `sslsni` must be 0 or 1.
//! - A stray `@` in a URI, and `=`, `;`, `@` or a space in a host name, are refused: they come from
//!   a password that was not encoded, or from strings of another driver, and would be printed.
//!   For the same reason errors repeat only words that cannot be part of a password.
//! - The default socket directory is fixed when libpq is built: `/var/run/postgresql` by Debian and
//!   Red Hat, `/tmp` by PostgreSQL itself. Here it is the former where that exists.
//!
//! The way of a string: `text` reads it into `settings`, which admit only what `keywords` lists;
//! `service` and `environment` add what is not set; `build`, with `ssl` for what concerns TLS, says
//! what it all means; `print` writes that down again, without the password.

mod build;
mod choices;
mod environment;
mod error;
mod keywords;
mod print;
mod service;
mod settings;
mod ssl;
#[cfg(test)]
mod tests;
mod text;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use build::build;
use environment::add_variables;
use service::add_service;
use settings::Settings;
use text::{parse_pairs, parse_uri};

use super::passfile::{self, PassfileError, PasswordFor, Secret};

pub use choices::{
    AuthMethod, ChannelBinding, LoadBalance, RequireAuth, SslMode, SslNegotiation,
    TargetSessionAttrs, TlsVersion,
};
pub use environment::Surroundings;
pub use error::ConnInfoError;

/// What the user asked for, with the defaults filled in. Printing it hides the password.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    /// The servers to try, in this order; at least one.
    pub hosts: Vec<HostSpec>,
    /// `user`.
    pub user: String,
    /// `dbname`, if it is given.
    pub dbname: Option<String>,
    /// `password`. Ask [`ConnInfo::password_for`], which knows the password file too.
    pub password: Option<Secret>,
    /// `passfile`, by default `~/.pgpass`; it need not exist.
    pub passfile: Option<PathBuf>,
    /// `application_name`, else `fallback_application_name`.
    pub application_name: Option<String>,
    /// `options`: command-line options for the server's session.
    pub options: Option<String>,
    /// `connect_timeout`, for each address; none waits for ever. One second is one second, as
    /// since libpq 17, which no longer makes two of it.
    pub connect_timeout: Option<Duration>,
    /// `keepalives`: whether the operating system probes a silent TCP connection.
    pub keepalives: bool,
    /// `keepalives_idle`; none leaves it to the operating system, as in the next three.
    pub keepalives_idle: Option<Duration>,
    /// `keepalives_interval`.
    pub keepalives_interval: Option<Duration>,
    /// `keepalives_count`.
    pub keepalives_count: Option<u32>,
    /// `tcp_user_timeout`.
    pub tcp_user_timeout: Option<Duration>,
    /// `sslmode`.
    pub ssl_mode: SslMode,
    /// `sslnegotiation`; `Direct` only with `Require` or stronger.
    pub ssl_negotiation: SslNegotiation,
    /// `sslrootcert`, by default `~/.postgresql/root.crt` if that exists. Without one nothing is
    /// verified; with one `Require` verifies like `VerifyCa`. Always there for `VerifyCa` and
    /// `VerifyFull` over TCP. A file that is named must be there: libpq's silence when it is not
    /// hides a typing error.
    pub ssl_root_cert: Option<SslRootCert>,
    /// `sslcert`, by default `~/.postgresql/postgresql.crt` if that exists; none if
    /// `sslcertmode=disable`.
    pub ssl_cert: Option<PathBuf>,
    /// `sslkey`, by default `~/.postgresql/postgresql.key`; only with a certificate.
    pub ssl_key: Option<PathBuf>,
    /// `sslcrl`, by default `~/.postgresql/root.crl` if that exists: revoked certificates.
    pub ssl_crl: Option<PathBuf>,
    /// `sslsni`: whether the TLS handshake names the host, where that is not an address.
    pub ssl_sni: bool,
    /// `ssl_min_protocol_version`.
    pub ssl_min_protocol_version: TlsVersion,
    /// `ssl_max_protocol_version`.
    pub ssl_max_protocol_version: TlsVersion,
    /// `channel_binding`.
    pub channel_binding: ChannelBinding,
    /// `require_auth`; none allows every way.
    pub require_auth: Option<RequireAuth>,
    /// `target_session_attrs`.
    pub target_session_attrs: TargetSessionAttrs,
    /// `load_balance_hosts`.
    pub load_balance_hosts: LoadBalance,
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSpec {
    /// Its name: what a certificate must be made out to and a password file lists. Where only
    /// `hostaddr` was given it is that address.
    pub host: Host,
    /// The address to connect to instead of looking up the name, even if that is a directory.
    pub hostaddr: Option<IpAddr>,
    /// TCP port, or the number in the socket's name.
    pub port: u16,
}

/// The name of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A host name or an address.
    Tcp(String),
    /// A directory with sockets; one that begins with `@` is in the abstract namespace.
    Unix(PathBuf),
}

/// Who vouches for the server's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SslRootCert {
    /// The roots that the operating system trusts.
    System,
    /// The certificates in this file.
    File(PathBuf),
}

impl ConnInfo {
    /// The database that stands for a physical replication connection in a password file: what
    /// PostgreSQL's own replication clients look up.
    pub const REPLICATION_DATABASE: &'static str = "replication";

    /// Reads a connection string, and fills in what it leaves open.
    pub fn parse(text: &str, surroundings: &Surroundings<'_>) -> Result<ConnInfo, ConnInfoError> {
        let mut settings = Settings::default();
        if let Some(before) = text.find('\0') {
            let position = text[..before].chars().count() + 1;
            return Err(ConnInfoError::Syntax { position, problem: "a NUL byte" });
        }
        let uri = text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"));
        match uri {
            Some(uri) => parse_uri(uri, &mut settings)?,
            None => parse_pairs(text, &mut settings)?,
        }
        add_service(&mut settings, surroundings)?;
        add_variables(&mut settings, surroundings)?;
        build(&settings, surroundings)
    }

    /// The password to offer to `host`: the one given, else the password file's. `database` is the
    /// one to connect to, or [`ConnInfo::REPLICATION_DATABASE`] for physical replication.
    pub fn password_for(
        &self,
        host: &HostSpec,
        database: &str,
        surroundings: &Surroundings<'_>,
    ) -> Result<Option<Secret>, PassfileError> {
        if let Some(password) = &self.password {
            return Ok(Some(password.clone()));
        }
        let Some(path) = &self.passfile else { return Ok(None) };
        let name = match &host.host {
            Host::Unix(directory) if *directory == surroundings.default_socket_directory => {
                "localhost".to_owned()
            }
            name => name.to_string(),
        };
        let wanted = PasswordFor { host: &name, port: host.port, database, user: &self.user };
        passfile::look_up(path, wanted)
    }
}

impl HostSpec {
    /// The Unix socket to connect to; none means TCP. One that begins with `@` is a name in the
    /// abstract namespace, without that `@`.
    pub fn socket_path(&self) -> Option<PathBuf> {
        match (&self.host, self.hostaddr) {
            (Host::Unix(directory), None) => {
                Some(directory.join(format!(".s.PGSQL.{}", self.port)))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Tcp(name) => f.write_str(name),
            Host::Unix(directory) => write!(f, "{}", directory.display()),
        }
    }
}
