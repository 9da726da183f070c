//! Where captured files may go, and where they may not.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;

use super::object::FrameReader;
use super::*;
use crate::repo::{CapturedEntry, LocatedEntry, compress_frame};

fn key() -> ContentKey {
    ContentKey::for_system(7)
}

fn located(path: &str, kind: CapturedKind, content: &[u8]) -> LocatedEntry {
    let entry = CapturedEntry {
        path: path.into(),
        kind,
        mode: 0o640,
        user: rustix::process::geteuid().as_raw(),
        user_name: None,
        group: rustix::process::getegid().as_raw(),
        group_name: None,
        mtime: 1_700_000_000,
    };
    LocatedEntry { entry, offset: 0, hash: key().hash(content) }
}

fn file(path: &str, content: &[u8]) -> LocatedEntry {
    located(path, CapturedKind::File(content.len() as u64), content)
}

/// The place of one entry.
fn look_at(root: &Path, located: &LocatedEntry) -> Place {
    Root::open(root).unwrap().look(located, &key()).unwrap()
}

/// Puts entries below a folder; files have the content of their path.
fn put(root: &Path, entries: &[LocatedEntry], overwrite: bool) -> io::Result<IncludeOutcome> {
    let mut raw = Vec::new();
    let mut entries = entries.to_vec();
    for located in &mut entries {
        located.offset = raw.len() as u64;
        if let CapturedKind::File(_) = located.entry.kind {
            raw.extend_from_slice(located.entry.path.to_str().unwrap().as_bytes());
            raw.extend_from_slice(&[0; 100]);
        }
    }
    let (sender, mut reader) = FrameReader::channel();
    let frame = compress_frame(&raw, 1).unwrap();
    sender.try_send((frame.stored, frame.raw_size)).unwrap();
    drop(sender);
    let accounts = Accounts::default();
    let mut writer = Writer::new(Root::make(root)?, overwrite, &accounts, key());
    for located in &entries {
        writer.put(located, &mut reader)?;
    }
    writer.finish()
}

#[test]
fn what_is_there_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    assert_eq!(look_at(&root.join("missing"), &file("etc/a", b"x")), Place::Nothing);
    assert_eq!(look_at(root, &file("etc/a", b"x")), Place::Nothing);
    fs::create_dir(root.join("etc")).unwrap();
    assert_eq!(look_at(root, &located("etc", CapturedKind::Folder, b"")), Place::Same);
    fs::write(root.join("etc/a"), "x").unwrap();
    assert_eq!(look_at(root, &file("etc/a", b"x")), Place::Same);
    assert_eq!(look_at(root, &file("etc/a", b"y")), Place::Differs);
    assert_eq!(
        look_at(root, &located("etc/a", CapturedKind::Link("x".into()), b"")),
        Place::Differs
    );
    symlink("x", root.join("etc/link")).unwrap();
    assert_eq!(
        look_at(root, &located("etc/link", CapturedKind::Link("x".into()), b"")),
        Place::Same
    );
    assert_eq!(look_at(root, &file("etc/link", b"x")), Place::Differs);
    for blocked in [
        located("etc/a", CapturedKind::Folder, b""),
        file("etc", b"x"),
        file("etc/a/b", b"x"),
        file("etc/link/b", b"x"),
    ] {
        let place = look_at(root, &blocked);
        assert!(matches!(place, Place::Blocked(_)), "{blocked:?}: {place:?}");
    }
}

#[test]
fn entries_come_with_mode_time_and_target_and_again_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("new");
    let mut closed = located("etc/sub", CapturedKind::Folder, b"");
    closed.entry.mode = 0o550;
    let entries = [
        located("etc", CapturedKind::Folder, b""),
        closed,
        file("etc/sub/a", b"etc/sub/a"),
        located("etc/link", CapturedKind::Link("/nowhere".into()), b""),
        file("var/b", b"var/b"),
    ];
    let outcome = put(&root, &entries, false).unwrap();
    assert_eq!(outcome, IncludeOutcome { files: 2, bytes: 14, there: 0 });
    assert_eq!(fs::read(root.join("etc/sub/a")).unwrap(), b"etc/sub/a");
    assert_eq!(fs::read_link(root.join("etc/link")).unwrap(), Path::new("/nowhere"));
    let of = |path: &str| fs::symlink_metadata(root.join(path)).unwrap();
    assert_eq!(of("etc/sub/a").mode() & 0o7777, 0o640);
    assert_eq!(of("etc/sub").mode() & 0o7777, 0o550);
    assert_eq!(of("").mode() & 0o7777, 0o700, "keys may lie there");
    for path in ["etc", "etc/sub", "etc/sub/a", "etc/link", "var/b"] {
        assert_eq!(of(path).mtime(), 1_700_000_000, "{path}");
    }
    let written = of("etc/sub/a").ino();
    let outcome = put(&root, &entries, false).unwrap();
    assert_eq!(outcome, IncludeOutcome { files: 0, bytes: 0, there: 2 });
    assert_eq!(of("etc/sub/a").ino(), written);
    fs::set_permissions(root.join("etc/sub"), Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn what_differs_is_replaced_only_when_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir(root.join("etc")).unwrap();
    fs::write(root.join("etc/a"), "mine").unwrap();
    fs::write(root.join("victim"), "mine").unwrap();
    symlink("../victim", root.join("etc/b")).unwrap();
    let entries = [file("etc/a", b"etc/a"), file("etc/b", b"etc/b")];
    assert!(put(root, &entries, false).unwrap_err().to_string().contains("differs"));
    assert_eq!(fs::read(root.join("etc/a")).unwrap(), b"mine");
    put(root, &entries, true).unwrap();
    assert_eq!(fs::read(root.join("etc/a")).unwrap(), b"etc/a");
    assert!(fs::symlink_metadata(root.join("etc/b")).unwrap().is_file());
    assert_eq!(fs::read(root.join("victim")).unwrap(), b"mine", "a link was followed");
}

#[test]
fn the_databases_own_folder_is_kept_out_of() {
    let folder = tempfile::tempdir().unwrap();
    let real = folder.path().join("real");
    fs::create_dir(&real).unwrap();
    symlink("real", folder.path().join("alias")).unwrap();
    let captured = Captured::made_of(vec![file("data/postgresql.conf", b"x")]);
    let options = |keep_out: &str| IncludeOptions {
        root: folder.path().join("alias"),
        overwrite: true,
        keep_out: vec![folder.path().join(keep_out)],
    };
    let error = |paths: &[String], keep_out| {
        look(&captured, paths, &options(keep_out), &key()).unwrap_err().to_string()
    };
    let paths = ["/data".to_owned()];
    let told = error(&paths, "real/data");
    assert!(told.contains("data/postgresql.conf"), "{told}");
    assert_eq!(look(&captured, &paths, &options("real/dat"), &key()).unwrap(), 0);
    // What the backup does not name is not brought.
    let told = error(&["/data/postgresql".to_owned(), "/dat".to_owned()], "elsewhere");
    assert!(told.contains("none of the paths"), "{told}");
}

/// Everything outside a folder, to see that it stays as it was.
fn outside(folder: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut all: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).ok()))
        .collect();
    all.sort();
    all
}

proptest! {
    /// Whatever links lie in the folder, and whatever is replaced, nothing outside of it changes.
    #[test]
    fn nothing_is_written_outside(
        links in prop::collection::vec(("[ab]", "[ab]", "(\\.\\./){0,3}(outside|a|b|outside/b)"), 0..4),
        entries in prop::collection::vec(("[ab](/[ab]){0,2}", 0..3_u8), 1..5),
        overwrite: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (root, secret) = (folder.path().join("root"), folder.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join("b"), "secret").unwrap();
        let mode = fs::metadata(&secret).unwrap().mode();
        for (above, name, target) in &links {
            let _ = symlink(target, root.join(name));
            let _ = fs::create_dir(root.join(above));
            let _ = symlink(target, root.join(above).join(name));
        }
        let before = (outside(&secret), outside(folder.path()).len());
        for (path, kind) in &entries {
            let entry = match kind {
                0 => file(path, path.as_bytes()),
                1 => located(path, CapturedKind::Folder, b""),
                _ => located(path, CapturedKind::Link("../../outside".into()), b""),
            };
            let _ = put(&root, &[entry], overwrite);
        }
        prop_assert_eq!((outside(&secret), outside(folder.path()).len()), before);
        prop_assert_eq!(fs::metadata(&secret).unwrap().mode(), mode);
    }
}
