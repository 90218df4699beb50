"""Purges of a site, with real services and a real engine: what is purged anywhere is served nowhere again."""

import time
from functools import partial
from urllib.parse import quote

import pytest
from cluster.conftest import cluster
from cluster.services import PASSWORD, running
from harness.caches import path_of, route
from harness.content import content_path, zip_of
from harness.processes import until
from harness.upstreams import Answer, Gate

from gup.cluster.signing import Signer
from gup.content.key import Variant

FILE = content_path("full.zip")
OLD, NEW = zip_of("old", 300_000), zip_of("new", 300_000)
KEY = quote(f"any/any{FILE.removeprefix('/content')}")


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as started:
        started.upstream.answer(FILE, Answer(OLD, etag='"a"'))
        yield started


def engine(site):
    return site.valkey.client(password=PASSWORD)


def purge(gup):
    """The members that have not confirmed it."""
    status, answer = gup.api(f"/api/v1/content/{KEY}", "DELETE")
    assert status == 200, answer
    return answer["unconfirmed"]


def all_hold_the_old_body(site):
    until(site.all_ask_all, "all ask all", 30)
    for gup in site.nodes.values():
        gup.serves(FILE, OLD)
        gup.wait_stored(FILE)
    site.upstream.answer(FILE, Answer(NEW, etag='"b"'))


@pytest.mark.parametrize("with_engine", [True, False], ids=["engine", "no engine"])
def test_a_purge_on_one_node_holds_on_all_within_a_second(site, with_engine):
    for name in ("a", "b", "c"):
        site.start(name)
    all_hold_the_old_body(site)
    if not with_engine:
        site.valkey.kill()
        until(lambda: site.seen_by("a")["engine_error"], "the engine is away", 30)
    began = time.monotonic()
    assert purge(site.nodes["b"]) == []
    assert time.monotonic() - began < 5
    for gup in site.nodes.values():
        gup.serves(FILE, NEW)


@pytest.mark.parametrize("told_by", ["a member", "the engine"])
def test_a_node_that_was_off_serves_nothing_that_was_purged_meanwhile(site, told_by):
    for name in ("a", "b"):
        site.start(name)
    all_hold_the_old_body(site)
    two = site.nodes["b"]
    assert two.stop() == 0
    purge(site.nodes["a"])
    if told_by == "a member":
        with engine(site) as client:
            client.flushall()
        site.valkey.kill()
    else:
        with engine(site) as client:
            until(lambda: client.xlen("gup:{lyon}:orders"), "it is in the engine")
        site.nodes.pop("a").stop()
    two.start()
    two.serves(FILE, NEW)


@pytest.mark.long
def test_what_the_engine_has_lost_is_put_back(site):
    """It is emptied; or a primary had acknowledged an order, and its successor does not have it."""
    one = site.start("a")
    one.serves(FILE, OLD)
    site.upstream.answer(FILE, Answer(NEW, etag='"b"'))
    purge(one)
    with engine(site) as client:
        for lose in ("the last", "all"):
            until(lambda: client.xlen("gup:{lyon}:orders"), "it is there", 30)
            if lose == "all":
                client.flushall()
            else:
                ((entry, _),) = client.xrange("gup:{lyon}:orders")
                client.xdel("gup:{lyon}:orders", entry)
        until(lambda: client.xlen("gup:{lyon}:orders"), "it was put back", 30)


@pytest.mark.long
def test_with_neither_engine_nor_member_it_serves_and_says_so(site):
    site.start("a"), site.start("b")
    all_hold_the_old_body(site)
    one, two = site.nodes["a"], site.nodes["b"]
    assert two.stop() == 0
    purge(one)
    assert one.stop() == 0
    site.valkey.kill()
    began = time.monotonic()
    two.start()
    assert two.get(FILE).status == 200
    assert time.monotonic() - began < 30
    until(lambda: two.alarms("orders-unknown"), "an alarm", 30)
    site.valkey.start()
    one.start()
    until(lambda: two.get(FILE).body == NEW, "it is told when a member is back", 30)
    until(lambda: not two.alarms("orders-unknown"), "the alarm ends", 60)


def test_a_forged_or_repeated_order_removes_nothing(site):
    one = site.start("a")
    one.serves(FILE, OLD)
    purge(one)
    one.serves(FILE, OLD)
    one.wait_stored(FILE)
    with engine(site) as client:
        ((_, fields),) = until(lambda: client.xrange("gup:{lyon}:orders"), "the purge is in the engine")
        signature, text = fields["order"].split(" ", 1)
        secret, later = (site.folder / "secret").read_bytes().strip(), text.replace('"a"', '"b"')
        forged = [
            f"x {later}",
            f"{signature} {later}",
            Signer("lyon", (b"another-secret-of-it",)).seal("order", later),
            Signer("paris", (secret,)).seal("order", later),
            Signer("lyon", (secret,)).seal("row of b", later),
        ]
        assert fields["order"] == Signer("lyon", (secret,)).seal("order", text)
        for sealed in (fields["order"], *forged):
            client.xadd("gup:{lyon}:orders", {"order": sealed})

    def all_are_seen():  # as often as each other
        texts = [alarm["text"] for alarm in one.alarms("row-forged")]
        return [int(text.split()[0]) % len(forged) for text in texts] == [0]

    until(all_are_seen, "an alarm", 30)
    one.serves(FILE, OLD)
    assert len(site.upstream.requests(FILE)) == 2


def test_a_pin_holds_on_all_nodes(site):
    for name in ("a", "b"):
        site.start(name)
    all_hold_the_old_body(site)
    for method, pinned in (("PUT", True), ("DELETE", False)):
        assert site.nodes["a"].api(f"/api/v1/content/{KEY}/pin", method)[0] == 200
        for gup in site.nodes.values():
            until(partial(_is_pinned, gup, pinned), "as ordered", 30)


def _is_pinned(gup, wanted):
    return gup.api(f"/api/v1/content/{KEY}")[1]["pinned"] is wanted


# --- copies, between nodes in this process

PATH = path_of("full.bin")


async def test_a_copy_from_a_member_that_is_behind_is_not_taken(tmp_path, upstream):
    """Whether it may fetch for the other, or only holds it."""
    upstream.answer(PATH, Answer(OLD, etag='"a"'))
    async with cluster(tmp_path, [upstream.url], 3) as nodes:
        for node in nodes:
            assert await node.worker.get(PATH) == OLD
        upstream.answer(PATH, Answer(NEW, etag='"b"'))
        for node in nodes:
            node.worker.purge(pattern="*")
            assert await node.worker.get(PATH) == NEW
            key = route(PATH).key(Variant())
            assert (await node.worker.cache._entries.get(key)).head.order


async def test_a_body_that_arrives_at_a_member_from_before_the_purge_is_not_joined(tmp_path, upstream, until):
    gate = Gate()
    upstream.answer(PATH, Answer(OLD, etag='"a"', gates=((100_000, gate),)), Answer(NEW, etag='"b"'))
    async with cluster(tmp_path, [upstream.url], 2) as nodes:
        first = await nodes[0].worker.open(PATH)
        await until(lambda: gate.is_reached, "it arrives")
        nodes[1].worker.purge(pattern="*")
        assert await nodes[1].worker.get(PATH) == NEW
        gate.open()
        first.body.leave()
