"""Fills that nobody waits for: they hold no fill slot, yield to clients, and are promoted when one asks."""

import asyncio

import pytest
from harness.caches import path_of, read, route, working
from harness.content import noise
from harness.upstreams import Answer, Gate

from gup.cache.open_entries import Result
from gup.content.key import Variant
from gup.errors import Problem
from gup.upstream.bandwidth import Share

BACKGROUND, CLIENTS = path_of("xdelta260801001_To_260802001.dax"), path_of("full.dax")
BODY = noise("background", 1_000_000)
RECEIVED = "gup_upstream_received_bytes_total"


async def test_what_can_not_be_had_raises_and_is_no_failure_of_clients(tmp_path, upstream):
    async with working(tmp_path, [upstream.url]) as worker:
        with pytest.raises(Problem) as caught:
            await worker.cache.prefetch(route(BACKGROUND), Variant())
        assert caught.value.status == 404
        with pytest.raises(Problem):  # the client's answer is there already
            await worker.open(BACKGROUND)
        assert [event for event in worker.told if event["key"].endswith(".dax")] == []
    assert len(upstream.requests(BACKGROUND)) == 1


async def test_it_takes_nobodys_place_and_stands_still_while_others_fill(tmp_path, upstream, until):
    first, blocking = Gate(), Gate()
    upstream.answer(BACKGROUND, Answer(BODY, gates=((200_000, first),)))
    upstream.answer(CLIENTS, Answer(noise("full", 300_000), gates=((100_000, blocking),)))
    async with working(tmp_path, [upstream.url], fill={"max": 1}) as worker:
        prefetch = asyncio.create_task(worker.cache.prefetch(route(BACKGROUND), Variant()))
        await until(lambda: first.is_reached, "it is under way")
        client = await worker.open(CLIENTS)  # there is one slot, and it is free
        await until(lambda: blocking.is_reached, "the client's fill is under way")
        await asyncio.sleep(0.1)  # its last look at the others is older than the time between two
        first.open()
        await asyncio.sleep(0.3)
        assert worker.counted(RECEIVED, upstream="u0", purpose="prefetch") < len(BODY)
        assert not prefetch.done()
        blocking.open()
        assert len(await read(client.body)) == 300_000
        client.body.leave()
        assert await prefetch


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same process", "another process"])
async def test_a_client_that_asks_hurries_it(tmp_path, upstream, until, elsewhere):
    first, blocking = Gate(), Gate()
    upstream.answer(BACKGROUND, Answer(BODY, gates=((200_000, first),)))
    upstream.answer(CLIENTS, Answer(noise("full", 300_000), gates=((100_000, blocking),)))
    async with working(tmp_path, [upstream.url]) as controller, working(tmp_path, [upstream.url]) as worker:
        prefetch = asyncio.create_task(controller.cache.prefetch(route(BACKGROUND), Variant()))
        await until(lambda: first.is_reached, "it is under way")
        client = await worker.open(CLIENTS)
        await until(lambda: blocking.is_reached, "a client's fill is under way")
        await asyncio.sleep(0.1)  # its last look at the others is older than the time between two
        first.open()
        asker = worker if elsewhere else controller
        wanted = await asker.open(BACKGROUND)
        assert wanted.result is Result.COLLAPSED
        assert await read(wanted.body) == BODY  # while the other still stands
        wanted.body.leave()
        assert await prefetch
        blocking.open()
        assert len(await read(client.body)) == 300_000
        client.body.leave()
    assert len(upstream.requests(BACKGROUND)) == 1


async def test_what_waits_for_the_wan_takes_the_place_of_its_new_priority(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as worker:
        wan = worker.dependencies.pool.wan
        wan.rate = lambda: 100_000
        order: list[str] = []

        async def pay(name: str, share: Share) -> None:
            await wan.pay(2000, share)
            order.append(name)

        background = Share(3)
        tasks = [asyncio.create_task(pay(f"full {number}", Share(2))) for number in range(20)]
        tasks.append(asyncio.create_task(pay("background", background)))
        await until(lambda: len(order) >= 2, "some have paid")
        background.priority = 0
        wan.sort_anew(background)
        await asyncio.gather(*tasks)
        assert order.index("background") < 10
