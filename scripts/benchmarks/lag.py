"""How old the oldest WAL byte gets that a region does not have yet, at a steady rate of small commits.

Nobody is asked who has an interest: a prober notes every 20 ms how far the server has flushed its WAL,
a second one every 40 ms how far the pieces reach that lie in each local folder, and a proxy in front of the
S3 region when it answered which upload. The age at a moment is the time since the last note of the server's position that
the region has reached: at most the prober's pause too much. What `/status` says meanwhile stands beside it.
"""

import bisect
import re
import threading
import time

from . import stage as base
from .s3 import S3
from .stage import number, percentile

MAJOR = "17"
SEGMENT = 16 << 20
PIECE = re.compile(r"[0-9A-F]{8}([0-9A-F]{8})([0-9A-F]{8})-([0-9A-F]{8})-([0-9A-F]{8})-[0-9a-f]{16}\.zst$")
WARM_UP_S = 10
TARGET_S = 1.5


def piece_range(name):
    """The WAL that an object holds, by its name; None for other objects."""
    found = PIECE.search(name)
    if not found:
        return None
    high, low, begin, end = (int(part, 16) for part in found.groups())
    segment = (high << 32) + low * SEGMENT
    return segment + begin, segment + end


class Frontier:
    """How far WAL reaches without a hole, as pieces appear."""

    def __init__(self):
        self.reached = None
        self.waiting = set()
        self.history = []  # (time, LSN)
        self.full = 0

    def add(self, moment, pieces):
        self.waiting |= set(pieces)
        if self.reached is None and self.waiting:
            self.reached = min(self.waiting)[0]
        before = self.reached
        for begin, end in sorted(self.waiting):
            if begin <= self.reached < end:
                self.reached = end
        self.waiting = {piece for piece in self.waiting if piece[1] > (self.reached or 0)}
        if self.reached != before or not self.history:
            self.history.append((moment, self.reached or 0))


class Prober(threading.Thread):
    """Does something at a steady pace until told to stop."""

    def __init__(self, pause_s, work):
        super().__init__(daemon=True)
        self.pause_s, self.work, self.stopped = pause_s, work, threading.Event()
        self.start()

    def run(self):
        while not self.stopped.wait(self.pause_s):
            self.work()

    def end(self):
        self.stopped.set()
        self.join()


def ages(server, frontier, moments):
    """The age of the oldest missing byte at each moment."""
    times = [moment for moment, _ in frontier]
    positions = [position for _, position in server]
    found = []
    for moment in moments:
        at = bisect.bisect_right(times, moment) - 1
        has = frontier[at][1] if at >= 0 else 0
        missing = bisect.bisect_right(positions, has)
        if missing >= len(server) or server[missing][0] > moment:
            found.append(0.0)
        else:
            found.append(moment - server[max(0, missing - 1)][0])
    return found


def run(options):
    stage, postgres, _ = base.new_server(*base.programs(MAJOR), "max_wal_size = '4GB'")
    seconds = WARM_UP_S + (20 if options.quick else 90)
    try:
        stage.sql(base.ORDERS)
        s3 = S3(stage, base.make_folder(stage, "s3"))
        folders = {name: base.make_folder(stage, name) for name in ("local1", "local2")}
        address = f"127.0.0.1:{base.free_port()}"
        regions = [(name, f"file://{folder}", "") for name, folder in folders.items()]
        config = base.configure(stage, "bench_lag", [*regions, ("s3", "s3://bench/lag", s3.keys())],
                                'flush_interval = "1s"', address)
        s3.wait(stage, config)
        process = base.start_pgkeep(stage, config)
        base.demo.wait_until("pgkeep", lambda: (base.status_of(address) or {}).get("streaming"))
        noise = base.Noise(postgres)
        seen, spoken, rate = watch(stage, s3, folders, address, seconds)
        run = base.Run(seconds, base.stop(process))
        noise.end(run)
    finally:
        base.end_server(stage, postgres)
    report(seen, spoken, rate, run)


def watch(stage, s3, folders, address, seconds):
    psql = base.Psql(stage)
    server, spoken = [], []
    frontiers = {name: Frontier() for name in folders}

    def ask_server():
        position = number(psql.ask("SELECT pg_current_wal_flush_lsn()"))
        server.append((time.time(), position))

    def list_folders():
        for name, folder in folders.items():
            pieces = [piece_range(file.name) for file in folder.glob("bench/*/wal/*/*/*.zst")]
            frontiers[name].add(time.time(), [piece for piece in pieces if piece])

    def ask_pgkeep():
        spoken.append((time.time(), base.status_of(address)))

    probers = [Prober(0.02, ask_server), Prober(0.04, list_folders), Prober(0.09, ask_pgkeep)]
    insert = base.script(stage, "insert.sql", base.INSERT)
    began = time.time()
    said = stage.run(stage.bin / "pgbench", "-n", "-c", 8, "-j", 2, "-R", 2000, "-T", seconds, "-f", insert)
    ended = time.time()
    for prober in probers:
        prober.end()
    psql.close()
    uploads = Frontier()
    for moment, method, key, status in list(s3.proxy.seen):
        piece = piece_range(key)
        if method == "PUT" and status == 200 and piece:
            uploads.add(moment, [piece])
    frontiers["s3"] = uploads
    moments = [began + WARM_UP_S + step * 0.02 for step in range(int((ended - began - WARM_UP_S) / 0.02))]
    found = {name: (ages(server, frontier.history, moments), frontier) for name, frontier in frontiers.items()}
    spoken = [status for moment, status in spoken if began + WARM_UP_S <= moment <= ended and status]
    return found, spoken, float(re.search(r"^tps = ([\d.]+)", said, re.M)[1])


def report(found, spoken, rate, run):
    print(f"\n{base.command_line()}; {rate:.0f} one-row commits a second, flush_interval 1 s, three regions\n")
    rows = []
    for name, (measured, frontier) in found.items():
        own = [region["lag_seconds"] for status in spoken for region in status["regions"]
               if region["name"] == name and region["lag_seconds"] is not None]
        crossed = frontier.history[-1][1] // SEGMENT - frontier.history[0][1] // SEGMENT
        cells = [f"{value:.2f}" for values in (measured, own) if values
                 for value in (percentile(values, 0.5), percentile(values, 0.99), max(values))]
        met = "yes" if percentile(measured, 0.99) < TARGET_S else "no"
        rows.append((name, *cells, crossed, met))
    base.print_table(["region", "age p50, s", "p99", "max", "/status says p50, s", "p99", "max",
                      "segments completed", f"p99 under {TARGET_S} s"], rows)
    print(f"\n{len(next(iter(found.values()))[0])} samples of the age and {len(spoken)} of /status a region.")
    base.print_noise([run])
