"""What connections share and own: which sockets are ready, and when a slice may leave."""

import asyncio
import contextlib
import socket

import pytest

from gup.server.connection import READ, WRITE, Pacer, Poller


class Socket:
    """One end of a pair, and what was told of it; it wants nothing more once it was told."""

    def __init__(self, poller, end):
        self.poller, self.end, self.events, self.told = poller, end, 0, []
        self.on_told = lambda: None

    def want(self, events):
        self.poller.watch(self.end.fileno(), self, self.events, events)
        self.events = events

    def on_ready(self, events):
        self.told.append(events)
        self.want(0)
        self.on_told()


@pytest.fixture
async def pair():
    poller, ends = Poller(asyncio.get_running_loop()), socket.socketpair()
    with ends[0], ends[1], contextlib.closing(poller):
        yield [Socket(poller, end) for end in ends]


async def told_after(one, events) -> list[int]:
    """What is told in some turns of the loop after it wants these events."""
    one.want(events)
    for _ in range(5):
        await asyncio.sleep(0)
    told, one.told = one.told, []
    return told


async def test_a_socket_is_told_what_it_asked_for_and_nothing_else(pair):
    one, other = pair
    assert await told_after(one, READ) == []
    other.end.send(b"x")
    assert await told_after(one, READ) == [READ]
    assert await told_after(one, READ) == [READ], "what was not read is told again"
    assert await told_after(one, READ | WRITE) == [READ | WRITE]
    one.want(READ)
    other.end.close()
    assert await told_after(one, 0) == [], "not of the end either"


async def test_what_is_forgotten_in_the_midst_of_a_turn_is_not_told(pair):
    one, other = pair
    one.on_told, other.on_told = (lambda it=it: it.want(0) if it.events else None for it in (other, one))
    one.want(WRITE)
    told = await told_after(other, WRITE)
    assert len(told + one.told) == 1


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


def test_small_pieces_are_charged_as_they_are_and_a_pause_gives_one_slice_of_credit():
    assert sent_in(10.0, 100_000, turn_bytes=700) == pytest.approx(1_000_000, rel=0.02)
    pacer = Pacer(100_000, 0.0)
    pacer.took(pacer.slice_bytes, 1000.0)
    assert pacer.delay_seconds(1000.0) == 0.0
    pacer.took(pacer.slice_bytes, 1000.0)
    assert pacer.delay_seconds(1000.0) == pytest.approx(0.05)


async def test_how_much_each_of_many_connections_has_unsent(serving, monkeypatch):
    """A crowd's send buffers together would take all the memory that the kernel has for TCP."""
    monkeypatch.setattr("gup.server.listener._CROWD", 2)
    async with serving(["http://127.0.0.1:9"]) as plane:
        with contextlib.ExitStack() as clients:
            for _ in range(3):
                clients.enter_context(socket.create_connection(plane.address))
                plane.listener._accept(plane.listener._sockets[0])
            unsent = sorted(
                each._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                for each in plane.listener._connections
            )
    assert unsent == [0, 0, 1 << 20]
