//! The data directory: whether it may be written, and the files that recovery needs in it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
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

/// Checks that a tablespace may go to a folder: it is not there, empty, or the tablespace's already
/// by its link in the data directory.
///
/// # Errors
/// When it holds anything else, with what to do about it.
pub(super) fn check_place(data: &Path, oid: u32, place: &Path) -> Result<(), RestoreError> {
    let refuse = |problem: String| Err(RestoreError::Directory { path: place.to_owned(), problem });
    let link = data.join("pg_tblspc").join(oid.to_string());
    if fs::read_link(link).is_ok_and(|target| target == place) {
        return Ok(());
    }
    match fs::read_dir(place).map(Iterator::count) {
        Ok(0) => Ok(()),
        Ok(_) => refuse(
            "a tablespace would go there, and it is not empty; move its content away, or place the tablespace elsewhere with --tablespace-map".into(),
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => refuse(error.to_string()),
    }
}

/// Makes a file that only its owner can read.
pub(super) fn create_private(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Makes a folder as PostgreSQL wants it: for its owner alone.
pub(super) fn make_private(folder: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(folder)?;
    // The umask may have taken bits, and an empty folder may have been there.
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
}

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
        let link = links.join(oid.to_string());
        if fs::read_link(&link).is_ok_and(|target| target == *path) {
            continue;
        }
        symlink(path, link)?;
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

/// Bytes that files below a folder take. Links are not followed.
pub(super) fn held_bytes(folder: &Path) -> io::Result<u64> {
    let mut held = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        held += match metadata.is_dir() {
            true => held_bytes(&entry.path())?,
            false => metadata.blocks().saturating_mul(512),
        };
    }
    Ok(held)
}

/// Makes everything on the file system of `folder` durable with one call.
pub(super) fn sync_file_system(folder: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(folder)?)?)
}
