//! What lies in the directory that is to be restored into, and whether a restore may have it.
//!
//! A restore that was interrupted is known by its plan, which is written before anything else, and
//! by `pg_control`, which is written after everything else. The few moments after that count too:
//! as long as `backup_label` and `recovery.signal` lie there, no server has begun to recover.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::plan::{PLAN_FILE, Plan};
use super::target::Target;
use super::{PLAN_BEING_WRITTEN, RestoreError, read_plan};
use crate::repo::BackupLabel;

/// The file without which no directory starts.
pub(super) const PG_CONTROL: &str = "global/pg_control";

/// What is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occupant {
    /// Nothing, or not even the directory.
    Nothing,
    /// A restore of the same plan that was interrupted.
    Interrupted,
    /// A cluster, or another restore of it, over which this one may go.
    Cluster,
}

/// Says what is in a directory.
///
/// # Errors
/// When a restore may not write there, with what to do about it.
pub(super) fn occupant(folder: &Path, plan: &Plan, delta: bool) -> Result<Occupant, RestoreError> {
    let refuse =
        |problem: String| Err(RestoreError::Directory { path: folder.to_owned(), problem });
    if is_empty(folder)? {
        return Ok(Occupant::Nothing);
    }
    if let Some(server) = running_server(folder) {
        return refuse(format!("{server}; stop it first"));
    }
    let control = system_of(folder)?;
    match interrupted(folder) {
        Some(earlier) if same(&earlier, plan) => return Ok(Occupant::Interrupted),
        Some(earlier) if !delta => {
            return refuse(format!(
                "a restore of backup {} to {} was interrupted in it. Give the command of that restore again to end it, or --delta to put this one over it, or empty the directory",
                earlier.backup, earlier.target
            ));
        }
        Some(earlier) if earlier.system_identifier == plan.system_identifier => {
            return Ok(Occupant::Cluster);
        }
        _ => {}
    }
    if !delta {
        return refuse(
            "it is not empty; move its content away, or restore into another directory, or rewrite only what differs with --delta".into(),
        );
    }
    match control {
        Some(system) if system.to_string() == plan.system_identifier => Ok(Occupant::Cluster),
        Some(system) => refuse(format!(
            "it belongs to another cluster: its system identifier is {system}, and that of the backup {}",
            plan.system_identifier
        )),
        None => refuse(format!(
            "it is neither empty nor a data directory ({PG_CONTROL} is missing); --delta would remove what is in it"
        )),
    }
}

/// The backup that an interrupted restore to the same target began with: it is ended with that one
/// though a newer one may be there.
pub fn interrupted_backup(folder: &Path, target: &Target, exclusive: bool) -> Option<BackupLabel> {
    let plan = interrupted(folder)?;
    (plan.target == *target && plan.exclusive == exclusive).then_some(plan.backup)
}

fn interrupted(folder: &Path) -> Option<Plan> {
    let plan = read_plan(folder).ok()??;
    let is_there = |name: &str| folder.join(name).exists();
    let unstarted = is_there("backup_label") && is_there("recovery.signal");
    (unstarted || !is_there(PG_CONTROL)).then_some(plan)
}

/// Whether the same files come from both plans. The end of the WAL may have moved on.
fn same(one: &Plan, other: &Plan) -> bool {
    let of = |plan: &Plan| {
        (
            plan.system_identifier.clone(),
            plan.backup.clone(),
            plan.target.clone(),
            plan.exclusive,
            plan.timeline(),
        )
    };
    of(one) == of(other)
}

fn is_empty(folder: &Path) -> Result<bool, RestoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => {
            let path = folder.to_owned();
            return Err(RestoreError::Directory { path, problem: error.to_string() });
        }
    };
    for entry in entries {
        if entry?.file_name() != PLAN_BEING_WRITTEN {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The system identifier, which `pg_control` begins with.
fn system_of(folder: &Path) -> io::Result<Option<u64>> {
    match fs::read(folder.join(PG_CONTROL)) {
        Ok(bytes) => Ok(bytes.first_chunk().map(|first| u64::from_ne_bytes(*first))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a server runs in a directory: by the process that `postmaster.pid` names, or, where that
/// is the number of another container's process, by its socket.
fn running_server(folder: &Path) -> Option<String> {
    let text = fs::read_to_string(folder.join("postmaster.pid")).ok()?;
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let number = lines.first().and_then(|line| line.parse::<i32>().ok());
    if number.and_then(rustix::process::Pid::from_raw).is_some_and(|pid| works_in(pid, folder)) {
        return Some(format!(
            "a PostgreSQL server runs in it (postmaster.pid names process {})",
            lines[0]
        ));
    }
    let (port, socket) = (lines.get(3)?, lines.get(4)?);
    let socket = PathBuf::from(socket).join(format!(".s.PGSQL.{port}"));
    UnixStream::connect(&socket).ok()?;
    Some(format!(
        "a PostgreSQL server runs in it (the socket {} of its postmaster.pid answers)",
        socket.display()
    ))
}

/// Whether a process lives and, as far as can be seen, is in this directory, as a server always is.
fn works_in(pid: rustix::process::Pid, folder: &Path) -> bool {
    match rustix::process::test_kill_process(pid) {
        Ok(()) | Err(rustix::io::Errno::PERM) => {}
        Err(_) => return false,
    }
    let its = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero()));
    match (its, fs::canonicalize(folder)) {
        (Ok(its), Ok(folder)) => its == folder,
        _ => true,
    }
}

/// Keeps other restores out of a directory for as long as the file is open.
pub(super) fn lock(folder: &Path) -> Result<File, RestoreError> {
    let file = File::open(folder)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(RestoreError::Directory {
            path: folder.to_owned(),
            problem: "another restore is at work in it".into(),
        }),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// Puts the plan into the directory, whole or not at all, and for good.
pub(super) fn write_plan(folder: &Path, plan: &Plan) -> io::Result<()> {
    let bytes = serde_json::to_vec_pretty(plan)?;
    let unfinished = folder.join(PLAN_BEING_WRITTEN);
    fs::write(&unfinished, bytes)?;
    File::open(&unfinished)?.sync_all()?;
    fs::rename(&unfinished, folder.join(PLAN_FILE))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_of_a_process_that_is_gone_or_is_elsewhere_stops_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("postmaster.pid");
        assert_eq!(running_server(folder.path()), None);
        let own = std::process::id();
        fs::write(&pid_file, format!("{own}\n{}\n1\n5432\n/nowhere\n", folder.path().display()))
            .unwrap();
        assert_eq!(running_server(folder.path()), None, "this test works in another directory");
        let here = std::env::current_dir().unwrap();
        let own = rustix::process::Pid::from_raw(i32::try_from(own).unwrap()).unwrap();
        assert!(works_in(own, &here));
        fs::write(&pid_file, "4194399\n").unwrap();
        assert_eq!(running_server(folder.path()), None);
    }

    // A server in another container: its process cannot be seen, but its socket can.
    #[test]
    fn a_socket_that_answers_is_a_server() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join(".s.PGSQL.5432");
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        let path = folder.path().display();
        fs::write(
            folder.path().join("postmaster.pid"),
            format!("4194399\n{path}\n1\n5432\n{path}\n"),
        )
        .unwrap();
        assert!(running_server(folder.path()).unwrap().contains("answers"));
        drop(listener);
        assert_eq!(running_server(folder.path()), None);
    }

    #[test]
    fn two_restores_do_not_share_a_directory() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        assert!(lock(folder.path()).is_err());
        drop(first);
        assert!(lock(folder.path()).is_ok());
    }
}
