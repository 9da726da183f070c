//! Capturing from a real file system.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::*;
use crate::repo::{CapturedKind, LocatedEntry, read_captured};

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 100 };

fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn captured(paths: &[PathBuf], limits: Limits) -> Result<(Vec<u8>, Tally), CaptureError> {
    let found = scan(paths, limits)?;
    write_archive(found, Vec::new(), limits, &Accounts::default())
}

fn entries(archive: &[u8]) -> Vec<LocatedEntry> {
    read_captured(archive, &ContentKey::for_system(1)).unwrap()
}

#[test]
fn files_folders_and_links_are_captured_and_pipes_are_not() {
    let root = tempfile::tempdir().unwrap();
    let conf = root.path().join("conf");
    write(&conf.join("17/main/pg_hba.conf"), "local all all peer\n");
    write(&conf.join("empty"), "");
    fs::set_permissions(conf.join("empty"), Permissions::from_mode(0o600)).unwrap();
    symlink("/nowhere/at/all", conf.join("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        conf.join("pipe"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let (archive, tally) = captured(std::slice::from_ref(&conf), LIMITS).unwrap();
    assert_eq!((tally.files, tally.bytes), (2, 19));
    assert!(tally.failures.finish().is_empty());
    assert_eq!(tally.skipped.finish(), [format!("{}: a pipe", conf.join("pipe").display())]);
    let inside = conf.strip_prefix("/").unwrap();
    let found: Vec<_> = entries(&archive).into_iter().map(|found| found.entry).collect();
    let paths: Vec<_> =
        found.iter().map(|entry| entry.path.strip_prefix(inside).unwrap()).collect();
    let expected =
        ["", "17", "17/main", "17/main/pg_hba.conf", "empty", "link"].map(Path::new).to_vec();
    assert_eq!(paths, expected);
    assert_eq!(found[4].mode, 0o600);
    assert_eq!(found[5].kind, CapturedKind::Link("/nowhere/at/all".into()));
}

#[test]
fn a_path_that_is_missing_or_a_link_is_named() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("real/file"), "x");
    let (link, missing) = (root.path().join("link"), root.path().join("missing"));
    symlink("real", &link).unwrap();
    let (archive, tally) = captured(&[link.clone(), missing.clone()], LIMITS).unwrap();
    let failures = tally.failures.finish();
    assert_eq!(failures.len(), 2, "{failures:?}");
    assert!(failures[0].contains("link") && failures[0].contains("real"), "{failures:?}");
    assert!(failures[1].contains("missing"), "{failures:?}");
    assert_eq!(entries(&archive).len(), 1);
    // Both are named: nothing is missing.
    let real = fs::canonicalize(root.path().join("real")).unwrap();
    let (_, tally) = captured(&[link, real], LIMITS).unwrap();
    assert!(tally.failures.finish().is_empty());
}

#[test]
fn too_much_is_refused_before_anything_is_read() {
    let root = tempfile::tempdir().unwrap();
    let sparse = fs::File::create(root.path().join("sparse")).unwrap();
    sparse.set_len(2 << 20).unwrap();
    let error = captured(&[root.path().to_owned()], LIMITS).unwrap_err().to_string();
    assert!(error.contains("sparse") && error.contains("1024 MiB"), "{error}");
    sparse.set_len(0).unwrap();
    for number in 0..200 {
        write(&root.path().join(number.to_string()), "");
    }
    let error = captured(&[root.path().to_owned()], LIMITS).unwrap_err().to_string();
    assert!(error.contains("100000 files"), "{error}");
}

#[test]
fn a_large_file_that_shrinks_never_tears_the_archive() {
    let root = tempfile::tempdir().unwrap();
    let (large, after) = (root.path().join("a"), root.path().join("b"));
    write(&large, vec![1; 6 << 20]);
    write(&after, "after");
    let limits = Limits { bytes: 1 << 30, entries: 100 };
    let found = scan(&[large.clone(), after], limits).unwrap();
    // It shrinks as soon as its first bytes are written.
    struct Shrinking(Vec<u8>, PathBuf);
    impl Write for Shrinking {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.len() > 1 << 20 {
                fs::OpenOptions::new().write(true).open(&self.1)?.set_len(2 << 20)?;
            }
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let writer = Shrinking(Vec::new(), large);
    let (writer, tally) = write_archive(found, writer, limits, &Accounts::default()).unwrap();
    let failures = tally.failures.finish();
    assert!(failures.len() == 1 && failures[0].contains("shorter"), "{failures:?}");
    let found = entries(&writer.0);
    assert_eq!(found[0].entry.kind, CapturedKind::File(6 << 20));
    assert_eq!(found[1].hash, ContentKey::for_system(1).hash(b"after"));
}

#[test]
fn a_small_file_that_changes_all_the_time_never_tears_the_archive() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("log");
    write(&path, "");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (stopping, growing) = (stop.clone(), path.clone());
    let writer = std::thread::spawn(move || {
        let mut file = fs::OpenOptions::new().append(true).open(growing).unwrap();
        while !stopping.load(std::sync::atomic::Ordering::Relaxed) {
            file.write_all(b"one more line\n").unwrap();
            let _ = file.set_len(0);
        }
    });
    for _ in 0..20 {
        let (archive, _) = captured(std::slice::from_ref(&path), LIMITS).unwrap();
        assert_eq!(entries(&archive).len(), 1);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn frames_are_cut_at_their_size() {
    let (sender, mut frames) = mpsc::channel(10);
    let mut writer = FrameWriter { raw: Vec::new(), level: 1, frames: sender };
    let mut content = io::repeat(3).take(FRAME_SIZE as u64 + 1);
    io::copy(&mut content, &mut writer).unwrap();
    writer.finish().unwrap();
    let sizes: Vec<Option<u32>> = std::iter::from_fn(|| frames.try_recv().ok())
        .map(|frame| frame.map(|frame| frame.raw_size))
        .collect();
    assert_eq!(sizes, [Some(FRAME_SIZE as u32), Some(1), None]);
}
