//! A region in a local folder: what is there before a request may touch it.
//!
//! The folder is made by `pgkeep init` and by nothing else: a disk that is not mounted must be an
//! error, neither an empty archive nor a new one beneath the mount point. So each request looks
//! first. A folder that is missing when the program starts may still come.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use object_store::local::LocalFileSystem;

/// A folder that should hold a region.
pub(super) struct Folder {
    path: PathBuf,
    opened: Mutex<Option<Opened>>,
}

#[derive(Clone)]
struct Opened {
    store: Arc<LocalFileSystem>,
    /// The device on which the folder was last seen with something in it, or first of all.
    device: u64,
}

impl Folder {
    pub(super) fn new(path: PathBuf) -> Folder {
        Folder { path, opened: Mutex::new(None) }
    }

    /// The store in the folder, if the folder is there. Touches the disk, and may block.
    pub(super) fn open(&self) -> Result<Arc<LocalFileSystem>, String> {
        let known = self.opened.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let device = match std::fs::metadata(&self.path) {
            Ok(metadata) if metadata.is_dir() => metadata.dev(),
            Ok(_) => return Err(format!("{} is not a folder", self.path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(self.missing(known.is_some()));
            }
            Err(error) => return Err(format!("the folder {}: {error}", self.path.display())),
        };
        if let Some(known) = known {
            if known.device == device {
                return Ok(known.store);
            }
            // A mount point without its disk is another device, and empty; the same disk, mounted
            // again, may have another number too, and is not empty.
            if self.is_empty() {
                return Err(format!(
                    "the folder {} is empty, and on another device than before; is its disk mounted?",
                    self.path.display()
                ));
            }
        }
        let store = LocalFileSystem::new_with_prefix(&self.path)
            .map_err(|error| super::error::sort(&error).1)?
            .with_fsync(true);
        let opened = Opened { store: Arc::new(store), device };
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened.clone());
        Ok(opened.store)
    }

    /// Removes a folder inside from which all objects are gone, with what uploads that were cut off
    /// left in it: files whose names end in `#` and a number, which no listing shows.
    pub(super) fn remove_emptied(&self, inside: &str) {
        let path = self.path.join(inside);
        for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains('#') {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let _ = std::fs::remove_dir(&path);
    }

    fn is_empty(&self) -> bool {
        std::fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none())
    }

    fn missing(&self, was_there: bool) -> String {
        let path = self.path.display();
        if was_there {
            return format!("the folder {path} is gone; is its disk mounted?");
        }
        format!(
            "the folder {path} does not exist; is its disk mounted? It is never made by itself, so that a missing disk is not taken for an empty archive: \"pgkeep init\" makes it, or mkdir"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_folder_is_told_used_once_it_is_there_and_never_made() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("archive");
        let folder = Folder::new(path.clone());
        let told = folder.open().unwrap_err();
        assert!(told.contains("does not exist") && told.contains("pgkeep init"), "{told}");
        assert!(!path.exists());
        std::fs::create_dir(&path).unwrap();
        folder.open().unwrap();
        std::fs::remove_dir(&path).unwrap();
        assert!(folder.open().unwrap_err().contains("is gone"));
        std::fs::write(&path, "a file").unwrap();
        assert!(folder.open().unwrap_err().contains("is not a folder"));
    }

    #[test]
    fn an_emptied_folder_goes_with_what_torn_uploads_left() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::new(parent.path().to_owned());
        for inside in ["a/b", "a/c"] {
            std::fs::create_dir_all(parent.path().join(inside)).unwrap();
            std::fs::write(parent.path().join(inside).join("pack-000001.zst#3"), "x").unwrap();
        }
        std::fs::write(parent.path().join("a/c/pack-000000.zst"), "x").unwrap();
        folder.remove_emptied("a/b");
        folder.remove_emptied("a/c");
        assert!(!parent.path().join("a/b").exists());
        assert!(parent.path().join("a/c/pack-000000.zst").exists());
    }

    // A mount point from which the disk went away, and a disk that came back under another number.
    #[test]
    fn an_empty_folder_on_another_device_is_no_archive() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::new(parent.path().to_owned());
        folder.open().unwrap();
        let other_device = |folder: &Folder| {
            folder.opened.lock().unwrap().as_mut().unwrap().device ^= 1;
        };
        other_device(&folder);
        let told = folder.open().unwrap_err();
        assert!(told.contains("another device"), "{told}");
        std::fs::create_dir(parent.path().join("orders")).unwrap();
        folder.open().unwrap();
        folder.open().unwrap();
    }
}
