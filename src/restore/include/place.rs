//! Files, folders and links below a folder. Every path is walked part by part, from that folder, and
//! no link is followed on the way: whatever lies on the disk, nothing leads out of it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown,
    futimens, mkdirat, openat, readlinkat, renameat, statat, symlinkat, syncfs, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use super::IncludeOutcome;
use super::object::FrameReader;
use crate::accounts::Accounts;
use crate::repo::{CapturedEntry, CapturedKind, ContentHash, ContentKey, LocatedEntry};

/// A file's name until it is whole.
const BEING_WRITTEN: &str = ".pgkeep-include.tmp";
/// Set-user-ID and set-group-ID: kept only with the owner that they were meant for.
const SET_ID: u32 = 0o6000;
/// How much of a file is compared at once.
const CHUNK: usize = 64 << 10;

/// What lies where an entry goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing.
    Nothing,
    /// The same.
    Same,
    /// A file or link that could be replaced.
    Differs,
    /// Something that is never replaced, and what.
    Blocked(String),
}

/// The folder below which everything lies.
pub(super) struct Root {
    path: PathBuf,
    /// `None`: it does not exist.
    folder: Option<OwnedFd>,
}

/// The folder of an entry, or why there is none.
enum Parent {
    Folder(OwnedFd),
    Missing,
    Blocked(String),
}

const FOLDER: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Root {
    /// Opens it if it exists.
    pub(super) fn open(path: &Path) -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(folder) => Some(folder),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(named(path, error)),
        };
        Ok(Root { path: path.to_owned(), folder })
    }

    /// Opens it, and makes it if need be, for its owner alone: there may be keys in it.
    pub(super) fn make(path: &Path) -> io::Result<Root> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| named(path, error))?;
        Root::open(path)
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.path.join(path)
    }

    /// What lies where an entry goes.
    pub(super) fn look(&self, located: &LocatedEntry, key: &ContentKey) -> io::Result<Place> {
        match self.parent(&located.entry.path, false)? {
            Parent::Missing => Ok(Place::Nothing),
            Parent::Blocked(problem) => Ok(Place::Blocked(problem)),
            Parent::Folder(folder) => self.look_in(&folder, located, key),
        }
    }

    fn look_in(
        &self,
        folder: &OwnedFd,
        located: &LocatedEntry,
        key: &ContentKey,
    ) -> io::Result<Place> {
        let entry = &located.entry;
        let full = self.full(&entry.path);
        let name = name_of(&entry.path)?;
        let stat = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Place::Nothing),
            Err(error) => return Err(named(&full, error)),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_same = match (&entry.kind, kind) {
            (CapturedKind::Folder, FileType::Directory) => true,
            (CapturedKind::Folder, _) => {
                return Ok(Place::Blocked(format!("{} is no folder", full.display())));
            }
            (_, FileType::Directory) => {
                return Ok(Place::Blocked(format!("{} is a folder", full.display())));
            }
            (CapturedKind::Link(target), FileType::Symlink) => {
                let found = readlinkat(folder, name, Vec::new());
                found.map_err(|error| named(&full, error))?.as_bytes() == target.as_encoded_bytes()
            }
            (CapturedKind::File(size), FileType::RegularFile) => {
                u64::try_from(stat.st_size) == Ok(*size)
                    // What cannot be read is not known to be the same.
                    && hash_of(folder, name, key).is_ok_and(|hash| hash == located.hash)
            }
            (_, FileType::RegularFile | FileType::Symlink) => false,
            _ => {
                let problem = format!("{} is a socket, pipe or device", full.display());
                return Ok(Place::Blocked(problem));
            }
        };
        Ok(if is_same { Place::Same } else { Place::Differs })
    }

    /// Walks to the folder of a path; folders that are missing may be made.
    fn parent(&self, path: &Path, make: bool) -> io::Result<Parent> {
        let Some(root) = &self.folder else { return Ok(Parent::Missing) };
        let mut folder = root.as_fd().try_clone_to_owned()?;
        let mut walked = self.path.clone();
        let parts = path.parent().into_iter().flat_map(Path::components);
        for part in parts {
            let name = part.as_os_str();
            walked.push(name);
            let mut next = openat(&folder, name, FOLDER, Mode::empty());
            if make && matches!(next, Err(Errno::NOENT)) {
                let made = mkdirat(&folder, name, Mode::from_raw_mode(0o755));
                made.map_err(|error| named(&walked, error))?;
                next = openat(&folder, name, FOLDER, Mode::empty());
            }
            folder = match next {
                Ok(next) => next,
                Err(Errno::NOENT) => return Ok(Parent::Missing),
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let is_link = walked.symlink_metadata().is_ok_and(|found| found.is_symlink());
                    let what = if is_link { "a link, which is not followed" } else { "no folder" };
                    return Ok(Parent::Blocked(format!("{} is {what}", walked.display())));
                }
                Err(error) => return Err(named(&walked, error)),
            };
        }
        Ok(Parent::Folder(folder))
    }
}

/// Writes entries in their order.
pub(super) struct Writer<'a> {
    root: Root,
    overwrite: bool,
    accounts: &'a Accounts,
    key: ContentKey,
    is_root: bool,
    /// Folders get their owners and modes when everything is in them; and whether they are new.
    folders: Vec<(CapturedEntry, bool)>,
    /// One file of each file system, to sync it by.
    devices: HashMap<u64, File>,
    outcome: IncludeOutcome,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        root: Root,
        overwrite: bool,
        accounts: &'a Accounts,
        key: ContentKey,
    ) -> Writer<'a> {
        Writer {
            root,
            overwrite,
            accounts,
            key,
            is_root: rustix::process::geteuid().is_root(),
            folders: Vec::new(),
            devices: HashMap::new(),
            outcome: IncludeOutcome::default(),
        }
    }

    /// Brings one entry to its place; `content` stands before that of the entry.
    pub(super) fn put(
        &mut self,
        located: &LocatedEntry,
        content: &mut FrameReader,
    ) -> io::Result<()> {
        let entry = &located.entry;
        let full = self.root.full(&entry.path);
        let refuse = |problem: String| io::Error::new(io::ErrorKind::AlreadyExists, problem);
        let folder = match self.root.parent(&entry.path, true)? {
            Parent::Folder(folder) => folder,
            Parent::Missing => return Err(named(&full, Errno::NOENT)),
            Parent::Blocked(problem) => return Err(refuse(problem)),
        };
        let name = name_of(&entry.path)?;
        let place = self.root.look_in(&folder, located, &self.key)?;
        if let Place::Blocked(problem) = place {
            return Err(refuse(problem));
        }
        if place == Place::Differs && !self.overwrite {
            return Err(refuse(format!("{} is there now and differs", full.display())));
        }
        let outcome = match &entry.kind {
            CapturedKind::Folder => self.put_folder(&folder, name, entry, &place),
            _ if place == Place::Same => self.keep(&folder, name, entry),
            CapturedKind::Link(target) => self.put_link(&folder, name, entry, target),
            CapturedKind::File(size) => {
                content.skip_to(located.offset)?;
                let replaces = place == Place::Differs;
                self.put_file(&folder, name, entry, &mut content.take(*size), replaces)
            }
        };
        outcome.map_err(|error| {
            let _ = remove(&folder, BEING_WRITTEN);
            named(&full, error)
        })
    }

    fn put_folder(
        &mut self,
        folder: &OwnedFd,
        name: &OsStr,
        entry: &CapturedEntry,
        place: &Place,
    ) -> io::Result<()> {
        let is_new = *place == Place::Nothing;
        if is_new {
            mkdirat(folder, name, Mode::from_raw_mode(0o700))?;
        }
        self.folders.push((entry.clone(), is_new));
        Ok(())
    }

    fn put_link(
        &mut self,
        folder: &OwnedFd,
        name: &OsStr,
        entry: &CapturedEntry,
        target: &OsStr,
    ) -> io::Result<()> {
        remove(folder, BEING_WRITTEN)?;
        symlinkat(target, folder, BEING_WRITTEN)?;
        if self.is_root {
            let (user, group) = self.owner(entry);
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            chownat(folder, BEING_WRITTEN, Some(user), Some(group), flags)?;
        }
        utimensat(folder, BEING_WRITTEN, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(renameat(folder, BEING_WRITTEN, folder, name)?)
    }

    fn put_file(
        &mut self,
        folder: &OwnedFd,
        name: &OsStr,
        entry: &CapturedEntry,
        content: &mut impl Read,
        replaces: bool,
    ) -> io::Result<()> {
        remove(folder, BEING_WRITTEN)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o600);
        let handle = openat(folder, BEING_WRITTEN, flags | OFlags::CLOEXEC, mode)?;
        let mut file = File::from(handle);
        let count = io::copy(content, &mut file)?;
        if CapturedKind::File(count) != entry.kind {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.dress(&file, entry)?;
        futimens(&file, &times(entry))?;
        if replaces {
            // A crash must leave the old file or the new one.
            file.sync_all()?;
        }
        renameat(folder, BEING_WRITTEN, folder, name)?;
        self.outcome.files += 1;
        self.outcome.bytes += count;
        self.note_device(file)
    }

    /// What is there already gets the owner and mode that it had, if they can be given.
    fn keep(&mut self, folder: &OwnedFd, name: &OsStr, entry: &CapturedEntry) -> io::Result<()> {
        if !matches!(entry.kind, CapturedKind::File(_)) {
            return Ok(());
        }
        self.outcome.there += 1;
        let file = open_file(folder, name)?;
        if let Err(error) = self.dress(&file, entry) {
            let path = entry.path.display();
            tracing::warn!("/{path} keeps its owner and mode: {error}");
        }
        self.note_device(file)
    }

    /// Gives owner and mode, where they differ.
    fn dress(&self, file: &File, entry: &CapturedEntry) -> io::Result<()> {
        let found = file.metadata()?;
        let mut mode = entry.mode;
        let (user, group) = self.owner(entry);
        let is_owned = (found.uid(), found.gid()) == (user.as_raw(), group.as_raw());
        if self.is_root && !is_owned {
            fchown(file, Some(user), Some(group))?;
        }
        if !self.is_root && !is_owned {
            mode &= !SET_ID;
        }
        if found.mode() & 0o7777 != mode || self.is_root {
            fchmod(file, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }

    fn owner(&self, entry: &CapturedEntry) -> (Uid, Gid) {
        let user = self.accounts.user(entry.user_name.as_deref(), entry.user);
        let group = self.accounts.group(entry.group_name.as_deref(), entry.group);
        (Uid::from_raw(user), Gid::from_raw(group))
    }

    fn note_device(&mut self, file: File) -> io::Result<()> {
        let device = file.metadata()?.dev();
        self.devices.entry(device).or_insert(file);
        Ok(())
    }

    /// Gives folders their owners and modes, the innermost first, and makes everything durable.
    pub(super) fn finish(mut self) -> io::Result<IncludeOutcome> {
        for (entry, is_new) in std::mem::take(&mut self.folders).into_iter().rev() {
            let full = self.root.full(&entry.path);
            let Parent::Folder(parent) = self.root.parent(&entry.path, false)? else { continue };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let outcome = (|| {
                let handle = openat(&parent, name_of(&entry.path)?, flags, Mode::empty())?;
                let folder = File::from(handle);
                self.dress(&folder, &entry)?;
                if is_new {
                    futimens(&folder, &times(&entry))?;
                }
                self.note_device(folder)
            })();
            match outcome {
                Err(error) if is_new => return Err(named(&full, error)),
                Err(error) => tracing::warn!("{} is left as it was: {error}", full.display()),
                Ok(()) => {}
            }
        }
        self.devices.values().try_for_each(syncfs)?;
        Ok(self.outcome)
    }
}

fn times(entry: &CapturedEntry) -> Timestamps {
    let seconds = i64::try_from(entry.mtime).unwrap_or(0);
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn name_of(path: &Path) -> io::Result<&OsStr> {
    path.file_name().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn open_file(folder: &OwnedFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(openat(folder, name, flags, Mode::empty())?))
}

fn hash_of(folder: &OwnedFd, name: &OsStr, key: &ContentKey) -> io::Result<ContentHash> {
    let mut file = open_file(folder, name)?;
    let mut hasher = key.hasher();
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = file.read(&mut chunk)?;
        if count == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&chunk[..count]);
    }
}

fn remove(folder: &OwnedFd, name: &str) -> io::Result<()> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn named(path: &Path, error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
