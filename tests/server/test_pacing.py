"""Pacing of our own, and how it is chosen."""

import socket
import struct

import pytest

from gup.server import pacing
from gup.server.pacing import Pacer, Pacing, kernel_paces


def sent_in(seconds: float, per_second: int, *, late: float = 0.0, turn_bytes: int = 1 << 30) -> int:
    """What a pacer lets through when its timers are late by so much."""
    now, total = 100.0, 0
    pacer = Pacer(per_second, now)
    while now < 100.0 + seconds:
        if delay := pacer.delay_seconds(now):
            now += delay + late
            continue
        piece = min(pacer.slice_bytes, turn_bytes)
        pacer.took(piece, now)
        total += piece
    return total


@pytest.mark.parametrize("per_second", [100, 5_000, 1_000_000, 300_000_000])
@pytest.mark.parametrize("late", [0.0, 0.001, 0.02])
def test_the_rate_is_kept_though_timers_are_late(per_second, late):
    seconds = 3000.0 if per_second < 1000 else 20.0
    assert sent_in(seconds, per_second, late=late) == pytest.approx(seconds * per_second, rel=0.02)


def test_small_pieces_are_charged_as_they_are():
    assert sent_in(10.0, 100_000, turn_bytes=700) == pytest.approx(1_000_000, rel=0.02)


def test_a_pause_gives_no_more_than_one_slice_of_credit():
    pacer = Pacer(100_000, 0.0)
    pacer.took(pacer.slice_bytes, 1000.0)
    assert pacer.delay_seconds(1000.0) == 0.0
    pacer.took(pacer.slice_bytes, 1000.0)
    assert pacer.delay_seconds(1000.0) == pytest.approx(0.05)


def pair() -> tuple[socket.socket, socket.socket]:
    listening = socket.create_server(("127.0.0.1", 0))
    with listening:
        one = socket.create_connection(listening.getsockname())
        return one, listening.accept()[0]


def test_a_rate_sets_the_option_and_a_small_buffer():
    one, other = pair()
    with one, other:
        assert Pacing(1_000_000, by_kernel=True).begin(one, 0.0) is None
        told = one.getsockopt(socket.SOL_SOCKET, 47, 8)
        assert struct.unpack("=Q", told)[0] == 1_000_000
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 500_000  # the kernel doubles it
        pacer = Pacing(1_000_000, by_kernel=False).begin(other, 0.0)
        assert pacer is not None
        assert pacer.slice_bytes == 50_000


def test_no_rate_touches_nothing():
    one, other = pair()
    with one, other:
        before = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert Pacing(0, by_kernel=False).begin(one, 0.0) is None
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == before
        assert Pacing(0, by_kernel=False).grace_seconds == 0.0


def test_a_slow_rate_has_a_grace_as_long_as_its_buffer():
    assert Pacing(1000, by_kernel=True).grace_seconds == pytest.approx(32.768)
    assert Pacing(1_000_000, by_kernel=True).grace_seconds == pytest.approx(1.0)


def test_a_connection_that_the_kernel_refuses_is_paced_here(monkeypatch):
    def refuse(*_args: object) -> None:
        raise OSError(92, "Protocol not available")

    monkeypatch.setattr(pacing, "set_kernel_rate", refuse)
    one, other = pair()
    with one, other:
        assert Pacing(1_000_000, by_kernel=True).begin(one, 0.0) is not None
    assert kernel_paces() is False


def test_an_option_that_does_nothing_is_found_out(monkeypatch):
    monkeypatch.setattr(pacing, "set_kernel_rate", lambda *_: None)
    assert kernel_paces() is False


def test_this_kernel_paces():
    assert kernel_paces() is True


def test_the_older_kernels_option_has_32_bits():
    class Old:
        def __init__(self) -> None:
            self.took: list[bytes] = []

        def setsockopt(self, _level: int, _option: int, value: bytes) -> None:
            if len(value) > 4:
                raise OSError(22, "Invalid argument")
            self.took.append(value)

    old = Old()
    pacing.set_kernel_rate(old, 10**12)
    assert old.took == [struct.pack("=I", 0xFFFF_FFFE)]
