"""How figures grow: idle connections, entries, a body of 4 GB, scrapes of the metrics."""

import contextlib
import http.client
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from harness.content import content_path
from harness.internals import ChunkSums, Head, Record, Routes, Store, Variant
from harness.processes import free_port, until

from bench.cold import cold_get
from bench.measure import (
    Chosen,
    Table,
    cpu_seconds,
    every,
    forget_peaks,
    median,
    resident_bytes,
    verdict,
    wrk,
)
from bench.rig import KIB, Rig, fetch, put, rig, sized_path
from bench.servers import GupCache, Server

IDLE = 10_000
ENTRIES = (100, 1000, 5000, 20_000)
ENTRY_BYTES = 4 * KIB
MISSES = 60
BIG_BYTES = 4_000_000_000
_ASK = b"GET %b HTTP/1.1\r\nHost: gup\r\nUser-Agent: Endpoint/14.3\r\nAccept: */*\r\n\r\n"
_SETTLE_SECONDS = 1.5


# --- connections


@contextmanager
def _idle(port: int, path: str, count: int) -> Iterator[None]:
    """So many connections that have had one answer each and stay."""
    with contextlib.ExitStack() as stack:
        open_ = []
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            sock.sendall(_ASK % path.encode())
            open_.append(sock)
        for sock in open_:
            got = 0
            while got < ENTRY_BYTES:
                piece = sock.recv(16384)
                assert piece, "an idle connection was closed"
                got += len(piece)
        time.sleep(_SETTLE_SECONDS)
        yield


def idle(folder: Path, rounds: int, seconds: float) -> Table:
    table = Table(
        f"{IDLE:,} idle keep-alive connections, each after one answer",
        ["server", "resident for each", "hits without them", "hits with them", "with / without"],
        notes=["Resident: growth of all the server's processes (RSS), over the connections."],
    )
    with rig(folder / "idle") as site:
        path = put(site.tree, sized_path(ENTRY_BYTES), ENTRY_BYTES)
        site.warm([path])
        for server in site.servers:
            wrk(server, path, 64, 1)
            without = [wrk(server, path, 64, seconds) for _ in range(rounds)]
            before = resident_bytes(server.pids())
            with _idle(server.port, path, IDLE):
                each = (resident_bytes(server.pids()) - before) / IDLE / KIB
                with_them = [wrk(server, path, 64, seconds) for _ in range(rounds)]
            rates = [median([run.requests_per_second for run in runs]) for runs in (without, with_them)]
            ours = isinstance(server, GupCache)
            table.add(
                server.name,
                (verdict(each, 2.5, most=True) if ours else f"{each:.2f}") + " KiB",
                f"{rates[0]:,.0f}/s",
                f"{rates[1]:,.0f}/s",
                verdict(rates[1] / rates[0], 0.95) if ours else f"{rates[1] / rates[0]:.2f}",
            )
    return table


def scrape(folder: Path, rounds: int, seconds: float) -> Table:
    table = Table(
        "`/metrics` scraped each second, hits of 4 KiB", ["without", "with", "with / without", "one scrape"]
    )
    ratios, rates, times = [], {False: [], True: []}, []
    with rig(folder / "scrape", servers=("gup",)) as site:
        server = site.servers[0]
        path = put(site.tree, sized_path(ENTRY_BYTES), ENTRY_BYTES)
        site.warm([path])
        wrk(server, path, 64, 1)
        host, port = server.service.admin

        def scrape_once() -> None:
            began = time.monotonic()
            with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5) as answer:
                answer.read()
            times.append(time.monotonic() - began)

        for _ in range(max(5, rounds)):
            for scraped in (False, True):
                with every(1.0, scrape_once) if scraped else contextlib.nullcontext():
                    rates[scraped].append(wrk(server, path, 64, max(3.0, seconds)).requests_per_second)
            ratios.append(rates[True][-1] / rates[False][-1])
    table.add(
        f"{median(rates[False]):,.0f}/s",
        f"{median(rates[True]):,.0f}/s",
        verdict(median(ratios), 0.99),
        f"{median(times) * 1e3:.1f} ms",
    )
    return table


# --- entries


def _entry_path(number: int) -> str:
    return content_path(f"xdelta{number:09d}_To_260801001.dax", revision=f"26{number // 1000:07d}")


def _fill_store(root: Path, numbers: range) -> None:
    """Entries as gup stores them, written by its own store."""
    store = Store(root)
    store.prepare()
    body = bytes(range(256)) * (ENTRY_BYTES // 256)
    sums = ChunkSums()
    sums.add(body)
    whole = sums.finish()
    for number in numbers:
        route = Routes().route(_entry_path(number))
        key = route.key(Variant())
        head = Head(ENTRY_BYTES, f'"{number:032x}"', "application/octet-stream", None, "bench", None)
        path = store.body_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        mtime = path.stat().st_mtime_ns
        record = Record.of(key, route.kind, head, whole, time.time(), mtime, route.upstream_path)
        store.record_path(key).write_bytes(record.encode())


def entries(folder: Path, rounds: int, seconds: float) -> Table:
    del rounds
    columns = ["entries", "start to first hit", "hit, one entry", "hits over 2000 entries", "miss, CPU"]
    columns += ["worker memory", "controller memory", "list of 50", "purge of one"]
    note = "Start: from the command to the first answered hit; CPU times and memory are those of workers."
    table = Table("Entries in the store", columns, notes=[note])
    have = 0
    with rig(folder / "entries", servers=()) as site:
        for number in range(MISSES * len(ENTRIES)):
            put(site.tree, _miss_path(number), ENTRY_BYTES)
        root = folder / "entries" / "gup"
        for at, count in enumerate(ENTRIES):
            _fill_store(root, range(have, count))
            have = count
            table.add(f"{count:,}", *_with_entries(site, folder, count, at, seconds))
    return table


def _miss_path(number: int) -> str:
    return content_path(f"xdelta{number:09d}_To_260802001.dax", revision="250101001")


def _with_entries(site: Rig, folder: Path, count: int, at: int, seconds: float) -> list[str]:
    server = GupCache(folder / "entries", site.upstream.port, start=False, GUP_CACHE__KEEP_REVISIONS="0")
    try:
        started = _start_to_first_hit(server, _entry_path(count - 1))
        until(lambda: server.service.status()["cache"]["complete"], "the index is complete", 60)
        # workers alone: the controller has its own work just after a start
        workers = SimpleNamespace(name=server.name, port=server.port, pids=server.service.workers)
        one = wrk(workers, _entry_path(0), 64, seconds)
        targets = folder / "targets.txt"
        targets.write_text("".join(_entry_path(n) + "\n" for n in range(0, count, max(1, count // 2000))))
        wrk(server, "/", 64, 6, "several", str(targets))
        many = wrk(workers, "/", 64, seconds, "several", str(targets))
        before = cpu_seconds(workers.pids())
        for number in range(at * MISSES, (at + 1) * MISSES):
            cold_get(server.port, _miss_path(number))
        missed = (cpu_seconds(workers.pids()) - before) / MISSES
        controller = [pid for pid in server.service.children() if pid not in workers.pids()]
        listing, page = _call(server, "GET", "/api/v1/content?limit=50")
        purge, _ = _call(server, "DELETE", "/api/v1/content/" + quote(page["entries"][0]["key"]))
        return [
            verdict(started, 1.0, most=True) + " s",
            f"{one.cpu_seconds / one.requests * 1e6:.1f} µs",
            f"{many.cpu_seconds / many.requests * 1e6:.1f} µs",
            f"{missed * 1e3:.2f} ms",
            f"{resident_bytes(workers.pids()) / len(workers.pids()) / 2**20:.0f} MiB",
            f"{resident_bytes(controller) / 2**20:.0f} MiB",
            f"{listing * 1e3:.1f} ms",
            f"{purge * 1e3:.1f} ms",
        ]
    finally:
        server.stop()


def _start_to_first_hit(server: GupCache, path: str) -> float:
    """Seconds from the command to a hit's end, asked for again and again while nobody listens."""
    server.port = free_port()
    command = server.service.command
    command[command.index("--listen") + 1] = f"127.0.0.1:{server.port}"
    began = time.monotonic()
    server.service.launch()
    while True:
        try:
            fetch(server.port, path)
        except ConnectionRefusedError:
            time.sleep(0.002)
            continue
        started = time.monotonic() - began
        server.service.wait_ready()
        return started


def _call(server: GupCache, method: str, path: str) -> tuple[float, Any]:
    """The best of three calls of the control plane, in seconds, and the last answer."""
    times = []
    for _ in range(3 if method == "GET" else 1):
        connection = http.client.HTTPConnection(*server.service.admin, timeout=30)
        began = time.monotonic()
        connection.request(method, path, headers={"Authorization": f"Bearer {server.service.token}"})
        answer = connection.getresponse()
        text = answer.read()
        times.append(time.monotonic() - began)
        connection.close()
        assert answer.status == 200, (path, answer.status, text[:300])
    return min(times), json.loads(text)


# --- a large body


def big(folder: Path, rounds: int, seconds: float) -> Table:
    """Memory while a body of 4 GB is fetched and sent, and while it is sent again."""
    del rounds, seconds
    table = Table(
        f"A body of {BIG_BYTES / 1e9:.0f} GB",
        ["", "MB/s", "private memory before", "highest resident while sending", "growth"],
        notes=["Of all gup's processes; the highest resident set counts mapped files, the growth does not."],
    )
    with rig(folder / "big", servers=("gup",)) as site:
        server = site.servers[0]
        small = put(site.tree, sized_path(ENTRY_BYTES), ENTRY_BYTES)
        site.warm([small])
        path = content_path("full.dax")
        file = site.tree.file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            out.truncate(BIG_BYTES)
        for name in ("cold", "warm"):
            table.add(name, *_big_row(server, path))
    return table


def _big_row(server: Server, path: str) -> list[str]:
    pids = server.pids()
    before = resident_bytes(pids, "RssAnon")
    forget_peaks(pids)
    most = [before]

    def watch() -> None:
        most[0] = max(most[0], resident_bytes(pids, "RssAnon"))

    with every(0.05, watch):
        _, taken, length = cold_get(server.port, path)
    assert length == BIG_BYTES
    peak = resident_bytes(pids, "VmHWM")
    mib = 1 << 20
    return [
        f"{length / taken / 1e6:,.0f}",
        f"{before / mib:.0f} MiB",
        f"{peak / mib:.0f} MiB",
        f"{(most[0] - before) / mib:.1f} MiB",
    ]


PIECES = {"idle": idle, "scrape": scrape, "entries": entries, "big": big}


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    return [make(folder, rounds, seconds) for name, make in PIECES.items() if chosen(name)]
