"""How figures grow: idle connections, entries, a body of 4 GB."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from harness.content import content_path
from harness.internals import ChunkSums, Head, Record, Routes, Store, Variant
from harness.processes import free_port

from bench.load import fetch_all
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
from bench.rig import KIB, Rig, fetch, fresh_disk, put, rig, sized_path
from bench.servers import GupCache, Server

IDLE = 10_000
ENTRIES = (100, 1000, 10_000, 100_000)
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


_ENTRY_COLUMNS = ["entries", "first start to a hit, s", "index built, s", "its CPU, s", "restart to a hit, s"]
_ENTRY_COLUMNS += ["reconciled, s", "its CPU, s", "hit, µs", "hit of 2000, µs", "miss, CPU ms", "worker, MiB"]
_ENTRY_COLUMNS += ["controller, MiB", "an entry, KiB", "list of 50, ms", "purge of one, ms"]
_ENTRY_NOTE = (
    "First start: nine tenths of the entries are new to the index; restart: all but one are known. Both from "
    "the command on. Hits and misses are CPU of the workers, built and reconciled that of the controller."
)


def entries(folder: Path, rounds: int, seconds: float) -> Table:
    del rounds
    table = Table("Entries in the store", _ENTRY_COLUMNS, notes=[_ENTRY_NOTE])
    have, least = 0, (0, 0)
    with fresh_disk(folder / "entries") as disk, rig(disk, ()) as site:
        for number in range(MISSES * len(ENTRIES)):
            put(site.tree, _miss_path(number), ENTRY_BYTES)
        for at, count in enumerate(ENTRIES):
            _fill_store(disk / "gup", range(have, count))
            have = count
            server = GupCache(disk, site.upstream.port, start=False)
            first = _start(server, _entry_path(count - 2))
            server.stop()
            _lose(disk / "gup", have - 1)  # reconciling has ended when this one is gone from the index
            have -= 1
            again = _start(server, _entry_path(count - 2))
            try:
                cells, controller_bytes = _with_entries(site, server, count, at, seconds)
            finally:
                server.stop()
            least = least if at else (count, controller_bytes)
            each = (controller_bytes - least[1]) / 1024 / max(count - least[0], 1)
            told = verdict(first[0], 1.0, most=True), f"{first[1]:.1f}", f"{first[2]:.1f}"
            told += verdict(again[0], 1.0, most=True), verdict(again[1], 20, most=True), f"{again[2]:.1f}"
            wanted = 1.0 if count == ENTRIES[-1] else None
            cells.insert(-2, verdict(each, wanted, most=True) if at else "")
            table.add(f"{count:,}", *told, *cells)
    return table


def _lose(root: Path, number: int) -> None:
    """Remove an entry's files."""
    store = Store(root)
    key = Routes().route(_entry_path(number)).key(Variant())
    store.record_path(key).unlink()
    store.body_path(key).unlink()


def _miss_path(number: int) -> str:
    return content_path(f"xdelta{number:09d}_To_260802001.dax", revision="250101001")


def _start(server: GupCache, path: str) -> tuple[float, float, float]:
    """Seconds from the command to a hit, and until the index is right; CPU of the controller until then."""
    stored = sum(1 for _ in (server.service.cache_dir / "content").rglob(".*.gup"))
    started = _start_to_first_hit(server, path)
    began = time.monotonic() - started
    while server.service.status()["cache"]["entries"] != stored:
        time.sleep(0.2)  # each look costs the controller itself
    return started, time.monotonic() - began, cpu_seconds(_controller(server))


def _controller(server: GupCache) -> list[int]:
    return [pid for pid in server.service.children() if pid not in server.service.workers()]


def _with_entries(site: Rig, server: GupCache, count: int, at: int, seconds: float) -> tuple[list[str], int]:
    # workers alone: the controller has its own work just after a start
    workers = SimpleNamespace(name=server.name, port=server.port, pids=server.service.workers)
    one = wrk(workers, _entry_path(count - 2), 64, seconds)
    targets = site.folder / "targets.txt"
    targets.write_text("".join(_entry_path(n) + "\n" for n in range(0, count - 1, max(1, count // 2000))))
    wrk(server, "/", 64, 6, "several", str(targets))
    many = wrk(workers, "/", 64, seconds, "several", str(targets))
    before = cpu_seconds(workers.pids())
    fetch_all(server.port, map(_miss_path, range(at * MISSES, (at + 1) * MISSES)), 1)
    missed = (cpu_seconds(workers.pids()) - before) / MISSES
    listing, page = _call(server, "GET", "/api/v1/content?limit=50")
    purge, _ = _call(server, "DELETE", "/api/v1/content/" + quote(page["entries"][0]["key"]))
    resident = resident_bytes(_controller(server))
    return [
        f"{one.cpu_per_answer():.1f}",
        f"{many.cpu_per_answer():.1f}",
        f"{missed * 1e3:.2f}",
        f"{resident_bytes(workers.pids()) / len(workers.pids()) / 2**20:.0f}",
        f"{resident / 2**20:.0f}",
        f"{listing * 1e3:.1f}",
        f"{purge * 1e3:.1f}",
    ], resident


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
    with rig(folder / "big", ("gup",)) as site:
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
        fetched = fetch_all(server.port, iter([path]), 1)
    peak = resident_bytes(pids, "VmHWM")
    mib = 1 << 20
    return [
        f"{fetched.body_bytes / fetched.seconds / 1e6:,.0f}",
        f"{before / mib:.0f} MiB",
        f"{peak / mib:.0f} MiB",
        f"{(most[0] - before) / mib:.1f} MiB",
    ]


PIECES = {"idle": idle, "entries": entries, "big": big}


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    return [make(folder, rounds, seconds) for name, make in PIECES.items() if chosen(name)]
