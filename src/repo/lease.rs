//! `lease/<id>.json`: somebody is at work on a backup. What a lease names is not removed before the
//! lease expires.
//!
//! A lease is never changed: a renewal is another object, and the ones before the last are removed
//! again. So a listing that is made at any moment shows one that is in force. A process that dies
//! renews nothing, and its last lease expires by itself.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::BackupLabel;

/// How long a lease is in force from when it was written.
pub const LEASE_LIFETIME: TimeDelta = TimeDelta::minutes(15);

/// What somebody is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseKind {
    /// Taking a backup.
    Backup,
    /// Something that this version does not know. Its lease counts all the same.
    #[serde(other)]
    Other,
}

/// What a lease says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Format version.
    pub format: u32,
    /// What is being done.
    #[serde(rename = "type")]
    pub kind: LeaseKind,
    /// The backup that is written, or read.
    pub label: BackupLabel,
    /// The backup that it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupLabel>,
    /// When it was written, by the server's clock.
    pub written: DateTime<Utc>,
    /// Until when it is in force, by the same clock.
    pub expires: DateTime<Utc>,
}

impl Lease {
    /// Whether it is in force at `now`.
    pub fn is_in_force(&self, now: DateTime<Utc>) -> bool {
        now < self.expires
    }

    /// Whether it names a backup, as the one at work or as its parent.
    pub fn names(&self, label: &BackupLabel) -> bool {
        self.label == *label || self.parent.as_ref() == Some(label)
    }

    /// Whether it expired so long ago that nobody can mean it any more.
    pub fn is_forgotten(&self, now: DateTime<Utc>) -> bool {
        now - LEASE_LIFETIME >= self.expires
    }
}

/// Whether the folder of a backup, in which no `backup.json` is, was left behind by a process that is
/// dead: it is old enough to have a lease, and no lease in force names it.
pub fn is_abandoned(label: &BackupLabel, leases: &[Lease], now: DateTime<Utc>) -> bool {
    label.time() + LEASE_LIFETIME <= now
        && !leases.iter().any(|lease| lease.is_in_force(now) && lease.names(label))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::BackupType;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    fn label(seconds: i64) -> BackupLabel {
        BackupLabel::new(at(seconds), BackupType::Full, 0x9c1e)
    }

    fn lease(of: &BackupLabel, parent: Option<&BackupLabel>, written: i64) -> Lease {
        Lease {
            format: 1,
            kind: LeaseKind::Backup,
            label: of.clone(),
            parent: parent.cloned(),
            written: at(written),
            expires: at(written) + LEASE_LIFETIME,
        }
    }

    #[test]
    fn a_lease_reads_as_the_format_says() {
        let text = r#"{
            "format": 1, "type": "backup",
            "label": "20261123T071500Z-incr-9c1e", "parent": "20261122T030000Z-full-1a2b",
            "written": "2026-11-23T07:20:00Z", "expires": "2026-11-23T07:35:00Z"
        }"#;
        let lease: Lease = serde_json::from_str(text).unwrap();
        assert_eq!(lease.kind, LeaseKind::Backup);
        assert_eq!(lease.expires - lease.written, LEASE_LIFETIME);
        assert!(lease.names(&"20261122T030000Z-full-1a2b".parse().unwrap()));
        assert!(!lease.names(&"20261122T030000Z-full-ffff".parse().unwrap()));
        let again = serde_json::to_string(&lease).unwrap();
        assert_eq!(serde_json::from_str::<Lease>(&again).unwrap(), lease);
    }

    // A later version's lease must protect as well.
    #[test]
    fn a_lease_of_a_type_that_is_not_known_counts() {
        let text = r#"{
            "format": 1, "type": "restore", "pid": 17, "label": "20261123T071500Z-full-9c1e",
            "written": "2026-11-23T07:20:00Z", "expires": "2026-11-23T07:35:00Z"
        }"#;
        let lease: Lease = serde_json::from_str(text).unwrap();
        assert_eq!(lease.kind, LeaseKind::Other);
        assert!(!is_abandoned(
            &lease.label,
            std::slice::from_ref(&lease),
            "2026-11-23T07:34:59Z".parse().unwrap()
        ));
        assert!(is_abandoned(
            &lease.label,
            std::slice::from_ref(&lease),
            "2026-11-23T07:35:00Z".parse().unwrap()
        ));
    }

    #[test]
    fn a_backup_that_just_began_is_nobodys_leftover() {
        let young = label(0);
        assert!(!is_abandoned(&young, &[], at(0)));
        assert!(!is_abandoned(&young, &[], at(899)));
        assert!(is_abandoned(&young, &[], at(900)));
    }

    proptest! {
        // Renewed every five minutes, seen by whoever looks at any moment, parents included.
        #[test]
        fn what_is_renewed_in_time_is_never_abandoned(
            length in 0_i64..200_000,
            when in 0.0_f64..1.0,
            kept in 1_usize..3,
        ) {
            let (own, parent) = (label(0), label(-1_000_000));
            let renewals: Vec<Lease> =
                (0..=length / 300).map(|n| lease(&own, Some(&parent), n * 300)).collect();
            let now = (length as f64 * when) as i64;
            let written = (now / 300) as usize + 1;
            let seen = &renewals[written.saturating_sub(kept)..written];
            prop_assert!(!is_abandoned(&own, seen, at(now)));
            prop_assert!(!is_abandoned(&parent, seen, at(now)));
            prop_assert!(seen.iter().all(|lease| !lease.is_forgotten(at(now))));
        }

        #[test]
        fn what_is_not_renewed_any_more_is_abandoned_after_the_lifetime(died in 0_i64..100_000) {
            let own = label(0);
            let last = lease(&own, None, died);
            let end = died + LEASE_LIFETIME.num_seconds();
            prop_assert!(!is_abandoned(&own, std::slice::from_ref(&last), at(end - 1)));
            prop_assert!(is_abandoned(&own, std::slice::from_ref(&last), at(end)));
        }
    }
}
