"""The poller: who is told of what."""

import asyncio
import socket

import pytest

from gup.server.poller import READ, WRITE, Poller


class Socket:
    """One end of a pair, and what was told of it."""

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
async def poller():
    made = Poller(asyncio.get_running_loop())
    yield made
    made.close()


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    one.setblocking(False)
    yield one, other
    one.close()
    other.close()


async def turn():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_socket_is_told_what_it_asked_for_and_nothing_else(poller, pair):
    one = Socket(poller, pair[0])
    one.want(READ)
    await turn()
    assert one.told == []
    pair[1].send(b"x")
    await turn()
    assert one.told == [READ]
    one.want(READ | WRITE)
    await turn()
    assert one.told == [READ, READ | WRITE]


async def test_what_was_not_read_is_told_again(poller, pair):
    one = Socket(poller, pair[0])
    pair[1].send(b"x")
    for _ in range(3):
        one.want(READ)
        await turn()
    assert one.told == [READ] * 3


async def test_who_wants_nothing_is_not_told_of_the_end_either(poller, pair):
    one = Socket(poller, pair[0])
    one.want(READ)
    one.want(0)
    pair[1].close()
    await turn()
    assert one.told == []


async def test_what_is_forgotten_in_the_midst_of_a_turn_is_not_told(poller, pair):
    both = [Socket(poller, end) for end in pair]
    for one, other in (both, both[::-1]):
        one.end.setblocking(False)
        one.on_told = lambda other=other: other.want(0) if other.events else None
    for one in both:
        one.want(WRITE)
    await turn()
    assert sum(len(one.told) for one in both) == 1
