//! Tests of what is due next.

use proptest::prelude::*;

use super::*;

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn schedules(full: &str, differential: &str, incremental: &str) -> Schedules {
    let one = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
    Schedules { full: one(full), differential: one(differential), incremental: one(incremental) }
}

fn weekly() -> Schedules {
    schedules("0 3 * * 0", "", "0 3 * * 1-6")
}

fn done(backups: &[(BackupType, &str)]) -> Done {
    let mut done = Done::default();
    for (kind, time) in backups {
        done.add(*kind, at(time));
    }
    done
}

fn next(schedules: &Schedules, done: &Done, now: &str) -> (BackupType, String) {
    let due = schedules.next(done, at(now)).unwrap();
    (due.kind, due.at.format("%a %d %H:%M").to_string())
}

const FULL: BackupType = BackupType::Full;
const DIFFERENTIAL: BackupType = BackupType::Differential;
const INCREMENTAL: BackupType = BackupType::Incremental;

// 2026-11-22 was a Sunday.
#[test]
fn the_earliest_comes_next() {
    let done = done(&[(FULL, "2026-11-22T03:00:01Z")]);
    assert_eq!(
        next(&weekly(), &done, "2026-11-22T04:00:00Z"),
        (INCREMENTAL, "Mon 23 03:00".into())
    );
    let done = self::done(&[(FULL, "2026-11-22T03:00:01Z"), (INCREMENTAL, "2026-11-28T03:00:01Z")]);
    assert_eq!(next(&weekly(), &done, "2026-11-28T04:00:00Z"), (FULL, "Sun 29 03:00".into()));
}

#[test]
fn of_two_at_one_moment_the_larger_wins_and_does_for_both() {
    let all = schedules("0 3 * * 0", "0 3 * * 0,3", "0 3 * * *");
    let done = done(&[
        (FULL, "2026-11-22T03:00:01Z"),
        (INCREMENTAL, "2026-11-28T03:00:01Z"),
        (DIFFERENTIAL, "2026-11-25T03:00:01Z"),
    ]);
    assert_eq!(next(&all, &done, "2026-11-28T04:00:00Z"), (FULL, "Sun 29 03:00".into()));
    let mut done = done;
    assert_eq!(next(&all, &done, "2026-11-29T03:00:00Z"), (FULL, "Sun 29 03:00".into()));
    done.add(FULL, at("2026-11-29T03:00:00Z"));
    assert_eq!(next(&all, &done, "2026-11-29T03:30:00Z"), (INCREMENTAL, "Mon 30 03:00".into()));
    done.add(INCREMENTAL, at("2026-11-30T03:00:00Z"));
    done.add(INCREMENTAL, at("2026-12-01T03:00:00Z"));
    assert_eq!(next(&all, &done, "2026-12-02T03:00:00Z"), (DIFFERENTIAL, "Wed 02 03:00".into()));
}

#[test]
fn what_was_missed_is_made_up_for_once() {
    // Nobody ran from Monday to Thursday.
    let mut done = done(&[(FULL, "2026-11-22T03:00:01Z")]);
    assert_eq!(
        next(&weekly(), &done, "2026-11-26T12:00:00Z"),
        (INCREMENTAL, "Thu 26 03:00".into())
    );
    done.add(INCREMENTAL, at("2026-11-26T12:00:05Z"));
    assert_eq!(
        next(&weekly(), &done, "2026-11-26T12:10:00Z"),
        (INCREMENTAL, "Fri 27 03:00".into())
    );
}

#[test]
fn a_full_backup_that_was_missed_is_not_replaced_by_small_ones() {
    let done = done(&[(FULL, "2026-11-15T03:00:01Z"), (INCREMENTAL, "2026-11-24T03:00:00Z")]);
    assert_eq!(next(&weekly(), &done, "2026-11-24T03:10:00Z"), (FULL, "Sun 22 03:00".into()));
}

#[test]
fn an_archive_without_backups_gets_its_first_at_once() {
    let due = next(&weekly(), &Done::default(), "2026-11-24T12:00:00Z");
    assert_eq!(due, (FULL, "Sun 22 03:00".into()));
}

#[test]
fn without_a_schedule_nothing_is_due() {
    assert!(Schedules::default().is_empty());
    assert_eq!(Schedules::default().next(&Done::default(), Utc::now()), None);
}

fn any_schedules() -> impl Strategy<Value = Schedules> {
    let one = || {
        prop::sample::select(vec![
            "",
            "0 3 * * 0",
            "0 3 * * *",
            "*/20 * * * *",
            "15 */6 * * 1-5",
            "0 0 1 * *",
        ])
    };
    (one(), one(), one())
        .prop_map(|(full, differential, incremental)| schedules(full, differential, incremental))
}

fn schedule_of(schedules: &Schedules, kind: BackupType) -> Option<&Schedule> {
    match kind {
        FULL => schedules.full.as_ref(),
        DIFFERENTIAL => schedules.differential.as_ref(),
        INCREMENTAL => schedules.incremental.as_ref(),
    }
}

const KINDS: [BackupType; 3] = [FULL, DIFFERENTIAL, INCREMENTAL];

proptest! {
    // However long it was away: at most one backup of each type, and then nothing until the next
    // moment of a schedule.
    #[test]
    fn nothing_ever_piles_up(
        schedules in any_schedules(),
        now in 1_790_000_000_i64..1_830_000_000,
        before in prop::collection::vec((0_usize..3, 0_i64..5_000_000), 0..4),
    ) {
        let now = DateTime::from_timestamp(now, 0).unwrap();
        let mut done = Done::default();
        for (kind, ago) in before {
            done.add(KINDS[kind], now - TimeDelta::seconds(ago));
        }
        let mut taken = Vec::new();
        while let Some(due) = schedules.next(&done, now).filter(|due| due.at <= now) {
            // The larger first: no smaller one is taken that a larger one would do for.
            prop_assert!(taken.is_empty(), "{due:?} after {taken:?}");
            let schedule = schedule_of(&schedules, due.kind).unwrap();
            prop_assert_eq!(schedule.last_until(now), Some(due.at));
            taken.push(due);
            done.add(due.kind, now);
        }
        if let Some(next) = schedules.next(&done, now) {
            let first = KINDS.iter().filter_map(|kind| schedule_of(&schedules, *kind)?.next_after(now)).min();
            prop_assert_eq!(Some(next.at), first);
            let larger = KINDS.iter().take_while(|kind| **kind != next.kind);
            for kind in larger {
                let same = schedule_of(&schedules, *kind).and_then(|s| s.next_after(now));
                prop_assert_ne!(same, Some(next.at));
            }
        } else {
            prop_assert!(schedules.is_empty());
        }
    }
}
