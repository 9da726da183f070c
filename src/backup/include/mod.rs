//! Files from outside the data directory (`backup.include`), captured beside a backup.
//!
//! ```text
//! scan ──► tar ──► frames ──► fan-out ──► one upload a region
//! ```
//! It happens before the server is asked for anything, so that a backup that would break a limit
//! costs nothing. The object lies in the backup's own folder: without `backup.json`, which names it
//! with its hash, it counts as little as a pack does (invariant I3).

mod read;
mod scan;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::PathBuf;

use tokio::sync::mpsc;

use super::BackupError;
use super::fanout::Fanout;
use crate::accounts::Accounts;
use crate::repo::{
    BackupLabel, ContainerWriter, ContentKey, FRAME_SIZE, Frame, INCLUDE_MAX_BYTES,
    INCLUDE_MAX_ENTRIES, Included, StoredObject, compress_frame, include_key,
};
use crate::store::{Region, StoreError};
use read::{Tally, open, write_archive};
use scan::scan;

/// Frames between the disk and the uploads.
const QUEUE: usize = 4;
/// Files that are noted by name; of the others, how many there are.
const MAX_NOTES: usize = 1000;

/// Why nothing can be captured at all.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// There is too much.
    #[error(
        "the paths of backup.include hold more than {}: {what}; name what is needed, one by one",
        limit_text(*.bytes)
    )]
    Limit {
        /// Which limit: bytes, or entries.
        bytes: bool,
        /// Where it was reached.
        what: String,
    },
    /// The system, or nobody takes the archive any more.
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn limit_text(bytes: bool) -> String {
    match bytes {
        true => format!("{} MiB", INCLUDE_MAX_BYTES >> 20),
        false => format!("{INCLUDE_MAX_ENTRIES} files, folders and links"),
    }
}

/// What is captured, with its limits.
#[derive(Clone, Copy, Debug)]
struct Limits {
    bytes: u64,
    entries: usize,
}

/// A bounded list of what went wrong.
#[derive(Debug, Default)]
struct Notes {
    texts: Vec<String>,
    more: usize,
}

impl Notes {
    fn push(&mut self, path: &std::path::Path, what: impl std::fmt::Display) {
        match self.texts.len() < MAX_NOTES {
            true => self.texts.push(format!("{}: {what}", path.display())),
            false => self.more += 1,
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.texts.push(format!("and {} more", self.more));
        }
        self.texts
    }
}

/// What was captured, and which regions have it.
pub(super) struct Captured {
    /// The object; `None` if nothing was asked for.
    pub(super) included: Option<Included>,
    /// What could not be captured, and why.
    pub(super) failures: Vec<String>,
    stored: Vec<Result<(), StoreError>>,
}

impl Captured {
    /// Which regions have this and the rest of the backup.
    pub(super) fn and(self, rest: Vec<Result<(), StoreError>>) -> Vec<Result<(), StoreError>> {
        self.stored.into_iter().zip(rest).map(|(mine, rest)| mine.and(rest)).collect()
    }
}

/// Captures the paths into every region.
///
/// # Errors
/// When there is more than the limits allow, or no region takes it.
pub(super) async fn capture(
    paths: &[PathBuf],
    regions: &[Region],
    label: &BackupLabel,
    key: &ContentKey,
    level: i32,
) -> Result<Captured, BackupError> {
    if paths.is_empty() {
        let stored = regions.iter().map(|_| Ok(())).collect();
        return Ok(Captured { included: None, failures: Vec::new(), stored });
    }
    let limits = Limits { bytes: INCLUDE_MAX_BYTES, entries: INCLUDE_MAX_ENTRIES };
    let (sender, frames) = mpsc::channel(QUEUE);
    let wanted = paths.to_vec();
    let reading = tokio::task::spawn_blocking(move || -> Result<Tally, CaptureError> {
        let found = scan(&wanted, limits)?;
        let frames = FrameWriter { raw: Vec::new(), level, frames: sender };
        let (frames, tally) = write_archive(found, frames, limits, &Accounts::read())?;
        frames.finish()?;
        Ok(tally)
    });
    let (object, stored) = store(frames, regions, label, key).await;
    if stored.iter().all(Result::is_err) {
        return Err(BackupError::NoRegion(stored.into_iter().filter_map(Result::err).collect()));
    }
    let tally = reading.await.map_err(io::Error::other)??;
    let failures = tally.failures.finish();
    for failure in &failures {
        tracing::warn!("not captured as a whole: {failure}");
    }
    let skipped = tally.skipped.finish();
    for special in &skipped {
        tracing::info!("left out: {special}");
    }
    let paths = paths.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    let included = Included { paths, files: tally.files, bytes: tally.bytes, skipped, object };
    Ok(Captured { included: Some(included), failures, stored })
}

/// What would be captured now.
#[derive(Debug)]
pub struct Survey {
    /// Files that can be read.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What cannot be captured, and why.
    pub failures: Vec<String>,
}

/// Looks at what would be captured, by whoever runs this, without reading it.
///
/// # Errors
/// When there is more than the limits allow.
pub fn survey(paths: &[PathBuf]) -> Result<Survey, CaptureError> {
    let limits = Limits { bytes: INCLUDE_MAX_BYTES, entries: INCLUDE_MAX_ENTRIES };
    let scan::Found { entries, mut failures, .. } = scan(paths, limits)?;
    let (mut files, mut bytes) = (0, 0);
    for (path, _) in entries.iter().filter(|(_, metadata)| metadata.is_file()) {
        match open(path) {
            Ok((_, metadata)) => {
                files += 1;
                bytes += metadata.len();
            }
            Err(error) => failures.push(path, error),
        }
    }
    Ok(Survey { files, bytes, failures: failures.finish() })
}

/// Writes the object into every region as its frames come. It ends early, and appears nowhere, when
/// the frames end without the last one.
async fn store(
    mut frames: mpsc::Receiver<Option<Frame>>,
    regions: &[Region],
    label: &BackupLabel,
    key: &ContentKey,
) -> (StoredObject, Vec<Result<(), StoreError>>) {
    let mut fanout: Option<Fanout> = None;
    let mut writer = ContainerWriter::default();
    let mut hasher = key.hasher();
    let mut size = 0;
    while let Some(frame) = frames.recv().await {
        // The first frame comes only when no limit is broken.
        let mut current = match fanout.take() {
            Some(fanout) => fanout,
            None => {
                let mut fanout = Fanout::new(regions);
                fanout.begin(&include_key(label)).await;
                fanout
            }
        };
        let bytes = match &frame {
            Some(frame) => {
                writer.push(frame);
                frame.stored.clone()
            }
            None => {
                let metadata = format!("{{\"backup\":\"{label}\"}}");
                std::mem::take(&mut writer).finish(metadata.as_bytes())
            }
        };
        size += bytes.len() as u64;
        hasher.update(&bytes);
        current.write(&bytes).await;
        if frame.is_none() {
            current.end().await;
        }
        let alive = current.is_alive();
        fanout = Some(current);
        if !alive {
            break;
        }
    }
    drop(frames);
    let stored = match fanout {
        Some(fanout) => fanout.finish().await,
        None => regions.iter().map(|_| Ok(())).collect(),
    };
    (StoredObject { size, hash: hasher.finish() }, stored)
}

/// Cuts what is written into frames and compresses them.
struct FrameWriter {
    raw: Vec<u8>,
    level: i32,
    frames: mpsc::Sender<Option<Frame>>,
}

impl FrameWriter {
    fn send(&mut self) -> io::Result<()> {
        let frame = compress_frame(&self.raw, self.level)?;
        self.raw.clear();
        self.hand_over(Some(frame))
    }

    fn hand_over(&self, frame: Option<Frame>) -> io::Result<()> {
        let gone = |_| io::Error::other("no region takes the captured files");
        self.frames.blocking_send(frame).map_err(gone)
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.raw.is_empty() {
            self.send()?;
        }
        self.hand_over(None)
    }
}

impl Write for FrameWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(FRAME_SIZE - self.raw.len());
        self.raw.extend_from_slice(&bytes[..taken]);
        if self.raw.len() == FRAME_SIZE {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
