//! What there is below the paths: found before anything is read, so that limits are known in time.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::{CaptureError, Limits, Notes};

/// The longest path that is captured, as PostgreSQL's and most systems' own limit.
const MAX_PATH: usize = 4095;

/// What there is to be captured.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Files, folders and links; a folder before what it holds.
    pub(super) entries: Vec<(PathBuf, Metadata)>,
    /// What has no content.
    pub(super) skipped: Notes,
    /// What cannot be looked at.
    pub(super) failures: Notes,
}

/// Looks through the paths. Links are not followed.
///
/// # Errors
/// When there is more than the limits allow.
pub(super) fn scan(paths: &[PathBuf], limits: Limits) -> Result<Found, CaptureError> {
    let mut found = Found::default();
    let mut bytes = 0;
    // Those still to be looked at, the next one last.
    let mut ahead: Vec<PathBuf> = paths.iter().rev().cloned().collect();
    while let Some(path) = ahead.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) => {
                // Gone since its folder was read: as if it had never been.
                if error.kind() != io::ErrorKind::NotFound || paths.contains(&path) {
                    found.failures.push(&path, error);
                }
                continue;
            }
        };
        if let Some(what) = special(&metadata) {
            found.skipped.push(&path, what);
            continue;
        }
        if path.as_os_str().len() > MAX_PATH {
            found.failures.push(&path, "its path is too long");
            continue;
        }
        if metadata.is_symlink() && paths.contains(&path) {
            note_target(&path, paths, &mut found.failures);
        }
        if metadata.is_dir() {
            match children(&path, limits) {
                Ok(children) => ahead.extend(children.into_iter().rev()),
                Err(error) => found.failures.push(&path, error),
            }
        } else if metadata.is_file() {
            bytes += metadata.len();
        }
        found.entries.push((path, metadata));
        let (path, _) = &found.entries[found.entries.len() - 1];
        if bytes > limits.bytes {
            return Err(CaptureError::Limit { bytes: true, what: format!("{}", path.display()) });
        }
        if found.entries.len() + ahead.len() > limits.entries {
            return Err(CaptureError::Limit { bytes: false, what: format!("{}", path.display()) });
        }
    }
    Ok(found)
}

/// What an entry of a folder is if nothing of it can be captured.
fn special(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_socket() => Some("a socket"),
        () if kind.is_fifo() => Some("a pipe"),
        () if kind.is_block_device() || kind.is_char_device() => Some("a device"),
        () => None,
    }
}

/// The paths in a folder, in order; one more than is allowed at most.
fn children(folder: &Path, limits: Limits) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.take(limits.entries + 1);
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort_unstable();
    Ok(paths)
}

/// A path that was named and is a link: what it leads to was meant, and must be named itself.
fn note_target(path: &Path, paths: &[PathBuf], failures: &mut Notes) {
    match fs::canonicalize(path) {
        Ok(target) if paths.iter().any(|other| other != path && target.starts_with(other)) => {}
        Ok(target) => failures.push(
            path,
            format!(
                "it is a link; only the link is captured. Name {} in backup.include too",
                target.display()
            ),
        ),
        Err(error) => failures.push(path, format!("it is a link that leads nowhere: {error}")),
    }
}
