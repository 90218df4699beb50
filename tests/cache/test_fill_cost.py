"""What a large fill costs, counted, not timed: thread jobs before the first byte, its readers' wake-ups."""

import asyncio
import gc
import time
from pathlib import Path

import pytest
from harness.caches import path_of, read, route, working
from harness.content import noise
from harness.upstreams import Answer, Gate

from gup.cache.body import GrowingBody
from gup.cache.locks import Occupied
from gup.cache.records import Head
from gup.content.key import Variant

FILE = path_of("full.dax")
BODY = noise("large fill", 6_000_000)


async def test_a_large_bodys_first_bytes_are_written_with_its_state_in_one_thread_job(tmp_path, upstream):
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((2_000_000, gate),)))
    async with working(tmp_path, [upstream.url]) as one:
        jobs, submit = [], one.dependencies.executor.submit

        def counted(work, *arguments):
            jobs.append(work)
            return submit(work, *arguments)

        one.dependencies.executor.submit = counted
        opened = await one.open(FILE)
        assert opened.body.published > 0
        assert len(jobs) == 2, "the look-up; the first bytes and the state"
        assert list((tmp_path / "partial").glob("*.state"))
        gate.open()
        assert await read(opened.body) == BODY


async def test_readers_are_woken_for_what_is_worth_a_call_to_each():
    body = GrowingBody(Head(100_000_000, '"e"', "text/plain", None, "u", None), 1, None, time.monotonic())
    woken = []

    def publish(size: int) -> int:
        body.publish(size)
        count = len(woken)
        woken.clear()
        return count

    def wait(readers: int) -> None:
        for number in range(readers):
            body.wait(body.published, lambda number=number: woken.append(number))

    wait(2)
    assert publish(1) == 2, "the first byte"
    wait(1)
    assert publish(200_000) == 0
    assert publish(300_000) == 1, "256 KiB for the one"
    wait(10)
    assert publish(1_000_000) == 0
    assert publish(2_900_000) == 0
    assert publish(3_000_000) == 10, "256 KiB for each of the ten"
    wait(1000)
    assert publish(60_000_000) == 0
    while not woken:  # noqa: ASYNC110 - by the body's own timer
        await asyncio.sleep(0.001)
    assert len(woken) == 1000, "in time whatever there is"


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("length", [5_000, 6_000_000])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.usefixtures("no_collector")
async def test_a_removed_body_is_closed_without_the_garbage_collector(tmp_path, upstream, until, length, new):
    """Otherwise a full disk gets neither its room nor its inodes back when the body is evicted."""
    upstream.answer(FILE, Answer(BODY[:length], etag='"a"'))

    def removed() -> list[str]:
        links = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        return [link for link in links if str(tmp_path) in link and link.endswith("(deleted)")]

    async with working(tmp_path, [upstream.url]) as one:
        if new:  # the key is known to have no files
            one.dependencies.store.occupied = Occupied(memoryview(bytearray(4096)))
            one.dependencies.store.occupied.complete()
        assert await one.get(FILE) == BODY[:length]
        await until(lambda: not one.cache.fills, "it is stored")
        store, key = one.dependencies.store, route(FILE).key(Variant())
        with store.claimed(key.id):
            assert store.purge(key) == length
        one.cache.close_removed()
        await until(lambda: not removed(), "its descriptor is closed")
