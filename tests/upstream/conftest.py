"""Fixtures of the upstreams' tests."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from harness.private import private_counters, private_turns
from harness.upstreams import ScriptedUpstream

from gup.config import Settings
from gup.upstream.bandwidth import CLOCK_WORDS, Wan
from gup.upstream.health import Board
from gup.upstream.pool import Pool


@pytest.fixture
def upstream():
    with ScriptedUpstream() as scripted:
        yield scripted


class Clock:
    """Monotonic time that a test can put forward."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def upstreams() -> Callable:
    """Settings of these tables."""

    def make(*tables: dict):
        return Settings.model_validate({"upstream": list(tables)}).upstream

    return make


@pytest.fixture
def pool_of(tmp_path, clock, upstreams) -> Callable:
    """A pool of these tables of settings."""

    @asynccontextmanager
    async def make(*tables: dict) -> AsyncIterator[Pool]:
        settings = upstreams(*tables)
        names = [one.name for one in settings]
        words = memoryview(bytearray(8 * CLOCK_WORDS)).cast("Q")
        wan = Wan(words, 0, private_turns(), lambda: 0, tmp_path / "wan.lock")
        pool = Pool(
            settings,
            private_counters(names),
            wan,
            user_agent="gup/test",
            via="1.1 here (gup)",
            board=Board.private(names, clock),
            clock=clock,
        )
        try:
            yield pool
        finally:
            await pool.close()
            wan.close()

    return make
