"""What takes an upstream away and what does not; Retry-After and wrong bodies, remembered: real processes."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.clients import Response, assert_problem, fetch
from harness.content import BIG, DELTA, content_path, noise, zip_of
from harness.processes import free_port, quiet_clock, until
from harness.upstreams import Answer, Elsewhere, ScriptedUpstream

QUICK = {"read_timeout": "2s", "health_interval": "0s"}
"""With the default connect_timeout: a busy machine may need more than a second to take a connection."""
TRIES = "gup_upstream_requests_total"
FULL = content_path("full.dax")
OTHERS = 100


def path_of(number: int, file: str = "full.dax") -> str:
    return content_path(file, revision=f"26{number:03}001")


def busy(seconds: int, status: int = 503) -> Answer:
    return Answer(b"busy", status, fields=(("Retry-After", str(seconds)),))


def unreachable(response: Response) -> None:
    assert_problem(response, 502, "upstream-unreachable")
    assert 1 <= int(response.header("retry-after") or 0) <= 5


def test_one_client_s_failing_names_take_the_upstream_from_nobody(serve):
    """146 names that fail in all ways, asked for by one client, while another asks for what is there."""
    names = [path_of(number) for number in range(146)]
    wanted = [path_of(500 + number) for number in range(OTHERS)]
    faults = Answer(reset_at=-1), Answer(b"oops", 500), Answer(b"<html>", content_type="text/html")
    faults = itertools.cycle((*faults, Answer(b"x" * 9, chunked=True, garbage_at=3)))
    answers = dict(zip(names, faults, strict=False)) | dict.fromkeys(wanted, b"x" * 500)
    gup, upstream = serve({**answers, DELTA: Answer(reset_at=-1)}, each=QUICK, fill={"max": 64})
    with ThreadPoolExecutor(16) as attackers:
        attack = [attackers.submit(fetch, gup.data, name, source="127.0.0.2") for name in names]
        served = [fetch(gup.data, path, source="127.0.0.3").status for path in wanted]
        assert {one.result().status for one in attack} == {502}
    assert served == [200] * OTHERS
    assert gup.upstream()["state"] == "up"
    # nor do the three tries of one file, whoever asks for it
    assert {fetch(gup.data, DELTA, source=f"127.0.0.{number}").status for number in range(2, 6)} == {502}
    assert len(upstream.requests(DELTA)) >= 3
    assert gup.upstream()["state"] != "doubtful"


def test_a_refused_connection_answers_everybody_at_once_and_is_tried_again_soon(serve):
    gone = Elsewhere(free_port())
    gup, _ = serve(before=gone, each=QUICK)
    assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
    row = gup.upstream()
    assert (row["state"], row["up"], row["since"] <= time.time() + 1) == ("down", False, True)
    until(lambda: "can't be reached" in (gup.upstream()["last_error"] or ""), "its last error is told")
    assert gup.metric("gup_upstream_up", upstream="u0") == 0
    before, took, began = gup.metric(TRIES, outcome="unreachable"), [], time.monotonic()
    while time.monotonic() - began < 2.5 or len(took) <= 40:
        asked = quiet_clock()
        unreachable(gup.get(path_of(len(took))))
        took.append(quiet_clock() - asked)
    assert max(took) < 0.5, took
    tried = gup.metric(TRIES, outcome="unreachable") - before
    assert 1 <= tried <= time.monotonic() - began + 1, "one trial at a time, not one each"
    assert not list((gup.cache_dir / "partial").glob("*.state")), "nothing is kept for each name"
    with ScriptedUpstream(port=gone.port) as upstream:
        upstream.answer(DELTA, noise("d", 1000))
        until(lambda: gup.get(DELTA).body == noise("d", 1000), "it is back", 8)
    gup.wait_log("upstream u0 is down")
    gup.wait_log("upstream u0 is up again")


def test_the_controller_finds_a_dead_upstream_before_any_request_does(serve):
    """Checks alone tell, and the state with its last error is shown; the second is asked at once."""
    gone, second = Elsewhere(free_port()), ScriptedUpstream()
    second.answer(DELTA, noise("d", 1000))
    gup, _ = serve(before=gone, behind=[second], each=QUICK | {"health_interval": "300ms"})
    until(lambda: gup.upstream("u0")["state"] == "down", "checked and found down")
    until(lambda: "can't be reached" in (gup.upstream("u0")["last_error"] or ""), "the error")
    tried = gup.metric(TRIES, upstream="u0")
    gup.serves(DELTA, noise("d", 1000))
    assert gup.metric(TRIES, upstream="u0") - tried <= 1
    assert gup.upstream("u1")["up"] is True
    assert gup.metric("gup_events_lost_total") == 0
    with ScriptedUpstream(port=gone.port):
        until(lambda: gup.upstream("u0")["state"] == "up", "two checks in a row were good", 30)


def test_half_a_part_and_nobody_there_is_told_in_time_and_the_part_is_kept(serve):
    body = noise("half", 4_000_000)
    gup, upstream = serve({FULL: Answer(body, etag='"h"', stall_after=2_000_000)}, each=QUICK)
    gup.begin(FULL, 1_500_000)[0].close()
    gup.kill()
    (part,) = gup.parts()
    with serve(before=Elsewhere(free_port()), each=QUICK)[0] as again:
        began = quiet_clock()
        for _ in range(2):
            unreachable(again.get(FULL))
        assert quiet_clock() - began < 8
        assert list(again.parts()) == [part]
    upstream.answer(FULL, Answer(body, etag='"h"'))
    serve(before=Elsewhere(upstream.port), each=QUICK)[0].serves(FULL, body)
    assert upstream.requests(FULL)[-1].status == 206


def test_retry_after_is_kept_by_all_workers_and_told_to_clients_and_its_end_is_waited_for(serve):
    answers = {DELTA: busy(120), path_of(1): noise("1", 500), FULL: (busy(1, 429), noise("f", 500))}
    gup, upstream = serve(answers, each=QUICK, cache={"error_ttl": "20ms"})
    response = gup.get(DELTA)
    assert_problem(response, 502, "upstream-error")
    assert 110 <= int(response.header("retry-after") or 0) <= 120
    for pid in gup.workers() * 3:
        assert 100 <= int(gup.connect_to(pid).get(DELTA).header("retry-after") or 0) <= 120
    gup.serves(path_of(1), noise("1", 500))  # other files are asked for
    began = time.monotonic()
    assert gup.get(FULL).status == 502
    until(lambda: gup.get(FULL).status == 200, "it is asked again")
    assert time.monotonic() - began >= 0.9
    assert (len(upstream.requests(FULL)), len(upstream.requests(DELTA))) == (2, 1)


def test_another_upstream_is_asked_meanwhile_or_in_place_of_a_wrong_body(serve):
    two, good = ScriptedUpstream(), zip_of("right", 300_000)
    one_answers = {DELTA: busy(60), BIG: Answer(noise("no zip", 300_000), etag='"bad"')}
    gup, one = serve(one_answers, behind=[two], each=QUICK, cache={"error_ttl": "500ms"})
    two.answer(DELTA, Answer(b"oops", 500), noise("d", 500))
    two.answer(BIG, Answer(good, etag='"good"'))
    assert gup.get(DELTA).status == 502
    until(lambda: gup.get(DELTA).status == 200 and gup.get(BIG).body == good, "the second has both")
    assert (len(one.requests(DELTA)), len(two.requests(BIG))) == (1, 1)
    assert sum(seen.body_bytes for seen in one.requests(BIG)[1:]) <= 300_000


@pytest.mark.long
def test_a_zip_without_its_end_is_fetched_once_and_then_waited_for(serve):
    """By all workers, and over a restart."""
    bad, good = Answer(noise("no zip", 10_000_000), etag='"bad"'), zip_of("right", 300_000)
    gup, upstream = serve({BIG: bad}, each=QUICK, cache={"error_ttl": "50ms"})
    response = gup.get(BIG)
    assert not (response.status == 200 and response.complete)
    until(lambda: len(upstream.requests(BIG)) >= 5 or gup.get(BIG).status == 200, "heads are asked for", 15)
    asked = [seen.at for seen in upstream.requests(BIG)]
    waits = [later - earlier for earlier, later in itertools.pairwise(asked[1:])]
    assert all(wait >= 0.05 * 2**number for number, wait in enumerate(waits, 1)), waits
    received = gup.metric("gup_upstream_received_bytes_total", purpose="fill")
    assert 10_000_000 <= received <= 10_300_000, "its body was read once"
    (alarm,) = until(lambda: gup.alarms("bad-content"), "an alarm is raised")
    assert ("u0" in alarm["text"], "full.zip" in alarm["text"]) == (True, True), alarm
    for client in map(gup.connect_to, gup.workers()):
        until(lambda client=client: "still" in str(client.get(BIG).body), "its head is known again")
    assert gup.stop() == 0
    gup.start()
    until(lambda: "still" in str(gup.get(BIG).body), "its head is known after a restart")
    assert gup.metric("gup_upstream_wasted_bytes_total", reason="rejected") == 10_000_000
    upstream.answer(BIG, Answer(good, etag='"good"'))
    until(lambda: gup.get(BIG).body == good, "another body is a new chance", 15)
    until(lambda: not gup.alarms("bad-content"), "the alarm ends", 60)  # 30 s after the start at the earliest
