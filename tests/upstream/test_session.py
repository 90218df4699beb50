"""Connections to upstream, one exchange: pauses, strays, stale connections, framing, odd and slow heads."""

import asyncio
import itertools
import json
import random
import time

import pytest
import uvloop
import yarl
from harness.content import noise
from harness.upstreams import Over, RawUpstream, Request, ok
from hypothesis import given
from hypothesis import strategies as st

from gup import config
from gup.upstream.exchange import RemoteHead, UpstreamFailure
from gup.upstream.health import State
from gup.upstream.pool import Answer, Steadiness
from gup.upstream.session import Ask, Upstream

PATH = "/content/x.dax"
BODY = noise("session", 3_000_000)
QUICK = {"connect_timeout": "5s", "read_timeout": "1s", "first_byte_timeout": "3s"}


async def body_of(answer: Answer | RemoteHead) -> bytes:
    assert isinstance(answer, Answer)
    got = bytearray()
    try:
        while piece := await answer.read():
            got += piece
    finally:
        answer.close()
    return bytes(got)


async def get(pool, path: str = PATH, **more: object) -> bytes:
    return await body_of(await pool.ask(pool.upstreams[0], Ask(path, "fill", **more)))


# --- pauses


async def test_silence_in_mid_body_ends_by_read_timeout(pool_of):
    def half(talk: Request) -> None:
        talk.send(ok(BODY)[: len(BODY) // 2])
        talk.pause(30)

    with RawUpstream(half) as upstream:
        async with pool_of({"url": upstream.url, **QUICK, "read_timeout": "300ms"}) as pool:
            answer = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            began = time.monotonic()
            with pytest.raises(UpstreamFailure, match="read_timeout") as raised:
                await body_of(answer)
            assert raised.value.outcome == "timeout"
            assert 0.25 < time.monotonic() - began < 2


# --- strays


STRAY = ok(b"stray " * 20)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["std", "uv"])
def test_what_no_request_asked_for_is_nobodys_answer(pool_of, new_loop):
    """After each answer the upstream sends a second one, or a part of one: at once, or a moment later.

    The next request goes out as soon as that was sent, before the loop may have seen it.
    """
    asks, chance = 300, random.Random(300)
    said: set[str] = set()

    def answer(talk: Request) -> None:
        true = ok(talk.path.encode())
        how = chance.randrange(4)
        try:
            talk.send(true + STRAY if how == 0 else true)  # with it
            talk.pause(0.001)
            if how == 1:
                talk.send(STRAY)  # while it idles
            elif how == 2:
                talk.send(STRAY[: chance.randrange(1, 30)])  # a part of a head
        finally:
            said.add(talk.path)

    async def run(upstream: RawUpstream) -> int:
        wrong = 0
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            for number in range(asks):
                path = f"/content/{number}"
                wrong += await get(pool, path) != path.encode()
                while path not in said:  # noqa: ASYNC110 - a thread's set
                    await asyncio.sleep(0.0005)
            assert pool.board.get(pool.upstreams[0].name).state is State.UP
        return wrong

    with RawUpstream(answer) as upstream, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(run(upstream)) == 0
        assert upstream.connections < asks, "none was used again: the test tells nothing"


# --- reused connections


def close(_: Request) -> None:
    raise Over


def reset(talk: Request) -> None:
    talk.reset()


def garbage(talk: Request) -> None:
    talk.send(b"0\r\n\r\nleft over\r\n")
    raise Over


async def test_a_head_request_that_fails_on_a_reused_connection_is_sent_again(pool_of):
    """GET: test_ways."""

    def answer(talk: Request) -> None:
        if talk.number > 1:
            raise Over
        talk.send(ok(b"fine")[:-4])

    with RawUpstream(answer) as upstream:
        async with pool_of({"name": "u", "url": upstream.url, **QUICK}) as pool:
            for _ in range(5):
                told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill", method="HEAD"))
                assert isinstance(told, RemoteHead)
                assert told.length == 4
            assert pool.board.get("u").state is State.UP
            assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="ok") == 5
        assert 5 <= len(upstream.seen) <= 10


@pytest.mark.parametrize("again", [close, reset, garbage])
async def test_a_failure_on_a_fresh_connection_counts_and_is_not_tried_here(pool_of, again):
    with RawUpstream(again) as upstream:
        async with pool_of({"name": "u", "url": upstream.url, **QUICK}) as pool:
            with pytest.raises(UpstreamFailure):
                await get(pool)
            assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="error") == 1
        assert len(upstream.seen) == 1


async def test_connections_are_given_back_whatever_comes_of_the_requests(pool_of):
    """One connection at most: who waits for it is not told that upstream did not answer."""
    answers = itertools.cycle(
        (ok(b"fine"), b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", b"nonsense\r\n\r\n")
    )

    def answer(talk: Request) -> None:
        talk.pause(0.02)
        talk.send(next(answers))

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **QUICK, "max_connections": 1}) as pool:
            asked = await asyncio.gather(*(get(pool) for _ in range(9)), return_exceptions=True)
            fine = [one for one in asked if one == b"fine"]
            assert len(fine) >= 3
            assert {one.outcome for one in asked if isinstance(one, UpstreamFailure)} == {"error"}
            assert not pool.upstreams[0].free.locked(), "all are given back"


async def test_who_waits_too_long_for_a_connection_is_refused_and_upstream_is_not_blamed(pool_of):
    def answer(talk: Request) -> None:
        talk.send(ok(BODY)[:1000])
        talk.pause(30)

    table = {"name": "u", "max_connections": 1, "first_byte_timeout": "400ms", "read_timeout": "9s"}
    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **table}) as pool:
            held = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            with pytest.raises(UpstreamFailure, match="max_connections") as raised:
                await get(pool)
            assert raised.value.slug == "overloaded"
            assert pool.board.get("u").state is State.UP
            held.close()


# --- framing


def chunked(*lines: str, version: str = "1.1") -> bytes:
    head = "\r\n".join((f"HTTP/{version} 200 OK", *lines))
    return head.encode() + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


MISFRAMED = {
    "chunked twice with identity": chunked("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    "chunked twice": chunked("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "xchunked": chunked("Transfer-Encoding: xchunked"),
    "gzip, chunked": chunked("Transfer-Encoding: gzip, chunked"),
    "chunked, chunked": chunked("Transfer-Encoding: chunked, chunked"),
    "identity": chunked("Transfer-Encoding: identity"),
    "empty": chunked("Transfer-Encoding:"),
    "in 1.0": chunked("Transfer-Encoding: chunked", version="1.0"),
    "with a length": chunked("Content-Length: 5", "Transfer-Encoding: chunked"),
    "with a length after it": chunked("Transfer-Encoding: chunked", "Content-Length: 5"),
    "two lengths": ok(b"hello", "Content-Length: 6"),
    "a length twice": ok(b"hello", "Content-Length: 5"),
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
    "a signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
    "no number": b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\nhello",
    "longer, at once": ok(b"hello") + b"and more",
}


@pytest.mark.parametrize("text", MISFRAMED.values(), ids=MISFRAMED.keys())
async def test_a_body_that_can_be_framed_in_two_ways_is_an_error(pool_of, text):
    def answer(talk: Request) -> None:
        talk.send(text)
        raise Over

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            with pytest.raises(UpstreamFailure) as raised:
                await get(pool)
            assert raised.value.slug == "upstream-error"


async def test_a_body_longer_than_announced_is_refused_at_its_end(pool_of):
    def answer(talk: Request) -> None:
        talk.send(ok(BODY[:300_000]))
        talk.send(b"and more that was not announced")
        raise Over

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            answer_ = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            assert isinstance(answer_, Answer)
            await asyncio.sleep(0.1)  # all of it is here
            with pytest.raises(UpstreamFailure, match=r"more bytes than it announced|broke HTTP"):
                await body_of(answer_)


RANGES = {
    "no Content-Range": (["Content-Length: 5"], b"hello"),
    "two": (["Content-Length: 5", "Content-Range: bytes 3-7/8", "Content-Range: bytes 3-7/9"], b"hello"),
    "backwards": (["Content-Length: 5", "Content-Range: bytes 7-3/8"], b"hello"),
    "beyond the total": (["Content-Length: 5", "Content-Range: bytes 3-7/7"], b"hello"),
    "not its length": (["Content-Length: 4", "Content-Range: bytes 3-7/8"], b"hell"),
    "too long": (["Content-Range: bytes 3-7/8"], b"hello, world"),
    "too short": (["Content-Range: bytes 3-7/8"], b"he"),
    "too many chunks": (
        ["Content-Range: bytes 3-7/8", "Transfer-Encoding: chunked"],
        b"6\r\nhello!\r\n0\r\n\r\n",
    ),
}


@pytest.mark.parametrize(("lines", "body"), RANGES.values(), ids=RANGES.keys())
async def test_a_range_that_is_not_as_told_is_refused(pool_of, lines, body):
    def answer(talk: Request) -> None:
        talk.send("\r\n".join(("HTTP/1.1 206 Part", *lines)).encode() + b"\r\n\r\n" + body)
        raise Over

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            with pytest.raises(UpstreamFailure):
                await get(pool, start=3)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_end_that_only_the_connection_tells_is_not_confirmed(pool_of, version):
    def answer(talk: Request) -> None:
        talk.send(f"HTTP/{version} 200 OK\r\n\r\n".encode() + b"half of it")
        raise Over

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            assert await body_of(told) == b"half of it"
            assert not told.head.delimited
            upstream.reply = lambda talk: talk.send(chunked("Transfer-Encoding: chunked"))
            told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            assert await body_of(told) == b"hello"
            assert told.head.delimited


# --- odd heads


@pytest.mark.parametrize(
    ("line", "etag", "modified", "kind"),
    [
        ('ETag: "fine"', '"fine"', None, "application/octet-stream"),
        ('ETag: "\xff"', None, None, "application/octet-stream"),
        ('ETag: "\xc3\xa9"', None, None, "application/octet-stream"),
        ('ETag: W/"weak"', None, None, "application/octet-stream"),
        ('ETag: "a', None, None, "application/octet-stream"),
        ('ETag: "a" "b"', None, None, "application/octet-stream"),
        ('ETag: "a"\r\nETag: "b"', None, None, "application/octet-stream"),
        (f'ETag: "{"e" * 600}"', None, None, "application/octet-stream"),
        ("Last-Modified: Sun, 02 Aug 2026 10:00:00 GMT", None, "Sun, 02 Aug 2026 10:00:00 GMT", None),
        ("Last-Modified: yesterday", None, None, None),
        ("Last-Modified: \xff\xfe", None, None, None),
        ("Content-Type: text/plain", None, None, "text/plain"),
        ("Content-Type: \xe9/x", None, None, None),
        (f"Content-Type: {'t' * 600}", None, None, None),
    ],
)
async def test_a_head_is_kept_as_far_as_it_can_be_passed_on(pool_of, line, etag, modified, kind):
    with RawUpstream(lambda talk: talk.send(ok(b"fine", line))) as upstream:
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            assert isinstance(told, Answer)
            head = told.head
            assert await body_of(told) == b"fine"
        assert (head.etag, head.last_modified) == (etag, modified)
        assert head.content_type == (kind or "application/octet-stream")
        json.dumps([head.etag, head.content_type]).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"x" * 100_000,
        b"\xff" * 100_000,
        b"HTTP/1.1 200 " + b"y" * 100_000 + b"\r\n\r\n",
        ok(b"fine", f"Content-Encoding: {'z' * 5000}\xff"),
        ok(b"fine", f"Transfer-Encoding: {'z' * 5000}\xff"),
        ok(b"fine", f"Content-Type: text/html; {'z' * 5000}\xff"),
    ],
    ids=["letters", "bytes", "reason", "encoding", "transfer", "html"],
)
async def test_what_upstream_says_is_told_in_bounds(pool_of, text):
    def answer(talk: Request) -> None:
        talk.send(text)
        raise Over

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **QUICK}) as pool:
            with pytest.raises(UpstreamFailure) as raised:
                await get(pool)
    assert len(raised.value.detail.encode()) < 2500
    assert len(raised.value.detail) < 560
    assert str(raised.value) == raised.value.detail


# --- slow heads


async def test_a_head_may_take_longer_than_read_timeout(pool_of):
    """A manager that builds a delta for 20 s, scaled."""

    def answer(talk: Request) -> None:
        talk.pause(0.5)
        talk.send(ok(b"built"))

    with RawUpstream(answer) as upstream:
        table = {"url": upstream.url, "read_timeout": "200ms", "first_byte_timeout": "5s"}
        async with pool_of(table) as pool:
            assert await get(pool) == b"built"


def silent(talk: Request) -> None:
    talk.pause(30)


def continuing(talk: Request) -> None:
    while True:
        talk.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        talk.pause(0.02)


def dribbling(talk: Request) -> None:
    for letter in ok(b"fine", "X-Long: " + "x" * 3000):
        talk.send(bytes([letter]))
        talk.pause(0.02)


@pytest.mark.parametrize("answer", [silent, continuing, dribbling])
@pytest.mark.parametrize("reused", [False, True], ids=["fresh", "reused"])
async def test_a_head_must_be_here_within_its_limit(pool_of, answer, reused):
    with RawUpstream(lambda talk: talk.send(ok(b"fine"))) as upstream:
        table = {"url": upstream.url, "read_timeout": "5s", "first_byte_timeout": "500ms"}
        async with pool_of(table) as pool:
            if reused:
                assert await get(pool) == b"fine"
            upstream.reply = answer
            began, before = time.monotonic(), len(upstream.seen)
            with pytest.raises(UpstreamFailure, match="first_byte_timeout") as raised:
                await get(pool)
            assert raised.value.outcome == "timeout"
            assert 0.45 < time.monotonic() - began < 3
            assert len(upstream.seen) - before == 1, "a slow head is no stale connection"


async def test_an_errors_body_holds_nobody_up(pool_of):
    def answer(talk: Request) -> None:
        talk.send(b"HTTP/1.1 404 No\r\nContent-Length: 60000\r\n\r\n")
        while True:
            talk.send(b"x")
            talk.pause(0.05)

    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, "read_timeout": "300ms"}) as pool:
            began = time.monotonic()
            told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
            assert told.status == 404
            assert time.monotonic() - began < 2


# --- slow bodies


def test_only_waiting_for_upstream_makes_a_body_slow():
    steady = Steadiness(100, 60.0)
    for _ in range(1000):
        steady.note(0.0, 1)  # it was there already, however long nobody asked for it
    assert not steady.slow
    for _ in range(199):
        steady.note(0.3, 1)
    assert not steady.slow, "the window is not over"
    steady.note(0.4, 1)
    steady.note(0.0, 0)
    assert steady.slow is (1200 < 100 * 60.1)
    for _ in range(60):
        steady.note(1.0, 100)
    assert not steady.slow
    unlimited = Steadiness(0, 60.0)
    unlimited.note(100.0, 1)
    assert not unlimited.slow


async def test_a_trickle_makes_room_when_others_wait_for_its_connection(pool_of):
    def answer(talk: Request) -> None:
        if talk.path != PATH:
            talk.send(ok(b"fine"))
            return
        talk.send(ok(BODY)[:1000])
        while True:
            talk.send(b"x")
            talk.pause(0.05)

    table = {"name": "u", "max_connections": 1, "read_timeout": "400ms", "min_rate": "1kB/s"}
    with RawUpstream(answer) as upstream:
        async with pool_of({"url": upstream.url, **table}) as pool:
            trickle = asyncio.create_task(get(pool))
            while not upstream.seen:  # noqa: ASYNC110 - a thread's list
                await asyncio.sleep(0.01)
            assert await asyncio.wait_for(get(pool, "/content/other"), 10) == b"fine"
            with pytest.raises(UpstreamFailure, match="min_rate") as raised:
                await trickle
            assert raised.value.outcome == "timeout"
            assert pool.board.get("u").state is State.UP, "to be slow is not to be down"


# --- URLs


@pytest.mark.parametrize(
    "path",
    ["", "@evil.example:80/x", ":81/x", ".evil.example/x", "evil", "/x\r\nHost: y", "/x y", "/é", "//\0"],
)
@pytest.mark.parametrize("url", ["http://manager:8014", "https://manager", "https://[fd00::1]:8443/sepm"])
async def test_no_path_changes_the_host_that_is_asked(pool_of, url, path):
    async with pool_of({"name": "a", "url": url}) as pool:
        with pytest.raises(UpstreamFailure, match="is no path"):
            pool.upstreams[0].url(path)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_whatever_follows_a_slash_the_authority_stays(rest):
    """As aiohttp reads the URL; without what `yarl` refuses to read at all."""
    upstream = Upstream(config.Upstream.model_validate({"url": "http://manager:8014"}), "gup", "1.1 a")
    asked = yarl.URL(upstream.url(f"/{rest}"), encoded=True)
    assert (asked.scheme, asked.host, asked.port, asked.user) == ("http", "manager", 8014, None)
