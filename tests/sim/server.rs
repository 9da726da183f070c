//! One connection to a server: startup, then commands one after the other. Streaming is in
//! `walsender.rs`, plain SQL in `sql.rs`.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pgkeep::wal::Lsn;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

use crate::dice::{Dice, mix};
use crate::wal::SYSTEM_ID;
use crate::wire;
use crate::world::{HostState, Sim, Slot};

/// The connection is over.
pub struct Gone;

/// A server's end of a connection.
pub struct Connection {
    pub sim: Arc<Sim>,
    pub host: usize,
    pub epoch: u64,
    pub pid: u64,
    /// Which archiver it is, for the trace.
    pub client: u64,
    pub reader: ReadHalf<DuplexStream>,
    pub writer: WriteHalf<DuplexStream>,
    pub input: BytesMut,
    pub output: BytesMut,
    /// `wal_sender_timeout`.
    pub timeout_s: u64,
    /// After so many bytes the network cuts it.
    pub cut_after: Option<u64>,
}

/// Serves a connection until it ends.
pub async fn serve(sim: Arc<Sim>, host: usize, client: u64, stream: DuplexStream) {
    let (reader, writer) = tokio::io::split(stream);
    let (pid, epoch, cut_after) = sim.change(|world| {
        world.connections += 1;
        let pid = world.connections;
        let mut dice = Dice::new(mix(&[sim.seed, pid]), "connection");
        let cut = dice.percent(world.network.cuts).then(|| dice.between(1, 600_000));
        (pid, world.hosts[host].epoch, cut)
    });
    let mut connection = Connection {
        sim,
        host,
        epoch,
        pid,
        client,
        reader,
        writer,
        input: BytesMut::new(),
        output: BytesMut::new(),
        timeout_s: 60,
        cut_after,
    };
    let _ = connection.run().await;
}

impl Connection {
    pub fn note(&self, text: impl std::fmt::Display) {
        let name = &self.sim.world().hosts[self.host].name.clone();
        self.sim.note(format!("{name} [{} from {}] {text}", self.pid, self.client));
    }

    /// Whether the server has crashed since.
    pub fn is_cut(&self) -> bool {
        let world = self.sim.world();
        let host = &world.hosts[self.host];
        host.epoch != self.epoch || host.state == HostState::Down
    }

    async fn run(&mut self) -> Result<(), Gone> {
        let replication = self.startup().await?;
        loop {
            let (tag, body) = self.receive().await?;
            match tag {
                b'Q' => {
                    let text = String::from_utf8_lossy(&body);
                    let text = text.trim_end_matches(['\0', ';', ' ']).to_owned();
                    if !replication {
                        self.sql(&text);
                    } else if text.starts_with("START_REPLICATION") {
                        self.start_replication(&text).await?;
                    } else {
                        self.command(&text);
                    }
                    self.flush().await?;
                }
                b'X' => return Ok(()),
                // Of a stream that has ended with an error.
                b'd' | b'c' => {}
                other => self.note(format!("UNKNOWN MESSAGE {:?}", char::from(other))),
            }
        }
    }

    async fn startup(&mut self) -> Result<bool, Gone> {
        let parameters = loop {
            match wire::take_startup(&mut self.input) {
                Some(parameters) => break parameters,
                None => self.read().await?,
            }
        };
        let find = |name: &str| parameters.iter().find(|pair| pair.0 == name).map(|pair| &pair.1);
        let replication = find("replication").is_some_and(|value| value == "true");
        if let Some(seconds) = find("wal_sender_timeout").and_then(|text| text.strip_suffix('s')) {
            self.timeout_s = seconds.parse().unwrap_or(60);
        }
        let (state, standby) = {
            let world = self.sim.world();
            (world.hosts[self.host].state, world.hosts[self.host].standby)
        };
        let out = &mut self.output;
        if state != HostState::Up {
            wire::error(out, "FATAL", "57P03", "the database system is shutting down");
            self.flush().await?;
            return Err(Gone);
        }
        wire::message(out, b'R', &[0; 4]);
        let standby = if standby { "on" } else { "off" };
        for (name, value) in [
            ("server_version", "17.6"),
            ("in_hot_standby", standby),
            ("default_transaction_read_only", "off"),
            ("client_encoding", "UTF8"),
        ] {
            wire::parameter(out, name, value);
        }
        wire::ready(out);
        self.flush().await?;
        Ok(replication)
    }

    /// Reads something; ends when the client is gone or the server crashes.
    pub async fn read(&mut self) -> Result<(), Gone> {
        loop {
            let sim = self.sim.clone();
            let changed = sim.changed.notified();
            if self.is_cut() {
                return Err(Gone);
            }
            tokio::select! {
                biased;
                () = changed => {}
                read = self.reader.read_buf(&mut self.input) => {
                    return if matches!(read, Ok(1..)) { Ok(()) } else { Err(Gone) };
                }
            }
        }
    }

    async fn receive(&mut self) -> Result<(u8, Bytes), Gone> {
        loop {
            match wire::take(&mut self.input) {
                Some(message) => return Ok(message),
                None => self.read().await?,
            }
        }
    }

    /// Sends all that was written.
    pub async fn flush(&mut self) -> Result<(), Gone> {
        if self.is_cut() {
            return Err(Gone);
        }
        if let Some(left) = &mut self.cut_after {
            if (self.output.len() as u64) > *left {
                // In the middle of a message, most of the time.
                self.output.truncate(*left as usize);
                let _ = self.writer.write_all(&self.output).await;
                self.note("the network cuts the connection");
                return Err(Gone);
            }
            *left -= self.output.len() as u64;
        }
        self.writer.write_all(&self.output).await.map_err(|_| Gone)?;
        self.output.clear();
        Ok(())
    }

    fn command(&mut self, text: &str) {
        let words: Vec<&str> = text.split_whitespace().collect();
        let slot = words.get(1).map(|name| name.trim_matches('"').to_owned()).unwrap_or_default();
        match words[0] {
            "IDENTIFY_SYSTEM" => self.identify_system(),
            "SHOW" => self.show(words.get(1).copied().unwrap_or_default()),
            "CREATE_REPLICATION_SLOT" => self.create_slot(&slot, words.contains(&"RESERVE_WAL")),
            "DROP_REPLICATION_SLOT" => self.drop_slot(&slot),
            "READ_REPLICATION_SLOT" => self.read_slot(&slot),
            "TIMELINE_HISTORY" => self.timeline_history(slot.parse().unwrap_or(0)),
            _ => {
                self.note(format!("UNKNOWN COMMAND {text}"));
                wire::error(&mut self.output, "ERROR", "42601", "syntax error");
            }
        }
        wire::ready(&mut self.output);
    }

    fn identify_system(&mut self) {
        let (timeline, flushed) = {
            let world = self.sim.world();
            let host = &world.hosts[self.host];
            (host.timeline, host.flushed)
        };
        let row = vec![wire::value(SYSTEM_ID), wire::value(timeline), wire::value(flushed), None];
        wire::rows(&mut self.output, 4, &[row], "IDENTIFY_SYSTEM");
    }

    fn show(&mut self, setting: &str) {
        let value = match setting {
            "wal_segment_size" => "1MB",
            "transaction_read_only" => "off",
            _ => {
                self.note(format!("UNKNOWN SETTING {setting}"));
                ""
            }
        };
        wire::rows(&mut self.output, 1, &[vec![wire::value(value)]], "SHOW");
    }

    pub fn create_slot(&mut self, name: &str, reserve: bool) {
        let existed = self.sim.change(|world| {
            let host = &mut world.hosts[self.host];
            let restart = reserve.then_some(host.redo.max(host.oldest));
            let existed = host.slots.contains_key(name);
            host.slots.entry(name.to_owned()).or_insert(Slot {
                restart,
                active: None,
                lost: false,
            });
            existed
        });
        if existed {
            let what = format!("replication slot \"{name}\" already exists");
            return wire::error(&mut self.output, "ERROR", "42710", &what);
        }
        self.note(format!("slot {name} is created"));
        let row = vec![wire::value(name), wire::value("0/0"), None, None];
        wire::rows(&mut self.output, 4, &[row], "CREATE_REPLICATION_SLOT");
    }

    fn drop_slot(&mut self, name: &str) {
        let outcome = self.sim.change(|world| {
            let slots = &mut world.hosts[self.host].slots;
            match slots.get(name) {
                None => Err(("42704", format!("replication slot \"{name}\" does not exist"))),
                Some(Slot { active: Some(pid), .. }) => {
                    Err(("55006", format!("replication slot \"{name}\" is active for PID {pid}")))
                }
                Some(_) => {
                    slots.remove(name);
                    Ok(())
                }
            }
        });
        match outcome {
            Ok(()) => wire::complete(&mut self.output, "DROP_REPLICATION_SLOT"),
            Err((code, what)) => wire::error(&mut self.output, "ERROR", code, &what),
        }
    }

    fn read_slot(&mut self, name: &str) {
        let (slot, timeline) = {
            let world = self.sim.world();
            let host = &world.hosts[self.host];
            (host.slots.get(name).cloned(), host.timeline)
        };
        let row = match slot {
            None => vec![None, None, None],
            Some(Slot { restart: None, .. }) => vec![wire::value("physical"), None, None],
            Some(Slot { restart: Some(lsn), .. }) => {
                vec![wire::value("physical"), wire::value(lsn), wire::value(timeline)]
            }
        };
        wire::rows(&mut self.output, 3, &[row], "READ_REPLICATION_SLOT");
    }

    /// A server has the history files of its own timeline and of those that lead to it, and of
    /// all others that were ever in the cluster: they were archived and copied.
    fn timeline_history(&mut self, timeline: u32) {
        let history = {
            let world = self.sim.world();
            let wal = world.wal_of(self.host);
            let current = world.hosts[self.host].timeline;
            let known = timeline <= current && wal.timelines().any(|(tli, _)| tli == timeline);
            known.then(|| wal.history(timeline)).flatten()
        };
        let name = format!("{timeline:08X}.history");
        match history {
            Some(content) => {
                let row = vec![wire::value(name), Some(Bytes::from(content))];
                wire::rows(&mut self.output, 2, &[row], "TIMELINE_HISTORY");
            }
            None => {
                let what =
                    format!("could not open file \"pg_wal/{name}\": No such file or directory");
                wire::error(&mut self.output, "ERROR", "58P01", &what);
            }
        }
    }
}

/// An LSN in a command.
pub fn lsn(text: &str) -> Lsn {
    text.trim_matches(['\'', ',', ')']).parse().unwrap_or(Lsn::INVALID)
}
