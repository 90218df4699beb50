"""The table of docs/cluster.md: `make simulation`."""

import argparse
import time

from simulation.day import HOUR, Day
from simulation.site import Loss, Site, catch_up_seconds

LOST_AT, BACK_AT = 8 * HOUR + HOUR // 2, 9 * HOUR
RATE = 20_000_000
GBIT = 125_000_000
COLUMNS = (
    "nodes",
    "WAN, GB",
    "N alone, GB",
    "LAN, GB",
    "busiest / mean",
    "peak of a link",
    "last copy, s",
    "lost: WAN, GB",
    "back: LAN, GB",
    "lost: peak",
    "lost: caught up, s",
)


def row(day: Day, nodes: int, link: int) -> list[str]:
    loss = Loss("gup-1", LOST_AT, BACK_AT)
    site = Site(day, nodes, rate=RATE, link=link).run()
    lost = Site(day, nodes, rate=RATE, link=link, loss=loss).run()
    return [
        str(nodes),
        f"{site.wan_bytes / 1e9:.2f}",
        f"{site.alone_bytes / 1e9:.2f}",
        f"{site.lan_bytes / 1e9:.2f}",
        f"{site.busiest():.2f}",
        f"{site.peak():.0%}",
        f"{site.slowest_copy_seconds:.1f}",
        f"{lost.wan_bytes / 1e9:.2f}",
        f"{(lost.lan_bytes - site.lan_bytes) / 1e9:.2f}",
        f"{lost.peak():.0%}",
        str(catch_up_seconds(site, lost, loss)),
    ]


def table(clients: int, nodes: list[int], seed: int, link: int, storm: float) -> str:
    day = Day(clients, seed, storm)
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row(day, count, link))} |" for count in nodes]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 4, 8, 16])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gbit", type=float, default=1.0, help="the link of a node")
    parser.add_argument("--storm", type=float, default=0.05, help="share of clients that need fulls")
    given = parser.parse_args()
    began = time.monotonic()
    print(table(given.clients, given.nodes, given.seed, int(given.gbit * GBIT), given.storm))  # noqa: T201
    print(f"\n{given.clients:,} clients, {time.monotonic() - began:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
