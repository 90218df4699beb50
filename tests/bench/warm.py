"""Warm hits side by side: sizes, heads, files, ranges and the mix, at 64 and at 1000 connections."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Run, Table, median, verdict, wrk
from bench.rig import KIB, MIB, SIZES, Rig, mixed, put, rig, sized_path
from bench.servers import GUP, NOPUSH_OFF, NOPUSH_ON, VARNISH

CONNECTIONS = (64, 1000)
SERVERS = (GUP, NOPUSH_ON, NOPUSH_OFF, VARNISH)
RANGE_BYTES = 64 * KIB


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load. Goals are ratios gup / nginx for each of CONNECTIONS, None where none was set."""

    name: str
    target: str
    answer_bytes: int
    by_bytes: bool = False
    script: str = "plain"
    words: tuple[str, ...] = ()
    goals: tuple[float | None, float | None] = (None, None)
    cpu_goals: tuple[float | None, float | None] = (None, None)


Key = tuple[str, int, str]
"""Cell, connections, server."""


def cells(site: Rig) -> list[Cell]:
    """Every load, its content put upstream."""
    paths = {name: put(site.tree, sized_path(size), size) for name, size in SIZES.items()}
    several = [put(site.tree, sized_path(8 * KIB + 24 * KIB * n), 8 * KIB + 24 * KIB * n) for n in range(8)]
    mix = mixed(site.tree)
    site.warm([*paths.values(), *several, *mix])
    lists = {}
    for name, targets in (("several", several), ("mix", mix)):
        lists[name] = site.folder / f"{name}.txt"
        lists[name].write_text("\n".join(targets) + "\n")
    mean = sum(site.tree.file(path).stat().st_size for path in mix) // len(mix)
    both = {"cpu_goals": (0.9, 1.0)}
    ranged = (str(RANGE_BYTES), str(100 * MIB))
    return [
        Cell("4 KiB", paths["4 KiB"], SIZES["4 KiB"], goals=(1.15, 1.05), **both),
        Cell("64 KiB", paths["64 KiB"], SIZES["64 KiB"], goals=(1.05, 1.0), **both),
        Cell("1 MiB", paths["1 MiB"], MIB, by_bytes=True, goals=(1.5, 1.1), **both),
        Cell("100 MiB", paths["100 MiB"], 100 * MIB, by_bytes=True, goals=(1.2, 1.0), **both),
        Cell("4 KiB, differing heads", paths["4 KiB"], SIZES["4 KiB"], script="heads", goals=(1.0, 0.95)),
        Cell("8 files a connection", "/", 92 * KIB, script="several", words=(str(lists["several"]),)),
        Cell("ranges of 64 KiB", paths["100 MiB"], RANGE_BYTES, script="ranges", words=ranged),
        Cell("the mix", "/", mean, by_bytes=True, script="several", words=(str(lists["mix"]),)),
    ]


def measure(site: Rig, chosen: Sequence[Cell], rounds: int, seconds: float) -> dict[Key, list[Run]]:
    """Every server in turn, round by round, so that whatever else goes on strikes all alike."""
    found: dict[Key, list[Run]] = {}
    for cell in chosen:
        for connections in CONNECTIONS:
            for server in site.servers:
                wrk(server, cell.target, 16, 1, cell.script, *cell.words)
            for number in range(rounds):
                order = site.servers if number % 2 else site.servers[::-1]
                for server in order:
                    run = wrk(server, cell.target, connections, seconds, cell.script, *cell.words)
                    found.setdefault((cell.name, connections, server.name), []).append(run)
            sys.stdout.write(f"{cell.name}, {connections} connections: done\n")
    return found


def tables(chosen: Sequence[Cell], found: dict[Key, list[Run]]) -> list[Table]:
    """One table of throughput and one of CPU time; in each the ratio to the better nginx, round by round."""
    columns = [
        "load",
        "connections",
        "gup",
        "nginx, nopush on",
        "nginx, nopush off",
        "Varnish",
        "gup / nginx",
    ]
    rates = Table("Warm hits: throughput", columns)
    cpus = Table("Warm hits: CPU time of the server for an answer", columns)
    for cell in chosen:
        for at, connections in enumerate(CONNECTIONS):
            runs = {name: found.get((cell.name, connections, name), []) for name in SERVERS}
            of = (
                (lambda run: run.bytes_per_second / 1e6)
                if cell.by_bytes
                else (lambda run: run.requests_per_second)
            )
            unit, goal = " MB/s" if cell.by_bytes else "/s", cell.goals[at]
            _row(rates, cell, connections, {n: [of(run) for run in r] for n, r in runs.items()}, unit, goal)
            cpu = {n: [run.cpu_per_answer(cell.answer_bytes) * 1e6 for run in r] for n, r in runs.items()}
            _row(cpus, cell, connections, cpu, " µs", cell.cpu_goals[at], least=True)
    return [rates, cpus]


def _row(
    table: Table,
    cell: Cell,
    connections: int,
    values: dict[str, list[float]],
    unit: str,
    goal: float | None,
    *,
    least: bool = False,
) -> None:
    """`least`: the smaller figure is the better one."""
    best = (min if least else max)((NOPUSH_ON, NOPUSH_OFF), key=lambda name: median(values[name]))
    ratio = median([ours / theirs for ours, theirs in zip(values[GUP], values[best], strict=True)])
    digits = 1 if least else 0
    shown = [f"{median(found):,.{digits}f}{unit}" if found else "" for found in values.values()]
    told = f"{ratio:.2f}" if goal is None else verdict(ratio, goal, most=least)
    table.add(cell.name, str(connections), *shown, told)


def run(folder: Path, rounds: int, seconds: float, only: str = "") -> list[Table]:
    with rig(folder) as site:
        chosen = [cell for cell in cells(site) if only in cell.name]
        return tables(chosen, measure(site, chosen, rounds, seconds))
