"""Backups and restores of one database, beside pgBackRest and PostgreSQL's own programs.

A round takes a full backup with each, restores it, updates rows at random, takes an incremental backup
with each, and brings the restored directory to it by a delta restore. Everything is synced: pgkeep by
each object and at the end of a restore, pgBackRest by each file, the others by a sync that is timed.

- PGBACKREST= names pgBackRest 2.59 or newer; older ones do not know PostgreSQL 17. Without it that peer is
  left out, and said to be. It runs with zstd level 1, two processes, bundling and block incremental.
- "into nothing" is pg_basebackup's stream, thrown away: what the server gives at most.
- "disk" is a file of the database's length, written and synced.
"""

import os
import resource
import shutil

from . import stage as base
from .stage import measure, median

MAJOR = "17"
SETTINGS = """max_wal_size = '3GB'
shared_buffers = '1GB'
checkpoint_timeout = '1h'
wal_compression = off
autovacuum = off
summarize_wal = on
"""
# Rows that are updated between a full and an incremental backup.
UPDATES = 5000


def fill(stage, part):
    """A database of mixed content: pgbench tables, wide rows of text, indexes, blobs that do not shrink."""
    stage.run(stage.bin / "pgbench", "-i", "-q", "-s", max(1, int(130 * part)))
    stage.sql("CREATE TABLE wide AS SELECT n AS id, repeat(md5(n::text) || ' some words of text ', 12) AS text"
              f" FROM generate_series(1, {int(1.8e6 * part)}) n; CREATE INDEX ON wide (id); CREATE INDEX ON wide (md5(text))")
    stage.sql("CREATE TABLE blobs (id int, data bytea); ALTER TABLE blobs ALTER data SET STORAGE EXTERNAL")
    stage.sql("INSERT INTO blobs SELECT n, (SELECT string_agg(sha512((n * 1000 + m)::text::bytea), '')"
              f" FROM generate_series(1, 128) m) FROM generate_series(1, {int(110e3 * part)}) n")
    stage.sql("VACUUM")
    stage.sql("CHECKPOINT")


class Pgbackrest:
    """pgBackRest with a repository of its own."""

    def __init__(self, stage, program):
        self.stage = stage
        self.program = stage.folder / "pgbackrest-program"
        shutil.copy2(program, self.program)
        self.program.chmod(0o755)

    def prepare(self):
        stage = self.stage
        self.folder = base.make_folder(stage, "pgbackrest")
        config = self.folder / "pgbackrest.conf"
        config.write_text(f"""[global]
repo1-path={self.folder}/repo
repo1-bundle=y
repo1-block=y
spool-path={self.folder}/spool
lock-path={self.folder}/lock
log-path={self.folder}
log-level-console=warn
log-level-file=off
process-max=2
compress-type=zst
compress-level=1
start-fast=y
archive-check=n
[bench]
pg1-path={stage.folder}/data
pg1-socket-path={stage.folder}
pg1-port={stage.environment['PGPORT']}
pg1-user=postgres
""")
        self.command = [self.program, f"--config={config}", "--stanza=bench"]
        stage.run(*self.command, "stanza-create")

    def backup(self, kind):
        before = base.size_of(self.folder / "repo")
        run = measure(self.stage, *self.command, f"--type={kind}", "backup")
        run.stored = base.size_of(self.folder / "repo") - before
        return run

    def restore(self, data, *more):
        return measure(self.stage, *self.command, f"--pg1-path={data}", "--type=immediate", *more, "restore")

    def clear(self):
        shutil.rmtree(self.folder)


def run(options):
    stage, server, _ = base.new_server(*base.programs(MAJOR), SETTINGS)
    try:
        fill(stage, 0.05 if options.quick else 1)
        backup_and_restore(stage, server, options.rounds)
    finally:
        base.end_server(stage, server)


def shell(stage, command):
    return measure(stage, "/bin/sh", "-c", command)


def backup_and_restore(stage, server, rounds):
    database = int(stage.sql("SELECT sum(pg_database_size(oid)) FROM pg_database"))
    peer = None
    if program := os.environ.get("PGBACKREST"):
        peer = Pgbackrest(stage, program)
    else:
        print("without pgBackRest: PGBACKREST= names no program")
    runs = {}

    def note(what, tool, run):
        runs.setdefault(what, {}).setdefault(tool, []).append(run)

    noise = []
    for _ in range(rounds):
        quiet = base.Noise(server)
        one_round(stage, peer, note)
        run = base.Run(0, resource.getrusage(resource.RUSAGE_SELF))
        quiet.end(run)
        noise.append(run)
    print(f"\n{base.command_line()}; a database of {database / 1e9:.2f} GB; medians (smallest–largest)\n")
    rows = []
    for what, tools in runs.items():
        ours = tools.get("pgkeep")
        for number, (tool, measured) in enumerate(tools.items()):
            ratio = ""
            if ours and tool != "pgkeep":
                ratio = base.spread([t.seconds / o.seconds for o, t in zip(ours, measured)])
            stored = median(measured, "stored")
            rows.append((what if number == 0 else "", tool, base.spread([r.seconds for r in measured]),
                         f"{database / 1e6 / median(measured, 'seconds'):.0f}", f"{median(measured, 'cpu'):.1f}",
                         f"{median(measured, 'memory'):.0f}", f"{stored / 1e6:.1f} MB" if stored else "", ratio))
    base.print_table(["what", "tool", "seconds", "MB/s", "CPU s", "peak MiB", "stored", "pgkeep is faster by"], rows)
    base.print_noise(noise)


def into(folder, run):
    run.stored = base.size_of(folder)
    return run


def one_round(stage, peer, note):
    folder, bin_ = stage.folder, stage.bin
    region = base.make_folder(stage, "region")
    config = base.configure(stage, "bench_backup", [("local", f"file://{region}", "")])
    tar, increment, copy, other = (folder / name for name in ("tar", "increment", "copy", "other"))

    def stored():
        return sum(base.size_of(backups) for backups in region.glob("*/*/backup"))

    def ours(*arguments):
        before = stored()
        run = measure(stage, stage.pgkeep, "--config", config, *arguments)
        run.stored = stored() - before
        return run

    note("limits", "the server's stream into nothing", shell(
        stage, f"{bin_}/pg_basebackup -D - -Ft -c fast -X none > /dev/null"))
    length = sum(int(n) for n in stage.sql("SELECT pg_database_size(oid) FROM pg_database").split())
    note("limits", "disk: written and synced", shell(
        stage, f"dd if=/dev/zero of={folder}/zeros bs=1M count={length >> 20} conv=fsync 2>&1 && rm {folder}/zeros"))
    # WAL is archived beside the backups, as in real life.
    sidecar = base.start_pgkeep(stage, config)
    base.demo.wait_until("the sidecar", lambda: stage.sql(
        "SELECT count(*) FROM pg_replication_slots WHERE active") == "1")
    note("full backup", "pgkeep", ours("backup"))
    if peer:
        peer.prepare()
        note("full backup", "pgBackRest", peer.backup("full"))
    note("full backup", "pg_basebackup, client zstd 1", into(tar, measure(
        stage, bin_ / "pg_basebackup", "-D", tar, "-Ft", "-c", "fast", "--compress=client-zstd:1", "-X", "none")))
    note("restore", "pgkeep", ours("restore", "--pgdata", copy, "--target-immediate"))
    if peer:
        base.make_folder(stage, "other")
        note("restore", "pgBackRest", peer.restore(other))
    stage.sql(f"UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid IN"
              f" (SELECT (random() * (SELECT count(*) FROM pgbench_accounts))::int FROM generate_series(1, {UPDATES}))")
    stage.sql("CHECKPOINT")
    note("incremental backup", "pgkeep", ours("backup", "--type", "incremental"))
    if peer:
        note("incremental backup", "pgBackRest", peer.backup("incr"))
    note("incremental backup", "pg_basebackup --incremental", into(increment, measure(
        stage, bin_ / "pg_basebackup", "-D", increment, "-Ft", "-c", "fast", "--compress=client-zstd:1", "-X", "none",
        f"--incremental={tar}/backup_manifest")))
    note("delta restore to it", "pgkeep", ours("restore", "--pgdata", copy, "--target-immediate", "--delta"))
    if peer:
        note("delta restore to it", "pgBackRest", peer.restore(other, "--delta"))
    shutil.rmtree(copy)
    note("restore of the incremental", "pgkeep", ours("restore", "--pgdata", copy, "--target-immediate"))
    base.stop(sidecar)
    for path in (copy, other, tar, increment, region):
        shutil.rmtree(path, ignore_errors=True)
    if peer:
        peer.clear()
    stage.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")

