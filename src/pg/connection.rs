//! A connection to a server: hosts tried in order, TLS, authentication.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ChannelBinding as Binding, ScramSha256};
use postgres_protocol::message::{backend, frontend};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::conninfo::{AuthMethod, ChannelBinding, LoadBalance, SslNegotiation};
use super::message::Incoming;
use super::socket::Socket;
use super::{
    ConnInfo, Host, HostSpec, PgError, Secret, SslMode, Surroundings, TargetSessionAttrs, tls,
};

/// How long one address may take to connect and authenticate, unless `connect_timeout` says
/// otherwise.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long sent data may stay unacknowledged by the server's host, unless `tcp_user_timeout` says
/// otherwise.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// How much is read from the socket at once.
const READ_SIZE: usize = 256 << 10;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Physical replication: `replication=true`.
    Replication,
    /// Plain SQL.
    Sql,
}

/// A connection that has been authenticated.
pub struct Connection {
    socket: Socket,
    buffer: BytesMut,
    parameters: BTreeMap<String, String>,
    host: HostSpec,
}

/// A socket with what SCRAM and tokio-postgres need to know of it.
pub(super) struct OpenSocket {
    pub(super) socket: Socket,
    pub(super) binding: Option<Vec<u8>>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({})", self.host)
    }
}

impl Connection {
    /// Connects for replication to the first host that will do. `settings` are server settings
    /// for the session.
    ///
    /// # Errors
    /// Why each host would not do.
    pub async fn connect(
        conninfo: &ConnInfo,
        surroundings: &Surroundings<'_>,
        settings: &[(&str, &str)],
    ) -> Result<Connection, PgError> {
        let mut failures = Vec::new();
        // prefer-standby takes anything on its second way through the list.
        let attrs = conninfo.target_session_attrs;
        let rounds: &[TargetSessionAttrs] = match attrs {
            TargetSessionAttrs::PreferStandby => {
                &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any]
            }
            _ => &[attrs],
        };
        for wanted in rounds {
            for host in ordered_hosts(conninfo) {
                let attempt = Self::connect_host(conninfo, &host, surroundings, settings, *wanted);
                match attempt.await {
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
        conninfo: &ConnInfo,
        host: &HostSpec,
        surroundings: &Surroundings<'_>,
        settings: &[(&str, &str)],
        wanted: TargetSessionAttrs,
    ) -> Result<Connection, PgError> {
        let password = password_for(conninfo, host, ConnInfo::REPLICATION_DATABASE, surroundings);
        let timeout = conninfo.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
        let attempt = async {
            let mut last = PgError::Closed;
            for encrypted in encryption_order(conninfo, host) {
                let opened = open_socket(conninfo, host, *encrypted).await;
                let outcome = match opened {
                    Ok(Some(socket)) => {
                        Self::start(conninfo, host, socket, password.as_ref(), settings).await
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
        let mut connection = tokio::time::timeout(timeout, attempt)
            .await
            .map_err(|_| PgError::Timeout("connecting"))??;
        connection.check_role(wanted).await?;
        Ok(connection)
    }

    async fn start(
        conninfo: &ConnInfo,
        host: &HostSpec,
        open: OpenSocket,
        password: Option<&Secret>,
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
            ("replication", "true"),
            ("application_name", conninfo.application_name.as_deref().unwrap_or("pgkeep")),
            ("client_encoding", "UTF8"),
            // What is parsed must not depend on the server's or the role's settings.
            ("DateStyle", "ISO"),
        ];
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

    async fn authenticate(
        &mut self,
        conninfo: &ConnInfo,
        binding: Option<Vec<u8>>,
        password: Option<&Secret>,
    ) -> Result<(), PgError> {
        let encrypted = matches!(self.socket, Socket::Tls(_));
        let local = matches!(self.socket, Socket::Unix(_));
        let need_password = || {
            password.map(|secret| secret.expose().to_vec()).ok_or_else(|| {
                PgError::Authentication(
                    "the server asks for a password and none is given: set PGPASSWORD, passfile or ~/.pgpass".into(),
                )
            })
        };
        let binding_required = conninfo.channel_binding == ChannelBinding::Require;
        let allowed = |method: AuthMethod| match &conninfo.require_auth {
            Some(required) if !required.allows(method) => Err(PgError::Authentication(format!(
                "the server asks for {}, and require_auth={required} does not allow that",
                method.as_str()
            ))),
            _ => Ok(()),
        };
        let mut asked = false;
        loop {
            let message = match self.receive().await? {
                Incoming::Other(message) => message,
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Notice(_) | Incoming::Parameter(..) => continue,
                _ => return Err(PgError::Protocol("no request for authentication".into())),
            };
            let answer = match message {
                backend::Message::AuthenticationOk if binding_required => {
                    return Err(PgError::Authentication(
                        "channel_binding=require, but the server did not authenticate with it"
                            .into(),
                    ));
                }
                backend::Message::AuthenticationOk => {
                    return if asked { Ok(()) } else { allowed(AuthMethod::None) };
                }
                backend::Message::AuthenticationSasl(body) => {
                    allowed(AuthMethod::ScramSha256)?;
                    let password = need_password()?;
                    self.scram(conninfo, &body, binding.clone(), &password).await?;
                    // The server's own proof was checked; what follows is AuthenticationOk.
                    return match self.receive().await? {
                        Incoming::Other(backend::Message::AuthenticationOk) => Ok(()),
                        Incoming::Error(error) => Err(PgError::Server(error)),
                        _ => Err(PgError::Protocol("authentication did not end".into())),
                    };
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    allowed(AuthMethod::Md5)?;
                    md5_hash(conninfo.user.as_bytes(), &need_password()?, body.salt()).into_bytes()
                }
                backend::Message::AuthenticationCleartextPassword if encrypted || local => {
                    allowed(AuthMethod::Password)?;
                    need_password()?
                }
                backend::Message::AuthenticationCleartextPassword => {
                    return Err(PgError::Authentication("the server asks for the password in clear text over an unencrypted connection; use sslmode=require or better, or scram-sha-256 in pg_hba.conf".into()));
                }
                _ => {
                    return Err(PgError::Authentication("the server asks for GSSAPI, SSPI or another method that pgkeep does not have; use scram-sha-256, a certificate or peer in pg_hba.conf".into()));
                }
            };
            asked = true;
            let mut output = BytesMut::new();
            frontend::password_message(&answer, &mut output)
                .map_err(|error| PgError::Protocol(error.to_string()))?;
            self.send(&output).await?;
        }
    }

    async fn scram(
        &mut self,
        conninfo: &ConnInfo,
        body: &backend::AuthenticationSaslBody,
        binding: Option<Vec<u8>>,
        password: &[u8],
    ) -> Result<(), PgError> {
        use fallible_iterator::FallibleIterator;
        let protocol = |error: std::io::Error| PgError::Protocol(error.to_string());
        let offered: Vec<String> =
            body.mechanisms().map(|name| Ok(name.to_owned())).collect().map_err(protocol)?;
        let with_binding = offered.iter().any(|name| name == sasl::SCRAM_SHA_256_PLUS);
        let plain = offered.iter().any(|name| name == sasl::SCRAM_SHA_256);
        let wanted = conninfo.channel_binding;
        let (mechanism, binding) = match binding {
            Some(hash) if with_binding && wanted != ChannelBinding::Disable => {
                (sasl::SCRAM_SHA_256_PLUS, Binding::tls_server_end_point(hash))
            }
            _ if wanted == ChannelBinding::Require => {
                return Err(PgError::Authentication(
                    "channel_binding=require, but it is not to be had on this connection".into(),
                ));
            }
            Some(_) if plain && wanted != ChannelBinding::Disable => {
                (sasl::SCRAM_SHA_256, Binding::unrequested())
            }
            _ if plain => (sasl::SCRAM_SHA_256, Binding::unsupported()),
            _ => {
                return Err(PgError::Authentication(format!("the server offers only {offered:?}")));
            }
        };
        let failed = |error: std::io::Error| PgError::Authentication(error.to_string());
        let mut scram = ScramSha256::new(password, binding);
        let mut output = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut output)
            .map_err(protocol)?;
        self.send(&output).await?;
        loop {
            match self.receive().await? {
                Incoming::Other(backend::Message::AuthenticationSaslContinue(body)) => {
                    scram.update(body.data()).map_err(failed)?;
                    output.clear();
                    frontend::sasl_response(scram.message(), &mut output).map_err(protocol)?;
                    self.send(&output).await?;
                }
                Incoming::Other(backend::Message::AuthenticationSaslFinal(body)) => {
                    return scram.finish(body.data()).map_err(failed);
                }
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Notice(_) => {}
                _ => return Err(PgError::Protocol("SCRAM was broken off".into())),
            }
        }
    }

    /// Checks what `target_session_attrs` asks for. Servers from 14 on report it by themselves.
    async fn check_role(&mut self, wanted: TargetSessionAttrs) -> Result<(), PgError> {
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
    /// When the server refuses it or the connection breaks.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<Bytes>>>, PgError> {
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
            Some(path) => write!(f, "{}", path.display()),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// The hosts in the order in which they are tried.
pub(super) fn ordered_hosts(conninfo: &ConnInfo) -> Vec<HostSpec> {
    let mut hosts = conninfo.hosts.clone();
    if conninfo.load_balance_hosts == LoadBalance::Random {
        use rand::seq::SliceRandom;
        hosts.shuffle(&mut rand::rng());
    }
    hosts
}

/// The password for a host; a passfile that cannot be used is a warning, as in libpq.
pub(super) fn password_for(
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
pub(super) fn encryption_order(conninfo: &ConnInfo, host: &HostSpec) -> &'static [bool] {
    match conninfo.ssl_mode {
        _ if host.socket_path().is_some() => &[false],
        SslMode::Disable => &[false],
        SslMode::Allow => &[false, true],
        SslMode::Prefer => &[true, false],
        _ => &[true],
    }
}

/// Opens a socket to one host, with TLS when `encrypted`. `None`: the server has no TLS, and
/// `sslmode` allows to go on without.
pub(super) async fn open_socket(
    conninfo: &ConnInfo,
    host: &HostSpec,
    encrypted: bool,
) -> Result<Option<OpenSocket>, PgError> {
    if let Some(path) = host.socket_path() {
        let stream = connect_unix(&path)
            .await
            .map_err(|source| PgError::Io { doing: "connecting to the unix socket", source })?;
        return Ok(Some(OpenSocket { socket: Socket::Unix(stream), binding: None }));
    }
    let name = &match &host.host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(folder) => folder.display().to_string(),
    };
    let stream = connect_tcp(conninfo, host, name).await?;
    if !encrypted {
        return Ok(Some(OpenSocket { socket: Socket::Tcp(stream), binding: None }));
    }
    let Some(stream) = request_tls(stream, conninfo).await? else { return Ok(None) };
    let stream = tls::handshake(stream, name, conninfo).await?;
    let binding = tls::channel_binding(&stream);
    Ok(Some(OpenSocket { socket: Socket::Tls(Box::new(stream)), binding }))
}

/// Connects to a socket file, or with a leading `@` to a name in Linux' abstract namespace.
async fn connect_unix(path: &Path) -> std::io::Result<UnixStream> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    let Some(name) = path.as_os_str().as_bytes().strip_prefix(b"@") else {
        return UnixStream::connect(path).await;
    };
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn connect_tcp(
    conninfo: &ConnInfo,
    host: &HostSpec,
    name: &str,
) -> Result<TcpStream, PgError> {
    let doing = |source| PgError::Io { doing: "connecting", source };
    let addresses: Vec<SocketAddr> = match host.hostaddr {
        Some(address) => vec![SocketAddr::new(address, host.port)],
        None => tokio::net::lookup_host((name, host.port))
            .await
            .map_err(|source| PgError::Io { doing: "looking up the host", source })?
            .collect(),
    };
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(doing)?;
                set_keepalives(&stream, conninfo).map_err(doing)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(doing(last))
}

/// A dead host must be noticed: the system's own default is two hours.
fn set_keepalives(stream: &TcpStream, conninfo: &ConnInfo) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    if conninfo.keepalives {
        let idle = conninfo.keepalives_idle.unwrap_or(Duration::from_secs(10));
        let interval = conninfo.keepalives_interval.unwrap_or(Duration::from_secs(5));
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(idle)
            .with_interval(interval)
            .with_retries(conninfo.keepalives_count.unwrap_or(4));
        socket.set_tcp_keepalive(&keepalive)?;
    }
    // Probes are not sent while data waits to be acknowledged: this bounds that time.
    socket.set_tcp_user_timeout(Some(conninfo.tcp_user_timeout.unwrap_or(USER_TIMEOUT)))
}

/// Asks for TLS (`SSLRequest`). `None` when the server has none and need not have.
async fn request_tls(
    mut stream: TcpStream,
    conninfo: &ConnInfo,
) -> Result<Option<TcpStream>, PgError> {
    if conninfo.ssl_negotiation == SslNegotiation::Direct {
        return Ok(Some(stream));
    }
    let doing = |source| PgError::Io { doing: "asking for TLS", source };
    let mut output = BytesMut::new();
    frontend::ssl_request(&mut output);
    stream.write_all(&output).await.map_err(doing)?;
    // One byte, and not one more: anything that came in the clear with it would be forged.
    match stream.read_u8().await.map_err(doing)? {
        b'S' => Ok(Some(stream)),
        b'N' if matches!(conninfo.ssl_mode, SslMode::Prefer | SslMode::Allow) => Ok(None),
        b'N' => Err(PgError::Tls("the server does not support it".into())),
        _ => Err(PgError::Protocol("the answer to the request for TLS".into())),
    }
}
