//! Standbys, promotion, and what else happens to servers in the field.

use std::path::Path;

use pgkeep::wal::{Lsn, SegmentSize, TimelineId};

use super::server::run;
use super::{Folder, Server, user_command, wait_until};

/// A connection string that names several servers and wants the primary among them.
pub fn conninfo_of(servers: &[&Server]) -> String {
    let list = |text: &dyn Fn(&Server) -> String| {
        servers.iter().map(|server| text(server)).collect::<Vec<_>>().join(",")
    };
    format!(
        "host={} port={} user=postgres dbname=postgres connect_timeout=5 \
         target_session_attrs=read-write",
        list(&|server| server.socket.display().to_string()),
        list(&|server| server.port.to_string()),
    )
}

impl Server {
    /// A standby that streams from `primary`, started: made by `pg_basebackup`, or, where the major
    /// has none, as a copy of the data directory, for which the primary is stopped meanwhile.
    pub fn standby_of(folder: &Folder, primary: &mut Server, name: &str) -> Server {
        let data = folder.path().join(name);
        if primary.has("pg_basebackup") {
            let mut command = user_command(primary.bin("pg_basebackup"));
            command.arg("-D").arg(&data).args(["-U", "postgres", "-c", "fast", "--no-sync"]);
            command.arg("-h").arg(&primary.socket).arg("-p").arg(primary.port.to_string());
            run(command);
        } else {
            primary.stop();
            primary.copy_to(&data);
            primary.start();
        }
        let mut standby = Server::at(folder, primary.major, &data);
        standby.configure("hot_standby = on");
        standby.follow(primary, None);
        standby.start();
        standby
    }

    /// Copies the data directory of a server that is stopped.
    pub fn copy_to(&self, data: &Path) {
        let mut copy = user_command("cp");
        copy.arg("-a").arg(&self.data).arg(data);
        run(copy);
    }

    /// Makes a stopped server a standby that streams from `primary`, through a slot if one is named.
    pub fn follow(&self, primary: &Server, slot: Option<&str>) {
        self.configure(&format!(
            "primary_conninfo = '{} application_name=standby'\nprimary_slot_name = '{}'\n\
             recovery_target_timeline = 'latest'\nwal_retrieve_retry_interval = '100ms'",
            primary.conninfo(),
            slot.unwrap_or_default()
        ));
        let signal = self.data.join("standby.signal");
        run(file_command("touch", &signal));
    }

    /// Ends recovery, and waits until the server takes writes.
    pub fn promote(&mut self) {
        // It waits by itself for up to a minute.
        assert_eq!(self.sql("SELECT pg_promote()"), "t", "{}", self.log());
        self.wait_until_writable();
    }

    pub fn wait_replayed(&self, lsn: Lsn) {
        wait_until("the standby to replay", || {
            let replayed = self.sql("SELECT coalesce(pg_last_wal_replay_lsn(), '0/0')");
            replayed.parse::<Lsn>().unwrap() >= lsn
        });
    }

    pub fn flushed(&self) -> Lsn {
        self.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap()
    }

    pub fn timeline(&self) -> TimelineId {
        let name = self.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        TimelineId::from_hex8(&name[..8]).unwrap()
    }

    pub fn system_id(&self) -> u64 {
        self.sql("SELECT system_identifier FROM pg_control_system()").parse().unwrap()
    }

    /// The server's own file of a segment.
    pub fn wal_file(&self, timeline: TimelineId, lsn: Lsn) -> std::path::PathBuf {
        let size = SegmentSize::DEFAULT;
        let name = size.name(timeline, size.segment_of(lsn)).to_string();
        self.data.join("pg_wal").join(name)
    }

    /// Writes and checkpoints until the server has removed the segment of `lsn`.
    pub fn recycle_wal(&self, lsn: Lsn) {
        let file = self.wal_file(self.timeline(), lsn);
        self.sql("CREATE TABLE IF NOT EXISTS noise (n int)");
        wait_until("the server to remove old WAL", || {
            self.sql("INSERT INTO noise VALUES (1)");
            self.sql("SELECT pg_switch_wal()");
            self.sql("CHECKPOINT");
            !file.exists()
        });
    }

    /// Writes about so many MiB of WAL that hardly compresses.
    pub fn write_bulk(&self, mebibytes: u64) {
        self.sql("CREATE TABLE IF NOT EXISTS bulk (n bigint, a bytea, b bytea, c bytea)");
        // About 250 bytes of WAL a row.
        let rows = mebibytes * 4200;
        self.sql(&format!(
            "INSERT INTO bulk SELECT n, sha512((random()::text || n)::bytea), \
             sha512((random()::text || n)::bytea), sha512((random()::text || n)::bytea) \
             FROM generate_series(1, {rows}) n"
        ));
    }
}

/// A command on a file that keeps the server's owner.
fn file_command(program: &str, file: &Path) -> std::process::Command {
    let mut command = user_command(program);
    command.arg(file);
    command
}
