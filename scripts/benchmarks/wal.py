"""Catching up on WAL that a slot has kept: pgkeep, pg_receivewal, pgBackRest's archive-push.

All read the same segments of one PostgreSQL 15 (the newest major that Debian's pgBackRest knows) and
write to the same disk as the server. Everything synced: pgkeep by each object, pg_receivewal by each
segment, pgBackRest by each file. What each run is timed from and to:

- pgkeep: from its start until the slot's restart_lsn has reached the end; durability = "all", so with
  two regions both have everything then.
- pg_receivewal: its whole run, --slot --endpos --no-loop.
- pgBackRest: the whole run of its asynchronous process, `archive-push:async`, which pushes all segments
  that are marked ready with two workers. The server would start `archive-push` once more for each
  segment, to ask for the outcome; that is left out, in pgBackRest's favour.
- "into nothing": a client that reads the stream and drops it, which shows the server's limit.

CPU seconds come from wait4 of the program, with those of its own children. Peak memory is of the
largest process.
"""

import os
import shutil
import socket
import struct
import time
from pathlib import Path

from . import stage as base
from .stage import Run, measure, median, number, spread

MAJOR = "15"
SEGMENT = 16 << 20
SETTINGS = """max_wal_size = '64GB'
shared_buffers = '1GB'
checkpoint_timeout = '1h'
wal_compression = off
autovacuum = off
max_replication_slots = 20
"""


def arguments(parser):
    parser.add_argument("--only", action="append", default=[], metavar="TOOL",
                        help="only tools whose name contains this; may be given again")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=TOML",
                        help="one region with these further keys in [wal], beside the others")


# ---------------------------------------------------------------- the WAL

def write_wal(stage, wanted):
    """Mixed WAL; gives its first and last LSN, both at a segment's boundary."""
    stage.sql("SELECT pg_switch_wal()")
    stage.sql("CHECKPOINT")
    stage.sql("SELECT pg_create_physical_replication_slot('keeper', true)")
    start = number(stage.sql("SELECT restart_lsn FROM pg_replication_slots")) // SEGMENT * SEGMENT
    part = wanted / 3.2e9
    scale = max(2, int(40 * part))
    # Bulk load, with an index build at its end.
    stage.run(stage.bin / "pgbench", "-i", "-q", "-s", scale)
    stage.sql("CREATE TABLE narrow AS SELECT n AS id, n % 1000 AS a, n % 77 AS b, now() AS t"
              f" FROM generate_series(1, {int(6e6 * part)}) n")
    stage.sql("CREATE INDEX ON narrow (id); CREATE INDEX ON narrow (a, id)")
    stage.sql("CREATE TABLE wide AS SELECT n AS id, repeat(md5(n::text) || ' some words of text ', 12)"
              f" AS text FROM generate_series(1, {int(6e5 * part)}) n")
    stage.sql("CREATE TABLE blobs (id int, data bytea); ALTER TABLE blobs ALTER data SET STORAGE EXTERNAL")
    stage.sql("INSERT INTO blobs SELECT n, (SELECT string_agg(sha512((n * 1000 + m)::text::bytea), '')"
              f" FROM generate_series(1, 128) m) FROM generate_series(1, {int(60e3 * part)}) n")
    # Small transactions after checkpoints: full-page images.
    environment = stage.environment
    stage.environment = {**environment, "PGOPTIONS": "-c synchronous_commit=off"}
    rounds = 0
    while rounds == 0 or number(stage.sql("SELECT pg_current_wal_lsn()")) - start < wanted:
        stage.sql("CHECKPOINT")
        stage.run(stage.bin / "pgbench", "-n", "-c", 4, "-j", 2, "-t", int(15_000 * part) + 100)
        rounds += 1
    stage.environment = environment
    stage.sql("SELECT pg_switch_wal()")
    end = number(stage.sql("SELECT pg_current_wal_lsn()")) // SEGMENT * SEGMENT
    # pg_receivewal stops only once it sees WAL behind its end.
    stage.sql("SELECT pg_logical_emit_message(true, 'bench', repeat('x', 10000))")
    stage.sql("CHECKPOINT")
    return start, end


def text(lsn):
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


class Slot:
    """A slot that holds all of the WAL, for one run."""

    def __init__(self, stage, name):
        self.stage, self.name = stage, name

    def __enter__(self):
        self.stage.sql(f"SELECT pg_copy_physical_replication_slot('keeper', '{self.name}')")

    def __exit__(self, *_):
        self.stage.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                       f" WHERE slot_name = '{self.name}' AND NOT active")


# ---------------------------------------------------------------- the tools

def pgkeep(stage, _, end, regions=1, settings=""):
    folders = [base.make_folder(stage, f"region{n}") for n in range(regions)]
    config = base.configure(stage, "bench_wal", [(f.name, f"file://{f}", "") for f in folders],
                            f'durability = "all"\n{settings}')
    with Slot(stage, "bench_wal"):
        psql = base.Psql(stage)
        noise = base.Noise(stage.server)
        began = time.monotonic()
        process = base.start_pgkeep(stage, config)
        question = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'bench_wal'"
        while number(psql.ask(question)) < end:
            if process.poll() is not None:
                raise RuntimeError((stage.folder / "bench_wal.log").read_text())
            time.sleep(0.02)
        seconds = time.monotonic() - began
        run = Run(seconds, base.stop(process))
        psql.close()
        noise.end(run)
    run.stored = base.size_of(folders[0])
    for folder in folders:
        shutil.rmtree(folder)
    return run


def receivewal(stage, _, end, compress="none"):
    target = base.make_folder(stage, "receivewal")
    with Slot(stage, "bench_receivewal"):
        noise = base.Noise(stage.server)
        run = measure(stage, stage.bin / "pg_receivewal", "-D", target, f"--compress={compress}",
                      "--slot", "bench_receivewal", "--endpos", text(end), "--no-loop")
        noise.end(run)
    run.stored = base.size_of(target)
    shutil.rmtree(target)
    return run


def pgbackrest(stage, start, end):
    folder = base.make_folder(stage, "pgbackrest")
    data = stage.folder / "data"
    config = folder / "pgbackrest.conf"
    config.write_text(f"""[global]
repo1-path={folder}/repo
spool-path={folder}/spool
lock-path={folder}/lock
log-path={folder}
log-level-console=warn
log-level-file=off
archive-async=y
process-max=2
compress-type=zst
compress-level=1
[bench]
pg1-path={data}
pg1-socket-path={stage.folder}
pg1-port={stage.environment['PGPORT']}
pg1-user=postgres
""")
    command = ["pgbackrest", f"--config={config}", "--stanza=bench"]
    stage.run(*command, "stanza-create")
    ready = data / "pg_wal/archive_status"
    names = [f"00000001{lsn >> 32:08X}{(lsn & 0xFFFFFFFF) // SEGMENT:08X}"
             for lsn in range(start, end, SEGMENT)]
    stage.run("touch", *[ready / f"{name}.ready" for name in names])
    noise = base.Noise(stage.server)
    run = measure(stage, *command, "archive-push:async", data / "pg_wal")
    noise.end(run)
    stored = list((folder / "repo/archive").rglob("*.zst"))
    if len(stored) != len(names):
        raise RuntimeError(f"pgBackRest stored {len(stored)} of {len(names)} segments")
    run.stored = sum(file.stat().st_size for file in stored)
    stage.run("rm", "-r", folder, *[ready / f"{name}.ready" for name in names])
    return run


# The protocol, as far as a reader needs it that drops everything.
READER = """
import socket, struct, sys
path, slot, start, length = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
link = socket.socket(socket.AF_UNIX)
link.connect(path)
words = b"user\\0postgres\\0replication\\0true\\0\\0"
link.sendall(struct.pack("!II", len(words) + 8, 196608) + words)
def until(tag):
    while True:
        head = link.recv(5, socket.MSG_WAITALL)
        body = link.recv(struct.unpack("!I", head[1:])[0] - 4, socket.MSG_WAITALL)
        if head[:1] == b"E":
            sys.exit(repr(body))
        if head[:1] == tag:
            return
until(b"Z")
query = f"START_REPLICATION SLOT {slot} PHYSICAL {start} TIMELINE 1".encode() + b"\\0"
link.sendall(b"Q" + struct.pack("!I", len(query) + 4) + query)
until(b"W")
buffer = bytearray(1 << 20)
while length > 0:
    length -= link.recv_into(buffer) or sys.exit("closed")
"""


def into_nothing(stage, start, end):
    path = stage.folder / f".s.PGSQL.{stage.environment['PGPORT']}"
    with Slot(stage, "bench_nothing"):
        noise = base.Noise(stage.server)
        run = measure(stage, "python3", "-c", READER, path, "bench_nothing", text(start), end - start)
        noise.end(run)
        time.sleep(0.2)
    return run


# ---------------------------------------------------------------- the benchmark

def tools(options):
    chosen = {
        "pgkeep, one region": pgkeep,
        "pgkeep, two regions": lambda *given: pgkeep(*given, regions=2),
        "pg_receivewal, plain": receivewal,
        "pg_receivewal, lz4": lambda *given: receivewal(*given, compress="lz4"),
        "pgBackRest, zstd 1, two processes": pgbackrest,
        "the server into nothing": into_nothing,
    }
    for variant in options.variant:
        name, _, settings = variant.partition("=")
        chosen[f"pgkeep, {name}"] = lambda *given, settings=settings: pgkeep(*given, settings=settings)
    if shutil.which("pgbackrest") is None:
        print("without pgBackRest: it is not installed (Debian: apt-get install pgbackrest)")
        del chosen["pgBackRest, zstd 1, two processes"]
    if options.only:
        chosen = {name: run for name, run in chosen.items() if any(o in name for o in options.only)}
    return chosen


def run(options):
    stage, server, _ = base.new_server(*base.programs(MAJOR), SETTINGS)
    stage.server = server
    chosen = tools(options)
    runs = {name: [] for name in chosen}
    try:
        start, end = write_wal(stage, 2e8 if options.quick else 3.2e9)
        for turn in range(options.rounds):
            # Each round begins with another tool.
            names = list(chosen)
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                os.sync()
                runs[name].append(chosen[name](stage, start, end))
                print(f"round {turn + 1}: {name}: {runs[name][-1].seconds:.2f} s", flush=True)
    finally:
        base.end_server(stage, server)
    report(runs, end - start)


def report(runs, length):
    print(f"\n{base.command_line()}; {length / 1e9:.2f} GB of WAL: bulk load, index builds, and pgbench with"
          " full-page images; medians (smallest–largest)\n")
    gigabytes = length / 1e9
    first = next(iter(runs.values()))
    rows = []
    for name, measured in runs.items():
        ratio = spread([f.seconds / m.seconds for f, m in zip(first, measured)])
        stored = median(measured, "stored")
        rows.append((
            name, spread([m.seconds for m in measured]),
            f"{length / 1e6 / median(measured, 'seconds'):.0f}",
            f"{median(measured, 'cpu') / gigabytes:.2f}",
            f"{median(measured, 'server_cpu') / gigabytes:.2f}",
            f"{median(measured, 'memory'):.0f}",
            f"{stored / 1e6:.0f} MB" if stored else "", ratio))
    base.print_table(["WAL catch-up", "seconds", "MB/s", "CPU s/GB", "server's CPU s/GB", "peak MiB",
                      "stored in a region", f"speed, {next(iter(runs))} = 1"], rows)
    base.print_noise([m for measured in runs.values() for m in measured])
