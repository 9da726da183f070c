//! `backup_manifest` of a restored directory, for PostgreSQL's own `pg_verifybackup`.
//!
//! The server's manifest of the backup is stored with it. Its entries are taken over for every file
//! that the restore brings as the server sent it; files that it does not know (they were put
//! together from several backups, or are this program's own) are read once for their checksum.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::repo::{FileIndex, FileKind};

/// The manifest's name in the data directory.
pub(super) const MANIFEST: &str = "backup_manifest";
/// Bytes that are read together.
const CHUNK: usize = 1 << 20;

/// A manifest as far as it is taken over.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    #[serde(rename = "Files")]
    files: Vec<Entry>,
    #[serde(rename = "WAL-Ranges")]
    wal_ranges: Vec<serde_json::Value>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Missing where the path is no UTF-8: then it stands there encoded.
    #[serde(rename = "Path", default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Last-Modified")]
    last_modified: String,
    #[serde(rename = "Checksum-Algorithm", default, skip_serializing_if = "Option::is_none")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum", default, skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
}

impl Manifest {
    /// Reads what a server wrote.
    pub(super) fn parse(bytes: &[u8]) -> Result<Manifest, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// Writes the manifest of `folder`, which holds the files of an index that `wanted` accepts, and
    /// `own` files.
    pub(super) fn write(
        self,
        folder: &Path,
        index: &FileIndex,
        wanted: impl Fn(&str) -> bool,
        own: &[&str],
    ) -> io::Result<()> {
        let mut output = Output::create(&folder.join(MANIFEST))?;
        output.put(&format!("{{ \"PostgreSQL-Backup-Manifest-Version\": {},\n", self.version))?;
        if let Some(system) = self.system_identifier {
            output.put(&format!("\"System-Identifier\": {system},\n"))?;
        }
        output.put("\"Files\": [")?;
        let mut is_listed = vec![false; index.files.len()];
        let mut list = List { output, is_first: true };
        for entry in &self.files {
            let Some(path) = entry.path.as_deref() else { continue };
            let found = index.files.binary_search_by(|file| file.path.as_str().cmp(path));
            let Ok(number) = found else { continue };
            let is_same = matches!(index.files[number].kind, FileKind::File { size, .. } if size == entry.size);
            if is_same && wanted(path) && !std::mem::replace(&mut is_listed[number], true) {
                list.entry(entry)?;
            }
        }
        for (file, is_listed) in index.files.iter().zip(is_listed) {
            let FileKind::File { mtime, .. } = file.kind else { continue };
            if !is_listed && wanted(&file.path) {
                list.entry(&read_entry(folder, &file.path, Some(mtime))?)?;
            }
        }
        for path in own {
            list.entry(&read_entry(folder, path, None)?)?;
        }
        let mut output = list.output;
        output.put("\n],\n\"WAL-Ranges\": [")?;
        let mut list = List { output, is_first: true };
        for range in &self.wal_ranges {
            list.entry(range)?;
        }
        list.output.put("\n],\n")?;
        list.output.finish()
    }
}

/// Computes the entry of a file on disk.
fn read_entry(folder: &Path, path: &str, mtime: Option<u64>) -> io::Result<Entry> {
    let place = folder.join(path);
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", place.display()));
    let mut file = File::open(&place).map_err(named)?;
    let mut buffer = vec![0; CHUNK];
    let (mut size, mut checksum) = (0, 0);
    loop {
        let count = file.read(&mut buffer).map_err(named)?;
        if count == 0 {
            break;
        }
        size += count as u64;
        checksum = crc32c::crc32c_append(checksum, &buffer[..count]);
    }
    let modified = match mtime.and_then(|seconds| i64::try_from(seconds).ok()) {
        Some(seconds) => DateTime::from_timestamp(seconds, 0),
        None => Some(fs::metadata(&place)?.modified()?.into()),
    };
    Ok(Entry {
        path: Some(path.to_owned()),
        size,
        last_modified: modified.unwrap_or_default().format("%Y-%m-%d %H:%M:%S GMT").to_string(),
        algorithm: Some("CRC32C".into()),
        // The bytes as they lie in the server's memory.
        checksum: Some(hex(&checksum.to_le_bytes())),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The file being written, and the hash of what it has so far.
struct Output {
    file: BufWriter<File>,
    hash: Sha256,
}

impl Output {
    fn create(path: &Path) -> io::Result<Output> {
        // Other names of an old one keep their content.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Output {
            file: BufWriter::new(super::directory::create_private(path)?),
            hash: Sha256::new(),
        })
    }

    fn put(&mut self, text: &str) -> io::Result<()> {
        self.hash.update(text.as_bytes());
        self.file.write_all(text.as_bytes())
    }

    /// The last line is the hash of all lines before it.
    fn finish(mut self) -> io::Result<()> {
        let hash = hex(&self.hash.finalize());
        writeln!(self.file, "\"Manifest-Checksum\": \"{hash}\"}}")?;
        self.file.flush()
    }
}

/// A list in JSON, one entry a line.
struct List {
    output: Output,
    is_first: bool,
}

impl List {
    fn entry(&mut self, entry: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(entry)?;
        self.output.put(if std::mem::take(&mut self.is_first) { "\n" } else { ",\n" })?;
        self.output.put(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::FileEntry;

    const STORED: &str = r#"{ "PostgreSQL-Backup-Manifest-Version": 2,
"System-Identifier": 7000000000000000001,
"Files": [
{ "Path": "base/5/1", "Size": 3, "Last-Modified": "2026-11-24 00:00:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "00112233" },
{ "Path": "base/5/INCREMENTAL.2", "Size": 3, "Last-Modified": "2026-11-24 00:00:00 GMT" },
{ "Path": "backup_label", "Size": 9, "Last-Modified": "2026-11-24 00:00:00 GMT" },
{ "Path": "tablespace_map", "Size": 1, "Last-Modified": "2026-11-24 00:00:00 GMT" },
{ "Encoded-Path": "ff", "Size": 1, "Last-Modified": "2026-11-24 00:00:00 GMT" }
],
"WAL-Ranges": [
{ "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000120" }
],
"Manifest-Checksum": "00"}
"#;

    #[test]
    fn known_entries_are_taken_over_and_others_are_computed() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("base/5")).unwrap();
        let file = |path: &str, content: &str| {
            fs::write(folder.path().join(path), content).unwrap();
            let size = content.len() as u64;
            let kind = FileKind::File { mtime: 0, size, extents: Vec::new() };
            FileEntry { path: path.into(), mode: 0o600, kind }
        };
        let files = vec![
            file("backup_label", "changed"),
            file("base/5/1", "abc"),
            file("base/5/2", "123456789"),
            file("tablespace_map", "x"),
        ];
        file("plan", "own");
        let index = FileIndex { packs: Vec::new(), files };
        let manifest = Manifest::parse(STORED.as_bytes()).unwrap();
        manifest.write(folder.path(), &index, |path| path != "tablespace_map", &["plan"]).unwrap();

        let text = fs::read_to_string(folder.path().join(MANIFEST)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let listed: Vec<_> = json["Files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| (entry["Path"].as_str().unwrap(), entry["Size"].as_u64().unwrap()))
            .collect();
        assert_eq!(listed, [("base/5/1", 3), ("backup_label", 7), ("base/5/2", 9), ("plan", 3)]);
        assert_eq!(json["Files"][0]["Checksum"], "00112233");
        // The check value of CRC-32C, e3069283, as a little-endian number.
        assert_eq!(json["Files"][2]["Checksum"], "839206e3");
        assert_eq!(json["Files"][2]["Last-Modified"], "1970-01-01 00:00:00 GMT");
        assert_eq!(json["System-Identifier"], 7_000_000_000_000_000_001_u64);
        assert_eq!(json["WAL-Ranges"][0]["Start-LSN"], "0/2000028");
        let (body, last) = text.trim_end().rsplit_once('\n').unwrap();
        let hash = hex(&Sha256::digest(format!("{body}\n").as_bytes()));
        assert_eq!(last, format!("\"Manifest-Checksum\": \"{hash}\"}}"));
    }
}
