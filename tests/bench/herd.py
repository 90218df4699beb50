"""The herd: many clients ask at once for what nobody has yet, over a link of 10 MB/s with 40 ms latency."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.clients import Client, Swarm
from harness.content import Tree, content_path
from harness.processes import until
from harness.upstreams import Nginx

from bench.link import Passed, Wan
from bench.measure import Chosen, Table, cpu_seconds, machine_busy_seconds, median, verdict
from bench.rig import put
from bench.servers import GupCache, NginxCache, Server, VarnishCache

PER_SECOND = 10_000_000
LATENCY_SECONDS = 0.04
ONE_FILE_BYTES = 20_000_000
ONE_FILE_CLIENTS = 1000
FILES = 20
FILE_BYTES = 2_000_000
FILES_CLIENTS = 200
PATIENCE_SECONDS = 40.0

_ABOUT_ONE_FILE = (
    "First bytes count from the first byte that left the link; ideal is {:.2f} s, size over rate and the "
    "latency. All clients together take 20 GB: the loopback interface alone keeps the cores busy."
)
_numbers = itertools.count()


@contextmanager
def _site(folder: Path, make: Callable[[Path, int], Server]) -> Iterator[tuple[Tree, Nginx, Wan, Server]]:
    """An upstream, the link, and one cache that has nothing."""
    tree = Tree(folder / "tree")
    tree.root.mkdir(parents=True)
    with (
        Nginx(tree, folder / "upstream", extra="keepalive_requests 1000000;") as upstream,
        Wan(upstream.port, PER_SECOND, LATENCY_SECONDS) as wan,
    ):
        server = make(folder, wan.port)
        try:
            yield tree, upstream, wan, server
        finally:
            server.stop()


MAKERS: dict[str, Callable[[Path, int], Server]] = {
    "gup": GupCache,
    "nginx": lambda folder, port: NginxCache(folder, port, nopush=False),
    "Varnish": VarnishCache,
}


@dataclass(frozen=True, slots=True)
class _Herd:
    """One herd on new files: its clients, what passed the link, and what upstream sent of the files."""

    clients: list[Client]
    passed: Passed
    share: float
    server_cpu_seconds: float
    clients_cpu_seconds: float
    busy: float
    """Share of the cores."""
    whole: bool
    """Whether each client has its body."""

    @property
    def done_seconds(self) -> float:
        return max(c.finished_at for c in self.clients) - min(c.asked_at for c in self.clients)


def _measure(site: tuple[Tree, Nginx, Wan, Server], files: int, file_bytes: int, clients: int) -> _Herd:
    tree, upstream, wan, server = site
    number = next(_numbers)
    paths = [
        put(tree, content_path(f"xdelta{number:04d}{at:05d}_To_260801001.dax"), file_bytes)
        for at in range(files)
    ]
    wan.look()
    before, busy = cpu_seconds(server.pids()), machine_busy_seconds()
    with Swarm(("127.0.0.1", server.port), drops=True) as swarm:
        for at in range(clients):
            swarm.add(1, paths[at % files])
        swarm.wait(timeout_seconds=PATIENCE_SECONDS)
    spent, busy_now = cpu_seconds(server.pids()) - before, machine_busy_seconds()
    until(lambda: all(upstream.requests(path) for path in paths), "the upstream's log is written")
    sent = sum(upstream.body_bytes(path) for path in paths)
    share = (busy_now[0] - busy[0]) / max(1e-9, busy_now[1] - busy[1])
    whole = all(client.body_bytes == file_bytes and client.status == 200 for client in swarm.clients)
    passed = wan.look()
    return _Herd(swarm.clients, passed, sent / (files * file_bytes), spent, swarm.cpu_seconds, share, whole)


def _share(share: float, *, ours: bool) -> str:
    return f"{share:.3f}" + (" **missed**" if ours and share != 1 else "")


def one_file(folder: Path, rounds: int) -> Table:
    """A thousand clients, one file."""
    ideal = ONE_FILE_BYTES / PER_SECOND + LATENCY_SECONDS
    title = f"The herd: {ONE_FILE_CLIENTS} clients, one file of 20 MB, upstream 10 MB/s with 40 ms"
    columns = ["server", "upstream bytes / body", "first byte, median", "first byte, last client"]
    columns += ["last client done", "done / ideal", "server CPU", "clients' CPU", "cores busy"]
    table = Table(title, columns, notes=[_ABOUT_ONE_FILE.format(ideal)])
    for name, make in MAKERS.items():
        rows = []
        with _site(folder / f"one-{name}", make) as site:
            for _ in range(rounds):
                herd = _measure(site, 1, ONE_FILE_BYTES, ONE_FILE_CLIENTS)
                firsts = [client.first_byte_at - herd.passed.first_at for client in herd.clients]
                row = (herd.share, median(firsts), max(firsts), herd.done_seconds, herd.server_cpu_seconds)
                rows.append((*row, herd.clients_cpu_seconds, herd.busy, herd.whole))
        share, first, last, done, spent, own, busy = (median([row[at] for row in rows]) for at in range(7))
        ours = name == "gup"
        table.add(
            name,
            _share(share, ours=ours),
            verdict(first * 1e3, 50, most=True) + " ms" if ours else f"{first * 1e3:.1f} ms",
            verdict(last * 1e3, 150, most=True) + " ms" if ours else f"{last * 1e3:.1f} ms",
            f"{done:.2f} s" if all(row[7] for row in rows) else "**not all**",
            verdict(done / ideal, 1.05, most=True) if ours else f"{done / ideal:.2f}",
            *(f"{spent:.2f} s", f"{own:.2f} s", f"{100 * busy:.0f} %"),
        )
    return table


def many_files(folder: Path, rounds: int) -> Table:
    """200 clients over 20 files."""
    title = f"{FILES_CLIENTS} clients over {FILES} files of 2 MB at once, the same link"
    columns = ["server", "upstream bytes / body", "link full until its last byte", "last client done"]
    columns.append("server CPU")
    note = "Full: what passed, over the rate times the time from the first to the last byte on the link."
    table = Table(title, columns, notes=[note])
    for name, make in MAKERS.items():
        rows = []
        with _site(folder / f"many-{name}", make) as site:
            for _ in range(rounds):
                herd = _measure(site, FILES, FILE_BYTES, FILES_CLIENTS)
                took = max(herd.passed.last_at - herd.passed.first_at, 1e-9)
                full = herd.passed.passed_bytes / PER_SECOND / took
                rows.append((herd.share, full, herd.done_seconds, herd.server_cpu_seconds, herd.whole))
        share, full, done, spent = (median([row[at] for row in rows]) for at in range(4))
        ours = name == "gup"
        table.add(
            name,
            _share(share, ours=ours),
            verdict(100 * full, 97) + " %" if ours else f"{100 * full:.1f} %",
            f"{done:.2f} s" if all(row[4] for row in rows) else "**not all**",
            f"{spent:.2f} s",
        )
    return table


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    del seconds
    rounds = min(rounds, 3)
    made = {"one": one_file, "many": many_files}
    return [make(folder, rounds) for name, make in made.items() if chosen(name)]
