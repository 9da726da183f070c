//! The hashes of a pack's blocks, read from behind the frames that they belong to.

use bytes::Bytes;

use super::{ReadError, Region, Regions};
use crate::repo::{BlockHashes, PackEntry, Trailer, TrailerRead, decompress_frame, pack_key};

/// Reads the hashes of a pack's blocks; none if it was written without.
///
/// # Errors
/// When no region can give them whole.
pub async fn read_block_hashes(
    regions: &Regions,
    pack: &PackEntry,
) -> Result<BlockHashes, ReadError> {
    let object = &pack_key(&pack.label, pack.number);
    let from = pack.frames.iter().map(|frame| u64::from(frame.stored_size)).sum::<u64>();
    let read = |region: Region| async move {
        region.get_range(object, from.min(pack.stored_size)..pack.stored_size).await
    };
    let accept = |region: Region, bytes: Bytes| async move {
        parse(&bytes, pack).map_err(|problem| region.damaged(object, problem))
    };
    regions.read_soonest(read, accept).await
}

fn parse(tail: &Bytes, pack: &PackEntry) -> Result<BlockHashes, String> {
    let trailer = match Trailer::read(tail, pack.stored_size) {
        Ok(TrailerRead::Done(trailer)) => trailer,
        Ok(TrailerRead::NeedLast(_)) => return Err("its frames are not those of files.idx".into()),
        Err(error) => return Err(error.to_string()),
    };
    let begin = pack.stored_size - tail.len() as u64;
    let mut hashes = BlockHashes::default();
    for frame in trailer.frames.iter().skip(pack.frames.len()) {
        let from = frame.offset.checked_sub(begin).and_then(|from| usize::try_from(from).ok());
        let stored = from
            .and_then(|from| tail.get(from..from + frame.stored_size as usize))
            .ok_or("its frames are not those of files.idx")?;
        let raw = decompress_frame(stored, frame.raw_size).map_err(|error| error.to_string())?;
        hashes.add(&raw).ok_or("the hashes of its blocks make no sense")?;
    }
    Ok(hashes)
}
