//! `files.idx`: where each byte of each file of a backup lies.
//!
//! A container whose frames hold records, none of which crosses a frame. Numbers are varints
//! unless a size is given; texts are a length and bytes.
//! ```text
//! pack record   label, number, stored size, 32-byte hash of the stored object,
//!               count, then for each frame: stored size, raw size, 8-byte hash of the raw content
//! file record   u8 kind: 0 directory, 1 file, 2 more extents of the file before
//!               path, mode                     (kinds 0 and 1)
//!               mtime in seconds, size         (kind 1)
//!               count, then for each extent: pack (0: zeros, else 1 + place of its record),
//!               frame, offset in the frame, length   (kinds 1 and 2; zeros have only a length)
//! ```
//! Pack records fill the first `pack_frames` frames, file records the rest, sorted by path. The
//! metadata (JSON) gives those counts and the first path of each file frame, so that one file is
//! found with one ranged read. Packs of older backups may be named: that is what makes an
//! incremental restore like a full.

mod lookup;
mod write;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::lookup::FileLookup;
pub use self::write::FileIndexWriter;
use super::container::{Container, ContainerError};
use super::varint::{take, take_bytes};
use super::{BackupLabel, ContentHash, FORMAT_VERSION, ShortHash};

/// The kind of a record with more extents of the file before.
const MORE: u8 = 2;
/// PostgreSQL's own limit on a path (`MAXPGPATH`), with room.
const MAX_PATH: usize = 4096;

/// One frame of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackFrame {
    /// Bytes it takes in the pack.
    pub stored_size: u32,
    /// Length of its raw content.
    pub raw_size: u32,
    /// Hash of its raw content.
    pub hash: ShortHash,
}

/// One pack, of this backup or of an older one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackEntry {
    /// The backup in whose folder it lies.
    pub label: BackupLabel,
    /// Its number there.
    pub number: u32,
    /// Length of the object.
    pub stored_size: u64,
    /// Hash of the object as stored.
    pub hash: ContentHash,
    /// Its frames, in order.
    pub frames: Vec<PackFrame>,
}

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes that lie in a pack.
    Stored {
        /// Index into the packs.
        pack: u32,
        /// The frame in the pack.
        frame: u32,
        /// Where in the frame's raw content.
        offset: u32,
        /// How many bytes.
        length: u32,
    },
    /// Zeros that are not stored.
    Zeros {
        /// How many.
        length: u64,
    },
}

impl Extent {
    /// How many bytes of the file it is.
    pub fn length(&self) -> u64 {
        match self {
            Extent::Stored { length, .. } => u64::from(*length),
            Extent::Zeros { length } => *length,
        }
    }
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file with its content.
    File {
        /// Modification time, seconds since 1970.
        mtime: u64,
        /// Length in bytes; the extents' lengths add up to it.
        size: u64,
        /// The content, in order.
        extents: Vec<Extent>,
    },
}

/// One path of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Relative to the data directory, with `/`. Tablespaces lie under `pg_tblspc/<oid>/`.
    pub path: String,
    /// Unix permission bits.
    pub mode: u32,
    /// What it is.
    pub kind: FileKind,
}

/// A file index in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileIndex {
    /// All packs that the files refer to.
    pub packs: Vec<PackEntry>,
    /// All paths, sorted.
    pub files: Vec<FileEntry>,
}

/// The metadata of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIndexSummary {
    /// Format version.
    pub format: u32,
    /// Frames that hold pack records.
    pub pack_frames: usize,
    /// Number of packs.
    pub packs: usize,
    /// Number of paths.
    pub files: usize,
    /// The first path of each frame that holds file records.
    pub first_paths: Vec<String>,
}

impl FileIndexSummary {
    fn of(container: &Container) -> Result<FileIndexSummary, FileIndexError> {
        let summary: FileIndexSummary = serde_json::from_slice(&container.trailer().metadata)
            .map_err(|error| damaged(format!("its metadata cannot be read: {error}")))?;
        if summary.format > FORMAT_VERSION {
            return Err(ContainerError::Newer(summary.format.min(255) as u8).into());
        }
        Ok(summary)
    }
}

/// Why a file index cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileIndexError {
    /// The object that holds it is damaged.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Its frames are whole but what they say makes no sense.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

fn damaged(what: impl Into<String>) -> FileIndexError {
    FileIndexError::Damaged(what.into())
}

impl FileIndex {
    /// The object's bytes. Sorts the files.
    ///
    /// # Errors
    /// Only when zstd cannot get memory.
    pub fn encode(&mut self) -> std::io::Result<Bytes> {
        self.files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let mut writer = FileIndexWriter::new(&self.packs)?;
        for file in &self.files {
            writer.push(file)?;
        }
        writer.finish()
    }

    /// Reads the object.
    ///
    /// # Errors
    /// When anything in it is damaged: a frame, a record, an extent that points nowhere.
    pub fn decode(bytes: Bytes) -> Result<FileIndex, FileIndexError> {
        let container = Container::open(bytes)?;
        let summary = FileIndexSummary::of(&container)?;
        let mut index = FileIndex::default();
        for frame in 0..container.trailer().frames.len() {
            let raw = container.frame(frame)?;
            let mut rest = raw.as_slice();
            while !rest.is_empty() {
                if frame < summary.pack_frames {
                    let pack = take_pack(&mut rest).ok_or_else(|| damaged("a pack record"))?;
                    index.packs.push(pack);
                } else {
                    index.take_file(&mut rest)?;
                }
            }
        }
        if index.packs.len() != summary.packs || index.files.len() != summary.files {
            return Err(damaged("records are missing"));
        }
        index.check()?;
        Ok(index)
    }

    /// Reads only which packs the object names: their records come first, and the files, of which
    /// there may be millions, are not held.
    ///
    /// # Errors
    /// When the frames that name the packs are damaged.
    pub fn decode_packs(bytes: Bytes) -> Result<Vec<PackEntry>, FileIndexError> {
        let container = Container::open(bytes)?;
        let summary = FileIndexSummary::of(&container)?;
        let frames = container.trailer().frames.len().min(summary.pack_frames);
        let mut packs = Vec::new();
        for frame in 0..frames {
            let raw = container.frame(frame)?;
            let mut rest = raw.as_slice();
            while !rest.is_empty() {
                packs.push(take_pack(&mut rest).ok_or_else(|| damaged("a pack record"))?);
            }
        }
        if packs.len() != summary.packs {
            return Err(damaged("records are missing"));
        }
        Ok(packs)
    }

    fn take_file(&mut self, rest: &mut &[u8]) -> Result<(), FileIndexError> {
        match take_record(rest)? {
            Record::File(file) => self.files.push(file),
            Record::More(more) => {
                let Some(FileEntry { kind: FileKind::File { extents, .. }, .. }) =
                    self.files.last_mut()
                else {
                    return Err(damaged("more extents of no file"));
                };
                extents.extend(more);
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), FileIndexError> {
        self.files.iter().try_for_each(|file| check_file(file, &self.packs))
    }
}

/// Checks that the path stays inside the data directory, and every extent inside its frame.
fn check_file(file: &FileEntry, packs: &[PackEntry]) -> Result<(), FileIndexError> {
    let inside = !file.path.is_empty()
        && file.path.len() <= MAX_PATH
        && !file.path.contains('\0')
        && file.path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if !inside {
        return Err(damaged(format!("the path {:?} leads outside", file.path)));
    }
    let FileKind::File { size, extents, .. } = &file.kind else { return Ok(()) };
    let mut total = 0_u64;
    for extent in extents {
        total = total.saturating_add(extent.length());
        let Extent::Stored { pack, frame, offset, length } = *extent else { continue };
        let frame = packs
            .get(pack as usize)
            .and_then(|pack| pack.frames.get(frame as usize))
            .ok_or_else(|| damaged(format!("{} lies in no pack", file.path)))?;
        if u64::from(offset) + u64::from(length) > u64::from(frame.raw_size) {
            return Err(damaged(format!("{} lies outside its frame", file.path)));
        }
    }
    if total != *size {
        return Err(damaged(format!("{} has {total} bytes of {size}", file.path)));
    }
    Ok(())
}

/// One record of files.
enum Record {
    File(FileEntry),
    /// More extents of the file before.
    More(Vec<Extent>),
}

fn take_record(rest: &mut &[u8]) -> Result<Record, FileIndexError> {
    let cut = || damaged("a file record is cut off");
    let (kind, after) = rest.split_first().ok_or_else(cut)?;
    *rest = after;
    let mut extents = Vec::new();
    if *kind == MORE {
        take_extents(rest, &mut extents).ok_or_else(cut)?;
        return Ok(Record::More(extents));
    }
    let path = take_bytes(rest).ok_or_else(cut)?;
    let path = String::from_utf8(path.to_vec()).map_err(|_| damaged("a path is not UTF-8"))?;
    let mode = take(rest).ok_or_else(cut)? as u32 & 0o7777;
    let kind = match *kind {
        0 => FileKind::Directory,
        1 => {
            let mtime = take(rest).ok_or_else(cut)?;
            let size = take(rest).ok_or_else(cut)?;
            take_extents(rest, &mut extents).ok_or_else(cut)?;
            FileKind::File { mtime, size, extents }
        }
        other => return Err(damaged(format!("a record of the unknown kind {other}"))),
    };
    Ok(Record::File(FileEntry { path, mode, kind }))
}

fn take_pack(rest: &mut &[u8]) -> Option<PackEntry> {
    let label = std::str::from_utf8(take_bytes(rest)?).ok()?.parse().ok()?;
    let number = u32::try_from(take(rest)?).ok()?;
    let stored_size = take(rest)?;
    let hash = ContentHash(*rest.first_chunk()?);
    *rest = &rest[32..];
    let count = usize::try_from(take(rest)?).ok()?;
    let mut frames = Vec::with_capacity(count.min(rest.len() / 10));
    for _ in 0..count {
        let stored_size = u32::try_from(take(rest)?).ok()?;
        let raw_size = u32::try_from(take(rest)?).ok()?;
        let hash = ShortHash(u64::from_be_bytes(*rest.first_chunk()?));
        *rest = &rest[8..];
        frames.push(PackFrame { stored_size, raw_size, hash });
    }
    Some(PackEntry { label, number, stored_size, hash, frames })
}

fn take_extents(rest: &mut &[u8], extents: &mut Vec<Extent>) -> Option<()> {
    let count = take(rest)?;
    for _ in 0..count {
        let pack = take(rest)?;
        let number = |value: Option<u64>| value.and_then(|value| u32::try_from(value).ok());
        extents.push(match pack.checked_sub(1) {
            None => Extent::Zeros { length: take(rest)? },
            Some(pack) => Extent::Stored {
                pack: u32::try_from(pack).ok()?,
                frame: number(take(rest))?,
                offset: number(take(rest))?,
                length: number(take(rest))?,
            },
        });
    }
    Some(())
}

#[cfg(test)]
mod tests;
