"""Three gups of one site beside one gup, on the same cores: what the cluster takes of the throughput."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cluster.nodes import Valkey
from harness.processes import free_port, until

from bench.measure import Chosen, Table, cpu_seconds, median, verdict, wrk
from bench.rig import KIB, MIB, put, rig, sized_path
from bench.servers import GupCache

NODES = ("a", "b", "c")
CELLS = {"4 KiB": 4 * KIB, "64 KiB": 64 * KIB, "1 MiB": MIB}
CONNECTIONS = 63
_LEAST = 0.85


def _site(folder: Path, upstream_port: int, stack: ExitStack) -> list[GupCache]:
    """Three nodes that ask each other."""
    engine = Valkey(folder / "valkey")
    stack.callback(engine.kill)
    secret, nodes = folder / "secret", []
    secret.write_text("a-secret-of-the-site\n")
    for name in NODES:
        port = free_port()
        own = {
            "url": f"redis://127.0.0.1:{engine.port}",
            "site": "bench",
            "node": name,
            "address": f"http://127.0.0.1:{port}",
            "listen": f"127.0.0.1:{port}",
            "secret_file": str(secret),
        }
        env = {f"GUP_CLUSTER__{key.upper()}": text for key, text in own.items()}
        nodes.append(GupCache(folder, upstream_port, f"gup {name}", **env))
        stack.callback(nodes[-1].stop)
    members = len(NODES)
    for node in nodes:
        until(lambda node=node: node.service.metric("gup_cluster_members") == members, "all are members")
    return nodes


def _load(servers: list[GupCache], path: str, seconds: float) -> tuple[float, float]:
    """Answers a second of these together, by three load generators however many they are; CPU µs of each."""
    pids = {pid for server in servers for pid in server.pids()}
    before = cpu_seconds(pids)
    with ThreadPoolExecutor(len(NODES)) as threads:
        runs = list(
            threads.map(
                lambda number: wrk(servers[number % len(servers)], path, CONNECTIONS // len(NODES), seconds),
                range(len(NODES)),
            )
        )
    spent = cpu_seconds(pids) - before
    return sum(run.requests_per_second for run in runs), spent * 1e6 / sum(run.requests for run in runs)


def run(folder: Path, rounds: int, seconds: float, chosen: Chosen) -> list[Table]:
    table = Table(
        f"Warm hits of three nodes and of one gup, two workers each, {CONNECTIONS} connections in all",
        ["load", "one gup", "three nodes", "three / one", "worst round", "CPU an answer, three / one"],
        notes=["Both run all the time; of the three, each has its copy of the body."],
    )
    with rig(folder, ["gup"]) as site, ExitStack() as stack:
        nodes = _site(folder, site.upstream.port, stack)
        (one,) = site.servers
        site.servers += nodes  # so that they are warmed
        try:
            for name, size in CELLS.items():
                if not chosen(name, CONNECTIONS):
                    continue
                path = put(site.tree, sized_path(size), size)
                site.warm([path])
                found: dict[str, list[tuple[float, float]]] = {"one": [], "three": []}
                kinds = {"one": [one], "three": nodes}
                for number in range(rounds):
                    for kind in sorted(kinds, reverse=bool(number % 2)):
                        found[kind].append(_load(kinds[kind], path, seconds))
                rates = {kind: median([rate for rate, _ in runs]) for kind, runs in found.items()}
                cpus = {kind: median([cpu for _, cpu in runs]) for kind, runs in found.items()}
                ratios = [
                    three[0] / alone[0] for three, alone in zip(found["three"], found["one"], strict=True)
                ]
                table.add(
                    name,
                    f"{rates['one']:,.0f}/s",
                    f"{rates['three']:,.0f}/s",
                    verdict(median(ratios), _LEAST),
                    f"{min(ratios):.2f}",
                    f"{cpus['three'] / cpus['one']:.2f}",
                )
                sys.stdout.write(f"{name}: done\n")
        finally:
            site.servers[:] = [one]
    return [table]
