"""The WAN's rate over several processes: exact, fair, urgent things first, nothing left idle."""

import asyncio
import time
from contextlib import contextmanager

import pytest
from harness.virtual_time import in_virtual_time

from gup.upstream.bandwidth import CLOCK_WORDS, NOBODY, Share, Turns, Wan, rank

PIECE_BYTES = 64 * 1024


@contextmanager
def processes(tmp_path, count, rate, alive=lambda _block: True):
    """As many Wans as there would be processes, on the same words and lock."""
    clock = memoryview(bytearray(8 * CLOCK_WORDS)).cast("Q")
    turns = memoryview(bytearray(8 * count)).cast("Q")
    wans = [Wan(clock, 0, Turns(turns, n, alive), lambda: rate[0], tmp_path / "lock") for n in range(count)]
    try:
        yield wans
    finally:
        for wan in wans:
            wan.close()


async def reader(wan, share, taken, until, piece=PIECE_BYTES):
    """A download that always has bytes waiting."""
    while time.monotonic() < until:
        await wan.pay(piece, share)
        taken.append((time.monotonic(), piece))


def rate_between(taken, start, stop):
    return sum(amount for at, amount in taken if start <= at < stop) / (stop - start)


@pytest.mark.parametrize(
    ("rate", "readers", "piece"),
    [
        (1_000_000, 1, 8192),
        (1_000_000, 8, 8192),
        (200_000, 4, 2048),
        (100_000_000, 8, 256 * 1024),
    ],
)
@in_virtual_time
async def test_the_rate_is_kept_over_processes(tmp_path, rate, readers, piece):
    began = time.monotonic()
    all_taken = [[] for _ in range(readers)]
    with processes(tmp_path, 2, [rate]) as wans:
        await asyncio.gather(
            *(reader(wans[n % 2], Share(2), all_taken[n], began + 3.0, piece) for n in range(readers))
        )
    flat = [row for taken in all_taken for row in taken]
    assert rate_between(flat, began + 0.5, began + 3.0) == pytest.approx(rate, rel=0.03)
    # without the beginning: whoever comes first alone may have all the credit that there is
    each = [sum(amount for at, amount in taken if at >= began + 0.5) for taken in all_taken]
    assert max(each) <= 1.15 * min(each) + 2 * piece


@in_virtual_time
async def test_a_loop_that_is_late_loses_nothing(tmp_path):
    """A busy machine wakes everybody late: what was not used meanwhile is taken at once."""
    began = time.monotonic()
    taken = [[] for _ in range(4)]

    async def busy():
        while time.monotonic() < began + 2.5:
            await asyncio.sleep(0.05)
            time.sleep(0.04)  # noqa: ASYNC251 - that is what makes the loop late

    with processes(tmp_path, 2, [1_000_000]) as wans:
        await asyncio.gather(
            busy(), *(reader(wans[n % 2], Share(2), taken[n], began + 2.5, 8192) for n in range(4))
        )
    flat = [row for part in taken for row in part]
    assert rate_between(flat, began + 0.5, began + 2.5) == pytest.approx(1_000_000, rel=0.04)


@in_virtual_time
async def test_an_urgent_download_gets_the_link_and_the_others_go_on_after(tmp_path):
    began = time.monotonic()
    fulls, delta = [[] for _ in range(8)], []
    with processes(tmp_path, 2, [1_000_000]) as wans:

        async def urgent():
            await asyncio.sleep(0.5)
            await reader(wans[0], Share(0), delta, began + 1.2, 8192)

        await asyncio.gather(
            urgent(), *(reader(wans[n % 2], Share(2), fulls[n], began + 2.0) for n in range(8))
        )
    assert rate_between(delta, began + 0.6, began + 1.2) >= 800_000
    flat = [row for taken in fulls for row in taken]
    assert rate_between(flat, began + 1.4, began + 2.0) >= 700_000


@in_virtual_time
async def test_a_stream_of_small_bodies_does_not_keep_a_larger_one_waiting(tmp_path):
    """Each small body is a new share that needs one slice. In a round each waiter gets one."""
    small, larger, readers = 50_000, 4, 6
    with processes(tmp_path, 1, [8_000_000]) as (wan,):
        served: list[str] = []

        async def one_after_another():
            while served.count("larger") < larger:
                await wan.pay(small, Share(0))
                served.append("small")

        async def one_larger():
            share = Share(0)
            for _ in range(larger):
                await wan.pay(PIECE_BYTES, share)
                served.append("larger")

        async with asyncio.timeout(20):
            await asyncio.gather(*(one_after_another() for _ in range(readers)), one_larger())
    rounds = served[served.index("larger") :]  # before it nobody waits: the clock has credit
    assert len(rounds) <= larger * (readers + 1), served


@in_virtual_time
async def test_a_change_of_the_rate_holds_at_once(tmp_path):
    rate, taken = [200_000], []
    began = time.monotonic()
    with processes(tmp_path, 1, rate) as (wan,):

        async def change():
            await asyncio.sleep(1.0)
            rate[0] = 2_000_000

        await asyncio.gather(change(), reader(wan, Share(2), taken, began + 2.0, 4096))
    assert rate_between(taken, began + 0.2, began + 1.0) == pytest.approx(200_000, rel=0.1)
    assert rate_between(taken, began + 1.1, began + 2.0) == pytest.approx(2_000_000, rel=0.05)


@in_virtual_time
async def test_a_process_that_died_with_its_turn_keeps_nobody_waiting(tmp_path):
    taken, began = [], time.monotonic()
    with processes(tmp_path, 2, [1_000_000], alive=lambda block: block == 1) as wans:
        wans[0]._turns.ask(rank(0, 0))
        await reader(wans[1], Share(2), taken, began + 1.0, 8192)
    assert rate_between(taken, began + 0.2, began + 1.0) == pytest.approx(1_000_000, rel=0.05)


@in_virtual_time
async def test_a_process_that_does_not_come_is_passed_over(tmp_path):
    taken, began = [], time.monotonic()
    with processes(tmp_path, 2, [1_000_000]) as wans:
        wans[0]._turns.ask(rank(0, 0))
        await reader(wans[1], Share(2), taken, began + 1.0, 8192)
    assert len(taken) >= 10


@in_virtual_time
async def test_without_a_rate_nothing_waits(tmp_path):
    with processes(tmp_path, 1, [0]) as (wan,):
        began = time.monotonic()
        for _ in range(1000):
            await wan.pay(1 << 30, Share(2))
        assert time.monotonic() == began


def test_ranks_compare_by_urgency_then_by_tag():
    assert rank(0, 10**18) < rank(1, 0) < rank(1, 5) < rank(15, 0) < NOBODY
