//! What is captured comes out as it went in, and nothing comes out that leads elsewhere.

use proptest::prelude::*;

use super::*;

fn key() -> ContentKey {
    ContentKey::for_system(7)
}

fn entry(path: &str, kind: CapturedKind) -> CapturedEntry {
    CapturedEntry {
        path: path.into(),
        kind,
        mode: 0o640,
        user: 114,
        user_name: Some("postgres".into()),
        group: 4_000_000_000,
        group_name: None,
        mtime: 1_764_000_000,
    }
}

fn archive(entries: &[(CapturedEntry, Vec<u8>)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (entry, content) in entries {
        append_captured(&mut builder, entry, content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A header as nobody writes it, of an entry without content.
fn raw(path: &[u8], kind: EntryType, target: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.set_entry_type(kind);
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn read(mut bytes: Vec<u8>) -> Result<Vec<LocatedEntry>, IncludeError> {
    bytes.extend_from_slice(&[0; 1024]);
    read_captured(bytes.as_slice(), &key())
}

#[test]
fn entries_survive_with_long_names_and_literal_targets() {
    let long = format!("etc/{}/{}", "f".repeat(120), "n".repeat(200));
    let mut not_utf8 = entry("etc/x", CapturedKind::File(0));
    not_utf8.path = PathBuf::from(OsString::from_vec(b"etc/\xff\xfe".to_vec()));
    let entries = [
        (entry("etc", CapturedKind::Folder), Vec::new()),
        (entry(&long, CapturedKind::File(700)), vec![7; 700]),
        (entry("etc/a", CapturedKind::Link("..//x/./y/".into())), Vec::new()),
        (entry("etc/b", CapturedKind::Link("/t".repeat(90).into())), Vec::new()),
        (not_utf8, Vec::new()),
    ];
    let bytes = archive(&entries);
    let found = read_captured(bytes.as_slice(), &key()).unwrap();
    let plain: Vec<_> = found.iter().map(|located| located.entry.clone()).collect();
    assert_eq!(plain, entries.iter().map(|(entry, _)| entry.clone()).collect::<Vec<_>>());
    let offset = found[1].offset as usize;
    assert_eq!(bytes[offset..offset + 700], [7; 700]);
    assert_eq!(found[1].hash, key().hash(&[7; 700]));
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    for path in ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "", "a/"] {
        let bytes = raw(path.as_bytes(), EntryType::Regular, b"");
        assert!(read(bytes).is_err(), "{path:?}");
    }
    for path in ["/", "..", "a/..", "."] {
        assert!(read(raw(path.as_bytes(), EntryType::Directory, b"")).is_err(), "{path:?}");
    }
    assert!(read(raw(b"etc/x", EntryType::Regular, b"")).is_ok());
    assert!(read(raw(b"etc/", EntryType::Directory, b"")).is_ok());
}

#[test]
fn what_is_never_written_is_refused() {
    let link = |path: &[u8], target: &[u8]| raw(path, EntryType::Symlink, target);
    assert!(read(raw(b"a", EntryType::Link, b"/etc/shadow")).is_err(), "a hard link");
    assert!(read(raw(b"a", EntryType::Char, b"")).is_err(), "a device");
    assert!(read(link(b"a", b"")).is_err(), "a link without a target");
    let below = [link(b"a", b"/etc"), raw(b"a/passwd", EntryType::Regular, b"")].concat();
    assert!(read(below).is_err(), "a file behind a link");
    let before = [raw(b"a/b/c", EntryType::Regular, b""), link(b"a", b"/etc")].concat();
    assert!(read(before).is_err(), "a link that comes after what is behind it");
    let twice = [link(b"a", b"/etc"), raw(b"a", EntryType::Directory, b"")].concat();
    assert!(read(twice).is_err(), "a folder in the place of a link");
}

proptest! {
    /// Whatever comes out stays below the folder that it is put into.
    #[test]
    fn nothing_leads_out(paths in prop::collection::vec(("[ab./]{0,8}", 0..3_u8), 1..6)) {
        let bytes = paths.iter().map(|(path, kind)| match kind {
            0 => raw(path.as_bytes(), EntryType::Regular, b""),
            1 => raw(path.as_bytes(), EntryType::Directory, b""),
            _ => raw(path.as_bytes(), EntryType::Symlink, b"/etc"),
        });
        let Ok(found) = read(bytes.collect::<Vec<_>>().concat()) else { return Ok(()) };
        let is_link = |path: &std::path::Path| found.iter().any(|other| {
            other.entry.path == path && matches!(other.entry.kind, CapturedKind::Link(_))
        });
        for LocatedEntry { entry, .. } in &found {
            let normal = |part| matches!(part, std::path::Component::Normal(_));
            prop_assert!(entry.path.components().all(normal), "{entry:?}");
            prop_assert!(!entry.path.ancestors().skip(1).any(is_link), "{entry:?}");
        }
    }

    /// Damage is an error or another content, never a panic.
    #[test]
    fn damage_never_panics(at in 0..3072_usize, byte: u8, length in 0..3072_usize) {
        let mut bytes = archive(&[
            (entry("etc", CapturedKind::Folder), Vec::new()),
            (entry("etc/a", CapturedKind::File(600)), vec![1; 600]),
            (entry("etc/b", CapturedKind::Link("a".into())), Vec::new()),
        ]);
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(length);
        let _ = read_captured(bytes.as_slice(), &key());
    }
}
