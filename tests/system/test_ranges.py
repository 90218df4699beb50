"""Ranges, conditions and the connection's life: on stored bodies and on bodies that still grow."""

import email.parser
import email.policy

import pytest
from harness.clients import Response, assert_problem
from harness.content import BIG, DELTA, INDEX, MODIFIED_AT, noise, zip_of
from harness.processes import quiet_clock
from harness.upstreams import Answer, Gate

LENGTH = 3_000_000
HALF = LENGTH // 2
BODY = zip_of("ranges", LENGTH)
SMALL = noise("delta", 200_000)
LONG_AGO = "Sun, 06 Nov 1994 08:49:37 GMT"
FAR_AHEAD = "Fri, 01 Jan 2100 00:00:00 GMT"


@pytest.fixture
def warm(shared):
    """A service that holds BIG and DELTA already."""
    gup, upstream = shared
    if not upstream.seen:
        upstream.answer(BIG, Answer(BODY, etag='"a"', last_modified=MODIFIED_AT))
        upstream.answer(DELTA, SMALL)
        gup.serves(BIG, BODY)
        gup.serves(DELTA, SMALL)
        gup.wait_stored(BIG, DELTA)
    yield gup
    assert len(upstream.requests(BIG)) == 1


def plain(path: str, method: str = "GET", version: str = "1.1", fields: str = "") -> bytes:
    return f"{method} {path} HTTP/{version}\r\nHost: gup\r\n{fields}\r\n".encode()


ONE = {
    "bytes=0-0": (0, 1),
    "bytes=1000000-1999999": (1_000_000, 2_000_000),
    "bytes=2000000-": (2_000_000, LENGTH),
    "bytes=-70000": (LENGTH - 70_000, LENGTH),
    "bytes=10-99999999999999999999": (10, LENGTH),
    "bytes=0-9,10-19": (0, 20),
}


def test_one_range_of_a_stored_body(warm):
    for asked, (start, stop) in ONE.items():
        response = warm.get(BIG, {"Range": asked})
        assert (response.status, response.body == BODY[start:stop]) == (206, True), asked
        assert response.header("content-range") == f"bytes {start}-{stop - 1}/{LENGTH}"
    for asked in ("bytes=3000000-", "bytes=-0"):
        response = warm.get(BIG, {"Range": asked})
        assert_problem(response, 416, "range-not-satisfiable")
        assert response.header("content-range") == f"bytes */{LENGTH}"
    for asked in ("bytes=9-1", "lines=1-2"):
        warm.serves(BIG, BODY, {"Range": asked})


def parts_of(response: Response) -> list[tuple[str, bytes]]:
    """Content-Range and content of each part, as Python's own MIME parser sees them."""
    content_type = response.header("content-type") or ""
    assert content_type.startswith("multipart/byteranges")
    text = b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + response.body
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(text)
    return [(str(part["Content-Range"]), part.get_payload(decode=True)) for part in message.iter_parts()]


def test_several_ranges_are_parts_and_thousands_cost_no_more_than_the_body(warm):
    response = warm.get(BIG, {"Range": "bytes=0-9, 500-509, -10"})
    assert (response.status, response.header("content-range")) == (206, None)
    spans = [(0, 10), (500, 510), (LENGTH - 10, LENGTH)]
    parts = [(f"bytes {start}-{stop - 1}/{LENGTH}", BODY[start:stop]) for start, stop in spans]
    assert parts_of(response) == parts
    for pieces in ([f"{n * 2}-{n * 2}" for n in range(1500)], ["0-"] * 3000, ["-1000000"] * 1500):
        began = quiet_clock()
        response = warm.get(BIG, {"Range": "bytes=" + ",".join(pieces)})
        assert (response.complete, response.status in (200, 206, 416)) == (True, True)
        assert len(response.body) <= LENGTH + 16_384
        assert quiet_clock() - began < 2
        assert response.status != 200 or response.body == BODY


CONDITIONS = [
    ({"If-None-Match": "{etag}"}, 304),
    ({"If-None-Match": '"x"', "If-Modified-Since": FAR_AHEAD}, 200),  # RFC 9110 13.2.2: their order
    ({"If-Modified-Since": "{date}"}, 304),
    ({"If-Match": '"x"', "If-None-Match": "{etag}"}, 412),
    ({"If-Unmodified-Since": LONG_AGO}, 412),
    ({"If-Match": "{etag}", "Range": "bytes=99999999-"}, 416),
    ({"Range": "bytes=5-9", "If-Range": "{etag}"}, 206),
    ({"Range": "bytes=5-9", "If-Range": LONG_AGO}, 200),
]


def test_conditions_in_their_order(warm):
    first = warm.get(BIG)
    known = {"etag": first.etag, "date": first.header("last-modified")}
    for headers, status in CONDITIONS:
        filled = {name: value.format(**known) for name, value in headers.items()}
        response = warm.get(BIG, filled)
        assert response.status == status, headers
        assert status not in (200, 206, 304) or response.etag == first.etag
        assert response.body == {200: BODY, 206: BODY[5:10], 304: b""}.get(status, response.body)
        head = warm.get(BIG, filled, method="HEAD")  # RFC 9110 14.2: Range is for GET alone
        assert head.status == {206: 200, 416: 200}.get(status, status), headers


def test_head_has_the_headers_of_get(warm):
    get, head = warm.get(BIG), warm.get(BIG, method="HEAD")
    same = [[f for f in response.fields if f[0] not in ("date", "age")] for response in (get, head)]
    assert (same[0], head.body) == (same[1], b"")
    assert (head.header("content-length"), head.header("accept-ranges")) == (str(LENGTH), "bytes")
    names = {"date", "age", "via", "cache-status", "etag", "last-modified", "content-type"}
    assert names <= {name for name, _ in get.fields}


def test_pipelined_requests_are_answered_in_their_order(warm):
    client = warm.connect()
    client.send(b"".join(plain(BIG, fields=f"Range: bytes={n}-{n + 9}\r\n") for n in range(0, 400, 10)))
    assert b"".join(client.response().body for _ in range(40)) == BODY[:400]
    methods = ("GET", "HEAD", "GET", "GET", "HEAD", "GET")  # mixed: the hot cache's plain GETs between others
    client.send(b"".join(plain(BIG if method == "HEAD" else DELTA, method) for method in methods))
    assert [len(client.response(m).body) for m in methods] == [200_000 * (m == "GET") for m in methods]
    client.send(plain(DELTA) * 300)  # more than socket buffers hold, from a client that reads late
    assert {client.response().body == SMALL for _ in range(300)} == {True}
    assert client.get(DELTA, {"Range": "bytes=0-0"}).status == 206
    for byte in plain(BIG, fields="Range: bytes=0-4\r\n"):
        client.send(bytes([byte]))
    assert client.response().body == BODY[:5]


def test_connections_are_kept_or_closed_as_asked(warm):
    client = warm.connect()
    assert [client.get(DELTA).status for _ in range(20)] == [200] * 20
    assert client.get(DELTA, {"Connection": "close"}).header("connection") == "close"
    assert client.ended()
    old = warm.connect()
    for _ in range(3):
        old.send(plain(DELTA, version="1.0", fields="Connection: keep-alive\r\n"))
        response = old.response()
        assert (response.body, (response.header("connection") or "").lower()) == (SMALL, "keep-alive")
    old.send(f"GET {DELTA} HTTP/1.0\r\n\r\n".encode())
    assert old.response().body == SMALL
    assert old.ended()
    half = warm.connect()
    half.ask(BIG)
    half.half_close()
    assert half.response().body == BODY
    assert half.ended()


def growing(serve, **fill):
    """A fill of BIG that stands at HALF: with the service its gate, and what reads its first client on."""
    gate = Gate()
    answers = Answer(BODY, etag='"a"', gates=((HALF, gate),)), BODY
    gup, upstream = serve({BIG: answers}, fill=fill)
    leader, response = gup.begin(BIG, HALF)
    gate.wait_reached()
    return gup, upstream, gate, lambda: leader.finish(response)


def test_behind_a_fills_point_ranges_are_answered_at_once_and_ahead_of_it_they_wait(serve):
    gup, upstream, gate, finish = growing(serve, range_wait="1h")
    for start, stop in ((0, 10), (HALF - 10, HALF), (1000, HALF)):
        response = gup.get(BIG, {"Range": f"bytes={start}-{stop - 1}"})
        assert (response.status, response.body == BODY[start:stop]) == (206, True)
        assert response.header("content-range") == f"bytes {start}-{stop - 1}/{LENGTH}"
    assert gup.get(BIG, {"Range": f"bytes={LENGTH}-"}).status == 416
    several = gup.get(BIG, {"Range": "bytes=0-9,100-109"})
    assert (several.status, BODY[100:110] in several.body) == (206, True)
    heads = [gup.get(BIG, method="HEAD") for _ in range(4)]  # over both workers
    assert {(head.status, head.header("content-length")) for head in heads} == {(200, str(LENGTH))}
    ahead = {"1400000-2000000": BODY[1_400_000:2_000_001], "2900000-2900009": BODY[2_900_000:2_900_010]}
    ahead |= {"-100": BODY[-100:], "7-": BODY[7:]}
    clients = [gup.connect() for _ in ahead]
    for client, asked in zip(clients, ahead, strict=True):
        client.ask(BIG, {"Range": f"bytes={asked}"})
    gup.wait_metric(1 + len(ahead), "gup_fill_waiters")  # upstream says no more: nothing can be sent
    assert gup.metric("gup_client_sent_bytes_total", source="bypass") == 0
    gate.open()
    for client, piece in zip(clients, ahead.values(), strict=True):
        response = client.response()
        assert (response.status, response.body == piece) == (206, True)
    whole = finish()
    assert whole.body == BODY
    gup.wait_stored(BIG)
    assert {head.etag for head in heads} == {whole.etag, gup.get(BIG, method="HEAD").etag}
    assert len(upstream.requests(BIG)) == 1


def test_far_ahead_a_range_is_fetched_alone(serve):
    gup, upstream, gate, finish = growing(serve, range_wait="1ms")
    response = gup.get(BIG, {"Range": "bytes=2900000-2900999"})
    assert (response.status, response.body) == (206, BODY[2_900_000:2_901_000])
    alone = upstream.wait_done(BIG, 2)
    assert (alone.status, alone.body_bytes) == (206, 1000)
    gup.wait_metric(1, "gup_requests_total", result="bypass", code="206")  # counted when it has left
    metrics = gup.metrics()
    assert metrics("gup_client_sent_bytes_total", source="bypass") == 1000
    assert metrics("gup_upstream_received_bytes_total", purpose="bypass") == 1000
    gate.open()
    assert finish().body == BODY


def test_a_range_on_a_miss_starts_the_whole_fill_and_head_starts_none(serve):
    gup, upstream = serve(dict.fromkeys((BIG, DELTA, INDEX), BODY))
    for path in (BIG, INDEX):
        response = gup.get(path, method="HEAD")
        assert (response.status, response.header("content-length")) == (200, str(LENGTH))
        assert response.header("cache-status") == "gup; fwd=uri-miss"  # nothing is stored
        assert (upstream.requests(path), len(upstream.requests(path, method="HEAD"))) == ([], 1)
    assert gup.get("/content/none.txt", method="HEAD").status == 404
    assert (gup.bodies(), gup.parts()) == ({}, {})
    assert gup.metric("gup_upstream_received_bytes_total") == 0
    response = gup.get(BIG, {"Range": "bytes=1000-1999"})
    assert (response.status, response.body) == (206, BODY[1000:2000])
    gup.wait_stored(BIG)
    gup.serves(BIG, BODY)
    assert [seen.status for seen in upstream.requests(BIG)] == [200]


def test_an_http_1_0_client_on_a_body_of_unknown_length(serve):
    gate = Gate()
    gup, _ = serve({BIG: Answer(BODY, chunked=True, gates=((HALF, gate),))})
    client = gup.connect()
    client.send(plain(BIG, version="1.0", fields="Connection: keep-alive\r\n"))
    head = client.head()
    assert head.header("transfer-encoding") is head.header("content-length") is None
    assert (head.header("connection") or "close").lower() == "close"
    gate.open()
    assert client.rest() == BODY
    assert not client.was_reset
