//! Timeline histories: what the server has, what the archive has, and whether they fit.
//!
//! Every history file of every known server is stored, not only the ancestry of the current
//! timeline: a recovery looks for the newest timeline number by number and stops at the first hole.
//! Two contents for one number are two promotions: reported, and never mixed.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::ArchiveError;
use crate::pg::{Connection, PgError};
use crate::repo::{ContentKey, ShortHash, TIMELINE_FOLDER, parse_history_name};
use crate::store::{Region, ask_all, list_timelines};
use crate::wal::{TimelineHistory, TimelineId};

/// History files, raw.
pub(super) type Histories = Vec<(TimelineId, Bytes)>;

/// Reads every history file that a server has, from timeline 2 on, and the ancestry of `current`.
///
/// # Errors
/// When the connection breaks, or the server's own history cannot be read.
pub(super) async fn read_histories(
    connection: &mut Connection,
    current: TimelineId,
) -> Result<(TimelineHistory, Histories), ArchiveError> {
    let mut history = TimelineHistory::without_ancestors(current);
    let mut all = Vec::new();
    for number in 2..=current.0 {
        let timeline = TimelineId(number);
        let Some(content) = connection.timeline_history(timeline).await? else { continue };
        if timeline == current {
            history = TimelineHistory::parse(timeline, &content)
                .map_err(|error| PgError::Protocol(error.to_string()))?;
        }
        all.push((timeline, content));
    }
    Ok((history, all))
}

/// The timelines that the readable regions know.
#[derive(Debug, Default)]
pub(super) struct KnownTimelines {
    /// History files, by the hashes of their contents.
    histories: BTreeMap<TimelineId, BTreeSet<ShortHash>>,
    /// Timelines with WAL.
    with_wal: BTreeSet<TimelineId>,
}

impl KnownTimelines {
    /// Asks all regions; one that is silent is asked again by its uploader.
    pub(super) async fn read(regions: &[Region]) -> KnownTimelines {
        let answers = ask_all(regions, |region| async move {
            let listed = region.list(TIMELINE_FOLDER).await?;
            let histories: Vec<_> =
                listed.iter().filter_map(|object| parse_history_name(object.file_name())).collect();
            Ok((histories, list_timelines(&region).await?))
        });
        let mut known = KnownTimelines::default();
        for (histories, timelines) in answers.await.into_iter().flatten() {
            for (timeline, hash) in histories {
                known.histories.entry(timeline).or_default().insert(hash);
            }
            known.with_wal.extend(timelines);
        }
        known
    }

    /// What one region knows; `None` when it cannot be asked.
    pub(super) async fn read_one(region: &Region) -> Option<KnownTimelines> {
        let histories = region.list(TIMELINE_FOLDER).await.ok()?;
        let mut known = KnownTimelines::default();
        for (timeline, hash) in
            histories.iter().filter_map(|object| parse_history_name(object.file_name()))
        {
            known.histories.entry(timeline).or_default().insert(hash);
        }
        Some(known)
    }

    /// Whether the archive has this number with another content only.
    pub(super) fn contradicts(&self, timeline: TimelineId, hash: ShortHash) -> bool {
        self.histories.get(&timeline).is_some_and(|hashes| !hashes.contains(&hash))
    }

    /// Whether the archive has this very file.
    pub(super) fn has(&self, timeline: TimelineId, hash: ShortHash) -> bool {
        self.histories.get(&timeline).is_some_and(|hashes| hashes.contains(&hash))
    }

    /// Checks that the server's timelines are the archive's; gives those of its files that may be
    /// stored.
    ///
    /// # Errors
    /// When its own path differs from the archive's, or the archive has gone on with a newer
    /// timeline than that of a server which takes writes.
    pub(super) fn check(
        &self,
        history: &TimelineHistory,
        files: Histories,
        key: &ContentKey,
        takes_writes: bool,
    ) -> Result<Histories, ArchiveError> {
        let mut fitting = Vec::new();
        for (timeline, content) in files {
            if !self.contradicts(timeline, key.hash(&content).short()) {
                fitting.push((timeline, content));
                continue;
            }
            let is_own = history.path().iter().any(|(on_path, _, _)| *on_path == timeline);
            if is_own {
                return Err(ArchiveError::Diverged {
                    timeline,
                    problem: format!(
                        "the archive has another history file of timeline {timeline}: two servers were promoted to the same number"
                    ),
                });
            }
            tracing::error!(%timeline, "the server has another history file of this timeline than the archive: two servers were promoted to it. It is not stored");
        }
        let newest = self.with_wal.last().copied();
        match newest {
            Some(newest) if newest > history.timeline && takes_writes => {
                Err(ArchiveError::Diverged {
                    timeline: history.timeline,
                    problem: format!(
                        "the archive has gone on with timeline {newest}, and this server takes writes on timeline {}: an old primary that came back? If it is meant to go on, start once with --accept-timeline",
                        history.timeline
                    ),
                })
            }
            _ => Ok(fitting),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(histories: &[(u32, &[u8])], with_wal: &[u32]) -> KnownTimelines {
        let key = ContentKey::for_system(7);
        let mut known = KnownTimelines::default();
        for (number, content) in histories {
            let hashes = known.histories.entry(TimelineId(*number)).or_default();
            hashes.insert(key.hash(content).short());
        }
        known.with_wal = with_wal.iter().map(|number| TimelineId(*number)).collect();
        known
    }

    fn check(
        known: &KnownTimelines,
        current: u32,
        files: &[(u32, &'static [u8])],
        takes_writes: bool,
    ) -> Result<Vec<u32>, String> {
        let key = ContentKey::for_system(7);
        let current = TimelineId(current);
        let own = files.iter().find(|(number, _)| *number == current.0);
        let history = match own {
            Some((_, content)) => TimelineHistory::parse(current, content).unwrap(),
            None => TimelineHistory::without_ancestors(current),
        };
        let files =
            files.iter().map(|(number, c)| (TimelineId(*number), Bytes::from_static(c))).collect();
        match known.check(&history, files, &key, takes_writes) {
            Ok(fitting) => Ok(fitting.iter().map(|(timeline, _)| timeline.0).collect()),
            Err(error) => Err(error.to_string()),
        }
    }

    const TO_TWO: &[u8] = b"1\t0/3000000\tno recovery target specified\n";
    const OTHER_TWO: &[u8] = b"1\t0/4000000\tno recovery target specified\n";
    const TO_THREE: &[u8] = b"1\t0/3000000\twhy\n2\t0/5000000\twhy\n";
    const TO_FOUR_FROM_TWO: &[u8] = b"1\t0/3000000\twhy\n2\t0/6000000\twhy\n";

    #[test]
    fn every_file_of_the_server_is_stored_also_those_of_other_branches() {
        let known = known(&[(2, TO_TWO)], &[1, 2]);
        let files = [(2, TO_TWO), (3, TO_THREE), (4, TO_FOUR_FROM_TWO)];
        assert_eq!(check(&known, 4, &files, true), Ok(vec![2, 3, 4]));
    }

    // CASES 14: two promotions chose the same number.
    #[test]
    fn another_history_of_the_same_number_is_refused() {
        let known = known(&[(2, TO_TWO)], &[1, 2]);
        let told = check(&known, 2, &[(2, OTHER_TWO)], true).unwrap_err();
        assert!(told.contains("two servers were promoted"), "{told}");
        // On a branch that the server is not on, it is left out.
        let files = [(2, TO_TWO), (3, TO_THREE), (4, TO_FOUR_FROM_TWO)];
        let known = super::tests::known(&[(2, TO_TWO), (3, OTHER_TWO)], &[1, 2]);
        assert_eq!(check(&known, 4, &files, true), Ok(vec![2, 4]));
    }

    // CASES 15: an old primary that comes back.
    #[test]
    fn a_server_on_an_older_timeline_than_the_archives_wal_is_refused() {
        let known = known(&[(2, TO_TWO)], &[1, 2]);
        let told = check(&known, 1, &[], true).unwrap_err();
        assert!(told.contains("--accept-timeline"), "{told}");
        assert_eq!(check(&known, 1, &[], false), Ok(vec![]), "a standby may be behind");
        // A promotion that was thrown away leaves a file and no WAL.
        let known = super::tests::known(&[(2, TO_TWO)], &[1]);
        assert_eq!(check(&known, 1, &[], true), Ok(vec![]));
    }
}
