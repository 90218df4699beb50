"""A WAN rate on long links: what it allows is what fills get, at any round trip, and little lies ahead of it.

The yardstick is a download without gup over the same link: TCP's slow start takes its time from both.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.delay_line import SERVER, DelayLine
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.swarm import Client, End, Swarm
from harness.trees import content_path, noise
from harness.waiting import until

pytestmark = pytest.mark.alone

MB = 1_000_000
LINK = 1_000_000
STEADY_BYTES = 40 * MB
FILE_BYTES = 2 * MB


def full(number: int) -> str:
    return content_path("full.dax", revision=f"2608010{number:02}")


@contextmanager
def upstream_over(line: DelayLine, fills: int, size: int) -> Iterator[ScriptedUpstream]:
    body = noise("link", size)
    with line.server():
        upstream = ScriptedUpstream(host=SERVER, congestion="cubic")
    with upstream:
        for number in range(fills):
            upstream.answer(full(number), Answer(body, etag=f'"{number}"'))
        yield upstream


@contextmanager
def direct_downloads(round_trip: float, fills: int, size: int) -> Iterator[Swarm]:
    """A client a file, straight from upstream."""
    with (
        DelayLine(round_trip, LINK) as line,
        upstream_over(line, fills, size) as upstream,
        line.client(),
        Swarm((SERVER, upstream.port)) as swarm,
    ):
        ask(swarm, fills)
        yield swarm


@contextmanager
def gup_downloads(
    tmp_path: Path, round_trip: float, fills: int, size: int, rate: int
) -> Iterator[tuple[Gup, Swarm, ScriptedUpstream]]:
    """A client a file, through a gup with this rate."""
    with DelayLine(round_trip, LINK) as line, upstream_over(line, fills, size) as upstream, line.client():
        settings = {"wan": {"rate": rate}, "fill": {"max": fills}}
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup, Swarm(gup.data) as swarm:
            ask(swarm, fills)
            yield gup, swarm, upstream


def ask(swarm: Swarm, files: int) -> None:
    for number in range(files):
        swarm.add(1, full(number))


def received(clients: list[Client]) -> int:
    return sum(client.body_bytes for client in clients)


def queued_bytes() -> int:
    """What the kernel holds of upstream's bytes that nobody has read, over all connections."""
    own = SERVER.split(".")
    remote = "".join(f"{int(part):02X}" for part in reversed(own))
    rows = (line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:])
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[2].startswith(remote))


def steady_rate(swarm: Swarm, seconds: float, warm_up: float) -> tuple[float, int]:
    """Bytes a second once TCP has found its pace, and the most that lay unread in the kernel."""
    most = 0

    def wait(length: float) -> None:
        nonlocal most
        began = time.monotonic()
        while (left := began + length - time.monotonic()) > 0:
            most = max(most, queued_bytes())
            time.sleep(min(0.05, left))

    until(lambda: received(swarm.clients), "first bytes")
    wait(warm_up)
    before, began = received(swarm.clients), time.monotonic()
    wait(seconds)
    return (received(swarm.clients) - before) / (time.monotonic() - began), most


def wait_for_rate(swarm: Swarm, rate: int) -> None:
    """Until nine tenths of it were received in a second and a half: TCP needs a while to find its pace."""
    until(lambda: steady_rate(swarm, 1.5, warm_up=0)[0] >= 0.9 * rate, f"{rate} bytes a second", 20)


def whole_rate(swarm: Swarm) -> float:
    """Bytes a second from the first request to the last file's end."""
    clients = swarm.wait(120)
    assert all(client.end is End.COMPLETE for client in clients)
    began = min(client.asked_at for client in clients)
    return received(clients) / (max(client.finished_at for client in clients) - began)


def shaped_rate(swarm: Swarm, rate: int) -> float:
    """What `whole_rate` would be if of the bytes that came none was passed on before the rate allowed it.

    TCP's slow start leaves part of a rate unused, which no later part of a download may make up for.
    """
    began, arrived = time.monotonic(), [(0.0, 0)]

    def all_ended() -> bool:
        arrived.append((time.monotonic() - began, received(swarm.clients)))
        return all(client.end for client in swarm.clients)

    until(all_ended, "all clients ended", 120)
    total = received(swarm.clients)
    assert all(client.end is End.COMPLETE for client in swarm.clients)
    return total / max(seconds + (total - amount) / rate for seconds, amount in arrived)


def test_a_rate_below_the_links_does_not_starve_a_long_link_nor_does_a_new_rate(tmp_path):
    """The connection stays the one that was made for the lower rate."""
    with gup_downloads(tmp_path, 0.2, 1, STEADY_BYTES, 300_000) as (gup, swarm, upstream):
        wait_for_rate(swarm, 300_000)
        gup.rewrite({"wan": {"rate": 800_000}})
        until(
            lambda: gup.metric("gup_bandwidth_limit_bytes_per_second", direction="upstream") == 800_000,
            "the new rate is in force",
        )
        wait_for_rate(swarm, 800_000)
        assert len(upstream.requests()) == 1


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("rate", [250_000, 800_000])
@pytest.mark.parametrize("fills", [1, 8])
@pytest.mark.parametrize("round_trip", [0.02, 0.2, 0.6])
def test_steady_fills_get_the_lesser_of_rate_and_link(tmp_path, figures, round_trip, fills, rate):
    warm_up = 1.0 + 10 * round_trip
    with direct_downloads(round_trip, fills, STEADY_BYTES) as swarm:
        direct, _ = steady_rate(swarm, 6.0, warm_up)
    with gup_downloads(tmp_path, round_trip, fills, STEADY_BYTES, rate) as (_, swarm, _):
        measured, queued = steady_rate(swarm, 6.0, warm_up)
    share = measured / min(rate, direct)
    figures(
        f"steady, {round_trip * 1000:.0f} ms, {fills} fills, {rate / 1000:.0f} kB/s: "
        f"direct {direct / 1000:.0f}, gup {measured / 1000:.0f} kB/s ({share:.0%}), "
        f"{queued / 1000:.0f} kB unread in the kernel"
    )
    assert share >= 0.9
    assert measured <= 1.03 * rate + 20_000
    assert queued <= 4 * MB


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("rate", [250_000, 800_000])
@pytest.mark.parametrize("fills", [1, 8])
@pytest.mark.parametrize("round_trip", [0.02, 0.2, 0.6])
def test_small_files_get_what_the_rate_leaves_of_a_direct_download(
    tmp_path, figures, round_trip, fills, rate
):
    with direct_downloads(round_trip, fills, FILE_BYTES) as swarm:
        allowed = shaped_rate(swarm, rate)
        direct = whole_rate(swarm)
    with gup_downloads(tmp_path, round_trip, fills, FILE_BYTES, rate) as (_, swarm, _):
        measured = whole_rate(swarm)
    share = measured / allowed
    figures(
        f"2 MB, {round_trip * 1000:.0f} ms, {fills} fills, {rate / 1000:.0f} kB/s: "
        f"direct {direct / 1000:.0f}, shaped {allowed / 1000:.0f}, gup {measured / 1000:.0f} kB/s "
        f"({share:.0%})"
    )
    assert share >= 0.9
