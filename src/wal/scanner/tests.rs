use proptest::prelude::*;

use super::*;
use crate::wal::made_up::{FORMAT, MadeUp, SEVEN, START};
use crate::wal::{EventKind, RelationFile, TimelineId};

/// The summary of `bytes` from `start` on, fed in chunks of these sizes, and all events.
fn scan_from(
    format: WalFormat,
    start: Lsn,
    bytes: &[u8],
    chunks: &[usize],
) -> Result<(ScanSummary, Vec<Event>), PageError> {
    let mut scanner = Scanner::new(format, start);
    let (mut summary, mut events) = (ScanSummary::default(), Vec::new());
    let mut sizes = chunks.iter().copied().cycle();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(sizes.next().unwrap_or(rest.len()).clamp(1, rest.len()));
        scanner.feed(now, &mut summary, &mut |event| events.push(event.clone()))?;
        rest = later;
    }
    assert_eq!(scanner.position(), start.advance(bytes.len() as u64));
    Ok((summary, events))
}

fn scan(wal: &MadeUp) -> (ScanSummary, Vec<EventKind>) {
    let (summary, events) = scan_from(wal.format(), START, &wal.bytes, &[]).unwrap();
    assert_eq!(summary.damage, [""; 0]);
    (summary, events.into_iter().map(|event| event.kind).collect())
}

fn file(number: u32) -> RelationFile {
    RelationFile { tablespace: 1663, database: 5, number }
}

/// The lists of a commit record: count and entries.
fn files(count: u32) -> Vec<u32> {
    [vec![count], (0..count).flat_map(|number| [1663, 5, number]).collect()].concat()
}

#[test]
fn a_drop_removes_and_a_truncate_replaces() {
    let mut wal = MadeUp::new(17);
    // Flags: database, relation files, invalidations, then one invalidation message.
    let removal =
        |count| [vec![1 | 4 | 8, 16384, 1663], files(count), vec![1, 0, 0, 0, 0]].concat();
    wal.ends(800, 0x81, &removal(3));
    wal.creates(801, 0);
    // Other forks of the same relation are not counted again; one that is not logged has no other.
    wal.creates(801, 1);
    wal.creates(801, 3);
    // Somebody else's.
    wal.creates(802, 0);
    let lsn = wal.ends(801, 0x80, &removal(1));
    wal.ends(803, 0x00, &[]);
    let (summary, kinds) = scan(&wal);
    let time = crate::wal::record::time_from_postgres(SEVEN);
    let removed = |xid, removed, created| EventKind::FilesRemoved {
        xid,
        time,
        database: 16384,
        removed,
        created,
        files: (0..removed).map(file).collect(),
    };
    let expected = [
        EventKind::Commit { xid: 800, time },
        removed(800, 3, 0),
        EventKind::Commit { xid: 801, time },
        removed(801, 1, 2),
        EventKind::Commit { xid: 803, time },
    ];
    assert_eq!(kinds, expected);
    assert_eq!((summary.commits, summary.aborts, summary.events.len()), (3, 0, 2));
    assert_eq!(summary.events[1].lsn, lsn);
}

#[test]
fn what_subtransactions_created_counts_for_their_parent() {
    let mut wal = MadeUp::new(14);
    for xid in [900, 901, 902, 903] {
        wal.creates(xid, 0);
    }
    // One subtransaction was rolled back, with what it created; that is no drop.
    wal.ends(902, 0xA0, &[[4].to_vec(), files(1)].concat());
    wal.ends(900, 0x80, &[vec![2 | 4, 3, 901, 903, 904], files(2)].concat());
    let (summary, kinds) = scan(&wal);
    let [EventKind::Abort { xid: 902, .. }, EventKind::Commit { .. }, removed] = &kinds[..] else {
        panic!("{kinds:?}");
    };
    // Without the transaction's database the files tell theirs.
    let found = matches!(
        removed,
        EventKind::FilesRemoved { database: 5, removed: 2, created: 3, xid: 900, .. }
    );
    assert!(found, "{removed:?}");
    assert_eq!(summary.events.len(), 1);
}

#[test]
fn prepared_transactions_are_known_behind_any_number_of_subtransactions() {
    for (major, statistics) in [(14, None), (17, Some(3)), (18, Some(4))] {
        let mut wal = MadeUp::new(major);
        wal.creates(1000, 0);
        let many: Vec<u32> = (2000..22_000).collect();
        let mut flags = 2 | 4 | 8 | 16;
        let mut parts = [vec![many.len() as u32], many, files(1)].concat();
        if let Some(words) = statistics {
            flags |= 1 << 8;
            parts.extend([vec![2], vec![7; 2 * words]].concat());
        }
        parts.extend([vec![1], vec![7; 4], vec![1000]].concat());
        wal.ends(0, 0xB0, &[vec![flags], parts].concat());
        wal.ends(0, 0xC0, &[16, 1001]);
        let (summary, kinds) = scan(&wal);
        assert!(matches!(kinds[0], EventKind::Commit { xid: 1000, .. }), "{kinds:?}");
        assert!(
            matches!(kinds[1], EventKind::FilesRemoved { xid: 1000, created: 1, removed: 1, .. }),
            "{kinds:?}"
        );
        assert!(matches!(kinds[2], EventKind::Abort { xid: 1001, .. }), "{kinds:?}");
        assert_eq!((summary.min_xid, summary.max_xid), (Some(1000), Some(1001)));
    }
}

#[test]
fn a_hundred_thousand_removed_files_are_counted_and_a_few_named() {
    let mut wal = MadeUp::new(17);
    wal.ends(800, 0x80, &[vec![4], files(100_000)].concat());
    let (summary, _) = scan(&wal);
    let EventKind::FilesRemoved { removed, files, .. } = &summary.events[0].kind else {
        panic!("{summary:?}");
    };
    assert_eq!((*removed, files.len(), files[15]), (100_000, 16, file(15)));
    assert_eq!(summary.events[0].lsn, wal.starts[0]);
}

#[test]
fn databases_that_come_and_go_are_told_for_every_major() {
    for (major, drop) in [(13, 0x10), (14, 0x10), (15, 0x20), (18, 0x20)] {
        let mut wal = MadeUp::new(major);
        let data =
            |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
        wal.record(700, 4, 0x00, &data(&[16400, 1663, 1, 1663]));
        if major >= 15 {
            wal.record(701, 4, 0x10, &data(&[16401, 1663]));
        }
        wal.record(702, 4, drop, &data(&[16400, 2, 1663, 16390]));
        let (summary, _) = scan(&wal);
        let kinds: Vec<_> = summary.events.into_iter().map(|event| event.kind).collect();
        let created = |xid, database, template| EventKind::DatabaseCreated {
            xid,
            database,
            tablespace: 1663,
            template,
        };
        let mut expected = vec![created(700, 16400, Some(1))];
        expected.extend((major >= 15).then(|| created(701, 16401, None)));
        let tablespaces = vec![1663, 16390];
        expected.push(EventKind::DatabaseDropped { xid: 702, database: 16400, tablespaces });
        assert_eq!(kinds, expected, "PostgreSQL {major}");
    }
}

#[test]
fn timeline_switches_are_told_by_both_records_that_begin_a_timeline() {
    let mut wal = MadeUp::new(17);
    let mut checkpoint = [0_u8; 88];
    checkpoint[8..16].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0]);
    wal.record(0, 0, 0x10, &checkpoint);
    checkpoint[8] = 5;
    wal.record(0, 0, 0x00, &checkpoint);
    let end_of_recovery = [&SEVEN.to_le_bytes()[..], &[7, 0, 0, 0, 5, 0, 0, 0]].concat();
    let lsn = wal.record(0, 0, 0x90, &end_of_recovery);
    let (summary, kinds) = scan(&wal);
    let switch = |timeline, previous| EventKind::TimelineSwitch {
        timeline: TimelineId(timeline),
        previous: TimelineId(previous),
    };
    assert_eq!(kinds.len(), 5);
    assert_eq!((&kinds[2], &kinds[4]), (&switch(5, 4), &switch(7, 5)));
    assert_eq!((summary.events[3].lsn, summary.events[4].lsn), (lsn, lsn));
}

#[test]
fn a_flood_of_removals_is_counted_and_never_hides_other_events() {
    let mut wal = MadeUp::new(17);
    for xid in 1000..2500 {
        wal.ends(xid, 0x80, &[vec![4], files(1)].concat());
    }
    wal.record(0, 0, 0x70, &[&SEVEN.to_le_bytes()[..], b"here\0"].concat());
    let (summary, kinds) = scan(&wal);
    assert_eq!(kinds.len(), 3001, "everybody who listens hears all");
    assert_eq!((summary.events.len(), summary.removals_left_out), (1001, 500));
    assert!(
        matches!(&summary.events[1000].kind, EventKind::RestorePoint { name, .. } if name == "here")
    );
}

#[test]
fn a_record_given_up_after_a_crash_is_no_damage() {
    let mut wal = MadeUp::new(17);
    wal.ends(800, 0x00, &[]);
    wal.record(801, 10, 0, &[7; 30_000]);
    wal.abandon_last_record();
    wal.record(0, 0, 0xD0, &[0; 16]);
    wal.ends(802, 0x00, &[]);
    let (summary, kinds) = scan(&wal);
    assert_eq!((summary.records, kinds.len()), (3, 2));
}

#[test]
fn a_record_that_follows_another_than_it_says_is_damage() {
    let mut wal = MadeUp::new(17);
    wal.ends(800, 0x00, &[]);
    let missing = wal.ends(801, 0x00, &[]);
    // As if a page of an older use of the segment had survived.
    wal.starts.pop();
    wal.starts.push(Lsn(START.0 + 8));
    let lsn = wal.ends(802, 0x00, &[]);
    let (summary, events) = scan_from(wal.format(), START, &wal.bytes, &[]).unwrap();
    let expected = format!(
        "the record at {lsn} says that it follows the one at 1/23000008, but that one begins at {missing}"
    );
    assert_eq!((summary.damage, events.len()), (vec![expected], 3));
}

#[test]
fn a_wrong_crc_is_damage_and_its_record_tells_nothing() {
    let mut wal = MadeUp::new(17);
    wal.ends(800, 0x00, &[]);
    let bad = wal.ends(801, 0x00, &[]);
    wal.ends(802, 0x00, &[]);
    let at = bad.bytes_since(START) as usize + 26;
    wal.bytes[at] ^= 1;
    let (summary, events) = scan_from(wal.format(), START, &wal.bytes, &[]).unwrap();
    assert_eq!(summary.damage, [format!("the record at {bad} has a wrong CRC")]);
    assert_eq!((summary.records, events.len()), (3, 2));
}

#[test]
fn every_record_is_shown_with_its_header() {
    let mut wal = MadeUp::new(17);
    wal.ends(800, 0x00, &[]);
    wal.record(801, 10, 0x40, &[7; 30_000]);
    wal.ends(802, 0x00, &[]);
    let mut scanner = Scanner::new(wal.format(), START);
    let mut records = Vec::new();
    for chunk in wal.bytes.chunks(100) {
        let on_record = |record: &Record| records.push(*record);
        let mut summary = ScanSummary::default();
        scanner.feed_records(chunk, &mut summary, &mut |_| (), on_record).unwrap();
    }
    let starts: Vec<_> = records.iter().map(|record| record.lsn).collect();
    assert_eq!(starts, wal.starts);
    let long = records[1];
    assert_eq!((long.length, long.xid, long.previous), (24 + 5 + 30_000, 801, starts[0]));
    assert_eq!((long.info, long.resource_manager), (0x40, 10));
}

#[test]
fn a_scanner_that_began_later_has_not_seen_what_was_created() {
    let mut wal = MadeUp::new(17);
    wal.creates(801, 0);
    wal.record(0, 10, 0, &[7; 9000]);
    wal.ends(801, 0x80, &[vec![4], files(1)].concat());
    let created = |from: usize| {
        let start = START.advance(from as u64);
        let (summary, _) = scan_from(wal.format(), start, &wal.bytes[from..], &[]).unwrap();
        match summary.events[0].kind {
            EventKind::FilesRemoved { created, .. } => created,
            _ => panic!("{summary:?}"),
        }
    };
    assert_eq!((created(0), created(8192)), (1, 0));
}

/// WAL with a bit of everything.
fn mixed() -> MadeUp {
    let mut wal = MadeUp::new(17);
    for round in 0..6_u32 {
        let xid = 1000 + 10 * round;
        wal.record(xid, 10, 0, &vec![round as u8; 50 + 3000 * round as usize]);
        wal.creates(xid, 0);
        wal.creates(xid + 1, 0);
        wal.ends(xid, 0x80, &[vec![2 | 4, 1, xid + 1], files(700 * round)].concat());
        wal.ends(xid + 2, 0x20, &[]);
        wal.record(xid, 4, 0x20, &[[5_u8; 4], [1, 0, 0, 0], [9; 4]].concat());
        wal.record(0, 0, 0x70, &[&SEVEN.to_le_bytes()[..], b"name\0junk"].concat());
        if round == 2 {
            wal.record(xid, 10, 0, &[1; 20_000]);
            wal.abandon_last_record();
        }
    }
    let mut checkpoint = [0_u8; 88];
    checkpoint[8] = 5;
    wal.record(0, 0, 0x00, &checkpoint);
    wal
}

proptest! {
    #[test]
    fn chunks_of_any_size_say_the_same(chunks in prop::collection::vec(1_usize..9000, 1..20)) {
        let wal = mixed();
        let whole = scan_from(FORMAT, START, &wal.bytes, &[]);
        prop_assert_eq!(scan_from(FORMAT, START, &wal.bytes, &chunks), whole);
    }

    #[test]
    fn ranges_appended_say_what_the_whole_says(cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let wal = mixed();
        let (whole, _) = scan_from(FORMAT, START, &wal.bytes, &[]).unwrap();
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(wal.bytes.len())).collect();
        cuts.sort_unstable();
        cuts.push(wal.bytes.len());
        let mut scanner = Scanner::new(FORMAT, START);
        let (mut sum, mut at) = (ScanSummary::default(), 0);
        for cut in cuts {
            let mut part = ScanSummary::default();
            scanner.feed(&wal.bytes[at..cut], &mut part, &mut |_| ()).unwrap();
            prop_assert_eq!(part.open_record, scanner.open_record());
            sum.append(&part);
            at = cut;
        }
        prop_assert_eq!(sum, whole);
    }

    #[test]
    fn no_bytes_make_it_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..20_000),
        start in 0_u64..20_000,
        major in 12_u32..20,
    ) {
        let mut scanner = Scanner::new(WalFormat { major, ..FORMAT }, Lsn(start));
        let mut summary = ScanSummary::default();
        for chunk in bytes.chunks(777) {
            let _ = scanner.feed(chunk, &mut summary, &mut |_| ());
        }
    }

    // CASES 9: what the WAL of a healthy server never has must not go unseen.
    #[test]
    fn mutated_wal_never_panics_and_is_noticed(
        at: prop::sample::Index,
        value: u8,
        length in 1_usize..64,
        chunk in 1_usize..9000,
        major in 13_u32..=18,
    ) {
        let mut wal = mixed();
        wal.major = 17;
        let at = at.index(wal.bytes.len());
        let end = (at + length).min(wal.bytes.len());
        wal.bytes[at..end].fill(value);
        let one = scan_from(FORMAT, START, &wal.bytes, &[]);
        // However it is cut, and whether it fails or not, the same is found.
        prop_assert_eq!(&scan_from(FORMAT, START, &wal.bytes, &[chunk]), &one);
        let _ = scan_from(WalFormat { major, ..FORMAT }, START, &wal.bytes, &[chunk]);
        let good = scan_from(FORMAT, START, &mixed().bytes, &[]).unwrap();
        if let Ok((summary, events)) = one {
            // Where nothing is noted, what is told is right, as far as it goes.
            if summary.damage.is_empty() {
                prop_assert!(good.1.starts_with(&events));
            }
        }
    }

    #[test]
    fn any_decodable_body_is_read_without_panic(
        info: u8,
        manager in 0_u8..6,
        data in prop::collection::vec(any::<u8>(), 0..600),
        major in 13_u32..=18,
    ) {
        let mut wal = MadeUp::new(major);
        wal.record(9, manager, info, &data);
        wal.record(9, 10, 0, &[0; 9000]);
        let whole = scan_from(wal.format(), START, &wal.bytes, &[]).unwrap();
        prop_assert_eq!(scan_from(wal.format(), START, &wal.bytes, &[7]).unwrap(), whole);
    }
}
