//! Finds single files in a `files.idx` without holding it as structures: of a million files only
//! the records' bytes and eight bytes each are in memory.

use bytes::Bytes;

use super::{
    FileEntry, FileIndexError, FileIndexSummary, FileKind, MORE, PackEntry, Record, check_file,
    damaged, take_pack, take_record,
};
use crate::repo::container::Container;
use crate::repo::varint::take_bytes;

/// A file index in which paths are looked up.
#[derive(Debug)]
pub struct FileLookup {
    packs: Vec<PackEntry>,
    /// The raw content of the frames with records of files.
    frames: Vec<Vec<u8>>,
    /// Where the record of each file begins: frame, offset in it. Sorted by path.
    begins: Vec<(u32, u32)>,
}

impl FileLookup {
    /// Reads the object.
    ///
    /// # Errors
    /// When a frame or a record is damaged. What a record says is checked when it is looked up.
    pub fn open(bytes: Bytes) -> Result<FileLookup, FileIndexError> {
        let container = Container::open(bytes)?;
        let summary = FileIndexSummary::of(&container)?;
        let mut lookup = FileLookup { packs: Vec::new(), frames: Vec::new(), begins: Vec::new() };
        for frame in 0..container.trailer().frames.len() {
            let raw = container.frame(frame)?;
            let mut rest = raw.as_slice();
            if frame < summary.pack_frames {
                while !rest.is_empty() {
                    let pack = take_pack(&mut rest).ok_or_else(|| damaged("a pack record"))?;
                    lookup.packs.push(pack);
                }
                continue;
            }
            let number = lookup.frames.len() as u32;
            while !rest.is_empty() {
                if rest.first() != Some(&MORE) {
                    lookup.begins.push((number, (raw.len() - rest.len()) as u32));
                }
                take_record(&mut rest)?;
            }
            lookup.frames.push(raw);
        }
        if lookup.packs.len() != summary.packs || lookup.begins.len() != summary.files {
            return Err(damaged("records are missing"));
        }
        Ok(lookup)
    }

    /// The packs that the files refer to.
    pub fn packs(&self) -> &[PackEntry] {
        &self.packs
    }

    /// The packs, when nothing is looked up any more.
    pub fn into_packs(self) -> Vec<PackEntry> {
        self.packs
    }

    /// Looks a path up.
    ///
    /// # Errors
    /// When its record makes no sense.
    pub fn find(&self, path: &str) -> Result<Option<FileEntry>, FileIndexError> {
        let compare = |begin: &(u32, u32)| self.path_at(*begin).cmp(&Some(path.as_bytes()));
        let Ok(record) = self.begins.binary_search_by(compare) else { return Ok(None) };
        let (place, offset) = self.begins[record];
        let place = place as usize;
        let mut rest = &self.frames[place][offset as usize..];
        let Record::File(mut file) = take_record(&mut rest)? else { return Ok(None) };
        if let FileKind::File { extents, .. } = &mut file.kind {
            let following = self.frames[place + 1..].iter().map(Vec::as_slice);
            for mut rest in std::iter::once(rest).chain(following) {
                while rest.first() == Some(&MORE) {
                    if let Record::More(more) = take_record(&mut rest)? {
                        extents.extend(more);
                    }
                }
                if !rest.is_empty() {
                    break;
                }
            }
        }
        check_file(&file, &self.packs)?;
        Ok(Some(file))
    }

    fn path_at(&self, (frame, offset): (u32, u32)) -> Option<&[u8]> {
        take_bytes(&mut self.frames.get(frame as usize)?.get(offset as usize + 1..)?)
    }
}
