//! Files into the archive. Servers write while they are read: a small file is read again until it
//! held still, and whatever happens to a large one, the archive gets as many bytes as it announced.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use tar::Builder;

use super::scan::Found;
use super::{CaptureError, Limits, Notes};
use crate::accounts::Accounts;
use crate::repo::{CapturedEntry, CapturedKind, append_captured};

/// Files up to this size are held in memory while it is looked whether they changed.
const HELD_SIZE: u64 = 4 << 20;
/// How often a file that changes is read.
const ATTEMPTS: usize = 5;
/// The pause between two of these.
const PAUSE: Duration = Duration::from_millis(20);
/// What is said of a file that never held still.
const CHANGED: &str = "it changed while it was read: what is stored may be part old, part new";

/// What the archive holds.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) skipped: Notes,
    pub(super) failures: Notes,
}

/// Writes all of it; what cannot be read is noted.
///
/// # Errors
/// When the writer fails, or files grew beyond the limit.
pub(super) fn write_archive<W: Write>(
    found: Found,
    writer: W,
    limits: Limits,
    accounts: &Accounts,
) -> Result<(W, Tally), CaptureError> {
    let Found { entries, skipped, failures } = found;
    let mut archiver = Archiver {
        archive: Builder::new(writer),
        accounts,
        limits,
        tally: Tally { skipped, failures, ..Tally::default() },
    };
    for (path, metadata) in entries {
        archiver.add(&path, &metadata)?;
    }
    let Archiver { archive, tally, .. } = archiver;
    Ok((archive.into_inner()?, tally))
}

struct Archiver<'a, W: Write> {
    archive: Builder<W>,
    accounts: &'a Accounts,
    limits: Limits,
    tally: Tally,
}

/// A file as it was read.
struct Held {
    metadata: Metadata,
    content: Vec<u8>,
    is_stable: bool,
}

impl<W: Write> Archiver<'_, W> {
    fn add(&mut self, path: &Path, metadata: &Metadata) -> Result<(), CaptureError> {
        if metadata.is_dir() {
            let entry = self.entry(path, metadata, CapturedKind::Folder);
            return Ok(append_captured(&mut self.archive, &entry, io::empty())?);
        }
        if metadata.is_symlink() {
            return match std::fs::read_link(path) {
                Ok(target) => {
                    let kind = CapturedKind::Link(target.into_os_string());
                    let entry = self.entry(path, metadata, kind);
                    Ok(append_captured(&mut self.archive, &entry, io::empty())?)
                }
                Err(error) => {
                    self.tally.failures.push(path, error);
                    Ok(())
                }
            };
        }
        match open(path) {
            Ok((file, metadata)) if metadata.len() > HELD_SIZE => {
                self.add_large(path, file, &metadata)
            }
            Ok((file, metadata)) => match read_held(path, file, metadata) {
                Ok(held) => self.add_held(path, &held),
                Err(error) => {
                    self.tally.failures.push(path, error);
                    Ok(())
                }
            },
            Err(error) => {
                self.tally.failures.push(path, error);
                Ok(())
            }
        }
    }

    fn add_held(&mut self, path: &Path, held: &Held) -> Result<(), CaptureError> {
        let size = held.content.len() as u64;
        self.count(path, size)?;
        if !held.is_stable {
            self.tally.failures.push(path, CHANGED);
        }
        let entry = self.entry(path, &held.metadata, CapturedKind::File(size));
        Ok(append_captured(&mut self.archive, &entry, held.content.as_slice())?)
    }

    fn add_large(
        &mut self,
        path: &Path,
        file: File,
        metadata: &Metadata,
    ) -> Result<(), CaptureError> {
        let size = metadata.len();
        self.count(path, size)?;
        let entry = self.entry(path, metadata, CapturedKind::File(size));
        let mut content = Announced { file: &file, left: size, failure: None };
        append_captured(&mut self.archive, &entry, &mut content)?;
        match content.failure {
            Some(failure) => self.tally.failures.push(path, failure),
            None if file.metadata().is_ok_and(|after| is_same(metadata, &after)) => {}
            None => self.tally.failures.push(path, CHANGED),
        }
        Ok(())
    }

    fn count(&mut self, path: &Path, size: u64) -> Result<(), CaptureError> {
        self.tally.files += 1;
        self.tally.bytes += size;
        if self.tally.bytes > self.limits.bytes {
            return Err(CaptureError::Limit { bytes: true, what: path.display().to_string() });
        }
        Ok(())
    }

    fn entry(&self, path: &Path, metadata: &Metadata, kind: CapturedKind) -> CapturedEntry {
        let path = path.as_os_str().as_bytes();
        let inside = path.strip_prefix(b"/").unwrap_or(path);
        CapturedEntry {
            path: PathBuf::from(std::ffi::OsStr::from_bytes(inside)),
            kind,
            mode: metadata.mode(),
            user: metadata.uid(),
            user_name: self.accounts.user_name(metadata.uid()),
            group: metadata.gid(),
            group_name: self.accounts.group_name(metadata.gid()),
            mtime: u64::try_from(metadata.mtime()).unwrap_or(0),
        }
    }
}

/// Opens what is still a file. A link or a pipe that took its place is neither followed nor waited
/// for.
pub(super) fn open(path: &Path) -> io::Result<(File, Metadata)> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok((file, metadata)),
        false => Err(io::Error::other("it is no file any more")),
    }
}

/// Reads a small file until it held still.
fn read_held(path: &Path, file: File, metadata: Metadata) -> io::Result<Held> {
    let mut held = read_once(file, metadata)?;
    for _ in 1..ATTEMPTS {
        if held.is_stable {
            break;
        }
        std::thread::sleep(PAUSE);
        let (file, metadata) = open(path)?;
        held = read_once(file, metadata)?;
    }
    Ok(held)
}

fn read_once(file: File, metadata: Metadata) -> io::Result<Held> {
    let mut content = Vec::new();
    (&file).take(HELD_SIZE + 1).read_to_end(&mut content)?;
    let is_stable = content.len() as u64 == metadata.len() && is_same(&metadata, &file.metadata()?);
    Ok(Held { metadata, content, is_stable })
}

fn is_same(before: &Metadata, after: &Metadata) -> bool {
    let of = |metadata: &Metadata| (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    of(before) == of(after)
}

/// A file's content, of exactly the length that was announced: zeros stand for what is not there.
struct Announced<'a> {
    file: &'a File,
    left: u64,
    failure: Option<String>,
}

impl Read for Announced<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let into = &mut into[..most];
        let count = match self.failure {
            None => self.file.read(into),
            Some(_) => Ok(0),
        };
        let count = match count {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Ok(count) if count > 0 || most == 0 => count,
            outcome => {
                self.failure.get_or_insert_with(|| {
                    let why = match outcome {
                        Err(error) => error.to_string(),
                        Ok(_) => "it became shorter while it was read".to_owned(),
                    };
                    format!("{why}: zeros are stored for what is missing")
                });
                into.fill(0);
                most
            }
        };
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_while_a_file_is_read_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (changed, is_stable) in [("before", true), ("before and after", false), ("", false)] {
            std::fs::write(&path, "before").unwrap();
            let (file, metadata) = open(&path).unwrap();
            if !is_stable {
                std::fs::write(&path, changed).unwrap();
            }
            let held = read_once(file, metadata).unwrap();
            assert_eq!((held.is_stable, held.content), (is_stable, changed.as_bytes().to_vec()));
        }
        let (file, metadata) = open(&path).unwrap();
        assert!(read_held(&path, file, metadata).unwrap().is_stable);
    }

    #[test]
    fn a_file_that_never_held_still_is_stored_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "content").unwrap();
        let (file, metadata) = open(&path).unwrap();
        let held = Held { is_stable: false, ..read_once(file, metadata).unwrap() };
        let accounts = Accounts::default();
        let mut archiver = Archiver {
            archive: Builder::new(Vec::new()),
            accounts: &accounts,
            limits: Limits { bytes: 7, entries: 1 },
            tally: Tally::default(),
        };
        archiver.add_held(&path, &held).unwrap();
        assert_eq!((archiver.tally.files, archiver.tally.bytes), (1, 7));
        // It grew since it was found: the limit counts what is read.
        assert!(archiver.add_held(&path, &held).is_err());
        assert!(archiver.tally.failures.finish()[0].contains(CHANGED));
    }
}
