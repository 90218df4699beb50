"""Fixtures of the cache's tests."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.upstreams import ScriptedUpstream

from gup.cache.store import Store


@pytest.fixture
def upstream():
    with ScriptedUpstream() as scripted:
        yield scripted


@pytest.fixture
def until() -> Callable:
    async def wait(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what
            await asyncio.sleep(0.002)

    return wait


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "cache")
    made.prepare()
    return made
