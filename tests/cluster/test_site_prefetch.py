"""Prefetching in a site: one fetch over the WAN, in the background until a client of any node wants it."""

import asyncio
import json

import pytest
from cluster.conftest import cluster
from cluster.services import UNLIMITED, running
from harness.caches import path_of, route
from harness.commands import on
from harness.content import CONTENT_INFO, INDEX, MONIKER, content_path, zip_of
from harness.processes import until as wait_until
from harness.upstreams import Answer, Gate

from gup.cluster.ownership import ranked
from gup.content.key import Variant

BODY = zip_of("prefetched", 600_000)


def nodes_by_rank(nodes, path):
    """The owner first."""
    by_name = {node.name: node for node in nodes}
    return [by_name[name] for name in ranked(route(path).key(Variant()).text, by_name)]


def prefetching(node, path):
    return asyncio.create_task(node.worker.cache.prefetch(route(path), Variant()))


PATH, BUSY = path_of("full.bin"), path_of("full.bin", "260802001")


async def test_what_all_nodes_prefetch_at_once_crosses_the_wan_once_in_the_background(tmp_path, upstream):
    upstream.answer(PATH, Answer(BODY, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        await asyncio.gather(*(prefetching(node, PATH) for node in nodes))
        for node in nodes:
            assert await node.worker.get(PATH) == BODY
        received = [
            node.worker.counted("gup_upstream_received_bytes_total", upstream="u0", purpose=purpose)
            for node in nodes
            for purpose in ("prefetch", "fill")
        ]
        assert sorted(received) == [0] * 5 + [len(BODY)]
    assert len(upstream.requests(PATH)) == 1


@pytest.mark.parametrize("begun", [False, True], ids=["not begun", "in mid-body"])
async def test_the_owner_yields_to_its_clients_until_a_client_of_another_node_wants_it(
    tmp_path, upstream, until, begun
):
    """That client comes to the same process as the background fill there."""
    half, whole = Gate(), Gate()
    upstream.answer(BUSY, Answer(BODY, etag='"b"', gates=((100_000, whole),)))
    upstream.answer(PATH, Answer(BODY, etag='"a"', gates=((100_000, half),) if begun else ()))
    async with cluster(tmp_path, [upstream.url], 2) as nodes:
        owner, other = nodes_by_rank(nodes, PATH)
        if begun:
            ahead = prefetching(other, PATH)
            await until(lambda: half.is_reached, "it has begun")
        owner.knows()  # the other content is its own to fetch
        client = await owner.worker.open(BUSY)
        await until(lambda: whole.is_reached, "a client's fill streams at the owner")
        owner.knows(*nodes)
        if begun:
            half.open()
        else:
            ahead = prefetching(other, PATH)
        await asyncio.sleep(0.3)
        assert not ahead.done()
        assert len(upstream.requests(PATH)) == int(begun)
        assert await other.worker.get(PATH) == BODY
        assert await ahead
        whole.open()  # the client's fill was not over
        client.body.leave()
    assert len(upstream.requests(PATH)) == 1


# --- real services

FILES = {
    content_path("full.zip", revision=f"26080{number}001"): zip_of(f"f{number}", 300_000) for number in (1, 2)
}


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as started:
        for path, body in FILES.items():
            started.upstream.answer(path, Answer(body, etag='"a"'))
        started.upstream.answer(INDEX, CONTENT_INFO)
        yield started


@pytest.mark.long
def test_what_is_ordered_at_one_node_is_stored_at_all_and_crosses_the_wan_once(site):
    for name in ("a", "b", "c"):
        site.start(name, settings=UNLIMITED)
    wait_until(site.all_ask_all, "all ask all", 30)
    done = on(site.nodes["b"], "prefetch", *FILES)
    assert (done.returncode, done.stderr) == (0, ""), done
    for gup in site.nodes.values():
        for path in FILES:
            gup.wait_stored(path)
    assert [len(site.upstream.requests(path)) for path in FILES] == [1, 1]
    total = sum(map(len, FILES.values()))
    metrics = [gup.metrics() for gup in site.nodes.values()]
    assert sum(each("gup_upstream_received_bytes_total", purpose="prefetch") for each in metrics) == total
    assert sum(each("gup_upstream_received_bytes_total") for each in metrics) == total
    for gup in site.nodes.values():
        rows = gup.api("/api/v1/prefetch")[1]["wanted"]
        assert {row["by"] for row in rows} == {"operator"}
        for path, body in FILES.items():
            gup.serves(path, body)
    done = on(site.nodes["a"], "prefetch", "--product", MONIKER, "--json")
    assert [row["outcome"] for row in json.loads(done.stdout)["wanted"]] == ["present"]


@pytest.mark.long
def test_a_node_that_was_off_fetches_it_when_it_is_back(site):
    for name in ("a", "b"):
        site.start(name, settings=UNLIMITED)
    wait_until(site.all_ask_all, "all ask all", 30)
    one, two = site.nodes["a"], site.nodes["b"]
    assert two.stop() == 0
    (path, _) = FILES
    assert on(one, "prefetch", path).returncode == 0
    two.start()
    two.wait_stored(path)
    assert len(site.upstream.requests(path)) == 1
