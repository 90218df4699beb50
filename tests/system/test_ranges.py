"""Ranges, conditions and the connection's life: on stored bodies and on bodies that still grow."""

import email.parser
import email.policy
import time
from dataclasses import dataclass

import pytest
from harness.clients import RawConnection, Response, assert_problem, fetch
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, DELTA, INDEX, Tree, make_tree, zip_of
from harness.upstreams import Nginx
from harness.waiting import until

LENGTH = 3_000_000
LONG_AGO = "Sun, 06 Nov 1994 08:49:37 GMT"
FAR_AHEAD = "Fri, 01 Jan 2100 00:00:00 GMT"


@dataclass(frozen=True)
class Warm:
    """A service that holds BIG and DELTA already."""

    gup: Gup
    upstream: Nginx
    body: bytes
    etag: str
    last_modified: str

    def get(self, headers: dict[str, str] | None = None, method: str = "GET") -> Response:
        return self.gup.get(BIG, headers, method=method)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    tree: Tree = make_tree(folder / "tree", big_bytes=LENGTH)
    with Nginx(tree, folder / "nginx") as upstream, Gup(folder / "cache", [upstream.url]) as gup:
        for path in (BIG, DELTA):
            assert gup.get(path).body == tree.body(path)
            gup.wait_stored(path.rpartition("/")[2])
        first = gup.get(BIG)
        last_modified = first.header("last-modified")
        assert last_modified is not None
        yield Warm(gup, upstream, tree.body(BIG), first.etag, last_modified)
        assert upstream.requests(BIG) == 1
        assert upstream.body_bytes(BIG) == LENGTH


def parts_of(response: Response) -> list[str]:
    """Content-Range of each part of a multipart/byteranges response, as Python's own MIME parser sees it."""
    content_type = response.header("content-type")
    assert content_type is not None
    assert content_type.startswith("multipart/byteranges")
    text = b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + response.body
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(text)
    return [str(part["Content-Range"]) for part in message.iter_parts()]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=1000000-1999999", 1_000_000, 2_000_000),
        ("bytes=2999999-2999999", LENGTH - 1, LENGTH),
        ("bytes=2000000-", 2_000_000, LENGTH),
        ("bytes=-1", LENGTH - 1, LENGTH),
        ("bytes=-70000", LENGTH - 70_000, LENGTH),
        ("bytes=-9999999999", 0, LENGTH),
        ("bytes=10-99999999999999999999", 10, LENGTH),
        ("bytes=0-", 0, LENGTH),
        ("BYTES=5-9", 5, 10),
        ("bytes=0-9,10-19", 0, 20),
    ],
)
def test_one_range_of_a_stored_body(warm, asked, start, stop):
    response = warm.get({"Range": asked})
    assert response.status == 206
    assert response.header("content-range") == f"bytes {start}-{stop - 1}/{LENGTH}"
    assert response.header("content-length") == str(stop - start)
    assert response.body == warm.body[start:stop]
    assert response.etag == warm.etag


def test_several_ranges_are_parts(warm):
    response = warm.get({"Range": "bytes=0-9, 500-509, -10"})
    assert response.status == 206
    assert response.header("content-range") is None
    spans = [(0, 10), (500, 510), (LENGTH - 10, LENGTH)]
    boundary = (response.header("content-type") or "").partition("boundary=")[2].strip('"').encode()
    pieces = response.body.split(b"--" + boundary)
    assert pieces[-1].startswith(b"--")
    for (start, stop), piece in zip(spans, pieces[1:-1], strict=True):
        head, _, content = piece.partition(b"\r\n\r\n")
        assert f"content-range: bytes {start}-{stop - 1}/{LENGTH}".encode() in head.lower()
        assert content == warm.body[start:stop] + b"\r\n"
    assert parts_of(response) == [f"bytes {a}-{b - 1}/{LENGTH}" for a, b in spans]


@pytest.mark.parametrize("asked", ["bytes=3000000-", "bytes=9999999-99999999", "bytes=-0"])
def test_an_unsatisfiable_range(warm, asked):
    response = warm.get({"Range": asked})
    assert_problem(response, 416, "range-not-satisfiable")
    assert response.header("content-range") == f"bytes */{LENGTH}"


@pytest.mark.parametrize("asked", ["bytes=9-1", "lines=1-2", "bytes=a-b", "bytes=", "bytes 0-1", "bytes=--1"])
def test_a_range_that_says_nothing_is_ignored(warm, asked):
    response = warm.get({"Range": asked})
    assert (response.status, len(response.body)) == (200, LENGTH)


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=" + ",".join(f"{n * 2}-{n * 2}" for n in range(1500)),
        "bytes=" + ",".join("0-" for _ in range(3000)),
        "bytes=" + ",".join("-1000000" for _ in range(1500)),
    ],
    ids=["tiny", "whole", "overlapping"],
)
def test_thousands_of_ranges_cost_no_more_than_the_body(warm, asked):
    began = time.monotonic()
    response = warm.get({"Range": asked})
    assert response.complete
    assert response.status in (200, 206, 416)
    assert len(response.body) <= LENGTH + 16_384
    assert time.monotonic() - began < 2
    if response.status == 200:
        assert response.body == warm.body


@pytest.mark.parametrize(
    ("if_range", "status"),
    [
        ("{etag}", 206),
        ('"other"', 200),
        ("W/{etag}", 200),
        ("{date}", 206),
        (LONG_AGO, 200),
        ("rubbish", 200),
    ],
)
def test_if_range(warm, if_range, status):
    value = if_range.format(etag=warm.etag, date=warm.last_modified)
    response = warm.get({"Range": "bytes=5-9", "If-Range": value})
    assert response.status == status
    assert response.body == (warm.body[5:10] if status == 206 else warm.body)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": "{etag}"}, 304),
        ({"If-None-Match": 'W/{etag}, "x"'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"x"'}, 200),
        ({"If-Modified-Since": "{date}"}, 304),
        ({"If-Modified-Since": FAR_AHEAD}, 304),
        ({"If-Modified-Since": LONG_AGO}, 200),
        ({"If-Modified-Since": "no date"}, 200),
        ({"If-Match": "{etag}"}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": '"x"'}, 412),
        ({"If-Match": "W/{etag}"}, 412),
        ({"If-Unmodified-Since": "{date}"}, 200),
        ({"If-Unmodified-Since": LONG_AGO}, 412),
        # RFC 9110 13.2.2: the order in which they count
        ({"If-None-Match": '"x"', "If-Modified-Since": FAR_AHEAD}, 200),
        ({"If-None-Match": "{etag}", "If-Modified-Since": LONG_AGO}, 304),
        ({"If-Match": "{etag}", "If-Unmodified-Since": LONG_AGO}, 200),
        ({"If-Match": '"x"', "If-None-Match": "{etag}"}, 412),
        ({"If-Match": "{etag}", "If-None-Match": "{etag}"}, 304),
        ({"If-None-Match": "{etag}", "Range": "bytes=0-1"}, 304),
        ({"If-Match": '"x"', "Range": "bytes=0-1"}, 412),
        ({"If-Match": "{etag}", "Range": "bytes=99999999-"}, 416),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_conditions_in_their_order(warm, headers, status, method):
    filled = {name: value.format(etag=warm.etag, date=warm.last_modified) for name, value in headers.items()}
    response = warm.get(filled, method)
    if method == "HEAD" and status == 416:
        status = 200  # RFC 9110 14.2: Range is for GET alone
    assert response.status == status, response.fields
    if status == 304:
        assert response.etag == warm.etag
        assert response.body == b""
    if status == 200 and method == "GET":
        assert response.body == warm.body


def test_head_has_the_headers_of_get(warm):
    skipped = {"date", "age"}
    get, head = warm.get(), warm.get(method="HEAD")
    assert head.body == b""
    assert {f for f in head.fields if f[0] not in skipped} == {f for f in get.fields if f[0] not in skipped}
    assert head.header("content-length") == str(LENGTH)
    assert head.header("accept-ranges") == "bytes"
    for name in ("date", "age", "via", "cache-status", "etag", "last-modified", "content-type"):
        assert get.header(name) is not None, name


def test_pipelined_requests_are_answered_in_their_order(warm):
    asked = [f"bytes={n}-{n + 9}" for n in range(0, 400, 10)]
    with warm.gup.connect() as client:
        lines = "".join(f"GET {BIG} HTTP/1.1\r\nHost: gup\r\nRange: {a}\r\n\r\n" for a in asked)
        client.send(lines.encode())
        got = b"".join(client.response().body for _ in asked)
        assert got == warm.body[:400]
        # mixed: the hot cache's plain GETs between others
        head = f"HEAD {BIG} HTTP/1.1\r\nHost: gup\r\n\r\n"
        plain = f"GET {DELTA} HTTP/1.1\r\nHost: gup\r\n\r\n"
        client.send((plain + head + plain + plain + head).encode())
        for method in ("GET", "HEAD", "GET", "GET", "HEAD"):
            response = client.response(method)
            assert response.status == 200
            assert len(response.body) == (200_000 if method == "GET" else 0)
        client.send(plain.encode())
        assert len(client.response().body) == 200_000


def test_a_request_may_come_byte_by_byte(warm):
    with warm.gup.connect() as client:
        for _ in range(2):
            for byte in f"GET {BIG} HTTP/1.1\r\nHost: gup\r\nRange: bytes=0-4\r\n\r\n".encode():
                client.send(bytes([byte]))
            assert client.response().body == warm.body[:5]


def test_connections_are_kept_or_closed_as_asked(warm):
    with warm.gup.connect() as client:
        for _ in range(20):
            assert client.get(DELTA).status == 200
        closing = client.get(DELTA, {"Connection": "close"})
        assert closing.header("connection") == "close"
        assert client.ended()


def test_http_1_0(warm):
    with warm.gup.connect() as client:
        client.send(f"GET {DELTA} HTTP/1.0\r\n\r\n".encode())
        response = client.response()
        assert (response.status, len(response.body)) == (200, 200_000)
        assert client.ended()
    with warm.gup.connect() as client:
        for _ in range(3):
            client.send(f"GET {DELTA} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
            response = client.response()
            assert (response.status, len(response.body)) == (200, 200_000)
            assert (response.header("connection") or "").lower() == "keep-alive"


# --- bodies that still grow


@dataclass(frozen=True)
class Growing:
    """A fill of BIG that stands at `point`."""

    gup: Gup
    upstream: ScriptedUpstream
    body: bytes
    point: int
    gate: Gate
    leader: RawConnection


@pytest.fixture
def growing(tmp_path, request):
    """Parametrised with `fill.range_wait`."""
    body, gate, point = zip_of("growing", LENGTH), Gate(), LENGTH // 2
    with ScriptedUpstream() as upstream:
        gated, free = Answer(body, etag='"a"', gates=((point, gate),)), Answer(body, etag='"a"')
        upstream.answer(BIG, gated, free)
        with (
            Gup(tmp_path / "cache", [upstream.url], settings={"fill": {"range_wait": request.param}}) as gup,
            gup.connect() as leader,
        ):
            leader.ask(BIG)
            head = leader.head()
            assert leader.read(point) == body[:point]
            gate.wait_reached()
            yield Growing(gup, upstream, body, point, gate, leader)
            gate.open()
            assert leader.read(LENGTH - point) == body[point:]
            assert head.header("content-length") == str(LENGTH)
            gup.wait_stored("full.zip")


@pytest.mark.parametrize("growing", ["1h"], indirect=True)
def test_behind_the_fills_point_ranges_are_answered_at_once(growing):
    for start, stop in ((0, 10), (growing.point - 10, growing.point), (1000, growing.point)):
        response = growing.gup.get(BIG, {"Range": f"bytes={start}-{stop - 1}"})
        assert response.status == 206
        assert response.body == growing.body[start:stop]
        assert response.header("content-range") == f"bytes {start}-{stop - 1}/{LENGTH}"
    assert growing.gup.get(BIG, {"Range": f"bytes={LENGTH}-"}).status == 416
    several = growing.gup.get(BIG, {"Range": "bytes=0-9,100-109"})
    assert several.status == 206
    assert growing.body[100:110] in several.body
    assert len(growing.upstream.requests(BIG)) == 1


@pytest.mark.parametrize("growing", ["1h"], indirect=True)
@pytest.mark.parametrize(
    "asked", ["bytes=1400000-2000000", "bytes=2900000-2900009", "bytes=-100", "bytes=7-"]
)
def test_ahead_of_the_fills_point_a_range_waits(growing, asked):
    with growing.gup.connect() as client:
        client.ask(BIG, {"Range": asked})
        # the fill has two waiters, and its upstream stands: nothing that is not there can be sent
        growing.gup.wait_metric(2, "gup_fill_waiters")
        assert growing.gup.metric("gup_client_sent_bytes_total", source="bypass") == 0
        growing.gate.open()
        response = client.response()
    assert response.status == 206
    first, last = (response.header("content-range") or "").split(" ")[1].split("/")[0].split("-")
    assert response.body == growing.body[int(first) : int(last) + 1]
    assert len(growing.upstream.requests(BIG)) == 1


@pytest.mark.parametrize("growing", ["1ms"], indirect=True)
def test_far_ahead_a_range_is_fetched_alone(growing):
    response = growing.gup.get(BIG, {"Range": "bytes=2900000-2900999"})
    assert response.status == 206
    assert response.body == growing.body[2_900_000:2_901_000]
    alone = growing.upstream.requests(BIG)[1]
    until(lambda: alone.done, "upstream has sent it")
    assert (alone.status, alone.body_bytes) == (206, 1000)
    assert growing.gup.metric("gup_client_sent_bytes_total", source="bypass") == 1000
    assert growing.gup.metric("gup_upstream_received_bytes_total", purpose="bypass") == 1000
    assert growing.gup.metric("gup_requests_total", result="bypass", code="206") == 1


def test_a_range_on_a_miss_starts_the_whole_fill(tmp_path):
    body = zip_of("growing", LENGTH)
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            response = gup.get(BIG, {"Range": "bytes=1000-1999"})
            assert (response.status, response.body) == (206, body[1000:2000])
            gup.wait_stored("full.zip")
            assert gup.get(BIG).body == body
            assert [seen.status for seen in upstream.requests(BIG)] == [200]


@pytest.mark.parametrize("path", [BIG, INDEX])
def test_head_on_a_miss_asks_with_head_and_starts_no_fill(tmp_path, path):
    with ScriptedUpstream() as upstream:
        upstream.answer(path, Answer(b"PK" * 1000, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            response = gup.get(path, method="HEAD")
            assert response.status == 200
            assert response.header("content-length") == "2000"
            assert response.header("cache-status") == "gup; fwd=uri-miss"  # nothing is stored
            assert gup.get("/content/none.txt", method="HEAD").status == 404
            assert upstream.requests(path) == []
            assert len(upstream.requests(path, method="HEAD")) == 1
            assert gup.bodies() == {}
            assert gup.parts() == {}
            assert gup.metric("gup_upstream_received_bytes_total") == 0


def test_head_during_a_fill_tells_what_get_would(tmp_path):
    body, gate = zip_of("growing", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, gup.connect() as client:
            client.ask(BIG)
            head = client.head()
            gate.wait_reached()
            for _ in range(4):  # over both workers
                seen = gup.get(BIG, method="HEAD")
                assert (seen.status, seen.header("content-length")) == (200, str(LENGTH))
                assert seen.etag == head.etag
            gate.open()
            assert client.finish(head).body == body
            gup.wait_stored("full.zip")
            assert fetch(gup.data, BIG, method="HEAD").etag == head.etag
            assert len(upstream.requests(BIG)) == 1


def test_hundreds_of_pipelined_hits_are_all_answered(warm):
    """More than socket buffers hold, from a client that reads late."""
    plain = f"GET {DELTA} HTTP/1.1\r\nHost: gup\r\n\r\n".encode()
    with warm.gup.connect() as client:
        client.send(plain * 300)
        bodies = {client.response().body for _ in range(300)}
        assert len(bodies) == 1
        assert len(bodies.pop()) == 200_000
        assert client.get(DELTA, {"Range": "bytes=0-0"}).status == 206


def test_a_client_may_close_its_half(warm):
    with warm.gup.connect() as client:
        client.ask(BIG)
        client.half_close()
        response = client.response()
        assert (response.complete, response.body == warm.body) == (True, True)
        assert client.ended()


def test_an_http_1_0_client_on_a_body_of_unknown_length(tmp_path):
    body, gate = zip_of("growing", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, chunked=True, gates=((LENGTH // 2, gate),)))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, gup.connect() as client:
            client.send(f"GET {BIG} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
            head = client.head()
            assert head.header("transfer-encoding") is None
            assert head.header("content-length") is None
            assert (head.header("connection") or "close").lower() == "close"
            gate.open()
            assert client.rest() == body
            assert not client.was_reset
