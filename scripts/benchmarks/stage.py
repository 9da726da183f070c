"""What all benchmarks share: a throwaway server, running and measuring a program, tables."""

import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

sys.dont_write_bytecode = True
_loader = importlib.machinery.SourceFileLoader("demo", str(ROOT / "scripts/demo"))
demo = importlib.util.module_from_spec(importlib.util.spec_from_loader("demo", _loader))
_loader.exec_module(demo)

free_port = demo.free_port
_CLOCK = os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- the machine

def cpu_of(pid):
    """CPU seconds of a process, its children that live, and those that it has waited for."""
    children = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append((int(entry.name), fields))
        if int(entry.name) == pid:
            own = fields
    ticks = sum(int(field) for field in own[11:15])
    waiting = [pid]
    while waiting:
        for child, fields in children.get(waiting.pop(), []):
            ticks += sum(int(field) for field in fields[11:15])
            waiting.append(child)
    return ticks / _CLOCK


def _machine():
    """Busy and stolen CPU seconds of the machine since it started."""
    user, nice, system, _, _, irq, softirq, steal = (
        int(field) / _CLOCK for field in Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq, steal


class Noise:
    """How much CPU others took, and the hypervisor kept back, while something was measured."""

    def __init__(self, server):
        self.server = server
        self.began = time.monotonic()
        self.busy, self.stolen = _machine()
        self.of_server = cpu_of(server.pid)
        # Everything that a benchmark runs is its descendant.
        self.own = cpu_of(os.getpid())

    def end(self, run):
        seconds = time.monotonic() - self.began
        busy, stolen = _machine()
        time.sleep(0.3)  # so that the server has waited for the process that served the tool
        run.server_cpu = cpu_of(self.server.pid) - self.of_server
        others = busy - self.busy - (cpu_of(os.getpid()) - self.own)
        capacity = seconds * os.cpu_count()
        run.noise = max(0.0, others) / capacity
        run.stolen = (stolen - self.stolen) / capacity


# ---------------------------------------------------------------- measuring programs

class Run:
    """One measured run of a program: wall and CPU seconds, peak memory in MiB."""

    server_cpu = noise = stolen = 0.0
    stored = 0

    def __init__(self, seconds, usage):
        self.seconds = seconds
        self.cpu = usage.ru_utime + usage.ru_stime
        self.memory = usage.ru_maxrss / 1024


def measure(stage, *command, log="bench.log"):
    """Runs a command to its end."""
    began = time.monotonic()
    with open(stage.folder / log, "w") as output:
        process = subprocess.Popen([str(c) for c in command], stdout=output, stderr=output,
                                   **stage.options())
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    run = Run(time.monotonic() - began, usage)
    if process.returncode != 0:
        raise RuntimeError(f"{command}\n{(stage.folder / log).read_text()}")
    return run


class Psql:
    """A psql that stays connected: a question costs no new connection."""

    def __init__(self, stage):
        self.process = subprocess.Popen(
            [str(stage.bin / "psql"), "-XqAt"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=1, **stage.options())

    def ask(self, question):
        """The one line of the answer to a question without a semicolon."""
        self.process.stdin.write(question + ";\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self):
        self.process.kill()
        self.process.wait()


def stop(process, patience_s=30):
    """SIGTERM and wait; gives the resource usage."""
    process.send_signal(signal.SIGTERM)
    timer = threading.Timer(patience_s, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


# ---------------------------------------------------------------- servers and configurations

def programs(major):
    """PostgreSQL's programs of this major, and pgkeep."""
    demo.MAJOR = major
    return demo.setup()


def new_server(postgres, pgkeep, settings=""):
    """A fresh cluster that runs: its stage, the process, its data directory."""
    stage = demo.Stage(postgres, pgkeep)
    data = stage.folder / "data"
    stage.run(stage.bin / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-k",
              "--locale=C", "--encoding=UTF8", "--no-sync")
    with open(data / "postgresql.conf", "a") as file:
        file.write(f"listen_addresses = ''\nport = {stage.environment['PGPORT']}\n"
                   f"unix_socket_directories = '{stage.folder}'\n{settings}\n")
    return stage, stage.start_server(data, "postgres.log"), data


def end_server(stage, server):
    server.send_signal(signal.SIGINT)
    stage.close()


def script(stage, name, text):
    """A script for pgbench."""
    path = stage.folder / name
    path.write_text(text)
    return path


INSERT = "INSERT INTO orders (item) VALUES ('one item');\n"
ORDERS = "CREATE TABLE orders (id bigserial PRIMARY KEY, item text, placed timestamptz DEFAULT now())"


def make_folder(stage, name):
    folder = stage.folder / name
    stage.run("mkdir", folder)
    return folder


def configure(stage, name, regions, wal="", http=""):
    """Writes a configuration; `regions` are (name, url, further keys)."""
    text = (f'[cluster]\nname = "bench"\nslot = "{name}"\n'
            f'conninfo = "host={stage.folder} port={stage.environment["PGPORT"]} user=postgres"\n'
            f'[wal]\n{wal}\n[http]\nlisten = "{http}"\n')
    for region, url, keys in regions:
        text += f'[[region]]\nname = "{region}"\nurl = "{url}"\n{keys}\n'
    config = stage.folder / f"{name}.toml"
    config.write_text(text)
    return config


def start_pgkeep(stage, config):
    return stage.start(stage.pgkeep, "--config", config, "run", log=f"{config.stem}.log")


def status_of(address):
    """What a running pgkeep says of itself; None while it says nothing."""
    try:
        with urllib.request.urlopen(f"http://{address}/status", timeout=2) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def number(lsn):
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


def size_of(folder):
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


# ---------------------------------------------------------------- tables

def median(runs, field):
    return statistics.median(getattr(run, field) for run in runs)


def spread(values, form="{:.2f}"):
    middle, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{middle} ({low}–{high})"


def percentile(values, share):
    """The smallest value that is not below `share` of all values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def print_table(header, rows):
    print(f"| {' | '.join(header)} |")
    print(f"|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def command_line():
    """How this run was started, for the page that shows its results."""
    rounds = os.environ.get("PGKEEP_BENCH_ROUNDS")
    before = f"PGKEEP_BENCH_ROUNDS={rounds} " if rounds else ""
    return f"`{before}scripts/bench {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"


def print_noise(runs):
    noise, stolen = (max(getattr(run, field) for run in runs) for field in ("noise", "stolen"))
    print(f"\nOther programs took {100 * median(runs, 'noise'):.0f} % of the machine's CPU time in the"
          f" median run and {100 * noise:.0f} % in the worst; the hypervisor kept back at most"
          f" {100 * stolen:.0f} %. Load now: {os.getloadavg()[0]:.1f}.")
