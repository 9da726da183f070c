"""Requests that archiving makes to one S3 region, counted, and what they cost a day.

Nine clusters at once, each with its own pgkeep and its own folder in one bucket: three flush intervals; an
idle server, a light one (one small commit a second) and a heavy one (2,000 small commits a second). A
proxy in front of the S3 server counts once all of them stream.
"""

import re
import time
from collections import Counter

from . import stage as base
from .s3 import S3

MAJOR = "17"
INTERVALS = ["1s", "5s", "30s"]
# Commits a second.
LOADS = {"idle": 0, "light": 1, "heavy": 2000}
KINDS = ["PUT", "LIST", "GET", "HEAD", "DELETE", "POST"]
# US dollars for a thousand on S3's price list, as an example; deleting costs nothing, also by POST.
PRICES = {"PUT": 0.005, "LIST": 0.005, "POST": 0, "GET": 0.0004, "HEAD": 0.0004, "DELETE": 0}


def arguments(parser):
    parser.add_argument("--seconds", type=int, help="how long to count (180; with --quick 40)")


class Cell:
    """One cluster with its archiver."""

    def __init__(self, programs, s3, load, interval):
        self.load, self.interval = load, interval
        self.prefix = f"{load}-{interval}"
        # Commits do not wait for the disk: what counts is how many there are.
        self.stage, self.server, _ = base.new_server(
            *programs, "fsync = off\nshared_buffers = '64MB'\nmax_wal_size = '256MB'")
        self.stage.sql(base.ORDERS)
        self.address = f"127.0.0.1:{base.free_port()}"
        self.config = base.configure(self.stage, "bench_requests",
                                     [("s3", f"s3://bench/{self.prefix}", s3.keys())],
                                     f'flush_interval = "{interval}"', self.address)

    def begin(self, seconds):
        base.start_pgkeep(self.stage, self.config)
        base.demo.wait_until("pgkeep", lambda: (base.status_of(self.address) or {}).get("streaming"))
        self.client = None
        if LOADS[self.load]:
            insert = base.script(self.stage, "insert.sql", base.INSERT)
            self.client = self.stage.start(
                self.stage.bin / "pgbench", "-n", "-c", 4 if self.load == "heavy" else 1,
                "-R", LOADS[self.load], "-T", seconds, "-f", insert, log="pgbench.log")

    def rate(self):
        if self.client is None:
            return 0.0
        self.client.wait()
        said = (self.stage.folder / "pgbench.log").read_text()
        return float(re.search(r"^tps = ([\d.]+)", said, re.M)[1])

    def wal(self):
        return base.number(self.stage.sql("SELECT pg_current_wal_lsn()"))


def run(options):
    programs = base.programs(MAJOR)
    seconds = options.seconds or (40 if options.quick else 180)
    warm_up = 15
    cells = []
    home = base.demo.Stage(*programs)
    try:
        s3 = S3(home, base.make_folder(home, "s3"))
        for load in LOADS:
            for interval in INTERVALS:
                cells.append(Cell(programs, s3, load, interval))
        s3.wait(cells[0].stage, cells[0].config)
        # One after the other: flushes of nine clusters at the same moment would be no one's case.
        for cell in cells:
            cell.begin(seconds + warm_up + 10)
        time.sleep(warm_up)
        began, first = time.time(), [cell.wal() for cell in cells]
        time.sleep(seconds)
        ended, last = time.time(), [cell.wal() for cell in cells]
        counts = count(s3.proxy.seen, cells, began, ended)
        for cell, begin, end in zip(cells, first, last):
            cell.wal_rate = (end - begin) / (ended - began)
            cell.commits = cell.rate()
        report(cells, counts, ended - began)
    finally:
        for cell in cells:
            base.end_server(cell.stage, cell.server)
        home.close()


def count(seen, cells, began, ended):
    counts = {cell.prefix: Counter() for cell in cells}
    for moment, method, key, _ in list(seen):
        prefix = key.split("/")[0]
        if began <= moment < ended and prefix in counts:
            counts[prefix][method] += 1
    return counts


def report(cells, counts, seconds):
    print(f"\n{base.command_line()}; counted for {seconds:.0f} s\n")
    rows = []
    for cell in cells:
        found = counts[cell.prefix]
        day = {kind: found[kind] * 86400 / seconds for kind in KINDS}
        cost = sum(day[kind] / 1000 * PRICES[kind] for kind in KINDS)
        rows.append((f"{cell.load}, {cell.commits:.0f} commits/s", cell.interval, f"{cell.wal_rate / 1e3:.1f}",
                     *(f"{found[kind] * 60 / seconds:.1f}" for kind in KINDS),
                     f"{sum(day.values()):,.0f}", f"{cost:.3f}", f"{30 * cost:.2f}"))
    base.print_table(["server", "flush_interval", "WAL, kB/s", *(f"{kind} a minute" for kind in KINDS),
                      "requests a day", "$ a day", "$ in 30 days"], rows)
    print(f"\nPrices: {', '.join(f'{kind} {price}' for kind, price in PRICES.items())} US dollars for 1,000"
          " (S3 Standard in us-east-1, an example). A region each; storage and traffic not included.")
