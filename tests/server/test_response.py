import email.parser
import email.policy
import http.client
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cache.records import Head
from gup.errors import PROBLEMS, Problem
from gup.server.ranges import Span
from gup.server.request import Request
from gup.server.response import UNBOUNDED, HeadTemplate, Serving, field_lines, plan, refuse, status_line

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
CHANGED = "Sat, 05 Nov 1994 08:49:37 GMT"
BODY = bytes(range(256)) * 40


def described(length, etag, last_modified, content_type):
    """A body's head."""
    return Head(length, etag, content_type, last_modified, "upstream", None)


WHOLE = described(len(BODY), '"tag"', CHANGED, "application/zip")
GROWING = described(None, None, CHANGED, "application/zip")
SERVED = Serving(DATE, "1.1 branch (gup)", 42, "gup; hit")


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
    """The response as a client of another make reads it; nothing may be left over."""
    planned = plan(request, representation, served)
    response = http.client.HTTPResponse(Wire(wire(planned, body)), method=request.method)
    response.begin()
    stream = response.fp
    content = response.read()
    assert stream.closed or stream.read() == b""
    assert response.status == planned.status
    assert (response.headers["Connection"] == "close") == planned.close
    return response, content


def fields_of(response):
    return {name.lower(): value for name, value in response.getheaders()}


COMMON = {
    "date": DATE,
    "age": "42",
    "via": "1.1 branch (gup)",
    "cache-status": "gup; hit",
}
VALIDATORS = {"etag": '"tag"', "last-modified": CHANGED}


# --- the whole body


def test_a_plain_get_has_the_whole_body():
    response, content = received(ask())
    assert response.status == 200
    assert content == BODY
    assert fields_of(response) == {
        **COMMON,
        **VALIDATORS,
        "content-type": "application/zip",
        "content-length": str(len(BODY)),
        "accept-ranges": "bytes",
    }
    assert plan(ask(), WHOLE, SERVED).segments == (Span(0, len(BODY)),)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((), 200),
        ((("range", "bytes=0-4"),), 206),
        ((("range", "bytes=0-1,5-6"),), 206),
        ((("if-none-match", "*"),), 304),
    ],
)
def test_what_the_request_chose_tells_by_which_of_its_fields(fields, status):
    chosen = replace(SERVED, vary="GUP-Client-Version, User-Agent")
    response, _ = received(ask(*fields), served=chosen)
    assert (response.status, response.headers["vary"]) == (status, "GUP-Client-Version, User-Agent")
    assert received(ask(*fields))[0].headers["vary"] is None


def test_a_body_without_validators_has_none():
    response, content = received(ask(), described(len(BODY), None, None, "a/b"))
    assert content == BODY
    assert not VALIDATORS.keys() & fields_of(response).keys()


def test_an_empty_body_has_no_segment():
    planned = plan(ask(), described(0, None, None, "a/b"), SERVED)
    assert (planned.status, planned.segments) == (200, ())
    assert b"\r\nContent-Length: 0\r\n" in planned.head


@pytest.mark.parametrize(
    ("minor_version", "keep_alive", "connection"),
    [(1, True, None), (1, False, "close"), (0, True, "keep-alive"), (0, False, "close")],
)
@pytest.mark.parametrize(
    "fields", [(), (("range", "bytes=0-0"),), (("range", "bytes=0-0,9-9"),), (("if-none-match", "*"),)]
)
def test_the_connection_field(minor_version, keep_alive, connection, fields):
    response, _ = received(ask(*fields, minor_version=minor_version, keep_alive=keep_alive))
    assert response.version == 11
    assert response.headers["Connection"] == connection


@pytest.mark.parametrize(
    ("representation", "served"),
    [
        (described(3, '"a\r\nX: b"', "x\nX: b", "text/x\r\n\r\nX: b"), SERVED),
        (WHOLE, Serving(DATE, "1.1 \r\nX: b", 0, "gup\nX: b\0\u2028")),
        (described(None, None, "x\nX: b", "text/x\r\n\r\nX: b"), Serving(DATE, "\r", 0, "\n")),
    ],
)
@pytest.mark.parametrize("fields", [(), (("range", "bytes=0-0"),), (("range", "bytes=0-0,2-2"),)])
def test_no_value_makes_a_line_of_its_own(representation, served, fields):
    planned = plan(ask(*fields), representation, served)
    for literal in (planned.head, *(part for part in planned.segments if isinstance(part, bytes))):
        assert b"\nX: b" not in literal
        assert literal.count(b"\r") == literal.count(b"\n") == literal.count(b"\r\n")
    assert planned.head.endswith(b"\r\n\r\n")
    assert planned.head.count(b"\r\n\r\n") == 1


def test_a_clock_set_back_makes_no_negative_age():
    for fields in ((), (("range", "bytes=0-0"),)):
        response, _ = received(ask(*fields), served=Serving(DATE, "v", -5, "gup; hit"))
        assert response.headers["Age"] == "0"


# --- HEAD


@pytest.mark.parametrize("representation", [WHOLE, GROWING])
@pytest.mark.parametrize("minor_version", [0, 1])
@pytest.mark.parametrize(
    "fields",
    [
        (),
        (("if-none-match", '"tag"'),),
        (("if-modified-since", DATE),),
        (("if-match", '"other"'),),
        (("if-unmodified-since", CHANGED), ("if-none-match", '"other"')),
    ],
)
def test_head_has_the_head_of_get(representation, minor_version, fields):
    get = plan(ask(*fields, minor_version=minor_version), representation, SERVED)
    head = plan(ask(*fields, minor_version=minor_version, method="HEAD"), representation, SERVED)
    assert (head.status, head.head, head.close) == (get.status, get.head, get.close)
    assert head.segments == ()
    assert not head.chunked


def test_head_has_no_ranges():
    for header in ("bytes=0-0", "bytes=99999-"):
        planned = plan(ask(("range", header), method="HEAD"), WHOLE, SERVED)
        assert planned == plan(ask(method="HEAD"), WHOLE, SERVED)
        assert planned.status == 200


# --- conditions


@pytest.mark.parametrize("fields", [(("if-none-match", 'W/"tag"'),), (("if-modified-since", CHANGED),)])
@pytest.mark.parametrize("more", [(), (("range", "bytes=0-0"),)])
def test_not_modified(fields, more):
    response, content = received(ask(*fields, *more))
    assert response.status == 304
    assert content == b""
    assert fields_of(response) == {**COMMON, **VALIDATORS}


@pytest.mark.parametrize(
    "fields", [(("if-match", '"other"'),), (("if-unmodified-since", "Fri, 04 Nov 1994 08:49:37 GMT"),)]
)
@pytest.mark.parametrize("more", [(), (("range", "bytes=99999-"),), (("if-none-match", "*"),)])
def test_a_failed_precondition_is_a_problem(fields, more):
    response, content = received(ask(*fields, *more))
    assert response.status == 412
    assert json.loads(content)["type"] == "urn:gup:problem:precondition-failed"


# --- one range


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-", 0, len(BODY)),
        ("bytes=0-0", 0, 1),
        ("bytes=5-9,8-20", 5, 21),
        ("bytes=-1", len(BODY) - 1, len(BODY)),
        ("bytes=10000-99999999", 10000, len(BODY)),
    ],
)
def test_one_range(header, start, stop):
    response, content = received(ask(("range", header)))
    assert response.status == 206
    assert content == BODY[start:stop]
    assert fields_of(response) == {
        **COMMON,
        **VALIDATORS,
        "content-type": "application/zip",
        "content-length": str(stop - start),
        "content-range": f"bytes {start}-{stop - 1}/{len(BODY)}",
        "accept-ranges": "bytes",
    }


@pytest.mark.parametrize("header", ["bytes=5-4", "lines=0-1", "bytes=0-1,bytes=2-3", "bytes=0-,0-,0-"])
def test_a_range_that_is_ignored_is_answered_with_the_whole(header):
    assert plan(ask(("range", header)), WHOLE, SERVED) == plan(ask(), WHOLE, SERVED)


@pytest.mark.parametrize(
    ("if_range", "status"),
    [('"tag"', 206), (CHANGED, 206), ('"other"', 200), ('W/"tag"', 200), (DATE, 200), ("?", 200)],
)
def test_if_range_decides_between_the_range_and_the_whole(if_range, status):
    assert plan(ask(("range", "bytes=0-0"), ("if-range", if_range)), WHOLE, SERVED).status == status


def test_if_range_also_guards_an_unsatisfiable_range():
    fields = (("range", "bytes=99999-"), ("if-range", '"other"'))
    assert plan(ask(*fields), WHOLE, SERVED).status == 200
    assert plan(ask(("if-range", '"other"')), WHOLE, SERVED).status == 200


@pytest.mark.parametrize("header", ["bytes=10240-", "bytes=-0", "bytes=99999-,20000-30000"])
@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_range_beyond_the_body_is_a_problem(header, keep_alive):
    response, content = received(ask(("range", header), keep_alive=keep_alive))
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{len(BODY)}"
    assert response.headers["Content-Type"] == "application/problem+json"
    assert json.loads(content)["type"] == "urn:gup:problem:range-not-satisfiable"


# --- several ranges


def parts_of(response, content):
    head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + content)
    assert message.get_content_type() == "multipart/byteranges"
    assert not message.defects
    return list(message.iter_parts())


def test_several_ranges():
    text = b"".join(b"%04d " % number for number in range(1000))
    representation = described(len(text), '"tag"', CHANGED, "text/plain")
    response, content = received(ask(("range", "bytes=100-104, 0-9, -5")), representation, body=text)
    assert response.status == 206
    assert response.headers["Content-Length"] == str(len(content))
    assert response.headers["Content-Range"] is None
    assert response.headers["ETag"] == '"tag"'
    parts = parts_of(response, content)
    assert [part["Content-Range"] for part in parts] == [
        "bytes 100-104/5000",
        "bytes 0-9/5000",
        "bytes 4995-4999/5000",
    ]
    assert {part["Content-Type"] for part in parts} == {"text/plain"}
    assert [part.get_content() for part in parts] == ["0020 ", "0000 0001 ", "0999 "]


def test_a_boundary_belongs_to_one_question():
    def boundary(header, representation=WHOLE):
        return plan(ask(("range", header)), representation, SERVED).segments[-1]

    asked = boundary("bytes=0-0,9-9")
    assert asked == boundary("bytes=0-0, 9-9")
    assert asked != boundary("bytes=0-0,8-8")
    assert asked != boundary("bytes=0-0,9-9", described(len(BODY), '"other"', None, "a/b"))


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair))),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 30),
)
def test_the_length_is_always_that_of_what_follows(pairs, length):
    header = "bytes=" + ",".join(f"{first}-{last}" for first, last in pairs)
    body = BODY[:length]
    representation = described(length, '"tag"', None, "a/b")
    response, content = received(ask(("range", header)), representation, body=body)
    assert int(response.headers["Content-Length"]) == len(content)
    if response.status == 206 and response.headers["Content-Range"]:
        first, last = response.headers["Content-Range"].removeprefix("bytes ").split("/")[0].split("-")
        assert content == body[int(first) : int(last) + 1]


# --- a body whose length is not known yet


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("fields", [(), (("range", "bytes=0-0"),), (("range", "bytes=99999-"),)])
def test_an_unknown_length_goes_out_in_chunks(keep_alive, fields):
    response, content = received(ask(*fields, keep_alive=keep_alive), GROWING)
    assert response.status == 200
    assert content == BODY
    expected = {**COMMON, "content-type": "application/zip", "last-modified": CHANGED}
    expected["transfer-encoding"] = "chunked"
    assert {name: value for name, value in fields_of(response).items() if name != "connection"} == expected
    assert plan(ask(*fields), GROWING, SERVED).segments == (Span(0, UNBOUNDED),)


@pytest.mark.parametrize("keep_alive", [True, False])
def test_an_unknown_length_ends_with_the_connection_for_http_1_0(keep_alive):
    response, content = received(ask(minor_version=0, keep_alive=keep_alive), GROWING)
    assert content == BODY
    assert response.headers["Connection"] == "close"
    assert response.headers["Transfer-Encoding"] is None


# --- the hot cache's head


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("minor_version", [0, 1])
@pytest.mark.parametrize("representation", [WHOLE, described(1, None, None, "a/b")])
def test_the_template_is_the_head_of_a_plain_get(keep_alive, minor_version, representation):
    template = HeadTemplate(
        representation,
        SERVED.via,
        SERVED.cache_status,
        None,
        keep_alive=keep_alive,
        minor_version=minor_version,
    )
    request = ask(keep_alive=keep_alive, minor_version=minor_version)
    assert template.whole(DATE.encode(), 42) == plan(request, representation, SERVED).head
    assert b"\r\nAge: 0\r\n" in template.whole(b"later", 0)
    assert b"\r\nDate: later\r\n" in template.whole(b"later", 0)
    first = plan(replace(request, headers=(*request.headers, ("range", "bytes=0-0"))), representation, SERVED)
    assert template.part(DATE.encode(), 42, Span(0, 1)) == first.head


def test_a_template_needs_a_length():
    with pytest.raises(AssertionError):
        HeadTemplate(GROWING, "v", "gup; hit", None, keep_alive=True, minor_version=1)


# --- problems


def refused(problem, *, keep_alive=True):
    made = refuse(problem, date=DATE, via=SERVED.via, keep_alive=keep_alive)
    assert made.close is not keep_alive
    response = http.client.HTTPResponse(Wire(wire(made)))
    response.begin()
    assert response.status == made.status
    return response, response.read()


@pytest.mark.parametrize("slug", PROBLEMS)
def test_every_problem_can_be_told(slug):
    response, body = refused(Problem(slug, "Why."))
    assert response.status == PROBLEMS[slug].status
    assert response.reason
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Content-Length"] == str(len(body))
    assert response.headers["Cache-Status"] == f"gup; detail={slug}"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Date"] == DATE
    assert response.headers["Via"] == SERVED.via
    assert response.headers["Retry-After"] is None
    assert json.loads(body) == {
        "type": f"urn:gup:problem:{slug}",
        "title": PROBLEMS[slug].title,
        "status": PROBLEMS[slug].status,
        "detail": "Why.",
    }


@pytest.mark.parametrize(("keep_alive", "connection"), [(True, "keep-alive"), (False, "close")])
def test_a_problem_says_whether_the_connection_stays(keep_alive, connection):
    response, _ = refused(Problem("not-content", "No."), keep_alive=keep_alive)
    assert response.headers["Connection"] == connection


@pytest.mark.parametrize(("seconds", "told"), [(0, "0"), (0.2, "1"), (2, "2"), (2.0001, "3"), (-1, "0")])
def test_nobody_comes_back_too_early(seconds, told):
    response, _ = refused(Problem("overloaded", "Full.", retry_after_seconds=seconds))
    assert response.headers["Retry-After"] == told


def test_a_problems_own_fields_are_told():
    problem = Problem(
        "method-not-allowed", "No.", headers=(("Allow", "GET, HEAD"), ("X", "a\r\nSet-Cookie: b"))
    )
    response, _ = refused(problem)
    assert response.headers["Allow"] == "GET, HEAD"
    assert response.headers["X"] == "a  Set-Cookie: b"
    assert response.headers["Set-Cookie"] is None


def test_extensions_are_members_that_replace_no_standard_one():
    problem = Problem("rule-refused", "No.", extensions={"rule": "version", "status": 200, "odd": {1}})
    _, body = refused(problem)
    document = json.loads(body)
    assert document["rule"] == "version"
    assert document["status"] == 403
    assert document["odd"] == "{1}"


def test_a_problems_head_is_whole_and_tells_the_bodys_length():
    made = refuse(Problem("not-content", "No."), date=DATE, via=SERVED.via, keep_alive=True)
    (body,) = made.segments
    assert made.head.endswith(b"\r\n\r\n")
    assert f"\r\nContent-Length: {len(body)}\r\n".encode() in made.head


def test_status_lines():
    assert status_line(206) == b"HTTP/1.1 206 Partial Content\r\n"


@given(st.text())
def test_no_value_ends_its_line(value):
    line = field_lines([("X", value)])
    assert line.startswith(b"X: ")
    assert line.endswith(b"\r\n")
    assert not set(line[:-2]) & {0, 10, 13}
    assert len(line) == len("X: \r\n") + len(value)


@given(st.text())
def test_any_words_are_told(detail):
    _, body = refused(Problem("bad-path", detail))
    assert json.loads(body)["detail"] == detail
