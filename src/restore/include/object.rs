//! Reading `include.tar.zst`: the first time as a whole, against the hash in `backup.json`; then in
//! groups of frames, each against the hash that it had then. Either way a bad copy in one region is
//! reported, and the next region is read.

use std::io::{self, Read};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::repo::{
    BackupInfo, ContentHash, ContentKey, FRAME_SIZE, Included, LocatedEntry, StoredObject,
    TRAILER_GUESS, Trailer, TrailerRead, decompress_frame_into, include_key, read_captured,
};
use crate::store::{ReadError, Region, Regions, StoreError};

/// A read takes frames of at most so many stored bytes together,
const GROUP_BYTES: u64 = 4 << 20;
/// and at most so many frames.
const GROUP_FRAMES: usize = 64;
/// Above what zstd makes of a frame at worst.
const LARGEST_FRAME: u32 = 2 * FRAME_SIZE as u32;
/// Frames between the region and the disk.
const QUEUE: usize = 4;

/// A frame as it is stored, and the length of its content.
type StoredFrame = (Bytes, u32);

/// An object whose hash was right.
pub(super) struct Captured {
    pub(super) entries: Vec<LocatedEntry>,
    pub(super) groups: Groups,
}

#[cfg(test)]
impl Captured {
    /// Entries without an object behind them.
    pub(super) fn made_of(entries: Vec<LocatedEntry>) -> Captured {
        Captured { entries, groups: Groups { object: String::new(), groups: Vec::new() } }
    }
}

/// Neighbouring frames that are read together.
struct Group {
    offset: u64,
    /// Stored and raw sizes.
    frames: Vec<(u32, u32)>,
    hash: ContentHash,
}

impl Group {
    fn stored(&self) -> u64 {
        self.frames.iter().map(|(stored, _)| u64::from(*stored)).sum()
    }

    /// Hands over the frames; `false` when nobody takes them any more.
    async fn send(&self, mut bytes: Bytes, frames: &mpsc::Sender<StoredFrame>) -> bool {
        for (stored, raw) in &self.frames {
            let frame = bytes.split_to((*stored as usize).min(bytes.len()));
            if frames.send((frame, *raw)).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// All frames of an object.
pub(super) struct Groups {
    object: String,
    groups: Vec<Group>,
}

impl Groups {
    /// Reads all frames, from whichever region has them as they were.
    pub(super) async fn feed(
        self,
        regions: &Regions,
        key: &ContentKey,
        frames: mpsc::Sender<StoredFrame>,
    ) -> Result<(), ReadError> {
        let object = &self.object;
        for group in &self.groups {
            let range = group.offset..group.offset + group.stored();
            let read = regions.read(|region| {
                let range = range.clone();
                async move {
                    let bytes = region.get_range(object, range).await?;
                    match key.hash(&bytes) == group.hash {
                        true => Ok(bytes),
                        false => Err(region.damaged(object, "it is not what it was a moment ago")),
                    }
                }
            });
            if !group.send(read.await?, &frames).await {
                break;
            }
        }
        Ok(())
    }
}

/// Reads the object from the first region that has it whole.
pub(super) async fn find(
    regions: &Regions,
    info: &BackupInfo,
    included: &Included,
    key: &ContentKey,
) -> Result<Captured, ReadError> {
    let object = &include_key(&info.label);
    regions.read(|region| async move { read(&region, object, &included.object, key).await }).await
}

async fn read(
    region: &Region,
    object: &str,
    expected: &StoredObject,
    key: &ContentKey,
) -> Result<Captured, StoreError> {
    let trailer = read_trailer(region, object, expected.size).await?;
    let mut groups = group(&trailer);
    let (sender, reader) = FrameReader::channel();
    let parsing = {
        let key = key.clone();
        tokio::task::spawn_blocking(move || read_captured(reader, &key))
    };
    let mut hasher = key.hasher();
    let mut end = 0;
    let mut is_taken = true;
    for group in &mut groups {
        end = group.offset + group.stored();
        let bytes = region.get_range(object, group.offset..end).await?;
        hasher.update(&bytes);
        group.hash = key.hash(&bytes);
        is_taken = is_taken && group.send(bytes, &sender).await;
    }
    drop(sender);
    hasher.update(&region.get_range(object, end..expected.size).await?);
    let entries = parsing.await.map_err(|error| region.damaged(object, error.to_string()))?;
    if hasher.finish() != expected.hash {
        return Err(region.damaged(object, "it does not have the hash in backup.json"));
    }
    let entries = entries.map_err(|error| region.damaged(object, error.to_string()))?;
    Ok(Captured { entries, groups: Groups { object: object.to_owned(), groups } })
}

async fn read_trailer(region: &Region, object: &str, size: u64) -> Result<Trailer, StoreError> {
    let mut length = TRAILER_GUESS;
    loop {
        let (tail, found) = region.get_tail(object, length).await?;
        if found != size {
            let message = format!("it is {found} bytes long instead of {size}");
            return Err(region.damaged(object, message));
        }
        match Trailer::read(&tail, size) {
            Ok(TrailerRead::Done(trailer))
                if trailer.frames.iter().all(|frame| frame.stored_size <= LARGEST_FRAME) =>
            {
                return Ok(trailer);
            }
            Ok(TrailerRead::Done(_)) => {
                return Err(region.damaged(object, "it has a frame larger than any written"));
            }
            Ok(TrailerRead::NeedLast(more)) if more > length => length = more,
            Ok(TrailerRead::NeedLast(_)) => {
                return Err(region.damaged(object, "its trailer is cut off"));
            }
            Err(error) => return Err(region.damaged(object, error.to_string())),
        }
    }
}

fn group(trailer: &Trailer) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for frame in &trailer.frames {
        let sizes = (frame.stored_size, frame.raw_size);
        match groups.last_mut() {
            Some(group)
                if group.frames.len() < GROUP_FRAMES
                    && group.stored() + u64::from(frame.stored_size) <= GROUP_BYTES =>
            {
                group.frames.push(sizes);
            }
            _ => groups.push(Group {
                offset: frame.offset,
                frames: vec![sizes],
                hash: ContentHash([0; 32]),
            }),
        }
    }
    groups
}

/// The raw content of frames that come one after the other, for a thread that may wait.
pub(super) struct FrameReader {
    frames: mpsc::Receiver<StoredFrame>,
    raw: Vec<u8>,
    /// How much of `raw` was given away.
    given: usize,
    /// How much was given away in all.
    position: u64,
}

impl FrameReader {
    pub(super) fn channel() -> (mpsc::Sender<StoredFrame>, FrameReader) {
        let (sender, frames) = mpsc::channel(QUEUE);
        (sender, FrameReader { frames, raw: Vec::new(), given: 0, position: 0 })
    }

    /// Goes on to a place further on.
    pub(super) fn skip_to(&mut self, offset: u64) -> io::Result<()> {
        let skipped = offset.saturating_sub(self.position);
        let gone = io::copy(&mut self.by_ref().take(skipped), &mut io::sink())?;
        match gone == skipped && self.position == offset {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Read for FrameReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.given == self.raw.len() {
            let Some((stored, raw_size)) = self.frames.blocking_recv() else { return Ok(0) };
            self.given = 0;
            decompress_frame_into(&stored, raw_size, &mut self.raw).map_err(io::Error::other)?;
        }
        let count = into.len().min(self.raw.len() - self.given);
        into[..count].copy_from_slice(&self.raw[self.given..self.given + count]);
        self.given += count;
        self.position += count as u64;
        Ok(count)
    }
}
