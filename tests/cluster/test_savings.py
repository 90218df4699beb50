"""Savings in a cluster: what came from a member is neither WAN bytes nor saved twice, whatever breaks."""

import asyncio
import random

from cluster.conftest import cluster
from cluster.test_site import get, order
from harness.caches import path_of
from harness.upstreams import Answer, Gate

BODY = random.Random(4).randbytes(4_000_000)
PATH = path_of("full.dax", "260801001")


async def test_what_is_compared_after_a_member_died_is_no_wasted_wan(tmp_path, upstream, until):
    gate = Gate()
    first = Answer(BODY, etag='"a"', gates=((2_000_000, gate),))
    upstream.answer(PATH, first, Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        owner, second, third = order(nodes, PATH)
        waiting = [asyncio.create_task(get(node, PATH)) for node in (second, third)]
        await until(lambda: third.got_bytes > 1_800_000, "most of what has come")
        await owner.vanish()
        assert all(data == BODY for data, _ in await asyncio.gather(*waiting))
        gate.open()
        for node in (second, third):
            wan = sum_of(node, "gup_upstream_received_bytes_total")
            assert sum_of(node, "gup_upstream_wasted_bytes_total") <= wan
        entries = {node.name: received(node) for node in (second, third)}
        assert entries[third.name] == 0
        assert 0 < entries[second.name] <= len(BODY) - 1_800_000 + 200_000


def received(node):
    (event,) = (event for event in node.worker.told if event["type"] == "committed")
    return event["received"]


def sum_of(node, metric):
    counters = node.worker.dependencies.counters
    return sum(counters.words[at] for name, at in counters._positions.items() if name.startswith(metric))
