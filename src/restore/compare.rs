//! Whether what is on disk is what a backup has.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::frames::{Wanted, Write};
use crate::repo::{Block, ContentKey, ShortHash};

/// Bytes that are looked at together.
const CHUNK: usize = 1 << 20;

/// Puts the content of a frame together from what `read` gives for each write, and says whether it
/// has the frame's hash. A frame that is not covered as a whole (it also holds what this backup
/// does not need) cannot be judged so, and counts as different.
pub(super) fn same_as_frame(
    wanted: &Wanted,
    hash: ShortHash,
    key: &ContentKey,
    content: &mut Vec<u8>,
    mut read: impl FnMut(&Write, &mut [u8]) -> io::Result<()>,
) -> io::Result<bool> {
    if !covers(wanted) {
        return Ok(false);
    }
    let mut covered = 0;
    let mut again = Vec::new();
    content.resize(wanted.raw_size as usize, 0);
    for write in &wanted.writes {
        let (from, to) = range(write);
        if from == covered {
            read(write, &mut content[from..to])?;
            covered = to;
            continue;
        }
        // The same content in another place.
        again.resize(to - from, 0);
        read(write, &mut again)?;
        if again != content[from..to] {
            return Ok(false);
        }
    }
    Ok(key.hash(content).short() == hash)
}

/// The parts of a frame's writes that are not on disk already, judged block by block.
pub(super) fn differing_blocks(
    writes: &[Write],
    find: impl Fn(u32) -> Option<Block>,
    key: &ContentKey,
    content: &mut Vec<u8>,
    mut read: impl FnMut(&Write, &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<Write>> {
    let mut left: Vec<Write> = Vec::new();
    for write in writes {
        content.resize(write.length as usize, 0);
        read(write, content)?;
        let mut done = 0;
        while done < write.length {
            let known = find(write.frame_offset + done).filter(|b| b.length <= write.length - done);
            let length = known.map_or(write.length - done, |block| block.length.max(1));
            let bytes = &content[done as usize..(done + length) as usize];
            if known.is_none_or(|block| block.hash != key.hash(bytes).short()) {
                let part = Write {
                    file_offset: write.file_offset + u64::from(done),
                    frame_offset: write.frame_offset + done,
                    length,
                    ..*write
                };
                match left.last_mut() {
                    Some(last) if last.is_followed_by(&part) => last.length += length,
                    _ => left.push(part),
                }
            }
            done += length;
        }
    }
    Ok(left)
}

fn range(write: &Write) -> (usize, usize) {
    let from = write.frame_offset as usize;
    (from, from + write.length as usize)
}

/// Whether the writes, which are sorted, tile the frame; more than once is allowed.
pub(super) fn covers(wanted: &Wanted) -> bool {
    let mut covered = 0;
    for write in &wanted.writes {
        let (from, to) = range(write);
        if from == covered {
            covered = to;
        } else if to > covered {
            return false;
        }
    }
    covered == wanted.raw_size as usize
}

/// Writes what is not there yet: pages that are right stay clean.
pub(super) fn write_if_different(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut there = vec![0; bytes.len()];
    match file.read_exact_at(&mut there, offset) {
        Ok(()) if there == bytes => Ok(()),
        _ => file.write_all_at(bytes, offset),
    }
}

/// Makes a range of a file zeros where it is not.
pub(super) fn make_zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let zeros = vec![0; CHUNK.min(usize::try_from(length).unwrap_or(CHUNK))];
    let mut done = 0;
    while done < length {
        let now = zeros.len().min(usize::try_from(length - done).unwrap_or(CHUNK));
        write_if_different(file, &zeros[..now], offset + done)?;
        done += now as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(file: u32, frame_offset: u32, length: u32) -> Write {
        Write { file, file_offset: 0, frame_offset, length }
    }

    fn judge(raw_size: u32, writes: Vec<Write>, files: &[&[u8]], frame: &[u8]) -> bool {
        let key = ContentKey::for_system(1);
        let wanted = Wanted { frame: 0, offset: 0, stored_size: 0, raw_size, writes };
        let read = |write: &Write, bytes: &mut [u8]| {
            bytes.copy_from_slice(&files[write.file as usize][..bytes.len()]);
            Ok(())
        };
        same_as_frame(&wanted, key.hash(frame).short(), &key, &mut Vec::new(), read).unwrap()
    }

    #[test]
    fn a_frame_shared_by_files_is_judged_by_all_of_them() {
        let writes = || vec![write(0, 0, 3), write(1, 3, 2)];
        assert!(judge(5, writes(), &[b"abc", b"de"], b"abcde"));
        assert!(!judge(5, writes(), &[b"abc", b"dX"], b"abcde"));
    }

    #[test]
    fn a_frame_of_which_a_part_is_not_wanted_cannot_be_judged() {
        assert!(!judge(5, vec![write(0, 0, 3)], &[b"abc"], b"abcde"));
        assert!(!judge(5, vec![write(0, 2, 3)], &[b"cde"], b"abcde"));
    }

    #[test]
    fn of_a_frame_that_is_not_wanted_as_a_whole_only_blocks_that_differ_are_left() {
        let key = ContentKey::for_system(1);
        let frame = b"aabbccdd";
        let find = |offset: u32| {
            let from = offset as usize;
            let hash = key.hash(&frame[from..from + 2]).short();
            from.is_multiple_of(2).then_some(Block { length: 2, hash })
        };
        let judge = |writes: &[Write], on_disk: &[u8]| {
            let read = |write: &Write, bytes: &mut [u8]| {
                bytes.copy_from_slice(&on_disk[write.file_offset as usize..][..bytes.len()]);
                Ok(())
            };
            differing_blocks(writes, find, &key, &mut Vec::new(), read).unwrap()
        };
        let at = |frame_offset, file_offset, length| Write {
            file: 0,
            file_offset,
            frame_offset,
            length,
        };
        assert_eq!(judge(&[at(2, 0, 6)], b"bbccdd"), []);
        assert_eq!(judge(&[at(2, 0, 6)], b"bbXcdX"), [at(4, 2, 4)]);
        assert_eq!(judge(&[at(2, 0, 6)], b"bXccdX"), [at(2, 0, 2), at(6, 4, 2)]);
        assert_eq!(judge(&[at(0, 4, 2), at(4, 0, 4)], b"ccddaa"), []);
        // What no hash is known of is left.
        assert_eq!(judge(&[at(3, 0, 4)], b"bccd"), [at(3, 0, 4)]);
    }

    #[test]
    fn content_that_goes_to_two_places_must_be_right_in_both() {
        let writes = || vec![write(0, 0, 3), write(1, 0, 3), write(2, 1, 2)];
        assert!(judge(3, writes(), &[b"abc", b"abc", b"bc"], b"abc"));
        assert!(!judge(3, writes(), &[b"abc", b"abX", b"bc"], b"abc"));
        assert!(!judge(3, writes(), &[b"abc", b"abc", b"bX"], b"abc"));
    }
}
