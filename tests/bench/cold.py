"""Cold keys before a near upstream without a limit: how fast a fill is, and how soon its first byte comes."""

import os
import time
from pathlib import Path

from harness.clients import RawConnection
from harness.content import content_path

from bench.measure import Chosen, Table, median, percentile, verdict
from bench.rig import KIB, MIB, Rig, put, rig
from bench.servers import GUP, NOPUSH_OFF, NOPUSH_ON, VARNISH, Server

FILL_BYTES = 256 * MIB
FILLS = 3
KEYS = 150
KEY_BYTES = 64 * KIB


def cold_get(port: int, path: str) -> tuple[float, float, int]:
    """Seconds to the body's first byte and to its end, and its length; on a new connection."""
    with RawConnection(("127.0.0.1", port), 60) as client:
        began = time.monotonic()
        response = client.begin(path, 1)
        first = time.monotonic() - began
        length = client.drop(response)
        return first, time.monotonic() - began, length


def _put_all(site: Rig) -> tuple[list[str], list[str]]:
    larges = [
        put(site.tree, content_path("full.dax", revision=f"2607{n:05d}"), FILL_BYTES) for n in range(FILLS)
    ]
    smalls = [
        put(site.tree, content_path(f"xdelta2606{n:05d}_To_260801001.dax"), KEY_BYTES) for n in range(KEYS)
    ]
    return larges, smalls


def fills(site: Rig, paths: list[str]) -> Table:
    """One client, one large body that nobody has."""
    found: dict[str, list[float]] = {}
    for path in paths:
        for server in site.servers:
            os.sync()  # what the one before left to be written would slow the next
            _, seconds, length = cold_get(server.port, path)
            found.setdefault(server.name, []).append(length / seconds / 1e6)
    table = Table(
        f"Cold: one body of {FILL_BYTES // MIB} MiB, one client, upstream on the same machine",
        ["server", "MB/s", "gup / nginx"],
    )
    _compare(table, found, 0.8, 1, most=False)
    return table


def _compare(table: Table, found: dict[str, list[float]], goal: float, scale: float, *, most: bool) -> float:
    """Rows with medians; the ratio to the better nginx, round by round. Our median."""
    nginxes = [name for name in (NOPUSH_ON, NOPUSH_OFF) if name in found]
    best = sorted(nginxes, key=lambda name: median(found[name]), reverse=not most)[0]
    for name in (GUP, NOPUSH_ON, NOPUSH_OFF, VARNISH):
        if name in found:
            ratio = median([ours / theirs for ours, theirs in zip(found[GUP], found[best], strict=True)])
            told = verdict(ratio, goal, most=most) if name == GUP else ""
            extra = [f"{percentile(found[name], 0.95) * scale:,.2f}"] if len(table.columns) == 4 else []
            table.add(name, f"{median(found[name]) * scale:,.2f}", *extra, told)
    return median(found[GUP])


def first_bytes(site: Rig, paths: list[str]) -> Table:
    """One client asks key after key that nobody has."""
    found: dict[str, list[float]] = {}
    for path in paths:
        for server in site.servers:
            first, _, _ = cold_get(server.port, path)
            found.setdefault(server.name, []).append(first)
    table = Table(
        f"Cold: first byte of bodies of {KEY_BYTES // KIB} KiB, one client, upstream on the same machine",
        ["server", "median, ms", "95 %, ms", "gup / nginx"],
    )
    ours = _compare(table, found, 2.5, 1e3, most=True)
    met = "met" if ours <= 0.0006 else "not met"
    table.notes.append(f"The goal is 2.5 times nginx's or 0.6 ms, whichever is more; 0.6 ms is {met}.")
    return table


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    del rounds, seconds
    with rig(folder) as site:
        larges, smalls = _put_all(site)
        for server in site.servers:
            _wake(server, site)
        made = []
        if chosen("first byte"):
            made.append(first_bytes(site, smalls))
        if chosen("fill"):
            made.append(fills(site, larges))
        return made


def _wake(server: Server, site: Rig) -> None:
    """The first fill of a process imports and connects: that is not what is measured here."""
    for number in range(16):
        path = put(site.tree, content_path(f"xdelta2605{number:05d}_To_260801001.dax"), KEY_BYTES)
        cold_get(server.port, path)
