import asyncio
import time

import pytest

from gup.demo.manager import PIECE_BYTES, Link

pytestmark = pytest.mark.alone


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_each_piece_waits_for_the_ones_before_it():
    clock = Clock()
    link = Link(1000, clock)
    assert link.reserve(1000) == pytest.approx(1.0)
    assert link.reserve(500) == pytest.approx(1.5)
    clock.now += 1.5
    assert link.reserve(100) == pytest.approx(0.1)


def test_idle_time_is_not_saved_up():
    clock = Clock()
    link = Link(1000, clock)
    clock.now += 3600
    assert link.reserve(1000) == pytest.approx(1.0, abs=0.011)


def test_without_a_rate_nothing_waits():
    assert Link(0, Clock()).reserve(10**9) == 0.0


async def test_all_connections_together_get_the_rate_and_each_its_share():
    rate, link = 4_000_000, Link(4_000_000)
    begin = time.monotonic()
    passed = [0] * 5

    async def connection(at):
        while time.monotonic() - begin < 0.5:
            await link.pass_through(PIECE_BYTES)
            passed[at] += PIECE_BYTES

    async with asyncio.TaskGroup() as tasks:
        for at in range(5):
            tasks.create_task(connection(at))
    elapsed = time.monotonic() - begin
    # Never faster (but for the slack); slower only when the machine is busy with other things.
    assert sum(passed) <= rate * (elapsed + 0.02) + 5 * PIECE_BYTES
    assert sum(passed) >= rate * elapsed * 0.5
    assert max(passed) - min(passed) <= 2 * PIECE_BYTES
