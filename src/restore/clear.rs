//! Removes what does not belong from a directory that is restored into, before anything is written.
//!
//! Links that lead out of the directory are removed, not followed, but for `pg_wal` and the
//! tablespaces of the backup. What lies behind any other link stays.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::occupant::PG_CONTROL;
use super::plan::PLAN_FILE;
use crate::repo::{FileIndex, FileKind};

/// Where links to tablespaces are.
const TABLESPACES: &str = "pg_tblspc";

/// What belongs into the directory.
pub(super) struct Belongings<'a> {
    /// Whether each path is a folder.
    is_folder: HashMap<&'a str, bool>,
    /// Where tablespaces are, by the path of their links.
    tablespaces: BTreeMap<String, &'a Path>,
    /// The folders in tablespaces that are of this version begin so.
    version: String,
}

impl<'a> Belongings<'a> {
    /// The paths of an index that `wanted` accepts.
    pub(super) fn new(
        index: &'a FileIndex,
        wanted: impl Fn(&str) -> bool,
        places: &'a [(u32, PathBuf)],
        major: u32,
    ) -> Belongings<'a> {
        let mut is_folder = HashMap::with_capacity(index.files.len());
        for file in index.files.iter().filter(|file| wanted(&file.path)) {
            is_folder.insert(file.path.as_str(), file.kind == FileKind::Directory);
            let mut path = file.path.as_str();
            while let Some((parent, _)) = path.rsplit_once('/') {
                if is_folder.insert(parent, true).is_some() {
                    break;
                }
                path = parent;
            }
        }
        let link =
            |(oid, place): &'a (u32, PathBuf)| (format!("{TABLESPACES}/{oid}"), place.as_path());
        Belongings {
            is_folder,
            tablespaces: places.iter().map(link).collect(),
            version: format!("PG_{major}_"),
        }
    }
}

/// Makes a directory unable to start: until `pg_control` is there again.
pub(super) fn remove_control(folder: &Path) -> io::Result<()> {
    let control = folder.join(PG_CONTROL);
    match fs::remove_file(&control) {
        Ok(()) => control.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what does not belong; how many files, links and folders.
pub(super) fn clear(folder: &Path, belongings: &Belongings<'_>) -> io::Result<u64> {
    let mut removed = 0;
    clear_below(folder, "", belongings, &mut removed)?;
    Ok(removed)
}

fn clear_below(
    folder: &Path,
    relative: &str,
    belongings: &Belongings<'_>,
    removed: &mut u64,
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let metadata = entry.metadata()?;
        let Some(name) = name.to_str() else {
            remove(&path, metadata.is_dir(), removed)?;
            continue;
        };
        let inside = match relative {
            "" => name.to_owned(),
            _ => format!("{relative}/{name}"),
        };
        match fate(&inside, relative, name, &metadata, &path, belongings) {
            Fate::Stays => {}
            Fate::Enter => clear_below(&path, &inside, belongings, removed)?,
            Fate::Goes => remove(&path, metadata.is_dir(), removed)?,
        }
    }
    Ok(())
}

/// What becomes of an entry.
enum Fate {
    Stays,
    Enter,
    Goes,
}

fn fate(
    inside: &str,
    relative: &str,
    name: &str,
    metadata: &fs::Metadata,
    path: &Path,
    belongings: &Belongings<'_>,
) -> Fate {
    if inside == PLAN_FILE || (name == "lost+found" && metadata.is_dir()) {
        return Fate::Stays;
    }
    // The folder of a tablespace may hold those of other versions.
    if belongings.tablespaces.contains_key(relative) && !name.starts_with(&belongings.version) {
        return Fate::Stays;
    }
    let belongs = belongings.is_folder.get(inside);
    if metadata.is_symlink() {
        let target = fs::read_link(path).unwrap_or_default();
        let place = belongings.tablespaces.get(inside);
        return match place {
            Some(place) if *place == target => Fate::Enter,
            None if inside == "pg_wal" && path.is_dir() => Fate::Enter,
            _ => {
                if relative == TABLESPACES {
                    tracing::warn!(
                        link = inside,
                        "a link to a tablespace is removed; what lies in {} stays",
                        target.display()
                    );
                }
                Fate::Goes
            }
        };
    }
    // What should be a tablespace's link is none.
    if belongings.tablespaces.contains_key(inside) {
        return Fate::Goes;
    }
    match belongs {
        Some(true) if metadata.is_dir() => Fate::Enter,
        // Another name of the same file must keep its content.
        Some(false) if metadata.is_file() && metadata.nlink() == 1 => Fate::Stays,
        _ => Fate::Goes,
    }
}

fn remove(path: &Path, is_folder: bool, removed: &mut u64) -> io::Result<()> {
    *removed += 1;
    let outcome = match is_folder {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    outcome.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::repo::FileEntry;

    fn index(files: &[&str], folders: &[&str]) -> FileIndex {
        let entry = |path: &str, kind| FileEntry { path: path.into(), mode: 0o600, kind };
        let file = || FileKind::File { mtime: 0, size: 0, extents: Vec::new() };
        let files = files.iter().map(|path| entry(path, file()));
        let folders = folders.iter().map(|path| entry(path, FileKind::Directory));
        FileIndex { packs: Vec::new(), files: files.chain(folders).collect() }
    }

    fn write(root: &Path, path: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "content").unwrap();
    }

    #[test]
    fn only_what_belongs_stays_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let (data, space, other, wal) = (
            root.path().join("data"),
            root.path().join("space"),
            root.path().join("other"),
            root.path().join("wal"),
        );
        for path in ["base/5/1", "base/5/2", "base/7/1", "PG_VERSION", PLAN_FILE, "postmaster.pid"]
        {
            write(&data, path);
        }
        write(&data, "global");
        for path in ["PG_17_1/5/1", "PG_17_1/5/2", "PG_16_1/5/1", "mine"] {
            write(&space, path);
            write(&other, path);
        }
        write(&wal, "000000010000000000000001");
        write(&wal, "archive_status/x.done");
        fs::create_dir(data.join(TABLESPACES)).unwrap();
        symlink(&space, data.join("pg_tblspc/1")).unwrap();
        symlink(&other, data.join("pg_tblspc/2")).unwrap();
        symlink(&wal, data.join("pg_wal")).unwrap();
        symlink(&other, data.join("log")).unwrap();
        fs::hard_link(data.join("base/5/1"), root.path().join("snapshot")).unwrap();
        let index = index(
            &["base/5/1", "PG_VERSION", "global/1", "pg_tblspc/1/PG_17_1/5/1"],
            &["pg_wal", "pg_wal/archive_status", "base/8"],
        );
        let places = vec![(1, space.clone())];
        let belongings = Belongings::new(&index, |_| true, &places, 17);
        clear(&data, &belongings).unwrap();

        let there = |path: &str| data.join(path).symlink_metadata().is_ok();
        assert!(there("PG_VERSION") && there(PLAN_FILE) && there("base/5"));
        for gone in ["base/5/2", "base/7", "postmaster.pid", "global", "log", "pg_tblspc/2"] {
            assert!(!there(gone), "{gone}");
        }
        assert!(!there("base/5/1"), "another name shares its content");
        assert!(there("pg_wal/archive_status") && !there("pg_wal/archive_status/x.done"));
        assert!(!there("pg_wal/000000010000000000000001"));
        assert!(space.join("PG_17_1/5/1").exists() && !space.join("PG_17_1/5/2").exists());
        assert!(space.join("PG_16_1/5/1").exists() && space.join("mine").exists());
        assert!(other.join("PG_17_1/5/2").exists(), "what lies behind other links stays");
        assert!(root.path().join("snapshot").exists());
    }
}
