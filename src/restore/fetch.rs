//! Brings the files of a backup to disk: parallel ranged reads, each frame verified before it is
//! written, a bad or missing range read from the next region.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};

use super::RestoreError;
use super::directory::make_private;
use crate::backup::Progress;
use crate::repo::{
    ContentKey, Extent, FileIndex, FileKind, PackEntry, PackFrame, decompress_frame, pack_key,
};
use crate::store::{Region, Regions, StoreError};

/// The most stored bytes that one request reads.
const REQUEST_SIZE: u64 = 8 << 20;
/// Frames that nobody wants are read along up to this size rather than asking twice.
const SKIP_SIZE: u64 = 256 << 10;

/// What writing a file takes.
const WRITABLE: u32 = 0o600;

/// A run of bytes to write.
#[derive(Clone, Copy, Debug)]
struct Write {
    file: u32,
    file_offset: u64,
    frame: u32,
    frame_offset: u32,
    length: u32,
}

/// One ranged read and what to do with it.
#[derive(Debug)]
struct Job {
    pack: u32,
    first_frame: u32,
    last_frame: u32,
    /// Offset of the first frame in the pack.
    offset: u64,
    length: u64,
    writes: Vec<Write>,
}

/// What is shared by all jobs.
pub(super) struct Fetch {
    pub(super) regions: Regions,
    pub(super) key: ContentKey,
    pub(super) folder: PathBuf,
    pub(super) index: FileIndex,
    pub(super) jobs_at_once: usize,
    pub(super) progress: Arc<Progress>,
}

impl Fetch {
    /// Writes all files that `wanted` accepts, by path. Folders must be there.
    ///
    /// # Errors
    /// When no region can give a range, or the disk takes it not.
    pub(super) async fn run(
        self: &Arc<Self>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), RestoreError> {
        let jobs = self.plan(&wanted);
        let this = self.clone();
        futures_util::stream::iter(jobs)
            .map(|job| {
                let this = this.clone();
                async move { this.job(job).await }
            })
            .buffer_unordered(self.jobs_at_once)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(())
    }

    /// Makes all folders, and files at their full length: with the right mode from the start.
    pub(super) fn prepare(&self, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        for file in &self.index.files {
            if !wanted(&file.path) {
                continue;
            }
            let path = self.folder.join(&file.path);
            match &file.kind {
                FileKind::Directory => make_private(&path, file.mode.max(0o700))?,
                FileKind::File { size, .. } => {
                    if let Some(parent) = path.parent()
                        && !parent.is_dir()
                    {
                        make_private(parent, 0o700)?;
                    }
                    create(&path, file.mode | WRITABLE)?.set_len(*size)?;
                }
            }
        }
        Ok(())
    }

    /// Gives the files their modes that this program's own writing would not have allowed.
    pub(super) fn set_modes(&self, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        let files = self.index.files.iter().filter(|file| wanted(&file.path));
        for file in files.filter(|file| file.kind != FileKind::Directory) {
            if file.mode & WRITABLE != WRITABLE {
                let path = self.folder.join(&file.path);
                fs::set_permissions(path, fs::Permissions::from_mode(file.mode))?;
            }
        }
        Ok(())
    }

    /// Groups what is wanted by pack and frame, and neighbouring frames into one request.
    fn plan(&self, wanted: &impl Fn(&str) -> bool) -> Vec<Job> {
        let mut by_frame: BTreeMap<(u32, u32), Vec<Write>> = BTreeMap::new();
        for (number, file) in self.index.files.iter().enumerate() {
            let FileKind::File { extents, .. } = &file.kind else { continue };
            if !wanted(&file.path) {
                continue;
            }
            let mut file_offset = 0;
            for extent in extents {
                if let Extent::Stored { pack, frame, offset, length } = *extent {
                    let file = number as u32;
                    let write = Write { file, file_offset, frame, frame_offset: offset, length };
                    by_frame.entry((pack, frame)).or_default().push(write);
                }
                file_offset += extent.length();
            }
        }
        let offsets: Vec<Vec<u64>> = self.index.packs.iter().map(frame_offsets).collect();
        let mut jobs: Vec<Job> = Vec::new();
        for ((pack, frame), writes) in by_frame {
            let offset = offsets[pack as usize][frame as usize];
            let stored = self.index.packs[pack as usize].frames[frame as usize].stored_size;
            let end = offset + u64::from(stored);
            match jobs.last_mut() {
                Some(job)
                    if job.pack == pack
                        && end - job.offset <= REQUEST_SIZE
                        && offset - (job.offset + job.length) <= SKIP_SIZE =>
                {
                    job.last_frame = frame;
                    job.length = end - job.offset;
                    job.writes.extend(writes);
                }
                _ => jobs.push(Job {
                    pack,
                    first_frame: frame,
                    last_frame: frame,
                    offset,
                    length: u64::from(stored),
                    writes,
                }),
            }
        }
        jobs
    }

    async fn job(self: Arc<Self>, job: Job) -> Result<(), RestoreError> {
        let pack = &self.index.packs[job.pack as usize];
        let object = pack_key(&pack.label, pack.number);
        let job = Arc::new(job);
        let this = self.clone();
        self.regions
            .read(|region| {
                let (this, job, object) = (this.clone(), job.clone(), object.clone());
                async move { this.read_and_write(&region, &object, job).await }
            })
            .await?
            .map_err(RestoreError::Io)
    }

    /// Reads from one region. The outer error asks for the next region; the inner one is the
    /// disk's.
    async fn read_and_write(
        self: Arc<Self>,
        region: &Region,
        object: &str,
        job: Arc<Job>,
    ) -> Result<io::Result<()>, StoreError> {
        let bytes = region.get_range(object, job.offset..job.offset + job.length).await?;
        let this = self.clone();
        let work = tokio::task::spawn_blocking(move || this.decode_and_write(&bytes, &job));
        match work.await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(problem)) => Err(region.damaged(object, problem)),
            Err(error) => Ok(Err(io::Error::other(error))),
        }
    }

    /// The outer error is damage.
    fn decode_and_write(&self, bytes: &Bytes, job: &Job) -> Result<io::Result<()>, String> {
        let pack = &self.index.packs[job.pack as usize];
        let mut offset = 0;
        let mut writes = job.writes.iter().peekable();
        for number in job.first_frame..=job.last_frame {
            let frame = &pack.frames[number as usize];
            let stored = &bytes[offset..offset + frame.stored_size as usize];
            offset += frame.stored_size as usize;
            if writes.peek().is_none_or(|write| write.frame != number) {
                continue;
            }
            let raw = self.open_frame(stored, frame, number)?;
            while let Some(write) = writes.next_if(|write| write.frame == number) {
                let from = write.frame_offset as usize;
                let part = &raw[from..from + write.length as usize];
                if let Err(error) = self.write(write, part) {
                    return Ok(Err(error));
                }
                self.progress.add(u64::from(write.length));
            }
        }
        Ok(Ok(()))
    }

    fn open_frame(&self, stored: &[u8], frame: &PackFrame, number: u32) -> Result<Vec<u8>, String> {
        let raw = decompress_frame(stored, frame.raw_size)
            .map_err(|error| format!("frame {number}: {error}"))?;
        if self.key.hash(&raw).short() != frame.hash {
            return Err(format!("frame {number} does not have the hash that files.idx names"));
        }
        Ok(raw)
    }

    fn write(&self, write: &Write, bytes: &[u8]) -> io::Result<()> {
        let file = &self.index.files[write.file as usize];
        let path = self.folder.join(&file.path);
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let handle = OpenOptions::new().write(true).open(&path).map_err(named)?;
        handle.write_all_at(bytes, write.file_offset).map_err(named)
    }
}

fn frame_offsets(pack: &PackEntry) -> Vec<u64> {
    let mut offset = 0;
    let next = |frame: &PackFrame| {
        let start = offset;
        offset += u64::from(frame.stored_size);
        start
    };
    pack.frames.iter().map(next).collect()
}

fn create(path: &Path, mode: u32) -> io::Result<fs::File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
