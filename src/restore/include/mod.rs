//! Captured files (`backup.include`) back to disk, after the database.
//!
//! ```text
//! prepare: read the object once, prove it, look at what is there already   (refusals happen here)
//! write:   read it again frame by frame, each against the hash that the first pass took
//! ```
//! Nothing is written outside the folder that was named, and nothing is replaced unasked. A file
//! appears whole under its name, with its owner and mode; after a crash the same command goes on.

mod object;
mod place;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use super::RestoreError;
use super::directory::free_bytes;
use crate::accounts::Accounts;
use crate::repo::{BackupInfo, CapturedKind, ContentKey, Included};
use crate::store::Regions;
use object::{Captured, FrameReader, find};
use place::{Place, Root, Writer};

/// How many files a refusal names.
const NAMED: usize = 5;

/// Where captured files go.
#[derive(Clone, Debug)]
pub struct IncludeOptions {
    /// The folder that stands for the root of the file system; `/` itself for their own places.
    pub root: PathBuf,
    /// Replace files that are there and differ.
    pub overwrite: bool,
    /// Folders into which nothing may be written: those of the database.
    pub keep_out: Vec<PathBuf>,
}

/// Captured files that were verified, and may be written.
pub struct PreparedInclude {
    regions: Regions,
    key: ContentKey,
    captured: Captured,
    options: IncludeOptions,
    /// What the backup says of them.
    pub included: Included,
    /// How many files are there already.
    pub there: u64,
}

/// What became of captured files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IncludeOutcome {
    /// Files that were written.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files that were there already.
    pub there: u64,
}

/// Reads and proves what was captured with a backup, and looks at where it would go. Nothing is
/// written.
///
/// # Errors
/// When the backup has none, no region can give it, or what is there stands in the way.
pub async fn prepare_include(
    regions: &Regions,
    info: &BackupInfo,
    key: &ContentKey,
    options: IncludeOptions,
) -> Result<PreparedInclude, RestoreError> {
    let Some(included) = &info.include else {
        return Err(RestoreError::Usage(format!(
            "nothing was captured with the backup {}: backup.include named no paths then",
            info.label
        )));
    };
    let captured = find(regions, info, included, key).await?;
    let (captured, options, there) = {
        let (key, paths) = (key.clone(), included.paths.clone());
        blocking(move || {
            let there = look(&captured, &paths, &options, &key)?;
            Ok((captured, options, there))
        })
        .await?
    };
    Ok(PreparedInclude {
        regions: regions.clone(),
        key: key.clone(),
        captured,
        options,
        included: included.clone(),
        there,
    })
}

/// Refuses what must not be written; how many files are there already.
fn look(
    captured: &Captured,
    paths: &[String],
    options: &IncludeOptions,
    key: &ContentKey,
) -> Result<u64, RestoreError> {
    let refuse = |problem: String| RestoreError::Directory { path: options.root.clone(), problem };
    let root_path = resolve(&options.root)?;
    let barred =
        options.keep_out.iter().map(|path| resolve(path)).collect::<io::Result<Vec<PathBuf>>>()?;
    let root = Root::open(&options.root)?;
    let mut differing = Vec::new();
    let mut blocked = Vec::new();
    let (mut there, mut needed) = (0, 0);
    for located in &captured.entries {
        let path = &located.entry.path;
        let goes_to = root_path.join(path);
        // What the user is told of is all that comes.
        if !paths.iter().any(|named| Path::new("/").join(path).starts_with(named)) {
            blocked.push(format!("{} is none of the paths that were asked for", path.display()));
            continue;
        }
        if let Some(folder) = barred.iter().find(|folder| goes_to.starts_with(folder)) {
            blocked.push(format!(
                "{} would go into the database's own folder {}",
                path.display(),
                folder.display()
            ));
            continue;
        }
        let size = match located.entry.kind {
            CapturedKind::File(size) => Some(size),
            _ => None,
        };
        let place = root.look(located, key)?;
        if place != Place::Same {
            needed += size.unwrap_or(0);
        }
        match place {
            Place::Nothing => {}
            Place::Same => there += u64::from(size.is_some()),
            Place::Differs => differing.push(path.display().to_string()),
            Place::Blocked(problem) => blocked.push(problem),
        }
    }
    if !blocked.is_empty() {
        return Err(refuse(format!("captured files cannot go there: {}", some(&blocked))));
    }
    if !differing.is_empty() && !options.overwrite {
        return Err(refuse(format!(
            "files that were captured are there and differ: {}; nothing was restored. Name an empty folder with --include-to, move them away, or let them be replaced with --include-overwrite",
            some(&differing)
        )));
    }
    let free = free_bytes(&options.root)?;
    if needed > free {
        return Err(RestoreError::Space { path: options.root.clone(), needed, free });
    }
    Ok(there)
}

impl PreparedInclude {
    /// Where they go.
    pub fn root(&self) -> &Path {
        &self.options.root
    }

    /// Writes them.
    ///
    /// # Errors
    /// When the disk fails, no region can give a frame any more, or a file has appeared meanwhile
    /// that differs.
    pub async fn write(self) -> Result<IncludeOutcome, RestoreError> {
        let PreparedInclude { regions, key, captured, options, .. } = self;
        let (sender, reader) = FrameReader::channel();
        let (entries, groups) = (captured.entries, captured.groups);
        let content_key = key.clone();
        let writing = tokio::task::spawn_blocking(move || -> Result<IncludeOutcome, io::Error> {
            let root = Root::make(&options.root)?;
            let accounts = Accounts::read();
            let mut writer = Writer::new(root, options.overwrite, &accounts, content_key);
            let mut reader = reader;
            for located in &entries {
                writer.put(located, &mut reader)?;
            }
            writer.finish()
        });
        let fed = groups.feed(&regions, &key, sender).await;
        let written = writing.await.map_err(io::Error::other)?;
        // A reader that got too little says less than why.
        fed?;
        Ok(written?)
    }
}

/// A path as the system sees it, as far as it exists.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    for ancestor in absolute.ancestors() {
        if let Ok(found) = ancestor.canonicalize() {
            let rest = absolute.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return Ok(if rest.as_os_str().is_empty() { found } else { found.join(rest) });
        }
    }
    Ok(absolute)
}

fn some(all: &[String]) -> String {
    let named = all.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match all.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
