//! Processes, folders, ports, waiting.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up. Nothing is asserted about speed.
const PATIENCE: Duration = Duration::from_secs(120);
/// The user and group `nobody` of every Linux.
const NOBODY: u32 = 65534;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where `scripts/setup` put the programs.
pub fn cache() -> PathBuf {
    if let Some(folder) = std::env::var_os("PGKEEP_TEST_CACHE") {
        return folder.into();
    }
    if is_root() {
        return "/var/cache/pgkeep-test".into();
    }
    let home = std::env::var_os("HOME").expect("HOME is set");
    Path::new(&home).join(".cache/pgkeep-test")
}

/// A program that `scripts/setup` got; its absence is a failure, never a skip.
pub fn program(path: &str) -> PathBuf {
    let program = cache().join(path);
    assert!(program.exists(), "{} is missing: run scripts/setup", program.display());
    program
}

/// A command that runs as a user whom PostgreSQL accepts.
pub fn user_command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("PG") || text.starts_with("AWS_") {
            command.env_remove(&name);
        }
    }
    command
}

/// A folder that goes away with the test.
pub struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    pub fn new() -> Folder {
        let folder = tempfile::Builder::new().prefix("pgkeep-it-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        give(folder.path());
        Folder { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Makes a folder inside.
    pub fn make(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).unwrap();
        give(&path);
        path
    }

    /// Writes a file inside, readable for its owner alone.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        give(&path);
        path
    }
}

fn give(path: &Path) {
    if is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
}

/// The program under test, where the user `nobody` can read it.
pub fn pgkeep() -> &'static Path {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PROGRAM.get_or_init(|| {
        let folder = tempfile::Builder::new().prefix("pgkeep-bin-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().join("pgkeep");
        fs::copy(env!("CARGO_BIN_EXE_pgkeep"), &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (folder, path)
    });
    path
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A process that does not outlive the test.
pub struct Spawned {
    child: Child,
    log: PathBuf,
}

impl Spawned {
    /// Starts a command; its output goes to `log`.
    pub fn start(mut command: Command, log: &Path) -> Spawned {
        let output = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let errors = output.try_clone().unwrap();
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Spawned { child, log: log.to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it ever had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.id() as i32).unwrap();
        let _ = rustix::process::kill_process(pid, signal);
    }

    /// The processes that it started itself.
    pub fn children(&self) -> Vec<rustix::process::Pid> {
        let list = format!("/proc/{0}/task/{0}/children", self.id());
        let list = fs::read_to_string(list).unwrap();
        let numbers = list.split_whitespace().filter_map(|pid| pid.parse().ok());
        numbers.filter_map(rustix::process::Pid::from_raw).collect()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("a process to end", || {
            status = self.exited();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// Waits for a condition; the only way in which tests wait.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
