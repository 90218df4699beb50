"""What is sent for a body and for a problem, as a client of another make reads it."""

import email.parser
import email.policy
import errno
import http.client
import io
import json
import os
import random
import socket
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cache.records import Head
from gup.content.key import Kind
from gup.errors import PROBLEMS, Problem
from gup.server.hot_cache import HotRow
from gup.server.ranges import Span
from gup.server.request import Request
from gup.server.response import (
    BROKEN,
    FINISHED,
    UNBOUNDED,
    Response,
    ResponseWriter,
    Serving,
    field_lines,
    plan,
    refuse,
)

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
CHANGED = "Sat, 05 Nov 1994 08:49:37 GMT"
BEFORE = "Fri, 04 Nov 1994 08:49:37 GMT"
BODY = bytes(range(256)) * 40


def described(length, etag, last_modified, content_type):
    """A body's head."""
    return Head(length, etag, content_type, last_modified, "upstream", None)


WHOLE = described(len(BODY), '"tag"', CHANGED, "application/zip")
GROWING = described(None, None, CHANGED, "application/zip")
SERVED = Serving(DATE, "1.1 branch (gup)", 42, "gup; hit")
COMMON = {"date": DATE, "age": "42", "via": "1.1 branch (gup)", "cache-status": "gup; hit"}
VALIDATORS = {"etag": '"tag"', "last-modified": CHANGED}
OF_BODY = {**COMMON, **VALIDATORS, "content-type": "application/zip", "accept-ranges": "bytes"}
ONE, TWO = (("range", "bytes=0-0"),), (("range", "bytes=0-0,9-9"),)


def ask(*fields, method="GET", minor_version=1, keep_alive=True):
    return Request(method, b"/content/a", minor_version, (("host", "gup"), *fields), keep_alive)


def wire(planned, body=BODY):
    """What a connection sends; chunks are made here, as large as segments."""
    parts = [part if isinstance(part, bytes) else body[part.start : part.stop] for part in planned.segments]
    if planned.chunked:
        parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    return planned.head + b"".join(parts)


class Wire:
    """As much of a socket as http.client reads from."""

    def __init__(self, text):
        self.makefile = lambda _mode: io.BytesIO(text)


def received(request, representation=WHOLE, served=SERVED, body=BODY):
    """The response, its content and its fields; nothing may be left over."""
    planned = plan(request, representation, served)
    response = http.client.HTTPResponse(Wire(wire(planned, body)), method=request.method)
    response.begin()
    stream = response.fp
    content = response.read()
    assert stream.closed or stream.read() == b""
    assert response.status == planned.status
    assert (response.headers["Connection"] == "close") == planned.close
    return response, content, {name.lower(): value for name, value in response.getheaders()}


def test_a_plain_get_has_the_whole_body():
    response, content, fields = received(ask())
    assert (response.status, content) == (200, BODY)
    assert fields == {**OF_BODY, "content-length": str(len(BODY))}
    assert plan(ask(), WHOLE, SERVED).segments == (Span(0, len(BODY)),)


@pytest.mark.parametrize(
    ("fields", "status"), [((), 200), (ONE, 206), (TWO, 206), ((("if-none-match", "*"),), 304)]
)
def test_what_the_request_chose_tells_by_which_of_its_fields(fields, status):
    chosen = replace(SERVED, vary="GUP-Client-Version, User-Agent")
    response, _, told = received(ask(*fields), served=chosen)
    assert (response.status, told["vary"]) == (status, "GUP-Client-Version, User-Agent")
    assert "vary" not in received(ask(*fields))[2]


def test_bodies_without_validators_and_without_bytes():
    _, content, fields = received(ask(), described(len(BODY), None, None, "a/b"))
    assert content == BODY
    assert not VALIDATORS.keys() & fields.keys()
    planned = plan(ask(), described(0, None, None, "a/b"), SERVED)
    assert (planned.status, planned.segments) == (200, ())
    assert b"\r\nContent-Length: 0\r\n" in planned.head


@pytest.mark.parametrize(
    ("minor_version", "keep_alive", "connection"),
    [(1, True, None), (1, False, "close"), (0, True, "keep-alive"), (0, False, "close")],
)
@pytest.mark.parametrize("fields", [(), ONE, TWO, (("if-none-match", "*"),)])
def test_the_connection_field(minor_version, keep_alive, connection, fields):
    response, _, told = received(ask(*fields, minor_version=minor_version, keep_alive=keep_alive))
    assert (response.version, told.get("connection")) == (11, connection)


@pytest.mark.parametrize(
    ("representation", "served"),
    [
        (described(3, '"a\r\nX: b"', "x\nX: b", "text/x\r\n\r\nX: b"), SERVED),
        (WHOLE, Serving(DATE, "1.1 \r\nX: b", 0, "gup\nX: b\0\u2028")),
        (described(None, None, "x\nX: b", "text/x\r\n\r\nX: b"), Serving(DATE, "\r", 0, "\n")),
    ],
)
@pytest.mark.parametrize("fields", [(), ONE, (("range", "bytes=0-0,2-2"),)])
def test_no_value_makes_a_line_of_its_own(representation, served, fields):
    planned = plan(ask(*fields), representation, served)
    for literal in (planned.head, *(part for part in planned.segments if isinstance(part, bytes))):
        assert b"\nX: b" not in literal
        assert literal.count(b"\r") == literal.count(b"\n") == literal.count(b"\r\n")
    assert planned.head.endswith(b"\r\n\r\n")
    assert planned.head.count(b"\r\n\r\n") == 1


def test_a_clock_set_back_makes_no_negative_age():
    for fields in ((), ONE):
        assert received(ask(*fields), served=Serving(DATE, "v", -5, "gup; hit"))[2]["age"] == "0"


@pytest.mark.parametrize("representation", [WHOLE, GROWING])
@pytest.mark.parametrize("minor_version", [0, 1])
@pytest.mark.parametrize(
    "fields", [(), (("if-none-match", '"tag"'),), (("if-modified-since", DATE),), (("if-match", '"other"'),)]
)
def test_head_has_the_head_of_get(representation, minor_version, fields):
    get = plan(ask(*fields, minor_version=minor_version), representation, SERVED)
    head = plan(ask(*fields, minor_version=minor_version, method="HEAD"), representation, SERVED)
    assert (head.status, head.head, head.close) == (get.status, get.head, get.close)
    assert (head.segments, head.chunked) == ((), False)


# --- conditions, and one range


@pytest.mark.parametrize("fields", [(("if-none-match", 'W/"tag"'),), (("if-modified-since", CHANGED),)])
@pytest.mark.parametrize("more", [(), ONE])
def test_not_modified(fields, more):
    response, content, told = received(ask(*fields, *more))
    assert (response.status, content, told) == (304, b"", {**COMMON, **VALIDATORS})


@pytest.mark.parametrize("fields", [(("if-match", '"other"'),), (("if-unmodified-since", BEFORE),)])
@pytest.mark.parametrize("more", [(), (("range", "bytes=99999-"),), (("if-none-match", "*"),)])
def test_a_failed_precondition_is_a_problem(fields, more):
    response, content, _ = received(ask(*fields, *more))
    assert response.status == 412
    assert json.loads(content)["type"] == "urn:gup:problem:precondition-failed"


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [("bytes=0-", 0, len(BODY)), ("bytes=5-9,8-20", 5, 21), ("bytes=10000-99999999", 10000, len(BODY))],
)
def test_one_range(header, start, stop):
    response, content, fields = received(ask(("range", header)))
    assert (response.status, content) == (206, BODY[start:stop])
    told = {"content-length": str(stop - start), "content-range": f"bytes {start}-{stop - 1}/{len(BODY)}"}
    assert fields == {**OF_BODY, **told}


@pytest.mark.parametrize(
    ("if_range", "status"),
    [('"tag"', 206), (CHANGED, 206), ('"other"', 200), ('W/"tag"', 200), (DATE, 200), ("?", 200)],
)
def test_if_range_decides_between_the_range_and_the_whole(if_range, status):
    assert plan(ask(*ONE, ("if-range", if_range)), WHOLE, SERVED).status == status
    beyond = plan(ask(("range", "bytes=99999-"), ("if-range", if_range)), WHOLE, SERVED)
    assert beyond.status == (416 if status == 206 else 200)


@pytest.mark.parametrize("header", ["bytes=10240-", "bytes=-0", "bytes=99999-,20000-30000"])
@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_range_beyond_the_body_is_a_problem(header, keep_alive):
    response, content, fields = received(ask(("range", header), keep_alive=keep_alive))
    assert (response.status, fields["content-range"]) == (416, f"bytes */{len(BODY)}")
    assert fields["content-type"] == "application/problem+json"
    assert json.loads(content)["type"] == "urn:gup:problem:range-not-satisfiable"


# --- several ranges


def test_several_ranges():
    text = b"".join(b"%04d " % number for number in range(1000))
    representation = described(len(text), '"tag"', CHANGED, "text/plain")
    ranges = ("range", "bytes=100-104, 0-9, -5")
    response, content, fields = received(ask(ranges), representation, body=text)
    assert (response.status, fields["content-length"]) == (206, str(len(content)))
    assert (fields["etag"], fields.get("content-range")) == ('"tag"', None)
    head = f"Content-Type: {fields['content-type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + content)
    assert message.get_content_type() == "multipart/byteranges"
    assert not message.defects
    parts = list(message.iter_parts())
    assert {part["Content-Type"] for part in parts} == {"text/plain"}
    asked = [f"bytes {span}/5000" for span in ("100-104", "0-9", "4995-4999")]
    assert [part["Content-Range"] for part in parts] == asked
    assert [part.get_content() for part in parts] == ["0020 ", "0000 0001 ", "0999 "]


def test_a_boundary_belongs_to_one_question():
    def boundary(header, representation=WHOLE):
        return plan(ask(("range", header)), representation, SERVED).segments[-1]

    asked = boundary("bytes=0-0,9-9")
    assert asked == boundary("bytes=0-0, 9-9")
    assert asked != boundary("bytes=0-0,8-8")
    assert asked != boundary("bytes=0-0,9-9", described(len(BODY), '"other"', None, "a/b"))


PAIR = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(PAIR, min_size=1, max_size=6), st.integers(1, 30))
def test_the_length_is_always_that_of_what_follows(pairs, length):
    header = "bytes=" + ",".join(f"{first}-{last}" for first, last in pairs)
    representation = described(length, '"tag"', None, "a/b")
    response, content, fields = received(ask(("range", header)), representation, body=BODY[:length])
    assert int(fields["content-length"]) == len(content)
    if response.status == 206 and "content-range" in fields:
        first, last = fields["content-range"].removeprefix("bytes ").split("/")[0].split("-")
        assert content == BODY[int(first) : int(last) + 1]


# --- a body whose length is not known yet


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("fields", [(), ONE, (("range", "bytes=99999-"),)])
def test_an_unknown_length_goes_out_in_chunks(keep_alive, fields):
    response, content, told = received(ask(*fields, keep_alive=keep_alive), GROWING)
    assert (response.status, content) == (200, BODY)
    told.pop("connection", None)
    own = {"content-type": "application/zip", "last-modified": CHANGED, "transfer-encoding": "chunked"}
    assert told == {**COMMON, **own}
    assert plan(ask(*fields), GROWING, SERVED).segments == (Span(0, UNBOUNDED),)


@pytest.mark.parametrize("keep_alive", [True, False])
def test_an_unknown_length_ends_with_the_connection_for_http_1_0(keep_alive):
    _, content, fields = received(ask(minor_version=0, keep_alive=keep_alive), GROWING)
    assert (content, fields["connection"]) == (BODY, "close")
    assert "transfer-encoding" not in fields


@pytest.mark.parametrize("representation", [WHOLE, described(1, None, None, "a/b")])
def test_the_hot_caches_head_is_that_of_a_plain_get(representation):
    record = SimpleNamespace(length=representation.length, key=SimpleNamespace(text=""), validated_at=100.0)
    planned = plan(ask(), representation, replace(SERVED, age_seconds=0)).head
    row = HotRow(SimpleNamespace(record=record), Kind.FULL, planned, None, 0, 0)
    date = DATE.encode()
    assert row.head(date, 142.9, row.whole) == plan(ask(), representation, SERVED).head
    assert row.head(date, 142.9, Span(0, 1)) == plan(ask(*ONE), representation, SERVED).head
    assert b"Date: later\r\nAge: 0\r\n" in row.head(b"later", 90.0, row.whole)


# --- problems


def refused(problem, *, keep_alive=True):
    made = refuse(problem, DATE, SERVED.via, keep_alive=keep_alive)
    assert made.close is not keep_alive
    response = http.client.HTTPResponse(Wire(wire(made)))
    response.begin()
    assert response.status == made.status
    return response, response.read()


@pytest.mark.parametrize("slug", PROBLEMS)
def test_every_problem_can_be_told(slug):
    response, body = refused(Problem(slug, "Why."))
    assert (response.status, bool(response.reason)) == (PROBLEMS[slug].status, True)
    assert dict(response.getheaders()) == {
        "Date": DATE,
        "Content-Type": "application/problem+json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "Via": SERVED.via,
        "Cache-Status": f"gup; detail={slug}",
        "Connection": "keep-alive",
    }
    assert refused(Problem(slug, "Why."), keep_alive=False)[0].headers["Connection"] == "close"
    assert json.loads(body) == {
        "type": f"urn:gup:problem:{slug}",
        "title": PROBLEMS[slug].title,
        "status": PROBLEMS[slug].status,
        "detail": "Why.",
    }


@pytest.mark.parametrize(("seconds", "told"), [(0, "0"), (0.2, "1"), (2, "2"), (2.0001, "3"), (-1, "0")])
def test_nobody_comes_back_too_early(seconds, told):
    response, _ = refused(Problem("overloaded", "Full.", retry_after_seconds=seconds))
    assert response.headers["Retry-After"] == told


def test_a_problems_own_fields_and_members_replace_no_standard_one():
    own = (("Allow", "GET, HEAD"), ("X", "a\r\nSet-Cookie: b"))
    members: dict[str, object] = {"rule": "version", "status": 200, "odd": {1}}
    response, body = refused(Problem("rule-refused", "No.", headers=own, extensions=members))
    told = [response.headers[name] for name in ("Allow", "X", "Set-Cookie")]
    assert told == ["GET, HEAD", "a  Set-Cookie: b", None]
    document = json.loads(body)
    assert (document["rule"], document["status"], document["odd"]) == ("version", 403, "{1}")


@given(st.text())
def test_any_text_is_told_and_ends_no_line(value):
    line = field_lines([("X", value)])
    assert line.startswith(b"X: ")
    assert line.endswith(b"\r\n")
    assert not set(line[:-2]) & {0, 10, 13}
    assert len(line) == len("X: \r\n") + len(value)
    _, body = refused(Problem("bad-path", value))
    assert json.loads(body)["detail"] == value


# --- writing: from a descriptor or from memory, the same bytes

LENGTH = 700_001
BYTES = random.Random(5).randbytes(LENGTH)


class FileBody:
    """A stored body, all of it available."""

    def __init__(self, file, *, in_memory):
        self._file, self.told = file, 0
        self.fd = -1 if in_memory else file.fileno()

    def available(self, offset, want):
        return min(want, LENGTH - offset)

    def view(self, offset, length):
        return memoryview(os.pread(self._file.fileno(), length, offset))

    def end(self):
        return LENGTH

    def unreadable(self):
        self.told += 1


@pytest.fixture(params=[False, True], ids=["descriptor", "memory"])
def body(request, tmp_path):
    (tmp_path / "body").write_bytes(BYTES)
    with (tmp_path / "body").open("rb") as file:
        yield FileBody(file, in_memory=request.param)


def written(response, *, sent=0, most=1 << 20):
    """How writing ends, what has arrived, the bytes counted, and those that are logged."""
    words = memoryview(bytearray(16)).cast("q")
    writer, got, done = ResponseWriter(words), bytearray(), 1
    writer.start(response, sent)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        while done > 0:
            try:
                done = writer.write(ours, most)
            except BlockingIOError:
                got += theirs.recv(1 << 20)
        ours.shutdown(socket.SHUT_WR)
        while piece := theirs.recv(1 << 20):
            got += piece
    assert words[0] == words[1]
    return done, bytes(got), words[0], writer.sent_bytes


def of(body, *segments):
    return Response(206, b"head", segments, body=body, sent_at=0, stream_at=1)


@pytest.mark.parametrize("most", [1 << 20, 1000])
@pytest.mark.parametrize("span", [Span(0, LENGTH), Span(1, 400_000), Span(LENGTH - 1, LENGTH)])
def test_a_span_arrives_whole_and_is_counted(body, span, most):
    length, text = span.stop - span.start, BYTES[span.start : span.stop]
    assert written(of(body, span), most=most) == (FINISHED, b"head" + text, length, length)


def test_what_has_left_already_is_not_sent_again(body):
    rest = b"head" + BYTES[5_001:400_000]
    assert written(of(body, Span(1, 400_000)), sent=5_000) == (FINISHED, rest, 394_999, 399_999)


def test_literal_parts_of_a_body_are_counted_and_a_problems_text_is_not(body):
    text = b"head--x" + BYTES[:3] + b"--x--"
    assert written(of(body, b"--x", Span(0, 3), b"--x--")) == (FINISHED, text, 11, 11)
    assert written(Response(404, b"head", (b"problem",))) == (FINISHED, b"headproblem", 0, 0)


def test_what_can_not_be_read_breaks_off_where_it_ends(body, tmp_path, monkeypatch):
    os.truncate(tmp_path / "body", 300_000)
    assert written(of(body, Span(0, LENGTH))) == (BROKEN, b"head" + BYTES[:300_000], 300_000, 300_000)
    assert body.told == 1
    for read in ("pread", "sendfile"):
        monkeypatch.setattr(os, read, Mock(side_effect=OSError(errno.EIO, "it is broken")))
    assert written(of(body, Span(0, LENGTH))) == (BROKEN, b"head", 0, 0)
    assert body.told == 2
