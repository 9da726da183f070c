//! Which frames of which packs a restore needs, and in which requests they are read. Pure.

use std::collections::BTreeMap;

use crate::repo::{Extent, FileIndex, FileKind, PackEntry};

/// The most stored bytes that one request reads.
pub(super) const REQUEST_SIZE: u64 = 8 << 20;
/// The most raw bytes behind one request: well compressed content becomes small requests, of which
/// more run at once.
const REQUEST_RAW_SIZE: u64 = 32 << 20;
/// Frames that nobody wants are read along up to this size rather than asking twice.
const SKIP_SIZE: u64 = 256 << 10;

/// A run of bytes of a frame, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) file: u32,
    pub(super) file_offset: u64,
    pub(super) frame_offset: u32,
    pub(super) length: u32,
}

impl Write {
    /// Whether another goes on where this one ends, in the frame and in the file.
    pub(super) fn is_followed_by(&self, next: &Write) -> bool {
        self.file == next.file
            && self.file_offset + u64::from(self.length) == next.file_offset
            && self.frame_offset + self.length == next.frame_offset
    }
}

/// A frame that is needed, with all that is made of it, in the order of the frame's content.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) frame: u32,
    /// Offset of its first stored byte in the pack.
    pub(super) offset: u64,
    pub(super) stored_size: u32,
    pub(super) raw_size: u32,
    pub(super) writes: Vec<Write>,
}

impl Wanted {
    fn end(&self) -> u64 {
        self.offset + u64::from(self.stored_size)
    }
}

/// One ranged read: frames of one pack, in order, with nothing large that is not wanted between.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) pack: u32,
    pub(super) frames: Vec<Wanted>,
}

impl Request {
    /// Where the range begins.
    pub(super) fn offset(&self) -> u64 {
        self.frames.first().map_or(0, |first| first.offset)
    }

    /// How long it is.
    pub(super) fn length(&self) -> u64 {
        self.frames.last().map_or(0, |last| last.end() - self.offset())
    }
}

/// Everything that the files which `wanted` accepts by path are made of.
pub(super) fn requests(index: &FileIndex, wanted: &impl Fn(&str) -> bool) -> Vec<Request> {
    let mut by_frame: BTreeMap<(u32, u32), Vec<Write>> = BTreeMap::new();
    for (number, file) in index.files.iter().enumerate() {
        let FileKind::File { extents, .. } = &file.kind else { continue };
        if !wanted(&file.path) {
            continue;
        }
        let mut file_offset = 0;
        for extent in extents {
            if let Extent::Stored { pack, frame, offset, length } = *extent {
                let file = number as u32;
                let write = Write { file, file_offset, frame_offset: offset, length };
                by_frame.entry((pack, frame)).or_default().push(write);
            }
            file_offset += extent.length();
        }
    }
    let offsets: Vec<Vec<u64>> = index.packs.iter().map(frame_offsets).collect();
    let mut by_pack: BTreeMap<u32, Vec<Wanted>> = BTreeMap::new();
    for ((pack, frame), mut writes) in by_frame {
        writes.sort_unstable_by_key(|write| (write.frame_offset, write.file, write.file_offset));
        let entry = &index.packs[pack as usize].frames[frame as usize];
        by_pack.entry(pack).or_default().push(Wanted {
            frame,
            offset: offsets[pack as usize][frame as usize],
            stored_size: entry.stored_size,
            raw_size: entry.raw_size,
            writes,
        });
    }
    by_pack.into_iter().flat_map(|(pack, frames)| group(pack, frames)).collect()
}

/// Puts neighbouring frames into one request.
pub(super) fn group(pack: u32, frames: Vec<Wanted>) -> Vec<Request> {
    let mut requests: Vec<Request> = Vec::new();
    let mut raw = 0;
    for wanted in frames {
        raw += u64::from(wanted.raw_size);
        let joins = |request: &Request| {
            wanted.end() - request.offset() <= REQUEST_SIZE
                && wanted.offset - (request.offset() + request.length()) <= SKIP_SIZE
                && raw <= REQUEST_RAW_SIZE
        };
        match requests.last_mut() {
            Some(request) if joins(request) => request.frames.push(wanted),
            _ => {
                raw = u64::from(wanted.raw_size);
                requests.push(Request { pack, frames: vec![wanted] });
            }
        }
    }
    requests
}

fn frame_offsets(pack: &PackEntry) -> Vec<u64> {
    let mut offset = 0;
    let next = |frame: &crate::repo::PackFrame| {
        let start = offset;
        offset += u64::from(frame.stored_size);
        start
    };
    pack.frames.iter().map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(frame: u32, offset: u64, stored_size: u32, raw_size: u32) -> Wanted {
        Wanted { frame, offset, stored_size, raw_size, writes: Vec::new() }
    }

    #[test]
    fn neighbours_share_a_request_and_others_do_not() {
        let small = 100 << 10;
        let frames = vec![
            wanted(0, 0, small, 1 << 20),
            wanted(1, u64::from(small), small, 1 << 20),
            // Too far away.
            wanted(9, 4 << 20, small, 1 << 20),
            // Too much for one request.
            wanted(10, (4 << 20) + u64::from(small), 8 << 20, 1 << 20),
        ];
        let requests = group(3, frames);
        let shape: Vec<_> =
            requests.iter().map(|r| (r.pack, r.offset(), r.length(), r.frames.len())).collect();
        assert_eq!(
            shape,
            [
                (3, 0, 2 * u64::from(small), 2),
                (3, 4 << 20, u64::from(small), 1),
                (3, (4 << 20) + u64::from(small), 8 << 20, 1),
            ]
        );
    }

    #[test]
    fn well_compressed_content_is_not_one_request() {
        let frames = (0..100).map(|n| wanted(n, u64::from(n) * 50, 50, 1 << 20)).collect();
        let requests = group(0, frames);
        assert_eq!(requests.iter().map(|r| r.frames.len()).collect::<Vec<_>>(), [32, 32, 32, 4]);
    }
}
