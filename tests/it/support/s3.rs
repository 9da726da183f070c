//! A real S3 server over HTTP with signed requests, whose objects survive a restart.

use std::path::PathBuf;

use pgkeep::store::{RegionSpec, open_region};

use super::{Folder, Spawned, free_port, program, user_command, wait_until};

const KEY: &str = "test-key";
const SECRET: &str = "test-secret";
const BUCKET: &str = "archive";

pub struct S3Server {
    port: u16,
    folder: PathBuf,
    log: PathBuf,
    process: Option<Spawned>,
    secret: &'static str,
}

impl S3Server {
    pub fn start(folder: &Folder) -> S3Server {
        let log = folder.path().join("s3.log");
        let mut server = S3Server {
            port: free_port(),
            folder: folder.make("s3"),
            log,
            process: None,
            secret: SECRET,
        };
        server.restart();
        server
    }

    pub fn kill9(&mut self) {
        self.process = None;
    }

    /// Sends it a signal: stopped, it takes connections and answers nothing.
    pub fn signal(&self, signal: rustix::process::Signal) {
        self.process.as_ref().expect("it runs").signal(signal);
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts it again with another secret key, as after a rotation that nobody told pgkeep of, or
    /// with the one that it had.
    pub fn change_secret(&mut self, changed: bool) {
        self.kill9();
        self.secret = if changed { "another-secret" } else { SECRET };
        self.restart();
    }

    /// Starts it, on the same port and with the same objects, and waits until it answers.
    pub fn restart(&mut self) {
        let mut command = user_command(program("bin/seaweedfs-s3"));
        command.arg(self.port.to_string()).arg(&self.folder).arg(format!("-bucket={BUCKET}"));
        command.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", self.secret);
        command.env("HOME", &self.folder).current_dir(&self.folder);
        self.process = Some(Spawned::start(command, &self.log));
        let region = open_region(&self.spec("probe", "")).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        wait_until("the S3 server", || runtime.block_on(region.list("probe")).is_ok());
    }

    /// A region in it, reached directly.
    pub fn spec(&self, name: &str, prefix: &str) -> RegionSpec {
        let options = [
            ("endpoint", format!("http://127.0.0.1:{}", self.port)),
            ("access_key_id", KEY.to_owned()),
            ("secret_access_key", self.secret.to_owned()),
            ("region", "us-east-1".to_owned()),
        ];
        RegionSpec {
            name: name.to_owned(),
            url: format!("s3://{BUCKET}/{prefix}"),
            options: options.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        }
    }

    /// The configuration of a region in it.
    pub fn region(&self, name: &str, prefix: &str) -> String {
        S3Server::region_at(name, prefix, self.port)
    }

    /// The configuration of a region in it that is reached through another port.
    pub fn region_at(name: &str, prefix: &str, port: u16) -> String {
        format!(
            "[[region]]\nname = \"{name}\"\nurl = \"s3://{BUCKET}/{prefix}\"\n\
             endpoint = \"http://127.0.0.1:{}\"\naccess_key_id = \"{KEY}\"\n\
             secret_access_key = \"{SECRET}\"\nregion = \"us-east-1\"\n",
            port
        )
    }
}
