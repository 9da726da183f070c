//! Brings the files of a backup to disk: parallel ranged reads, each frame verified before it is
//! written, a bad, missing or slow range read from another region.
//!
//! Where files are there already (`--delta`, or a restore that was interrupted), a frame is put
//! together from them first; if it has the hash that the index names, nothing is read or written.
//! A crash leaves files that are partly right, which the next comparison finds out.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use rustix::fs::Advice;
use tokio::sync::{OnceCell, Semaphore};

use super::RestoreError;
use super::compare::{covers, differing_blocks, make_zero, same_as_frame, write_if_different};
use super::directory::make_private;
use super::frames::{Request, Wanted, Write, group, requests};
use crate::backup::Progress;
use crate::repo::{
    BlockHashes, ContentKey, Extent, FileEntry, FileIndex, FileKind, decompress_frame_into,
    pack_key,
};
use crate::store::{Regions, StoreError, read_block_hashes};

/// What writing a file takes.
const WRITABLE: u32 = 0o600;
/// Stored bytes that are asked for and not yet written, whatever the number of reads at once.
const BUDGET_KIB: usize = 256 << 10;
/// Runs from this size on are sent to the disk at once; the rest waits for the sync at the end.
const SEND_SIZE: u64 = 256 << 10;
/// Packs whose block hashes are held at once; each takes about a thousandth of what it holds.
const HELD_HASHES: usize = 16;

/// The block hashes of a pack, once they were read.
type HeldHashes = Arc<OnceCell<Arc<BlockHashes>>>;

/// What is shared by all requests.
pub(super) struct Fetch {
    regions: Regions,
    key: ContentKey,
    pub(super) folder: PathBuf,
    pub(super) index: FileIndex,
    at_once: usize,
    /// Files may be there already: compare before reading.
    compares: bool,
    progress: Arc<Progress>,
    budget: Semaphore,
    fetched: AtomicU64,
    kept: AtomicU64,
    /// The hashes of the packs that were looked at last.
    block_hashes: Mutex<VecDeque<(u32, HeldHashes)>>,
}

impl Fetch {
    pub(super) fn new(
        regions: Regions,
        key: ContentKey,
        folder: PathBuf,
        index: FileIndex,
        at_once: usize,
        progress: Arc<Progress>,
    ) -> Fetch {
        Fetch {
            regions,
            key,
            folder,
            index,
            at_once,
            compares: false,
            progress,
            budget: Semaphore::new(BUDGET_KIB),
            fetched: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            block_hashes: Mutex::default(),
        }
    }

    /// Looks at what is there before reading.
    pub(super) fn comparing(mut self, compares: bool) -> Fetch {
        self.compares = compares;
        self
    }

    /// Stored bytes that were read.
    pub(super) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Bytes of files that were right already.
    pub(super) fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// Writes all files that `wanted` accepts, by path. They must be prepared.
    ///
    /// # Errors
    /// When no region can give a range, or the disk takes it not.
    pub(super) async fn run(
        self: &Arc<Self>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), RestoreError> {
        let this = self.clone();
        futures_util::stream::iter(requests(&self.index, &wanted))
            .map(|request| this.clone().bring(request))
            .buffer_unordered(self.at_once)
            .try_for_each(|()| std::future::ready(Ok(())))
            .await
    }

    /// Makes all folders, and the files that no single write makes, at their full length: files of
    /// one extent are made when their content has come. With the right mode from the start.
    pub(super) fn prepare(&self, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        let mut known_parent = PathBuf::new();
        for file in self.index.files.iter().filter(|file| wanted(&file.path)) {
            let path = self.folder.join(&file.path);
            let FileKind::File { size, extents, .. } = &file.kind else {
                make_private(&path, file.mode.max(0o700)).map_err(|error| named(&path, error))?;
                continue;
            };
            if let Some(parent) = path.parent().filter(|parent| *parent != known_parent) {
                if !parent.is_dir() {
                    make_private(parent, 0o700)?;
                }
                parent.clone_into(&mut known_parent);
            }
            if self.compares {
                self.prepare_known(&path, file, *size, extents)?;
            } else if !matches!(extents.as_slice(), [Extent::Stored { .. }]) {
                let handle = self.open(file)?;
                handle.set_len(*size).map_err(|error| named(&path, error))?;
            }
        }
        Ok(())
    }

    /// As [`Fetch::prepare`] for one file that may be there already.
    fn prepare_known(
        &self,
        path: &Path,
        file: &FileEntry,
        size: u64,
        extents: &[Extent],
    ) -> io::Result<()> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.permissions().mode() & WRITABLE != WRITABLE => {
                fs::set_permissions(path, fs::Permissions::from_mode(file.mode | WRITABLE))?;
            }
            _ => {}
        }
        let handle = self.open(file)?;
        if handle.metadata()?.len() != size {
            handle.set_len(size).map_err(|error| named(path, error))?;
        }
        let mut offset = 0;
        for extent in extents {
            if let Extent::Zeros { length } = extent {
                make_zero(&handle, offset, *length).map_err(|error| named(path, error))?;
            }
            offset += extent.length();
        }
        Ok(())
    }

    /// Gives the files their modes that the umask, this program's own writing or whoever made them
    /// would not have allowed.
    pub(super) fn set_modes(&self, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        let files = self.index.files.iter().filter(|file| wanted(&file.path));
        for file in files.filter(|file| file.kind != FileKind::Directory) {
            if self.compares || file.mode & 0o777 != WRITABLE {
                let path = self.folder.join(&file.path);
                fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))
                    .map_err(|error| named(&path, error))?;
            }
        }
        Ok(())
    }

    async fn bring(self: Arc<Self>, request: Request) -> Result<(), RestoreError> {
        let requests = match self.compares {
            false => vec![request],
            true => {
                let this = self.clone();
                let hashes = match request.frames.iter().all(covers) {
                    true => Arc::default(),
                    false => self.block_hashes(request.pack).await,
                };
                let differing =
                    tokio::task::spawn_blocking(move || this.differing(request, &hashes));
                differing.await.map_err(io::Error::other)??
            }
        };
        for request in requests {
            self.clone().read_and_write(Arc::new(request)).await?;
        }
        Ok(())
    }

    /// The hashes of a pack's blocks; none when they cannot be had: then nothing is known to be
    /// right.
    async fn block_hashes(&self, pack: u32) -> Arc<BlockHashes> {
        let held = {
            let mut held = self.block_hashes.lock().unwrap_or_else(PoisonError::into_inner);
            let place = held.iter().position(|(of, _)| *of == pack);
            let entry = place.and_then(|place| held.remove(place));
            let entry = entry.unwrap_or_else(|| (pack, Arc::default()));
            held.push_back(entry.clone());
            while held.len() > HELD_HASHES {
                held.pop_front();
            }
            entry.1
        };
        let read = || async {
            let pack = &self.index.packs[pack as usize];
            match read_block_hashes(&self.regions, pack).await {
                Ok(hashes) => Arc::new(hashes),
                Err(error) => {
                    tracing::debug!("frames of {} are read instead: {error}", pack.label);
                    Arc::default()
                }
            }
        };
        held.get_or_init(read).await.clone()
    }

    /// What of a request is not on disk already.
    fn differing(&self, request: Request, hashes: &BlockHashes) -> io::Result<Vec<Request>> {
        let mut files = Files::new(self);
        let mut content = Vec::new();
        let mut left = Vec::new();
        let Request { pack, frames } = request;
        for mut wanted in frames {
            let hash = self.index.packs[pack as usize].frames[wanted.frame as usize].hash;
            let mut read = |write: &Write, bytes: &mut [u8]| -> io::Result<()> {
                files.of(write)?.read_exact_at(bytes, write.file_offset)
            };
            let bytes = |wanted: &Wanted| -> u64 {
                wanted.writes.iter().map(|write| u64::from(write.length)).sum()
            };
            let all = bytes(&wanted);
            match covers(&wanted) {
                true if same_as_frame(&wanted, hash, &self.key, &mut content, &mut read)? => {
                    wanted.writes.clear();
                }
                true => {}
                false => {
                    let find = |offset| hashes.find(wanted.frame, offset);
                    wanted.writes =
                        differing_blocks(&wanted.writes, find, &self.key, &mut content, read)?;
                }
            }
            let kept = all - bytes(&wanted);
            self.kept.fetch_add(kept, Ordering::Relaxed);
            self.progress.add(kept);
            if !wanted.writes.is_empty() {
                left.push(wanted);
            }
        }
        Ok(group(pack, left))
    }

    async fn read_and_write(self: Arc<Self>, request: Arc<Request>) -> Result<(), RestoreError> {
        let pack = &self.index.packs[request.pack as usize];
        let object = &pack_key(&pack.label, pack.number);
        let range = request.offset()..request.offset() + request.length();
        let permits = (request.length() >> 10).clamp(1, BUDGET_KIB as u64) as u32;
        let _permit = self.budget.acquire_many(permits).await.map_err(io::Error::other)?;
        let (this, request) = (&self, &request);
        self.regions
            .read_soonest(
                |region| {
                    let range = range.clone();
                    async move { region.get_range(object, range).await }
                },
                |region, bytes: Bytes| {
                    let (this, request) = (this.clone(), request.clone());
                    async move {
                        this.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                        let work = move || this.decode_and_write(&bytes, &request);
                        match tokio::task::spawn_blocking(work).await {
                            Ok(Ok(outcome)) => Ok::<_, StoreError>(outcome),
                            Ok(Err(problem)) => Err(region.damaged(object, problem)),
                            Err(error) => Ok(Err(io::Error::other(error))),
                        }
                    }
                },
            )
            .await?
            .map_err(RestoreError::Io)
    }

    /// The outer error is damage, the inner one the disk's.
    fn decode_and_write(&self, bytes: &Bytes, request: &Request) -> Result<io::Result<()>, String> {
        let mut files = Files::new(self);
        let mut raw = Vec::new();
        for wanted in &request.frames {
            let from = (wanted.offset - request.offset()) as usize;
            let stored = &bytes[from..from + wanted.stored_size as usize];
            self.open_frame(stored, request.pack, wanted, &mut raw)?;
            if let Err(error) = self.write_frame(&mut files, wanted, &raw) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    fn open_frame(
        &self,
        stored: &[u8],
        pack: u32,
        wanted: &Wanted,
        raw: &mut Vec<u8>,
    ) -> Result<(), String> {
        let frame = &self.index.packs[pack as usize].frames[wanted.frame as usize];
        let number = wanted.frame;
        decompress_frame_into(stored, frame.raw_size, raw)
            .map_err(|error| format!("frame {number}: {error}"))?;
        if self.key.hash(raw).short() != frame.hash {
            return Err(format!("frame {number} does not have the hash that files.idx names"));
        }
        Ok(())
    }

    fn write_frame(&self, files: &mut Files<'_>, wanted: &Wanted, raw: &[u8]) -> io::Result<()> {
        for write in &wanted.writes {
            let from = write.frame_offset as usize;
            let part = &raw[from..from + write.length as usize];
            let handle = files.of(write)?;
            let outcome = match self.compares {
                true => write_if_different(handle, part, write.file_offset),
                false => handle.write_all_at(part, write.file_offset),
            };
            outcome.map_err(|error| named(&self.path(write), error))?;
            files.wrote(write);
            self.progress.add(u64::from(write.length));
        }
        Ok(())
    }

    fn path(&self, write: &Write) -> PathBuf {
        self.folder.join(&self.index.files[write.file as usize].path)
    }

    fn open(&self, file: &FileEntry) -> io::Result<File> {
        let path = self.folder.join(&file.path);
        OpenOptions::new()
            .read(self.compares)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(file.mode | WRITABLE)
            .open(&path)
            .map_err(|error| named(&path, error))
    }
}

/// The file that is open: neighbouring blocks mostly belong to one.
struct Files<'a> {
    fetch: &'a Fetch,
    open: Option<(u32, File)>,
    /// What was written to it.
    written: Range<u64>,
}

impl Files<'_> {
    fn new(fetch: &Fetch) -> Files<'_> {
        Files { fetch, open: None, written: 0..0 }
    }

    fn of(&mut self, write: &Write) -> io::Result<&File> {
        if self.open.as_ref().is_some_and(|(number, _)| *number != write.file) {
            self.send();
        }
        let (_, handle) = match self.open.take() {
            Some(open) if open.0 == write.file => self.open.insert(open),
            _ => {
                let file = self.fetch.open(&self.fetch.index.files[write.file as usize])?;
                self.open.insert((write.file, file))
            }
        };
        Ok(handle)
    }

    fn wrote(&mut self, write: &Write) {
        let end = write.file_offset + u64::from(write.length);
        self.written = match self.written.is_empty() {
            true => write.file_offset..end,
            false => self.written.start.min(write.file_offset)..self.written.end.max(end),
        };
    }

    /// Lets the disk begin with what was written: the system would keep it in memory, and the sync
    /// at the end would have to wait for all of it.
    fn send(&mut self) {
        let written = std::mem::replace(&mut self.written, 0..0);
        if let Some((_, file)) = &self.open
            && written.end - written.start >= SEND_SIZE
        {
            let length = NonZero::new(written.end - written.start);
            // The kernel begins to write what it is told is not needed soon. If not: the sync does.
            let _ = rustix::fs::fadvise(file, written.start, length, Advice::DontNeed);
        }
    }
}

impl Drop for Files<'_> {
    fn drop(&mut self) {
        self.send();
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
