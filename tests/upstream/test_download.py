"""A body from upstream whose reader stops and goes on: no byte is lost, whatever it was waiting for."""

import asyncio
import random

import pytest
from harness.content import BIG, noise
from harness.private import private_counters
from harness.upstreams import Answer

from gup.upstream.bandwidth import Wan
from gup.upstream.download import Download
from gup.upstream.members import Members
from gup.upstream.session import Ask

BODY = noise("download", 600_000)


async def read_with_stops(download: Download, chance: random.Random) -> tuple[bytes, int]:
    """All of it, and how many reads were cancelled on the way."""
    got, stops = bytearray(), 0
    while True:
        reading = asyncio.create_task(download.read())
        patience = chance.choice([0.0, 0.0, 0.0, 0.0, 0.001, 0.02, 0.5])
        await asyncio.wait([reading], timeout=patience)
        if not reading.done():
            reading.cancel()
            await asyncio.wait([reading])
        if reading.cancelled():
            stops += 1
            continue
        piece = reading.result()
        if not piece:
            return bytes(got), stops
        got += piece


@pytest.mark.parametrize("seed", range(6))
async def test_reads_that_are_cancelled_lose_nothing(pool_of, upstream, monkeypatch, seed):
    chance = random.Random(seed)
    cuts = [Answer(BODY, etag='"a"', cut_after=amount) for amount in (150_000, 250_000, 100_000)]
    upstream.answer(BIG, *cuts, Answer(BODY, etag='"a"'))

    async def pay(*_: object) -> None:
        await asyncio.sleep(chance.choice([0.0, 0.002]))

    async def reread(offset: int, length: int) -> bytes:
        await asyncio.sleep(0)
        return BODY[offset : offset + length]

    monkeypatch.setattr(Wan, "pay", pay)
    async with pool_of({"name": "one", "url": upstream.url}) as pool:
        ask, counters = Ask(path=BIG, purpose="fill"), private_counters(["one"])

        async def wan():
            return pool.upstreams, ()

        members = Members(counters)
        download = Download(pool, members, wan, ask, counters, immutable=True, reread=reread)
        assert (await download.begin()).status == 200
        got, stops = await read_with_stops(download, chance)
        download.close()
        await members.close()
    assert got == BODY
    assert stops > 0
