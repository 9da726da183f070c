//! Stream, back up, lose everything, restore: on every supported major.

use crate::support::{Folder, Keeper, Server, ServerOptions, files_below, program, user_command};

/// What proves that two clusters hold the same.
const CONTENT: &str =
    "SELECT count(*) || ' ' || coalesce(md5(string_agg(t::text, ',' ORDER BY id)), '') FROM t";

fn round(major: u32) {
    let folder = Folder::new();
    let mut server = Server::new(&folder, major, &ServerOptions::default());
    server.sql("CREATE TABLE t (id serial PRIMARY KEY, text text); CREATE INDEX ON t (text)");
    server.sql(
        "INSERT INTO t (text) SELECT repeat(md5(n::text), 5) FROM generate_series(1, 20000) n",
    );
    let mut keeper = Keeper::new(&folder, &server, &["eu", "us"]);
    keeper.start();
    let label = keeper.backup();
    server.sql(
        "INSERT INTO t (text) SELECT 'after the backup ' || n FROM generate_series(1, 5000) n",
    );
    server.sql("UPDATE t SET text = 'changed' WHERE id % 7 = 0; DELETE FROM t WHERE id % 11 = 0");
    let expected = server.sql(CONTENT);
    keeper.wait_archived(&server, &["eu", "us"]);
    server.kill9();
    keeper.kill9();
    std::fs::remove_dir_all(&server.data).unwrap();

    for region in ["eu", "us"] {
        let name = format!("from-{region}");
        let mut copy = keeper.restore_and_start(&folder, major, &name, &["--region", region]);
        copy.wait_until_writable();
        assert_eq!(copy.sql(CONTENT), expected, "restored from {region}");
        // A copy must not archive into its origin.
        assert_eq!(copy.sql("SHOW archive_mode"), "off");
        copy.check_integrity();
    }
    let listed = keeper.run(&["list", "--json"]).expect(0).json();
    assert_eq!(listed["backups"][0]["label"], label.as_str());
    assert_eq!(listed["backups"][0]["regions"].as_array().unwrap().len(), 2);
}

#[test]
fn postgresql_13_comes_back() {
    round(13);
}

#[test]
fn postgresql_14_comes_back() {
    round(14);
}

#[test]
fn postgresql_15_comes_back() {
    round(15);
}

#[test]
fn postgresql_16_comes_back() {
    round(16);
}

#[test]
fn postgresql_17_comes_back() {
    round(17);
}

#[test]
fn postgresql_18_comes_back() {
    round(18);
}

// A user's data is never hostage to this program.
#[test]
fn zstd_alone_turns_the_pieces_of_a_segment_into_the_segment() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    server.sql("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 300000) n");
    let segment = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
    server.sql("CREATE TABLE u AS SELECT 1");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();

    let of_segment =
        |path: &std::path::Path| path.file_name().unwrap().to_string_lossy().starts_with(&segment);
    let pieces = files_below(&keeper.region("eu"), &of_segment);
    assert_eq!(pieces.len(), 1, "small pieces stay once the whole one is there: {pieces:?}");
    let mut zstd = user_command(program("bin/zstd"));
    let plain = zstd.arg("-dc").args(&pieces).output().unwrap();
    assert!(plain.status.success(), "{}", String::from_utf8_lossy(&plain.stderr));
    let original = std::fs::read(server.data.join("pg_wal").join(&segment)).unwrap();
    assert!(plain.stdout == original, "the segment differs from PostgreSQL's own file");
}

// Without a running sidecar a backup brings the WAL that it needs itself.
#[test]
fn a_backup_without_a_sidecar_can_be_restored() {
    let folder = Folder::new();
    let mut server = Server::new(&folder, 16, &ServerOptions::default());
    server.sql("CREATE TABLE t (id serial PRIMARY KEY, text text)");
    server.sql("INSERT INTO t (text) SELECT 'row ' || n FROM generate_series(1, 1000) n");
    let expected = server.sql(CONTENT);
    let keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.backup();
    server.kill9();
    let mut copy = keeper.restore_and_start(&folder, 16, "copy", &[]);
    copy.wait_until_writable();
    assert_eq!(copy.sql(CONTENT), expected);
}
