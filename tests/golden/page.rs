//! `docs/FORMAT.md` against the code, the golden files, and the real `zstd`.

use std::path::{Path, PathBuf};
use std::process::Command;

use pgkeep::repo::{Container, FRAME_SIZE, LINEAGE_FILE, PIECE_SIZE};

use crate::wal::{finished_segment, unfinished_segment};
use crate::{
    ALIVE, BACKUP_JSON, FILES_IDX, FULL, GAP, INDEX, LATER, LEASE, PACK, TAIL, make, parse, read,
    region,
};

const PAGE: &str = include_str!("../../docs/FORMAT.md");

/// The page's code blocks in one language, in order.
fn blocks(language: &str) -> Vec<&'static str> {
    let opening = format!("\n```{language}\n");
    let after = PAGE.split(opening.as_str()).skip(1);
    after.filter_map(|text| text.split("\n```\n").next()).collect()
}

/// A value from the page's table of constants.
fn constant(name: &str) -> &'static str {
    let row = PAGE.lines().find(|line| line.starts_with(&format!("| {name} | `")));
    let row = row.unwrap_or_else(|| panic!("docs/FORMAT.md has no constant \"{name}\""));
    row.split('`').nth(1).unwrap()
}

#[test]
fn the_pages_constants_are_those_of_the_code() {
    assert_eq!(constant("frame size"), FRAME_SIZE.to_string());
    assert_eq!(constant("piece size"), PIECE_SIZE.to_string());
    assert_eq!(constant("format version"), pgkeep::repo::FORMAT_VERSION.to_string());
    let context = constant("key context");
    let derived = blake3::derive_key(context, &crate::SYSTEM_ID.to_le_bytes());
    assert_eq!(make::key().hash(b"x").0, *blake3::keyed_hash(&derived, b"x").as_bytes());
}

#[test]
fn the_pages_magic_numbers_are_those_of_the_golden_files() {
    let number = |name: &str| {
        let digits = constant(name).strip_prefix("0x").unwrap();
        u32::from_str_radix(digits, 16).unwrap().to_le_bytes()
    };
    for object in [FULL, TAIL[0], INDEX, PACK, FILES_IDX] {
        let bytes = read(object);
        let frames = Container::open(bytes.clone()).unwrap().trailer().frames.clone();
        let end = frames.last().map(|last| (last.offset + u64::from(last.stored_size)) as usize);
        let (metadata, table) = (end.unwrap(), bytes.len() - 29 - 12 * frames.len());
        assert_eq!(bytes[..4], number("frame magic"));
        assert_eq!(bytes[metadata..metadata + 4], number("metadata magic"));
        assert_eq!(bytes[metadata + 8..metadata + 12], [1, 0, 0, 0]);
        assert_eq!(constant("container version"), "1");
        assert_eq!(bytes[table..table + 4], number("seek table magic"));
        assert_eq!(bytes[bytes.len() - 4..], number("seekable magic"));
    }
}

#[test]
fn the_pages_examples_are_the_golden_files() {
    let examples: Vec<serde_json::Value> =
        blocks("json").iter().map(|block| parse(block.as_bytes())).collect();
    let metadata = |object| Container::open(read(object)).unwrap().trailer().metadata.clone();
    let golden = [
        (LINEAGE_FILE, read(LINEAGE_FILE)),
        (FULL, metadata(FULL)),
        (LATER, metadata(LATER)),
        (INDEX, metadata(INDEX)),
        (GAP, read(GAP)),
        (ALIVE, read(ALIVE)),
        (BACKUP_JSON, read(BACKUP_JSON)),
        (PACK, metadata(PACK)),
        (FILES_IDX, metadata(FILES_IDX)),
        (LEASE, read(LEASE)),
    ];
    for (example, (object, bytes)) in examples.iter().zip(&golden) {
        assert_eq!(*example, parse::<serde_json::Value>(bytes), "{object}");
    }
    assert_eq!(examples.len(), golden.len());
}

#[test]
fn the_pages_example_of_records_is_how_the_golden_index_begins() {
    let digits = |line: &str| line.split("  ").next().unwrap().replace(' ', "");
    let text: String = blocks("hex")[0].lines().map(digits).collect();
    let bytes: Vec<u8> = (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect();
    let records = Container::open(read(FILES_IDX)).unwrap().frame(1).unwrap();
    assert_eq!(records[..bytes.len()], bytes);
}

/// The folder of the real `zstd`.
fn zstd_folder() -> PathBuf {
    let cache = match std::env::var_os("PGKEEP_TEST_CACHE").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/var/cache/pgkeep-test"),
        None => std::env::home_dir().unwrap_or_default().join(".cache/pgkeep-test"),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([cache.join("bin")])
        .find(|folder| folder.join("zstd").is_file())
        .unwrap_or_else(|| {
            panic!(
                "zstd is neither on PATH nor in {}: \"scripts/setup zstd\" gets it",
                cache.join("bin").display()
            )
        })
}

fn zstd(objects: &[&str]) -> Vec<u8> {
    let paths = objects.iter().map(|object| region().join(object));
    let output = Command::new(zstd_folder().join("zstd")).arg("-dcq").args(paths).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn zstd_alone_gives_back_the_wal_of_pieces() {
    assert!(zstd(&[FULL]) == finished_segment(), "the full piece differs");
    assert!(zstd(&TAIL[..2]) == unfinished_segment()[..make::TAIL[1].1], "two pieces differ");
    assert!(
        zstd(&[PACK]) == [make::pack_frames().concat(), make::pack_hashes()].concat(),
        "the pack differs"
    );
}

/// Runs a program that finds the real `zstd` on its path; what it printed, and whether it worked.
fn run(program: &str, arguments: &[&str]) -> (Vec<u8>, bool) {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":");
    path.push(zstd_folder());
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    (output.stdout, output.status.success())
}

/// The page's shell function, run on pieces in a folder.
fn run_shell_example(folder: &Path, segment: &str) -> (Vec<u8>, bool) {
    let script = format!("{}\nwal_segment \"$1\" \"$2\"", blocks("sh")[0]);
    run("sh", &["-c", &script, "sh", folder.to_str().unwrap(), segment])
}

#[test]
fn the_pages_shell_example_gives_whole_segments_and_stops_at_holes() {
    let folder = region().join("wal/00000002/00000016");
    let (finished, ok) = run_shell_example(&folder, "0000000200000016000000B3");
    assert!(ok && finished == finished_segment(), "the finished segment differs");
    // Its pieces overlap.
    let (unfinished, ok) = run_shell_example(&folder, "0000000200000016000000B4");
    assert!(ok && unfinished == unfinished_segment()[..make::TAIL[2].1], "the tail differs");

    let with_hole = tempfile::tempdir().unwrap();
    for object in [TAIL[0], TAIL[2]] {
        let name = object.rsplit('/').next().unwrap();
        std::fs::copy(region().join(object), with_hole.path().join(name)).unwrap();
    }
    let (begin, ok) = run_shell_example(with_hole.path(), "0000000200000016000000B4");
    assert!(!ok, "the hole went unseen");
    assert!(begin == unfinished_segment()[..make::TAIL[0].1]);
}

// `scripts/setup`, which gets what the tests need, is itself a Python program.
#[test]
fn the_pages_python_example_reads_the_files_of_a_backup() {
    let folder = region().join("backup");
    let script = blocks("python")[0];
    let files = |path: &[&str]| {
        let arguments = [&["-c", script, folder.to_str().unwrap(), make::LABEL], path].concat();
        let (output, ok) = run("python3", &arguments);
        assert!(ok, "the example failed");
        output
    };
    assert_eq!(files(&["PG_VERSION"]), b"17\n");
    assert!(files(&["global/pg_control"]) == make::pack_frames()[1]);
    assert_eq!(files(&["base/5/2619"]), b"");
    let list = String::from_utf8(files(&[])).unwrap();
    let begin = "0600 PG_VERSION\n0700 base/\n0700 base/5/\n0600 base/5/1259\n0600 base/5/16400\n";
    assert!(list.starts_with(begin), "{list}");
    assert_eq!(list.lines().count(), 11);
}
