"""Herds: many clients ask at once for what nobody has yet, over a link of fixed rate and latency."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from harness.clients import Swarm
from harness.content import content_path
from harness.processes import until

from bench.measure import Chosen, Table, cpu_seconds, machine_busy_seconds, median, verdict
from bench.rig import Rig, fresh_disk, put, rig
from bench.servers import GUP, GUP_ONE

SERVERS = ("off", "varnish", "gup", "gup-one")


@dataclass(frozen=True, slots=True)
class Herd:
    """One herd on new files. Goals are gup's; None where there is none."""

    name: str
    clients: int
    files: int
    file_bytes: int
    per_second: int
    latency_seconds: float
    goals: tuple[float | None, float | None, float | None, float | None]
    """The link full, first byte in ms, the last client's first byte, done beside the ideal."""

    @property
    def title(self) -> str:
        what = (
            f"{self.clients} clients at once, cold files of {self.file_bytes // 1_000_000} MB: {self.files}"
        )
        link = f"link {self.per_second // 1_000_000} MB/s with {self.latency_seconds * 1e3:g} ms"
        return f"Herd: {what}, {link}"

    @property
    def ideal_seconds(self) -> float:
        return self.files * self.file_bytes / self.per_second + self.latency_seconds


HERDS = (
    Herd("many", 200, 20, 1_000_000, 100_000_000, 0.002, (97, None, None, None)),
    Herd("one", 1000, 1, 20_000_000, 10_000_000, 0.04, (None, 50, 150, 1.05)),
)
_COLUMNS = ["server", "upstream bytes / body", "link full, %", "worst", "first byte, ms", "last client's, ms"]
_COLUMNS += ["last client done, s", "done / ideal", "server CPU, s", "clients' CPU, s", "cores busy, %"]
_NOTE = (
    "Full: what passed over the rate times the time from the first to the last byte on the link. First bytes "
    "count from the first byte that left the link; ideal is {:.2f} s, size over rate and the latency."
)


def _measure(site: Rig, herd: Herd, number: int) -> tuple[float, ...]:
    wan, server = site.wan, site.servers[0]
    paths = [
        put(site.tree, content_path(f"xdelta{number:04d}{n:05d}_To_260801001.dax"), herd.file_bytes)
        for n in range(herd.files)
    ]
    wan.look()
    before, busy = cpu_seconds(server.pids()), machine_busy_seconds()
    with Swarm(("127.0.0.1", server.port), drops=True) as swarm:
        for n in range(herd.clients):
            swarm.add(1, paths[n % herd.files])
        clients = swarm.wait(timeout_seconds=60)
    spent, busy_now = cpu_seconds(server.pids()) - before, machine_busy_seconds()
    assert all((c.status, c.body_bytes) == (200, herd.file_bytes) for c in clients), server.name
    until(lambda: all(site.upstream.requests(path) for path in paths), "the upstream's log is written")
    sent = sum(site.upstream.body_bytes(path) for path in paths)
    passed = wan.look()
    firsts = [client.first_byte_at - passed.first_at for client in clients]
    done = max(client.finished_at for client in clients) - min(client.asked_at for client in clients)
    return (
        sent / (herd.files * herd.file_bytes),
        100 * passed.passed_bytes / herd.per_second / max(passed.last_at - passed.first_at, 1e-9),
        median(firsts) * 1e3,
        max(firsts) * 1e3,
        done,
        done / herd.ideal_seconds,
        spent,
        swarm.cpu_seconds,
        100 * (busy_now[0] - busy[0]) / max(1e-9, busy_now[1] - busy[1]),
    )


def _table(folder: Path, herd: Herd, rounds: int) -> Table:
    table = Table(herd.title, _COLUMNS, notes=[_NOTE.format(herd.ideal_seconds)])
    link = herd.per_second, herd.latency_seconds
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(fresh_disk(folder))
        # a link each: whatever else a cache asks meanwhile is its own
        sites = [stack.enter_context(rig(disk, (name,), link=link)) for name in SERVERS]
        found: dict[str, list[tuple[float, ...]]] = {site.servers[0].name: [] for site in sites}
        for number in range(rounds):
            for site in sites:
                found[site.servers[0].name].append(_measure(site, herd, number))
    for name, rows in found.items():
        share, full, first, last, done, by_ideal, *rest = (
            median(column) for column in zip(*rows, strict=True)
        )
        goals = herd.goals if name in (GUP, GUP_ONE) else (None,) * 4
        table.add(
            name,
            f"{share:.3f}",
            verdict(full, goals[0]),
            f"{min(row[1] for row in rows):.1f}",
            verdict(first, goals[1], most=True),
            verdict(last, goals[2], most=True),
            f"{done:.2f}",
            verdict(by_ideal, goals[3], most=True),
            *(f"{value:.2f}" for value in rest),
        )
    return table


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    del seconds
    return [_table(folder / herd.name, herd, rounds) for herd in HERDS if chosen(herd.name, herd.clients)]
