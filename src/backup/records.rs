//! The files of a backup while it is taken: a compact record of each, in one piece of memory.

use std::io;

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// New: in a frame of this backup, counted through all its packs.
    Own { frame: u64, offset: u32, length: u32 },
    /// In one of the packs that the parent names.
    Older { pack: u32, frame: u32, offset: u32, length: u32 },
    /// Zeros, which are not stored.
    Zeros { length: u64 },
}

impl Part {
    pub(super) fn length(&self) -> u64 {
        match *self {
            Part::Own { length, .. } | Part::Older { length, .. } => u64::from(length),
            Part::Zeros { length } => length,
        }
    }

    /// Takes `next` in, where it lies right behind.
    pub(super) fn join(&mut self, next: &Part) -> bool {
        match (self, *next) {
            (Part::Zeros { length }, Part::Zeros { length: more }) => *length += more,
            (
                Part::Own { frame, offset, length },
                Part::Own { frame: same, offset: at, length: more },
            ) if *frame == same && *offset + *length == at => *length += more,
            (
                Part::Older { pack, frame, offset, length },
                Part::Older { pack: of, frame: same, offset: at, length: more },
            ) if *pack == of && *frame == same && *offset + *length == at => *length += more,
            _ => return false,
        }
        true
    }
}

/// A path of the backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) path: String,
    pub(super) mode: u32,
    /// Modification time, size and content; `None` for a directory.
    pub(super) file: Option<(u64, u64, Vec<Part>)>,
}

/// All records, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Records {
    bytes: Vec<u8>,
    begins: Vec<usize>,
}

impl Records {
    pub(super) fn push(&mut self, record: &Record) {
        self.begins.push(self.bytes.len());
        let buffer = &mut self.bytes;
        put(buffer, record.path.len() as u64);
        buffer.extend_from_slice(record.path.as_bytes());
        put(buffer, u64::from(record.mode));
        let Some((mtime, size, parts)) = &record.file else {
            put(buffer, 0);
            return;
        };
        put(buffer, 1 + parts.len() as u64);
        put(buffer, *mtime);
        put(buffer, *size);
        for part in parts {
            match *part {
                Part::Zeros { length } => [0, length, 0, 0],
                Part::Own { frame, offset, length } => {
                    [1, frame, u64::from(offset), u64::from(length)]
                }
                Part::Older { pack, frame, offset, length } => {
                    [2 + u64::from(pack), frame.into(), offset.into(), length.into()]
                }
            }
            .into_iter()
            .for_each(|number| put(buffer, number));
        }
    }

    /// Names the parent's packs that are used, each perhaps often.
    pub(super) fn older_packs(&self, mut each: impl FnMut(u32)) {
        for begin in &self.begins {
            let parts = self.read(*begin).file.map(|(_, _, parts)| parts);
            for part in parts.unwrap_or_default() {
                if let Part::Older { pack, .. } = part {
                    each(pack);
                }
            }
        }
    }

    /// Gives all records by path.
    pub(super) fn sorted(
        &mut self,
        mut each: impl FnMut(Record) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut begins = std::mem::take(&mut self.begins);
        begins.sort_unstable_by(|a, b| self.path(*a).cmp(self.path(*b)));
        begins.iter().try_for_each(|begin| each(self.read(*begin)))
    }

    fn path(&self, begin: usize) -> &[u8] {
        let mut rest = &self.bytes[begin..];
        let length = take(&mut rest) as usize;
        &rest[..length]
    }

    fn read(&self, begin: usize) -> Record {
        let mut rest = &self.bytes[begin..];
        let length = take(&mut rest) as usize;
        let (path, mut rest) = rest.split_at(length);
        let path = String::from_utf8_lossy(path).into_owned();
        let mode = take(&mut rest) as u32;
        let count = take(&mut rest);
        if count == 0 {
            return Record { path, mode, file: None };
        }
        let (mtime, size) = (take(&mut rest), take(&mut rest));
        let parts = (1..count).map(|_| {
            let [kind, a, b, c] = std::array::from_fn(|_| take(&mut rest));
            match kind {
                0 => Part::Zeros { length: a },
                1 => Part::Own { frame: a, offset: b as u32, length: c as u32 },
                _ => Part::Older {
                    pack: (kind - 2) as u32,
                    frame: a as u32,
                    offset: b as u32,
                    length: c as u32,
                },
            }
        });
        Record { path, mode, file: Some((mtime, size, parts.collect())) }
    }
}

/// Numbers of variable length, seven bits a byte, lowest first.
fn put(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push(value as u8 | 0x80);
        value >>= 7;
    }
    buffer.push(value as u8);
}

/// Takes what [`put`] wrote; this module reads only its own bytes.
fn take(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    while let Some((byte, rest)) = bytes.split_first() {
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn part() -> impl Strategy<Value = Part> {
        prop_oneof![
            any::<u64>().prop_map(|length| Part::Zeros { length }),
            (any::<u64>(), any::<u32>(), any::<u32>())
                .prop_map(|(frame, offset, length)| Part::Own { frame, offset, length }),
            (0..u32::MAX - 2, any::<u32>(), any::<u32>(), any::<u32>()).prop_map(
                |(pack, frame, offset, length)| Part::Older { pack, frame, offset, length }
            ),
        ]
    }

    fn record() -> impl Strategy<Value = Record> {
        let file = (any::<u64>(), any::<u64>(), prop::collection::vec(part(), 0..20));
        ("[a-z/]{0,20}", any::<u32>(), prop::option::of(file))
            .prop_map(|(path, mode, file)| Record { path, mode, file })
    }

    proptest! {
        #[test]
        fn records_come_back_sorted(wanted in prop::collection::vec(record(), 0..20)) {
            let mut records = Records::default();
            wanted.iter().for_each(|record| records.push(record));
            let mut found = Vec::new();
            records.sorted(|record| { found.push(record); Ok(()) }).unwrap();
            prop_assert!(found.is_sorted_by_key(|record| record.path.clone()));
            let key = |record: &Record| format!("{record:?}");
            let (mut found, mut wanted) = (found, wanted);
            found.sort_by_key(key);
            wanted.sort_by_key(key);
            prop_assert_eq!(found, wanted);
        }
    }
}
