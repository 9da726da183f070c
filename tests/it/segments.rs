//! WAL segments of other sizes than PostgreSQL's default.

use crate::support::{Folder, Keeper, Server, ServerOptions, files_below};

fn round(mebibytes: u32) {
    let folder = Folder::new();
    let options = ServerOptions { segment_mebibytes: mebibytes, ..ServerOptions::default() };
    let server = Server::new(&folder, 17, &options);
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    keeper.backup();
    // More than two segments, the last one unfinished.
    server.sql(&format!(
        "CREATE TABLE t AS SELECT n AS id, repeat(md5(n::text), 8) AS text FROM generate_series(1, {}) n",
        60_000 * (mebibytes / 16).max(1)
    ));
    let expected = server.sql("SELECT count(*) || md5(string_agg(text, '' ORDER BY id)) FROM t");
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
    let of_wal = |path: &std::path::Path| path.to_string_lossy().contains("/wal/");
    for piece in files_below(&keeper.region("us"), &of_wal) {
        let name = piece.file_name().unwrap().to_string_lossy().into_owned();
        let piece = pgkeep::repo::PieceName::parse(&name).expect("a piece");
        assert!(piece.len() <= 16 << 20, "{name}");
    }
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &["--region", "us"]);
    copy.wait_until_writable();
    assert_eq!(
        copy.sql("SELECT count(*) || md5(string_agg(text, '' ORDER BY id)) FROM t"),
        expected
    );
    copy.check_integrity();
}

#[test]
fn segments_of_1_mib() {
    round(1);
}

#[test]
fn segments_of_16_mib() {
    round(16);
}

#[test]
fn segments_of_64_mib() {
    round(64);
}
