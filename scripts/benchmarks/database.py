"""A full backup and a restore, beside pg_basebackup, and beside zstd and tar."""

import shutil
import statistics

from . import stage as base
from .stage import measure, median

MAJOR = "17"
SETTINGS = """max_wal_size = '16GB'
shared_buffers = '1GB'
checkpoint_timeout = '1h'
wal_compression = off
autovacuum = off
"""


def fill(stage, part):
    """A database of mixed content: narrow and wide rows, text, indexes, blobs that do not shrink."""
    stage.sql("CREATE TABLE narrow AS SELECT n AS id, n % 1000 AS a, n % 77 AS b, now() AS t"
              f" FROM generate_series(1, {int(17e6 * part)}) n")
    stage.sql("CREATE INDEX ON narrow (id)")
    stage.sql("CREATE TABLE wide AS SELECT n AS id, repeat(md5(n::text) || ' some words of text ', 12) AS text"
              f" FROM generate_series(1, {int(1.2e6 * part)}) n")
    stage.sql("CREATE TABLE blobs (id int, data bytea); ALTER TABLE blobs ALTER data SET STORAGE EXTERNAL")
    stage.sql("INSERT INTO blobs SELECT n, (SELECT string_agg(sha512((n * 1000 + m)::text::bytea), '')"
              f" FROM generate_series(1, 128) m) FROM generate_series(1, {int(110e3 * part)}) n")
    stage.sql("CHECKPOINT")


def run(options):
    stage, server, _ = base.new_server(*base.programs(MAJOR), SETTINGS)
    try:
        fill(stage, 0.05 if options.quick else 1)
        with_restore = "restore" in options.what
        backup_and_restore(stage, options.rounds, with_restore)
    finally:
        base.end_server(stage, server)


def backup_and_restore(stage, rounds, with_restore):
    database = int(stage.sql("SELECT sum(pg_database_size(oid)) FROM pg_database"))
    zstd = shutil.which("zstd") or "zstd"
    ours, theirs, restores, unpacks = [], [], [], []
    for turn in range(rounds):
        region = base.make_folder(stage, "region")
        config = base.configure(stage, "bench_backup", [("local", f"file://{region}", "")])
        ours.append(measure(stage, stage.pgkeep, "--config", config, "backup"))
        ours[-1].stored = base.size_of(region)
        stage.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")
        tar = stage.folder / "tar"
        theirs.append(measure(stage, stage.bin / "pg_basebackup", "-D", tar, "-Ft", "-c", "fast",
                              "--compress=client-zstd:1", "-X", "fetch"))
        theirs[-1].stored = base.size_of(tar)
        if with_restore:
            copy, plain = stage.folder / "copy", stage.folder / "plain"
            restores.append(measure(stage, stage.pgkeep, "--config", config, "restore", "--pgdata", copy))
            shutil.rmtree(copy)
            unpacks.append(measure(stage, "/bin/sh", "-c",
                                   f"mkdir {plain} && {zstd} -dc {tar}/base.tar.zst | tar -x -C {plain}"
                                   f" && sync -f {plain}"))
            shutil.rmtree(plain)
        shutil.rmtree(region)
        shutil.rmtree(tar)
    print(f"\n{base.command_line()}; a database of {database / 1e9:.2f} GB; medians (smallest–largest)\n")
    rows = rows_of("full backup", database, ours, "pg_basebackup -Ft, client zstd 1", theirs)
    if with_restore:
        rows += rows_of("restore, synced", database, restores, "zstd -dc, tar -x, sync", unpacks)
    base.print_table(["what", "tool", "seconds", "MB/s", "CPU s", "peak MiB", "stored", "×"], rows)


def rows_of(what, length, ours, peer, theirs):
    ratio = statistics.median(t.seconds / o.seconds for o, t in zip(ours, theirs))
    rows = []
    for first, name, runs, times in [(what, "pgkeep", ours, f"{ratio:.2f}"), ("", peer, theirs, "1")]:
        stored = median(runs, "stored")
        rows.append((first, name, base.spread([run.seconds for run in runs]),
                     f"{length / 1e6 / median(runs, 'seconds'):.0f}", f"{median(runs, 'cpu'):.1f}",
                     f"{median(runs, 'memory'):.0f}", f"{stored / 1e6:.0f} MB" if stored else "", times))
    return rows
