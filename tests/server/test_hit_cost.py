"""What a warm hit costs, counted, not timed: system calls, calls into Python, memory. Regressions fail here.

The data plane's own parts over real sockets and files, without a process: whoever adds a system call or a
lookup to the hot path comes by, and changes the figure with a reason.
"""

import asyncio
import gc
import itertools
import os
import socket
import sys
import tracemalloc
from collections import Counter

import pytest
from harness.clients import proxy_header
from harness.content import zip_of
from harness.upstreams import Answer, ScriptedUpstream

from gup.server.request import Request

TARGET = b"/content/%7B535CB6A4-441F-4E8A-A897-804CD859100E%7D/260801001/full.zip"
HITS = 50
GET = Request("GET", TARGET, 1, (), keep_alive=True)


def ask(client: int = 0, fields: bytes = b"") -> bytes:
    agent = b"User-Agent: Endpoint/14.3 (client %08d)\r\n" % client
    return b"GET " + TARGET + b" HTTP/1.1\r\nHost: gup\r\nAccept: */*\r\n" + agent + fields + b"\r\n"


class CountingSocket:
    """A socket whose calls are counted."""

    def __init__(self, sock, calls):
        self._sock, self._calls = sock, calls

    def __getattr__(self, name):
        method = getattr(self._sock, name)

        def counted(*arguments):
            self._calls[name] += 1
            return method(*arguments)

        return counted


class CountingEpoll:
    def __init__(self, epoll, calls):
        self._epoll, self._calls = epoll, calls

    def poll(self, *arguments):
        found = self._epoll.poll(*arguments)
        self._calls["epoll_wait" if found else "epoll_wait in vain"] += 1
        return found

    def __getattr__(self, name):
        if name in ("register", "modify", "unregister"):
            self._calls["epoll_ctl"] += 1
        return getattr(self._epoll, name)


class Plane:
    """One connection of a data plane whose table knows one body, and the client's end of it."""

    def __init__(self, data_plane, body):
        self.calls, self.body, self.poller = Counter(), body, data_plane.listener._context.poller
        self.log, self.counted = data_plane.handler.access_log, data_plane.worker.counted
        self.client, server = socket.socketpair()
        for end in (self.client, server):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.poller._epoll = CountingEpoll(self.poller._epoll, self.calls)
        self.listener = data_plane.listener
        self.listener._admit(server, "127.0.0.1", 1)
        (self.connection,) = data_plane.listener._connections
        self.connection._sock = CountingSocket(server, self.calls)

    async def warm(self, handler):
        """Until the table knows the body, and only what one hit costs is counted."""
        while handler.hot_cache.find_target(TARGET) is None:
            self.client.send(ask())
            got = b""
            while not got.endswith(self.body):
                got += await asyncio.get_running_loop().sock_recv(self.client, 1 << 20)
        self.second()
        self.calls.clear()
        self.hits_before, self.sent_before = self.hits, self.sent_bytes

    @property
    def hits(self) -> int:
        return sum(self.counted("gup_requests_total", result="hit", code=code) for code in ("200", "206"))

    @property
    def sent_bytes(self) -> int:
        return self.counted("gup_client_sent_bytes_total", source="cache")

    def hit(self, head: bytes) -> bytes:
        """Have one request answered in one turn of the poller; what came."""
        self.client.send(head)
        self.poller._turn()
        return self.client.recv(1 << 20)

    def second(self):
        """What is gathered of hits is told, and forgotten."""
        self.log.each_second(lambda _event: None, lambda _event: True, 0.0)


@pytest.fixture
async def plane(serving, monkeypatch, request):
    body = zip_of("hit", request.param)
    with ScriptedUpstream() as upstream:
        upstream.answer(TARGET.decode(), Answer(body, etag='"e"'))
        async with serving([upstream.url], catalog={"refresh": "0"}) as data_plane:
            made = Plane(data_plane, body)
            await made.warm(data_plane.handler)
            for name in ("pread", "sendfile"):
                monkeypatch.setattr(os, name, counted(getattr(os, name), made.calls))
            yield made
            made.client.close()
            made.poller._epoll = made.poller._epoll._epoll


def counted(function, calls):
    def call(*arguments):
        calls[function.__name__] += 1
        return function(*arguments)

    return call


def ask_range(at):
    return ask(at, b"Range: bytes=%d-%d\r\n" % (at * 512, at * 512 + 1023))


# System calls, and functions of gup that are entered, at most two more than today. What leaves at once needs
# no epoll_ctl and no look at the file; a body of few bytes is read once a second.
COSTS = [
    pytest.param(4096, lambda _: ask(), {"recv": 1, "send": 1}, 12, id="the same head"),
    pytest.param(4096, ask, {"recv": 1, "send": 1}, 13, id="heads that differ"),
    pytest.param(65536, lambda _: ask(), {"recv": 1, "send": 1, "sendfile": 1}, 15, id="64 KiB"),
    pytest.param(65536, ask_range, {"recv": 1, "send": 1, "sendfile": 1}, 18, id="ranges"),
]


def blocks_of(plane, heads):
    """So many more blocks of memory are in use after these hits."""
    gc.collect()
    blocks = sys.getallocatedblocks()
    for text in heads:
        plane.hit(text)
    plane.second()
    gc.collect()
    return sys.getallocatedblocks() - blocks


@pytest.mark.parametrize(("plane", "head", "cost", "entered"), COSTS, indirect=["plane"])
async def test_system_calls_functions_and_memory_of_a_hit(plane, head, cost, entered):
    heads = [head(at) for at in range(HITS)]
    for text in heads:
        assert plane.hit(text).startswith(b"HTTP/1.1 20")
    plane.calls.clear()
    assert calls_of(plane, heads) <= entered * HITS
    assert plane.calls == {"epoll_wait": HITS, **{name: HITS * each for name, each in cost.items()}}
    assert plane.hits - plane.hits_before == 2 * HITS
    plane.second()
    # Nothing stays of a hit. The best of some tries: what runs the tests has threads of its own.
    assert min(blocks_of(plane, heads) for _ in range(3)) < HITS // 2


@pytest.mark.parametrize("plane", [4096, 32768], indirect=True)
async def test_the_last_hit_of_a_connection(plane):
    """One that asks for its end is as cheap: its socket is closed with the answer."""
    answer = plane.hit(ask(fields=b"Connection: close\r\n"))
    top, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nConnection: close" in top
    assert body == plane.body
    assert plane.calls == {"epoll_wait": 1, "recv": 1, "send": 1, "close": 1, "pread": 1}
    assert plane.client.recv(1) == b""
    assert plane.hits - plane.hits_before == 1
    assert plane.sent_bytes - plane.sent_before == len(plane.body)


@pytest.mark.parametrize("plane", [4096], indirect=True)
async def test_the_only_hit_of_a_connection(plane):
    """Its request has arrived before it is accepted: it is answered and closed without the poller."""
    client, server = socket.socketpair()
    with client:
        client.send(ask(fields=b"Connection: close\r\n"))
        plane.listener._admit(CountingSocket(server, plane.calls), "127.0.0.1", 2)
        assert client.recv(1 << 20).endswith(b"\r\n\r\n" + plane.body)
        assert client.recv(1) == b""
    assert plane.calls == {"setblocking": 1, "fileno": 1, "recv": 1, "send": 1, "close": 1, "pread": 1}


@pytest.mark.parametrize("plane", [4096], indirect=True)
async def test_the_hit_of_a_connection_of_a_proxy(plane):
    """The PROXY header costs two calls where it begins; after it all is as for any other connection."""
    client, server = socket.socketpair()
    with client:
        client.send(proxy_header("10.1.2.3") + ask(fields=b"Connection: close\r\n"))
        plane.listener._await_header(CountingSocket(server, plane.calls), "127.0.0.1", 2)
        assert client.recv(1 << 20).endswith(b"\r\n\r\n" + plane.body)
        assert client.recv(1) == b""
    assert plane.calls == {"setblocking": 2, "fileno": 1, "recv": 3, "send": 1, "close": 1, "pread": 1}


@pytest.mark.parametrize("plane", [32768], indirect=True)
async def test_the_last_hit_of_a_connection_that_takes_it_slowly(plane):
    plane.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    answer = plane.hit(ask(fields=b"Connection: close\r\n"))
    assert len(answer) < len(plane.body)
    while piece := _received(plane):
        answer += piece
    assert answer.endswith(b"\r\n\r\n" + plane.body)
    assert b"\r\nConnection: close\r\n" in answer
    assert plane.sent_bytes - plane.sent_before == len(plane.body)


@pytest.mark.parametrize("plane", [5 << 20], indirect=True)
async def test_system_calls_of_a_large_body(plane, monkeypatch):
    """Each `sendfile` offers a whole turn, also across chunks, and none is tried that takes nothing."""
    sendfile, offered = os.sendfile, []

    def noted(out, file, offset, count):
        sent = sendfile(out, file, offset, count)  # raises if the socket takes nothing
        offered.append((offset, count, sent))
        return sent

    monkeypatch.setattr(os, "sendfile", noted)
    answer = plane.hit(ask())
    while len(answer) < len(plane.body):
        answer += _received(plane)
    assert answer.endswith(b"\r\n\r\n" + plane.body)
    assert [offset for offset, _, _ in offered] == [0, *itertools.accumulate(s for _, _, s in offered[:-1])]
    assert all(count == min(2 << 20, len(plane.body) - offset) for offset, count, _ in offered)
    assert plane.calls["recv"] == 1
    assert plane.calls["send"] == 1
    assert plane.calls["epoll_ctl"] == 2  # it waits for the socket once, until the end
    assert plane.sent_bytes - plane.sent_before == len(plane.body)


def _received(plane) -> bytes:
    """What comes next, after as many turns as that takes; empty at the end."""
    while True:
        try:
            return plane.client.recv(1 << 20)
        except BlockingIOError:
            plane.poller._turn()


def calls_of(plane, heads) -> int:
    """Functions of ours that were entered."""
    entered = 0

    def note(frame, event, argument):
        nonlocal entered
        del argument
        if event == "call" and frame.f_globals["__name__"].startswith("gup."):
            entered += 1

    sys.setprofile(note)
    try:
        for text in heads:
            plane.hit(text)
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize("plane", [4096], indirect=True)
async def test_memory_while_a_hit_is_answered(plane):
    plane.hit(ask())
    plane.client.send(ask())
    tracemalloc.start()
    try:
        plane.poller._turn()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8192  # the buffer that is received into, a list of events, and little else
    assert plane.client.recv(1 << 20)
