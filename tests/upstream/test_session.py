"""Connections to upstream, one exchange: pauses, strays, stale connections, framing, odd and slow heads."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from types import SimpleNamespace

import pytest
import uvloop
import yarl
from harness.content import noise
from harness.processes import free_port, quiet_clock
from harness.upstreams import Answer as Scripted
from harness.upstreams import Authority, Over, RawUpstream, Request, WebProxy, ok
from hypothesis import given
from hypothesis import strategies as st

from gup import config
from gup.upstream.connector import is_quiet
from gup.upstream.exchange import RemoteHead, UpstreamFailure, proxy_in_words
from gup.upstream.health import Sign, State, sign_of
from gup.upstream.pool import Answer, Steadiness
from gup.upstream.session import Ask, Upstream

PATH = "/content/x.dax"
BODY = noise("session", 3_000_000)
QUICK = {"name": "u", "connect_timeout": "5s", "read_timeout": "1s", "first_byte_timeout": "3s"}


@pytest.fixture
def before(pool_of) -> Callable:
    """A pool, with these settings, before an upstream that answers so."""

    @asynccontextmanager
    async def make(answer, table: dict | None = None) -> AsyncIterator[tuple]:
        with RawUpstream(answer) as upstream:
            async with pool_of({"url": upstream.url, **QUICK, **(table or {})}) as pool:
                yield upstream, pool

    return make


async def body_of(answer: Answer | RemoteHead, pause_seconds: float = 0.0) -> bytes:
    """All of it; nothing is read for `pause_seconds` after its first piece."""
    assert isinstance(answer, Answer)
    got = bytearray()
    try:
        while piece := await answer.read():
            got += piece
            await asyncio.sleep(pause_seconds)
            pause_seconds = 0.0
    finally:
        answer.close()
    return bytes(got)


async def get(pool, path: str = PATH, pause_seconds: float = 0.0, **more: object) -> bytes:
    return await body_of(await pool.ask(pool.upstreams[0], Ask(path, "fill", **more)), pause_seconds)


async def failure_of(pool) -> UpstreamFailure:
    with pytest.raises(UpstreamFailure) as caught:
        await get(pool)
    return caught.value


# --- pauses


async def test_silence_in_mid_body_ends_by_read_timeout(before):
    def half(talk: Request) -> None:
        talk.send(ok(BODY)[: len(BODY) // 2])
        talk.pause(30)

    async with before(half, {"read_timeout": "300ms"}) as (_, pool):
        answer = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
        began = time.monotonic()
        with pytest.raises(UpstreamFailure, match="read_timeout") as raised:
            await body_of(answer)
        assert raised.value.outcome == "timeout"
        assert 0.25 < time.monotonic() - began < 2


async def test_what_came_before_a_break_is_not_lost(before):
    def cut(talk: Request) -> None:
        talk.send(ok(BODY)[:400_000])
        raise Over

    async def read(answer: Answer) -> None:
        while piece := await answer.read():
            got.extend(piece)

    got = bytearray()
    async with before(cut) as (_, pool):
        answer = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
        while answer._response.content.exception() is None:  # noqa: ASYNC110 - aiohttp's own
            await asyncio.sleep(0.01)
        with pytest.raises(UpstreamFailure, match="broke off"):
            await read(answer)
        answer.close()
    assert got == BODY[: 400_000 - len(ok(b"")) - len("000000")]


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


async def test_a_head_request_that_fails_on_a_reused_connection_is_sent_again(before):
    """GET: test_a_stale_connection_is_no_failure."""

    def answer(talk: Request) -> None:
        if talk.number > 1:
            raise Over
        talk.send(ok(b"fine")[:-4])

    async with before(answer) as (upstream, pool):
        for _ in range(5):
            told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill", method="HEAD"))
            assert isinstance(told, RemoteHead)
            assert told.length == 4
        assert pool.board.get("u").state is State.UP
        assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="ok") == 5
        assert 5 <= len(upstream.seen) <= 10


@pytest.mark.parametrize("again", [close, reset, garbage])
async def test_a_failure_on_a_fresh_connection_counts_and_is_not_tried_here(before, again):
    async with before(again) as (upstream, pool):
        with pytest.raises(UpstreamFailure):
            await get(pool)
        assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="error") == 1
        assert len(upstream.seen) == 1


async def test_connections_are_given_back_whatever_comes_of_the_requests(before):
    """One connection at most: who waits for it is not told that upstream did not answer."""
    answers = itertools.cycle(
        (ok(b"fine"), b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", b"nonsense\r\n\r\n")
    )

    def answer(talk: Request) -> None:
        talk.pause(0.02)
        talk.send(next(answers))

    async with before(answer, {"max_connections": 1}) as (_, pool):
        asked = await asyncio.gather(*(get(pool) for _ in range(9)), return_exceptions=True)
        fine = [one for one in asked if one == b"fine"]
        assert len(fine) >= 3
        assert {one.outcome for one in asked if isinstance(one, UpstreamFailure)} == {"error"}
        assert not pool.upstreams[0].free.locked(), "all are given back"


async def test_who_waits_too_long_for_a_connection_is_refused_and_upstream_is_not_blamed(before):
    def answer(talk: Request) -> None:
        talk.send(ok(BODY)[:1000])
        talk.pause(30)

    table = {"name": "u", "max_connections": 1, "first_byte_timeout": "400ms", "read_timeout": "9s"}
    async with before(answer, table) as (_, pool):
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
async def test_a_body_that_can_be_framed_in_two_ways_is_an_error(before, text):
    def answer(talk: Request) -> None:
        talk.send(text)
        raise Over

    async with before(answer) as (_, pool):
        failure = await failure_of(pool)
        assert failure.slug == "upstream-error"


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
async def test_a_range_that_is_not_as_told_is_refused(before, lines, body):
    def answer(talk: Request) -> None:
        talk.send("\r\n".join(("HTTP/1.1 206 Part", *lines)).encode() + b"\r\n\r\n" + body)
        raise Over

    async with before(answer) as (_, pool):
        with pytest.raises(UpstreamFailure):
            await get(pool, start=3)


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
async def test_a_head_is_kept_as_far_as_it_can_be_passed_on(before, line, etag, modified, kind):
    async with before(lambda talk: talk.send(ok(b"fine", line))) as (_, pool):
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
async def test_what_upstream_says_is_told_in_bounds(before, text):
    def answer(talk: Request) -> None:
        talk.send(text)
        raise Over

    async with before(answer) as (_, pool):
        failure = await failure_of(pool)
    assert len(failure.detail.encode()) < 2500
    assert len(failure.detail) < 560
    assert str(failure) == failure.detail


# --- slow heads


async def test_a_head_may_take_longer_than_read_timeout(before):
    """A manager that builds a delta for 20 s, scaled."""

    def answer(talk: Request) -> None:
        talk.pause(0.5)
        talk.send(ok(b"built"))

    table = {"read_timeout": "200ms", "first_byte_timeout": "5s"}
    async with before(answer, table) as (_, pool):
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
async def test_a_head_must_be_here_within_its_limit(before, answer, reused):
    table = {"read_timeout": "5s", "first_byte_timeout": "500ms"}
    async with before(lambda talk: talk.send(ok(b"fine")), table) as (upstream, pool):
        if reused:
            assert await get(pool) == b"fine"
        upstream.reply = answer
        began, seen = time.monotonic(), len(upstream.seen)
        with pytest.raises(UpstreamFailure, match="first_byte_timeout") as raised:
            await get(pool)
        assert raised.value.outcome == "timeout"
        assert 0.45 < time.monotonic() - began < 3
        assert len(upstream.seen) - seen == 1, "a slow head is no stale connection"


async def test_an_errors_body_holds_nobody_up(before):
    def answer(talk: Request) -> None:
        talk.send(b"HTTP/1.1 404 No\r\nContent-Length: 60000\r\n\r\n")
        while True:
            talk.send(b"x")
            talk.pause(0.05)

    async with before(answer, {"read_timeout": "300ms"}) as (_, pool):
        began = quiet_clock()
        told = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
        assert told.status == 404
        assert quiet_clock() - began < 2


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


async def test_a_trickle_makes_room_when_others_wait_for_its_connection(before):
    def answer(talk: Request) -> None:
        if talk.path != PATH:
            talk.send(ok(b"fine"))
            return
        talk.send(ok(BODY)[:1000])
        while True:
            talk.send(b"x")
            talk.pause(0.05)

    table = {"name": "u", "max_connections": 1, "read_timeout": "1s", "min_rate": "1kB/s"}
    async with before(answer, table | {"first_byte_timeout": "30s"}) as (upstream, pool):
        trickle = asyncio.create_task(get(pool))
        while not upstream.seen:  # noqa: ASYNC110 - a thread's list
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(get(pool, "/content/other"), 40) == b"fine"
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
        with pytest.raises(UpstreamFailure, match="that is not a path"):
            pool.upstreams[0].url(path)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_whatever_follows_a_slash_the_authority_stays(rest):
    """As aiohttp reads the URL; without what `yarl` refuses to read at all."""
    upstream = Upstream(config.Upstream.model_validate({"url": "http://manager:8014"}), "gup", "1.1 a")
    asked = yarl.URL(upstream.url(f"/{rest}"), encoded=True)
    assert (asked.scheme, asked.host, asked.port, asked.user) == ("http", "manager", 8014, None)


# --- each way: plain, TLS, through a web proxy, TLS in a web proxy's tunnel

LOOPS = {"std": asyncio.new_event_loop, "uv": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def over(way: str, authority: Authority, pool_of: Callable, new_loop: Callable) -> Callable:
    """Runs a coroutine, on a loop of its own, with an upstream and a pool that reaches it this way."""

    def reach(answer: Callable[[Request], None], run: Callable) -> None:
        encrypted = way in ("tls", "tunnel")
        with (
            RawUpstream(answer, authority.context() if encrypted else None) as upstream,
            WebProxy() if way == "tunnel" else nullcontext() as proxy,
            asyncio.Runner(loop_factory=new_loop) as runner,
        ):
            table = {"url": upstream.url, "ca_file": str(authority.ca) if encrypted else None}
            if way == "tunnel":
                table["proxy"] = proxy.url
            elif way == "proxy":  # which answers itself
                table |= {"url": "http://127.0.0.1:9", "proxy": upstream.url}

            async def main() -> None:
                async with pool_of({**QUICK, "read_timeout": "400ms", **table}) as pool:
                    await run(pool, upstream)

            runner.run(main())

    return reach


@pytest.fixture(params=LOOPS)
def new_loop(request: pytest.FixtureRequest) -> Callable:
    return LOOPS[request.param]


@pytest.fixture(params=["plain", "proxy", "tls", "tunnel"])
def by_each_way(request: pytest.FixtureRequest, authority: Authority, pool_of, new_loop) -> Callable:
    return over(request.param, authority, pool_of, new_loop)


@pytest.fixture(params=["tls", "tunnel"])
def by_tls(request: pytest.FixtureRequest, authority: Authority, pool_of, new_loop) -> Callable:
    return over(request.param, authority, pool_of, new_loop)


def path_in(talk: Request) -> bytes:
    """Without the host that a proxy is told."""
    return b"/content/" + talk.path.partition("/content/")[2].encode()


@pytest.mark.parametrize("again", [close, reset, garbage])
def test_a_stale_connection_is_no_failure(by_each_way, again):
    def answer(talk: Request) -> None:
        if talk.number > 1:
            again(talk)
        talk.send(ok(path_in(talk)))

    async def run(pool, upstream) -> None:
        for number in range(8):
            path = f"/content/{number}"
            assert await get(pool, path) == path.encode()
        assert pool.board.get("u").state is State.UP
        assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="ok") == 8
        assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="error") == 0
        assert len(upstream.seen) > 8, "none was used again: the test tells nothing"

    by_each_way(answer, run)


def test_an_upstream_that_closes_idle_connections_is_up(by_each_way):
    """It closes 10 ms after each answer, and gup asks about then."""

    def answer(talk: Request) -> None:
        talk.send(ok(path_in(talk)))
        talk.pause(0.01)
        raise Over

    async def run(pool, _) -> None:
        for number, wait in zip(range(24), itertools.cycle([0.0, 0.008, 0.01, 0.012]), strict=False):
            path = f"/content/{number}"
            assert await get(pool, path) == path.encode()
            await asyncio.sleep(wait)
        assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="ok") == 24

    by_each_way(answer, run)


def idle_and_quiet(pool) -> list:
    """Connections in the pool over which nothing has come unasked by now."""
    idle = [one for conns in pool.upstreams[0]._session.connector._conns.values() for one, _ in conns]
    return [one for one in idle if is_quiet(SimpleNamespace(protocol=one, transport=one.transport))]


@pytest.mark.parametrize("stray", [ok(b"stray " * 20), b"no HTTP\r\n\r\n"], ids=["answer", "noise"])
def test_what_no_request_asked_for_is_nobodys_answer_by_any_way(by_each_way, stray):
    """It comes when an answer was read. The next request goes out when it has come."""
    had: set[bytes] = set()

    def answer(talk: Request) -> None:
        talk.send(ok(path_in(talk)))
        while path_in(talk) not in had:
            talk.pause(0.0005)
        talk.send(stray)

    async def run(pool, _) -> None:
        for number in range(30):
            path = f"/content/{number}"
            assert await get(pool, path) == path.encode()
            had.add(path.encode())
            while idle_and_quiet(pool):
                if number % 2:
                    await asyncio.sleep(0.0005)
                else:
                    time.sleep(0.0005)  # noqa: ASYNC251 - the loop has not seen it then
        assert pool.board.get("u").state is State.UP

    by_each_way(answer, run)


def test_pauses_of_ours_are_no_timeouts(by_each_way):
    async def run(pool, upstream) -> None:
        assert await get(pool, pause_seconds=0.5) == BODY
        await asyncio.sleep(0.5)
        assert await get(pool) == BODY
        assert upstream.connections == 1

    by_each_way(lambda talk: talk.send(ok(BODY)), run)


def say_goodbye(talk: Request) -> None:
    talk.say_goodbye()


@pytest.mark.parametrize("end", [close, say_goodbye], ids=["without close_notify", "with close_notify"])
def test_the_end_of_tls_confirms_no_bodys_end(by_tls, end):
    def answer(talk: Request) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\n\r\n" + BODY[:300_000])
        end(talk)

    async def run(pool, _) -> None:
        told = await pool.ask(pool.upstreams[0], Ask("/content/x.dax", "fill"))
        assert await body_of(told) == BODY[:300_000]
        assert not told.head.delimited

    by_tls(answer, run)


CUT = {
    "of a length": ok(BODY)[:1_000_000],
    "of chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7a120\r\n" + BODY[:500_000] + b"\r\n",
}


@pytest.mark.parametrize("text", CUT.values(), ids=CUT)
@pytest.mark.parametrize("end", [close, reset])
def test_a_body_that_is_cut_is_never_whole(by_each_way, text, end):
    def answer(talk: Request) -> None:
        talk.send(text)
        end(talk)

    async def run(pool, _) -> None:
        failure = await failure_of(pool)
        assert failure.again
        assert failure.outcome == "error"

    by_each_way(answer, run)


async def test_a_proxy_that_opens_no_tunnel_costs_connect_timeout(authority, pool_of):
    with RawUpstream(lambda talk: talk.pause(30)) as proxy:
        table = {"url": "https://127.0.0.1:9", "ca_file": str(authority.ca), "proxy": proxy.url}
        async with pool_of({**QUICK, **table, "connect_timeout": "500ms"}) as pool:
            began = quiet_clock()
            failure = await failure_of(pool)
            assert failure.outcome == "unreachable"
            assert quiet_clock() - began < 2.5
        assert [request.method for request in proxy.seen] == ["CONNECT"]


# --- a web proxy's failures are told as its own, with the setting that names it


def proxied(upstream, scheme: str) -> dict:
    proxy = upstream.url.replace("http://", "http://user:tops3cret@")
    return {"name": "manager", "url": f"{scheme}://127.0.0.1:9", "proxy": proxy}


@pytest.mark.parametrize("status", [401, 407, 502, 503])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxys_own_answer_is_told_as_the_proxys(pool_of, upstream, scheme, status):
    """To CONNECT every answer is; to a request that was to be sent on, 407 or one that says so."""
    fields = (("Proxy-Status", "squid; error=connection_refused"),)
    answer = Scripted(b"no", status, fields=fields, reason="Who are you \x1b[2J")
    for target in (f"http://127.0.0.1:9{PATH}", "127.0.0.1:9"):
        upstream.answer(target, answer)
    async with pool_of(proxied(upstream, scheme)) as pool:
        failure = await failure_of(pool)
    assert failure.slug == "upstream-unreachable"
    assert f"the web proxy http://user:***@127.0.0.1:{upstream.port} (upstream.proxy)" in failure.detail
    assert f"answered {status}" in failure.detail
    assert ("requires a user and a password" in failure.detail) == (status in (401, 407))
    assert "tops3cret" not in failure.detail
    assert failure.detail.isprintable()
    assert sign_of(failure, "manager", check=False) is Sign.AWAY


@pytest.mark.parametrize(
    ("status", "field"),
    [
        (502, ("Proxy-Status", "squid; error=connection_terminated")),
        (502, ("X-Squid-Error", "ERR_READ_ERROR 104")),
        (504, ("X-Squid-Error", "ERR_READ_TIMEOUT 0")),
        (403, ("X-Squid-Error", "ERR_ACCESS_DENIED 0")),
    ],
)
async def test_what_a_proxy_says_of_one_name_takes_the_upstream_from_nobody(pool_of, upstream, status, field):
    upstream.answer(f"http://127.0.0.1:9{PATH}", Scripted(b"no", status, fields=(field,)))
    async with pool_of(proxied(upstream, "http")) as pool:
        failure = await failure_of(pool)
        assert "upstream.proxy" in failure.detail
        assert sign_of(failure, "manager", check=False) is Sign.BROKE
        assert not pool.board.is_down("manager")


@pytest.mark.parametrize("status", [401, 403, 502])
async def test_an_answer_that_may_be_eithers_names_both(pool_of, upstream, status):
    upstream.answer(f"http://127.0.0.1:9{PATH}", Scripted(b"no", status))
    async with pool_of(proxied(upstream, "http")) as pool:
        failure = await failure_of(pool)
    assert f"manager answered {status}" in failure.detail
    assert "upstream.proxy" in failure.detail
    assert failure.status == status


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_told_as_such(pool_of, scheme, host):
    proxy = f"http://{host}:{free_port()}"
    async with pool_of({"name": "manager", "url": f"{scheme}://127.0.0.1:9", "proxy": proxy}) as pool:
        failure = await failure_of(pool)
    assert f"{proxy_in_words(proxy)} can't be reached" in failure.detail


@pytest.mark.parametrize("status", [401, 502])
async def test_without_a_proxy_none_is_named(pool_of, upstream, status):
    upstream.answer(PATH, Scripted(b"no", status, fields=(("Proxy-Status", "x"),)))
    async with pool_of({"name": "manager", "url": upstream.url}) as pool:
        failure = await failure_of(pool)
    assert failure.detail == f"manager answered {status}"
