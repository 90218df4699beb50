"""A service and its connections to upstream: pauses, strays, ends that nobody told, trickles, odd heads."""

import json
import time

import pytest
from harness.clients import assert_problem
from harness.raw import Over, RawUpstream, Talk, ok
from harness.trees import Tree, content_path, noise, zip_of
from harness.upstreams import Nginx
from harness.waiting import until

DELTA = "xdelta260801001_To_260801002.dax"
EACH = {"connect_timeout": "5s", "read_timeout": "1s", "health_interval": "0s"}


def path_of(number: int, file: str = "full.dax") -> str:
    return content_path(file, revision=f"26{number // 100 + 1:02}{number % 100 + 1:02}001")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("pauses", "sizes", "read_timeout"),
    [
        ([0.8, 0.8, 0.2, 0.0], [100_000, 3_000_000], "500ms"),
        pytest.param(
            [5, 10, 14, 16, 20, 31, 45, 60, 0],
            [100_000, 3_000_000, 30_000_000],
            "15s",
            marks=pytest.mark.long,
        ),
    ],
    ids=["short", "whole"],
)
@pytest.mark.parametrize("rate", ["0", "30MB/s"])
def test_a_pause_longer_than_read_timeout_is_no_failure(serve, tmp_path, rate, pauses, sizes, read_timeout):
    tree, number = Tree(tmp_path / "tree"), 0
    tree.root.mkdir()
    gup, _ = serve(
        before=Nginx(tree, tmp_path / "nginx"),
        workers=1,
        each={"read_timeout": read_timeout},
        wan={"rate": rate},
    )
    for pause in pauses:
        for size in sizes:
            number += 1
            gup.serves(path_of(number), tree.put(path_of(number), noise(f"{number}", size)))
        time.sleep(pause)  # the case itself: an upstream that nobody asks for so long
    metrics = gup.metrics()
    assert metrics("gup_upstream_requests_total", outcome="timeout") == 0
    assert metrics("gup_fills_total", outcome="failed") == 0


def test_a_client_that_pauses_is_not_upstreams_silence(serve):
    """The body is passed through at the client's pace: it stops for longer than read_timeout."""
    body = noise("pass", 8_000_000)
    upstream = RawUpstream(lambda talk: talk.send(ok(body)))
    gup, _ = serve(
        before=upstream, workers=1, each=EACH | {"read_timeout": "500ms"}, cache={"max_size": "1MB"}
    )
    client, response = gup.begin(path_of(1), 100_000)
    time.sleep(1.0)  # the case itself
    assert client.finish(response).body == body


def test_strays_of_one_key_are_never_anothers_body(serve):
    """A second answer 20 ms after each: neither served nor stored under the key that is asked next."""

    def answer(talk: Talk) -> None:
        talk.send(ok(talk.path.encode()))
        talk.pause(0.02)
        talk.send(ok(b"stray of " + talk.path.encode()))

    gup, _ = serve(before=RawUpstream(answer), workers=1, each=EACH)
    for number in range(30):
        asked = gup.get(path_of(number))
        assert (asked.status, asked.body.split(b"/")[-2:]) == (200, path_of(number).encode().split(b"/")[-2:])
        assert b"stray" not in asked.body
        time.sleep(0.03)  # as an upstream does it: while the connection idles


def test_an_upstream_that_closes_each_reused_connection_is_up(serve):
    def answer(talk: Talk) -> None:
        if talk.number > 1:
            raise Over
        talk.send(ok(talk.path.encode()))

    gup, _ = serve(before=RawUpstream(answer), workers=1, each=EACH)
    assert {gup.get(path_of(number)).status for number in range(20)} == {200}
    metrics = gup.metrics()
    assert metrics("gup_upstream_requests_total", outcome="ok") == 20
    assert metrics("gup_upstream_requests_total", outcome="error") == 0
    assert metrics("gup_upstream_up") == 1


def test_an_unsure_end_is_passed_on_as_one_and_told(serve):
    bodies = {"dax": noise("unsure", 500_000), "zip": zip_of("unsure", 500_000)}

    def answer(talk: Talk) -> None:
        talk.send(b"HTTP/1.0 200 OK\r\n\r\n" + (bodies[talk.path[-3:]] if talk.method == "GET" else b""))
        raise Over

    gup, _ = serve(before=RawUpstream(answer), workers=1, each=EACH)
    for number, file in enumerate((DELTA, "full.dax", "full.zip")):
        for version in ("HTTP/1.1", "HTTP/1.0"):
            path = path_of(2 * number + (version == "HTTP/1.0"), file)
            client = gup.connect()
            client.ask(path, version=version)
            response = client.response()
            assert response.status == 200
            assert response.complete is False, "no clean end where the end is not known"
            assert bodies[path[-3:]].startswith(response.body)
            until(lambda: not gup.parts(), "its part is gone")
            assert_problem(gup.get(path), 502, "upstream-unsure-end")
    assert gup.bodies() == {}
    gup.wait_log("closed the connection, without a Content-Length")
    (alarm,) = until(lambda: gup.alarms("unsure-end"), "the alarm stands")
    assert alarm["text"].startswith("u0 sent 500000 bytes")


def test_a_trickle_gives_its_place_to_others(serve):
    """A byte per 0.1 s, and one slot for fulls: the next full has it when the trickle is found out."""

    def answer(talk: Talk) -> None:
        if not talk.path.endswith("full.zip"):
            talk.send(ok(b"another full"))
            return
        talk.send(ok(noise("t", 100_000))[:20_000])
        while True:
            talk.send(b"x")
            talk.pause(0.1)

    each = EACH | {"read_timeout": "500ms", "min_rate": "1kB/s"}
    gup, _ = serve(before=RawUpstream(answer), workers=1, each=each, fill={"max": 1, "queue_timeout": "20s"})
    client, _ = gup.begin(path_of(1, "full.zip"))
    began = time.monotonic()
    gup.serves(path_of(2), b"another full")
    assert time.monotonic() - began < 15
    assert len(client.read(10)) == 10, "whoever reads the trickle still does"


def test_odd_bytes_in_a_head_are_no_error(serve):
    lines = ('ETag: "\xff"', "Content-Type: \xe9/x", "Last-Modified: \xff yesterday")
    gup, _ = serve(before=RawUpstream(lambda talk: talk.send(ok(b"fine", *lines))), workers=1, each=EACH)
    for _ in range(2):
        response = gup.serves(path_of(1), b"fine")
        assert response.header("content-type") == "application/octet-stream"
        assert response.header("last-modified") is None
        assert response.etag
        gup.wait_stored("full.dax")
    assert gup.get(path_of(1)).header("cache-status") == "gup; hit"
    assert gup.get(path_of(1), method="HEAD").status == 200


def test_what_is_no_http_or_never_ends_is_told_in_bounds(serve):
    def answer(talk: Talk) -> None:
        if talk.path.endswith(DELTA):
            while True:
                talk.send(b"HTTP/1.1 102 Processing\r\n\r\n")
                talk.pause(0.05)
        talk.send(b"\xfe<no http>" * 10_000)
        raise Over

    each = EACH | {"first_byte_timeout": "700ms", "give_up": "1s"}
    gup, _ = serve(before=RawUpstream(answer), workers=1, each=each)
    document = assert_problem(gup.get(path_of(1)), 502)
    assert len(json.dumps(document)) < 4000
    gup.wait_log("broke HTTP")
    assert max(len(line) for line in gup.log.splitlines()) < 4000
    began = time.monotonic()
    assert_problem(gup.get(path_of(2, DELTA)), 504, "upstream-timeout")
    assert time.monotonic() - began < 5


def test_a_manager_that_builds_for_long_delivers(serve):
    """20 s against a read_timeout of 15 s, scaled."""

    def answer(talk: Talk) -> None:
        talk.pause(1.2)
        talk.send(ok(b"a delta"))

    gup, _ = serve(before=RawUpstream(answer), workers=1, each=EACH | {"read_timeout": "500ms"})
    gup.serves(path_of(1, DELTA), b"a delta")
