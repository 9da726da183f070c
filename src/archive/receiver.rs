//! The socket's task: reads, hands on, answers. It never waits for a region.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::pipeline::Feed;
use super::state::ArchiveState;
use crate::pg::{PgError, WalMessage, WalStream};
use crate::wal::Lsn;

/// The server's patience with a silent client, asked for at connect: a host that died must free
/// the slot soon.
pub(super) const SENDER_TIMEOUT: &str = "15s";
/// How often a status goes out when nothing changes; well below [`SENDER_TIMEOUT`].
const STATUS_INTERVAL: Duration = Duration::from_secs(3);
/// How long an answer may wait for WAL to become durable.
const ANSWER_DEADLINE: Duration = Duration::from_secs(3);
/// Answers are at least this far apart.
const ANSWER_SPACING: Duration = Duration::from_millis(10);
/// How long a server that asks for an answer, because it shuts down, may be kept waiting for WAL to
/// become durable.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// A server that said nothing for so long, although every status asks it to, is gone.
const SILENCE: Duration = Duration::from_secs(30);

/// A receiver that cannot hand on reads no more, so it would never hear that the server wants to
/// shut down: after this time the connection is given up and made anew.
const STALL_PATIENCE: Duration = Duration::from_secs(60);
/// How long the last WAL of a stream may wait for room in the pipeline; what is not taken then is
/// asked for again.
const LAST_WAL_PATIENCE: Duration = Duration::from_secs(30);
/// WAL that is handed on at once, in bytes.
const BATCH: usize = 1 << 20;

/// Why receiving ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReceiveEnd {
    /// The server said so.
    Server,
    /// This process was told to stop.
    Cancelled,
    /// What was wanted has come.
    Reached,
    /// An uploader wants everything to be looked up again.
    Again,
    /// No region has taken WAL for long.
    Stalled,
    /// The pipeline behind stopped: it knows why.
    Pipeline,
}

pub(super) struct Receiver<'a> {
    pub(super) stream: &'a mut WalStream,
    pub(super) feed: &'a mpsc::Sender<Feed>,
    pub(super) state: &'a ArchiveState,
    pub(super) durable: watch::Receiver<Lsn>,
    /// Up to here what the server sent was compared with the archive.
    pub(super) compared: &'a AtomicU64,
    /// Where the slot's WAL began: PostgreSQL would take the slot back to whatever it is told.
    pub(super) slot_begin: Lsn,
    /// Enough once this is reached.
    pub(super) until: Option<Lsn>,
    pub(super) again: &'a CancellationToken,
    pub(super) cancelled: &'a CancellationToken,
}

/// What is waiting to be done.
struct Pending {
    data: Vec<Bytes>,
    /// Bytes in it.
    length: usize,
    flush: bool,
    /// The server wants an answer; latest by then.
    answer_by: Option<Instant>,
    last_answer: Instant,
    /// Since when the server waits for WAL up to there to become durable.
    waiting_since: Option<(Instant, Lsn)>,
    last_heard: Instant,
    last_handed_on: Instant,
}

impl Receiver<'_> {
    /// Receives until the stream ends.
    ///
    /// # Errors
    /// When the connection breaks or the server reports an error.
    pub(super) async fn run(mut self) -> Result<ReceiveEnd, PgError> {
        let now = Instant::now();
        let mut pending = Pending {
            data: Vec::new(),
            length: 0,
            flush: false,
            answer_by: None,
            last_answer: now,
            waiting_since: None,
            last_heard: now,
            last_handed_on: now,
        };
        let mut ticks = tokio::time::interval(STATUS_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let waiting = !pending.data.is_empty() || pending.flush;
            let answer_at = self.answer_time(&pending);
            let stalled_at = pending.last_handed_on + STALL_PATIENCE;
            tokio::select! {
                biased;
                // First what is seldom ready and must never starve.
                () = self.cancelled.cancelled() => return Ok(ReceiveEnd::Cancelled),
                () = self.again.cancelled() => return Ok(ReceiveEnd::Again),
                () = self.feed.closed() => return Ok(ReceiveEnd::Pipeline),
                _ = ticks.tick() => {
                    if pending.data.is_empty() && pending.last_heard.elapsed() > SILENCE {
                        return Err(PgError::Timeout("streaming WAL: the server is silent"));
                    }
                    self.state.tick();
                    self.send_status(true).await?;
                }
                () = tokio::time::sleep_until(answer_at.unwrap_or(now)), if answer_at.is_some() => {
                    self.send_status(false).await?;
                    pending.answer_by = None;
                    pending.last_answer = Instant::now();
                }
                _ = self.durable.changed() => {
                    // At once: a commit may be waiting for it.
                    self.send_status(false).await?;
                }
                // What has arrived already is handed on together: each hand-over wakes a task.
                message = self.stream.next(), if pending.length < BATCH => {
                    if self.take(message?, &mut pending) {
                        // The last WAL goes the way of all before it.
                        let rest = self.feed.send(Feed::Data(pending.data));
                        let _ = tokio::time::timeout(LAST_WAL_PATIENCE, rest).await;
                        return Ok(ReceiveEnd::Server);
                    }
                }
                () = tokio::time::sleep_until(stalled_at), if pending.length >= BATCH => {
                    return Ok(ReceiveEnd::Stalled);
                }
                permit = self.feed.reserve(), if waiting => {
                    let Ok(permit) = permit else { return Ok(ReceiveEnd::Pipeline) };
                    if pending.data.is_empty() {
                        permit.send(Feed::Flush);
                        pending.flush = false;
                    } else {
                        permit.send(Feed::Data(std::mem::take(&mut pending.data)));
                        pending.length = 0;
                        pending.last_handed_on = Instant::now();
                    }
                }
            }
            if pending.data.is_empty()
                && self.until.is_some_and(|until| self.stream.position() >= until)
            {
                return Ok(ReceiveEnd::Reached);
            }
            let durable = *self.durable.borrow();
            pending.waiting_since = pending.waiting_since.filter(|(_, until)| durable < *until);
            if pending.waiting_since.is_some_and(|(since, _)| since.elapsed() > SHUTDOWN_PATIENCE) {
                tracing::warn!(
                    "the server wants to shut down and no region takes its last WAL: letting it go"
                );
                return Ok(ReceiveEnd::Server);
            }
        }
    }

    /// Takes a message; `true` at the end of the stream.
    fn take(&mut self, message: WalMessage, pending: &mut Pending) -> bool {
        pending.last_heard = Instant::now();
        match message {
            WalMessage::Data { wal_end, clock, bytes, .. } => {
                self.state.heard(wal_end, self.stream.position(), clock);
                if pending.data.is_empty() {
                    pending.last_handed_on = Instant::now();
                }
                pending.length += bytes.len();
                pending.data.push(bytes);
            }
            WalMessage::Keepalive { wal_end, clock, reply } => {
                self.state.heard(wal_end, self.stream.position(), clock);
                if reply {
                    self.answer_wanted(pending);
                }
            }
            WalMessage::End => return true,
        }
        false
    }

    /// A switchover waits for exactly this: the server asks until its last WAL is flushed here.
    fn answer_wanted(&self, pending: &mut Pending) {
        let now = Instant::now();
        if !self.is_all_durable() {
            pending.waiting_since.get_or_insert((now, self.stream.position()));
        }
        if pending.answer_by.is_none() {
            pending.answer_by = Some(now + ANSWER_DEADLINE);
            pending.flush = !self.is_all_durable();
        }
    }

    fn is_all_durable(&self) -> bool {
        *self.durable.borrow() >= self.stream.position()
    }

    /// When the answer goes out: once all is durable, or at its deadline; never too often.
    fn answer_time(&self, pending: &Pending) -> Option<Instant> {
        let deadline = pending.answer_by?;
        let all_durable = self.is_all_durable();
        let earliest = pending.last_answer + ANSWER_SPACING;
        Some(if all_durable { earliest } else { deadline.max(earliest) })
    }

    async fn send_status(&mut self, answer_me: bool) -> Result<(), PgError> {
        let compared = Lsn(self.compared.load(Ordering::Acquire));
        let durable = *self.durable.borrow_and_update();
        // "Written" says no more than "flushed": a server that shuts down takes it for flushed when
        // nothing is.
        let safe = durable.min(compared).min(self.stream.position());
        let safe = if safe < self.slot_begin { Lsn::INVALID } else { safe };
        self.stream.send_status(safe, safe, answer_me).await
    }
}
