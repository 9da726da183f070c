//! How fast WAL is scanned, beside CRC-32C alone, on segments that a server wrote:
//! `cargo run --release --example scan_speed MAJOR SEGMENT...`, the segments in order.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a measurement may stop at anything odd")]

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use pgkeep::wal::{Lsn, ScanSummary, Scanner, SegmentSize, WalFormat};

/// As large as the messages of a walsender.
const CHUNK: usize = 128 << 10;
const ROUNDS: usize = 15;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [major, paths @ ..] = arguments.as_slice() else { panic!("MAJOR SEGMENT...") };
    let major = major.parse().unwrap();
    let segments: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let wal = segments.concat();
    let number = |at: usize| u64::from_le_bytes(wal[at..at + 8].try_into().unwrap());
    let segment_size = SegmentSize::new(number(32) & 0xFFFF_FFFF).unwrap();
    let format = WalFormat { major, segment_size, system_id: number(24) };
    let start = Lsn(number(8));
    let mut summary = ScanSummary::default();
    let scan = best(|| {
        summary = ScanSummary::default();
        let mut scanner = Scanner::new(format, start);
        for chunk in wal.chunks(CHUNK) {
            scanner.feed(chunk, &mut summary, &mut |_| ()).unwrap();
        }
    });
    let crc = best(|| {
        wal.chunks(CHUNK).for_each(|chunk| {
            black_box(crc32c::crc32c(chunk));
        })
    });
    let speed = |time: Duration| wal.len() as f64 / 1e6 / time.as_secs_f64();
    let folder = Path::new(&paths[0]).parent().unwrap();
    println!(
        "{}: {} MB, {} records of {} bytes on average, {} commits, damage {:?}; scan {:.0} MB/s, CRC-32C alone {:.0} MB/s",
        folder.display(),
        wal.len() / 1_000_000,
        summary.records,
        wal.len() as u64 / summary.records.max(1),
        summary.commits,
        summary.damage,
        speed(scan),
        speed(crc),
    );
}

fn best(mut work: impl FnMut()) -> Duration {
    let rounds = (0..ROUNDS).map(|_| {
        let began = Instant::now();
        work();
        began.elapsed()
    });
    rounds.min().unwrap()
}
