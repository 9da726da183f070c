"""Commits that wait for the archive: pgkeep as the synchronous standby, and pg_receivewal --synchronous.

Eight clients insert one row a transaction. Each waits until its WAL is synced by the server, and then by
the synchronous standby, which keeps its archive on the same disk. The last line, no standby at all, is
the ceiling.
"""

import re
import statistics
import time

from . import stage as base

MAJOR = "17"
NONE, OURS, THEIRS = "no standby", "pgkeep, one region", "pg_receivewal --synchronous"


def run(options):
    stage, server, _ = base.new_server(*base.programs(MAJOR), "max_wal_size = '8GB'\nautovacuum = off")
    seconds = 5 if options.quick else 30
    results = {OURS: [], THEIRS: [], NONE: []}
    try:
        stage.sql(base.ORDERS)
        for turn in range(options.rounds):
            for name in results:
                results[name].append(one(stage, name, turn, seconds))
                print(f"round {turn + 1}: {name}: {results[name][-1]['tps']:.0f} tps", flush=True)
    finally:
        base.end_server(stage, server)
    report(results, seconds)


def set_standby(stage, name):
    stage.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    stage.sql("SELECT pg_reload_conf()")


def one(stage, name, turn, seconds):
    stage.sql("CHECKPOINT")
    standby, slot = {NONE: ("", None), OURS: ("pgkeep", f"ours{turn}"),
                     THEIRS: ("pg_receivewal", f"theirs{turn}")}[name]
    process = None
    if slot:
        folder = base.make_folder(stage, slot)
        stage.sql(f"SELECT pg_create_physical_replication_slot('{slot}', true)")
        if name == OURS:
            config = base.configure(stage, slot, [("local", f"file://{folder}", "")],
                                    'flush_interval = "0s"')
            process = base.start_pgkeep(stage, config)
        else:
            process = stage.start(stage.bin / "pg_receivewal", "-D", folder, "--slot", slot,
                                  "--synchronous", "--no-loop", log="receivewal.log")
        set_standby(stage, standby)
        state = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'"
        base.demo.wait_until(f"{name} as synchronous standby", lambda: stage.sql(state) == "1")
    try:
        return pgbench(stage, seconds)
    finally:
        set_standby(stage, "")
        time.sleep(0.2)
        if process:
            base.stop(process)
            stage.sql(f"SELECT pg_drop_replication_slot('{slot}')")


def pgbench(stage, seconds):
    insert = base.script(stage, "insert.sql", base.INSERT)
    for log in stage.folder.glob("latency.*"):
        log.unlink()
    said = stage.run(stage.bin / "pgbench", "-n", "-c", 8, "-j", 2, "-T", seconds, "-f", insert,
                     "-l", "--log-prefix", stage.folder / "latency")
    latencies = [int(line.split()[2]) / 1000 for log in stage.folder.glob("latency.*")
                 for line in log.read_text().splitlines()]
    return {"tps": float(re.search(r"^tps = ([\d.]+)", said, re.M)[1]),
            "p50": statistics.median(latencies), "p99": base.percentile(latencies, 0.99)}


def report(results, seconds):
    print(f"\n{base.command_line()}; 8 clients, {seconds} s a run; medians (smallest–largest)\n")
    rows = []
    for name, runs in results.items():
        def column(field, form):
            return base.spread([run[field] for run in runs], form)
        ratio = base.spread([run["tps"] / peer["tps"] for run, peer in zip(runs, results[THEIRS])])
        rows.append((name, column("tps", "{:.0f}"), column("p50", "{:.2f}"), column("p99", "{:.2f}"), ratio))
    base.print_table(["synchronous standby", "commits a second", "median latency, ms", "99 %, ms",
                      "rate, pg_receivewal = 1"], rows)
