"""Who may connect, and how often: networks, connections in all and of an address, over all workers."""

import contextlib
import re
import socket
import ssl

import psutil
import pytest
from harness.content import DELTA, content_path
from harness.processes import quiet_clock, until
from harness.service import Gup

BODY = b"d" * 5000
FULL = content_path("full.dax")


def connect(gup: Gup, source: str = "127.0.0.1", host: str = "") -> socket.socket:
    """A connection from this address; ConnectionResetError when it is refused that fast."""
    return socket.create_connection((host or gup.data[0], gup.data[1]), 10, source_address=(source, 0))


def refused(gup: Gup, source: str = "127.0.0.1", host: str = "") -> bool:
    """Whether a connection is reset before it was asked anything; else it must serve."""
    answer = b""
    try:
        with connect(gup, source, host) as sock:
            sock.sendall(f"GET {DELTA} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n".encode())
            while piece := sock.recv(65536):
                answer += piece
    except (ConnectionResetError, BrokenPipeError):
        return True
    assert answer.endswith(b"\r\n\r\n" + BODY), answer[:300]
    return False


class Held(contextlib.ExitStack):
    """Connections kept open, with half a head sent: not idle, so nobody closes them to make room."""

    def __init__(self, gup: Gup) -> None:
        super().__init__()
        self._gup, self._sockets = gup, []

    def hold(self, *sources: str) -> None:
        for source in sources:
            sock = self.enter_context(connect(self._gup, source))
            self._sockets.append(sock)
            sock.sendall(b"GET /content/x HTTP/1.1\r\nHost: g")
        self._gup.wait_metric(len(self._sockets), "gup_client_connections")

    def end_one(self) -> None:
        self._sockets.pop().close()
        self._gup.wait_metric(len(self._sockets), "gup_client_connections")

    def all_alive(self) -> bool:
        for sock in self._sockets:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.recv(1)
                return False
        return True


def refusals(gup: Gup) -> tuple[float, ...]:
    """By network, limit and address."""
    name, metrics = "gup_connections_refused_total", gup.metrics()
    return tuple(metrics(name, reason=why) for why in ("network", "limit", "address"))


def test_only_the_networks_that_are_allowed_connect(serve):
    """A socket on [::] sees IPv4 clients as ::ffff:127.0.0.2, which the IPv4 networks are meant for."""
    gup, _ = serve({DELTA: BODY}, bind="[::]:0", clients={"allow": ["127.0.0.2/31", "127.0.1.0/24", "::1"]})
    sources = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.1.77")
    assert [refused(gup, source, "127.0.0.1") for source in sources] == [True, False, False, True, False]
    assert not refused(gup, "::1", "::1")
    assert refusals(gup) == (2, 0, 0)
    assert gup.metric("gup_requests_total") == 4
    gup.reload(clients={"allow": ["127.0.0.0/8", "fc00::/7"]})
    until(lambda: refused(gup, "::1", "::1"), "the IPv6 network is refused")
    assert not refused(gup, "127.0.0.9", "127.0.0.1")


def test_who_is_no_longer_allowed_is_disconnected(serve):
    """Whatever the connection does: nothing, half a head, or a body that it reads slowly."""
    large = b"x" * 20_000_000
    gup, _ = serve({DELTA: BODY, FULL: large}, workers=2, clients={"allow": ["127.0.0.0/8"]})
    gup.serves(FULL, large)
    with contextlib.ExitStack() as stack:
        stays, *others = (stack.enter_context(connect(gup, f"127.0.0.{number}")) for number in (1, 2, 3, 4))
        others[1].sendall(b"GET /content/x HTTP/1.1\r\nHost: g")
        others[2].sendall(f"GET {FULL} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
        assert others[2].recv(1000)
        gup.reload(clients={"allow": ["127.0.0.1/32"]})
        for sock in others:
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(1 << 20):
                    got += len(piece)
            assert got < len(large)
        stays.sendall(f"GET {DELTA} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
        assert stays.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("padding", [16_200, 16_400, 18_000, 20_000])
def test_a_long_head_is_treated_alike_whether_the_body_is_hot_or_not(serve, padding):
    gup, _ = serve({DELTA: BODY, FULL: BODY}, workers=1)
    for _ in range(3):
        gup.serves(DELTA, BODY)
    statuses = set()
    for path in (DELTA, FULL):
        head = f"GET {path} HTTP/1.1\r\nHost: g\r\nX-Long: {'a' * padding}\r\n\r\n"
        with connect(gup) as sock:
            sock.sendall(head.encode())
            statuses.add((sock.recv(100).split()[1], len(head) > 16_384))
    assert statuses in ({(b"200", False)}, {(b"431", True)})


def test_a_tls_hello_is_answered_with_a_sentence(serve):
    """To the bytes that come first, and whatever line ends they contain."""
    gup, _ = serve(workers=1)
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLError), connect(gup) as sock:
        context.wrap_socket(sock, server_hostname="gup")
    for hello in (b"\x16\x03\x01\x00\x05\x01", b"\x16\x03\x01\x02\r\n\r\n", b"\x16\x03\x01\n\n"):
        with connect(gup) as sock:
            sock.sendall(hello)
            answer = b"".join(iter(lambda s=sock: s.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"TLS" in answer
        assert b"http://" in answer
    gup.wait_log("problem=bad-request")
    seconds = re.findall(r"seconds=([0-9.]+)", gup.log)
    assert seconds
    assert all(float(text) < 60 for text in seconds)


def test_connections_of_one_address_are_limited_over_all_workers_and_a_reload_changes_it(serve):
    gup, _ = serve({DELTA: BODY}, workers=3, clients={"max_connections_per_address": 6})
    with Held(gup) as held:
        held.hold(*["127.0.0.1"] * 6)
        assert [refused(gup) for _ in range(5)] == [True] * 5
        assert not refused(gup, "127.0.0.2"), "the limit is of each address"
        assert held.all_alive()
        assert refusals(gup) == (0, 0, 5)
        held.end_one()
        assert not refused(gup)
        assert gup.status()["limits"]["connections_per_address"] == {"limit": 6}
        assert gup.metric("gup_allowed_at_once", of="connections_per_address") == 6
        held.hold("127.0.0.1")
        began = quiet_clock()
        gup.reload(clients={"allow": ["127.0.0.1/32"], "max_connections_per_address": 7})
        until(lambda: refused(gup, "127.0.0.2"), "the network is refused", 5)
        until(lambda: not refused(gup), "the address may connect once more", 5)
        assert quiet_clock() - began < 4.0
        assert held.all_alive(), "who is connected stays"


def test_connections_in_all_are_limited_however_they_are_spread(serve):
    gup, _ = serve({DELTA: BODY}, workers=3, listen={"max_connections": 12})
    with Held(gup) as held:
        held.hold(*(f"127.0.0.{number + 1}" for number in range(12)))
        assert [refused(gup, f"127.0.1.{number + 1}") for number in range(6)] == [True] * 6
        assert held.all_alive()
        assert refusals(gup) == (0, 6, 0)
        assert gup.status()["limits"]["connections"] == {"limit": 12, "used": 12}
        held.end_one()
        assert not refused(gup)


def test_an_idle_connection_makes_room_for_a_new_one(serve):
    gup, _ = serve({DELTA: BODY}, workers=1, listen={"max_connections": 3})
    with Held(gup) as held:
        held.hold("127.0.0.1", "127.0.0.1")
        with connect(gup) as idle:
            gup.wait_metric(3, "gup_client_connections")
            assert not refused(gup, "127.0.0.2")
            assert idle.recv(1) == b"", "the idle one was closed cleanly"
        assert held.all_alive()
        assert refusals(gup) == (0, 0, 0)


def test_what_a_killed_worker_held_is_free_again(serve):
    limits = {"clients": {"max_connections_per_address": 8}, "listen": {"max_connections": 8}}
    gup, _ = serve({DELTA: BODY}, **limits)
    with Held(gup) as held:
        held.hold(*["127.0.0.1"] * 8)
        assert refused(gup)
        for pid in gup.workers():
            gup.kill_worker(pid)
        until(lambda: len(gup.workers()) == 2, "the workers are replaced")
        until(lambda: not refused(gup), "the killed workers' connections are forgotten")
        gup.wait_metric(0, "gup_client_connections")


def test_refusals_are_cheap(serve):
    """A flood must cost little: 70 µs each were measured, the kernel's part and a wake-up in it."""
    count = 2000
    gup, _ = serve({DELTA: BODY}, workers=1, clients={"allow": ["127.0.0.2/32"]})
    worker = psutil.Process(gup.workers()[0])

    def waiting():
        """Peers of connections that the kernel keeps. Whoever had the port before gup may have left some."""
        of_port = (c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == gup.data[1])
        return {c.raddr for c in of_port if c.status == psutil.CONN_TIME_WAIT}

    others, before = waiting(), sum(worker.cpu_times()[:2])
    for _ in range(count):
        with contextlib.suppress(ConnectionResetError):
            connect(gup).close()
    gup.wait_metric(count, "gup_connections_refused_total", reason="network")
    assert (sum(worker.cpu_times()[:2]) - before) / count < 300e-6
    assert waiting() <= others
    assert not refused(gup, "127.0.0.2")
