"""The TCP window of a connection to upstream: what the rate needs over the round trip, and no more."""

import fcntl
import socket
import struct
import termios
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from harness.private import private_turns

from gup.upstream import bandwidth
from gup.upstream.bandwidth import CLOCK_WORDS, ReceiveWindow, Wan, window_bytes

KB, MIB, UNBOUNDED = 1000, 1 << 20, 1 << 30
SEGMENT = 1448
SO_BUF_LOCK, RECEIVE_LOCK = 72, 2


@pytest.mark.parametrize(
    ("rate", "round_trip", "segment", "readers", "expected"),
    [
        (0, 0.6, SEGMENT, 1, UNBOUNDED),
        (800 * KB, 0.6, SEGMENT, 1, 560 * KB),
        (800 * KB, 0.6, SEGMENT, 8, 490 * KB),
        (250 * KB, 0.02, SEGMENT, 1, 30 * KB),
        (250 * KB, 7.0, SEGMENT, 1, 525 * KB),  # no link is that long: the upstream took its time
        (10 * KB, 0.02, SEGMENT, 1, 8 * 1024),
        (10 * KB, 0.02, 32 * KB, 1, 64 * KB),  # loopback's segments: less than two would wait for a timer
        (100_000 * KB, 0.001, SEGMENT, 1, 100 * KB + 2 * MIB),
        (100_000 * KB, 0.6, SEGMENT, 1, 8 * MIB),
    ],
)
def test_a_window_is_the_rate_times_the_round_trip_and_a_little(rate, round_trip, segment, readers, expected):
    assert window_bytes(rate, round_trip, segment, readers) == expected


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket and its server's, over loopback."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


@contextmanager
def window_of(client: socket.socket, rate: list[int], tmp_path) -> Iterator[ReceiveWindow]:
    words = memoryview(bytearray(8 * CLOCK_WORDS)).cast("Q")
    wan = Wan(words, 0, private_turns(), lambda: rate[0], tmp_path / "wan.lock")
    with closing(wan):
        yield ReceiveWindow(wan, client)


def buffer_bytes(client: socket.socket) -> int:
    """What it was set to; the kernel doubles that."""
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


def clamp_bytes(client: socket.socket) -> int:
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)


def is_held(client: socket.socket) -> bool:
    """Whether the kernel's tuning leaves the receive buffer alone."""
    return bool(client.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK) & RECEIVE_LOCK)


def expected_bytes(client: socket.socket, rate: int) -> int:
    """By the kernel's tcpi_rcv_mss, and the longer of tcpi_rtt and tcpi_rcv_rtt."""
    fields = struct.unpack("=8x22I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 96))
    return window_bytes(rate, max(fields[15], fields[21]) / 1e6, fields[3], 1)


def test_the_buffer_follows_the_rate(tmp_path):
    rate = [1_000 * KB]
    with connected() as (client, _), window_of(client, rate, tmp_path) as window:
        for now in (1_000 * KB, 1_900 * KB, 700 * KB):
            rate[0] = now
            window.follow()
            assert buffer_bytes(client) == pytest.approx(expected_bytes(client, now), rel=1 / 8)
            assert is_held(client)
            assert clamp_bytes(client) >= 2 * buffer_bytes(client)


def test_the_kernel_tunes_what_can_not_be_set_or_has_no_limit(tmp_path, monkeypatch):
    """As net.core.rmem_max has it, 212,992 on most machines: a limit of ours would starve a long link."""
    monkeypatch.setattr(bandwidth, "_most_buffer_bytes", lambda: 212_992)
    rate = [100 * KB]
    with connected() as (client, _), window_of(client, rate, tmp_path) as window:
        for now, held in ((4_000 * KB, False), (100 * KB, True), (0, False), (200 * KB, True)):
            rate[0] = now
            window.follow()
            assert is_held(client) is held


def test_an_answer_after_the_limit_was_lifted_has_the_kernels_buffer(tmp_path):
    """The connection is the same one, its buffer that of an answer before."""
    with connected() as (client, _):
        with window_of(client, [100 * KB], tmp_path):
            assert is_held(client)
        with window_of(client, [0], tmp_path):
            assert not is_held(client)


@pytest.mark.parametrize(("rate", "most"), [(1_000 * KB, 400 * KB), (200 * KB, 200 * KB)])
def test_little_is_unread_in_the_kernel_however_much_upstream_sends(tmp_path, rate, most):
    with connected() as (client, server), window_of(client, [rate], tmp_path) as window:
        server.setblocking(False)
        sent = 0
        for _ in range(200):
            with suppress(BlockingIOError):
                while True:
                    sent += server.send(bytes(MIB))
            sent -= len(client.recv(256 * 1024))
            window.follow()
        unread = struct.unpack("i", fcntl.ioctl(client, termios.FIONREAD, bytes(4)))[0]
        assert sent > MIB
        assert 0 < unread <= most


def test_a_closed_connection_is_left_alone(tmp_path):
    rate = [1_000 * KB]
    with connected() as (client, _), window_of(client, rate, tmp_path) as window:
        client.close()
        for rate[0] in (2_000 * KB, 0):
            window.follow()
