"""What several nodes do with the same content: one fetch over the WAN, whole bodies, one ETag."""

import asyncio
import random

import pytest
from cluster.conftest import cluster
from harness.caches import path_of, read, route
from harness.upstreams import Answer, Gate

from gup.cluster.order import ranked
from gup.content.key import Variant
from gup.errors import Problem

BODY = random.Random(3).randbytes(5_000_000)
SMALL = BODY[:60_000]
FILES = [path_of("full.dax", f"26080{n}001") for n in range(6)]


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
