//! A proxy that does to connections what networks and broken stores do to them.
//!
//! It stands between pgkeep and one server on this machine. What it does is set while it runs. Bytes
//! pass through [`Shared::pass_on`] in both directions; what only makes sense for requests, such as
//! answering 503, needs [`Proxy::http`], which takes one request after the other apart.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::http::{Message, answer};

/// Bytes that pass at once; a fault that is set takes effect between two such portions.
const PORTION: usize = 16 << 10;

/// What the proxy does.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Fault {
    /// Nothing: everything passes.
    #[default]
    None,
    /// Closes all connections and every new one.
    Cut,
    /// Keeps connections, accepts new ones, and lets nothing pass, wherever it stopped. When this
    /// ends, the connections that hung are closed.
    Hang,
    /// So many bytes a second each way, all connections together.
    Throttle(u64),
    /// Every portion waits so long.
    Delay(Duration),
    /// Passes requests on and closes the connection instead of answering.
    DropAnswers,
    /// Answers every request with this HTTP status and passes nothing on.
    Answer(u16),
    /// Answers 200 to every PUT whose path contains this text, and throws it away.
    Lie(&'static str),
}

pub(super) struct Shared {
    target: u16,
    fault: Mutex<Fault>,
    changed: Condvar,
    /// The open connections, by number.
    sockets: Mutex<BTreeMap<u64, TcpStream>>,
    next: AtomicU64,
    /// When the line is free again, each way.
    free_at: [Mutex<Instant>; 2],
    stopped: AtomicBool,
    faults: AtomicU64,
    passed: AtomicU64,
}

/// The two ways.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Up,
    Down,
}

/// A running proxy; it ends with the test.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy that knows nothing of what passes.
    pub fn tcp(target: u16) -> Proxy {
        Proxy::start(target, carry_bytes)
    }

    /// A proxy that understands HTTP.
    pub fn http(target: u16) -> Proxy {
        Proxy::start(target, carry_requests)
    }

    fn start(target: u16, carry: fn(&Arc<Shared>, TcpStream) -> io::Result<()>) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let now = Instant::now();
        let shared = Arc::new(Shared {
            target,
            fault: Mutex::default(),
            changed: Condvar::new(),
            sockets: Mutex::default(),
            next: AtomicU64::new(0),
            free_at: [Mutex::new(now), Mutex::new(now)],
            stopped: AtomicBool::new(false),
            faults: AtomicU64::new(0),
            passed: AtomicU64::new(0),
        });
        let state = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if state.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                let state = state.clone();
                // A connection that breaks is what this is for.
                std::thread::spawn(move || drop(carry(&state, client)));
            }
        });
        Proxy { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, fault: Fault) {
        let mut current = self.shared.fault.lock().unwrap();
        let close = fault == Fault::Cut || (*current == Fault::Hang && fault != Fault::Hang);
        *current = fault;
        drop(current);
        self.shared.changed.notify_all();
        if close {
            self.shared.close_all();
        }
    }

    /// Closes all connections; new ones are accepted.
    pub fn reset_connections(&self) {
        self.shared.close_all();
    }

    /// How many requests met a fault: a test that expects some can see that there were.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    /// Bytes that passed, both ways.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.set(Fault::Cut);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn broken() -> io::Error {
    io::Error::from(io::ErrorKind::ConnectionAborted)
}

impl Shared {
    fn close_all(&self) {
        for socket in self.sockets.lock().unwrap().values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Makes sure that the socket is closed when the proxy is told so, or when the guard goes.
    fn guard(self: &Arc<Self>, socket: &TcpStream) -> io::Result<Guard> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.sockets.lock().unwrap().insert(number, socket.try_clone()?);
        Ok(Guard { shared: self.clone(), number })
    }

    fn count(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// What to do with the next portion; an error where the connection must end.
    fn gate(&self) -> io::Result<Fault> {
        let mut fault = self.fault.lock().unwrap();
        let hung = *fault == Fault::Hang;
        if hung {
            self.count();
        }
        while *fault == Fault::Hang {
            fault = self.changed.wait(fault).unwrap();
        }
        if hung || *fault == Fault::Cut {
            return Err(broken());
        }
        Ok(fault.clone())
    }

    pub(super) fn pass_on(&self, way: Way, bytes: &[u8], to: &mut TcpStream) -> io::Result<()> {
        for portion in bytes.chunks(PORTION) {
            match self.gate()? {
                Fault::Throttle(rate) => self.wait_for_the_line(way, portion.len(), rate),
                Fault::Delay(delay) => std::thread::sleep(delay),
                _ => {}
            }
            to.write_all(portion)?;
            self.passed.fetch_add(portion.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wait_for_the_line(&self, way: Way, bytes: usize, rate: u64) {
        let time = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let free = {
            let mut free_at = self.free_at[way as usize].lock().unwrap();
            *free_at = (*free_at).max(Instant::now()) + time;
            *free_at
        };
        std::thread::sleep(free.saturating_duration_since(Instant::now()));
    }

    fn connect(self: &Arc<Self>) -> io::Result<(TcpStream, Guard)> {
        let server = TcpStream::connect(("127.0.0.1", self.target))?;
        server.set_nodelay(true)?;
        let guard = self.guard(&server)?;
        Ok((server, guard))
    }
}

/// An open connection.
struct Guard {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(socket) = self.shared.sockets.lock().unwrap().remove(&self.number) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn carry_bytes(shared: &Arc<Shared>, client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let _client = shared.guard(&client)?;
    shared.gate()?;
    let (server, _server) = shared.connect()?;
    let (up_from, up_to) = (client.try_clone()?, server.try_clone()?);
    let state = shared.clone();
    std::thread::spawn(move || pump(&state, Way::Up, up_from, up_to));
    pump(shared, Way::Down, server, client);
    Ok(())
}

fn pump(shared: &Shared, way: Way, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; PORTION];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || shared.pass_on(way, &buffer[..count], &mut to).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn carry_requests(shared: &Arc<Shared>, mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let _client = shared.guard(&client)?;
    if *shared.fault.lock().unwrap() == Fault::Cut {
        return Err(broken());
    }
    let mut requests = BufReader::new(client.try_clone()?);
    let mut server: Option<(TcpStream, BufReader<TcpStream>, Guard)> = None;
    while let Some(request) = Message::read_request(&mut requests)? {
        let fault = shared.gate()?;
        let lies =
            matches!(fault, Fault::Lie(path) if request.is_put() && request.path().contains(path));
        match fault {
            Fault::Answer(status) => {
                shared.count();
                request.body(&mut requests, |_| Ok(()))?;
                answer(&mut client, status)?;
                continue;
            }
            Fault::Lie(_) if lies => {
                shared.count();
                request.body(&mut requests, |_| Ok(()))?;
                answer(&mut client, 200)?;
                continue;
            }
            _ => {}
        }
        if server.is_none() {
            let (connected, guard) = shared.connect()?;
            server = Some((connected.try_clone()?, BufReader::new(connected), guard));
        }
        let Some((up, down, _)) = &mut server else { continue };
        shared.pass_on(Way::Up, request.head(), up)?;
        request.body(&mut requests, |bytes| shared.pass_on(Way::Up, bytes, up))?;
        let Some(response) = Message::read_response(down, &request)? else { break };
        if fault == Fault::DropAnswers {
            shared.count();
            break;
        }
        shared.pass_on(Way::Down, response.head(), &mut client)?;
        response.body(down, |bytes| shared.pass_on(Way::Down, bytes, &mut client))?;
    }
    Ok(())
}
