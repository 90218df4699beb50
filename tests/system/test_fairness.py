"""One client against the others: floods of names that upstream does not have, and connections without end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from harness.clients import RawConnection
from harness.content import DELTA, MONIKER, content_path, noise, zip_of
from harness.processes import quiet_clock, until

FULL = content_path("full.zip")
BODY = zip_of("fair", 2_000_000)
SLOW_SECONDS = 0.5
"""What upstream takes to say that it has no such file."""
NAMES: dict[str, Callable[[int], str]] = {
    "unknown": lambda number: f"/content/nothing-{number}.txt",
    "delta": lambda number: content_path(f"xdelta{number}_To_260801001.dax"),
    "full": lambda number: content_path("full.zip", revision=f"{number}"),
}


@contextlib.contextmanager
def attacking(address: tuple[str, int], connections: int, name: Callable[[int], str]) -> Iterator[None]:
    """Connections of another address, each of which asks for one made-up name after the other."""
    loop, numbers = asyncio.new_event_loop(), count(1)

    async def attack() -> None:
        reader, writer = await asyncio.open_connection(*address, local_addr=("127.0.0.2", 0))
        try:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(f"GET {name(next(numbers))} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
                    if not await reader.read(65536):
                        break
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(attack())

    attack_task = loop.create_task(all_of_them())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(attack_task)

    thread = threading.Thread(target=run, name="attack")
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(attack_task.cancel)
        thread.join()
        loop.close()


@pytest.fixture
def slow(serve):
    """A service before an upstream that is slow to say that it has no such file."""

    def start(answers: dict, **settings):
        gup, upstream = serve(answers, each={"max_connections": 64, "health_interval": "0s"}, **settings)
        known = upstream._next

        def _next(path: str):
            answer = known(path)
            if answer.status == 404:
                time.sleep(SLOW_SECONDS)
            return answer

        upstream._next = _next
        return gup, upstream

    return start


@pytest.mark.parametrize(
    ("connections", "seconds", "kind"),
    [(16, 1.0, "unknown"), (16, 1.0, "delta"), (16, 1.0, "full"), (400, 2.0, "unknown"), (400, 2.0, "full")],
)
def test_a_full_begins_soon_beside_a_flood_of_made_up_names(slow, figures, connections, seconds, kind):
    gup, upstream = slow({FULL: BODY, DELTA: noise("delta", 50_000)})
    with attacking(gup.data, connections, NAMES[kind]):
        until(lambda: len(upstream.seen) >= 24, "the attack is under way")
        took = []
        for path in (FULL, DELTA):
            began = quiet_clock()
            reader, response = gup.begin(path, 1)
            took.append(quiet_clock() - began)
            assert response.status == 200
            reader.close()
    figures(f"{connections} connections, {kind}: full {took[0]:.2f} s, delta {took[1]:.2f} s")
    assert max(took) < seconds


def test_an_address_that_asks_for_what_is_nowhere_is_bounded(slow):
    gup, upstream = slow({FULL: BODY}, clients={"max_misses_per_address": 10})
    with attacking(gup.data, 32, NAMES["unknown"]):
        time.sleep(2.0)
        gup.serves(FULL, BODY)
    assert len(upstream.requests()) <= 1 + 10 * 4
    assert not list((gup.cache_dir / "partial").glob("*.state"))
    assert gup.metric("gup_requests_total", result="refused", code="503") > 0


def test_an_address_with_many_connections_has_one_rate(serve):
    """As with a downloader that opens sixteen: all together get what one would get."""
    gup, _ = serve({FULL: BODY}, clients={"rate_per_address": "1MB/s"})
    gup.serves(FULL, BODY)
    gup.wait_stored(FULL)
    clients = [RawConnection(gup.data, source="127.0.0.3") for _ in range(8)]
    began, quiet = time.monotonic(), quiet_clock()
    for client in clients:
        client.ask(FULL, {"Range": "bytes=0-249999"})
    assert {len(client.response().body) for client in clients} == {250_000}
    took, not_stalled = time.monotonic() - began, quiet_clock() - quiet
    for client in clients:
        client.close()
    assert took >= 1.6
    assert not_stalled <= 4.0


def test_a_client_that_reads_nothing_keeps_nobody_waiting(serve):
    body = zip_of("slow readers", 12_000_000)
    gup, _ = serve({FULL: body}, clients={"max_downloads": 2})
    gup.serves(FULL, body)
    gup.wait_stored(FULL)
    idle = [gup.connect(receive_buffer_bytes=4096) for _ in range(2)]
    for client in idle:
        client.ask(FULL)
    gup.wait_metric(2, "gup_client_downloads_in_progress")
    began = quiet_clock()
    gup.serves(FULL, body)
    assert quiet_clock() - began < 12.0


def test_streams_of_made_up_names_take_no_numbers(serve):
    """Sixty of them, and the real stream is counted by its own name."""
    gup, _ = serve({FULL: BODY})
    for number in range(60):
        moniker = f"{{{number:08X}-0000-0000-0000-000000000000}}"
        assert gup.get(content_path("full.zip", moniker)).status == 404
    gup.serves(FULL, BODY)
    gup.wait_stored(FULL)
    assert MONIKER in (gup.cache_dir / "run" / "streams").read_text()


def test_streams_without_a_stored_body_give_their_numbers_away_at_a_start(serve):
    """As an earlier version left them: fifty names that were only asked for."""
    gup, _ = serve({FULL: BODY}, start=False)
    streams = gup.cache_dir / "run" / "streams"
    streams.parent.mkdir(parents=True)
    names = [f"any/any/{{{number:08X}-0000-0000-0000-000000000000}}" for number in range(50)]
    streams.write_text("".join(f"{name}\n" for name in names))
    gup.start()
    gup.serves(FULL, BODY)
    gup.wait_stored(FULL)
    assert streams.read_text().splitlines()[0] == f"any/any/{MONIKER}"
    gup.stop()
    gup.start()
    assert streams.read_text().splitlines()[0] == f"any/any/{MONIKER}"
    assert gup.metric("gup_stream_received_bytes_total", kind="full") >= len(BODY)
