"""Index files: one conditional request for the whole machine and `index_ttl`; stale while nobody answers."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.clients import assert_problem
from harness.content import CONTENT_INFO, INDEX, make_tree
from harness.processes import quiet_clock, until
from harness.service import Gup
from harness.upstreams import Answer, Gate, Nginx


def hammer(gup: Gup, seconds: float) -> list[tuple[int, bytes]]:
    """Eight clients ask for the index as fast as they can, over both workers."""
    deadline = time.monotonic() + seconds

    def run(_: int) -> list[tuple[int, bytes]]:
        found = []
        while time.monotonic() < deadline:
            response = gup.get(INDEX)
            found.append((response.status, response.body))
        return found

    with ThreadPoolExecutor(8) as pool:
        return [row for rows in pool.map(run, range(8)) for row in rows]


def if_stale(gup: Gup) -> str:
    response = gup.serves(INDEX, CONTENT_INFO)
    return response.etag if "stale" in (response.header("cache-status") or "") else ""


@pytest.mark.needs("nginx")
def test_one_conditional_request_per_ttl_for_the_whole_machine_and_stale_while_no_upstream_answers(
    serve, tmp_path
):
    nginx = Nginx(make_tree(tmp_path / "tree", big_bytes=1000), tmp_path / "nginx")
    gup, upstream = serve(before=nginx, cache={"index_ttl": "500ms", "error_ttl": "500ms"})
    began = time.monotonic()
    answers = hammer(gup, 1.7)
    took = time.monotonic() - began
    assert (len(answers) > 50, set(answers)) == (True, {(200, CONTENT_INFO)})
    first, *later = upstream.log(INDEX)
    assert (first.status, first.body_bytes) == (200, len(CONTENT_INFO))
    assert {(row.status, row.body_bytes) for row in later} == {(304, 0)}
    assert 2 <= len(later) <= int(took / 0.5) + 1
    metrics = gup.metrics()
    assert metrics("gup_requests_total", result="revalidated", code="200") >= 2
    assert metrics("gup_upstream_requests_total", outcome="not_modified") == len(later)
    assert metrics("gup_upstream_received_bytes_total") == len(CONTENT_INFO)
    upstream.stop()
    tag = until(lambda: if_stale(gup), "it is stale")
    began = quiet_clock()
    assert {gup.serves(INDEX, CONTENT_INFO).etag for _ in range(50)} == {tag}
    assert quiet_clock() - began < 2, "nobody waits for an upstream that is known to be down"
    assert gup.metric("gup_requests_total", result="stale", code="200") >= 1
    upstream.restart()
    until(lambda: not if_stale(gup), "it is fresh when the upstream is back")


def test_a_changed_index_is_a_new_generation(serve):
    gup, upstream = serve({INDEX: Answer(CONTENT_INFO, etag='"1"')}, cache={"index_ttl": "200ms"})
    old = gup.serves(INDEX, CONTENT_INFO)
    gup.wait_stored(INDEX)
    changed = CONTENT_INFO * 3
    upstream.answer(INDEX, Answer(changed, etag='"2"'))
    new = until(lambda: (r := gup.get(INDEX)).body == changed and r.etag, "the new index is served")
    assert new != old.etag
    asked = upstream.requests(INDEX)
    assert asked[1].header("if-none-match") == '"1"'
    assert [seen.status for seen in asked].count(200) == 2
    assert gup.get(INDEX, {"If-None-Match": old.etag}).status == 200, "who has the old one learns of the new"
    assert gup.get(INDEX, {"If-None-Match": new}).status == 304
    assert len([key for key in gup.bodies() if key.endswith("ContentInfo.txt")]) == 1
    upstream.answer(INDEX, Answer(b"gone", 404))
    until(lambda: gup.get(INDEX).status == 404, "the 404 is passed on")


def test_a_slow_revalidation_is_one_for_all_and_after_max_stale_it_is_an_error(serve):
    gate = Gate()
    answers = Answer(CONTENT_INFO, etag='"1"'), Answer(CONTENT_INFO, etag='"1"', head_gate=gate)
    gup, upstream = serve(
        {INDEX: answers}, cache={"index_ttl": "100ms", "max_stale": "400ms", "error_ttl": "200ms"}
    )
    gup.serves(INDEX, CONTENT_INFO)
    connections = []
    while not gate.is_reached or len(connections) < 20:
        connections.append(gup.connect())
        connections[-1].ask(INDEX)
        connections[-1].silent_for(0.02)  # those that came before the entry was stale have their answer
    gate.open()
    assert {connection.response().status for connection in connections} == {200}
    assert len(upstream.requests(INDEX)) <= 3
    assert {seen.status for seen in upstream.requests(INDEX)[1:]} == {304}
    upstream.answer(INDEX, Answer(b"oops", 500))
    until(lambda: gup.get(INDEX).status == 502, "the stale index is given up")
    assert_problem(gup.get(INDEX), 502)
