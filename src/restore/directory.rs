//! The data directory: whether it may be written, and the files that recovery needs in it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::RestoreError;
use crate::repo::Tablespace;

/// A tablespace's place on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceMap {
    /// Where it was on the server.
    pub old: String,
    /// Where it goes.
    pub new: PathBuf,
}

/// Checks that a folder is not there or empty, and that nobody uses it.
///
/// # Errors
/// When it holds anything, with what to do about it.
pub(super) fn check_empty(folder: &Path) -> Result<(), RestoreError> {
    let refuse =
        |problem: String| Err(RestoreError::Directory { path: folder.to_owned(), problem });
    let mut entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return refuse(error.to_string()),
    };
    if folder.join("postmaster.pid").exists() {
        return refuse("a PostgreSQL server runs in it (postmaster.pid is there)".into());
    }
    match entries.next() {
        None => Ok(()),
        Some(_) => refuse(
            "it is not empty; move its content away, or restore into another directory".into(),
        ),
    }
}

/// Makes a folder as PostgreSQL wants it: for its owner alone.
pub(super) fn make_private(folder: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(folder)?;
    // The umask may have taken bits, and an empty folder may have been there.
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
}

use std::os::unix::fs::PermissionsExt;

/// Where each tablespace goes: remapped, or where it was on the server.
pub(super) fn place_tablespaces(
    tablespaces: &[Tablespace],
    map: &[TablespaceMap],
) -> Result<Vec<(u32, PathBuf)>, RestoreError> {
    for entry in map {
        if !tablespaces.iter().any(|tablespace| tablespace.location == entry.old) {
            return Err(RestoreError::Usage(format!(
                "--tablespace-map: the backup has no tablespace at {}; it has {}",
                entry.old,
                tablespaces.iter().map(|t| t.location.as_str()).collect::<Vec<_>>().join(", ")
            )));
        }
    }
    let place = |tablespace: &Tablespace| {
        let mapped = map.iter().find(|entry| entry.old == tablespace.location);
        let path =
            mapped.map_or_else(|| PathBuf::from(&tablespace.location), |entry| entry.new.clone());
        (tablespace.oid, path)
    };
    let places: Vec<_> = tablespaces.iter().map(place).collect();
    for (oid, path) in &places {
        if !path.is_absolute() {
            return Err(RestoreError::Usage(format!(
                "the tablespace {oid} would go to {}, which is not an absolute path",
                path.display()
            )));
        }
    }
    Ok(places)
}

/// Makes the tablespaces' folders and their links in `pg_tblspc`.
pub(super) fn link_tablespaces(folder: &Path, places: &[(u32, PathBuf)]) -> io::Result<()> {
    let links = folder.join("pg_tblspc");
    make_private(&links, 0o700)?;
    for (oid, path) in places {
        make_private(path, 0o700)?;
        symlink(path, links.join(oid.to_string()))?;
    }
    Ok(())
}

/// Who should own what is restored: only root has a choice, and takes the owner of the directory
/// itself, or of the folder above it.
pub(super) fn owner_for(folder: &Path) -> io::Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let absolute = std::path::absolute(folder)?;
    let existing = absolute.ancestors().find_map(|ancestor| fs::metadata(ancestor).ok());
    Ok(existing.map(|metadata| (metadata.uid(), metadata.gid())))
}

/// Gives everything below a folder to its owner.
pub(super) fn give(folder: &Path, owner: (u32, u32)) -> io::Result<()> {
    use std::os::unix::fs::lchown;
    lchown(folder, Some(owner.0), Some(owner.1))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            give(&entry.path(), owner)?;
        } else {
            lchown(entry.path(), Some(owner.0), Some(owner.1))?;
        }
    }
    Ok(())
}

/// Bytes that are free for this user where `folder` is, or will be.
pub(super) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let absolute = std::path::absolute(folder)?;
    let existing = absolute.ancestors().find(|ancestor| ancestor.exists());
    let stat = rustix::fs::statvfs(existing.unwrap_or(Path::new("/")))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Makes everything on the file system of `folder` durable with one call.
pub(super) fn sync_file_system(folder: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(folder)?)?)
}
