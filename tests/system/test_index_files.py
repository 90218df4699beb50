"""Index files: one conditional request for the whole machine and `index_ttl`; stale while nobody answers."""

import threading
import time

from harness.clients import assert_problem
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import CONTENT_INFO, INDEX, MODIFIED_AT, make_tree
from harness.upstreams import Nginx
from harness.waiting import until


def hammer(gup: Gup, seconds: float) -> list[tuple[int, bytes]]:
    """Eight clients ask for the index as fast as they can, over both workers."""
    found: list[tuple[int, bytes]] = []
    deadline = time.monotonic() + seconds

    def run() -> None:
        while time.monotonic() < deadline:
            response = gup.get(INDEX)
            found.append((response.status, response.body))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_one_conditional_request_per_ttl_for_the_whole_machine(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=1000)
    settings = {"cache": {"index_ttl": "1s"}}
    with (
        Nginx(tree, tmp_path / "nginx") as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        began = time.monotonic()
        answers = hammer(gup, 3.3)
        took = time.monotonic() - began
        assert len(answers) > 50
        assert set(answers) == {(200, CONTENT_INFO)}
        first, *later = upstream.log(INDEX)
        assert (first.status, first.body_bytes) == (200, len(CONTENT_INFO))
        assert {(row.status, row.body_bytes) for row in later} == {(304, 0)}
        assert 2 <= len(later) <= int(took) + 1
        metrics = gup.metrics()
        assert metrics("gup_requests_total", result="revalidated", code="200") >= 2
        assert metrics("gup_upstream_requests_total", outcome="not_modified") == len(later)
        assert metrics("gup_upstream_received_bytes_total") == len(CONTENT_INFO)


def test_a_fresh_index_asks_nobody(tmp_path):
    with ScriptedUpstream() as upstream:
        upstream.answer(INDEX, Answer(CONTENT_INFO, etag='"1"', last_modified=MODIFIED_AT))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            tags = {gup.get(INDEX).etag for _ in range(30)}
            assert len(tags) == 1
            assert len(upstream.requests(INDEX)) == 1


def test_a_changed_index_is_a_new_generation(tmp_path):
    settings = {"cache": {"index_ttl": "200ms"}}
    with ScriptedUpstream() as upstream:
        upstream.answer(INDEX, Answer(CONTENT_INFO, etag='"1"'))
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            old = gup.get(INDEX)
            assert old.body == CONTENT_INFO
            gup.wait_stored("ContentInfo.txt")
            changed = CONTENT_INFO * 3
            upstream.answer(INDEX, Answer(changed, etag='"2"'))
            new = until(lambda: _if_body(gup, changed), "the new index is served")
            assert new != old.etag
            asked = upstream.requests(INDEX)
            assert asked[1].header("if-none-match") == '"1"'
            assert [seen.status for seen in asked].count(200) == 2
            # who has the old one learns of the new one
            assert gup.get(INDEX, {"If-None-Match": old.etag}).status == 200
            assert gup.get(INDEX, {"If-None-Match": new}).status == 304
            assert len([name for name in gup.bodies() if name.endswith("ContentInfo.txt")]) == 1


def _if_body(gup: Gup, body: bytes) -> str:
    response = gup.get(INDEX)
    assert response.status == 200
    return response.etag if response.body == body else ""


def test_stale_is_served_while_no_upstream_answers(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=1000)
    settings = {"cache": {"index_ttl": "200ms", "error_ttl": "500ms"}}
    with (
        Nginx(tree, tmp_path / "nginx") as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        fresh = gup.get(INDEX)
        upstream.stop()
        stale = until(lambda: _if_stale(gup), "it is stale")
        assert stale == fresh.etag
        began = time.monotonic()
        for _ in range(50):
            response = gup.get(INDEX)
            assert (response.status, response.body) == (200, CONTENT_INFO)
        # nobody waits for an upstream that is known to be down
        assert time.monotonic() - began < 2
        assert gup.metric("gup_requests_total", result="stale", code="200") >= 1
        upstream.restart()
        until(lambda: not _if_stale(gup), "it is fresh when the upstream is back")


def _if_stale(gup: Gup) -> str:
    response = gup.get(INDEX)
    assert (response.status, response.body) == (200, CONTENT_INFO)
    return response.etag if "stale" in (response.header("cache-status") or "") else ""


def test_after_max_stale_it_is_an_error(tmp_path):
    settings = {"cache": {"index_ttl": "100ms", "max_stale": "400ms", "error_ttl": "200ms"}}
    with ScriptedUpstream() as upstream:
        upstream.answer(INDEX, Answer(CONTENT_INFO, etag='"1"'), Answer(b"oops", 500))
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            assert gup.get(INDEX).status == 200
            until(lambda: gup.get(INDEX).status == 502, "the stale index is given up")
            assert_problem(gup.get(INDEX), 502)


def test_an_index_that_vanished_is_404(tmp_path):
    settings = {"cache": {"index_ttl": "100ms"}}
    with ScriptedUpstream() as upstream:
        upstream.answer(INDEX, Answer(CONTENT_INFO, etag='"1"'), Answer(b"gone", 404))
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            assert gup.get(INDEX).status == 200
            until(lambda: gup.get(INDEX).status == 404, "the 404 is passed on")


def test_a_slow_revalidation_is_one_for_all(tmp_path):
    gate = Gate()
    settings = {"cache": {"index_ttl": "100ms"}}
    with ScriptedUpstream() as upstream:
        upstream.answer(
            INDEX, Answer(CONTENT_INFO, etag='"1"'), Answer(CONTENT_INFO, etag='"1"', head_gate=gate)
        )
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            assert gup.get(INDEX).status == 200
            connections = []
            try:
                while not gate.is_reached or len(connections) < 20:
                    connections.append(gup.connect())
                    connections[-1].ask(INDEX)
                    # not all may wait: those that came before the entry was stale have their answer
                    connections[-1].silent_for(0.02)
                gate.open()
                assert {(c.response().status) for c in connections} == {200}
            finally:
                for connection in connections:
                    connection.close()
            assert len(upstream.requests(INDEX)) <= 3
            assert {seen.status for seen in upstream.requests(INDEX)[1:]} == {304}
