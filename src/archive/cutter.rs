//! Cuts a stream of WAL into frames and pieces. Pure: bytes in, cuts out; when to flush is the
//! caller's.
//!
//! A finished segment of up to 16 MiB is one piece, a larger one a run of 16 MiB pieces. What of
//! the current one must be safe before it is full goes out as a small piece, the tail. When eight
//! small pieces of one level have gathered, one piece of the next level replaces them: so a
//! trickle of WAL costs few objects, and each byte is written again only a few times. The full
//! piece replaces them all.
//!
//! Frames lie on a grid from the piece's begin. A full one is handed out at once, is compressed
//! once, and serves every piece that holds it whole; its raw bytes are kept only while a small
//! piece may still begin inside it.

use bytes::{Bytes, BytesMut};

use super::piece::{Part, PieceHash, PieceJob};
use crate::repo::{ContentHasher, ContentKey, FRAME_SIZE, PIECE_SIZE};
use crate::wal::{Lsn, PageError, ScanSummary, Scanner, WalFormat};

/// So many small pieces of one level become one of the next.
const MERGE_FANOUT: usize = 8;

/// Something that was cut.
#[derive(Debug)]
pub(super) enum Cut {
    /// The next full frame of the current piece.
    Frame(Bytes),
    /// A piece. A full one ends the current piece, and with it the frames.
    Piece(Box<PieceJob>),
}

/// A small piece that was cut, still standing.
#[derive(Clone, Copy, Debug)]
struct TailPiece {
    start: Lsn,
    level: u32,
}

/// The WAL between two flushes and what it says.
#[derive(Debug, Default)]
struct Increment {
    start: Lsn,
    summary: ScanSummary,
}

/// The state of cutting.
pub(super) struct Cutter {
    unit: u64,
    scanner: Scanner,
    key: ContentKey,
    /// Where the current piece begins.
    piece_start: Lsn,
    /// Its full frames: the raw bytes of those that may be needed again.
    frames: Vec<Option<Bytes>>,
    /// The frame that is being filled.
    filling: BytesMut,
    position: Lsn,
    /// Up to here pieces were cut.
    flushed: Lsn,
    /// The hash of all full frames.
    whole: ContentHasher,
    /// The hash of what follows the last cut, up to the frame being filled.
    since_flush: ContentHasher,
    increments: Vec<Increment>,
    current: ScanSummary,
    tail: Vec<TailPiece>,
}

impl Cutter {
    /// Begins at `start`, a boundary of pieces, with a scanner that stands there.
    pub(super) fn new(format: WalFormat, key: ContentKey, start: Lsn, scanner: Scanner) -> Cutter {
        debug_assert_eq!(scanner.position(), start);
        Cutter {
            unit: piece_unit(&format),
            scanner,
            piece_start: start,
            frames: Vec::new(),
            filling: BytesMut::with_capacity(FRAME_SIZE),
            position: start,
            flushed: start,
            whole: key.hasher(),
            since_flush: key.hasher(),
            key,
            increments: Vec::new(),
            current: ScanSummary::default(),
            tail: Vec::new(),
        }
    }

    /// Where the next byte is expected.
    pub(super) fn position(&self) -> Lsn {
        self.position
    }

    /// Whether there is WAL that no piece holds yet.
    pub(super) fn has_unflushed(&self) -> bool {
        self.flushed < self.position
    }

    /// Takes the next bytes; what became full is added to `cuts`.
    ///
    /// # Errors
    /// When a page cannot belong to this place of this cluster.
    pub(super) fn push(&mut self, mut bytes: &[u8], cuts: &mut Vec<Cut>) -> Result<(), PageError> {
        while !bytes.is_empty() {
            let piece_left = self.piece_start.advance(self.unit).bytes_since(self.position);
            let frame_left = FRAME_SIZE - self.filling.len();
            let take = bytes.len().min(frame_left).min(piece_left as usize);
            let (now, later) = bytes.split_at(take);
            self.scanner.feed(now, &mut self.current, &mut |_| ())?;
            self.filling.extend_from_slice(now);
            self.position = self.position.advance(take as u64);
            bytes = later;
            if self.filling.len() == FRAME_SIZE || take as u64 == piece_left {
                cuts.push(Cut::Frame(self.end_frame()));
            }
            if take as u64 == piece_left {
                cuts.push(Cut::Piece(Box::new(self.end_piece())));
            }
        }
        Ok(())
    }

    fn end_frame(&mut self) -> Bytes {
        let start = self.frame_start();
        self.whole.update(&self.filling);
        if !self.tail.is_empty() {
            let skip = self.flushed.bytes_since(start) as usize;
            self.since_flush.update(&self.filling[skip..]);
        }
        let frame = self.filling.split().freeze();
        self.filling.reserve(FRAME_SIZE);
        // A later piece may begin inside it, or be hashed from inside it on.
        self.frames.push((!self.tail.is_empty()).then(|| frame.clone()));
        frame
    }

    /// Where the frame being filled begins.
    fn frame_start(&self) -> Lsn {
        self.position.retreat(self.filling.len() as u64)
    }

    fn end_piece(&mut self) -> PieceJob {
        self.close_increment();
        let job = PieceJob {
            start: self.piece_start,
            end: self.position,
            parts: (0..self.frames.len()).map(Part::Frame).collect(),
            hash: PieceHash::Known(self.whole.finish()),
            summary: self.summary_since(self.piece_start),
            replaces: !self.tail.is_empty(),
            is_full: true,
        };
        self.piece_start = self.position;
        self.frames.clear();
        self.increments.clear();
        self.tail.clear();
        self.whole = self.key.hasher();
        self.since_flush = self.key.hasher();
        job
    }

    /// Cuts what no piece holds yet into a small piece, or into one that replaces several.
    pub(super) fn flush(&mut self) -> Option<PieceJob> {
        if !self.has_unflushed() {
            return None;
        }
        let since = self.flushed;
        let mut piece = TailPiece { start: since, level: 0 };
        self.close_increment();
        let mut replaces = false;
        // The new piece is the last of its level: does it fill the level?
        loop {
            let same =
                self.tail.iter().rev().take_while(|other| other.level == piece.level).count();
            if same + 1 < MERGE_FANOUT {
                break;
            }
            let first = self.tail.len() - same;
            piece = TailPiece { start: self.tail[first].start, level: piece.level + 1 };
            self.tail.truncate(first);
            replaces = true;
        }
        let hash = self.hash_since(piece.start, since);
        self.tail.push(piece);
        self.since_flush = self.key.hasher();
        Some(PieceJob {
            start: piece.start,
            end: self.position,
            parts: self.parts_since(piece.start),
            hash,
            summary: self.summary_since(piece.start),
            replaces,
            is_full: false,
        })
    }

    fn close_increment(&mut self) {
        let mut summary = std::mem::take(&mut self.current);
        summary.open_record = self.scanner.open_record();
        self.increments.push(Increment { start: self.flushed, summary });
        self.flushed = self.position;
    }

    /// What the WAL from `start` on says; `start` is where an increment begins.
    fn summary_since(&self, start: Lsn) -> ScanSummary {
        let mut summary = ScanSummary::default();
        for increment in self.increments.iter().filter(|increment| increment.start >= start) {
            summary.append(&increment.summary);
        }
        summary
    }

    /// The hash of `[start, position)`; the last cut was at `flushed`.
    fn hash_since(&self, start: Lsn, flushed: Lsn) -> PieceHash {
        if start == self.piece_start {
            let mut hasher = self.whole.clone();
            hasher.update(&self.filling);
            return PieceHash::Known(hasher.finish());
        }
        if start == flushed {
            let mut hasher = self.since_flush.clone();
            let skip = flushed.max(self.frame_start()).bytes_since(self.frame_start()) as usize;
            hasher.update(&self.filling[skip..]);
            return PieceHash::Known(hasher.finish());
        }
        let raw = self.raw_since(start);
        PieceHash::Of(raw)
    }

    /// The parts of `[start, position)`: full frames as they are, the rest raw.
    fn parts_since(&self, start: Lsn) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut at = self.piece_start;
        for (index, raw) in self.frames.iter().enumerate() {
            if start <= at {
                parts.push(Part::Frame(index));
            } else if let Some(raw) = raw {
                let skip = start.bytes_since(at) as usize;
                if skip < raw.len() {
                    parts.push(Part::Raw(raw.slice(skip..)));
                }
            }
            at = at.advance(FRAME_SIZE as u64);
        }
        parts.extend(self.filling_since(start).map(Part::Raw));
        parts
    }

    fn raw_since(&self, start: Lsn) -> Vec<Bytes> {
        let mut raw = Vec::new();
        let mut at = self.piece_start;
        for frame in &self.frames {
            if let Some(frame) = frame {
                let skip = start.max(at).bytes_since(at) as usize;
                if skip < frame.len() {
                    raw.push(frame.slice(skip..));
                }
            }
            at = at.advance(FRAME_SIZE as u64);
        }
        raw.extend(self.filling_since(start));
        raw
    }

    fn filling_since(&self, start: Lsn) -> Option<Bytes> {
        let begin = self.frame_start();
        let skip = start.max(begin).bytes_since(begin) as usize;
        let rest = &self.filling[skip..];
        (!rest.is_empty()).then(|| Bytes::copy_from_slice(rest))
    }
}

/// The length of a full piece in a cluster.
pub(super) fn piece_unit(format: &WalFormat) -> u64 {
    PIECE_SIZE.min(format.segment_size.bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wal::{SegmentSize, WAL_PAGE_SIZE};

    /// Cuts from the second piece of a large segment on.
    fn cutter() -> (Cutter, ContentKey) {
        let segment_size = SegmentSize::new(1 << 30).unwrap();
        // An unknown major: pages have no known magic, and garbage is not looked at.
        let format = WalFormat { major: 0, segment_size, system_id: 1 };
        let start = Lsn(4 * segment_size.bytes() + PIECE_SIZE);
        let key = ContentKey::for_system(1);
        (Cutter::new(format, key.clone(), start, Scanner::new(format, start)), key)
    }

    /// Bytes that the scanner takes for the padding behind a segment switch: page headers are zero.
    fn padding(length: usize) -> Vec<u8> {
        let byte = |at: usize| match at % WAL_PAGE_SIZE as usize {
            0..40 => 0,
            _ => (at.wrapping_mul(2_654_435_761) >> 7) as u8,
        };
        (0..length).map(byte).collect()
    }

    /// What a piece holds, put together from the frames that were cut before it.
    fn content(job: &PieceJob, frames: &[Bytes]) -> Vec<u8> {
        let parts = job.parts.iter().map(|part| match part {
            Part::Frame(index) => frames[*index].clone(),
            Part::Raw(raw) => raw.clone(),
        });
        parts.flatten().collect()
    }

    fn hash(job: &PieceJob, key: &ContentKey) -> crate::repo::ContentHash {
        match &job.hash {
            PieceHash::Known(hash) => *hash,
            PieceHash::Of(raw) => {
                let mut hasher = key.hasher();
                raw.iter().for_each(|part| hasher.update(part));
                hasher.finish()
            }
        }
    }

    #[test]
    fn small_pieces_are_merged_when_there_are_many() {
        let (mut cutter, _) = cutter();
        let start = cutter.position();
        let mut pieces = Vec::new();
        let wal = padding(8 * 70);
        for bytes in wal.chunks(8) {
            cutter.push(bytes, &mut Vec::new()).unwrap();
            let job = cutter.flush().unwrap();
            pieces.push((job.start, job.len(), job.replaces));
        }
        // The eighth replaces seven, the sixty-fourth replaces all.
        assert_eq!(pieces[6], (start.advance(48), 8, false));
        assert_eq!(pieces[7], (start, 64, true));
        assert_eq!(pieces[63], (start, 512, true));
        let standing = cutter.tail.len();
        assert!(standing <= 7, "{standing} pieces stand after 70 flushes");
        let written: u64 = pieces.iter().map(|piece| piece.1).sum();
        assert!(written <= 70 * 8 * 3, "{written} bytes written for {}", 70 * 8);
    }

    #[test]
    fn nothing_to_flush_gives_no_piece() {
        assert!(cutter().0.flush().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        // However the WAL arrives and whenever it is flushed, every piece holds what its name says.
        #[test]
        fn every_piece_holds_its_range_and_has_its_hash(
            steps in prop::collection::vec((1_usize..1_400_000, prop::bool::weighted(0.6)), 1..60),
        ) {
            let (mut cutter, key) = cutter();
            let start = cutter.position();
            let total: usize = steps.iter().map(|step| step.0).sum();
            let wal = padding(total);
            let mut frames = Vec::new();
            let mut at = 0;
            let mut full_end = start;
            let check = |job: &PieceJob, frames: &[Bytes]| {
                let from = job.start.bytes_since(start) as usize;
                let raw = &wal[from..from + job.len() as usize];
                prop_assert!(content(job, frames) == raw, "{} is wrong", job.start);
                prop_assert_eq!(hash(job, &key), key.hash(raw));
                Ok(())
            };
            for (length, flushes) in steps {
                let mut cuts = Vec::new();
                cutter.push(&wal[at..at + length], &mut cuts).unwrap();
                at += length;
                for cut in cuts {
                    match cut {
                        Cut::Frame(raw) => frames.push(raw),
                        Cut::Piece(job) => {
                            check(&job, &frames)?;
                            prop_assert!(job.is_full && job.start == full_end);
                            full_end = job.end;
                            frames.clear();
                        }
                    }
                }
                if let Some(job) = cutter.flush().filter(|_| flushes) {
                    check(&job, &frames)?;
                }
            }
        }
    }
}
