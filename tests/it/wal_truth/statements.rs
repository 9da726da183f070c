//! What the servers are made to do, and what that does to relation files.

/// What a statement does to files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// No relation's files go.
    Stay,
    /// They go, and no others come.
    Go,
    /// They are replaced.
    Replaced,
}

/// Statements by name, each in a transaction of its own.
pub const STATEMENTS: &[(&str, Files, &str)] = &[
    ("create", Files::Stay, "CREATE TABLE victim (id int PRIMARY KEY, a int, text text)"),
    (
        "bulk",
        Files::Stay,
        "INSERT INTO victim SELECT n, n % 10, md5(n::text) FROM generate_series(1, 30000) n",
    ),
    ("btree", Files::Stay, "CREATE INDEX victim_a ON victim (a, text)"),
    ("hash", Files::Stay, "CREATE INDEX ON victim USING hash (text)"),
    ("brin", Files::Stay, "CREATE INDEX ON victim USING brin (id)"),
    ("gin", Files::Stay, "CREATE INDEX ON victim USING gin (to_tsvector('simple', text))"),
    ("gist", Files::Stay, "CREATE INDEX ON victim USING gist (point(id, a))"),
    ("spgist", Files::Stay, "CREATE INDEX ON victim USING spgist (text)"),
    ("update", Files::Stay, "UPDATE victim SET a = a + 1 WHERE id % 3 = 0"),
    ("delete", Files::Stay, "DELETE FROM victim WHERE id % 7 = 0"),
    ("vacuum", Files::Stay, "VACUUM victim"),
    ("analyze", Files::Stay, "ANALYZE victim"),
    (
        "view",
        Files::Stay,
        "CREATE MATERIALIZED VIEW seen AS SELECT a, count(*) FROM victim GROUP BY a WITH NO DATA",
    ),
    ("refresh", Files::Replaced, "REFRESH MATERIALIZED VIEW seen"),
    ("reindex", Files::Replaced, "REINDEX TABLE victim"),
    ("cluster", Files::Replaced, "CLUSTER victim USING victim_a"),
    ("full", Files::Replaced, "VACUUM FULL victim"),
    ("drop view", Files::Go, "DROP MATERIALIZED VIEW seen"),
    ("rewrite", Files::Replaced, "ALTER TABLE victim ALTER a TYPE bigint"),
    ("move", Files::Replaced, "ALTER TABLE victim SET TABLESPACE elsewhere"),
    ("truncate", Files::Replaced, "TRUNCATE victim"),
    ("drop", Files::Go, "DROP TABLE victim"),
    (
        "unlogged",
        Files::Stay,
        "CREATE UNLOGGED TABLE light (id int PRIMARY KEY); INSERT INTO light VALUES (1)",
    ),
    ("truncate unlogged", Files::Replaced, "TRUNCATE light"),
    ("set logged", Files::Replaced, "ALTER TABLE light SET LOGGED"),
    ("both", Files::Replaced, "DROP TABLE light; CREATE TABLE light (id int)"),
    (
        "undone",
        Files::Stay,
        "BEGIN; DROP TABLE light; CREATE TABLE other (id int PRIMARY KEY); ROLLBACK",
    ),
    (
        "many",
        Files::Stay,
        "DO $$ BEGIN FOR i IN 1..60 LOOP EXECUTE 'CREATE TABLE many_' || i || ' (id int PRIMARY KEY)'; END LOOP; END $$",
    ),
    (
        "drop many",
        Files::Go,
        "DO $$ BEGIN FOR i IN 1..60 LOOP EXECUTE 'DROP TABLE many_' || i; END LOOP; END $$",
    ),
    // Each block is a subtransaction; every fifth one fails.
    (
        "subtransactions",
        Files::Replaced,
        "DO $$ BEGIN FOR i IN 1..150 LOOP BEGIN
        INSERT INTO rows VALUES (i);
        IF i = 30 THEN TRUNCATE light; END IF;
        IF i % 5 = 0 AND i <> 30 THEN PERFORM 1 / 0; END IF;
        EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$",
    ),
    (
        "prepare drop",
        Files::Stay,
        "BEGIN; DROP TABLE light; INSERT INTO rows VALUES (1); PREPARE TRANSACTION 'one'",
    ),
    ("commit drop", Files::Go, "COMMIT PREPARED 'one'"),
    (
        "prepare create",
        Files::Stay,
        "BEGIN; CREATE TABLE light (id int PRIMARY KEY); PREPARE TRANSACTION 'two'",
    ),
    ("undo create", Files::Stay, "ROLLBACK PREPARED 'two'"),
    ("message", Files::Stay, "SELECT pg_logical_emit_message(true, 'test', repeat('y', 20000))"),
    (
        "locks",
        Files::Stay,
        "BEGIN; SELECT * FROM rows LIMIT 5 FOR SHARE; SAVEPOINT s; UPDATE rows SET id = id + 1; COMMIT",
    ),
    (
        "sequence",
        Files::Stay,
        "CREATE SEQUENCE numbers; SELECT nextval('numbers') FROM generate_series(1, 100)",
    ),
    (
        "commits",
        Files::Stay,
        "DO $$ BEGIN FOR i IN 1..400 LOOP UPDATE rows SET id = id WHERE id < 10; COMMIT; END LOOP; END $$",
    ),
    ("checkpoint", Files::Stay, "CHECKPOINT"),
    ("page images", Files::Stay, "UPDATE rows SET id = -id"),
    ("mapped", Files::Replaced, "VACUUM FULL pg_class"),
    ("switch", Files::Stay, "SELECT pg_switch_wal()"),
];
