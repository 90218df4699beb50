"""Chains of gups: three in a row, one request at the top, a middle that dies; circles that end at once."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.clients import assert_problem
from harness.processes import free_port
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import End, Swarm, body_digest
from harness.trees import BIG, CONTENT_INFO, DELTA, INDEX, content_path, noise, zip_of
from harness.waiting import until

LENGTH = 6_000_000
QUICK = {"connect_timeout": "5s", "read_timeout": "5s", "give_up": "30s"}


def link(folder: Path, url: str, *, port: int = 0, kind: str = "gup", more: dict | None = None) -> Gup:
    """A gup, not started, whose upstream is at `url`; on a port of its own, to come back there."""
    settings = {
        "upstream": [{"name": "above", "url": url, "kind": kind, **QUICK}],
        "site": {"name": folder.name},
        **(more or {}),
    }
    gup = Gup(folder, settings=settings, workers=2, start=False)
    gup.command[gup.command.index("--listen") + 1] = f"127.0.0.1:{port or free_port()}"
    return gup


def port_of(gup: Gup) -> int:
    return int(gup.command[gup.command.index("--listen") + 1].rpartition(":")[2])


@dataclass
class Chain:
    upstream: ScriptedUpstream
    top: Gup
    middle: Gup
    bottom: Gup

    @property
    def tiers(self) -> tuple[Gup, Gup, Gup]:
        return self.top, self.middle, self.bottom


@contextmanager
def chain(folder: Path, more: dict | None = None) -> Iterator[Chain]:
    with ScriptedUpstream() as upstream, ExitStack() as stack:
        url, kind, gups = upstream.url, "manager", []
        for name in ("top", "middle", "bottom"):
            gup = stack.enter_context(link(folder / name, url, kind=kind, more=more))
            gup.start()
            gups.append(gup)
            url, kind = gup.url, "gup"
        yield Chain(upstream, *gups)


def test_three_in_a_row_fetch_once_and_each_tier_counts_its_own(tmp_path):
    body, gate = zip_of("chain", LENGTH), Gate()
    with chain(tmp_path) as at, Swarm(at.bottom.data) as swarm:
        at.upstream.answer(BIG, Answer(body, etag='"top"', gates=((LENGTH // 2, gate),)))
        clients = swarm.add(60, BIG)
        # what the top has, the bottom's clients have: nobody on the way waits for the end
        swarm.wait_for(lambda: all(c.body_bytes >= LENGTH // 2 - 8192 * 2 for c in clients), "the half", 20)
        gate.open()
        swarm.wait(30)
        assert {(c.end, c.digest) for c in clients} == {(End.COMPLETE, body_digest(body))}
        assert len(at.upstream.requests(BIG)) == 1
        sent = 60 * LENGTH
        for tier, served in zip(at.tiers, (LENGTH, LENGTH, sent), strict=True):
            tier.wait_stored("full.zip")
            metrics = tier.metrics()
            assert metrics("gup_upstream_received_bytes_total", upstream="above", purpose="fill") == LENGTH
            assert metrics("gup_client_sent_bytes_total") == served
            assert metrics("gup_upstream_requests_total", outcome="ok") == 1
        response = at.bottom.get(BIG)
        assert response.header("cache-status") == "gup; hit"
        (asked,) = at.upstream.requests(BIG)
        nodes = [member.split()[1].rpartition("-")[0] for member in (asked.header("via") or "").split(",")]
        assert nodes == ["bottom", "middle", "top"]


@pytest.mark.long
def test_what_the_top_does_not_have_is_a_404_at_the_bottom(tmp_path):
    with chain(tmp_path) as at:
        assert_problem(at.bottom.get("/content/none.txt"), 404, "upstream-not-found")
        assert at.bottom.get("/content/none.txt", method="HEAD").status == 404
        assert len(at.upstream.requests("/content/none.txt")) == 1


def test_the_middle_dies_in_a_fill_and_comes_back(tmp_path):
    body, gate = zip_of("chain", LENGTH), Gate()
    half = LENGTH // 2
    with chain(tmp_path) as at, Swarm(at.bottom.data) as swarm:
        at.upstream.answer(BIG, Answer(body, etag='"top"', gates=((half, gate),)))
        clients = swarm.add(40, BIG)
        swarm.wait_for(lambda: all(c.body_bytes >= half - (1 << 17) for c in clients), "the half", 20)
        at.middle.kill()
        gate.open()
        at.top.wait_stored("full.zip")
        at.middle.start()
        swarm.wait(40)
        assert {(c.end, c.digest) for c in clients} == {(End.COMPLETE, body_digest(body))}
        assert len({c.fields["etag"] for c in clients}) == 1
        assert len(at.upstream.requests(BIG)) == 1
        at.bottom.wait_stored("full.zip")
        metrics = at.bottom.metrics()
        assert metrics("gup_fills_total", outcome="committed") == 1
        assert metrics("gup_upstream_received_bytes_total") <= LENGTH + (2 << 20)
        assert at.bottom.get(BIG).body == body


@pytest.mark.long
def test_a_dead_middle_is_told_at_once_and_what_is_held_is_served(tmp_path):
    with chain(tmp_path) as at:
        at.upstream.answer(DELTA, Answer(noise("d", 100_000), etag='"d"'))
        assert at.bottom.get(DELTA).body == noise("d", 100_000)
        at.bottom.wait_stored(DELTA.rpartition("/")[2])
        at.middle.kill()
        assert_problem(at.bottom.get(BIG), 502)
        until(lambda: not at.bottom.status()["upstreams"][0]["up"], "the middle is known to be down")
        began = time.monotonic()
        for number in range(20):
            path = content_path("full.zip", revision=f"26{number:02}01001")
            assert_problem(at.bottom.get(path), 502)
        assert at.bottom.get(DELTA).body == noise("d", 100_000)
        assert time.monotonic() - began < 10
        at.middle.start()
        until(lambda: at.bottom.status()["upstreams"][0]["state"] == "up", "it is up again", 40)
        at.upstream.answer(BIG, Answer(zip_of("z", 200_000), etag='"z"'))
        until(lambda: at.bottom.get(BIG).body == zip_of("z", 200_000), "and is asked")


@pytest.mark.long
def test_a_middle_whose_own_upstream_is_gone_still_serves_what_it_holds(tmp_path):
    paths = [content_path("full.dax", revision=f"26{number:02}01001") for number in range(10)]
    with chain(tmp_path) as at:
        at.upstream.answer(DELTA, Answer(noise("d", 100_000), etag='"d"'))
        assert at.middle.get(DELTA).status == 200
        at.middle.wait_stored(DELTA.rpartition("/")[2])
        at.top.kill()
        for path in paths:  # the middle passes errors on: that makes it no worse
            assert at.bottom.get(path).status == 502
        assert at.bottom.status()["upstreams"][0]["up"] is True
        assert at.bottom.get(DELTA).body == noise("d", 100_000)


@pytest.mark.parametrize(("told", "least"), [(50, 50), (5000, 54)], ids=["fresh", "stale above"])
def test_ages_of_index_files_add_up(tmp_path, told, least):
    """What comes with more than `index_ttl` is fresh for a tenth of that, or each request would ask again."""
    with ScriptedUpstream() as above, link(tmp_path / "below", above.url) as gup:
        fields = (("Age", str(told)), ("Via", "1.1 above (gup)"))
        above.answer(INDEX, Answer(CONTENT_INFO, etag='"i"', fields=fields))
        gup.start()
        assert gup.get(INDEX).body == CONTENT_INFO
        gup.wait_stored("ContentInfo.txt")
        response = gup.get(INDEX)
        assert response.header("cache-status") == "gup; hit"
        assert least <= int(response.header("age") or 0) < 60
        assert len(above.requests(INDEX)) == 1


# --- circles


def test_a_circle_of_two_ends_at_once_at_both(tmp_path):
    first_port, second_port = free_port(), free_port()
    with (
        link(tmp_path / "a", f"http://127.0.0.1:{second_port}", port=first_port) as one,
        link(tmp_path / "b", f"http://127.0.0.1:{first_port}", port=second_port) as two,
    ):
        one.start()
        two.start()
        for gup in (one, two):
            for method in ("GET", "HEAD"):
                began = time.monotonic()
                path = f"/content/circle{port_of(gup)}.txt"
                response = gup.get(path, method=method)
                assert response.status == 508
                if method == "GET":
                    assert_problem(response, 508, "loop")
                assert time.monotonic() - began < 3
            assert gup.metric("gup_upstream_requests_total") <= 20
            assert gup.status()["upstreams"][0]["up"] is True


def test_two_that_wait_for_each_other_s_fill_are_a_circle_too(tmp_path):
    """Clients ask both at once: each request of a gup would join the fill that waits for its own answer."""
    ports = free_port(), free_port()
    with ExitStack() as stack:
        gups = [
            stack.enter_context(link(tmp_path / name, f"http://127.0.0.1:{there}", port=here))
            for name, here, there in (("a", *ports), ("b", *reversed(ports)))
        ]
        for gup in gups:
            gup.command[gup.command.index("--workers") + 1] = "1"
            gup.start()
        for gup in gups:
            assert gup.get("/content/learn.txt").status == 508
        began = time.monotonic()
        connections = [stack.enter_context(gup.connect()) for gup in gups for _ in range(10)]
        for round_ in range(5):
            for connection in connections:
                connection.ask(f"/content/both{round_}.txt")
            assert {connection.response().status for connection in connections} == {508}
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["gup", "manager"])
def test_two_that_never_answered_each_other_tell_a_circle_in_time(tmp_path, kind):
    """At their first start neither knows the other's name, and either's fill waits for the other's answer."""
    ports = free_port(), free_port()
    with ExitStack() as stack:
        gups = [
            stack.enter_context(
                link(tmp_path / name, f"http://127.0.0.1:{there}", port=here, kind=kind, more={"catalog": {}})
            )
            for name, here, there in (("a", *ports), ("b", *reversed(ports)))
        ]
        for gup in gups:
            gup.command[gup.command.index("--workers") + 1] = "1"
            gup.start()
        for gup in gups:  # the first one's catalogue was asked for before the other was there
            until(lambda g=gup: g.status()["upstreams"][0]["up"], "the other is seen")
        for path in (DELTA, BIG, "/content/circle.txt"):
            connections = [stack.enter_context(gup.connect()) for gup in gups for _ in range(5)]
            began = time.monotonic()
            for connection in connections:
                connection.ask(path)
            assert {connection.response().status for connection in connections} == {508}
            assert time.monotonic() - began < 2, path


def test_a_gup_that_is_its_own_upstream(tmp_path):
    port = free_port()
    with link(tmp_path / "self", f"http://127.0.0.1:{port}", port=port) as gup:
        gup.start()
        assert_problem(gup.get(DELTA), 508, "loop")


def test_neighbours_that_help_each_other_ask_no_circle(tmp_path):
    """Each has the manager first and the other second; with the manager gone nothing goes round."""
    ports = free_port(), free_port()
    with ScriptedUpstream() as manager, ExitStack() as stack:
        manager.answer(DELTA, Answer(noise("d", 100_000), etag='"d"'))
        gups = []
        for number, name in enumerate(("a", "b")):
            neighbour = {"name": "neighbour", "url": f"http://127.0.0.1:{ports[1 - number]}", "kind": "gup"}
            upstreams = [
                {"name": "manager", "url": manager.url, **QUICK},
                {**neighbour, "priority": 1, **QUICK},
            ]
            gup = link(tmp_path / name, "", port=ports[number], more={"upstream": upstreams})
            gups.append(stack.enter_context(gup))
            gup.start()
        one, two = gups
        assert one.get(DELTA).status == 200
        one.wait_stored(DELTA.rpartition("/")[2])
        manager.stop()
        assert two.get(DELTA).body == noise("d", 100_000), "the neighbour has it"
        began = time.monotonic()
        assert two.get("/content/none.txt").status in (502, 508)
        assert time.monotonic() - began < 5
