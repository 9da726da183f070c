//! Clusters of unusual shape.

use crate::support::{Folder, Keeper, Server, ServerOptions};

// CASES 34: tablespace links missing.
#[test]
fn two_tablespaces_come_back_elsewhere() {
    for major in [14, 17] {
        let folder = Folder::new();
        let mut server = Server::new(&folder, major, &ServerOptions::default());
        let (one, two) = (folder.make("space-one"), folder.make("space-two"));
        server.sql(&format!("CREATE TABLESPACE one LOCATION '{}'", one.display()));
        server.sql(&format!("CREATE TABLESPACE two LOCATION '{}'", two.display()));
        server.sql("CREATE TABLE a (id int PRIMARY KEY, t text) TABLESPACE one");
        server.sql(
            "CREATE TABLE b (id int, t text) TABLESPACE two; CREATE INDEX ON b (id) TABLESPACE one",
        );
        let fill = "SELECT n, repeat('t', 100) FROM generate_series(1, 20000) n";
        server.sql(&format!("INSERT INTO a {fill}; INSERT INTO b {fill}"));
        let mut keeper = Keeper::new(&folder, &server, &["eu"]);
        keeper.start();
        keeper.backup();
        // A file that not even its owner may write, such as a key.
        let key = server.data.join("server.key");
        std::fs::write(&key, "key").unwrap();
        std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o444))
            .unwrap();
        keeper.backup();
        server.sql("INSERT INTO b SELECT n, 'later' FROM generate_series(1, 100) n");
        keeper.wait_archived(&server, &["eu"]);
        keeper.stop();
        server.stop();
        let (new_one, new_two) = (folder.path().join("new-one"), folder.path().join("new-two"));
        let map = |old: &std::path::Path, new: &std::path::Path| {
            format!("{}={}", old.display(), new.display())
        };
        let (map_one, map_two) = (map(&one, &new_one), map(&two, &new_two));
        // Into the places of the original, which are in use, nothing is restored.
        let refused = keeper
            .run(&["restore", "--pgdata", folder.path().join("x").to_str().unwrap()])
            .expect(1);
        assert!(refused.stderr.contains("not empty"), "{}", refused.stderr);
        assert!(!folder.path().join("x").exists());
        let arguments = ["--tablespace-map", &map_one, "--tablespace-map", &map_two];
        let mut copy = keeper.restore_and_start(&folder, major, "copy", &arguments);
        copy.wait_until_writable();
        assert_eq!(copy.sql("SELECT count(*) FROM b"), "20100");
        assert_eq!(copy.sql("SELECT count(*) FROM a"), "20000");
        let mode = std::fs::metadata(copy.data.join("server.key")).unwrap().permissions();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o444);
        let places = copy.sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname IN ('one', 'two') ORDER BY spcname");
        assert_eq!(places, format!("{}\n{}", new_one.display(), new_two.display()));
        copy.check_integrity();
    }
}

#[test]
fn a_database_of_20_000_small_tables_comes_back() {
    let folder = Folder::new();
    let options = ServerOptions {
        settings: "max_locks_per_transaction = 4096\nfsync = off".into(),
        ..ServerOptions::default()
    };
    let server = Server::new(&folder, 17, &options);
    for batch in 0..20 {
        server.sql(&format!(
            "DO $$ BEGIN FOR n IN 1..1000 LOOP EXECUTE format('CREATE TABLE t_%s_%s AS SELECT %s AS n', {batch}, n, n); END LOOP; END $$"
        ));
    }
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.start();
    keeper.backup();
    server.sql("INSERT INTO t_19_1000 VALUES (7)");
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &[]);
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT count(*) FROM pg_class WHERE relname LIKE 't\\_%'"), "20000");
    assert_eq!(copy.sql("SELECT sum(n) FROM t_19_1000"), "1007");
    copy.check_integrity();
}

#[test]
fn a_relation_of_more_than_one_file_comes_back() {
    let folder = Folder::new();
    let options = ServerOptions {
        settings: "fsync = off\nmax_wal_size = '8GB'\nautovacuum = off".into(),
        ..ServerOptions::default()
    };
    let mut server = Server::new(&folder, 17, &options);
    let mut keeper = Keeper::new(&folder, &server, &["eu"]);
    // Wide rows, out of line storage off: 1 GiB is full soon.
    server.sql("CREATE TABLE big (id int, t text); ALTER TABLE big ALTER t SET STORAGE PLAIN");
    server.sql("INSERT INTO big SELECT n, repeat(chr(65 + n % 26), 7800) FROM generate_series(1, 136000) n");
    let content = "SELECT count(*) || ' ' || sum(hashtext(id || t)::bigint) FROM big";
    let expected = server.sql(content);
    keeper.start();
    keeper.backup();
    server.sql("UPDATE big SET t = 'short' WHERE id % 1000 = 0");
    let changed = server.sql(content);
    assert_ne!(expected, changed);
    keeper.wait_archived(&server, &["eu"]);
    keeper.stop();
    let file = server.sql("SELECT pg_relation_filepath('big')");
    assert!(server.data.join(format!("{file}.1")).exists(), "the relation has only one file");
    server.stop();
    let mut copy = keeper.restore_and_start(&folder, 17, "copy", &[]);
    copy.wait_until_writable();
    assert_eq!(copy.sql(content), changed);
    copy.check_integrity();
}
