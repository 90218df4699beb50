"""Holds of a site, with real services and a real engine: on hold anywhere is on hold everywhere."""

import pytest
from cluster.services import PASSWORD, running
from harness.clients import fetch
from harness.commands import on
from harness.content import MONIKER, content_path, zip_of
from harness.processes import until

BAD = "260801002"
FILE = content_path("full.zip", revision=BAD)
BODY = zip_of("bad", 100_000)
ORDER = {"stream": MONIKER, "revision": BAD, "reason": "crashes clients", "by": "ann"}
PILOT = "127.0.0.2"


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as started:
        started.upstream.answer(FILE, BODY)
        yield started


def hold(gup, **more):
    """The members that have not confirmed it."""
    status, answer = gup.api("/api/v1/holds", "POST", given=ORDER | more)
    assert status == 200, answer
    return answer["unconfirmed"]


def release(gup):
    status, answer = gup.api(f"/api/v1/holds?stream={MONIKER}&revision={BAD}", "DELETE")
    assert status == 200, answer
    return answer["unconfirmed"]


def start(site, *names):
    for name in names:
        site.start(name)
    until(site.all_ask_all, "all ask all", 30)


@pytest.mark.long
@pytest.mark.parametrize("with_engine", [True, False], ids=["engine", "no engine"])
def test_a_hold_on_one_node_is_one_on_all_within_a_second(site, with_engine):
    """All workers of all nodes; and released at another node it is nowhere any more."""
    start(site, "a", "b", "c")
    nodes = site.nodes.values()
    for gup in nodes:
        for pid in gup.workers():
            assert gup.connect_to(pid).get(FILE).body == BODY
    if not with_engine:
        site.valkey.kill()
        until(lambda: site.seen_by("a")["engine_error"], "the engine is away", 30)
    assert hold(site.nodes["b"], except_subnets=[f"{PILOT}/32"]) == []
    for gup in nodes:
        for pid in gup.workers():
            assert gup.connect_to(pid).get(FILE).status == 403
        assert fetch(gup.data, FILE, source=PILOT).body == BODY
        assert "crashes clients" in on(gup, "holds").stdout
    assert release(site.nodes["c"]) == []
    for gup in nodes:
        for pid in gup.workers():
            assert gup.connect_to(pid).get(FILE).body == BODY
    assert len(site.upstream.requests(FILE)) == 1


@pytest.mark.long
def test_a_node_that_was_off_serves_nothing_that_was_put_on_hold_meanwhile(site):
    start(site, "a", "b")
    one, two = site.nodes["a"], site.nodes["b"]
    two.serves(FILE, BODY)
    assert two.stop() == 0
    hold(one)
    with site.valkey.client(password=PASSWORD) as client:
        until(lambda: client.xlen("gup:{lyon}:orders"), "it is in the engine")
        assert one.stop() == 0
        two.start()
        assert two.get(FILE).status == 403
        release(two)
        client.flushall()
        one.start()
        assert one.get(FILE).status == 200, "a member has told it of the release"


@pytest.mark.long
def test_a_hold_from_before_there_was_a_cluster_is_told_to_all(site):
    """The settings get a cluster's section later."""
    start(site, "a", "b")
    two = site.nodes["b"]
    settings = two.folder / "gup.toml"
    clustered = settings.read_text()
    assert two.stop() == 0
    settings.write_text(clustered.partition("[cluster]")[0])
    two.start()
    hold(two)
    assert two.stop() == 0
    settings.write_text(clustered)
    two.start()
    assert two.get(FILE).status == 403
    until(lambda: site.nodes["a"].get(FILE).status == 403, "it is told to the others", 30)
    release(site.nodes["a"])
    until(lambda: two.get(FILE).status == 200, "released", 30)


@pytest.mark.long
@pytest.mark.parametrize("with_engine", [True, False], ids=["engine", "no engine"])
def test_a_new_revision_waits_on_all_nodes_for_the_same_time_and_is_opened_on_all(site, with_engine):
    """It is known everywhere since when it was first fetched anywhere."""
    canary = {"rules": {"canary": {"subnets": [f"{PILOT}/32"], "wait": "1h"}}}
    for name in ("a", "b", "c"):
        site.start(name, settings=canary)
    until(site.all_ask_all, "all ask all", 30)
    nodes = site.nodes
    if not with_engine:
        site.valkey.kill()
        until(lambda: site.seen_by("a")["engine_error"], "the engine is away", 30)
    assert fetch(nodes["a"].data, FILE, source=PILOT).body == BODY

    def waiting():
        return [gup.status()["canary"] for gup in nodes.values()]

    until(lambda: all(waiting()), "all know it", 5)
    assert len({row["opens_at"] for (row,) in waiting()}) == 1
    for gup in nodes.values():
        assert {gup.connect_to(pid).get(FILE).status for pid in gup.workers()} == {403}
        assert fetch(gup.data, FILE, source=PILOT).body == BODY
    assert release(nodes["c"]) == []
    for gup in nodes.values():
        assert {gup.connect_to(pid).get(FILE).status for pid in gup.workers()} == {200}
    assert len(site.upstream.requests(FILE)) == 1
