"""The PROXY header, read byte by byte; then connections of a proxy to a data plane."""

import asyncio
import ipaddress
import socket
import struct

import pytest
from harness.clients import proxy_header
from harness.content import content_path, noise
from harness.upstreams import Answer, ScriptedUpstream
from hypothesis import given
from hypothesis import strategies as st

from gup.errors import Problem
from gup.server.proxy_protocol import MAX_HEADER_BYTES, SIGNATURE, client_in, missing_bytes


def header(command=0x21, family=0x11, follows=bytes(12), length=None):
    return (
        SIGNATURE + struct.pack("!BBH", command, family, len(follows) if length is None else length) + follows
    )


def read(stream, step=MAX_HEADER_BYTES):
    """What a reader that gets at most `step` bytes at once finds; and what it has left unread."""
    begun = b""
    while missing := missing_bytes(begun):
        piece = stream[: min(missing, step)]
        assert piece, "the header is longer than what there is"
        begun, stream = begun + piece, stream[len(piece) :]
    return client_in(begun), stream


CLIENTS = [
    (proxy_header("10.1.2.3", 4321), ("10.1.2.3", 4321)),
    (proxy_header("2001:db8::7", 65535), ("2001:db8::7", 65535)),
    (proxy_header("::ffff:10.1.2.3", 0), ("::ffff:10.1.2.3", 0)),
    (proxy_header("10.1.2.3", 1, b"\x04\x00\x05what?"), ("10.1.2.3", 1)),
    (proxy_header("10.1.2.3", 1, bytes(MAX_HEADER_BYTES - 28)), ("10.1.2.3", 1)),
    (proxy_header(), None),
    (proxy_header(more=bytes(MAX_HEADER_BYTES - 16)), None),
    (header(0x20, 0x11), None),
    (header(0x20, 0xFF, b"x"), None),
    (header(0x21, 0x00, b""), None),
    (header(0x21, 0x31, bytes(216)), None),
]


@pytest.mark.parametrize(("text", "client"), CLIENTS)
@pytest.mark.parametrize("step", [1, 7, MAX_HEADER_BYTES])
def test_a_header_is_read_to_its_end_and_not_a_byte_further(text, client, step):
    assert read(text + b"GET / HTTP/1.1\r\n", step) == (client, b"GET / HTTP/1.1\r\n")


NOT_TO_BE_READ = [
    (b"GET / HTTP/1.1\r\n", "is missing"),
    (b"\r\n\r\nGET / HTTP/1.1", "is missing"),
    (b"\x16\x03\x01\x02\x00", "is missing"),
    (SIGNATURE[:-1] + b"\r\x21\x11", "is missing"),
    (b"PROXY TCP4 10.1.2.3 10.0.0.1 4321 80\r\n", "version 1"),
    (header(0x11), "version and command 0x11"),
    (header(0x22), "version and command 0x22"),
    (header(0x31), "version and command 0x31"),
    (header(0x20, length=MAX_HEADER_BYTES - 15), "longer than 536 bytes"),
    (header(length=65535), "longer than 536 bytes"),
    (header(family=0x12), "0x12, which is not TCP"),
    (header(family=0x41), "0x41, which is not TCP"),
    (header(follows=bytes(11)), "too short"),
    (header(family=0x21, follows=bytes(35)), "too short"),
    (header(follows=b""), "too short"),
]


@pytest.mark.parametrize(("text", "words"), NOT_TO_BE_READ)
def test_what_is_no_header_is_refused_before_more_is_read(text, words):
    with pytest.raises(Problem, match=words) as caught:
        read(text)
    assert caught.value.slug == "bad-request"
    with pytest.raises(Problem):
        read(text, step=1)


@given(
    st.ip_addresses(), st.integers(0, 65535), st.binary(max_size=MAX_HEADER_BYTES - 52), st.integers(1, 600)
)
def test_any_address_and_any_further_fields(address, port, more, step):
    (client, found), rest = read(proxy_header(str(address), port, more) + b"GET", step)
    assert (ipaddress.ip_address(client), found, rest) == (address, port, b"GET")


@given(st.binary(max_size=600) | st.binary(max_size=600).map(lambda rest: SIGNATURE + b"\x21" + rest))
def test_any_bytes_are_a_client_a_refusal_or_too_few(text):
    for end in range(len(text) + 1):
        try:
            missing = missing_bytes(text[:end])
        except Problem:
            return
        assert 0 <= missing <= MAX_HEADER_BYTES - end
        if not missing:
            client = client_in(text[:end])
            assert client is None or (ipaddress.ip_address(client[0]) and 0 <= client[1] <= 65535)
            return


# --- connections

BODY = noise("proxied", 4000)
PATH = content_path("xdelta260731001_To_260801001.dax")
GET = f"GET {PATH} HTTP/1.1\r\nHost: gup\r\n\r\n".encode()
LAST = f"GET {PATH} HTTP/1.1\r\nHost: gup\r\nConnection: close\r\n\r\n".encode()
PROXY, OTHER = "127.0.0.1", "127.0.0.2"
ALLOWED = {"allow": ["127.0.0.0/8", "10.0.0.0/8", "fd00::/8"]}


class Proxy:
    """Connections of a proxy, or of others, to a data plane; and who is a client there."""

    def __init__(self, plane):
        self.plane, self.peers = plane, []
        begin = plane.handler.access_log.begin

        def noted(peer, response):
            self.peers.append(peer)
            begin(peer, response)

        plane.handler.access_log.begin = noted

    def refused(self, reason):
        return self.plane.worker.counted("gup_connections_refused_total", reason=reason)

    @property
    def open(self):
        return self.plane.worker.counted("gup_client_connections")

    async def connect(self, source=PROXY):
        reader, writer = await asyncio.open_connection(*self.plane.address, local_addr=(source, 0))
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return reader, writer

    async def send(self, *pieces, source=PROXY):
        """All that comes to these bytes; None for a reset. A piece is read before the next is sent."""
        try:
            reader, writer = await self.connect(source)
        except ConnectionResetError:  # refused that fast
            return None
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                for _ in range(4):
                    await asyncio.sleep(0)
            return await reader.read()
        except ConnectionResetError:
            return None
        finally:
            writer.close()


@pytest.fixture
async def proxy(serving, request):
    more = {"clients": ALLOWED, "catalog": {"refresh": "0"}} | getattr(request, "param", {})
    with ScriptedUpstream() as upstream:
        upstream.answer(PATH, Answer(BODY, etag='"p"'))
        async with serving([upstream.url], listen={"proxy_protocol": [f"{PROXY}/32"]}, **more) as plane:
            made = Proxy(plane)
            assert (await made.send(LAST, source=OTHER)).endswith(BODY)
            made.peers.clear()
            yield made
            await ended(made)
            assert not plane.listener._proxied


def bodies(answer):
    return answer.count(b"HTTP/1.1 200 OK\r\n"), answer.count(b"\r\n\r\n" + BODY)


@pytest.mark.parametrize("client", ["10.1.2.3", "fd00::7"])
@pytest.mark.parametrize("size", [1, 13, 1000])
async def test_requests_behind_a_header_are_the_clients_however_they_arrive(proxy, client, size):
    stream = proxy_header(client, more=b"\x04\x00\x01x") + GET + GET + LAST
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert bodies(await proxy.send(*pieces)) == (3, 3)
    assert {*proxy.peers} <= {client}


async def test_the_address_in_the_header_is_admitted_as_at_accept(proxy):
    assert await proxy.send(proxy_header("8.8.8.8") + GET) is None
    assert proxy.refused("network") == 1
    assert bodies(await proxy.send(proxy_header("10.9.9.9") + LAST)) == (1, 1)


@pytest.mark.parametrize("local", [proxy_header(), header(0x21, 0, b"")])
async def test_a_check_of_the_proxy_itself_has_its_own_address(proxy, local):
    reader, writer = await proxy.connect()
    writer.write(local + GET)
    assert (await reader.readuntil(BODY)).startswith(b"HTTP/1.1 200")
    assert [connection.peer for connection in proxy.plane.listener._connections] == [PROXY]
    writer.close()
    await ended(proxy)


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - the data plane knows of no event to wait for
            await asyncio.sleep(0.005)


async def ended(proxy):
    await until(lambda: not proxy.open)


@pytest.mark.parametrize(
    ("source", "stream", "words"),
    [
        (PROXY, GET, b"(version 2) is missing, which listen.proxy_protocol demands"),
        (
            PROXY,
            b"PROXY TCP4 10.1.2.3 10.0.0.1 4321 80\r\n" + GET,
            b"gup reads version 2 (HAProxy: send-proxy-v2)",
        ),
        (PROXY, header(0x21, 0x12) + GET, b"which is not TCP"),
        (PROXY, header(0x21, 0x11, bytes(521)) + GET, b"longer than 536 bytes"),
        (PROXY, proxy_header("10.1.2.3") + proxy_header("10.1.2.4") + GET, b"read only where a connection"),
        (OTHER, proxy_header("10.1.2.3") + GET, b"from an address in listen.proxy_protocol"),
        (OTHER, proxy_header() + GET, b"from an address in listen.proxy_protocol"),
        (
            OTHER,
            b"PROXY TCP4 10.1.2.3 10.0.0.1 4321 80\r\n" + GET,
            b"from an address in listen.proxy_protocol",
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
async def test_a_wrong_a_missing_and_an_unexpected_header_are_bad_requests(
    proxy, source, stream, words, whole
):
    pieces = [stream] if whole else [stream[at : at + 1] for at in range(len(stream))]
    answer = await proxy.send(*pieces, source=source)
    assert answer is not None
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert bodies(answer) == (0, 0)
    if whole:
        assert words in answer
    expected = "10.1.2.3" if stream.count(SIGNATURE) == 2 else source
    assert proxy.peers == [expected]


async def test_a_header_that_does_not_come_in_a_second_ends_the_connection(proxy):
    silent, slow = await proxy.connect(), await proxy.connect()
    slow[1].write(proxy_header("10.1.2.3")[:-1])
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(10):
        assert [await reader.read() for reader, _ in (silent, slow)] == [b"", b""]
    assert asyncio.get_running_loop().time() - began > 0.9
    assert (proxy.refused("proxy"), proxy.open, proxy.peers) == (2, 0, [])
    for _, writer in (silent, slow):
        writer.close()


async def test_a_proxy_that_leaves_in_the_middle_of_a_header(proxy):
    for end in (0, 1, 15, 16, 27):
        _, writer = await proxy.connect()
        writer.write(proxy_header("10.1.2.3")[:end])
        writer.close()
    await ended(proxy)
    assert proxy.peers == []
    assert proxy.refused("proxy") == 0


@pytest.mark.parametrize("proxy", [{"clients": ALLOWED | {"max_connections_per_address": 1}}], indirect=True)
async def test_limits_of_an_address_are_the_clients_not_the_proxys(proxy):
    held = [await proxy.connect() for _ in range(3)]
    for number, (reader, writer) in enumerate(held):
        writer.write(proxy_header(f"10.0.0.{number}") + GET)
        await reader.readuntil(BODY)
    assert await proxy.send(proxy_header("10.0.0.1") + GET) is None
    assert (proxy.refused("address"), proxy.open) == (1, 3)
    for _, writer in held:
        writer.close()
    await ended(proxy)


async def test_connections_without_a_header_count_as_open_and_are_limited(proxy):
    admission = proxy.plane.listener._admission
    admission._most_here = 2
    waiting = [await proxy.connect() for _ in range(2)]
    await until(lambda: proxy.open == 2)
    assert await proxy.send(proxy_header("10.0.0.1") + GET) is None
    assert proxy.refused("limit") == 1
    admission._most_here = 3
    assert bodies(await proxy.send(proxy_header("10.0.0.1") + LAST)) == (1, 1)
    for _, writer in waiting:
        writer.close()
    await ended(proxy)


async def test_a_worker_that_leaves_waits_for_headers_and_one_that_stops_does_not(proxy):
    listener = proxy.plane.listener
    reader, writer = await proxy.connect()
    await until(lambda: listener._proxied)
    async with asyncio.timeout(10):
        leaving = asyncio.create_task(listener.leave())
        await asyncio.sleep(0)
        writer.write(proxy_header("10.1.2.3") + LAST)
        assert bodies(await reader.read()) == (1, 1)
        await leaving
    writer.close()


async def test_a_worker_that_stops_closes_connections_without_a_header(serving):
    async with serving(["http://127.0.0.1:9"], listen={"proxy_protocol": [f"{PROXY}/32"]}) as plane:
        proxy = Proxy(plane)
        reader, writer = await proxy.connect()
        await until(lambda: plane.listener._proxied)
    assert await reader.read() == b""
    writer.close()
    assert (proxy.open, proxy.refused("proxy")) == (0, 0)
