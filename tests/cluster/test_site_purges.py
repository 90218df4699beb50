"""Purges of a site, with real services and a real engine: what is purged anywhere is served nowhere again."""

import time
from contextlib import contextmanager
from functools import partial
from urllib.parse import quote

import pytest
from cluster.conftest import cluster
from cluster.nodes import Valkey
from cluster.services import PASSWORD, running
from harness.caches import path_of, route
from harness.content import MONIKER, content_path, zip_of
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


# --- purges by times

LATER = content_path("full.zip", revision="260802001")


@pytest.mark.long
def test_a_purge_by_age_goes_by_the_fetch_over_the_wan_at_every_node(site):
    """A copy that a node took from another one later is as old as that; what was fetched since stays."""
    for name in ("a", "b", "c"):
        site.start(name)
    until(site.all_ask_all, "all ask all", 30)
    one, two, three = site.nodes.values()
    one.serves(FILE, OLD)
    fetched_at = time.time()
    until(lambda: time.time() - fetched_at > 3.0, "it is older than two seconds")
    site.upstream.answer(LATER, Answer(NEW, etag='"l"'))
    for gup in (two, three):
        gup.serves(FILE, OLD)
        gup.serves(LATER, NEW)
        gup.wait_stored(FILE)
        gup.wait_stored(LATER)
    site.upstream.answer(FILE, Answer(NEW, etag='"b"'))
    status, answer = two.api("/api/v1/content?older_than=2&kind=full", "DELETE")
    assert (status, answer["unconfirmed"]) == (200, []), answer
    for gup in (three, one, two):
        gup.serves(FILE, NEW)
        gup.serves(LATER, NEW)
    assert [len(site.upstream.requests(path)) for path in (FILE, LATER)] == [2, 1]


@pytest.mark.long
def test_a_purge_of_what_is_unused_goes_by_the_uses_at_each_node(site):
    for name in ("a", "b"):
        site.start(name)
    all_hold_the_old_body(site)
    one, two = site.nodes["a"], site.nodes["b"]

    def used_since(gup, at):
        return gup.api(f"/api/v1/content/{KEY}")[1]["used_at"] > at

    began = time.time()
    until(lambda: time.time() - began > 3.0, "it is unused for two seconds")
    two.serves(FILE, OLD)
    until(lambda: used_since(two, began + 1), "its use is known")
    assert two.api("/api/v1/content?unused_for=2", "DELETE")[1]["unconfirmed"] == []
    until(lambda: one.api(f"/api/v1/content/{KEY}")[0] == 404, "it is removed where nobody used it")
    assert two.api(f"/api/v1/content/{KEY}")[0] == 200
    one.serves(FILE, OLD)
    assert len(site.upstream.requests(FILE)) == 1, "the other node has it"


# --- the engine is failed over


@contextmanager
def replica_of(valkey, folder):
    """A second engine that has all that the first one has, and gets nothing more."""
    folder.mkdir()
    replica = Valkey(folder)
    try:
        with replica.client() as client:
            client.config_set("masterauth", PASSWORD)
            client.config_set("requirepass", PASSWORD)
        with replica.client(PASSWORD) as client:
            client.replicaof("127.0.0.1", valkey.port)
            until(lambda: client.info("replication")["master_link_status"] == "up", "it replicates", 30)
            client.replicaof("no", "one")
            yield replica
    finally:
        replica.kill()


def demote(valkey, replica):
    """The primary becomes the replica's, and loses what that one does not have; then it is primary again."""
    with valkey.client(PASSWORD) as client:
        client.config_set("masterauth", PASSWORD)
        client.replicaof("127.0.0.1", replica.port)
        until(lambda: client.info("replication")["master_link_status"] == "up", "it was demoted", 30)
        assert client.xlen(ORDERS) == 0, "it has lost the order"
        client.replicaof("no", "one")


ORDERS = "gup:{lyon}:orders"


@pytest.mark.long
@pytest.mark.parametrize("what", ["purge", "hold"])
def test_an_order_that_a_primary_acknowledged_before_it_was_demoted_is_not_lost(site, what):
    """It is known to a member that the node that was off has never seen; the one that gave it is gone."""
    for name in ("a", "b"):
        site.start(name)
    all_hold_the_old_body(site)
    two = site.nodes.pop("b")
    assert two.stop() == 0
    one, three = site.nodes["a"], site.start("c")
    until(site.all_ask_all, "all ask all", 30)
    three.serves(FILE, OLD)
    three.wait_stored(FILE)
    with replica_of(site.valkey, site.folder / "replica") as replica:
        if what == "purge":
            assert purge(one) == []
        else:
            given = {"stream": MONIKER, "revision": FILE.split("/")[3]}
            assert one.api("/api/v1/holds", "POST", given=given)[1]["unconfirmed"] == []
        with engine(site) as client:
            until(lambda: client.xlen(ORDERS), "the primary has acknowledged it")
        one.kill()
        demote(site.valkey, replica)
        two.start()
        for gup in (two, three):
            answer = gup.get(FILE)
            assert answer.status == 403 if what == "hold" else answer.body == NEW
        with engine(site) as client:
            until(lambda: client.xlen(ORDERS), "it was put back", 30)


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
