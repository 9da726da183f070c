//! Cuts a stream of WAL into pieces. Pure: bytes in, jobs out; when to flush is the caller's.
//!
//! A finished segment of up to 16 MiB is one piece, a larger one a run of 16 MiB pieces. What of
//! the current one must be safe before it is full goes out as a small piece, the tail. When eight
//! small pieces of one level have gathered, one piece of the next level replaces them: so a
//! trickle of WAL costs few objects, and each byte is written again only a few times. The full
//! piece replaces them all.

use bytes::{Bytes, BytesMut};

use super::piece::PieceJob;
use crate::repo::{FRAME_SIZE, PIECE_SIZE};
use crate::wal::{Lsn, PageError, ScanSummary, Scanner, WalFormat};

/// So many small pieces of one level become one of the next.
const MERGE_FANOUT: usize = 8;

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
    /// Where the current piece begins.
    piece_start: Lsn,
    /// Its full frames, then the one being filled.
    frames: Vec<Bytes>,
    filling: BytesMut,
    position: Lsn,
    /// Up to here jobs were cut.
    flushed: Lsn,
    increments: Vec<Increment>,
    current: ScanSummary,
    tail: Vec<TailPiece>,
}

impl Cutter {
    /// Begins at `start`, a boundary of pieces, with a scanner that stands there.
    pub(super) fn new(format: WalFormat, start: Lsn, scanner: Scanner) -> Cutter {
        debug_assert_eq!(scanner.position(), start);
        Cutter {
            unit: piece_unit(&format),
            scanner,
            piece_start: start,
            frames: Vec::new(),
            filling: BytesMut::with_capacity(FRAME_SIZE),
            position: start,
            flushed: start,
            increments: Vec::new(),
            current: ScanSummary::default(),
            tail: Vec::new(),
        }
    }

    /// Where the next byte is expected.
    pub(super) fn position(&self) -> Lsn {
        self.position
    }

    /// Whether there is WAL that no job holds yet.
    pub(super) fn has_unflushed(&self) -> bool {
        self.flushed < self.position
    }

    /// Takes the next bytes; pieces that became full are added to `jobs`.
    ///
    /// # Errors
    /// When a page cannot belong to this place of this cluster.
    pub(super) fn push(
        &mut self,
        mut bytes: &[u8],
        jobs: &mut Vec<PieceJob>,
    ) -> Result<(), PageError> {
        while !bytes.is_empty() {
            let piece_left = self.piece_start.advance(self.unit).bytes_since(self.position);
            let frame_left = FRAME_SIZE - self.filling.len();
            let take = bytes.len().min(frame_left).min(piece_left as usize);
            let (now, later) = bytes.split_at(take);
            self.scanner.feed(now, &mut self.current, &mut |_| ())?;
            self.filling.extend_from_slice(now);
            self.position = self.position.advance(take as u64);
            bytes = later;
            if self.filling.len() == FRAME_SIZE {
                self.frames.push(self.filling.split().freeze());
                self.filling.reserve(FRAME_SIZE);
            }
            if take as u64 == piece_left {
                jobs.push(self.end_piece());
            }
        }
        Ok(())
    }

    fn end_piece(&mut self) -> PieceJob {
        self.close_increment();
        let replaces = !self.tail.is_empty();
        let job = self.job(self.piece_start, replaces);
        self.piece_start = self.position;
        self.frames.clear();
        self.filling.clear();
        self.increments.clear();
        self.tail.clear();
        job
    }

    /// Cuts what no job holds yet into a small piece, or into one that replaces several.
    pub(super) fn flush(&mut self) -> Option<PieceJob> {
        if !self.has_unflushed() {
            return None;
        }
        let mut piece = TailPiece { start: self.flushed, level: 0 };
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
        self.tail.push(piece);
        Some(self.job(piece.start, replaces))
    }

    fn close_increment(&mut self) {
        let mut summary = std::mem::take(&mut self.current);
        summary.open_record = self.scanner.open_record();
        self.increments.push(Increment { start: self.flushed, summary });
        self.flushed = self.position;
    }

    /// The job for `[start, position)`; `start` is where an increment begins.
    fn job(&self, start: Lsn, replaces: bool) -> PieceJob {
        let mut summary = ScanSummary::default();
        for increment in self.increments.iter().filter(|increment| increment.start >= start) {
            summary.append(&increment.summary);
        }
        let mut skip = start.bytes_since(self.piece_start) as usize;
        let mut raw = Vec::new();
        let filling = Bytes::copy_from_slice(&self.filling);
        for frame in self.frames.iter().chain([&filling]) {
            if skip < frame.len() {
                raw.push(frame.slice(skip..));
            }
            skip = skip.saturating_sub(frame.len());
        }
        PieceJob { start, raw, summary, replaces }
    }
}

/// The length of a full piece in a cluster.
pub(super) fn piece_unit(format: &WalFormat) -> u64 {
    PIECE_SIZE.min(format.segment_size.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::SegmentSize;

    fn cutter(size_mebibytes: u64) -> Cutter {
        let segment_size = SegmentSize::new(size_mebibytes << 20).unwrap();
        // An unknown major: pages have no known magic, and garbage is not looked at.
        let format = WalFormat { major: 0, segment_size, system_id: 1 };
        let start = Lsn(4 * segment_size.bytes() + 100 * 8192 + 100);
        let mut cutter = Cutter::new(format, start, Scanner::new(format, start));
        cutter.piece_start = start.round_down(cutter.unit);
        cutter.frames = (0..start.bytes_since(cutter.piece_start) / FRAME_SIZE as u64)
            .map(|_| Bytes::from(vec![0; FRAME_SIZE]))
            .collect();
        cutter
    }

    /// Bytes that stay inside one page, so that the scanner asks for no header.
    fn trickle(cutter: &mut Cutter, times: usize) -> Vec<(Lsn, u64, bool)> {
        let mut pieces = Vec::new();
        let mut jobs = Vec::new();
        for _ in 0..times {
            cutter.push(&[1; 8], &mut jobs).unwrap();
            let job = cutter.flush().unwrap();
            pieces.push((job.start, job.len(), job.replaces));
        }
        assert!(jobs.is_empty());
        pieces
    }

    #[test]
    fn small_pieces_are_merged_when_there_are_many() {
        let mut cutter = cutter(16);
        let start = cutter.position();
        cutter.piece_start = start;
        cutter.frames.clear();
        let pieces = trickle(&mut cutter, 70);
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
        let mut cutter = cutter(1);
        assert!(cutter.flush().is_none());
    }
}
