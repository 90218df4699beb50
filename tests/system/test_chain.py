"""Chains of gups: three in a row, one request at the top, a middle that dies; circles that end at once."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.clients import End, assert_problem, body_digest, fetch
from harness.content import BIG, CONTENT_INFO, DELTA, INDEX, noise, zip_of
from harness.processes import free_port, quiet_clock, until
from harness.upstreams import Answer, Elsewhere, Gate

LENGTH = 6_000_000
HALF = LENGTH // 2
BODY = zip_of("chain", LENGTH)
D = noise("d", 100_000)
PATIENT = {"connect_timeout": "5s", "read_timeout": "5s"}
QUICK = PATIENT | {"give_up": "30s"}
MISSING = "/content/none.txt"


def chain(serve):
    """The upstream, and the top, the middle and the bottom."""
    top, upstream = serve(folder="top", each=QUICK, site={"name": "top"})
    gups = [top]
    for name in ("middle", "bottom"):
        gups.append(below(serve, gups[-1].data[1], name))
    return upstream, *gups


def below(serve, above: int, name: str, kind: str = "gup", port: int = 0, **more):
    """A gup below the one at port `above`, on a port of its own, to come back there."""
    before, bind = Elsewhere(above, kind=kind), f"127.0.0.1:{port or free_port()}"
    return serve(folder=name, before=before, bind=bind, each=QUICK, site={"name": name}, **more)[0]


def test_three_in_a_row_fetch_once_and_each_tier_counts_its_own(serve):
    upstream, top, middle, bottom = chain(serve)
    gate, swarm = Gate(), bottom.swarm()
    upstream.answer(BIG, Answer(BODY, etag='"top"', gates=((HALF, gate),)))
    upstream.answer(DELTA, D)
    clients = swarm.add(60, BIG)
    # what the top has, the bottom's clients have: nobody on the way waits for the end
    swarm.reach(HALF, clients, spare=8192 * 2)
    gate.open()
    swarm.wait()
    assert {(c.end, c.digest) for c in clients} == {(End.COMPLETE, body_digest(BODY))}
    for tier, served in ((top, LENGTH), (middle, LENGTH), (bottom, 60 * LENGTH)):
        tier.wait_stored(BIG)
        found = tier.metrics()
        assert found("gup_upstream_received_bytes_total", upstream="u0", purpose="fill") == LENGTH
        assert found("gup_client_sent_bytes_total") == served
        assert found("gup_upstream_requests_total", outcome="ok") == 1
    assert bottom.serves(BIG, BODY).header("cache-status") == "gup; hit"
    (asked,) = upstream.requests(BIG)
    nodes = [member.split()[1].rpartition("-")[0] for member in (asked.header("via") or "").split(",")]
    assert nodes == ["bottom", "middle", "top"]
    assert_problem(bottom.get(MISSING), 404, "upstream-not-found")
    assert bottom.get(MISSING, method="HEAD").status == 404
    assert len(upstream.requests(MISSING)) == 1
    # a middle whose own upstream is gone passes errors on, which makes it no worse, and serves what it holds
    middle.serves(DELTA, D)
    middle.wait_stored(DELTA)
    top.kill()
    assert {bottom.get(f"/content/{n}.dax").status for n in range(10)} == {502}
    assert bottom.upstream()["up"] is True
    bottom.serves(DELTA, D)
    # a dead middle is known to be down: nobody waits for it
    middle.kill()
    assert_problem(bottom.get("/content/x.txt"), 502)
    until(lambda: not bottom.upstream()["up"], "the middle is known to be down")
    began = quiet_clock()
    for number in range(20):
        assert_problem(bottom.get(f"/content/{number}.txt"), 502)
    bottom.serves(DELTA, D)
    assert quiet_clock() - began < 10


def test_the_middle_dies_in_a_fill_and_comes_back(serve):
    upstream, top, middle, bottom = chain(serve)
    gate, swarm = Gate(), bottom.swarm()
    upstream.answer(BIG, Answer(BODY, etag='"top"', gates=((HALF, gate),)))
    clients = swarm.add(40, BIG)
    swarm.reach(HALF, clients, spare=1 << 17)
    middle.kill()
    gate.open()
    top.wait_stored(BIG)
    middle.start()
    swarm.wait()
    assert {(c.end, c.digest) for c in clients} == {(End.COMPLETE, body_digest(BODY))}
    assert len({c.fields["etag"] for c in clients}) == 1
    assert len(upstream.requests(BIG)) == 1
    bottom.wait_stored(BIG)
    metrics = bottom.metrics()
    assert metrics("gup_fills_total", outcome="committed") == 1
    assert metrics("gup_upstream_received_bytes_total") <= LENGTH + (2 << 20)
    bottom.serves(BIG, BODY)
    until(lambda: bottom.upstream()["state"] == "up", "it is up again", 40)


@pytest.mark.parametrize(("told", "least"), [(500, 500), (5000, 540)], ids=["fresh", "stale above"])
def test_ages_of_index_files_add_up(serve, told, least):
    """What comes with more than `index_ttl` is fresh for a tenth of that, or each request would ask again."""
    fields = (("Age", str(told)), ("Via", "1.1 above (gup)"))
    answer = Answer(CONTENT_INFO, etag='"i"', fields=fields)
    gup, above = serve(
        {INDEX: answer}, workers=1, each=QUICK | {"kind": "gup"}, cache={"index_ttl": "10m"}
    )  # a tenth is a minute: a busy machine asks again within it
    gup.serves(INDEX, CONTENT_INFO)
    gup.wait_stored(INDEX)
    response = gup.serves(INDEX, CONTENT_INFO)
    assert response.header("cache-status") == "gup; hit"
    assert least <= int(response.header("age") or 0) < 600
    assert len(above.requests(INDEX)) == 1


def test_what_a_clients_via_brings_about_is_its_alone(serve):
    """It names the gup two tiers above, or is long; another client asks for the same names beside it."""
    upstream, top, _, bottom = chain(serve)
    node = (top.get("/", method="HEAD").header("via") or "").split()[1]
    harmless = ", ".join(f"1.1 proxy{number} (squid)" for number in range(600))
    many = ", ".join(f"1.1 gup{number} (gup)" for number in range(100))
    with ThreadPoolExecutor(8) as pool:
        for kind, via in enumerate((f"1.1 {node} (gup)", many, harmless)):
            names = [f"/content/{kind}/{number}.dax" for number in range(20)]
            for name in names:
                upstream.answer(name, BODY[:500])
            attack = [pool.submit(fetch, bottom.data, name, {"Via": via}) for name in names]
            served = [fetch(bottom.data, name, source="127.0.0.2").status for name in names]
            assert served == [200] * len(names)
            assert {one.result().status for one in attack} <= {200, 508}
            for name in (f"/content/{kind}/{number}.none" for number in range(5)):
                own = (404, "upstream-not-found") if via == harmless else (508, "loop")
                assert_problem(fetch(bottom.data, name, {"Via": via}), *own)
                assert_problem(bottom.get(name), 404, "upstream-not-found")
    assert max(len(seen.header("via") or "") for seen in upstream.seen) < 200
    names = {name for seen in upstream.seen for name, _ in seen.fields}
    assert names <= {"host", "via", "user-agent", "accept-encoding", "accept", "connection"}


# --- circles


def circle(serve, kind: str = "gup", **settings):
    """Two whose upstream is the other one."""
    a, b = free_port(), free_port()
    pairs = (("a", b, a), ("b", a, b))
    return [below(serve, above, name, kind, port, workers=1, **settings) for name, above, port in pairs]


def all_ask(gups, path: str) -> tuple[set[int], float]:
    connections, began = [gup.connect() for gup in gups for _ in range(5)], quiet_clock()
    for connection in connections:
        connection.ask(path)
    return {connection.response().status for connection in connections}, quiet_clock() - began


def test_a_circle_of_two_ends_at_once_at_both(serve):
    """Clients ask both at once too: each gup's request would join the fill that waits for its own answer."""
    gups = circle(serve)
    for number, gup in enumerate(gups):
        began = quiet_clock()
        assert_problem(gup.get(f"/content/circle{number}.txt"), 508, "loop")
        assert gup.get(f"/content/head{number}.txt", method="HEAD").status == 508
        assert quiet_clock() - began < 3
        assert gup.metric("gup_upstream_requests_total") <= 20
        assert gup.upstream()["up"] is True
    for number in range(5):
        statuses, seconds = all_ask(gups, f"/content/both{number}.txt")
        assert statuses == {508}
        assert seconds < 4


@pytest.mark.parametrize("kind", ["gup", "manager"])
def test_two_that_never_answered_each_other_tell_a_circle_in_time(serve, kind):
    """At their first start neither knows the other's name, and either's fill waits for the other's answer."""
    gups = circle(serve, kind, catalog={})
    began = quiet_clock()
    assert {gup.get("/", method="HEAD").status for gup in gups} == {404}
    assert quiet_clock() - began < 0.5
    for gup in gups:  # the first one's catalogue was asked for before the other was there
        until(lambda g=gup: g.upstream()["up"], "the other is seen")
    for path in (DELTA, BIG, "/content/circle.txt"):
        statuses, seconds = all_ask(gups, path)
        assert statuses == {508}
        assert seconds < 9, path  # who has no catalogue yet waits 5 s for it


def test_what_no_rule_is_about_waits_for_no_catalogue(serve):
    """At the start, before a silent upstream; only content that rules may be about waits."""
    gate = Gate()
    gup, upstream = serve({INDEX: Answer(CONTENT_INFO, head_gate=gate)}, workers=1, catalog={"refresh": "1h"})
    until(lambda: upstream.requests(INDEX), "the catalogue is asked for")
    upstream.answer("/content/beside.txt", Answer(b"beside", etag='"b"'))
    upstream.answer(DELTA, Answer(b"delta"))
    began = quiet_clock()
    assert gup.get("/", method="HEAD").status == 404
    assert_problem(gup.get("/content/../etc"), 400, "bad-path")
    gup.serves("/content/beside.txt", b"beside")
    assert quiet_clock() - began < 0.5
    with gup.connect() as client:
        client.ask(DELTA)
        time.sleep(0.2)
        assert not upstream.requests(DELTA)
        gate.open()
        assert client.response().body == b"delta"


def test_a_gup_that_is_its_own_upstream(serve):
    port = free_port()
    gup = below(serve, port, "own", port=port, workers=1)
    assert_problem(gup.get(DELTA), 508, "loop")
    assert gup.metric("gup_requests_total", result="refused", code="508") >= 1


def test_neighbours_that_help_each_other_ask_no_circle(serve):
    """Each has the manager first and the other second; with the manager gone nothing goes round."""
    a, b = free_port(), free_port()

    def helped(port: int, other: int, **how):
        behind = [Elsewhere(other, kind="gup")]
        return serve(folder=str(port), bind=f"127.0.0.1:{port}", behind=behind, each=PATIENT, **how)

    one, manager = helped(a, b)
    two, _ = helped(b, a, before=Elsewhere(manager.port))
    manager.answer(DELTA, D)
    one.serves(DELTA, D)
    one.wait_stored(DELTA)
    manager.stop()
    two.serves(DELTA, D)  # the neighbour has it
    began = quiet_clock()
    assert two.get(MISSING).status in (502, 508)
    assert quiet_clock() - began < 5
