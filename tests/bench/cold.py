"""Cold keys: first byte, misses, CPU and system calls, before a near upstream without a limit."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.content import content_path
from harness.processes import until

from bench.load import fetch_all
from bench.measure import Chosen, Table, cpu_seconds, median, percentile, verdict
from bench.rig import Rig, fresh_disk, put, rig
from bench.servers import GUP, GUP_ONE, NOPUSH_OFF, PATH, VARNISH_FILE, GupCache, Server, program

SIZES = {"10 KB": 10_000, "100 KB": 100_000, "1 MB": 1_000_000, "100 MB": 100_000_000}
CLIENTS = (1, 32)
SERVERS = ("off", "varnish", "varnish-file", "gup", "gup-one")
_MOST_KEYS = {"10 KB": 4000, "100 KB": 3000, "1 MB": 600, "100 MB": 3}
"""Of one run, which ends after 1.5 s too: what is dirty stays below what makes the kernel slow writers."""
_SECONDS = 1.5
_SETTLE_SECONDS = 1.0
_ONE_REVISION = 100
"""Deltas in one folder: some tens are real."""
_TRACED = 200


@dataclass(frozen=True, slots=True)
class Goal:
    """Of gup: the least share of nginx's rate; the most CPU (ms, or beside nginx's), and first byte."""

    rate: float | None = None
    cpu_ms: float | None = None
    cpu: float | None = None
    first_ms: float | None = None
    controller_ms: float | None = None


GOALS = {
    ("10 KB", 1): Goal(cpu_ms=1.0, first_ms=1.0),
    ("10 KB", 32): Goal(cpu_ms=1.0),
    ("100 KB", 1): Goal(first_ms=1.2),
    ("100 KB", 32): Goal(rate=0.3, cpu_ms=1.2, controller_ms=0.1),
    ("100 MB", 1): Goal(rate=1.0, cpu=2.0),
    ("100 MB", 32): Goal(rate=1.0, cpu=2.0),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one server. CPU is in milliseconds a miss; the controller's is gup's outside its workers."""

    rate: float
    firsts_ms: list[float]
    cpu_ms: float
    controller_ms: float
    load_cores: float


class Site(Rig):
    """Upstream in memory, with one file for each size, and caches on a disk of their own."""

    _numbers = itertools.count()

    def fresh(self, size: str, count: int) -> Iterator[str]:
        """Names of deltas that nobody has asked for."""
        for number in itertools.islice(self._numbers, count):
            name = f"xdelta{SIZES[size]:09d}{number:07d}_To_260801001.dax"
            yield content_path(name, revision=f"26{number // _ONE_REVISION:07d}")


_UPSTREAM = """
    keepalive_requests 10000000;
    access_log off;
    open_file_cache max=10;
    rewrite "xdelta([0-9]{9})" /$1 break;
"""


@contextmanager
def _site(folder: Path, names: Sequence[str], preload: str = "") -> Iterator[Site]:
    """All of it started, and each cache woken: a first fill imports and connects."""
    with fresh_disk(folder) as disk, rig(disk, names, upstream=_UPSTREAM, preload=preload, kind=Site) as site:
        for size in SIZES.values():
            put(site.tree, f"/{size:09d}", size)
        for server in site.servers:
            if isinstance(server, GupCache):
                until(lambda server=server: server.service.status()["cache"]["complete"], "the index", 60)
            fetch_all(server.port, site.fresh("10 KB", 128), 32)
        yield site


def _run(site: Site, server: Server, size: str, clients: int) -> Run:
    """One run; what the server does afterwards for these misses counts too."""
    os.sync()  # what the one before left to be written would slow the next
    pids = server.pids()
    workers = server.service.workers() if isinstance(server, GupCache) else pids
    before = cpu_seconds(pids), cpu_seconds(workers)
    try:
        found = fetch_all(server.port, site.fresh(size, max(clients, _MOST_KEYS[size])), clients, _SECONDS)
    except AssertionError as error:
        error.add_note(f"{server.name}, {size}, {clients} clients")
        raise
    time.sleep(_SETTLE_SECONDS)
    spent, of_workers = cpu_seconds(pids) - before[0], cpu_seconds(workers) - before[1]
    misses = len(found.firsts)
    return Run(
        misses / found.seconds,
        [first * 1e3 for first in found.firsts],
        spent * 1e3 / misses,
        (spent - of_workers) * 1e3 / misses,
        found.cpu_seconds / found.seconds,
    )


_COLUMNS = ["body", "clients", "server", "misses/s", "worst", "MB/s", "/ nginx", "first byte, ms", "99 %"]
_COLUMNS += ["CPU a miss, ms", "worst", "/ nginx", "controller's", "cores of the load"]


def _cell(table: Table, site: Site, size: str, clients: int, rounds: int) -> None:
    """Every server in turn, round by round, and its row."""
    servers = site.servers
    if clients * SIZES[size] > 1 << 30:  # 3 GB a run, as much to be written to the disk
        rounds, servers = max(1, rounds // 2), [s for s in servers if s.name not in (VARNISH_FILE, GUP_ONE)]
    runs: dict[str, list[Run]] = {server.name: [] for server in servers}
    for number in range(rounds):
        for server in servers if number % 2 else servers[::-1]:
            runs[server.name].append(_run(site, server, size, clients))
    nginx = runs[NOPUSH_OFF]
    for name, found in runs.items():
        rates, cpus = [run.rate for run in found], [run.cpu_ms for run in found]
        ours = name in (GUP, GUP_ONE)
        goal = GOALS.get((size, clients), Goal()) if ours else Goal()
        firsts = [first for run in found for first in run.firsts_ms]
        digits = 0 if median(rates) > 100 else 1
        table.add(
            *(size, str(clients), name),
            f"{median(rates):,.{digits}f}",
            f"{min(rates):,.{digits}f}",
            f"{median(rates) * SIZES[size] / 1e6:,.0f}",
            verdict(median(rates) / median([run.rate for run in nginx]), goal.rate),
            verdict(median(firsts), goal.first_ms, most=True),
            f"{percentile(firsts, 0.99):.1f}",
            verdict(median(cpus), goal.cpu_ms, most=True),
            f"{max(cpus):.2f}",
            verdict(median(cpus) / median([run.cpu_ms for run in nginx]), goal.cpu, most=True),
            verdict(median([r.controller_ms for r in found]), goal.controller_ms, most=True) if ours else "",
            f"{median([run.load_cores for run in found]):.2f}",
        )
    for name, found in runs.items():
        for run in found:
            row = asdict(run) | {"firsts_ms": [median(run.firsts_ms), percentile(run.firsts_ms, 0.99)]}
            table.raw.append({"cell": f"{size}@{clients}", "server": name, **row})


# --- system calls


def _traced(pids: list[int], work: Callable[[], object], out: Path) -> dict[str, int]:
    """Calls by name of these processes and all their threads meanwhile."""
    command = ["strace", "-c", "-f", "-o", str(out), *(word for pid in pids for word in ("-p", str(pid)))]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        threads = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
        until(lambda: all("TracerPid:\t0" not in (t / "status").read_text() for t in threads), "traced")
        work()
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
    rows = [line.split() for line in out.read_text().splitlines()]
    return {
        row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdecimal() and row[-1] != "total"
    }


def _system_calls(site: Site, size: str, clients: int) -> Table:
    found: dict[str, dict[str, int]] = {}
    for server in site.servers:
        if server.name in (GUP, VARNISH_FILE):  # as their likes
            continue

        def work(port: int = server.port) -> None:
            fetch_all(port, site.fresh(size, _TRACED), clients)
            time.sleep(_SETTLE_SECONDS)

        found[server.name] = _traced(server.pids(), work, site.folder / "strace.txt")
    table = Table(
        f"Cold keys: system calls a miss, {size}, {clients} clients, under strace", ["call", *found]
    )
    table.add("all", *(f"{sum(calls.values()) / _TRACED:,.1f}" for calls in found.values()))
    names = {name for calls in found.values() for name in calls}
    for name in sorted(names, key=lambda name: -max(calls.get(name, 0) for calls in found.values())):
        each = [calls.get(name, 0) / _TRACED for calls in found.values()]
        if max(each) >= 0.1:
            table.add(name, *(f"{value:.1f}" if value else "" for value in each))
    return table


# --- a hard disk


def _slow_syncs(folder: Path, rounds: int) -> Table:
    """gup beside itself with syncs that take 8 ms more, as on a hard disk."""
    table = Table(
        "Cold keys: syncs of 8 ms (a preloaded library), 100 KB, 32 clients",
        ["clients", "misses/s", "with slow syncs", "with / without", "worst round"],
    )
    library = folder / "slow_sync.so"
    source = Path(__file__).with_name("slow_sync.c")
    subprocess.run([program("gcc"), "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    with _site(folder / "slow", ("gup", "gup-preloaded"), str(library)) as site:
        for clients in CLIENTS:
            plain, slow, (one, other) = [], [], site.servers
            for number in range(max(3, rounds)):
                pair = ((one, plain), (other, slow))
                for server, rates in pair if number % 2 else pair[::-1]:
                    rates.append(_run(site, server, "100 KB", clients).rate)
            worst = min(theirs / ours for ours, theirs in zip(plain, slow, strict=True))
            usual = median(plain), median(slow)
            told = verdict(usual[1] / usual[0], 0.9)
            table.add(str(clients), *(f"{rate:,.0f}" for rate in usual), told, f"{worst:.2f}")
    return table


def _has(name: str) -> bool:
    found = shutil.which(name, path=PATH) is not None
    if not found:
        sys.stdout.write(f"{name} is not installed: what needs it is left out\n")
    return found


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    del seconds
    table, made = Table("Cold keys", _COLUMNS), []
    for size in SIZES:
        cells = [clients for clients in CLIENTS if chosen(size, clients)]
        traced = size == "100 KB" and chosen("system calls") and _has("strace")
        if cells or traced:
            with _site(folder / size.replace(" ", "-"), SERVERS) as site:
                for clients in cells:
                    _cell(table, site, size, clients, rounds)
                made += [_system_calls(site, size, clients) for clients in CLIENTS if traced]
    if chosen("hdd") and _has("gcc"):
        made.append(_slow_syncs(folder, rounds))
    return [table, *made] if table.rows else made
