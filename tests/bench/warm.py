"""Warm hits side by side: sizes, heads, files, ranges, the mix and new connections."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure import Chosen, Run, Table, median, verdict, wrk
from bench.rig import KIB, MIB, Rig, mixed, put, rig, sized_path
from bench.servers import GUP, NOPUSH_OFF, NOPUSH_ON, VARNISH

SERVERS = (GUP, NOPUSH_ON, NOPUSH_OFF, VARNISH)
FEW, MANY = (64, 1000), (8, 64, 1000)
RANGE_BYTES = 64 * KIB
LARGE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load over bodies of these sizes, or over the mix. Goals: gup / nginx by connections."""

    name: str
    sizes: tuple[int, ...] = ()
    connections: tuple[int, ...] = FEW
    script: str = "plain"
    words: tuple[str, ...] = ()
    by_bytes: bool = False
    """Measured in bytes, since few bodies are whole at the end of a run."""
    goals: dict[int, float] = field(default_factory=dict)
    cpu_goals: dict[int, float] = field(default_factory=dict)


_EIGHT = tuple(8 * KIB + 24 * KIB * number for number in range(8))
_RANGED = (str(RANGE_BYTES), str(LARGE_BYTES))
_LARGE = {"connections": MANY, "by_bytes": True, "cpu_goals": dict.fromkeys(MANY, 1.15)}
CELLS = (
    Cell("4 KiB", (4 * KIB,), goals={64: 1.05, 1000: 1.1}),
    Cell("64 KiB", (64 * KIB,), goals={64: 1.1, 1000: 1.0}),
    Cell("1 MiB", (MIB,), goals={8: 1.0, 64: 1.5, 1000: 1.0}, **_LARGE),
    Cell("10 MB", (10_000_000,), goals=dict.fromkeys(MANY, 1.0), **_LARGE),
    Cell("100 MB", (LARGE_BYTES,), goals=dict.fromkeys(MANY, 1.0), **_LARGE),
    Cell("heads that differ, 4 KiB", (4 * KIB,), script="heads"),
    Cell("8 files a connection", _EIGHT, script="several"),
    Cell(
        "ranges of 64 KiB",
        (LARGE_BYTES,),
        script="ranges",
        words=_RANGED,
        goals=dict.fromkeys(FEW, 1.0),
        cpu_goals=dict.fromkeys(FEW, 1.1),
    ),
    Cell("a connection each, 4 KiB", (4 * KIB,), (64,), script="closing", goals={64: 0.9}),
    Cell("the mix", script="several", by_bytes=True),
)

Found = dict[str, list[Run]]
"""Runs by server."""


def measure(site: Rig, cell: Cell, connections: int, rounds: int, seconds: float) -> Found:
    """Every server in turn, round by round, so that whatever else goes on strikes all alike."""
    paths = [put(site.tree, sized_path(size), size) for size in cell.sizes] or mixed(site.tree)
    site.warm(paths)
    target, words = paths[0], cell.words
    if cell.script == "several":
        listed = site.folder / f"{cell.name}.txt"
        listed.write_text("\n".join(paths) + "\n")
        target, words = "/", (str(listed),)
    if cell.by_bytes and connections == max(MANY):
        seconds *= 3  # that requests end: all of them share what there is
    found: Found = {}
    for server in site.servers:
        wrk(server, target, 16, 1, cell.script, *words)
    for number in range(rounds):
        for server in site.servers if number % 2 else site.servers[::-1]:
            run = wrk(server, target, connections, seconds, cell.script, *words)
            found.setdefault(server.name, []).append(run)
    return found


def _row(
    table: Table,
    name: str,
    connections: int,
    found: Found,
    of: Callable[[Run], float],
    shape: str,
    goal: float | None,
    *,
    least: bool = False,
) -> None:
    """Medians, and the ratio to the better nginx round by round, its worst too; `least`: less is better."""
    values = {server: [of(run) for run in found[server]] for server in SERVERS}
    best = (min if least else max)((NOPUSH_ON, NOPUSH_OFF), key=lambda server: median(values[server]))
    ratios = [ours / max(theirs, 1e-9) for ours, theirs in zip(values[GUP], values[best], strict=True)]
    shown = [shape.format(median(values[server])) for server in SERVERS]
    worst, ratio = (max if least else min)(ratios), median(ratios)
    told = verdict(ratio, goal, most=least)
    load = median([run.load_cpu_seconds / run.seconds for runs in found.values() for run in runs])
    table.add(name, str(connections), *shown, told, f"{worst:.2f}", f"{load:.1f}")


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    columns = ["load", "connections", "gup", "nginx, nopush on", "nginx, nopush off", "Varnish"]
    columns += ["gup / nginx", "worst round", "cores of the load"]
    rates, cpus, ended = (
        Table(f"Warm hits: {what}", list(columns))
        for what in ("throughput", "CPU of the server, an answer or a GB", "large bodies ended")
    )
    with rig(folder) as site:
        for cell in CELLS:
            for connections in cell.connections:
                if not chosen(cell.name, connections):
                    continue
                found = measure(site, cell, connections, rounds, seconds)
                name, goal, cpu_goal = cell.name, cell.goals.get(connections), cell.cpu_goals.get(connections)
                if cell.by_bytes:
                    _row(
                        rates,
                        name,
                        connections,
                        found,
                        lambda r: r.bytes_per_second / 1e6,
                        "{:,.0f} MB/s",
                        goal,
                    )
                    _row(
                        cpus, name, connections, found, Run.cpu_per_gb, "{:,.0f} ms/GB", cpu_goal, least=True
                    )
                    wanted = 1.0 if (name, connections) == ("10 MB", 1000) else None
                    _row(
                        ended, name, connections, found, lambda r: r.requests_per_second, "{:,.1f}/s", wanted
                    )
                else:
                    _row(rates, name, connections, found, lambda r: r.requests_per_second, "{:,.0f}/s", goal)
                    _row(
                        cpus, name, connections, found, Run.cpu_per_answer, "{:,.1f} µs", cpu_goal, least=True
                    )
                sys.stdout.write(f"{name}, {connections} connections: done\n")
    return [table for table in (rates, cpus, ended) if table.rows]
