//! The tar streams that BASE_BACKUP sends, parsed as they flow (`src/port/tar.c`).
//!
//! ustar: a header of 512 bytes (name at 0, mode at 100, size at 124, mtime at 136, checksum at
//! 148, type at 156), content padded to 512. Sizes are octal, or, from 8 GiB on, base-256 with the
//! first bit set. PostgreSQL sends files (`0`), directories (`5`) and links (`2`); names are at most
//! 99 bytes long. Two blocks of zeros end an archive, but 13 and 14 leave them out.

use bytes::Bytes;

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TarKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
}

/// The header of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// Its path in the archive, without `./` in front or `/` behind.
    pub path: String,
    /// What it is.
    pub kind: TarKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: u64,
    /// Length of its content.
    pub size: u64,
}

/// Something in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarEvent {
    /// An entry begins.
    Entry(TarEntry),
    /// The next bytes of its content.
    Data(Bytes),
}

/// Bytes that are no tar of PostgreSQL's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the server's tar stream is damaged: {0}")]
pub struct TarError(pub String);

/// A parser that is fed one archive in chunks of any size.
#[derive(Debug, Default)]
pub struct TarReader {
    header: Vec<u8>,
    content_left: u64,
    padding_left: u64,
}

impl TarReader {
    /// Takes the next event from the front of `chunk`, which is shortened; `None` when the chunk is
    /// used up.
    ///
    /// # Errors
    /// When a header is damaged or of a kind that PostgreSQL does not send.
    pub fn next(&mut self, chunk: &mut Bytes) -> Result<Option<TarEvent>, TarError> {
        while !chunk.is_empty() {
            if self.content_left > 0 {
                let take = self.content_left.min(chunk.len() as u64);
                self.content_left -= take;
                return Ok(Some(TarEvent::Data(chunk.split_to(take as usize))));
            }
            if self.padding_left > 0 {
                let take = self.padding_left.min(chunk.len() as u64);
                self.padding_left -= take;
                let _ = chunk.split_to(take as usize);
                continue;
            }
            let take = (BLOCK - self.header.len()).min(chunk.len());
            self.header.extend_from_slice(&chunk.split_to(take));
            if self.header.len() < BLOCK {
                return Ok(None);
            }
            let header = std::mem::take(&mut self.header);
            if header.iter().all(|byte| *byte == 0) {
                continue;
            }
            let entry = read_header(&header)?;
            self.content_left = entry.size;
            self.padding_left = (BLOCK as u64 - entry.size % BLOCK as u64) % BLOCK as u64;
            return Ok(Some(TarEvent::Entry(entry)));
        }
        Ok(None)
    }

    /// Checks that the archive did not end inside an entry.
    ///
    /// # Errors
    /// When it did.
    pub fn finish(&self) -> Result<(), TarError> {
        if self.content_left > 0 || self.padding_left > 0 || !self.header.is_empty() {
            return Err(TarError("it ends inside an entry".into()));
        }
        Ok(())
    }
}

fn read_header(header: &[u8]) -> Result<TarEntry, TarError> {
    let error = |what: &str| TarError(what.to_owned());
    let sum: u64 = header
        .iter()
        .enumerate()
        // The checksum itself counts as spaces.
        .map(|(index, byte)| if (148..156).contains(&index) { 32 } else { u64::from(*byte) })
        .sum();
    if number(&header[148..156]) != Some(sum) {
        return Err(error("a header has a wrong checksum"));
    }
    let name = header[..100].split(|byte| *byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name).map_err(|_| error("a name is not UTF-8"))?;
    let kind = match header[156] {
        b'0' | 0 => TarKind::File,
        b'5' => TarKind::Directory,
        b'2' => TarKind::Link,
        other => return Err(error(&format!("{name:?} is of the unknown type {other}"))),
    };
    let field = |range: std::ops::Range<usize>| {
        number(&header[range]).ok_or_else(|| error("a header has a number that is none"))
    };
    let size = match kind {
        TarKind::File => field(124..136)?,
        _ => 0,
    };
    let path = name.strip_prefix("./").unwrap_or(name).trim_end_matches('/').to_owned();
    let mode = field(100..108)? as u32 & 0o7777;
    Ok(TarEntry { path, kind, mode, mtime: field(136..148)?, size })
}

/// An octal number, or a big-endian one after a byte with the first bit set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let bytes = &field[1..];
        let (high, low) = bytes.split_at(bytes.len().saturating_sub(8));
        if high.iter().any(|byte| *byte != 0) {
            return None;
        }
        return Some(low.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let digits = std::str::from_utf8(field).ok()?;
    let digits = digits.trim_matches(|c: char| c == ' ' || c == '\0');
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(name: &str, kind: u8, size: &[u8]) -> Vec<u8> {
        let mut header = vec![0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000600\0");
        header[124..124 + size.len()].copy_from_slice(size);
        header[136..148].copy_from_slice(b"14521321360\0");
        header[156] = kind;
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    }

    fn archive() -> Vec<u8> {
        let mut tar = header("base/", b'5', b"00000000000 ");
        tar.extend(header("base/1/1259", b'0', b"00000001750 "));
        tar.extend([7; 1000]);
        tar.extend([0; 24]);
        tar.extend(header("./pg_wal/archive_status/", b'5', b""));
        tar.extend(header("empty", b'0', b"00000000000 "));
        tar.extend([0; 1024]);
        tar
    }

    fn read(chunks: impl Iterator<Item = Vec<u8>>) -> Result<(Vec<TarEntry>, Vec<u8>), TarError> {
        let mut reader = TarReader::default();
        let (mut entries, mut content) = (Vec::new(), Vec::new());
        for chunk in chunks {
            let mut chunk = Bytes::from(chunk);
            while let Some(event) = reader.next(&mut chunk)? {
                match event {
                    TarEvent::Entry(entry) => entries.push(entry),
                    TarEvent::Data(bytes) => content.extend_from_slice(&bytes),
                }
            }
        }
        reader.finish()?;
        Ok((entries, content))
    }

    #[test]
    fn torn_at_every_byte_the_archive_reads_the_same() {
        let whole = read([archive()].into_iter()).unwrap();
        assert_eq!(whole.0.len(), 4);
        assert_eq!(whole.0[1].path, "base/1/1259");
        assert_eq!(whole.0[1].size, 1000);
        assert_eq!(whole.0[2].path, "pg_wal/archive_status");
        assert_eq!(whole.1, [7; 1000]);
        for cut in 0..archive().len() {
            let (a, b) = (archive()[..cut].to_vec(), archive()[cut..].to_vec());
            assert_eq!(read([a, b].into_iter()).unwrap(), whole, "torn at {cut}");
        }
        assert_eq!(read(archive().chunks(1).map(<[u8]>::to_vec)).unwrap(), whole);
    }

    // 13 and 14 send no trailer.
    #[test]
    fn an_archive_may_end_without_zeros_but_not_inside_an_entry() {
        let tar = archive();
        assert!(read([tar[..tar.len() - 1024].to_vec()].into_iter()).is_ok());
        assert!(read([tar[..1500].to_vec()].into_iter()).is_err());
        assert!(read([tar[..100].to_vec()].into_iter()).is_err());
    }

    #[test]
    fn sizes_of_8_gib_and_more_are_read() {
        let mut size = vec![0x80];
        size.extend([0, 0, 0]);
        size.extend((9_u64 << 30).to_be_bytes());
        assert_eq!(read_header(&header("big", b'0', &size)).unwrap().size, 9 << 30);
    }

    proptest! {
        #[test]
        fn one_flipped_bit_in_a_header_is_noticed(position in 0_usize..512, bit in 0_u8..8) {
            let mut damaged = header("base/1/1259", b'0', b"00000001750 ");
            damaged[position] ^= 1 << bit;
            // The filler behind the checksum's digits does not matter.
            if !(154..156).contains(&position) {
                let same = read_header(&damaged) == read_header(&header("base/1/1259", b'0', b"00000001750 "));
                prop_assert!(read_header(&damaged).is_err() || same);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = read([bytes].into_iter());
        }
    }
}
