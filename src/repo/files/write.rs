//! Writes `files.idx`: packs first, then files in the order of their paths, held only as
//! compressed bytes.

use bytes::{Bytes, BytesMut};

use super::{Extent, FileEntry, FileIndexSummary, FileKind, MORE, PackEntry};
use crate::repo::FORMAT_VERSION;
use crate::repo::container::{ContainerWriter, FRAME_SIZE, compress_frame};
use crate::repo::varint::{put, put_bytes};

/// Extents in one record: more go into records of kind 2.
const EXTENTS_PER_RECORD: usize = 8192;
const LEVEL: i32 = 3;

/// A file index being written.
pub struct FileIndexWriter {
    output: Output,
    summary: FileIndexSummary,
}

impl FileIndexWriter {
    /// Writes the packs that the files will refer to.
    ///
    /// # Errors
    /// Only when zstd cannot get memory.
    pub fn new(packs: &[PackEntry]) -> std::io::Result<FileIndexWriter> {
        let mut output = Output::default();
        for pack in packs {
            output.record(|buffer| put_pack(buffer, pack))?;
        }
        output.end_frame()?;
        let summary = FileIndexSummary {
            format: FORMAT_VERSION,
            pack_frames: output.writer.frames() as usize,
            packs: packs.len(),
            files: 0,
            first_paths: Vec::new(),
        };
        Ok(FileIndexWriter { output, summary })
    }

    /// Writes the next path; they must come sorted.
    ///
    /// # Errors
    /// Only when zstd cannot get memory.
    pub fn push(&mut self, file: &FileEntry) -> std::io::Result<()> {
        let extents = match &file.kind {
            FileKind::Directory => &[][..],
            FileKind::File { extents, .. } => extents,
        };
        let (first, more) = extents.split_at(extents.len().min(EXTENTS_PER_RECORD));
        if self.output.record(|buffer| put_file(buffer, file, first))? {
            self.summary.first_paths.push(file.path.clone());
        }
        for chunk in more.chunks(EXTENTS_PER_RECORD) {
            let begins_frame = self.output.record(|buffer| {
                buffer.push(MORE);
                put_extents(buffer, chunk);
            })?;
            if begins_frame {
                self.summary.first_paths.push(file.path.clone());
            }
        }
        self.summary.files += 1;
        Ok(())
    }

    /// The object's bytes.
    ///
    /// # Errors
    /// Only when zstd cannot get memory.
    pub fn finish(mut self) -> std::io::Result<Bytes> {
        self.output.end_frame()?;
        let summary = serde_json::to_vec(&self.summary)?;
        self.output.bytes.extend_from_slice(&self.output.writer.finish(&summary));
        Ok(self.output.bytes.freeze())
    }
}

/// Frames being written.
#[derive(Default)]
struct Output {
    bytes: BytesMut,
    frame: Vec<u8>,
    writer: ContainerWriter,
}

impl Output {
    /// Appends one record; `true` when it is the first of its frame.
    fn record(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> std::io::Result<bool> {
        let before = self.frame.len();
        write(&mut self.frame);
        if self.frame.len() > FRAME_SIZE && before > 0 {
            let record = self.frame.split_off(before);
            self.end_frame()?;
            self.frame = record;
            return Ok(true);
        }
        Ok(before == 0)
    }

    fn end_frame(&mut self) -> std::io::Result<()> {
        if !self.frame.is_empty() {
            let frame = compress_frame(&self.frame, LEVEL)?;
            self.writer.push(&frame);
            self.bytes.extend_from_slice(&frame.stored);
            self.frame.clear();
        }
        Ok(())
    }
}

fn put_pack(buffer: &mut Vec<u8>, pack: &PackEntry) {
    put_bytes(buffer, pack.label.as_str().as_bytes());
    put(buffer, u64::from(pack.number));
    put(buffer, pack.stored_size);
    buffer.extend_from_slice(&pack.hash.0);
    put(buffer, pack.frames.len() as u64);
    for frame in &pack.frames {
        put(buffer, u64::from(frame.stored_size));
        put(buffer, u64::from(frame.raw_size));
        buffer.extend_from_slice(&frame.hash.0.to_be_bytes());
    }
}

fn put_file(buffer: &mut Vec<u8>, file: &FileEntry, extents: &[Extent]) {
    buffer.push(u8::from(file.kind != FileKind::Directory));
    put_bytes(buffer, file.path.as_bytes());
    put(buffer, u64::from(file.mode));
    if let FileKind::File { mtime, size, .. } = &file.kind {
        put(buffer, *mtime);
        put(buffer, *size);
        put_extents(buffer, extents);
    }
}

fn put_extents(buffer: &mut Vec<u8>, extents: &[Extent]) {
    put(buffer, extents.len() as u64);
    for extent in extents {
        match *extent {
            Extent::Zeros { length } => {
                put(buffer, 0);
                put(buffer, length);
            }
            Extent::Stored { pack, frame, offset, length } => {
                put(buffer, u64::from(pack) + 1);
                put(buffer, u64::from(frame));
                put(buffer, u64::from(offset));
                put(buffer, u64::from(length));
            }
        }
    }
}
