"""A body's way through memory: the ring holds what is promised, its writer waits for whom it should."""

import asyncio
import os

import pytest
from harness.trees import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.cache.body import CUT
from gup.cache.checksum import CHUNK_BYTES, chunk_sum
from gup.cache.growing import GrowingBody, Reader
from gup.cache.part import WITHHELD_BYTES
from gup.cache.passing import NobodyReads, PassingWriter
from gup.cache.record import Head
from gup.cache.ring import RING_BYTES, Ring
from gup.cache.store import OpenFile
from gup.upstream.exchange import UpstreamFailure

BODY = noise("ring", 4 << 20)


@settings(deadline=None)
@given(
    st.integers(0, 50),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=30),
    st.data(),
)
def test_a_ring_gives_back_what_it_holds_and_nothing_else(origin, steps, data):
    ring, whole = Ring(origin, 64), BODY[:4096]
    for amount, dropped in steps:
        piece = whole[ring.end : ring.end + min(amount, ring.room)]
        ring.add(piece)
        ring.drop_before(min(ring.start + dropped, ring.end))
        assert 0 <= ring.end - ring.start <= 64
        assert ring.read(ring.start, ring.end - ring.start) == whole[ring.start : ring.end]
        at = data.draw(st.integers(ring.start, ring.end))
        view = bytes(ring.view(at, 30))
        assert view == whole[at : at + len(view)]
        assert view or at == ring.end
    with pytest.raises(ValueError, match="not held"):
        ring.read(ring.end, 1)
    if not ring.whole:
        with pytest.raises(ValueError, match="not held"):
            ring.read(ring.start - 1, 1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0  # each look finds a second gone
        return self.now


def growing(file: OpenFile | None = None) -> GrowingBody:
    head = Head(
        length=len(BODY),
        etag='"e"',
        content_type="application/octet-stream",
        last_modified=None,
        upstream="u",
        upstream_etag=None,
    )
    return GrowingBody(head, 1, file, 0.0)


def take(reader: Reader, most: int) -> bytes:
    """What can be had at once, as a connection takes it, and one look more."""
    got = bytearray()
    at = reader.position
    while len(got) < most and (amount := reader.available(at, most - len(got))) > 0:
        got += reader.view(at, amount)
        at += amount
    reader.available(at, 1)
    return bytes(got)


async def write_all(writer: PassingWriter) -> None:
    for at in range(0, len(BODY), 100_000):
        await writer.add(BODY[at : at + 100_000])


async def drain(reader: Reader, task: asyncio.Task) -> bytes:
    got = bytearray()
    while not task.done() or reader.available(len(got), 1) > 0:
        got += take(reader, 65536)
        await asyncio.sleep(0)
    return bytes(got)


async def test_the_slowest_reader_gets_every_byte_and_the_end_is_withheld():
    body = growing()
    quick, slow = body.reader(), body.reader()
    writer = PassingWriter(body, None, lambda: 1e9, Clock())
    writing = asyncio.create_task(write_all(writer))
    got = b""
    while not writing.done():
        take(quick, RING_BYTES)
        got += take(slow, 4096)
        await asyncio.sleep(0)
        assert quick.position - slow.position <= RING_BYTES
    await writing
    got += take(slow, len(BODY))
    assert got == BODY[:-WITHHELD_BYTES]
    await writer.write_withheld()
    assert take(slow, len(BODY)) == BODY[-WITHHELD_BYTES:]
    quick.leave()
    slow.leave()


async def test_who_holds_others_up_for_too_long_is_left_behind():
    body = growing()
    quick, stuck = body.reader(), body.reader()
    writer = PassingWriter(body, None, lambda: 5.0, Clock())
    writing = asyncio.create_task(write_all(writer))
    await asyncio.sleep(0)
    take(stuck, 1000)
    got = await drain(quick, writing)
    await writing
    assert got == BODY[:-WITHHELD_BYTES]
    assert stuck.left_behind
    assert stuck.available(1000, 1) == CUT
    assert not quick.left_behind


async def test_who_has_not_begun_holds_nobody_up_and_can_not_begin_later():
    body = growing()
    quick, queued = body.reader(), body.reader()
    writer = PassingWriter(body, None, lambda: 1e9, Clock())
    writing = asyncio.create_task(write_all(writer))
    await asyncio.sleep(0)
    assert await drain(quick, writing) == BODY[:-WITHHELD_BYTES]
    assert not body.whole
    assert queued.available(0, 1) == CUT


async def test_nothing_is_fetched_for_nobody():
    body = growing()
    reader = body.reader()
    writer = PassingWriter(body, None, lambda: 1e9, Clock())
    writing = asyncio.create_task(write_all(writer))
    await asyncio.sleep(0)
    take(reader, 1000)
    reader.leave()
    with pytest.raises(NobodyReads):
        await writing
    assert writer.received <= RING_BYTES


async def test_what_was_dropped_can_not_be_compared():
    body = growing()
    reader = body.reader()
    writer = PassingWriter(body, None, lambda: 1e9, Clock())
    writing = asyncio.create_task(write_all(writer))
    await asyncio.sleep(0)
    await drain(reader, writing)
    tail = len(BODY) - 70_000
    assert await writer.reread(tail, 70_000) == BODY[tail:]
    with pytest.raises(UpstreamFailure, match="can't be compared"):
        await writer.reread(0, 100)


async def test_of_a_distrusted_file_only_chunks_that_agree_with_their_sums_are_sent(tmp_path):
    path = tmp_path / "part"
    amount = 2 * CHUNK_BYTES + 1000
    path.write_bytes(BODY[:amount])
    sums = [chunk_sum(BODY[at : min(at + CHUNK_BYTES, amount)]) for at in range(0, amount, CHUNK_BYTES)]
    body = growing(OpenFile(path))
    body.publish(amount)
    reader = body.reader()
    body.distrust(amount, tuple(sums))
    assert reader.fd == -1
    assert take(reader, amount) == BODY[:amount]
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\0\0\0\0", CHUNK_BYTES + 5)
    again = body.reader()
    assert take(again, amount) == BODY[:CHUNK_BYTES]
    assert again.available(CHUNK_BYTES, 1) == CUT
    assert again.available(2 * CHUNK_BYTES, 10_000) == 1000
