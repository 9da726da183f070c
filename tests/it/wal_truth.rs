//! The scanner against `pg_waldump`, record by record, on the WAL of a server of each major that
//! was made to write records of every kind.
//!
//! Compared for every record: where it begins, its length, transaction, resource manager and the
//! record before it; for every event: its place and what it says, with files removed and created.
//! Beside that the SQL that was run is compared with what the events say of it.

mod statements;
mod waldump;

use std::fs;
use std::path::PathBuf;

use pgkeep::wal::{
    Event, EventKind, Lsn, ScanSummary, Scanner, SegmentName, SegmentSize, TimelineId,
    WAL_PAGE_SIZE, WalFormat,
};
use rand::RngExt;

use crate::support::{Folder, Server, ServerOptions, user_command, wait_until};
use statements::{Files, STATEMENTS};
use waldump::{Dump, Row, text_of};

/// How often a server is killed until a record was given up.
const KILLS: usize = 6;
/// How many places of the WAL are damaged.
const DAMAGES: usize = 300;

/// The resource managers that the workload must have reached.
const EXPECTED_MANAGERS: [&str; 18] = [
    "XLOG",
    "Transaction",
    "Storage",
    "BRIN",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "LogicalMessage",
];

fn truth(major: u32) {
    let folder = Folder::new();
    let options = ServerOptions {
        segment_mebibytes: if major.is_multiple_of(2) { 1 } else { 16 },
        settings:
            "wal_level = logical\nmax_prepared_transactions = 5\ntrack_commit_timestamp = on\n\
                   wal_keep_size = 8GB\nmax_wal_size = 4GB\nfsync = off\nwal_buffers = 256kB\n\
                   autovacuum = off\n"
                .to_owned(),
        ..ServerOptions::default()
    };
    let mut server = Server::new(&folder, major, &options);
    let system = server.sql("SELECT system_identifier FROM pg_control_system()");
    let size = u64::from(options.segment_mebibytes) << 20;
    let segment_size = SegmentSize::new(size).unwrap();
    let format = WalFormat { major, segment_size, system_id: system.parse().unwrap() };

    let tablespace = folder.make("elsewhere");
    server.sql(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", tablespace.display()));
    server.sql("CREATE TABLE rows (id int)");
    let points = run_statements(&server);
    let databases = come_and_go(&server);
    let given_up = kill_inside_records(&mut server, &format);
    server.sql("DROP TABLE rows");
    server.stop();

    let truth = compare(&server, &format, TimelineId(1), given_up);
    check_statements(&truth, &points);
    check_databases(&truth, &databases);
    damage(&server, &format);

    // A promotion ends with a record of its own; recovery without a standby with a checkpoint.
    let mut previous = 1;
    for (signal, timeline) in [("standby.signal", 2), ("recovery.signal", 3)] {
        let signal = server.data.join(signal);
        let mut touch = user_command("touch");
        assert!(touch.arg(&signal).status().unwrap().success());
        server.configure("restore_command = 'false'\nrecovery_target_timeline = 'latest'\n");
        server.start();
        if timeline == 2 {
            server.sql("SELECT pg_promote()");
        }
        server.wait_until_writable();
        server.sql("CREATE TABLE later (id int); DROP TABLE later");
        server.stop();
        let truth = compare(&server, &format, TimelineId(timeline), 0);
        let switch = EventKind::TimelineSwitch {
            timeline: TimelineId(timeline),
            previous: TimelineId(previous),
        };
        let found = truth.iter().filter(|event| event.kind == switch).count();
        assert_eq!(found, 1, "the switch to timeline {timeline}");
        previous = timeline;
    }
}

/// Runs the statements with a restore point behind each; the names and places of these.
fn run_statements(server: &Server) -> Vec<(&'static str, Lsn)> {
    let point = |name: &str| {
        server.sql(&format!("SELECT pg_create_restore_point('{name}')")).parse().unwrap()
    };
    let mut points = vec![("begin", point("begin"))];
    for (name, _, sql) in STATEMENTS {
        server.sql(sql);
        points.push((name, point(name)));
    }
    points
}

/// Makes, moves and drops databases; their object identifiers.
fn come_and_go(server: &Server) -> Vec<u32> {
    let strategies: &[&str] = match server.major {
        13 | 14 => &[""],
        _ => &[" STRATEGY wal_log", " STRATEGY file_copy"],
    };
    let mut databases = Vec::new();
    for strategy in strategies {
        server.sql(&format!("CREATE DATABASE short{strategy}"));
        let number = server.sql("SELECT oid FROM pg_database WHERE datname = 'short'");
        databases.push(number.parse().unwrap());
        server.sql("ALTER DATABASE short SET TABLESPACE elsewhere");
        server.sql("DROP DATABASE short");
    }
    databases
}

/// Kills the server with all its processes while it writes records of many pages, until it had to
/// give one up at its next start; how often that was.
fn kill_inside_records(server: &mut Server, format: &WalFormat) -> usize {
    for _ in 0..KILLS {
        let begin: Lsn = server.sql("SELECT pg_current_wal_insert_lsn()").parse().unwrap();
        let conninfo = server.conninfo();
        let writer = std::thread::spawn(move || {
            let mut client = postgres::Client::connect(&conninfo, postgres::NoTls).unwrap();
            let sql = "SELECT pg_logical_emit_message(false, 'test', repeat('x', 8000000))";
            while client.simple_query(sql).is_ok() {}
        });
        wait_until("the server to write", || {
            let now: Lsn = server.sql("SELECT pg_current_wal_insert_lsn()").parse().unwrap();
            now.bytes_since(begin) > 4 << 20
        });
        server.kill9_all();
        writer.join().unwrap();
        server.start();
        server.sql("INSERT INTO rows VALUES (2)");
        server.sql("CHECKPOINT");
        let given_up = overwritten_pages(&segments(server, TimelineId(1)), format).len();
        if given_up > 0 {
            return given_up;
        }
    }
    panic!("no record was given up in {KILLS} crashes");
}

/// The segment files of a timeline, in order.
fn segments(server: &Server, timeline: TimelineId) -> Vec<(SegmentName, PathBuf)> {
    let folder = server.data.join("pg_wal");
    let mut segments: Vec<(SegmentName, PathBuf)> = fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let name: SegmentName = path.file_name()?.to_str()?.parse().ok()?;
            (name.timeline == timeline).then_some((name, path))
        })
        .collect();
    segments.sort_unstable();
    segments
}

/// Pages that say that the record before them was given up.
fn overwritten_pages(segments: &[(SegmentName, PathBuf)], format: &WalFormat) -> Vec<Lsn> {
    let mut pages = Vec::new();
    for (name, path) in segments {
        let start = format.segment_size.start_of(format.segment_size.number(*name).unwrap());
        let bytes = fs::read(path).unwrap();
        for (index, page) in bytes.chunks(WAL_PAGE_SIZE as usize).enumerate() {
            let lsn = start.advance(index as u64 * WAL_PAGE_SIZE);
            let address = u64::from_le_bytes(page[8..16].try_into().unwrap());
            if Lsn(address) == lsn && page[2] & 8 != 0 {
                pages.push(lsn);
            }
        }
    }
    pages
}

/// Reads all WAL of a timeline in chunks of random sizes, and compares with `pg_waldump`; the
/// events.
fn compare(
    server: &Server,
    format: &WalFormat,
    timeline: TimelineId,
    given_up: usize,
) -> Vec<Event> {
    let segments = segments(server, timeline);
    let start = format.segment_size.start_of(format.segment_size.number(segments[0].0).unwrap());
    let mut scanner = Scanner::new(*format, start);
    // Each chunk has a summary of its own, as if pieces were cut there.
    let (mut summary, mut rows, mut events) = (ScanSummary::default(), Vec::new(), Vec::new());
    let mut random = rand::rng();
    'wal: for (_, path) in &segments {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let most = [9, 300, 20_000, 200_000][random.random_range(0..4)];
            let (now, later) = rest.split_at(random.random_range(1..=most).min(rest.len()));
            let mut on_event = |event: &Event| events.push(event.clone());
            let on_record = |record: &_| rows.push(Row::from(record));
            let mut part = ScanSummary::default();
            let fed = scanner.feed_records(now, &mut part, &mut on_event, on_record);
            summary.append(&part);
            if fed.is_err() {
                // Behind its end the files may hold anything. Whether this is the end, the
                // comparison tells.
                break 'wal;
            }
            rest = later;
        }
    }
    assert_eq!(summary.damage, [""; 0]);
    let mut whole = ScanSummary::default();
    let mut scanner = Scanner::new(*format, start);
    let fed = segments
        .iter()
        .try_for_each(|(_, path)| scanner.feed(&fs::read(path).unwrap(), &mut whole, &mut |_| ()));
    assert!(fed.is_err() || whole == summary, "{whole:?}\nis not what the parts say:\n{summary:?}");
    assert_eq!(summary.records, rows.len() as u64);

    let mut dump = Dump::default();
    let folder = server.data.join("pg_wal");
    dump.read(server, &folder, timeline, start);
    // The only pg_waldump of 13 that can be had is older than these pages, and stops at them.
    let overwritten = overwritten_pages(&segments, format);
    assert!(overwritten.len() >= given_up);
    for page in overwritten.iter().filter(|_| server.major == 13) {
        let next = page.advance(WAL_PAGE_SIZE);
        let rest = dump.rows.len();
        dump.read(server, &folder, timeline, next);
        let resumed = dump.rows.get(rest).map_or(next, |row| row.lsn);
        rows.retain(|row| row.lsn < *page || row.lsn >= resumed);
        events.retain(|event| event.lsn < *page || event.lsn >= resumed);
    }
    compare_rows(&rows, &dump);
    if timeline == TimelineId(1) {
        for manager in EXPECTED_MANAGERS {
            assert!(rows.iter().any(|row| row.manager == manager), "no record of {manager}");
        }
    }
    let found: Vec<_> = events.iter().map(|event| (event.lsn, text_of(event))).collect();
    let different = found.iter().zip(&dump.events).find(|(one, other)| one != other);
    assert_eq!(different, None, "PostgreSQL {}", server.major);
    assert_eq!(found.len(), dump.events.len());
    println!(
        "PostgreSQL {}, timeline {}: {} records and {} events in {} segments are those of pg_waldump; \
         {} records were given up in crashes",
        server.major,
        timeline.0,
        rows.len(),
        found.len(),
        segments.len(),
        overwritten.len(),
    );
    events
}

/// Damages real WAL in many ways: the scanner never panics, and finds the same however the WAL is
/// cut into chunks.
fn damage(server: &Server, format: &WalFormat) {
    let segments = segments(server, TimelineId(1));
    let mut random = rand::rng();
    let scan = |start: Lsn, bytes: &[u8], chunk: usize| {
        let mut scanner = Scanner::new(*format, start);
        let mut summary = ScanSummary::default();
        let fed = bytes
            .chunks(chunk)
            .try_for_each(|chunk| scanner.feed(chunk, &mut summary, &mut |_| ()));
        (fed.map(|()| summary.open_record), summary.records, summary.events, summary.damage)
    };
    let mut noticed = 0;
    for _ in 0..DAMAGES {
        let (name, path) = &segments[random.random_range(0..segments.len())];
        let start = format.segment_size.start_of(format.segment_size.number(*name).unwrap());
        let mut bytes = fs::read(path).unwrap();
        let from = random.random_range(0..bytes.len() - 16 * WAL_PAGE_SIZE as usize);
        let from = from - from % WAL_PAGE_SIZE as usize;
        bytes.drain(..from);
        bytes.truncate(16 * WAL_PAGE_SIZE as usize);
        let start = start.advance(from as u64);
        let good = scan(start, &bytes, bytes.len());
        for _ in 0..random.random_range(1..5) {
            let at = random.random_range(0..bytes.len());
            let end = (at + random.random_range(1..40)).min(bytes.len());
            let value: u8 = random.random();
            match random.random() {
                true => bytes[at..end].fill(value),
                false => bytes[at] ^= 1 << (value % 8),
            }
        }
        let whole = scan(start, &bytes, bytes.len());
        assert_eq!(scan(start, &bytes, random.random_range(1..20_000)), whole, "{start}");
        noticed += usize::from(whole != good);
    }
    assert!(noticed > DAMAGES / 4, "damage was noticed in {noticed} of {DAMAGES} places");
}

fn compare_rows(rows: &[Row], dump: &Dump) {
    let different = rows.iter().zip(&dump.rows).find(|(one, other)| one != other);
    assert_eq!(different, None, "after {} records; {}", rows.len(), dump.end);
    let counts = (rows.len(), dump.rows.len());
    assert_eq!(counts.0, counts.1, "{:?} {:?} {}", rows.last(), dump.rows.last(), dump.end);
}

/// What the events between two restore points say must be what the statement did.
fn check_statements(events: &[Event], points: &[(&'static str, Lsn)]) {
    let position = |name: &str| {
        events.iter().position(|event| {
            matches!(&event.kind, EventKind::RestorePoint { name: other, .. } if other == name)
        })
    };
    let mut from = position("begin").unwrap();
    for ((name, files, _), (_, lsn)) in STATEMENTS.iter().zip(&points[1..]) {
        let to = position(name).unwrap_or_else(|| panic!("no restore point {name}"));
        // The server's own word on where the record ends.
        assert_eq!(events[to].end_lsn, *lsn, "{name}");
        let removals: Vec<(u32, u32)> = events[from..to]
            .iter()
            .filter_map(|event| match event.kind {
                EventKind::FilesRemoved { removed, created, .. } => Some((removed, created)),
                _ => None,
            })
            .collect();
        let found = match removals.as_slice() {
            [] => Files::Stay,
            [(_, 0)] => Files::Go,
            _ => Files::Replaced,
        };
        assert_eq!(found, *files, "{name}: {removals:?}");
        from = to;
    }
}

fn check_databases(events: &[Event], databases: &[u32]) {
    let mut kinds = events.iter().map(|event| &event.kind);
    for number in databases {
        let mut next = |what: &str, wanted: &dyn Fn(&EventKind) -> bool| {
            assert!(kinds.any(wanted), "{what} of database {number}");
        };
        next("the creation", &|kind| {
            matches!(kind, EventKind::DatabaseCreated { database, template, .. }
                if database == number && *template != Some(*number))
        });
        next("the move", &|kind| {
            matches!(kind, EventKind::DatabaseCreated { database, template: Some(from), .. }
                if database == number && from == number)
        });
        let dropped = |kind: &EventKind| {
            matches!(kind, EventKind::DatabaseDropped { database, tablespaces, .. }
                if database == number && tablespaces.len() == 1)
        };
        next("the end of the move", &dropped);
        next("the drop", &dropped);
    }
}

#[test]
fn wal_of_13_is_what_pg_waldump_says() {
    truth(13);
}

#[test]
fn wal_of_14_is_what_pg_waldump_says() {
    truth(14);
}

#[test]
fn wal_of_15_is_what_pg_waldump_says() {
    truth(15);
}

#[test]
fn wal_of_16_is_what_pg_waldump_says() {
    truth(16);
}

#[test]
fn wal_of_17_is_what_pg_waldump_says() {
    truth(17);
}

#[test]
fn wal_of_18_is_what_pg_waldump_says() {
    truth(18);
}
