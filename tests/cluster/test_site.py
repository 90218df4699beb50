"""What several nodes do with the same content: one fetch over the WAN, whole bodies, one ETag."""

import asyncio
import random
import time

import pytest
from cluster.conftest import cluster
from harness.caches import path_of, read, route
from harness.upstreams import Answer, Gate

from gup.cluster.ownership import ranked
from gup.content.key import Variant
from gup.errors import Problem

BODY = random.Random(3).randbytes(5_000_000)
SMALL = BODY[:60_000]
FILES = [path_of("full.dax", f"26080{n}001") for n in range(6)]
INDEX = path_of("minitri.flg", "260801001")


def order(nodes, path):
    """The nodes as the key of `path` ranks them."""
    by_name = {node.name: node for node in nodes}
    return [by_name[name] for name in ranked(route(path).key(Variant()).text, by_name)]


async def get(node, path):
    opened = await node.worker.open(path)
    try:
        return await read(opened.body), opened.body.head
    finally:
        opened.body.leave()


@pytest.mark.parametrize("body", [SMALL, BODY], ids=["small", "large"])
async def test_a_herd_at_all_nodes_costs_one_fetch_and_gets_one_etag(tmp_path, upstream, body):
    for path in FILES:
        upstream.answer(path, Answer(body, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        got = await asyncio.gather(*(get(node, path) for path in FILES for node in nodes for _ in range(5)))
        assert all(data == body for data, _ in got)
        assert len({head.etag for _, head in got}) == len(FILES)
        assert [len(upstream.requests(path)) for path in FILES] == [1] * len(FILES)
        assert sum(upstream.body_bytes(path) for path in FILES) == len(FILES) * len(body)
        assert sum(node.sent_bytes for node in nodes) == 2 * len(FILES) * len(
            body
        )  # a copy for each other node


async def test_the_body_is_passed_on_while_it_arrives(tmp_path, upstream, until):
    gate = Gate()
    upstream.answer(FILES[0], Answer(BODY, etag='"a"', gates=((3_000_000, gate),)))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        low = order(nodes, FILES[0])[-1]
        opened = await low.worker.open(FILES[0])
        await until(lambda: opened.body.published > 2_000_000, "most of what has come")
        assert not opened.body.ended
        gate.open()
        assert await read(opened.body) == BODY
        opened.body.leave()
    assert len(upstream.requests(FILES[0])) == 1


async def test_an_owner_that_has_lost_its_copy_takes_it_from_another_node(tmp_path, upstream):
    upstream.answer(FILES[0], Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        owner, second, third = order(nodes, FILES[0])
        second.knows(third)  # the owner is not there yet
        assert (await get(second, FILES[0]))[0] == BODY
        second.knows(*nodes)
        data, head = await get(owner, FILES[0])
        assert data == BODY
        assert head.etag == (await get(second, FILES[0]))[1].etag
    assert len(upstream.requests(FILES[0])) == 1


@pytest.mark.parametrize("cut_at", [0, 1_000_000, 3_000_000])
async def test_a_node_that_dies_in_mid_body_costs_an_overlap_at_most(tmp_path, upstream, cut_at, until):
    gate = Gate()
    first = Answer(BODY, etag='"a"', gates=((cut_at, gate),))
    upstream.answer(FILES[0], first, Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        owner, second, third = order(nodes, FILES[0])
        waiting = [asyncio.create_task(get(node, FILES[0])) for node in (second, third) for _ in range(3)]
        await until(lambda: gate.is_reached, "the owner's fetch")
        if cut_at:
            await until(lambda: third.got_bytes > cut_at - 200_000, "most of what has come")
        await owner.vanish()
        got = await asyncio.gather(*waiting)
        assert all(data == BODY for data, _ in got)
        gate.open()
    _, *later = upstream.requests(FILES[0])
    assert sum(request.body_bytes for request in later) <= len(BODY) - cut_at + 0.1 * len(BODY)


async def test_what_upstream_has_not_is_asked_for_once(tmp_path, upstream):
    upstream.answer(FILES[0], Answer(b"", status=404))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        for node in nodes:
            with pytest.raises(Problem) as problem:
                await node.worker.open(FILES[0])
            assert problem.value.status == 404
    assert len(upstream.requests(FILES[0])) == 1


async def test_a_member_that_cannot_be_reached_is_passed_over(tmp_path, upstream):
    upstream.answer(FILES[0], Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        owner, second, third = order(nodes, FILES[0])
        await owner.vanish()
        assert (await get(third, FILES[0]))[0] == BODY
        assert (await get(second, FILES[0]))[0] == BODY
    assert len(upstream.requests(FILES[0])) == 1


async def test_crossed_keys_with_one_slot_each_end(tmp_path, upstream):
    for path in FILES:
        upstream.answer(path, Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 2, fill={"max": 1}) as nodes:
        got = await asyncio.gather(*(get(node, path) for path in FILES for node in nodes))
        assert all(data == BODY for data, _ in got)
    assert [len(upstream.requests(path)) for path in FILES] == [1] * len(FILES)


async def test_who_is_no_member_gets_nothing(tmp_path, upstream):
    upstream.answer(FILES[0], Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 1) as nodes:
        reader, writer = await asyncio.open_connection("127.0.0.1", nodes[0].port)
        writer.write(f"GET {FILES[0]} HTTP/1.1\r\nHost: x\r\nGUP-Key: x\r\n\r\n".encode())
        assert b" 403 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert not upstream.requests(FILES[0])


async def test_a_head_is_asked_for_once(tmp_path, upstream):
    upstream.answer(FILES[0], Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        owner, second, third = order(nodes, FILES[0])
        heads = [await head_at(node, FILES[0]) for node in (owner,)]
        await get(owner, FILES[0])
        heads += [await head_at(node, FILES[0]) for node in (second, third, owner)]
        assert {(head.etag, head.length) for head in heads} == {(heads[0].etag, len(BODY))}
    assert len(upstream.requests(FILES[0], method="HEAD")) == 1
    assert len(upstream.requests(FILES[0])) == 1


async def head_at(node, path):
    return (await node.worker.cache.head(route(path), Variant()))[0]


async def test_an_absence_is_remembered_no_longer_than_by_the_owner(tmp_path, upstream):
    async with cluster(tmp_path, [upstream.url], 2, cache={"negative_ttl": "10s"}) as nodes:
        owner, second = order(nodes, FILES[0])
        key, path = route(FILES[0]).key(Variant()), route(FILES[0]).upstream_path
        owner.worker.dependencies.failures.put(key, path, Problem("upstream-gone", "no more"), 3.0)
        for ask in (head_at, get):
            with pytest.raises(Problem) as problem:
                await ask(second, FILES[0])
            assert (problem.value.slug, problem.value.detail) == ("upstream-gone", "no more")
        assert second.worker.dependencies.failures.get(key, path).stands_seconds <= 3.0
    assert not upstream.requests(FILES[0])


async def test_a_full_queue_is_passed_on(tmp_path, upstream, until):
    gate = Gate()
    for path in FILES:
        upstream.answer(path, Answer(BODY, etag='"a"', head_gate=gate))
    limits = {"max": 1, "queue_timeout": "0.3s"}
    async with cluster(tmp_path, [upstream.url], 2, fill=limits) as nodes:
        owners = {path: order(nodes, path)[0] for path in FILES}
        owner = next(node for node in nodes if sum(one is node for one in owners.values()) > 1)
        other = next(node for node in nodes if node is not owner)
        first, second, *_ = (path for path, one in owners.items() if one is owner)
        streaming = asyncio.create_task(get(owner, first))
        await until(lambda: gate.is_reached, "the owner's fetch")
        with pytest.raises(Problem) as problem:
            await other.worker.open(second)
        assert problem.value.slug == "queue-full"
        assert problem.value.retry_after_seconds
        gate.open()
        await streaming
        assert (await get(other, second))[0] == BODY
    assert [len(upstream.requests(path)) for path in (first, second)] == [1, 1]


async def test_index_files_cross_the_wan_once_a_ttl(tmp_path, upstream):
    upstream.answer(INDEX, Answer(SMALL, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3, cache={"index_ttl": "10s"}) as nodes:
        wall = [time.time()]
        for node in nodes:
            node.worker.dependencies.wall_clock = lambda: wall[0]
        owner, second, third = order(nodes, INDEX)
        for turn in range(1, 4):
            for node in (second, third, owner, third):
                assert (await get(node, INDEX))[0] == SMALL
                wall[0] += 1.5
            assert len(upstream.requests(INDEX)) == turn
            wall[0] += 5.0  # 11 s since the owner's
        assert sum(node.got_bytes for node in nodes) == 2 * len(SMALL), "later ones are conditional"
    assert [request.status for request in upstream.requests(INDEX)] == [200, 304, 304]


async def test_a_range_far_ahead_is_asked_of_the_member_that_fetches(tmp_path, upstream, until):
    gate = Gate()
    first = Answer(BODY, etag='"a"', gates=((1_000_000, gate),))
    upstream.answer(FILES[0], first, Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 2, fill={"range_wait": "0.1s"}) as nodes:
        owner, second = order(nodes, FILES[0])
        opened = await second.worker.open(FILES[0])
        await until(lambda: gate.is_reached, "the owner's fetch")
        alone = await second.worker.cache.span_alone(opened, route(FILES[0]), Variant(), 4_000_000, 4_100_000)
        assert alone is not opened
        assert await read_span(alone.body, 4_000_000, 4_100_000) == BODY[4_000_000:4_100_000]
        assert owner.sent_bytes >= 100_000
        gate.open()
        assert (await get(second, FILES[0]))[0] == BODY
    asked = upstream.requests(FILES[0])
    assert [request.body_bytes for request in asked] == [len(BODY), 100_000], "one range for all of the site"


async def read_span(body, start, stop):
    got = bytearray()
    while start + len(got) < stop:
        at = start + len(got)
        if count := body.available(at, stop - at):
            assert count > 0, "not cut"
            got += body.view(at, count)
        else:
            ready = asyncio.Event()
            body.wait(at, ready.set)
            await ready.wait()
    body.available(stop, 0)
    body.leave()
    return bytes(got)
