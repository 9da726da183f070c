//! From a host of the connection string to an open socket: addresses, keepalives, TLS.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::conninfo::SslNegotiation;
use super::socket::{OpenSocket, Socket};
use super::{ConnInfo, Host, HostSpec, PgError, SslMode, tls};

/// How long sent data may stay unacknowledged by the server's host, unless `tcp_user_timeout` says
/// otherwise.
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// What [`Dial::dial`] gives: `None` when the server has no TLS, and `sslmode` allows to go on
/// without.
pub type Dialed<'a> =
    Pin<Box<dyn Future<Output = Result<Option<OpenSocket>, PgError>> + Send + 'a>>;

/// What [`Dial::addresses`] gives.
pub type Addresses<'a> = Pin<Box<dyn Future<Output = Result<Vec<HostSpec>, PgError>> + Send + 'a>>;

/// Opens sockets to servers: the network, or whatever stands in for it.
pub trait Dial: Send + Sync {
    /// The addresses behind a host's name, each as a host of its own: every one gets its own
    /// attempt, with its own time, and may be another server. By default the host is one address.
    fn addresses<'a>(&'a self, host: &'a HostSpec) -> Addresses<'a> {
        Box::pin(std::future::ready(Ok(vec![host.clone()])))
    }

    /// Opens a socket to one host, with TLS when `encrypted`.
    fn dial<'a>(
        &'a self,
        conninfo: &'a ConnInfo,
        host: &'a HostSpec,
        encrypted: bool,
    ) -> Dialed<'a>;
}

/// TCP and unix sockets of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Network;

impl Dial for Network {
    fn addresses<'a>(&'a self, host: &'a HostSpec) -> Addresses<'a> {
        Box::pin(look_up(host))
    }

    fn dial<'a>(
        &'a self,
        conninfo: &'a ConnInfo,
        host: &'a HostSpec,
        encrypted: bool,
    ) -> Dialed<'a> {
        Box::pin(open_socket(conninfo, host, encrypted))
    }
}

/// Resolves a host's name.
async fn look_up(host: &HostSpec) -> Result<Vec<HostSpec>, PgError> {
    let (Host::Tcp(name), None) = (&host.host, host.hostaddr) else {
        return Ok(vec![host.clone()]);
    };
    let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), host.port))
        .await
        .map_err(|source| PgError::Io { doing: "looking up the host", source })?
        .collect();
    // A link-local address is nothing without its interface, for which a host has no place.
    let scoped = |address: &SocketAddr| matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
    if found.iter().any(scoped) {
        return Ok(vec![host.clone()]);
    }
    let with = |address: SocketAddr| HostSpec { hostaddr: Some(address.ip()), ..host.clone() };
    Ok(found.into_iter().map(with).collect())
}

async fn open_socket(
    conninfo: &ConnInfo,
    host: &HostSpec,
    encrypted: bool,
) -> Result<Option<OpenSocket>, PgError> {
    if let Some(path) = host.socket_path() {
        let stream = connect_unix(&path)
            .await
            .map_err(|source| PgError::Io { doing: "connecting to the unix socket", source })?;
        return Ok(Some(OpenSocket::new(Socket::Unix(stream))));
    }
    let name = &match &host.host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(folder) => folder.display().to_string(),
    };
    let stream = connect_tcp(conninfo, host, name).await?;
    if !encrypted {
        return Ok(Some(OpenSocket::new(Socket::Tcp(stream))));
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
