//! Archiver processes: the real archiver, with a fence around it.
//!
//! `kill -9` raises the fence. The archiver's own future is dropped; what it spawned may run on,
//! as a ghost: its requests never start and never end, its sockets are closed. A request that was
//! under way may still land, as the seed will have it. When a whole host vanishes nobody closes
//! its sockets, and the server must find out by itself.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use pgkeep::archive::{ArchiveError, ArchiveSettings, Archiver};
use pgkeep::pg::{ConnInfo, Connector, Dial, Dialed, HostSpec, OpenSocket, PgError, Surroundings};
use pgkeep::store::{Region, Regions};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::server;
use crate::store::FaultStore;
use crate::world::{HostState, Sim};

/// Bytes that fit into a socket's buffers.
const SOCKET_BUFFER: usize = 256 << 10;

/// Archivers of the clone have numbers from here on.
pub const CLONE: u64 = 1000;

/// How a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// `kill -9`: the system closes its sockets.
    Killed,
    /// Its host is gone: nobody closes anything.
    Vanished,
}

/// The fence around one process.
pub struct Fence {
    pub id: u64,
    pub sim: Arc<Sim>,
    dead: AtomicBool,
    vanished: AtomicBool,
    /// Beginnings and ends of requests to stores so far.
    steps: AtomicU64,
    /// It dies at this step; 0: at none.
    dies_at: AtomicU64,
    task: Mutex<Option<tokio::task::AbortHandle>>,
}

/// A running archiver.
pub struct Process {
    pub fence: Arc<Fence>,
    pub cancelled: CancellationToken,
    pub task: JoinHandle<Result<(), ArchiveError>>,
}

impl Fence {
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Whether it streams from a clone of the primary.
    pub fn is_clone(&self) -> bool {
        self.id >= CLONE
    }

    pub fn kill(&self, death: Death) {
        if self.dead.swap(true, Ordering::Relaxed) {
            return;
        }
        self.vanished.store(death == Death::Vanished, Ordering::Relaxed);
        self.sim.note(format!("archiver {} dies: {death:?}", self.id));
        if let Some(task) = self.task.lock().unwrap().take() {
            task.abort();
        }
    }

    /// It dies so many steps from now.
    pub fn die_after(&self, steps: u64) {
        self.dies_at.store(self.steps.load(Ordering::Relaxed) + steps, Ordering::Relaxed);
    }

    /// It will not die at a step any more.
    pub fn live_on(&self) {
        self.dies_at.store(0, Ordering::Relaxed);
    }

    /// A request to a store begins or ends.
    pub fn step(&self) {
        let step = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if step == self.dies_at.load(Ordering::Relaxed) {
            self.kill(Death::Killed);
        }
    }
}

/// Starts an archiver that reaches these hosts, by name.
pub fn start(sim: &Arc<Sim>, id: u64, settings: ArchiveSettings, hosts: &str) -> Process {
    let fence = Arc::new(Fence {
        id,
        sim: sim.clone(),
        dead: AtomicBool::new(false),
        vanished: AtomicBool::new(false),
        steps: AtomicU64::new(0),
        dies_at: AtomicU64::new(0),
        task: Mutex::new(None),
    });
    let text = format!(
        "host={hosts} user=pgkeep dbname=postgres sslmode=disable target_session_attrs=read-write"
    );
    let surroundings = Surroundings::from_process();
    let conninfo = ConnInfo::parse(&text, &surroundings).unwrap();
    let connector = Connector::with_dial(conninfo, Arc::new(SimDial(fence.clone())));
    let regions: Vec<Region> = sim
        .regions
        .iter()
        .map(|data| {
            let store = FaultStore::new(data.clone(), fence.clone());
            Region::over(&data.name, &format!("mem://{}", data.name), Arc::new(store))
        })
        .collect();
    let archiver = Archiver::new(settings, connector, &Regions::new(regions));
    let cancelled = CancellationToken::new();
    let stop = cancelled.clone();
    let task = tokio::spawn(async move { archiver.run(&stop).await });
    *fence.task.lock().unwrap() = Some(task.abort_handle());
    sim.note(format!("archiver {id} starts"));
    Process { fence, cancelled, task }
}

struct SimDial(Arc<Fence>);

impl Dial for SimDial {
    fn dial<'a>(&'a self, _: &'a ConnInfo, host: &'a HostSpec, _: bool) -> Dialed<'a> {
        let fence = self.0.clone();
        let wanted = host.host.to_string();
        Box::pin(async move {
            // A round trip.
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            if fence.is_dead() {
                return std::future::pending().await;
            }
            let found = fence.sim.world().hosts.iter().position(|host| host.name == wanted);
            let up = |index: &usize| fence.sim.world().hosts[*index].state != HostState::Down;
            let Some(index) = found.filter(up) else {
                let source = io::Error::from(io::ErrorKind::ConnectionRefused);
                return Err(PgError::Io { doing: "connecting", source });
            };
            let (ours, theirs) = tokio::io::duplex(SOCKET_BUFFER);
            tokio::spawn(server::serve(fence.sim.clone(), index, fence.id, theirs));
            Ok(Some(OpenSocket::over(Fenced { stream: Some(ours), fence })))
        })
    }
}

/// A client's end of a connection.
struct Fenced {
    stream: Option<DuplexStream>,
    fence: Arc<Fence>,
}

impl Fenced {
    fn stream(&mut self) -> Option<Pin<&mut DuplexStream>> {
        if self.fence.is_dead() { None } else { self.stream.as_mut().map(Pin::new) }
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        if self.fence.vanished.load(Ordering::Relaxed) {
            let stream = self.stream.take();
            self.fence.sim.world().graveyard.extend(stream);
        }
    }
}

impl AsyncRead for Fenced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream().map_or(Poll::Pending, |stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Fenced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream().map_or(Poll::Pending, |stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().map_or(Poll::Pending, |stream| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().map_or(Poll::Pending, |stream| stream.poll_shutdown(context))
    }
}
