"""What the hot lane recognises without a parser: always what the parser would have said, or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.errors import Problem
from gup.server.plain import PLAIN_HEAD, without_close
from gup.server.request import parse_head

TARGET = b"/content/%7B535CB6A4-441F-4E8A-A897-804CD859100E%7D/260801001/full.zip"
FIELDS = [
    b"Host: gup:2967",
    b"host:[::1]:80",
    b"Host: a b",
    b"Accept: */*",
    b"User-Agent: Endpoint/14.3 (client \xe9)",
    b"User-agent: x",
    b"X-Client-Version:14.3.4615.2000\t",
    b"Cache-Control: no-cache",
    b"Connection: Keep-Alive",
    b"Connection: close",
    b"connection: keep-alive, close",
    b"Proxy-Connection: close",
    b"Range: bytes=0-99",
    b"range:bytes=5-",
    b"Range: bytes=-5",
    b"Range: bytes=0-1,5-6",
    b"Range: lines=1-2",
    b'If-Range: "a"',
    b'If-None-Match: "a"',
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"Upgrade: h2c",
    b"Expect: 100-continue",
    b"Via: 1.1 other",
    b"Bad Name: x",
    b" folded",
    b"A:\x00",
    b"A: b\nC: d",
    b"B:",
    b":",
]


def head(line: bytes, fields: list[bytes]) -> bytes:
    return b"\r\n".join([line, *fields]) + b"\r\n\r\n"


def agrees(text: bytes) -> bool:
    """Whether it was recognised; AssertionError when the parser sees it otherwise."""
    found = PLAIN_HEAD.fullmatch(text)
    if found is None:
        return False
    request = parse_head(text)
    assert (request.method, request.target, request.minor_version) == ("GET", found[1], 1)
    assert request.keep_alive
    assert request.header("via") is None
    positions = [position.decode() for position in found.groups()[1:] if position is not None]
    ranged = bool(positions)
    spelled = [f"bytes={'-'.join(positions[at : at + 2])}" for at in range(0, len(positions), 2)]
    assert request.header("range") == (", ".join(spelled) or None)
    assert request.plain is not ranged
    assert request.header("if-range") is None
    return True


@given(st.lists(st.sampled_from(FIELDS), max_size=8))
def test_what_is_recognised_is_what_the_parser_sees(fields):
    agrees(head(b"GET " + TARGET + b" HTTP/1.1", fields))


@given(st.lists(st.sampled_from(FIELDS[:13]), max_size=6))
def test_without_the_field_that_ends_the_connection_it_is_the_same_request(fields):
    text = head(b"GET " + TARGET + b" HTTP/1.1", [b"Host: gup", *fields])
    rest = without_close(text)
    if rest is not None and agrees(rest):
        request, last = parse_head(rest), parse_head(text)
        assert (request.target, request.header("range")) == (last.target, last.header("range"))
        assert not last.keep_alive


@pytest.mark.parametrize(
    ("fields", "closes"),
    [
        ([b"Connection: close"], True),
        ([b"Accept: */*", b"connection:\tClose "], True),
        ([b"Connection: keep-alive", b"Connection: close"], True),
        ([b"Connection: close", b"Connection: close"], False),
        ([b"Connection: close, upgrade"], False),
        ([b"Connection: keep-alive"], False),
        ([b"X-Connection: close"], False),
    ],
)
def test_the_field_that_ends_the_connection(fields, closes):
    assert (without_close(head(b"GET /a HTTP/1.1", [b"Host: gup", *fields])) is not None) is closes


@given(st.lists(st.sampled_from(FIELDS[:10]), max_size=4), st.binary(min_size=1, max_size=3), st.data())
def test_nor_do_changed_bytes_lead_it_astray(fields, change, data):
    text = head(b"GET " + TARGET + b" HTTP/1.1", [b"Host: gup", *fields])
    at = data.draw(st.integers(0, len(text)))
    agrees(text[:at] + change + text[at + data.draw(st.integers(0, 3)) :])


@pytest.mark.parametrize(
    ("line", "fields", "recognised"),
    [
        (b"GET /a HTTP/1.1", [b"Host: gup"], True),
        (b"GET /a HTTP/1.1", [b"Accept: */*", b"User-Agent: x", b"Host: gup", b"Accept-Language: fr"], True),
        (b"GET /a HTTP/1.1", [b"Host: gup", b"Range: bytes=0-99", b"Accept: */*"], True),
        (b"GET /a HTTP/1.1", [b"Range: bytes=0-99", b"Accept: */*", b"Host: gup"], True),
        (b"GET /a HTTP/1.1", [], False),
        (b"GET /a HTTP/1.1", [b"Host: a", b"Host: b"], False),
        (b"GET /a HTTP/1.1", [b"Host: a", b"Range: bytes=0-1", b"Range: bytes=2-3"], False),
        (b"GET /a HTTP/1.1", [b"Host: a", b"If-None-Match: x"], False),
        (b"GET /a HTTP/1.1", [b"Host: a", b"Via: 1.1 x"], False),
        (b"GET /a HTTP/1.1", [b"Host: a", b"Connection: close"], False),
        (b"GET /a HTTP/1.0", [b"Host: a"], False),
        (b"HEAD /a HTTP/1.1", [b"Host: a"], False),
        (b"GET http://gup/a HTTP/1.1", [b"Host: gup"], False),
        (b"GET /a HTTP/1.1", [b"Host: a", *[b"A: b"] * 120], False),
    ],
)
def test_the_ordinary_is_recognised_and_the_rest_is_left_to_the_parser(line, fields, recognised):
    assert agrees(head(line, fields)) is recognised


def test_two_heads_are_not_one():
    text = head(b"GET /a HTTP/1.1", [b"Host: gup"])
    assert agrees(text)
    assert not agrees(text + text)
    with pytest.raises(Problem):
        parse_head(text + text)
