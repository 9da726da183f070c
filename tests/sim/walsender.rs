//! START_REPLICATION: a walsender.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use pgkeep::wal::Lsn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::server::{Connection, Gone, lsn};
use crate::wal::PAGE;
use crate::wire::{self, Status};
use crate::world::HostState;

/// The most WAL in a message.
const MAX_SEND: u64 = 128 << 10;
/// A server that shuts down asks this often for the last status (a real one: more often).
const SHUTDOWN_ASKS: Duration = Duration::from_millis(20);

const COPY_DONE: &[u8] = b"c\0\0\0\x04";

/// What is being sent.
struct Sending {
    slot: Option<String>,
    timeline: u32,
    position: Lsn,
    /// Where the timeline ends, and the one that follows; `None` while it is the current one.
    end: Option<(Lsn, u32)>,
    last_reply: Instant,
    asked: bool,
    flushed: Lsn,
    /// The client has ended the stream.
    client_is_done: bool,
    /// The server has.
    server_is_done: bool,
    /// With an error.
    failed: bool,
    asked_at: Instant,
}

enum Step {
    Go,
    /// The stream is over; the connection goes on.
    Over,
}

impl Connection {
    /// `START_REPLICATION SLOT "x" PHYSICAL 0/0 TIMELINE n`.
    pub async fn start_replication(&mut self, text: &str) -> Result<(), Gone> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let after = |word: &str| {
            words.iter().position(|other| *other == word).and_then(|at| words.get(at + 1))
        };
        let slot = after("SLOT").map(|name| name.trim_matches('"').to_owned());
        let start = words.iter().find(|word| word.contains('/')).map_or(Lsn::INVALID, |t| lsn(t));
        let timeline = after("TIMELINE").and_then(|text| text.parse().ok());
        match self.begin(slot, start, timeline) {
            Ok(sending) => {
                let slot = sending.slot.clone();
                let outcome = self.stream(sending).await;
                self.release(slot.as_deref());
                outcome
            }
            Err((code, what)) => {
                self.note(format!("START_REPLICATION {start} {timeline:?}: {what}"));
                wire::error(&mut self.output, "ERROR", code, &what);
                wire::ready(&mut self.output);
                Ok(())
            }
        }
    }

    fn begin(
        &self,
        slot: Option<String>,
        start: Lsn,
        timeline: Option<u32>,
    ) -> Result<Sending, (&'static str, String)> {
        let mut world = self.sim.world();
        let current = world.hosts[self.host].timeline;
        let timeline = timeline.unwrap_or(current);
        let path = world.wal_of(self.host).path(current);
        let Some(index) = path.iter().position(|step| step.0 == timeline) else {
            let what = format!("requested timeline {timeline} is not in this server's history");
            return Err(("XX000", what));
        };
        let end = path[index].2.map(|end| (end, path[index + 1].0));
        if end.is_some_and(|(end, _)| start > end) {
            let what = format!(
                "requested starting point {start} on timeline {timeline} is not in this server's history"
            );
            return Err(("XX000", what));
        }
        if let Some(name) = &slot {
            let Some(slot) = world.hosts[self.host].slots.get_mut(name) else {
                return Err(("42704", format!("replication slot \"{name}\" does not exist")));
            };
            if let Some(pid) = slot.active {
                let what = format!("replication slot \"{name}\" is active for PID {pid}");
                return Err(("55006", what));
            }
            slot.active = Some(self.pid);
        }
        world.walsenders.insert(self.pid);
        let now = Instant::now();
        Ok(Sending {
            slot,
            timeline,
            position: start,
            end,
            last_reply: now,
            asked: false,
            flushed: Lsn::INVALID,
            client_is_done: false,
            server_is_done: false,
            failed: false,
            asked_at: now,
        })
    }

    fn release(&self, slot: Option<&str>) {
        let pid = self.pid;
        self.sim.change(|world| {
            world.walsenders.remove(&pid);
            let slots = &mut world.hosts[self.host].slots;
            let slot = slot.and_then(|name| slots.get_mut(name));
            if let Some(slot) = slot.filter(|slot| slot.active == Some(pid)) {
                slot.active = None;
            }
        });
    }

    async fn stream(&mut self, mut sending: Sending) -> Result<(), Gone> {
        self.note(format!("streams timeline {} from {}", sending.timeline, sending.position));
        if sending.end.is_some_and(|(end, _)| end == sending.position) {
            self.say_next(&sending);
            return Ok(());
        }
        if !self.sim.world().hosts[self.host].is_clone {
            self.sim.world().ledger.begins(sending.position);
        }
        wire::copy_both(&mut self.output);
        let flushed = self.sim.world().hosts[self.host].flushed;
        if sending.end.is_none() && sending.position > flushed {
            let what = format!(
                "requested starting point {} is ahead of the WAL flush position of this server {flushed}",
                sending.position
            );
            wire::error(&mut self.output, "ERROR", "XX000", &what);
            wire::ready(&mut self.output);
            return Ok(());
        }
        loop {
            let sim = self.sim.clone();
            let changed = sim.changed.notified();
            while let Some((tag, body)) = wire::take(&mut self.input) {
                self.take(&mut sending, tag, body)?;
            }
            if matches!(self.send(&mut sending).await?, Step::Over) {
                self.note("the stream is over");
                return Ok(());
            }
            let rate = sim.world().network.rate;
            let due = self.next_look(&sending);
            let pending = !self.output.is_empty();
            tokio::select! {
                biased;
                read = self.reader.read_buf(&mut self.input) => {
                    if !matches!(read, Ok(1..)) {
                        return Err(Gone);
                    }
                }
                written = self.writer.write_buf(&mut self.output), if pending => {
                    let written = written.map_err(|_| Gone)? as u64;
                    self.count(written)?;
                    if let Some(millis) = (written * 1000).checked_div(rate) {
                        tokio::time::sleep(Duration::from_millis(millis)).await;
                    }
                }
                () = changed => {}
                () = tokio::time::sleep_until(due) => {}
            }
        }
    }

    /// Bytes went out: does the network cut the connection?
    fn count(&mut self, written: u64) -> Result<(), Gone> {
        let Some(left) = &mut self.cut_after else { return Ok(()) };
        *left = left.saturating_sub(written);
        if *left == 0 {
            self.note("the network cuts the connection");
            return Err(Gone);
        }
        Ok(())
    }

    fn next_look(&self, sending: &Sending) -> Instant {
        let stopping = self.sim.world().hosts[self.host].state == HostState::Stopping;
        let timeout = Duration::from_secs(self.timeout_s);
        match sending.asked {
            _ if stopping => {
                (sending.asked_at + SHUTDOWN_ASKS).max(Instant::now() + SHUTDOWN_ASKS / 2)
            }
            true => sending.last_reply + timeout,
            false => sending.last_reply + timeout / 2,
        }
    }

    /// A message of the client.
    fn take(&mut self, sending: &mut Sending, tag: u8, body: Bytes) -> Result<(), Gone> {
        match (tag, body.first()) {
            (b'd', Some(b'r')) => {
                let Some(status) = wire::status(body) else { return Err(Gone) };
                self.replied(sending, status);
            }
            (b'd', Some(b'h')) => sending.last_reply = Instant::now(),
            (b'c', _) => sending.client_is_done = true,
            (b'X', _) => return Err(Gone),
            (other, _) => {
                self.note(format!("UNKNOWN MESSAGE {:?} while streaming", char::from(other)));
                return Err(Gone);
            }
        }
        Ok(())
    }

    fn replied(&mut self, sending: &mut Sending, status: Status) {
        sending.last_reply = Instant::now();
        sending.asked = false;
        let is_news = status.flushed != sending.flushed;
        sending.flushed = status.flushed;
        let clone = self.sim.world().hosts[self.host].is_clone;
        self.sim.acknowledged(clone, sending.timeline, sending.position, status);
        if is_news {
            self.note(format!("hears flushed {} on {}", status.flushed, sending.timeline));
            self.sim.change(|world| {
                let slots = &mut world.hosts[self.host].slots;
                let slot = sending.slot.as_ref().and_then(|name| slots.get_mut(name));
                if let Some(slot) = slot.filter(|slot| !slot.lost && status.flushed > Lsn::INVALID)
                {
                    slot.restart = Some(status.flushed);
                }
            });
        }
        if status.reply {
            self.keepalive(sending.position, false);
        }
    }

    fn clock(&self) -> i64 {
        850_000_000_000_000 + self.sim.now().as_micros() as i64
    }

    fn keepalive(&mut self, position: Lsn, reply: bool) {
        let clock = self.clock();
        wire::keepalive(&mut self.output, position, clock, reply);
    }

    /// Writes what is due into the output.
    async fn send(&mut self, sending: &mut Sending) -> Result<Step, Gone> {
        if self.is_cut() {
            return Err(Gone);
        }
        if sending.failed {
            return Ok(Step::Over);
        }
        if sending.client_is_done {
            if !sending.server_is_done {
                self.output.put_slice(COPY_DONE);
            }
            match sending.end {
                Some((end, _)) if sending.position >= end => self.say_next(sending),
                _ => {
                    wire::complete(&mut self.output, "START_STREAMING");
                    self.end_of_command();
                }
            }
            return Ok(Step::Over);
        }
        let silent = sending.last_reply.elapsed();
        if silent >= Duration::from_secs(self.timeout_s) {
            self.note("wal_sender_timeout");
            return Err(Gone);
        }
        if silent >= Duration::from_secs(self.timeout_s) / 2 && !sending.asked {
            sending.asked = true;
            self.keepalive(sending.position, true);
        }
        self.follow_promotion(sending);
        if self.output.is_empty() && self.send_wal(sending) {
            return Ok(if sending.failed { Step::Over } else { Step::Go });
        }
        let stopping = self.sim.world().hosts[self.host].state == HostState::Stopping;
        if stopping && self.output.is_empty() {
            return self.shut_down(sending).await;
        }
        Ok(Step::Go)
    }

    /// The server was promoted: what it streams has become an old timeline.
    fn follow_promotion(&self, sending: &mut Sending) {
        let world = self.sim.world();
        let host = &world.hosts[self.host];
        if sending.end.is_none() && host.timeline != sending.timeline {
            let path = world.wal_of(self.host).path(host.timeline);
            let index = path.iter().position(|step| step.0 == sending.timeline);
            sending.end = index.and_then(|i| Some((path[i].2?, path[i + 1].0)));
        }
    }

    /// Sends the next piece of WAL, or the end of the timeline; whether there was any.
    fn send_wal(&mut self, sending: &mut Sending) -> bool {
        let (flushed, lost) = {
            let world = self.sim.world();
            let host = &world.hosts[self.host];
            let slot = sending.slot.as_ref().and_then(|name| host.slots.get(name));
            (host.flushed, slot.is_some_and(|slot| slot.lost))
        };
        let limit = sending.end.map_or(flushed, |(end, _)| end);
        if sending.position >= limit {
            if sending.end.is_some() && !sending.server_is_done {
                self.output.put_slice(COPY_DONE);
                sending.server_is_done = true;
            }
            return false;
        }
        let mut to = limit.min(sending.position.advance(MAX_SEND));
        if to < limit {
            to = to.round_down(PAGE).max(sending.position.advance(1));
        }
        // The last segment of an old timeline is read from the next one's file.
        let wal = {
            let world = self.sim.world();
            world.read_wal(self.host, sending.timeline, sending.position, to)
        };
        let Some(wal) = wal.filter(|_| !lost) else {
            let what =
                format!("requested WAL segment of {} has already been removed", sending.position);
            self.note(&what);
            wire::error(&mut self.output, "ERROR", "58P01", &what);
            wire::ready(&mut self.output);
            sending.failed = true;
            return true;
        };
        let clock = self.clock();
        wire::wal_data(&mut self.output, sending.position, limit, clock, &wal);
        sending.position = to;
        true
    }

    /// A fast shutdown ends the stream once the client has flushed everything.
    async fn shut_down(&mut self, sending: &mut Sending) -> Result<Step, Gone> {
        if sending.flushed >= sending.position {
            self.note("has sent everything and shuts down");
            wire::complete(&mut self.output, "COPY 0");
            self.flush().await?;
            return Err(Gone);
        }
        if sending.asked_at.elapsed() >= SHUTDOWN_ASKS {
            sending.asked_at = Instant::now();
            self.keepalive(sending.position, true);
        }
        Ok(Step::Go)
    }

    /// What follows this timeline.
    fn say_next(&mut self, sending: &Sending) {
        let Some((end, next)) = sending.end else { return };
        let row = vec![wire::value(next), wire::value(end)];
        wire::rows(&mut self.output, 2, &[row], "START_STREAMING");
        self.end_of_command();
    }

    fn end_of_command(&mut self) {
        wire::complete(&mut self.output, "START_REPLICATION");
        wire::ready(&mut self.output);
    }
}
