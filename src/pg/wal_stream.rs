//! START_REPLICATION: WAL as the server writes it (`src/backend/replication/walsender.c`).
//!
//! ```text
//! from the server   'w' start u64, end of WAL u64, server clock i64, WAL
//!                   'k' end of WAL u64, server clock i64, reply wanted u8
//! to the server     'r' written u64, flushed u64, applied u64, own clock i64, reply wanted u8
//! ```
//! Big-endian; clocks in microseconds since 2000-01-01 UTC.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use chrono::{DateTime, Duration, Utc};
use postgres_protocol::message::frontend;

use super::connection::COMMAND_TIMEOUT;
use super::message::Incoming;
use super::replication::quote_identifier;
use super::{Connection, NextTimeline, PgError};
use crate::wal::{Lsn, TimelineId};

/// Seconds from 1970 to 2000.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// Something that the server sent.
#[derive(Debug)]
pub enum WalMessage {
    /// WAL that follows what came before.
    Data {
        /// Where it begins.
        start: Lsn,
        /// The end of the server's WAL.
        wal_end: Lsn,
        /// The server's clock.
        clock: DateTime<Utc>,
        /// The WAL.
        bytes: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// The end of the server's WAL, as far as it was sent.
        wal_end: Lsn,
        /// The server's clock.
        clock: DateTime<Utc>,
        /// It wants a status now.
        reply: bool,
    },
    /// The timeline ended, or the server is shutting down: [`WalStream::finish`] tells.
    End,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// Another timeline follows.
    NextTimeline(NextTimeline),
    /// The server is shutting down, or the client asked for the end.
    Closed,
}

/// A running stream.
pub struct WalStream {
    connection: Connection,
    server_is_done: bool,
    position: Lsn,
}

fn time_from(microseconds: i64) -> DateTime<Utc> {
    let epoch = DateTime::<Utc>::UNIX_EPOCH + Duration::seconds(POSTGRES_EPOCH_SECONDS);
    epoch.checked_add_signed(Duration::microseconds(microseconds)).unwrap_or(epoch)
}

impl Connection {
    /// START_REPLICATION for physical replication, with a slot or without. `start` must not lie
    /// behind the server's WAL.
    ///
    /// # Errors
    /// When the slot is in use, the WAL is gone, or the connection breaks. The connection can be
    /// used again only after errors that the server reported.
    pub async fn start_replication(
        self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Result<WalStream, NextTimeline>, (PgError, Option<Connection>)> {
        let started = self.begin_replication(slot, start, timeline);
        match tokio::time::timeout(COMMAND_TIMEOUT, started).await {
            Ok(outcome) => outcome,
            Err(_) => Err((PgError::Timeout("START_REPLICATION"), None)),
        }
    }

    async fn begin_replication(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Result<WalStream, NextTimeline>, (PgError, Option<Connection>)> {
        let slot = slot.map(|slot| format!("SLOT {} ", quote_identifier(slot)));
        let slot = slot.unwrap_or_default();
        let sql = format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}");
        if let Err(error) = self.send_query(&sql).await {
            return Err((error, None));
        }
        let mut failure = None;
        let mut next = None;
        loop {
            match self.receive().await {
                Ok(Incoming::CopyBoth) => {
                    let stream =
                        WalStream { connection: self, server_is_done: false, position: start };
                    return Ok(Ok(stream));
                }
                // Asked for the very end of an old timeline: no WAL, only what comes next.
                Ok(Incoming::Row(row)) => match NextTimeline::from_row(&row) {
                    Ok(found) => next = Some(found),
                    Err(error) => return Err((error, None)),
                },
                Ok(Incoming::Error(error)) => failure = Some(PgError::Server(error)),
                Ok(Incoming::Ready) => {
                    return match (next, failure) {
                        (Some(next), None) => Ok(Err(next)),
                        (_, Some(failure)) => Err((failure, Some(self))),
                        _ => Err((PgError::Protocol("replication did not start".into()), None)),
                    };
                }
                Ok(_) => {}
                Err(error) => return Err((failure.unwrap_or(error), None)),
            }
        }
    }
}

impl WalStream {
    /// Where the next WAL is expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The connection below it.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The next message. Cancellation loses nothing.
    ///
    /// # Errors
    /// When the server reports an error, WAL does not follow what came before, or the connection
    /// breaks.
    pub async fn next(&mut self) -> Result<WalMessage, PgError> {
        loop {
            match self.connection.receive().await? {
                Incoming::CopyData(payload) => return self.read(payload),
                Incoming::CopyDone => {
                    self.server_is_done = true;
                    return Ok(WalMessage::End);
                }
                // A server that shuts down ends the command without CopyDone.
                Incoming::Complete => return Ok(WalMessage::End),
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Notice(notice) => tracing::warn!("server: {notice}"),
                _ => return Err(PgError::Protocol("a message inside the WAL stream".into())),
            }
        }
    }

    fn read(&mut self, mut payload: Bytes) -> Result<WalMessage, PgError> {
        let short = || PgError::Protocol("a replication message that is too short".into());
        let tag = if payload.is_empty() { 0 } else { payload.get_u8() };
        match tag {
            b'w' if payload.len() >= 24 => {
                let start = Lsn(payload.get_u64());
                let wal_end = Lsn(payload.get_u64());
                let clock = time_from(payload.get_i64());
                if start != self.position {
                    return Err(PgError::Protocol(format!(
                        "WAL from {start} came where {} was expected",
                        self.position
                    )));
                }
                self.position = start.advance(payload.len() as u64);
                Ok(WalMessage::Data { start, wal_end, clock, bytes: payload })
            }
            b'k' if payload.len() >= 17 => {
                let wal_end = Lsn(payload.get_u64());
                let clock = time_from(payload.get_i64());
                Ok(WalMessage::Keepalive { wal_end, clock, reply: payload.get_u8() != 0 })
            }
            b'w' | b'k' => Err(short()),
            other => Err(PgError::Protocol(format!("a replication message of kind {other}"))),
        }
    }

    /// Tells the server how far the WAL came. `apply` is always 0/0: nothing is applied here
    /// (invariant I1). With `answer_me` the server speaks up at once, which tells its clock.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn send_status(
        &mut self,
        written: Lsn,
        flushed: Lsn,
        answer_me: bool,
    ) -> Result<(), PgError> {
        debug_assert!(flushed <= written);
        let since_epoch = Utc::now() - time_from(0);
        let mut payload = BytesMut::with_capacity(34);
        payload.put_u8(b'r');
        payload.put_u64(written.0);
        payload.put_u64(flushed.0);
        payload.put_u64(Lsn::INVALID.0);
        payload.put_i64(since_epoch.num_microseconds().unwrap_or(0));
        payload.put_u8(u8::from(answer_me));
        let mut output = BytesMut::with_capacity(64);
        frontend::CopyData::new(payload)
            .map_err(|error| PgError::Protocol(error.to_string()))?
            .write(&mut output);
        self.connection.send(&output).await
    }

    /// Ends the stream from this side, and learns why it ended if the server did. WAL that is
    /// still on its way is dropped: it was never acknowledged.
    ///
    /// # Errors
    /// When the connection breaks before the end is clear.
    pub async fn finish(mut self) -> Result<(StreamEnd, Option<Connection>), PgError> {
        let mut output = BytesMut::new();
        frontend::copy_done(&mut output);
        if let Err(error) = self.connection.send(&output).await {
            return if self.server_is_done { Err(error) } else { Ok((StreamEnd::Closed, None)) };
        }
        let mut next = None;
        loop {
            match self.connection.receive().await {
                Ok(Incoming::Row(row)) => next = Some(NextTimeline::from_row(&row)?),
                Ok(Incoming::Ready) => {
                    let end = next.map_or(StreamEnd::Closed, StreamEnd::NextTimeline);
                    return Ok((end, Some(self.connection)));
                }
                Ok(Incoming::Error(error)) => return Err(PgError::Server(error)),
                Ok(_) => {}
                Err(_) if next.is_none() => return Ok((StreamEnd::Closed, None)),
                Err(error) => return Err(error),
            }
        }
    }
}
