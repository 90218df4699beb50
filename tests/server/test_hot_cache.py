"""The hot cache: what makes it forget, and which heads it recognises without a parser."""

import errno
import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.errors import Problem
from gup.server.hot_cache import PLAIN_HEAD, HotCache, HotRow
from gup.server.ranges import Span
from gup.server.request import parse_head


class Row:
    """As much of a HotRow as the cache looks at."""

    class entry:  # noqa: N801 - an attribute
        all_verified = True
        fd = 0

    fresh_until = None
    used = True
    length = 100
    whole = Span(0, 100)
    client = None
    small = True


@pytest.fixture
def epochs():
    return {"policy": 1, "store": 1}


@pytest.fixture
def cache(epochs):
    return HotCache(lambda: (epochs["policy"], epochs["store"]), lambda: None)


def test_a_decision_made_before_the_settings_came_is_not_learned_after(cache):
    """The policy's epoch rises when settings are sent; they arrive later, and `drop` is called then."""
    before = cache.epochs
    cache.drop()
    cache.learn(b"head", b"/x", Row(), before)
    assert cache.find_target(b"/x") is None
    cache.learn(b"head", b"/x", Row(), cache.epochs)
    assert cache.find_target(b"/x") is not None
    assert cache.look_up(b"head") is not None


def test_the_policys_epoch_and_new_settings_drop_the_table(cache, epochs):
    cache.learn(None, b"/x", Row(), cache.epochs)
    epochs["policy"] += 1
    assert cache.find_target(b"/x") is None
    cache.learn(b"head", b"/x", Row(), cache.epochs)
    assert cache.look_up(b"head") is not None, "learned under the new epoch, perhaps by the old settings"
    cache.drop()
    assert cache.look_up(b"head") is None


def test_an_entry_that_is_doubted_is_not_answered_hot(cache):
    row = Row()
    row.entry = type("entry", (), {"all_verified": False, "fd": 0})
    cache.learn(None, b"/x", row, cache.epochs)
    assert cache.find_target(b"/x") is None


@pytest.mark.parametrize("read", [OSError(errno.EIO, "broken"), b"short"])
def test_a_small_body_that_can_not_be_read_is_not_answered_hot_and_its_entry_is_told(monkeypatch, read):
    told = []
    entry = SimpleNamespace(fd=0, available=lambda *_: 100, unreadable=lambda: told.append(True))

    def pread(*_):
        if isinstance(read, OSError):
            raise read
        return read

    row = object.__new__(HotRow)
    row.entry, row.length = entry, 100
    monkeypatch.setattr(os, "pread", pread)
    assert row.read() is None
    assert told == [True]


# --- plain heads

TARGET = b"/content/%7B535CB6A4-441F-4E8A-A897-804CD859100E%7D/260801001/full.zip"
FIELDS = [b"Host: gup:2967", b"host:[::1]:80", b"Host: a b", b"Accept: */*", b"User-agent: x"]
FIELDS += [b"User-Agent: Endpoint/14.3 (client \xe9)", b"X-Client-Version:14.3.4615.2000\t"]
FIELDS += [b"Cache-Control: no-cache", b"Connection: Keep-Alive", b"Connection: close"]
FIELDS += [b"connection: keep-alive, close", b"Proxy-Connection: close", b"Range: bytes=0-99"]
OTHERS = [
    b"range:bytes=5-",
    b"Range: bytes=-5",
    b"Range: bytes=0-1,5-6",
    b"Range: lines=1-2",
    b'If-Range: "a"',
]
OTHERS += [b'If-None-Match: "a"', b"Content-Length: 0", b"Content-Length: 5", b"Transfer-Encoding: chunked"]
OTHERS += [b"Upgrade: h2c", b"Expect: 100-continue", b"Via: 1.1 other", b"Bad Name: x", b" folded"]
OTHERS += [b"A:\x00", b"A: b\nC: d", b"B:", b":"]


def head(line: bytes, fields: list[bytes]) -> bytes:
    return b"\r\n".join([line, *fields]) + b"\r\n\r\n"


def knowing(target: bytes) -> HotCache:
    cache = HotCache(lambda: (1, 1), lambda: None)
    cache.learn(None, target, Row(), cache.epochs)
    return cache


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


@given(st.lists(st.sampled_from(FIELDS), max_size=6))
def test_what_is_found_is_what_the_parser_sees(fields):
    text = head(b"GET " + TARGET + b" HTTP/1.1", [b"Host: gup", *fields])
    found = knowing(TARGET).look_up(text)
    if found is None:
        return
    row, span, client, last = found
    request = parse_head(text)
    assert request.target == TARGET
    assert request.keep_alive is not last
    assert client == text
    if span is row.whole:
        assert request.header("range") is None
    else:
        assert not last
        assert request.header("range") == f"bytes={span.start}-{span.stop - 1}"


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
    found = knowing(b"/a").look_up(head(b"GET /a HTTP/1.1", [b"Host: gup", *fields]))
    assert (found is not None and found[3]) is closes


@given(st.lists(st.sampled_from(FIELDS + OTHERS), max_size=8), st.binary(max_size=3), st.data())
def test_what_is_recognised_is_what_the_parser_sees_whatever_bytes_are_changed(fields, change, data):
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
