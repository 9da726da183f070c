//! The object format of WAL pieces, packs and indexes.
//!
//! ```text
//! frame*            each a complete zstd frame of at most 1 MiB raw, with zstd's content checksum
//! metadata          a zstd skippable frame: magic 0x184D2A5D, u32 length, then
//!                   u8 version (1), 3 zero bytes, u32 CRC-32C of the rest, JSON
//! seek table        a zstd skippable frame: magic 0x184D2A5E, u32 length, then for each frame
//!                   u32 stored size, u32 raw size, u32 checksum of the raw content; the same for
//!                   the metadata frame, with raw size and checksum 0; and last
//!                   u32 number of entries, u8 0x80, u32 magic 0x8F92EAB1
//! ```
//! All numbers are little-endian. The seek table is that of zstd's seekable format
//! (`contrib/seekable_format/zstd_seekable_compression_format.md` in zstd), so `zstd -d` and every
//! reader of that format understand the object; the checksum is the low half of XXH64, the same
//! four bytes that end each frame.
//!
//! A frame is the unit of compression, verification and ranged reading; encryption, once it comes,
//! seals frames in [`compress_frame`] and opens them in [`decompress_frame`] and nowhere else.

use std::cell::RefCell;
use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use zstd::zstd_safe::CParameter;

/// The most raw bytes in one frame.
pub const FRAME_SIZE: usize = 1 << 20;
/// How much of an object's end to read first: trailers are nearly always smaller.
pub const TRAILER_GUESS: u64 = 16 << 10;

const METADATA_MAGIC: u32 = 0x184D_2A5D;
const SEEK_TABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const METADATA_VERSION: u8 = 1;
/// Bit 7 of the seek table's descriptor: entries have checksums.
const WITH_CHECKSUMS: u8 = 0x80;
const ENTRY_SIZE: usize = 12;
const FOOTER_SIZE: usize = 9;
const SKIPPABLE_HEADER: usize = 8;
const METADATA_HEADER: usize = 8;
/// The most frames one object may have: 64 GiB of raw data, far above any object that is written.
pub(super) const MAX_FRAMES: usize = 1 << 16;

/// A compressed frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The stored bytes.
    pub stored: Bytes,
    /// Length of the raw content.
    pub raw_size: u32,
}

/// Where a frame lies in its object and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRange {
    /// Offset of its first stored byte in the object.
    pub offset: u64,
    /// How many bytes it takes there.
    pub stored_size: u32,
    /// Where its content begins in the raw content of the object.
    pub raw_offset: u64,
    /// Length of its raw content.
    pub raw_size: u32,
}

/// Why an object's bytes cannot be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    /// The object is no container, or was cut or overwritten.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// A version that this program does not know.
    #[error(
        "it was written by a newer pgkeep (container version {0}); use that version to read it"
    )]
    Newer(u8),
}

fn damaged(what: impl Into<String>) -> ContainerError {
    ContainerError::Damaged(what.into())
}

thread_local! {
    /// A compressor and what it was made for: making one takes as long as compressing some hundred
    /// KiB.
    static COMPRESSOR: RefCell<Option<((i32, Haste), zstd::bulk::Compressor<'static>)>> =
        const { RefCell::new(None) };
    /// A decompressor, for the same reason.
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

/// How much a level is asked to hurry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Haste {
    /// As zstd has it.
    Usual,
    /// At level 1, where speed is what is asked for, zstd is told to skip a byte where it finds no
    /// match and to keep its table in the first cache: a fifth faster on WAL, for 7 % more bytes.
    Hurry,
}

fn new_compressor(level: i32, haste: Haste) -> io::Result<zstd::bulk::Compressor<'static>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    compressor.include_checksum(true)?;
    if level == 1 && haste == Haste::Hurry {
        compressor.set_parameter(CParameter::TargetLength(1))?;
        compressor.set_parameter(CParameter::HashLog(13))?;
    }
    Ok(compressor)
}

/// Compresses one frame; `raw` is at most [`FRAME_SIZE`] long. Levels are zstd's, negative ones
/// included.
///
/// # Errors
/// Only when zstd cannot get memory.
pub fn compress_frame(raw: &[u8], level: i32) -> io::Result<Frame> {
    compress(raw, level, Haste::Usual)
}

/// As [`compress_frame`] for WAL, which must keep up with the server: level 1 is faster, for a few
/// more bytes.
///
/// # Errors
/// As [`compress_frame`].
pub fn compress_wal_frame(raw: &[u8], level: i32) -> io::Result<Frame> {
    compress(raw, level, Haste::Hurry)
}

fn compress(raw: &[u8], level: i32, haste: Haste) -> io::Result<Frame> {
    debug_assert!(raw.len() <= FRAME_SIZE);
    COMPRESSOR.with_borrow_mut(|kept| {
        let mut compressor = match kept.take() {
            Some((of, compressor)) if of == (level, haste) => compressor,
            _ => new_compressor(level, haste)?,
        };
        let mut stored = Vec::with_capacity(zstd::zstd_safe::compress_bound(raw.len()));
        compressor.compress_to_buffer(raw, &mut stored)?;
        // What is queued must not hold the room that the worst case would have taken.
        stored.shrink_to_fit();
        *kept = Some(((level, haste), compressor));
        Ok(Frame { stored: stored.into(), raw_size: raw.len() as u32 })
    })
}

/// Decompresses one frame and checks its checksum and its length.
///
/// # Errors
/// When the bytes are not exactly one frame of `raw_size` raw bytes.
pub fn decompress_frame(stored: &[u8], raw_size: u32) -> Result<Vec<u8>, ContainerError> {
    let mut raw = Vec::new();
    decompress_frame_into(stored, raw_size, &mut raw)?;
    Ok(raw)
}

/// As [`decompress_frame`], into memory that is there already: fresh memory costs as much as a
/// third of the decompression.
///
/// # Errors
/// As [`decompress_frame`]; what `raw` holds then means nothing.
pub fn decompress_frame_into(
    stored: &[u8],
    raw_size: u32,
    raw: &mut Vec<u8>,
) -> Result<(), ContainerError> {
    if raw_size as usize > FRAME_SIZE {
        return Err(damaged(format!("a frame of {raw_size} bytes is larger than any written")));
    }
    raw.clear();
    raw.reserve(raw_size as usize);
    let decompressed = DECOMPRESSOR.with_borrow_mut(|kept| {
        let decompressor = match kept.take() {
            Some(decompressor) => kept.insert(decompressor),
            None => kept.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress_to_buffer(stored, raw)
    });
    decompressed.map_err(|error| damaged(format!("a frame cannot be decompressed: {error}")))?;
    if raw.len() != raw_size as usize {
        return Err(damaged(format!("a frame holds {} bytes instead of {raw_size}", raw.len())));
    }
    Ok(())
}

/// Collects what the trailer of an object must say while its frames are written elsewhere.
#[derive(Debug, Default)]
pub struct ContainerWriter {
    table: BytesMut,
    frames: u32,
    stored: u64,
    raw: u64,
}

impl ContainerWriter {
    /// Notes the next frame.
    pub fn push(&mut self, frame: &Frame) {
        let stored = &frame.stored;
        self.table.put_u32_le(stored.len() as u32);
        self.table.put_u32_le(frame.raw_size);
        // zstd ends a frame with the checksum of its content.
        self.table.extend_from_slice(&stored[stored.len().saturating_sub(4)..]);
        self.frames += 1;
        self.stored += stored.len() as u64;
        self.raw += u64::from(frame.raw_size);
    }

    /// Number of frames so far.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Stored bytes so far, without the trailer.
    pub fn stored_size(&self) -> u64 {
        self.stored
    }

    /// Raw bytes so far.
    pub fn raw_size(&self) -> u64 {
        self.raw
    }

    /// The bytes that follow the last frame.
    pub fn finish(mut self, metadata: &[u8]) -> Bytes {
        let metadata_frame = SKIPPABLE_HEADER + METADATA_HEADER + metadata.len();
        self.table.put_u32_le(metadata_frame as u32);
        self.table.put_u64_le(0);
        let table_size = self.table.len() + FOOTER_SIZE;
        let size = metadata_frame + SKIPPABLE_HEADER + table_size;
        let mut trailer = BytesMut::with_capacity(size);
        trailer.put_u32_le(METADATA_MAGIC);
        trailer.put_u32_le((METADATA_HEADER + metadata.len()) as u32);
        trailer.put_u32_le(u32::from(METADATA_VERSION));
        trailer.put_u32_le(crc32c::crc32c(metadata));
        trailer.extend_from_slice(metadata);
        trailer.put_u32_le(SEEK_TABLE_MAGIC);
        trailer.put_u32_le(table_size as u32);
        trailer.extend_from_slice(&self.table);
        trailer.put_u32_le(self.frames + 1);
        trailer.put_u8(WITH_CHECKSUMS);
        trailer.put_u32_le(SEEKABLE_MAGIC);
        trailer.freeze()
    }
}

/// What the end of an object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The frames, in order.
    pub frames: Vec<FrameRange>,
    /// The metadata, JSON.
    pub metadata: Bytes,
}

/// The outcome of reading a trailer from the last bytes of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrailerRead {
    /// It is all there.
    Done(Trailer),
    /// Read this many bytes from the object's end and try again.
    NeedLast(u64),
}

impl Trailer {
    /// Reads the trailer from `tail`, the last bytes of an object of `object_size` bytes.
    ///
    /// # Errors
    /// When the object is no container or its trailer is damaged.
    pub fn read(tail: &Bytes, object_size: u64) -> Result<TrailerRead, ContainerError> {
        let minimum = 2 * SKIPPABLE_HEADER + METADATA_HEADER + FOOTER_SIZE;
        if object_size < minimum as u64 {
            return Err(damaged(format!("{object_size} bytes are too few")));
        }
        if tail.len() < FOOTER_SIZE {
            return Ok(TrailerRead::NeedLast(TRAILER_GUESS.min(object_size)));
        }
        let mut footer = &tail[tail.len() - FOOTER_SIZE..];
        let entries = footer.get_u32_le() as usize;
        let descriptor = footer.get_u8();
        if footer.get_u32_le() != SEEKABLE_MAGIC || descriptor != WITH_CHECKSUMS {
            return Err(damaged("its end is not that of an object of this format"));
        }
        if !(1..=MAX_FRAMES + 1).contains(&entries) {
            return Err(damaged(format!("{entries} frames are none, or more than any object has")));
        }
        let table_frame = SKIPPABLE_HEADER + entries * ENTRY_SIZE + FOOTER_SIZE;
        if table_frame as u64 > object_size {
            return Err(damaged("its seek table is longer than the object"));
        }
        if tail.len() < table_frame {
            // Metadata is about as long as the table of a large object: ask for both.
            let ask = (2 * table_frame) as u64 + TRAILER_GUESS;
            return Ok(TrailerRead::NeedLast(ask.min(object_size)));
        }
        let mut frames = read_seek_table(&tail[tail.len() - table_frame..], entries)?;
        let metadata = frames.pop().ok_or_else(|| damaged("it has no metadata"))?;
        let trailer_size = u64::from(metadata.stored_size) + table_frame as u64;
        let fits = metadata.raw_size == 0
            && metadata.stored_size as usize >= SKIPPABLE_HEADER + METADATA_HEADER
            && metadata.offset + trailer_size == object_size;
        if !fits {
            return Err(damaged("its seek table does not fit its size"));
        }
        if (tail.len() as u64) < trailer_size {
            return Ok(TrailerRead::NeedLast(trailer_size));
        }
        let metadata_start = tail.len() - trailer_size as usize;
        let metadata = tail.slice(metadata_start..tail.len() - table_frame);
        let metadata = read_metadata(metadata)?;
        Ok(TrailerRead::Done(Trailer { frames, metadata }))
    }

    /// Length of the raw content.
    pub fn raw_size(&self) -> u64 {
        self.frames.last().map_or(0, |last| last.raw_offset + u64::from(last.raw_size))
    }
}

fn read_seek_table(mut table: &[u8], entries: usize) -> Result<Vec<FrameRange>, ContainerError> {
    let length = entries * ENTRY_SIZE + FOOTER_SIZE;
    if table.get_u32_le() != SEEK_TABLE_MAGIC || table.get_u32_le() as usize != length {
        return Err(damaged("its seek table has a wrong header"));
    }
    let mut frames = Vec::with_capacity(entries);
    let (mut offset, mut raw_offset) = (0, 0);
    for _ in 0..entries {
        let (stored_size, raw_size) = (table.get_u32_le(), table.get_u32_le());
        table.advance(4);
        if raw_size as usize > FRAME_SIZE {
            return Err(damaged(format!("its seek table has a frame of {raw_size} bytes")));
        }
        frames.push(FrameRange { offset, stored_size, raw_offset, raw_size });
        offset += u64::from(stored_size);
        raw_offset += u64::from(raw_size);
    }
    Ok(frames)
}

fn read_metadata(mut frame: Bytes) -> Result<Bytes, ContainerError> {
    let magic = frame.get_u32_le();
    let length = frame.get_u32_le() as usize;
    if magic != METADATA_MAGIC || length != frame.len() || length < METADATA_HEADER {
        return Err(damaged("its metadata frame has a wrong header"));
    }
    let version = frame.get_u32_le();
    if version != u32::from(METADATA_VERSION) {
        return match u8::try_from(version) {
            Ok(newer) if newer > METADATA_VERSION => Err(ContainerError::Newer(newer)),
            _ => Err(damaged("its metadata frame has a wrong version")),
        };
    }
    let checksum = frame.get_u32_le();
    if crc32c::crc32c(&frame) != checksum {
        return Err(damaged("the checksum of its metadata is wrong"));
    }
    Ok(frame)
}

/// A whole object in memory.
#[derive(Clone, Debug)]
pub struct Container {
    bytes: Bytes,
    trailer: Trailer,
}

impl Container {
    /// Opens an object that was read as a whole.
    ///
    /// # Errors
    /// When its trailer is damaged. Frames are checked when they are decompressed.
    pub fn open(bytes: Bytes) -> Result<Container, ContainerError> {
        let size = bytes.len() as u64;
        match Trailer::read(&bytes, size)? {
            TrailerRead::Done(trailer) => Ok(Container { bytes, trailer }),
            TrailerRead::NeedLast(_) => Err(damaged("its trailer is cut off")),
        }
    }

    /// Its trailer.
    pub fn trailer(&self) -> &Trailer {
        &self.trailer
    }

    /// Decompresses one frame.
    ///
    /// # Errors
    /// When its bytes are damaged.
    pub fn frame(&self, index: usize) -> Result<Vec<u8>, ContainerError> {
        let range = self.trailer.frames.get(index).ok_or_else(|| damaged("no such frame"))?;
        let start = range.offset as usize;
        let stored = &self.bytes[start..start + range.stored_size as usize];
        decompress_frame(stored, range.raw_size)
    }

    /// Decompresses everything.
    ///
    /// # Errors
    /// When any frame is damaged.
    pub fn raw(&self) -> Result<Vec<u8>, ContainerError> {
        // What the table claims is believed frame by frame.
        let mut raw = Vec::new();
        for index in 0..self.trailer.frames.len() {
            raw.extend_from_slice(&self.frame(index)?);
        }
        Ok(raw)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn object(parts: &[&[u8]], metadata: &[u8]) -> Bytes {
        let mut writer = ContainerWriter::default();
        let mut bytes = BytesMut::new();
        for part in parts {
            let frame = compress_frame(part, 1).unwrap();
            writer.push(&frame);
            bytes.extend_from_slice(&frame.stored);
        }
        bytes.extend_from_slice(&writer.finish(metadata));
        bytes.freeze()
    }

    #[test]
    fn an_object_gives_back_its_frames_and_its_metadata() {
        let bytes = object(&[b"first", b"", &[7; 100_000]], b"{\"a\":1}");
        let container = Container::open(bytes.clone()).unwrap();
        assert_eq!(container.trailer().metadata, b"{\"a\":1}"[..]);
        assert_eq!(container.frame(0).unwrap(), b"first");
        assert_eq!(container.raw().unwrap().len(), 100_005);
        // The whole of it is a valid zstd stream.
        assert_eq!(zstd::decode_all(&bytes[..]).unwrap(), container.raw().unwrap());
    }

    #[test]
    fn a_trailer_is_read_from_the_end_with_few_requests() {
        let bytes = object(&vec![&[1_u8; 1000][..]; 3000], &[b' '; 30_000]);
        let size = bytes.len() as u64;
        let mut last = TRAILER_GUESS;
        let mut requests = 1;
        loop {
            let tail = bytes.slice((size - last) as usize..);
            match Trailer::read(&tail, size).unwrap() {
                TrailerRead::Done(trailer) => break assert_eq!(trailer.frames.len(), 3000),
                TrailerRead::NeedLast(more) => last = more,
            }
            requests += 1;
        }
        assert!(requests <= 2, "{requests} requests");
    }

    proptest! {
        // Invariant I5: bytes are verified before use.
        #[test]
        fn one_flipped_bit_anywhere_is_noticed(position in 0_usize..10_000, bit in 0_u8..8) {
            let parts: [&[u8]; 2] = [b"some content that matters", b"and some more of it"];
            let good = object(&parts, b"{\"metadata\":true}");
            let mut bad = good.to_vec();
            let position = position % bad.len();
            bad[position] ^= 1 << bit;
            let verdict = Container::open(Bytes::from(bad)).and_then(|container| {
                Ok((container.raw()?, container.trailer().metadata.clone()))
            });
            // A bit of the seek table's checksums, which only other readers use, may go unseen;
            // what is read is right all the same.
            if let Ok((raw, metadata)) = verdict {
                prop_assert_eq!(raw, parts.concat());
                prop_assert_eq!(&metadata[..], &b"{\"metadata\":true}"[..]);
            }
        }

        #[test]
        fn cut_objects_are_refused(length in 0_usize..100) {
            let good = object(&[b"content"], b"{}");
            let cut = good.slice(..length.min(good.len() - 1));
            prop_assert!(Container::open(cut).is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = Container::open(Bytes::from(bytes.clone())).map(|container| container.raw());
            let _ = Trailer::read(&Bytes::from(bytes), 1 << 40);
        }
    }
}
