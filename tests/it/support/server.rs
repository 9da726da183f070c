//! A real PostgreSQL server.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{Folder, Spawned, free_port, program, user_command, wait_until};

/// How a cluster is made.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// `--wal-segsize`, in MiB; PostgreSQL's default if 0.
    pub segment_mebibytes: u32,
    /// More lines for `postgresql.conf`.
    pub settings: String,
    /// Whether it flushes to disk. A killed process leaves what it wrote to the system, so tests that
    /// only kill lose nothing without, and do not wait for the disk.
    pub no_fsync: bool,
    /// Lines for `pg_hba.conf` instead of "trust for everybody".
    pub hba: Option<String>,
}

/// A cluster, running or not.
pub struct Server {
    pub major: u32,
    pub data: PathBuf,
    /// The folder of its socket.
    pub socket: PathBuf,
    pub port: u16,
    process: Option<Spawned>,
    log: PathBuf,
}

impl Server {
    /// Makes a cluster and starts it.
    pub fn new(folder: &Folder, major: u32, options: &ServerOptions) -> Server {
        let data = folder.path().join("data");
        let mut initdb = user_command(program(&format!("pg/{major}/bin/initdb")));
        initdb.arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "--data-checksums"]);
        initdb.args(["--locale=C", "--encoding=UTF8", "--no-sync"]);
        if options.segment_mebibytes > 0 {
            initdb.arg(format!("--wal-segsize={}", options.segment_mebibytes));
        }
        let made = initdb.current_dir(folder.path()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        if let Some(hba) = &options.hba {
            fs::write(data.join("pg_hba.conf"), hba).unwrap();
        }
        let mut settings =
            format!("wal_level = replica\nmax_wal_senders = 10\n{}\n", options.settings);
        if options.no_fsync {
            settings.push_str("fsync = off\n");
        }
        if options.segment_mebibytes > 16 {
            settings.push_str(&format!(
                "min_wal_size = {0}MB\nmax_wal_size = {1}MB\n",
                2 * options.segment_mebibytes,
                8 * options.segment_mebibytes
            ));
        }
        let mut server = Server::at(folder, major, &data);
        server.configure(&settings);
        server.start();
        server
    }

    /// A data directory that is there already, with a port and a socket folder of its own.
    pub fn at(folder: &Folder, major: u32, data: &Path) -> Server {
        let name = data.file_name().unwrap().to_string_lossy().into_owned();
        let socket = folder.make(&format!("sock-{name}"));
        let log = folder.path().join(format!("{name}.log"));
        Server { major, data: data.to_owned(), socket, port: free_port(), process: None, log }
    }

    /// Adds settings that win over all others. The file keeps its owner.
    pub fn configure(&self, settings: &str) {
        let file = self.data.join("postgresql.auto.conf");
        let mut file = fs::OpenOptions::new().append(true).open(file).unwrap();
        writeln!(
            file,
            "listen_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = '{}'\n{settings}",
            self.port,
            self.socket.display()
        )
        .unwrap();
    }

    /// Starts it as a child of the test, and waits until it answers.
    pub fn start(&mut self) {
        self.launch();
        wait_until("PostgreSQL to open", || {
            let process = self.process.as_mut().unwrap();
            if let Some(status) = process.exited() {
                panic!("PostgreSQL stopped ({status}):\n{}", process.log());
            }
            self.connect().is_ok()
        });
    }

    /// Starts it and does not wait.
    pub fn launch(&mut self) {
        let mut command = user_command(self.bin("postgres"));
        command.arg("-D").arg(&self.data).current_dir(&self.data);
        self.process = Some(Spawned::start(command, &self.log));
    }

    /// Waits until it ended by itself; what it logged.
    pub fn wait_for_end(&mut self) -> String {
        self.process.as_mut().unwrap().wait();
        self.log()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn bin(&self, name: &str) -> PathBuf {
        program(&format!("pg/{}/bin/{name}", self.major))
    }

    pub fn has(&self, name: &str) -> bool {
        super::cache().join(format!("pg/{}/bin/{name}", self.major)).exists()
    }

    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.socket.display(), self.port)
    }

    pub fn connect(&self) -> Result<postgres::Client, postgres::Error> {
        postgres::Client::connect(&self.conninfo(), postgres::NoTls)
    }

    /// Runs SQL; the first column of the last result, one row a line.
    pub fn sql(&self, sql: &str) -> String {
        let mut client = self.connect().unwrap();
        let messages = client.simple_query(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        let rows = messages.iter().filter_map(|message| match message {
            postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("").to_owned()),
            _ => None,
        });
        rows.collect::<Vec<_>>().join("\n")
    }

    /// Waits until a recovery is over and the server takes writes.
    pub fn wait_until_writable(&mut self) {
        wait_until("the end of recovery", || {
            let process = self.process.as_mut().unwrap();
            if let Some(status) = process.exited() {
                panic!("PostgreSQL stopped ({status}):\n{}", process.log());
            }
            let Ok(mut client) = self.connect() else { return false };
            let row = client.query_one("SELECT pg_is_in_recovery()", &[]);
            row.is_ok_and(|row| !row.get::<_, bool>(0))
        });
    }

    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill9();
        }
        // Its children notice within moments, and hold the shared memory until then.
        let pid_file = self.data.join("postmaster.pid");
        let _ = fs::remove_file(pid_file);
    }

    /// Kills every process of the server: one that is left alone would finish its record first.
    pub fn kill9_all(&mut self) {
        let Some(process) = &self.process else { return };
        let children = process.children();
        self.kill9();
        for child in children {
            let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
        }
    }

    /// A fast shutdown.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(rustix::process::Signal::INT);
            let status = process.wait();
            assert!(status.success(), "PostgreSQL: {status}\n{}", process.log());
        }
    }

    /// Checks every index and every page: with `pg_amcheck` where the major has it, and
    /// `pg_checksums` once the server is stopped.
    pub fn check_integrity(&mut self) {
        // No pg_amcheck can look at 13, which has no verify_heapam.
        if self.major >= 14 {
            let tool = if self.has("pg_amcheck") {
                self.bin("pg_amcheck")
            } else {
                program("pg/17/bin/pg_amcheck")
            };
            let mut amcheck = user_command(tool);
            amcheck.args(["--all", "--install-missing", "--heapallindexed", "-U", "postgres"]);
            amcheck.arg("-h").arg(&self.socket).arg("-p").arg(self.port.to_string());
            run(amcheck);
        } else {
            self.sql("CREATE EXTENSION IF NOT EXISTS amcheck");
            self.sql(
                "SELECT bt_index_check(c.oid, true) FROM pg_class c JOIN pg_am a ON a.oid = c.relam \
                 WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p'",
            );
        }
        self.stop();
        if self.has("pg_checksums") {
            let mut checksums = user_command(self.bin("pg_checksums"));
            checksums.arg("--check").arg("-D").arg(&self.data);
            run(checksums);
        }
    }
}

pub(super) fn run(mut command: std::process::Command) {
    let output = command.current_dir("/tmp").output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
