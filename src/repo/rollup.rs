//! The roll-up of a finished log folder: the metadata of all its pieces in one object, so that a
//! search over 100,000 segments reads 400 objects and not as many trailers.
//!
//! A container ([`super::container`]) whose raw content has one line of JSON for each piece, in the
//! order of their names:
//! ```text
//! {"piece":"<file name>","metadata":{...}}\n
//! ```
//! The content decides the name and the bytes, so two archivers that have seen the same pieces
//! write the same object. A roll-up repeats what pieces say: one that is missing or damaged costs
//! time and nothing else, and a piece that it does not name may be there all the same.

use std::collections::BTreeMap;
use std::io;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::{
    Container, ContainerError, ContainerWriter, ContentHash, ContentKey, FORMAT_VERSION,
    FRAME_SIZE, PieceMeta, PieceName, compress_frame, index_key,
};
use crate::wal::TimelineId;

/// The most raw bytes of a roll-up: a hundred times what 256 ordinary pieces say.
const RAW_LIMIT: u64 = 128 << 20;
/// zstd's level, part of what makes the bytes the same everywhere.
const LEVEL: i32 = 3;

/// An object to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RollUp {
    /// Its key in the lineage.
    pub key: String,
    /// Its bytes.
    pub bytes: Bytes,
}

/// Why there is no roll-up, or none to be believed.
#[derive(Debug, thiserror::Error)]
pub enum RollUpError {
    /// The pieces to roll up are not those of one folder.
    #[error("{0} does not belong into the roll-up")]
    Misplaced(PieceName),
    /// There are no pieces.
    #[error("a roll-up of no pieces is of no use")]
    Empty,
    /// The pieces say too much for one object.
    #[error("the metadata of the pieces are larger than {RAW_LIMIT} bytes")]
    TooLarge,
    /// zstd could not get memory, or a piece cannot be put into JSON.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The object is no container, or was cut or overwritten.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The object is whole but does not say what a roll-up says.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// What the metadata frame of a roll-up says, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RollUpMeta {
    format: u32,
    system_identifier: String,
    timeline: TimelineId,
    /// The middle part of the segments' names, eight hex digits.
    log: String,
    pieces: usize,
    hash: ContentHash,
}

/// One line.
#[derive(Serialize, Deserialize)]
struct Line {
    piece: String,
    metadata: PieceMeta,
}

/// Rolls up the pieces of one folder, in any order.
///
/// # Errors
/// When they are none, too many, or not of one folder.
pub fn build_roll_up(
    key: &ContentKey,
    pieces: &[(PieceName, PieceMeta)],
) -> Result<RollUp, RollUpError> {
    let (first, first_meta) = pieces.first().ok_or(RollUpError::Empty)?;
    let (timeline, log) = (first.segment.timeline, first.segment.log);
    let mut lines: BTreeMap<PieceName, Vec<u8>> = BTreeMap::new();
    for (name, metadata) in pieces {
        let placed = name.segment.timeline == timeline
            && name.segment.log == log
            && metadata.system_identifier == first_meta.system_identifier
            && fits(name, metadata);
        if !placed {
            return Err(RollUpError::Misplaced(*name));
        }
        let line = Line { piece: name.to_string(), metadata: metadata.clone() };
        let mut line = serde_json::to_vec(&line).map_err(io::Error::from)?;
        line.push(b'\n');
        // Of two regions' words about one piece, the choice must not depend on their order.
        let kept = lines.entry(*name).or_insert_with(|| line.clone());
        if line < *kept {
            *kept = line;
        }
    }
    let raw = lines.values().flatten().copied().collect::<Vec<u8>>();
    if raw.len() as u64 > RAW_LIMIT {
        return Err(RollUpError::TooLarge);
    }
    let metadata = RollUpMeta {
        format: FORMAT_VERSION,
        system_identifier: first_meta.system_identifier.clone(),
        timeline,
        log: format!("{log:08X}"),
        pieces: lines.len(),
        hash: key.hash(&raw),
    };
    let mut writer = ContainerWriter::default();
    let mut bytes = BytesMut::new();
    for part in raw.chunks(FRAME_SIZE) {
        let frame = compress_frame(part, LEVEL)?;
        writer.push(&frame);
        bytes.extend_from_slice(&frame.stored);
    }
    let trailer = serde_json::to_vec(&metadata).map_err(io::Error::from)?;
    bytes.extend_from_slice(&writer.finish(&trailer));
    let key = index_key(timeline, log, metadata.hash.short());
    Ok(RollUp { key, bytes: bytes.freeze() })
}

/// Reads the object that is stored under `object_key`: pieces in the order of their names.
///
/// # Errors
/// When anything in it is not what was written: its hash, its counts, or its place.
pub fn read_roll_up(
    bytes: Bytes,
    object_key: &str,
    key: &ContentKey,
) -> Result<Vec<(PieceName, PieceMeta)>, RollUpError> {
    let damaged = |what: &str| RollUpError::Damaged(what.to_owned());
    let container = Container::open(bytes)?;
    if container.trailer().raw_size() > RAW_LIMIT {
        return Err(RollUpError::TooLarge);
    }
    let meta: RollUpMeta = serde_json::from_slice(&container.trailer().metadata)
        .map_err(|error| RollUpError::Damaged(format!("its metadata cannot be read: {error}")))?;
    let raw = container.raw()?;
    if key.hash(&raw) != meta.hash {
        return Err(damaged("its hash is wrong"));
    }
    let log = u32::from_str_radix(&meta.log, 16).map_err(|_| damaged("its log is no number"))?;
    if index_key(meta.timeline, log, meta.hash.short()) != object_key {
        return Err(damaged("it belongs elsewhere"));
    }
    let mut pieces = Vec::new();
    for line in raw.split_inclusive(|byte| *byte == b'\n') {
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| RollUpError::Damaged(format!("a line cannot be read: {error}")))?;
        let name = PieceName::parse(&line.piece).ok_or_else(|| damaged("a name is none"))?;
        let follows = pieces.last().is_none_or(|(last, _)| *last < name);
        let placed = name.segment.timeline == meta.timeline && name.segment.log == log;
        if !follows || !placed || !fits(&name, &line.metadata) {
            return Err(RollUpError::Misplaced(name));
        }
        pieces.push((name, line.metadata));
    }
    if pieces.len() != meta.pieces {
        return Err(damaged("its number of pieces is wrong"));
    }
    Ok(pieces)
}

/// Whether the metadata are those of a piece of this name.
fn fits(name: &PieceName, metadata: &PieceMeta) -> bool {
    let size = metadata.wal_segment_size;
    name.segment.timeline == metadata.timeline
        && name.start(size) == Some(metadata.start)
        && name.end(size) == Some(metadata.end)
        && name.hash == metadata.hash.short()
}

#[cfg(test)]
mod tests;
