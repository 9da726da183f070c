//! Recovery settings: `postgresql.auto.conf` and the signal file
//! (`src/backend/access/transam/xlogrecovery.c`).

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::plan::Plan;
use super::target::{Target, TargetAction};

/// The settings of which PostgreSQL accepts only one that is not empty.
const TARGETS: [&str; 5] = [
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
];

/// Quotes a value of a configuration file.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// The settings that make PostgreSQL follow the plan. They come after whatever the file had, and
/// the last of a name counts: targets that were left over from an older recovery are emptied.
pub(super) fn recovery_settings(
    plan: &Plan,
    action: TargetAction,
    restore_command: &str,
    keep_archive_mode: bool,
) -> String {
    let mut text = format!("\n# Added by pgkeep: recovery to {}\n", plan.target);
    let mut set = |name: &str, value: &str| {
        let _ = writeln!(text, "{name} = {}", quoted(value));
    };
    set("restore_command", restore_command);
    set("recovery_target_timeline", &plan.timeline().to_string());
    let (name, value) = match &plan.recovery_target {
        // Without a target PostgreSQL would promote, whatever the action.
        Target::End => match plan.last_record.filter(|_| action != TargetAction::Promote) {
            Some(last) => ("recovery_target_lsn", last.to_string()),
            None => ("", String::new()),
        },
        Target::Immediate => ("recovery_target", "immediate".to_owned()),
        Target::Time(time) => {
            ("recovery_target_time", time.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string())
        }
        Target::Lsn(lsn) => ("recovery_target_lsn", lsn.to_string()),
        Target::Xid(xid) => ("recovery_target_xid", xid.to_string()),
        Target::Name(name) => ("recovery_target_name", name.clone()),
    };
    // The one that counts comes last: PostgreSQL complains of any other, even an empty one, that
    // follows it.
    for target in TARGETS.iter().filter(|target| **target != name) {
        set(target, "");
    }
    if !name.is_empty() {
        set(name, &value);
    }
    let exclusive = plan.exclusive && plan.recovery_target != Target::End;
    set("recovery_target_inclusive", if exclusive { "off" } else { "on" });
    set("recovery_target_action", action.as_str());
    set("recovery_end_command", "");
    set("archive_cleanup_command", "");
    if !keep_archive_mode {
        // A copy must not archive into its origin.
        set("archive_mode", "off");
    }
    text
}

/// Appends the settings and makes recovery the first thing that PostgreSQL does.
pub(super) fn write_recovery(folder: &Path, settings: &str) -> io::Result<()> {
    let file = folder.join("postgresql.auto.conf");
    let mut content = match fs::read(&file) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    if content.last().is_some_and(|last| *last != b'\n') {
        content.push(b'\n');
    }
    content.extend_from_slice(settings.as_bytes());
    fs::write(&file, content)?;
    fs::write(folder.join("recovery.signal"), b"")
}

/// Puts a word into a shell command.
pub(super) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    // PostgreSQL expands % itself.
    format!("'{}'", word.replace('\'', "'\\''").replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::FORMAT_VERSION;
    use crate::restore::PathPart;
    use crate::wal::{Lsn, SegmentSize, TimelineId};

    fn plan(target: Target) -> Plan {
        Plan {
            format: FORMAT_VERSION,
            cluster: "orders".into(),
            system_identifier: "1".into(),
            postgres_major: 17,
            wal_segment_size: SegmentSize::DEFAULT,
            backup: "20261123T071500Z-full-9c1e".parse().unwrap(),
            backup_regions: vec![],
            regions: vec![],
            last_record: None,
            reason: String::new(),
            path: vec![PathPart { timeline: TimelineId(3), begin: Lsn(0), end: Lsn(1) }],
            target: target.clone(),
            recovery_target: target,
            exclusive: true,
            data_bytes: 0,
            backup_bytes: 0,
            wal_bytes: 0,
            reaches: None,
            pieces: vec![],
        }
    }

    #[test]
    fn one_target_is_set_and_all_others_are_emptied() {
        let text = recovery_settings(
            &plan(Target::Name("it's".into())),
            TargetAction::Pause,
            "cmd %f",
            false,
        );
        assert!(text.contains("recovery_target_name = 'it''s'\n"), "{text}");
        assert!(text.contains("recovery_target_lsn = ''\n"));
        assert!(text.contains("recovery_target_timeline = '3'\n"));
        assert!(text.contains("recovery_target_inclusive = 'off'\n"));
        assert!(text.contains("recovery_target_action = 'pause'\n"));
        assert!(text.contains("archive_mode = 'off'\n"));
    }

    #[test]
    fn words_of_a_command_survive_the_shell_and_postgresql() {
        assert_eq!(shell_word("/usr/bin/pgkeep"), "/usr/bin/pgkeep");
        assert_eq!(shell_word("/a b/100%"), "'/a b/100%%'");
        assert_eq!(shell_word("it's"), "'it'\\''s'");
    }
}
