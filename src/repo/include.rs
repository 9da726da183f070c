//! `include.tar.zst`: files from outside the data directory, captured with a backup.
//!
//! A container whose raw content is a tar archive, so that `zstd -d | tar -x` reads it. Entries are
//! folders, files and symbolic links, with their path from the root of the file system and without
//! its first `/`; a folder comes before what it holds. Whoever restores writes as root, perhaps: so
//! [`read_captured`] lets nothing through that could lead out of the folder that is restored into.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use tar::{Archive, Builder, Entry, EntryType, Header};

use super::{ContentHash, ContentKey};

/// The most files, folders and links that are captured with one backup.
pub const INCLUDE_MAX_ENTRIES: usize = 100_000;
/// The most bytes of files.
pub const INCLUDE_MAX_BYTES: u64 = 1 << 30;
/// The longest path, and the longest target of a link: the system's own limit.
const MAX_PATH: usize = 4096;
/// Permissions, set-user-ID, set-group-ID and sticky.
const MODE_BITS: u32 = 0o7777;
/// How much of a file is hashed at once.
const CHUNK: usize = 64 << 10;

/// What was captured under a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CapturedKind {
    /// A file of this many bytes.
    File(u64),
    /// A folder.
    Folder,
    /// A symbolic link and its target.
    Link(OsString),
}

/// A file, folder or link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedEntry {
    /// From the root of the file system, without the first `/`.
    pub path: PathBuf,
    /// What it is.
    pub kind: CapturedKind,
    /// Its mode.
    pub mode: u32,
    /// Its owner.
    pub user: u32,
    /// The owner's name: on another machine it may have another number.
    pub user_name: Option<String>,
    /// Its group.
    pub group: u32,
    /// The group's name.
    pub group_name: Option<String>,
    /// When it was modified, in seconds since 1970.
    pub mtime: u64,
}

/// An entry, and where its content lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatedEntry {
    /// The entry.
    pub entry: CapturedEntry,
    /// Offset of the content in the archive.
    pub offset: u64,
    /// Hash of the content.
    pub hash: ContentHash,
}

/// Why captured files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IncludeError {
    /// It is no archive, or cut off.
    #[error("its archive cannot be read: {0}")]
    Archive(#[from] io::Error),
    /// An entry that was never written.
    #[error("its archive has an entry {path:?} that {problem}")]
    Entry {
        /// The entry's path.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More than is ever written.
    #[error("its archive has more than {INCLUDE_MAX_ENTRIES} entries")]
    TooMany,
}

/// Writes an entry; `content` must give as many bytes as the entry says.
///
/// # Errors
/// When the path or a target is none that an archive can hold, or the writer fails.
pub fn append_captured<W: Write>(
    archive: &mut Builder<W>,
    entry: &CapturedEntry,
    content: impl Read,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(entry.mode & MODE_BITS);
    header.set_uid(entry.user.into());
    header.set_gid(entry.group.into());
    header.set_mtime(entry.mtime);
    header.set_size(0);
    // Names that do not fit are left out: there are the numbers.
    if let Some(name) = &entry.user_name {
        let _ = header.set_username(name);
    }
    if let Some(name) = &entry.group_name {
        let _ = header.set_groupname(name);
    }
    match &entry.kind {
        CapturedKind::File(size) => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(*size);
            archive.append_data(&mut header, &entry.path, content)
        }
        CapturedKind::Folder => {
            header.set_entry_type(EntryType::Directory);
            let mut path = entry.path.clone().into_os_string();
            path.push("/");
            archive.append_data(&mut header, path, io::empty())
        }
        CapturedKind::Link(target) => {
            header.set_entry_type(EntryType::Symlink);
            match header.set_link_name_literal(target.as_bytes()) {
                Ok(()) => archive.append_data(&mut header, &entry.path, io::empty()),
                Err(_) => archive.append_link(&mut header, &entry.path, target),
            }
        }
    }
}

/// Reads all entries, and the hashes of the files' contents. What comes out has passed the rules:
/// paths stay below where they are put, none occurs twice, and nothing lies below what is no folder.
///
/// # Errors
/// When the archive is damaged, or forged.
pub fn read_captured(
    archive: impl Read,
    key: &ContentKey,
) -> Result<Vec<LocatedEntry>, IncludeError> {
    let mut archive = Archive::new(archive);
    let mut all = Vec::new();
    for entry in archive.entries()? {
        if all.len() >= INCLUDE_MAX_ENTRIES {
            return Err(IncludeError::TooMany);
        }
        let mut entry = entry?;
        let captured = parse(&entry)?;
        let mut hasher = key.hasher();
        let mut chunk = vec![0; CHUNK];
        let mut length = 0;
        if let CapturedKind::File(_) = captured.kind {
            loop {
                let count = entry.read(&mut chunk)?;
                if count == 0 {
                    break;
                }
                hasher.update(&chunk[..count]);
                length += count as u64;
            }
        }
        if matches!(captured.kind, CapturedKind::File(size) if size != length) {
            return Err(refuse(&captured.path, "is cut off"));
        }
        let offset = entry.raw_file_position();
        all.push(LocatedEntry { entry: captured, offset, hash: hasher.finish() });
    }
    check_tree(&all)?;
    Ok(all)
}

fn refuse(path: impl AsRef<OsStr>, problem: &'static str) -> IncludeError {
    IncludeError::Entry { path: path.as_ref().to_string_lossy().into_owned(), problem }
}

fn parse<R: Read>(entry: &Entry<'_, R>) -> Result<CapturedEntry, IncludeError> {
    let header = entry.header();
    let bytes = entry.path_bytes();
    let kind = match header.entry_type() {
        EntryType::Regular => CapturedKind::File(entry.size()),
        EntryType::Directory => CapturedKind::Folder,
        EntryType::Symlink => {
            let target = entry.link_name_bytes().unwrap_or_default();
            let good = (1..=MAX_PATH).contains(&target.len()) && !target.contains(&0);
            if !good {
                return Err(refuse(OsStr::from_bytes(&bytes), "is a link to nowhere"));
            }
            CapturedKind::Link(OsString::from_vec(target.into_owned()))
        }
        _ => {
            return Err(refuse(OsStr::from_bytes(&bytes), "is neither file, folder nor link"));
        }
    };
    let path = match kind {
        CapturedKind::Folder => bytes.strip_suffix(b"/").unwrap_or(&bytes),
        _ => &bytes,
    };
    if !is_inside(path) {
        return Err(refuse(OsStr::from_bytes(&bytes), "leads elsewhere"));
    }
    let name = |name: Option<&[u8]>| {
        let name = std::str::from_utf8(name?).ok()?;
        (!name.is_empty()).then(|| name.to_owned())
    };
    // The value that says "nobody" to the system, which would then change nothing.
    let number = |number: u64| u32::try_from(number).ok().filter(|number| *number != u32::MAX);
    let (Some(user), Some(group)) = (number(header.uid()?), number(header.gid()?)) else {
        return Err(refuse(OsStr::from_bytes(&bytes), "belongs to nobody who can be"));
    };
    Ok(CapturedEntry {
        path: PathBuf::from(OsString::from_vec(path.to_vec())),
        kind,
        mode: header.mode()? & MODE_BITS,
        user,
        user_name: name(header.username_bytes()),
        group,
        group_name: name(header.groupname_bytes()),
        mtime: header.mtime()?,
    })
}

/// Whether a path, as it stands, stays below whatever it is joined to.
fn is_inside(path: &[u8]) -> bool {
    let good = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && part.len() < 256;
    path.len() <= MAX_PATH && !path.contains(&0) && path.split(|byte| *byte == b'/').all(good)
}

fn check_tree(all: &[LocatedEntry]) -> Result<(), IncludeError> {
    let mut is_folder = HashMap::with_capacity(all.len());
    for LocatedEntry { entry, .. } in all {
        let folder = entry.kind == CapturedKind::Folder;
        if is_folder.insert(entry.path.as_path(), folder).is_some() {
            return Err(refuse(&entry.path, "comes twice"));
        }
    }
    for LocatedEntry { entry, .. } in all {
        let mut above = entry.path.ancestors().skip(1);
        if above.any(|path| is_folder.get(path) == Some(&false)) {
            return Err(refuse(&entry.path, "lies below what is no folder"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
