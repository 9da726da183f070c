//! The program under test with a configuration.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgkeep::config::Config;
use pgkeep::wal::Lsn;
use serde_json::Value;

use super::process::pgkeep;
use super::{Folder, Server, Spawned, free_port, user_command, wait_until};

/// What a command printed, and its exit code.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn expect(self, code: i32) -> Output {
        assert_eq!(self.code, code, "{}\n{}", self.stdout, self.stderr);
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// A configuration, and the sidecar if it runs.
pub struct Keeper {
    pub config: PathBuf,
    environment: Vec<(String, String)>,
    sidecar: Option<Spawned>,
    log: PathBuf,
    folder: PathBuf,
}

impl Keeper {
    /// Regions in local folders, by name.
    pub fn new(folder: &Folder, server: &Server, regions: &[&str]) -> Keeper {
        let regions: String = regions
            .iter()
            .map(|name| {
                let path = folder.make(&format!("region-{name}"));
                format!("[[region]]\nname = \"{name}\"\nurl = \"file://{}\"\n", path.display())
            })
            .collect();
        Keeper::with(folder, &server.conninfo(), &regions)
    }

    /// Regions as written in the configuration.
    pub fn with(folder: &Folder, conninfo: &str, regions: &str) -> Keeper {
        let config = folder.write(
            "pgkeep.toml",
            &format!(
                "[cluster]\nname = \"orders\"\nconninfo = \"\"\"{conninfo}\"\"\"\n\
                 [wal]\nflush_interval = \"200ms\"\n{regions}\n\
                 [http]\nlisten = \"127.0.0.1:{}\"\n",
                free_port()
            ),
        );
        let log = folder.path().join("pgkeep.log");
        let folder = folder.path().to_owned();
        Keeper { config, environment: Vec::new(), sidecar: None, log, folder }
    }

    /// Another archiver with the same regions and the same cluster name, on `server` instead of `own`.
    pub fn second(&self, own: &Server, server: &Server, name: &str) -> Keeper {
        let text = fs::read_to_string(&self.config).unwrap();
        let listen = Config::load(&self.config).unwrap().http.listen;
        let text = text.replace(&own.conninfo(), &server.conninfo());
        let text = text.replace(&listen, &format!("127.0.0.1:{}", free_port()));
        let config = self.folder.join(format!("{name}.toml"));
        // A copy keeps owner and mode.
        let mut copy = user_command("cp");
        assert!(copy.arg("-p").arg(&self.config).arg(&config).status().unwrap().success());
        fs::write(&config, text).unwrap();
        let log = self.folder.join(format!("{name}.log"));
        let environment = self.environment.clone();
        Keeper { config, environment, sidecar: None, log, folder: self.folder.clone() }
    }

    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub fn edit_config(&self, from: &str, to: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&self.config, text.replace(from, to)).unwrap();
    }

    pub fn region(&self, name: &str) -> PathBuf {
        self.folder.join(format!("region-{name}"))
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = user_command(pgkeep());
        command.arg("--config").arg(&self.config).args(arguments);
        command.env("HOME", &self.folder).current_dir(&self.folder);
        command.envs(self.environment.iter().cloned());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    pub fn start_with(&mut self, arguments: &[&str]) {
        let mut command = self.command(&["run"]);
        command.args(arguments);
        self.sidecar = Some(Spawned::start(command, &self.log));
    }

    pub fn sidecar(&mut self) -> &mut Spawned {
        self.sidecar.as_mut().expect("the sidecar was started")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn kill9(&mut self) {
        self.sidecar().kill9();
        self.sidecar = None;
    }

    /// Stops it as an operator would, and expects success.
    pub fn stop(&mut self) {
        let sidecar = self.sidecar();
        sidecar.signal(rustix::process::Signal::TERM);
        let status = sidecar.wait();
        assert!(status.success(), "pgkeep run: {status}\n{}", self.log());
        self.sidecar = None;
    }

    /// Fails the test if the sidecar ended.
    pub fn assert_runs(&mut self) {
        let sidecar = self.sidecar.as_mut().expect("the sidecar was started");
        if let Some(status) = sidecar.exited() {
            panic!("pgkeep run ended ({status}):\n{}", sidecar.log());
        }
    }

    /// What the running sidecar says by itself; `None` if it does not answer within `patience`.
    pub fn ask_sidecar(&self, patience: Duration) -> Option<Value> {
        let listen = Config::load(&self.config).unwrap().http.listen;
        let mut socket = TcpStream::connect(listen).ok()?;
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.write_all(b"GET /status HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| serde_json::from_str(body).unwrap())
    }

    pub fn status(&self) -> Value {
        self.run(&["status", "--json"]).expect(0).json()
    }

    /// A region's frontier as its own content says.
    pub fn frontier(&self, region: &str) -> Lsn {
        let status = self.run(&["status", "--json", "--from-regions"]).expect(0).json();
        lsn_of(&status, region).unwrap_or(Lsn(0))
    }

    /// Waits until every region named has all WAL that the server has now.
    pub fn wait_archived(&mut self, server: &Server, regions: &[&str]) -> Lsn {
        let now: Lsn = server.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        wait_until("WAL in the regions", || {
            let sidecar = self.sidecar.as_mut().expect("the sidecar was started");
            if let Some(status) = sidecar.exited() {
                panic!("pgkeep run ended ({status}):\n{}", sidecar.log());
            }
            let output = self.run(&["status", "--json"]);
            output.code == 0
                && regions
                    .iter()
                    .all(|region| lsn_of(&output.json(), region).is_some_and(|lsn| lsn >= now))
        });
        now
    }

    /// Takes a full backup; its label.
    pub fn backup(&self) -> String {
        self.run(&["backup"]).expect(0).stdout.trim().to_owned()
    }

    /// Restores into a folder and starts PostgreSQL on it.
    pub fn restore_and_start(
        &self,
        folder: &Folder,
        major: u32,
        name: &str,
        arguments: &[&str],
    ) -> Server {
        let data = folder.path().join(name);
        let mut all = vec!["restore", "--pgdata", data.to_str().unwrap()];
        all.extend(arguments);
        self.run(&all).expect(0);
        let mut server = Server::at(folder, major, &data);
        server.configure("");
        server.start();
        server
    }
}

/// What the archiver said belongs to the report of a test that failed.
impl Drop for Keeper {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}:\n{}", self.log.display(), self.log());
        }
    }
}

fn lsn_of(status: &Value, region: &str) -> Option<Lsn> {
    let regions = status["regions"].as_array()?;
    let found = regions.iter().find(|entry| entry["name"] == region)?;
    found["archived_lsn"].as_str()?.parse().ok()
}

/// Every file below a folder whose name a condition accepts.
pub fn files_below(folder: &Path, accept: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if accept(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
