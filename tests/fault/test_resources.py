"""Resources that run out and processes that fail: what is open goes on, and nothing needs a restart."""

import os
import signal

import pytest
from harness.clients import RawConnection, assert_problem, fetch
from harness.content import BIG, DELTA, INDEX, OTHER_MONIKER, REVISION, content_path, noise, zip_of
from harness.faults import WallClock
from harness.processes import only_descriptors, quiet_clock, until
from harness.service import Gup
from harness.upstreams import Answer, Gate

LENGTH = 3_000_000
YEAR_SECONDS = 365 * 86400.0
SMALL = noise("small", 100_000)
NEW = content_path("xdelta260101001_To_260102001.dax")
NO_CHECKS = {"health_interval": "0s"}


def begun(gup: Gup, path: str) -> RawConnection:
    """A connection with half a head: it is not idle, so it is not closed to make room for another."""
    connection = gup.connect()
    connection.send(f"GET {path} HTTP/1.1\r\nHost: here\r\n".encode())
    gup.worker_of(connection)
    return connection


def finish(connection: RawConnection):
    connection.send(b"\r\n")
    return connection.response()


def test_out_of_descriptors_what_is_open_goes_on_and_the_rest_waits(serve):
    body, gate = zip_of("descriptors", LENGTH), Gate()
    answers = {DELTA: SMALL, BIG: Answer(body, etag='"b"', gates=((LENGTH // 2, gate),))}
    gup, upstream = serve(answers, workers=1, each=NO_CHECKS)
    (worker,) = gup.workers()
    gup.serves(DELTA, SMALL)
    gup.wait_stored(DELTA)
    hit, miss = begun(gup, DELTA), begun(gup, NEW)
    download, response = gup.begin(BIG)
    gate.wait_reached()
    with only_descriptors(worker, 0):
        waiting = [gup.connect() for _ in range(20)]
        for connection in waiting:
            connection.ask(DELTA)
        gup.wait_log("no more connections can be accepted")
        assert all(connection.silent_for(0.01) for connection in waiting[:5])
        assert_problem(finish(miss), 503, "overloaded")
        assert finish(hit).body == SMALL
        gate.open()
        assert download.finish(response).body == body
    upstream.answer(NEW, SMALL)
    assert {connection.response().body == SMALL for connection in waiting} == {True}
    gup.serves(NEW, SMALL)  # at once: upstream was never thought to be down
    gup.wait_stored(BIG)
    assert gup.log.count("no more connections can be accepted") == 1
    assert gup.workers() == [worker]


@pytest.mark.long
def test_whichever_descriptor_a_fill_lacks_the_answer_is_honest_and_nothing_stays(serve):
    """Enough for the first few steps of a miss; the next one lacks its descriptor."""
    paths = [content_path(f"xdelta2601{10 + spare}001_To_{REVISION}.dax") for spare in range(8)]
    no_connection_is_kept = Answer(SMALL, etag='"n"', announced=len(SMALL))
    gup, _ = serve(dict.fromkeys(paths, no_connection_is_kept), workers=1, each=NO_CHECKS)
    answers = set()
    for spare, path in enumerate(paths):
        miss = begun(gup, path)
        with only_descriptors(gup.workers()[0], spare):
            response = finish(miss)
        miss.close()
        answers.add(response.status)
        if response.status == 200:
            assert (response.complete, response.body == SMALL) == (True, True)
        else:
            assert_problem(response, 503, "overloaded")
        gup.serves(path, SMALL)  # at once
        gup.wait_stored(path)
    until(lambda: not gup.parts(), "no part stays")
    assert answers == {200, 503}


@pytest.mark.long
def test_a_clock_that_jumps_removes_nothing_and_holds_up_nothing(serve, tmp_path):
    """A year ahead, back, two ahead over a restart, a year back: all is served, stored and revalidated."""
    clock, body = WallClock(tmp_path / "clock"), zip_of("clock", LENGTH)
    revisions = [content_path("full.zip", OTHER_MONIKER, f"26080{number}001") for number in range(1, 6)]
    answers = {**dict.fromkeys((BIG, *revisions), body), INDEX: SMALL}
    cache = {"max_unused": "30d", "keep_revisions": 1}
    gup, upstream = serve(answers, each=NO_CHECKS, cache=cache, env=clock.env)
    for path in (BIG, INDEX, revisions[0]):
        assert gup.get(path).complete
    gup.wait_metric(3, "gup_cache_entries")
    for number, years in enumerate((1, 0, 2, -1)):
        clock.set(years * YEAR_SECONDS)
        if years == 2:
            gup.kill()
            gup.start()
        assert int(gup.serves(BIG, body).header("age") or -1) >= 0
        gup.serves(INDEX, SMALL)
        # the revision that this one supersedes goes: so the controller has looked at all of them
        gup.serves(revisions[number + 1], body)
        gup.wait_metric(number + 1, "gup_evictions_total", reason="revision")
        assert gup.metric("gup_evictions_total", reason="unused") == 0
        assert gup.metric("gup_cache_entries") == 3
    assert len(upstream.requests(BIG)) == 1


@pytest.mark.long
@pytest.mark.parametrize("role", ["worker", "controller"])
def test_a_process_that_hangs_is_replaced(serve, role):
    """SIGSTOP: it neither answers nor ends. Its connections wait, and are served by its successor."""
    gup, _ = serve({DELTA: SMALL}, workers=1)
    gup.serves(DELTA, SMALL)
    (worker,) = gup.workers()
    hung = worker if role == "worker" else (set(gup.children()) - {worker}).pop()
    gup.wait_stored(DELTA)
    until(lambda: fetch(gup.admin, "/readyz").status == 200, "the controller is there")
    began = quiet_clock()
    os.kill(hung, signal.SIGSTOP)
    connection = gup.connect(60)
    connection.ask(DELTA)
    assert connection.response().body == SMALL
    if role == "controller":
        assert quiet_clock() - began < 10.0, "it waited for the watchdog"
    gup.wait_log(f"{hung}, is killed: it sent no heartbeat for", 60)
    until(lambda: hung not in gup.children(), "it is gone")
    assert quiet_clock() - began < 35.0
    until(lambda: len(gup.children()) == 2, "it is replaced")
    gup.serves(DELTA, SMALL)


def test_a_new_start_works_at_once_after_the_supervisor_was_killed_in_a_fill(serve):
    """kill -9 of the supervisor alone: its children end by themselves."""
    body, gate = zip_of("supervisor", LENGTH), Gate()
    answers = Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)), body
    gup, upstream = serve({BIG: answers})
    gup.begin(BIG, LENGTH // 2)
    before = set(gup.children())
    gup.signal(signal.SIGKILL)
    gup.wait()
    gup.start()
    gate.open()
    until(lambda: before.isdisjoint(gup.pids), "the children have ended")
    gup.serves(BIG, body)
    assert upstream.requests(BIG)[1].status == 206
