"""Connections by each way to an upstream: plain, TLS, through a web proxy, TLS in a web proxy's tunnel."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import uvloop
from harness.content import noise
from harness.upstreams import Authority, Over, RawUpstream, Request, WebProxy, ok

from gup.upstream.connector import is_quiet
from gup.upstream.exchange import UpstreamFailure
from gup.upstream.health import State
from gup.upstream.pool import Answer
from gup.upstream.session import Ask

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler

QUICK = {"name": "u", "connect_timeout": "5s", "read_timeout": "400ms", "first_byte_timeout": "3s"}
BODY = noise("ways", 3_000_000)
WAYS = ["plain", "proxy", "tls", "tunnel"]
LOOPS = {"std": asyncio.new_event_loop, "uv": uvloop.new_event_loop}


@dataclass
class Reached:
    upstream: RawUpstream
    table: dict
    """Settings that lead there."""


Reach = Callable[[Callable[[Request], None]], AbstractContextManager[Reached]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@contextmanager
def reach(way: str, authority: Authority, answer: Callable[[Request], None]) -> Iterator[Reached]:
    encrypted = way in ("tls", "tunnel")
    with RawUpstream(answer, authority.context() if encrypted else None) as upstream:
        table = {"url": upstream.url, "ca_file": str(authority.ca) if encrypted else None, **QUICK}
        if way == "tunnel":
            with WebProxy() as proxy:
                yield Reached(upstream, table | {"proxy": proxy.url})
        elif way == "proxy":  # which answers itself
            yield Reached(upstream, table | {"url": "http://127.0.0.1:9", "proxy": upstream.url})
        else:
            yield Reached(upstream, table)


@pytest.fixture(params=WAYS)
def reached(request: pytest.FixtureRequest, authority: Authority) -> Reach:
    return lambda answer: reach(request.param, authority, answer)


@pytest.fixture(params=["tls", "tunnel"])
def reached_by_tls(request: pytest.FixtureRequest, authority: Authority) -> Reach:
    return lambda answer: reach(request.param, authority, answer)


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as made:
        yield made


async def body_of(answer: object, pause_seconds: float = 0.0) -> bytes:
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


async def get(pool, path: str = "/content/x.dax", pause_seconds: float = 0.0) -> bytes:
    return await body_of(await pool.ask(pool.upstreams[0], Ask(path, "fill")), pause_seconds)


def path_in(talk: Request) -> bytes:
    """Without the host that a proxy is told."""
    return b"/content/" + talk.path.partition("/content/")[2].encode()


def close(_: Request) -> None:
    raise Over


def reset(talk: Request) -> None:
    talk.reset()


def garbage(talk: Request) -> None:
    talk.send(b"0\r\n\r\nleft over\r\n")
    raise Over


@pytest.mark.parametrize("again", [close, reset, garbage])
def test_a_stale_connection_is_no_failure(reached, pool_of, runner, again):
    def answer(talk: Request) -> None:
        if talk.number > 1:
            again(talk)
        talk.send(ok(path_in(talk)))

    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
            for number in range(8):
                path = f"/content/{number}"
                assert await get(pool, path) == path.encode()
            assert pool.board.get("u").state is State.UP
            assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="ok") == 8
            assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="error") == 0

    with reached(answer) as at:
        runner.run(run(at.table))
        assert len(at.upstream.seen) > 8, "none was used again: the test tells nothing"


def test_an_upstream_that_closes_idle_connections_is_up(reached, pool_of, runner):
    """It closes 10 ms after each answer, and gup asks about then."""

    def answer(talk: Request) -> None:
        talk.send(ok(path_in(talk)))
        talk.pause(0.01)
        raise Over

    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
            for number, wait in zip(range(24), itertools.cycle([0.0, 0.008, 0.01, 0.012]), strict=False):
                path = f"/content/{number}"
                assert await get(pool, path) == path.encode()
                await asyncio.sleep(wait)
            assert pool._counters.get("gup_upstream_requests_total", upstream="u", outcome="ok") == 24

    with reached(answer) as at:
        runner.run(run(at.table))


def idle_and_quiet(pool) -> "list[ResponseHandler]":
    """Connections in the pool over which nothing has come unasked by now."""
    idle = [one for conns in pool.upstreams[0]._session.connector._conns.values() for one, _ in conns]
    return [one for one in idle if is_quiet(SimpleNamespace(protocol=one, transport=one.transport))]


@pytest.mark.parametrize("stray", [ok(b"stray " * 20), b"no HTTP\r\n\r\n"], ids=["answer", "noise"])
def test_what_no_request_asked_for_is_nobodys_answer(reached, pool_of, runner, stray):
    """It comes when an answer was read. The next request goes out when it has come."""
    had: set[bytes] = set()

    def answer(talk: Request) -> None:
        talk.send(ok(path_in(talk)))
        while path_in(talk) not in had:
            talk.pause(0.0005)
        talk.send(stray)

    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
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

    with reached(answer) as at:
        runner.run(run(at.table))


def test_pauses_of_ours_are_no_timeouts(reached, pool_of, runner):
    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
            assert await get(pool, pause_seconds=0.5) == BODY
            await asyncio.sleep(0.5)
            assert await get(pool) == BODY

    with reached(lambda talk: talk.send(ok(BODY))) as at:
        runner.run(run(at.table))
        assert at.upstream.connections == 1


def say_goodbye(talk: Request) -> None:
    talk.say_goodbye()


@pytest.mark.parametrize("end", [close, say_goodbye], ids=["without close_notify", "with close_notify"])
def test_the_end_of_tls_confirms_no_bodys_end(reached_by_tls, pool_of, runner, end):
    def answer(talk: Request) -> None:
        talk.send(b"HTTP/1.1 200 OK\r\n\r\n" + BODY[:300_000])
        end(talk)

    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
            told = await pool.ask(pool.upstreams[0], Ask("/content/x.dax", "fill"))
            assert await body_of(told) == BODY[:300_000]
            assert not told.head.delimited

    with reached_by_tls(answer) as at:
        runner.run(run(at.table))


CUT = {
    "of a length": ok(BODY)[:1_000_000],
    "of chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7a120\r\n" + BODY[:500_000] + b"\r\n",
}


@pytest.mark.parametrize("text", CUT.values(), ids=CUT)
@pytest.mark.parametrize("end", [close, reset])
def test_a_body_that_is_cut_is_never_whole(reached, pool_of, runner, text, end):
    def answer(talk: Request) -> None:
        talk.send(text)
        end(talk)

    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
            with pytest.raises(UpstreamFailure) as raised:
                await get(pool)
            assert raised.value.again
            assert raised.value.outcome == "error"

    with reached(answer) as at:
        runner.run(run(at.table))


def test_a_proxy_that_opens_no_tunnel_costs_connect_timeout(authority, pool_of, runner):
    async def run(table: dict) -> None:
        async with pool_of(table) as pool:
            began = time.monotonic()
            with pytest.raises(UpstreamFailure) as raised:
                await get(pool)
            assert raised.value.outcome == "unreachable"
            assert time.monotonic() - began < 2.5

    with RawUpstream(lambda talk: talk.pause(30)) as proxy:
        table = {"url": "https://127.0.0.1:9", "ca_file": str(authority.ca), "proxy": proxy.url}
        runner.run(run(QUICK | table | {"connect_timeout": "500ms"}))
        assert [request.method for request in proxy.seen] == ["CONNECT"]
