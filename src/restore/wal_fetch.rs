//! `wal-fetch`: gives PostgreSQL one WAL segment or history file, as its `restore_command`.
//!
//! Inside the range that the plan promised it delivers or fails loudly; beyond it there is nothing
//! (invariant I4). A segment still being written is padded with zeros to its full size. The WAL of
//! an ancestor past the fork is never given: it would be replayed silently. A file appears under
//! its name only when it is complete.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::plan::{PLAN_FILE, PathPart, Plan};
use crate::repo::{ContentKey, Coverage};
use crate::store::{ReadError, Regions, list_histories, list_pieces, read_piece};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// How often a range is listed and read before a piece that is gone counts as missing.
const ATTEMPTS: usize = 5;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The file is there.
    Delivered,
    /// There is no such file in what is being recovered, and there need not be.
    NotThere,
}

/// Why a file that should be there could not be given.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The plan cannot be used.
    #[error("{file}: {problem}", file = .path.display())]
    Plan {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// WAL that the plan promised is in no region.
    #[error("WAL from {from} on timeline {timeline}, which the plan promised, is in no region now")]
    Missing {
        /// The first byte.
        from: Lsn,
        /// The timeline.
        timeline: TimelineId,
    },
    /// No region could give it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The disk.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What is served: a pinned path, or everything (for a standby, which has no end).
#[derive(Clone, Debug)]
pub struct Source {
    /// The regions, at the lineage's folder.
    pub regions: Regions,
    /// Whose archive it is.
    pub system_id: u64,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The pinned path; without one, whatever the archive has.
    pub path: Option<Vec<PathPart>>,
}

/// Reads the plan that a restore left in the data directory.
///
/// # Errors
/// When it is there and cannot be used.
pub fn read_plan(folder: &Path) -> Result<Option<Plan>, FetchError> {
    let path = folder.join(PLAN_FILE);
    let fail = |problem: String| FetchError::Plan { path: path.clone(), problem };
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| fail(e.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(fail(error.to_string())),
    }
}

impl Source {
    /// Serves one request.
    ///
    /// # Errors
    /// When the file should be there and cannot be given.
    pub async fn fetch(&self, file: &str, destination: &Path) -> Result<Fetched, FetchError> {
        let timeline = file.strip_suffix(".history").and_then(TimelineId::from_hex8);
        if let Some(timeline) = timeline {
            return self.fetch_history(timeline, destination).await;
        }
        match file.parse::<SegmentName>() {
            Ok(name) => self.fetch_segment(name, destination).await,
            // .partial and .backup files are not kept: WAL is.
            Err(_) => Ok(Fetched::NotThere),
        }
    }

    async fn fetch_history(
        &self,
        timeline: TimelineId,
        destination: &Path,
    ) -> Result<Fetched, FetchError> {
        // The first timeline has no ancestors to tell of.
        if timeline == TimelineId::FIRST {
            return Ok(Fetched::NotThere);
        }
        // Newer timelines than the plan's too: PostgreSQL looks here for a number that is not taken.
        let Some((_, bytes)) = self.history(timeline).await? else {
            let promised = self.path.iter().flatten().any(|part| part.timeline == timeline);
            if promised {
                return Err(FetchError::Missing { from: Lsn::INVALID, timeline });
            }
            return Ok(Fetched::NotThere);
        };
        deliver(destination, bytes.len() as u64, &[&bytes])?;
        Ok(Fetched::Delivered)
    }

    async fn fetch_segment(
        &self,
        name: SegmentName,
        destination: &Path,
    ) -> Result<Fetched, FetchError> {
        let Some(number) = self.segment_size.number(name) else { return Ok(Fetched::NotThere) };
        let start = self.segment_size.start_of(number);
        let end = start.advance(self.segment_size.bytes());
        let Some((promised_to, sources)) = self.sources(name.timeline, start, end).await? else {
            return Ok(Fetched::NotThere);
        };
        let wal = self.read_again(&sources, start, promised_to.unwrap_or(end)).await?;
        let reached = start.advance(wal.len() as u64);
        match promised_to {
            Some(promised) if reached < promised => {
                return Err(FetchError::Missing { from: reached, timeline: name.timeline });
            }
            None if wal.is_empty() => return Ok(Fetched::NotThere),
            _ => {}
        }
        deliver(destination, self.segment_size.bytes(), &[&wal])?;
        Ok(Fetched::Delivered)
    }

    /// Which timelines the bytes of a segment may be taken from, newest first, each up to where it
    /// counts; and up to where they are promised. `None`: the segment is not part of the path.
    async fn sources(
        &self,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
    ) -> Result<Option<(Option<Lsn>, Vec<(TimelineId, Lsn)>)>, FetchError> {
        if let Some(path) = &self.path {
            let Some(index) = path.iter().position(|part| part.timeline == timeline) else {
                return Ok(None);
            };
            let limit = path[index].end.min(end);
            if start >= limit {
                return Ok(None);
            }
            let mut sources = vec![(timeline, limit)];
            // Before the fork the ancestors have the same bytes, and so has the descendant.
            let ancestors = path[..index].iter().rev();
            sources.extend(ancestors.map(|part| (part.timeline, part.end.min(limit))));
            if let Some(next) = path.get(index + 1) {
                sources.push((next.timeline, limit));
            }
            return Ok(Some((Some(limit), sources)));
        }
        let mut sources = vec![(timeline, end)];
        if timeline > TimelineId::FIRST {
            let history = self.history(timeline).await?;
            let ancestors = history.iter().flat_map(|(history, _)| history.ancestors.iter().rev());
            sources.extend(ancestors.map(|entry| (entry.timeline, entry.end.min(end))));
        }
        Ok(Some((None, sources)))
    }

    /// A timeline's history, parsed and raw; `None` when every region answers and none has it.
    async fn history(
        &self,
        timeline: TimelineId,
    ) -> Result<Option<(TimelineHistory, Bytes)>, FetchError> {
        let key = ContentKey::for_system(self.system_id);
        let found = self.regions.read(|region| {
            let key = key.clone();
            async move {
                let histories = list_histories(&region, &key).await?;
                let found = histories.into_iter().find(|(history, _)| history.timeline == timeline);
                let name = timeline.history_file_name();
                found.ok_or_else(|| region.missing(&name, "the region does not have it"))
            }
        });
        match found.await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// [`Source::read`], again when a piece that was listed was replaced by a larger one meanwhile.
    async fn read_again(
        &self,
        sources: &[(TimelineId, Lsn)],
        from: Lsn,
        to: Lsn,
    ) -> Result<Vec<u8>, FetchError> {
        for _ in 1..ATTEMPTS {
            match self.read(sources, from, to).await {
                Err(FetchError::Read(error)) if error.is_not_found() => {}
                outcome => return outcome,
            }
        }
        self.read(sources, from, to).await
    }

    /// Reads `[from, to)` as far as it goes without a hole, from all regions together.
    async fn read(
        &self,
        sources: &[(TimelineId, Lsn)],
        from: Lsn,
        to: Lsn,
    ) -> Result<Vec<u8>, FetchError> {
        let mut wal = Vec::new();
        // Around a fork a segment is made of turns: the ancestor, then the descendant.
        let turns = sources.iter().cycle().take(2 * sources.len());
        for (timeline, limit) in turns {
            let at = from.advance(wal.len() as u64);
            let limit = (*limit).min(to);
            if at >= limit {
                continue;
            }
            let coverage = self.coverage(*timeline, at, limit).await?;
            for part in coverage.cover(at, limit) {
                let raw = self.read_piece(&part.piece).await?;
                let start = part.piece.start(self.segment_size).unwrap_or(part.from);
                let skip = part.from.bytes_since(start) as usize;
                let length = part.to.bytes_since(part.from) as usize;
                wal.extend_from_slice(&raw[skip..skip + length]);
            }
        }
        Ok(wal)
    }

    /// The pieces that any region has; an error when none can be asked.
    async fn coverage(
        &self,
        timeline: TimelineId,
        from: Lsn,
        to: Lsn,
    ) -> Result<Coverage, FetchError> {
        let size = self.segment_size;
        let mut pieces = Vec::new();
        let mut errors = Vec::new();
        for region in self.regions.iter() {
            match list_pieces(region, timeline, size, from, Some(to)).await {
                Ok(found) => {
                    let whole = found.coverage.contiguous_end(from) >= to;
                    pieces.extend(found.coverage.pieces().copied());
                    if whole {
                        break;
                    }
                }
                Err(error) => {
                    tracing::warn!("{error}");
                    errors.push(error);
                }
            }
        }
        if pieces.is_empty() && !errors.is_empty() {
            return Err(ReadError { errors }.into());
        }
        Ok(Coverage::new(pieces, size))
    }

    async fn read_piece(&self, piece: &crate::repo::PieceName) -> Result<Vec<u8>, FetchError> {
        let key = ContentKey::for_system(self.system_id);
        let piece = *piece;
        let read = self.regions.read_first(|region| {
            let key = key.clone();
            async move { read_piece(&region, &piece, &key).await }
        });
        Ok(read.await?)
    }
}

/// Writes a file aside, padded with zeros to `size`, and gives it its name when it is whole.
fn deliver(destination: &Path, size: u64, parts: &[&[u8]]) -> Result<(), FetchError> {
    let fail = |source| FetchError::Write { path: destination.to_owned(), source };
    let mut aside = destination.as_os_str().to_owned();
    aside.push(".pgkeep");
    let write = || {
        let mut file = fs::File::create(&aside)?;
        for part in parts {
            file.write_all(part)?;
        }
        file.set_len(size)?;
        drop(file);
        fs::rename(&aside, destination)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&aside);
        fail(error)
    })
}
