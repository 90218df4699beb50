"""Resources that run out and processes that fail: what is open goes on, and nothing needs a restart."""

import os
import signal
import time

import pytest
from harness.clients import RawConnection, assert_problem, fetch
from harness.clock import WallClock
from harness.processes import only_descriptors
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, DELTA, INDEX, OTHER_MONIKER, REVISION, content_path, noise, zip_of
from harness.waiting import until

LENGTH = 3_000_000
YEAR_SECONDS = 365 * 86400.0
SMALL = noise("small", 100_000)
NEW = content_path("xdelta260101001_To_260102001.dax")
GET = "GET {path} HTTP/1.1\r\nHost: here\r\n"


def begun(gup: Gup, path: str) -> RawConnection:
    """A connection with half a head: it is not idle, so it is not closed to make room for another."""
    connection = gup.connect()
    connection.send(GET.format(path=path).encode())
    gup.worker_of(connection)
    return connection


def finish(connection: RawConnection):
    connection.send(b"\r\n")
    return connection.response()


def test_out_of_descriptors_what_is_open_goes_on_and_the_rest_waits(tmp_path):
    body, gate = zip_of("descriptors", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(DELTA, Answer(SMALL, etag='"d"'))
        upstream.answer(BIG, Answer(body, etag='"b"', gates=((LENGTH // 2, gate),)))
        settings = {"upstream": [{"name": "u0", "url": upstream.url, "health_interval": "0s"}]}
        with Gup(tmp_path / "cache", settings=settings, workers=1) as gup:
            (worker,) = gup.workers()
            assert gup.get(DELTA).body == SMALL
            gup.wait_stored(DELTA.rpartition("/")[2])
            with gup.connect() as download, begun(gup, DELTA) as hit, begun(gup, NEW) as miss:
                download.ask(BIG)
                head = download.head()
                gate.wait_reached()
                with only_descriptors(worker, 0):
                    waiting = [gup.connect() for _ in range(20)]
                    for connection in waiting:
                        connection.ask(DELTA)
                    until(lambda: "no more connections can be accepted" in gup.log, "it is noticed")
                    assert all(connection.silent_for(0.01) for connection in waiting[:5])
                    assert_problem(finish(miss), 503, "overloaded")
                    assert finish(hit).body == SMALL
                    gate.open()
                    assert download.finish(head).body == body
                upstream.answer(NEW, Answer(SMALL, etag='"n"'))
                for connection in waiting:
                    assert connection.response().body == SMALL
                    connection.close()
                assert gup.get(NEW).body == SMALL  # at once: upstream was never thought to be down
            gup.wait_stored("full.zip")
            gup.wait_log("no more connections can be accepted")
            assert gup.log.count("no more connections can be accepted") == 1
            assert gup.workers() == [worker]


def test_whichever_descriptor_a_fill_lacks_the_answer_is_honest_and_nothing_stays(tmp_path):
    """Enough for the first few steps of a miss; the next one lacks its descriptor."""
    paths = [content_path(f"xdelta2601{10 + spare}001_To_{REVISION}.dax") for spare in range(8)]
    answers = set()
    with ScriptedUpstream() as upstream:
        for path in paths:
            upstream.answer(path, Answer(SMALL, etag='"n"', announced=len(SMALL)))  # no connection is kept
        settings = {"upstream": [{"name": "u0", "url": upstream.url, "health_interval": "0s"}]}
        with Gup(tmp_path / "cache", settings=settings, workers=1) as gup:
            (worker,) = gup.workers()
            for spare, path in enumerate(paths):
                with begun(gup, path) as miss:
                    with only_descriptors(worker, spare):
                        response = finish(miss)
                    answers.add(response.status)
                    if response.status == 200:
                        assert (response.complete, response.body == SMALL) == (True, True)
                    else:
                        assert_problem(response, 503, "overloaded")
                assert gup.get(path).body == SMALL  # at once
                gup.wait_stored(path.rpartition("/")[2])
            until(lambda: not gup.parts(), "no part stays")
            assert answers == {200, 503}


def test_a_clock_that_jumps_removes_nothing_and_holds_up_nothing(tmp_path):
    """A year ahead, back, two ahead over a restart, a year back: all is served, stored and revalidated."""
    clock = WallClock(tmp_path / "clock")
    body = zip_of("clock", LENGTH)
    revisions = [content_path("full.zip", OTHER_MONIKER, f"26080{number}001") for number in range(1, 6)]
    with ScriptedUpstream() as upstream:
        upstream.answer(INDEX, Answer(SMALL, etag='"i"'))
        for path in (BIG, *revisions):
            upstream.answer(path, Answer(body, etag='"b"'))
        settings = {
            "upstream": [{"url": upstream.url, "health_interval": "0s"}],
            "cache": {"max_unused": "30d", "keep_revisions": 1},
        }
        with Gup(tmp_path / "cache", settings=settings, env=clock.env) as gup:
            for path in (BIG, INDEX, revisions[0]):
                assert gup.get(path).complete
            until(lambda: gup.metric("gup_cache_entries") == 3, "all are stored")
            for number, years in enumerate((1, 0, 2, -1)):
                clock.set(years * YEAR_SECONDS)
                if years == 2:
                    gup.kill()
                    gup.start()
                answer = gup.get(BIG)
                assert (answer.body == body, int(answer.header("age") or -1) >= 0) == (True, True)
                assert gup.get(INDEX).body == SMALL
                # the revision that this one supersedes goes: so the controller has looked at all of them
                assert gup.get(revisions[number + 1]).body == body
                gup.wait_metric(number + 1, "gup_evictions_total", reason="revision")
                assert gup.metric("gup_evictions_total", reason="unused") == 0
                assert gup.metric("gup_cache_entries") == 3
            assert len(upstream.requests(BIG)) == 1


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["worker", "controller"])
def test_a_process_that_hangs_is_replaced(tmp_path, role):
    """SIGSTOP: it neither answers nor ends. Its connections wait, and are served by its successor."""
    with ScriptedUpstream() as upstream:
        upstream.answer(DELTA, Answer(SMALL, etag='"d"'))
        with Gup(tmp_path / "cache", [upstream.url], workers=1) as gup:
            assert gup.get(DELTA).body == SMALL
            (worker,) = gup.workers()
            (controller,) = set(gup.children()) - {worker}
            hung = {"worker": worker, "controller": controller}[role]
            gup.wait_stored(DELTA.rpartition("/")[2])
            until(lambda: fetch(gup.admin, "/readyz").status == 200, "the controller is there")
            began = time.monotonic()
            os.kill(hung, signal.SIGSTOP)
            with gup.connect(60) as connection:
                connection.ask(DELTA)
                assert connection.response().body == SMALL
            if role == "controller":
                assert time.monotonic() - began < 10.0, "it waited for the watchdog"
            until(lambda: f"{hung}, is killed: it sent no heartbeat for" in gup.log, "it is noticed", 60)
            until(lambda: hung not in gup.children(), "it is gone")
            assert time.monotonic() - began < 35.0
            until(lambda: len(gup.children()) == 2, "it is replaced")
            assert gup.get(DELTA).body == SMALL


def test_a_new_start_works_at_once_after_the_supervisor_was_killed_in_a_fill(tmp_path):
    body, gate = zip_of("supervisor", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"b"', gates=((LENGTH // 2, gate),)), Answer(body, etag='"b"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            with gup.connect() as client:
                client.ask(BIG)
                client.head()
                assert client.read(LENGTH // 2) == body[: LENGTH // 2]
                before = set(gup.children())
                gup.signal(signal.SIGKILL)
                gup.wait()
                gup.start()  # at once: the children of the dead one end by themselves
            gate.open()
            assert before.isdisjoint(gup.pids)
            assert gup.get(BIG).body == body
            assert upstream.requests(BIG)[1].status == 206
