"""A service and its connections to upstream: pauses, strays, ends that nobody told, trickles, odd heads."""

import json
import time

import pytest
from harness.clients import assert_problem
from harness.raw import Over, RawUpstream, Talk, ok
from harness.service import Gup
from harness.trees import Tree, content_path, noise, zip_of
from harness.upstreams import Nginx
from harness.waiting import until

DELTA = "xdelta260801001_To_260801002.dax"


def path_of(number: int, file: str = "full.dax") -> str:
    return content_path(file, revision=f"26{number // 100 + 1:02}{number % 100 + 1:02}001")


def settings_of(url: str, wan: str = "0", **more: object) -> dict:
    table = {"url": url, "name": "u", "connect_timeout": "5s", "read_timeout": "1s", "health_interval": "0s"}
    return {"upstream": [table | more], "wan": {"rate": wan}}


def grow(tree: Tree, number: int, size: int) -> tuple[str, bytes]:
    """One more file of the upstream's."""
    path = path_of(number)
    return path, tree.put(path, noise(f"{number}", size))


def assert_no_pause_hurts(folder, wan: str, pauses: list[float], sizes: list[int], **more: object) -> None:
    tree = Tree(folder / "tree")
    with (
        Nginx(tree, folder / "nginx") as nginx,
        Gup(folder / "cache", workers=1, settings=settings_of(nginx.url, wan, **more)) as gup,
    ):
        numbers = iter(range(1000))
        for pause in pauses:
            for size in sizes:
                path, body = grow(tree, next(numbers), size)
                response = gup.get(path)
                assert (response.status, response.body == body) == (200, True), (pause, size, response.status)
            time.sleep(pause)  # the case itself: an upstream that nobody asks for so long
        metrics = gup.metrics()
        assert metrics("gup_upstream_requests_total", outcome="timeout") == 0
        assert metrics("gup_fills_total", outcome="failed") == 0


@pytest.mark.parametrize("wan", ["0", "30MB/s"])
def test_a_pause_longer_than_read_timeout_is_no_failure(tmp_path, wan):
    assert_no_pause_hurts(tmp_path, wan, [1.3, 1.3, 0.5, 0.0], [100_000, 3_000_000], read_timeout="500ms")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("wan", ["0", "20MB/s"])
def test_no_pause_of_5_to_60_seconds_is_a_failure(tmp_path, wan):
    pauses = [5, 10, 14, 16, 20, 31, 45, 60, 0]
    assert_no_pause_hurts(tmp_path, wan, pauses, [100_000, 3_000_000, 30_000_000], read_timeout="15s")


def test_a_client_that_pauses_is_not_upstreams_silence(tmp_path):
    """The body is passed through at the client's pace: it stops for longer than read_timeout."""
    body = noise("pass", 8_000_000)
    with RawUpstream(lambda talk: talk.send(ok(body))) as upstream:
        given = settings_of(upstream.url, read_timeout="500ms") | {"cache": {"max_size": "1MB"}}
        with Gup(tmp_path / "cache", settings=given) as gup, gup.connect() as client:
            client.ask(path_of(1))
            head = client.head()
            first = client.read(100_000)
            time.sleep(1.5)  # the case itself
            assert first + client.read(int(head.header("content-length")) - len(first)) == body


def test_strays_of_one_key_are_never_anothers_body(tmp_path):
    """A second answer 20 ms after each: neither served nor stored under the key that is asked next."""

    def answer(talk: Talk) -> None:
        talk.send(ok(talk.path.encode()))
        talk.pause(0.02)
        talk.send(ok(b"stray of " + talk.path.encode()))

    with RawUpstream(answer) as upstream, Gup(tmp_path / "cache", settings=settings_of(upstream.url)) as gup:
        for number in range(45):
            path = path_of(number)
            asked = gup.get(path)
            assert asked.status == 200
            assert asked.body.decode().rpartition("/")[2] == "full.dax"
            assert f"/{path.split('/')[3]}/" in asked.body.decode(), (path, asked.body)
            time.sleep(0.03)  # as an upstream does it: while the connection idles


def test_an_upstream_that_closes_each_reused_connection_is_up(tmp_path):
    def answer(talk: Talk) -> None:
        if talk.number > 1:
            raise Over
        talk.send(ok(talk.path.encode()))

    with RawUpstream(answer) as upstream, Gup(tmp_path / "cache", settings=settings_of(upstream.url)) as gup:
        for number in range(20):
            assert gup.get(path_of(number)).status == 200
        metrics = gup.metrics()
        assert metrics("gup_upstream_requests_total", outcome="ok") == 20
        assert metrics("gup_upstream_requests_total", outcome="error") == 0
        assert metrics("gup_upstream_up") == 1


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("file", [DELTA, "full.dax", "full.zip"])
def test_an_unsure_end_is_passed_on_as_one_and_told(tmp_path, version, file):
    body = zip_of("unsure", 500_000) if file.endswith("zip") else noise("unsure", 500_000)

    def answer(talk: Talk) -> None:
        talk.send(b"HTTP/1.0 200 OK\r\n\r\n" + (body if talk.method == "GET" else b""))
        raise Over

    with RawUpstream(answer) as upstream, Gup(tmp_path / "cache", settings=settings_of(upstream.url)) as gup:
        with gup.connect() as client:
            client.ask(path_of(1, file), version=version)
            response = client.response()
            assert response.status == 200
            assert response.complete is False, "no clean end where the end is not known"
            assert body.startswith(response.body)
        until(lambda: not gup.parts(), "its part is gone")
        assert gup.bodies() == {}
        assert_problem(gup.get(path_of(1, file)), 502, "upstream-unsure-end")
        gup.wait_log("closed the connection, without a Content-Length")

        def alarms() -> list[dict]:
            return [row for row in gup.api("/api/v1/alarms")[1]["alarms"] if row["name"] == "unsure-end"]

        (alarm,) = until(alarms, "the alarm stands")
        assert alarm["text"].startswith("u sent 500000 bytes")


def test_a_trickle_gives_its_place_to_others(tmp_path):
    """A byte per 0.1 s, and one place for fulls: the next full has it when the trickle is found out."""

    def answer(talk: Talk) -> None:
        if not talk.path.endswith("full.zip"):
            talk.send(ok(b"another full"))
            return
        talk.send(ok(noise("t", 100_000))[:20_000])
        while True:
            talk.send(b"x")
            talk.pause(0.1)

    with RawUpstream(answer) as upstream:
        given = settings_of(upstream.url, read_timeout="500ms", min_rate="1kB/s")
        given |= {"fill": {"max": 1, "queue_timeout": "20s"}}
        with Gup(tmp_path / "cache", settings=given) as gup, gup.connect() as client:
            client.ask(path_of(1, "full.zip"))
            assert client.head().status == 200
            began = time.monotonic()
            assert gup.get(path_of(2)).body == b"another full"
            assert time.monotonic() - began < 15
            assert len(client.read(10)) == 10, "whoever reads the trickle still does"


def test_odd_bytes_in_a_head_are_no_error(tmp_path):
    lines = ('ETag: "\xff"', "Content-Type: \xe9/x", "Last-Modified: \xff yesterday")
    with (
        RawUpstream(lambda talk: talk.send(ok(b"fine", *lines))) as upstream,
        Gup(tmp_path / "cache", settings=settings_of(upstream.url)) as gup,
    ):
        for _ in range(2):
            response = gup.get(path_of(1))
            assert (response.status, response.body) == (200, b"fine")
            assert response.header("content-type") == "application/octet-stream"
            assert response.header("last-modified") is None
            assert response.header("etag")
            gup.wait_stored("full.dax")
        assert gup.get(path_of(1)).header("cache-status") == "gup; hit"
        assert gup.get(path_of(1), method="HEAD").status == 200


def test_what_is_no_http_is_told_in_bounds(tmp_path):
    def answer(talk: Talk) -> None:
        talk.send(b"\xfe<no http>" * 10_000)
        raise Over

    with RawUpstream(answer) as upstream, Gup(tmp_path / "cache", settings=settings_of(upstream.url)) as gup:
        document = assert_problem(gup.get(path_of(1)), 502)
        assert len(json.dumps(document)) < 4000
        gup.wait_log("broke HTTP")
        assert max(len(line) for line in gup.log.splitlines()) < 4000


def test_a_manager_that_builds_for_long_delivers(tmp_path):
    """20 s against a read_timeout of 15 s, scaled."""

    def answer(talk: Talk) -> None:
        talk.pause(2.0)
        talk.send(ok(b"a delta"))

    with (
        RawUpstream(answer) as upstream,
        Gup(tmp_path / "cache", settings=settings_of(upstream.url, read_timeout="500ms")) as gup,
    ):
        assert gup.get(path_of(1, DELTA)).body == b"a delta"


def test_endless_1xx_end_by_first_byte_timeout(tmp_path):
    def answer(talk: Talk) -> None:
        while True:
            talk.send(b"HTTP/1.1 102 Processing\r\n\r\n")
            talk.pause(0.05)

    with RawUpstream(answer) as upstream:
        given = settings_of(upstream.url, first_byte_timeout="700ms", give_up="1s")
        with Gup(tmp_path / "cache", settings=given) as gup:
            began = time.monotonic()
            assert_problem(gup.get(path_of(1, DELTA)), 504, "upstream-timeout")
            assert time.monotonic() - began < 5
