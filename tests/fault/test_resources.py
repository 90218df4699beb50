"""Resources that run out and processes that fail: what is open goes on, and nothing needs a restart."""

from harness.clients import RawConnection, assert_problem
from harness.processes import only_descriptors
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, DELTA, REVISION, content_path, noise, zip_of
from harness.waiting import until

LENGTH = 3_000_000
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
            assert gup.log.count("no more connections can be accepted") == 1
            assert gup.workers() == [worker]


def test_whichever_descriptor_a_fill_lacks_the_answer_is_honest_and_nothing_stays(tmp_path):
    """Enough for the first few steps of a miss; the next one lacks its descriptor."""
    paths = [content_path(f"xdelta2601{10 + spare}001_To_{REVISION}.dax") for spare in range(8)]
    answers = set()
    with ScriptedUpstream() as upstream:
        for path in paths:
            upstream.answer(path, Answer(SMALL, etag='"n"', framed=False))  # no connection is kept
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
