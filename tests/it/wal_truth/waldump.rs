//! What the real `pg_waldump` of a major version says of WAL.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use pgkeep::wal::{Event, EventKind, Lsn, Record, RelationFile, TimelineId};

use crate::support::{Server, program, user_command};

/// The resource managers by number; the same in all majors.
const MANAGERS: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
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
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];
/// The most of a line that is kept: logical messages are printed byte by byte.
const LINE_LIMIT: u64 = 1 << 20;
/// How many removed files an event names.
const FILES_NAMED: usize = 16;

/// A record as both sides tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub lsn: Lsn,
    pub length: u32,
    pub xid: u32,
    pub previous: Lsn,
    pub manager: &'static str,
}

impl From<&Record> for Row {
    fn from(record: &Record) -> Row {
        Row {
            lsn: record.lsn,
            length: record.length,
            xid: record.xid,
            previous: record.previous,
            manager: MANAGERS.get(usize::from(record.resource_manager)).copied().unwrap_or("?"),
        }
    }
}

/// What `pg_waldump` printed: records, and the events in them as text.
#[derive(Debug, Default)]
pub struct Dump {
    pub rows: Vec<Row>,
    pub events: Vec<(Lsn, String)>,
    /// Its last words: why it stopped.
    pub end: String,
    created: BTreeMap<u32, u32>,
}

/// An event in the words of this test.
pub fn text_of(event: &Event) -> String {
    match &event.kind {
        EventKind::Commit { xid, time } => format!("commit {xid} {}", time.format("%F %T%.6f")),
        EventKind::Abort { xid, time } => format!("abort {xid} {}", time.format("%F %T%.6f")),
        EventKind::RestorePoint { name, .. } => format!("restore point {name}"),
        EventKind::Checkpoint { redo, shutdown } => format!("checkpoint {redo} {shutdown}"),
        EventKind::EndOfRecovery { .. } => "end of recovery".to_owned(),
        EventKind::TimelineSwitch { timeline, previous } => {
            format!("switch from {} to {}", previous.0, timeline.0)
        }
        EventKind::FilesRemoved { xid, removed, created, files, .. } => {
            format!("{xid} removed {removed} created {created}: {files:?}")
        }
        EventKind::DatabaseCreated { database, tablespace, template, .. } => {
            format!("database {database} in {tablespace} from {template:?}")
        }
        EventKind::DatabaseDropped { database, tablespaces, .. } => {
            format!("no database {database} in {tablespaces:?}")
        }
        EventKind::Unknown => "unknown".to_owned(),
    }
}

/// The program that reads the WAL of this server.
fn waldump(server: &Server) -> PathBuf {
    match server.has("pg_waldump") {
        true => server.bin("pg_waldump"),
        false => program(&format!("bin/pg_waldump-{}", server.major)),
    }
}

impl Dump {
    /// Reads on from a place to the end of the WAL.
    pub fn read(&mut self, server: &Server, folder: &Path, timeline: TimelineId, from: Lsn) {
        let mut command = user_command(waldump(server));
        command.arg("-p").arg(folder).args([
            "-t",
            &timeline.0.to_string(),
            "-s",
            &from.to_string(),
        ]);
        command.env("TZ", "UTC").current_dir("/tmp");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        loop {
            let mut line = Vec::new();
            if output.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line).unwrap() == 0 {
                break;
            }
            if line.last() != Some(&b'\n') {
                skip_line(&mut output);
            }
            let line = String::from_utf8_lossy(&line);
            if line.starts_with("rmgr: ") {
                self.line(line.trim_end());
            }
        }
        let done = child.wait_with_output().unwrap();
        self.end = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    }

    /// `rmgr: X len (rec/tot): A/B, tx: N, lsn: L, prev L, desc: TEXT`
    fn line(&mut self, line: &str) {
        let (head, text) = line.split_once(", desc: ").unwrap_or_else(|| panic!("{line}"));
        let words: Vec<&str> = head.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let after = |word: &str| {
            let at = words.iter().position(|other| *other == word);
            words[at.unwrap_or_else(|| panic!("no {word:?} in {line}")) + 1]
        };
        let lengths = &head[head.find("(rec/tot):").unwrap() + 10..head.find(", tx:").unwrap()];
        let total = lengths.split('/').nth(1).unwrap().trim();
        let manager = MANAGERS.iter().find(|name| **name == after("rmgr:"));
        let row = Row {
            lsn: after("lsn:").parse().unwrap(),
            length: total.parse().unwrap(),
            xid: after("tx:").parse().unwrap(),
            previous: after("prev").parse().unwrap(),
            manager: manager.unwrap_or_else(|| panic!("{line}")),
        };
        let events = self.events_of(&row, text);
        self.events.extend(events.into_iter().map(|event| (row.lsn, event)));
        self.rows.push(row);
    }

    fn events_of(&mut self, row: &Row, text: &str) -> Vec<String> {
        let (verb, rest) = text.split_once(' ').unwrap_or((text, ""));
        match (row.manager, verb) {
            ("Transaction", "COMMIT" | "ABORT" | "COMMIT_PREPARED" | "ABORT_PREPARED") => {
                self.transaction(row.xid, verb, rest)
            }
            ("Storage", "CREATE") => {
                let file = rest.split(' ').next().unwrap();
                if row.xid != 0 && !file.ends_with("_fsm") && !file.ends_with("_vm") {
                    *self.created.entry(row.xid).or_default() += 1;
                }
                vec![]
            }
            ("XLOG", "RESTORE_POINT") => vec![format!("restore point {rest}")],
            ("XLOG", "END_OF_RECOVERY") => {
                [vec!["end of recovery".to_owned()], switch(rest)].concat()
            }
            ("XLOG", "CHECKPOINT_ONLINE" | "CHECKPOINT_SHUTDOWN") => {
                let redo = rest.strip_prefix("redo ").unwrap().split(';').next().unwrap();
                let redo: Lsn = redo.parse().unwrap();
                let checkpoint = format!("checkpoint {redo} {}", verb == "CHECKPOINT_SHUTDOWN");
                [vec![checkpoint], switch(rest)].concat()
            }
            ("Database", "DROP") => {
                let folders: Vec<_> = rest.split(' ').filter(|word| *word != "dir").collect();
                let numbers = folders.iter().map(|folder| folder.split_once('/').unwrap());
                let tablespaces: Vec<u32> =
                    numbers.clone().map(|(tablespace, _)| tablespace.parse().unwrap()).collect();
                let (_, database) = folders[0].split_once('/').unwrap();
                vec![format!("no database {database} in {tablespaces:?}")]
            }
            ("Database", "CREATE" | "CREATE_FILE_COPY" | "CREATE_WAL_LOG") => {
                let folders: Vec<_> =
                    rest.split(' ').filter_map(|word| word.split_once('/')).collect();
                let template = (folders.len() == 2).then(|| folders[0].1.parse::<u32>().unwrap());
                let (tablespace, database) = folders.last().unwrap();
                vec![format!("database {database} in {tablespace} from {template:?}")]
            }
            _ => vec![],
        }
    }

    /// `[XID: ]TIME UTC[; rels: PATH ...][; subxacts: XID ...][; ...]`
    fn transaction(&mut self, xid: u32, verb: &str, rest: &str) -> Vec<String> {
        let (xid, rest) = match rest.split_once(": ") {
            Some((own, rest)) if own.bytes().all(|byte| byte.is_ascii_digit()) => {
                (own.parse().unwrap(), rest)
            }
            _ => (xid, rest),
        };
        let mut parts = rest.split(';');
        let time = parts.next().unwrap().strip_suffix(" UTC").unwrap();
        let (mut created, mut removed) = (self.created.remove(&xid).unwrap_or(0), vec![]);
        for part in parts {
            if let Some(subtransactions) = part.strip_prefix(" subxacts: ") {
                for xid in subtransactions.split(' ') {
                    created += self.created.remove(&xid.parse().unwrap()).unwrap_or(0);
                }
            } else if let Some(paths) = part.strip_prefix(" rels: ") {
                removed = paths.split(' ').map(relation_file).collect();
            }
        }
        if verb.starts_with("ABORT") {
            return vec![format!("abort {xid} {time}")];
        }
        let mut events = vec![format!("commit {xid} {time}")];
        if !removed.is_empty() {
            let count = removed.len();
            removed.truncate(FILES_NAMED);
            events.push(format!("{xid} removed {count} created {created}: {removed:?}"));
        }
        events
    }
}

/// `...; tli 2; prev tli 1; ...`, at any place.
fn switch(text: &str) -> Vec<String> {
    let number = |name: &str| {
        let part = text.split(';').find_map(|part| part.trim().strip_prefix(name));
        part.unwrap_or_else(|| panic!("no {name:?} in {text}")).to_owned()
    };
    let (timeline, previous) = (number("tli "), number("prev tli "));
    match timeline == previous {
        true => vec![],
        false => vec![format!("switch from {previous} to {timeline}")],
    }
}

/// `base/DB/N`, `global/N` or `pg_tblspc/TS/VERSION/DB/N`.
fn relation_file(path: &str) -> RelationFile {
    let parts: Vec<&str> = path.split('/').collect();
    let number = |at: usize| parts[at].parse().unwrap_or_else(|_| panic!("{path}"));
    match parts[0] {
        "base" => RelationFile { tablespace: 1663, database: number(1), number: number(2) },
        "global" => RelationFile { tablespace: 1664, database: 0, number: number(1) },
        _ => RelationFile { tablespace: number(1), database: number(3), number: number(4) },
    }
}

fn skip_line(output: &mut impl BufRead) {
    loop {
        let buffer = output.fill_buf().unwrap();
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(buffer.len(), |end| end + 1);
        output.consume(used);
        if end.is_some() || used == 0 {
            return;
        }
    }
}
