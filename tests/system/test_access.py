"""Who may connect, and how often: networks, connections in all and of an address, over all workers."""

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import psutil
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.trees import DELTA
from harness.waiting import until

BODY = b"d" * 5000
HALF_A_HEAD = b"GET /content/x HTTP/1.1\r\nHost: g"


@contextmanager
def service(tmp_path, settings, **how) -> Iterator[Gup]:
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings, **how) as gup,
    ):
        upstream.answer(DELTA, Answer(BODY, etag='"d"'))
        yield gup


def connect(gup: Gup, source: str = "127.0.0.1", host: str | None = None) -> socket.socket:
    """A connection from this address; ConnectionResetError when it is refused that fast."""
    return socket.create_connection((host or gup.data[0], gup.data[1]), 10, source_address=(source, 0))


def refused(gup: Gup, source: str = "127.0.0.1", host: str | None = None) -> bool:
    """Whether a connection is reset before it was asked anything; else it must serve."""
    try:
        with connect(gup, source, host) as sock:
            sock.sendall(f"GET {DELTA} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
    except (ConnectionResetError, BrokenPipeError):
        return True
    assert answer.endswith(b"\r\n\r\n" + BODY), answer[:300]
    return False


class Held:
    """Connections that are kept open, with half a head sent: not idle, so nobody closes them to make room."""

    def __init__(self, gup: Gup) -> None:
        self._gup = gup
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._sockets:
            self.end()

    def hold(self, count: int, source: str = "127.0.0.1") -> None:
        for _ in range(count):
            sock = connect(self._gup, source)
            self._sockets.append(sock)
            sock.sendall(HALF_A_HEAD)

    def end(self) -> None:
        self._sockets.pop().close()

    def all_alive(self) -> bool:
        for sock in self._sockets:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.recv(1)
                return False
        return True


def refusals(gup: Gup) -> dict[str, float]:
    metrics = gup.metrics()
    return {
        why: metrics("gup_connections_refused_total", reason=why) for why in ("network", "limit", "address")
    }


def test_only_the_networks_that_are_allowed_connect(tmp_path):
    with service(tmp_path, {"clients": {"allow": ["127.0.0.2/31", "127.0.1.0/24"]}}) as gup:
        assert refused(gup)
        assert not refused(gup, "127.0.0.2")
        assert not refused(gup, "127.0.0.3")
        assert refused(gup, "127.0.0.4")
        assert not refused(gup, "127.0.1.77")
        assert refusals(gup) == {"network": 2, "limit": 0, "address": 0}
        assert gup.metric("gup_requests_total") == 3


def test_an_ipv6_socket_knows_both_kinds_of_addresses(tmp_path):
    """A socket on [::] sees IPv4 clients as ::ffff:127.0.0.2, which the IPv4 networks are meant for."""
    settings = {"clients": {"allow": ["127.0.0.2/32", "::1"]}}
    with service(tmp_path, settings, start=False) as gup:
        at = gup.command.index("--listen")
        gup.command[at : at + 2] = ["--listen", "[::]:0"]
        gup.start()
        assert not refused(gup, "::1", "::1")
        assert not refused(gup, "127.0.0.2", "127.0.0.1")
        assert refused(gup, "127.0.0.1", "127.0.0.1")
        assert refusals(gup) == {"network": 1, "limit": 0, "address": 0}


def test_ipv6_networks_are_refused_too(tmp_path):
    settings = {"clients": {"allow": ["127.0.0.0/8", "fc00::/7"]}}
    with service(tmp_path, settings, start=False) as gup:
        at = gup.command.index("--listen")
        gup.command[at : at + 2] = ["--listen", "[::]:0"]
        gup.start()
        assert refused(gup, "::1", "::1")
        assert not refused(gup, "127.0.0.9", "127.0.0.1")
        assert refusals(gup)["network"] == 1


def test_connections_of_one_address_are_limited_over_all_workers(tmp_path):
    with (
        service(tmp_path, {"clients": {"max_connections_per_address": 6}}, workers=3) as gup,
        Held(gup) as held,
    ):
        held.hold(6)
        gup.wait_metric(6, "gup_client_connections")
        for _ in range(5):
            assert refused(gup)
        assert not refused(gup, "127.0.0.2"), "the limit is of each address"
        assert held.all_alive()
        assert refusals(gup) == {"network": 0, "limit": 0, "address": 5}
        held.end()
        gup.wait_metric(5, "gup_client_connections")
        assert not refused(gup)
        assert gup.status()["limits"]["connections_per_address"] == {"limit": 6}
        assert gup.metric("gup_allowed_at_once", of="connections_per_address") == 6


def test_connections_in_all_are_limited_however_they_are_spread(tmp_path):
    with service(tmp_path, {"listen": {"max_connections": 12}}, workers=3) as gup, Held(gup) as held:
        for number in range(12):
            held.hold(1, f"127.0.0.{number + 1}")
        gup.wait_metric(12, "gup_client_connections")
        for number in range(6):
            assert refused(gup, f"127.0.1.{number + 1}")
        assert held.all_alive()
        assert refusals(gup) == {"network": 0, "limit": 6, "address": 0}
        assert gup.status()["limits"]["connections"] == {"limit": 12, "used": 12}
        held.end()
        gup.wait_metric(11, "gup_client_connections")
        assert not refused(gup)


def test_an_idle_connection_makes_room_for_a_new_one(tmp_path):
    with service(tmp_path, {"listen": {"max_connections": 3}}, workers=1) as gup, Held(gup) as held:
        held.hold(2)
        with connect(gup) as idle:
            gup.wait_metric(3, "gup_client_connections")
            assert not refused(gup, "127.0.0.2")
            assert idle.recv(1) == b"", "the idle one was closed cleanly"
        assert held.all_alive()
        assert refusals(gup)["limit"] == 0


def test_what_a_killed_worker_held_is_free_again(tmp_path):
    settings = {"listen": {"max_connections": 8}, "clients": {"max_connections_per_address": 8}}
    with service(tmp_path, settings, workers=2) as gup, Held(gup) as held:
        held.hold(8)
        gup.wait_metric(8, "gup_client_connections")
        assert refused(gup)
        for pid in gup.workers():
            gup.kill_worker(pid)
        until(lambda: len(gup.workers()) == 2, "the workers are replaced")
        until(lambda: not refused(gup), "the killed workers' connections are forgotten")
        gup.wait_metric(0, "gup_client_connections")


def test_a_reload_changes_who_may_connect_within_a_second(tmp_path):
    with service(tmp_path, {"clients": {"max_connections_per_address": 2}}) as gup, Held(gup) as held:
        held.hold(2)
        gup.wait_metric(2, "gup_client_connections")
        assert refused(gup)
        assert not refused(gup, "127.0.0.2")
        file = gup.folder / "gup.toml"
        file.write_text('[clients]\nallow = ["127.0.0.1/32"]\nmax_connections_per_address = 3\n')
        began = time.monotonic()
        gup.api("/api/v1/reload", method="POST")
        until(lambda: refused(gup, "127.0.0.2"), "the network is refused", 5)
        until(lambda: not refused(gup), "the address may connect once more", 5)
        assert time.monotonic() - began < 3.0
        assert held.all_alive(), "who is connected stays"


def test_refusals_are_cheap(tmp_path):
    """A flood must cost little: 70 µs each were measured, the kernel's part and a wake-up in it."""
    count = 2000
    with service(tmp_path, {"clients": {"allow": ["127.0.0.2/32"]}}, workers=1) as gup:
        worker = psutil.Process(gup.workers()[0])
        before = worker.cpu_times()
        for _ in range(count):
            with contextlib.suppress(ConnectionResetError):
                connect(gup).close()
        gup.wait_metric(count, "gup_connections_refused_total", reason="network")
        after = worker.cpu_times()
        used = after.user + after.system - before.user - before.system
        assert used / count < 300e-6
        states = [c.status for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == gup.data[1]]
        assert "TIME_WAIT" not in states
        assert not refused(gup, "127.0.0.2")
