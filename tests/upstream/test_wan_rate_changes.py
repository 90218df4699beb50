"""A rate that changes: what is owed at the old one is owed at the new one, and no change gives bytes away."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.upstream import bandwidth
from gup.upstream.bandwidth import CLOCK_WORDS, Share, Turns, Wan, _Waiter, at_rate

SECOND = 1_000_000_000
NOW = 1000 * SECOND
BURST_SECONDS = 0.1
RATE = 1_000_000
PIECE = 2000

_rates = st.integers(1, 10**9)


@given(st.integers(-10 * SECOND, 10 * SECOND), _rates, _rates)
def test_the_distance_from_now_is_worth_as_many_bytes_as_before(early, old, new):
    clock = at_rate(NOW + early, NOW, old, new)
    if old == new:
        assert clock == NOW + early
    elif clock > 0:
        owed = max(early, -int(BURST_SECONDS * SECOND)) * old
        assert (clock - NOW) * new == pytest.approx(owed, abs=new)


def test_a_first_rate_changes_nothing():
    assert at_rate(NOW + SECOND, NOW, 0, RATE) == NOW + SECOND


class Node:
    """A gup whose WAN always has more to read, in steps of a millisecond."""

    def __init__(self, tmp_path, number):
        self.share, self.taken = [1], []
        words = memoryview(bytearray(8 * CLOCK_WORDS)).cast("Q")
        self.wan = Wan(words, 0, Turns.none(), lambda: self.share[0], tmp_path / f"lock{number}")
        self.waiter = _Waiter(0, 0, Share(2))
        self.wan._waiting.append(self.waiter)

    def take(self, now):
        while self.wan._try(self.waiter, PIECE) == 0:
            self.taken.append((now, PIECE))


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    now = [NOW]
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(monotonic_ns=lambda: now[0]))
    made = [Node(tmp_path, number) for number in range(2)]
    yield made, now
    for node in made:
        node.wan.close()


def run(made, now, seconds, shares):
    """`shares(at)`: those of both at this time."""
    for step in range(int(seconds * 1000)):
        now[0] += SECOND // 1000
        for node, share in zip(made, shares(step / 1000), strict=True):
            node.share[0] = share
            node.take(step / 1000)


def most_in(made, window_seconds):
    taken = sorted(row for node in made for row in node.taken)
    return max(sum(size for at, size in taken if 0 <= at - start < window_seconds) for start in range(11))


@pytest.mark.parametrize("low", [1, 10_000, 300_000])
def test_shares_that_swap_every_04_seconds_give_the_rate_and_not_more(nodes, low):
    made, now = nodes
    run(made, now, 20, lambda at: (low, RATE - low)[:: 1 if int(at / 0.4) % 2 else -1])
    whole = sum(size for node in made for _, size in node.taken)
    assert 0.97 * 20 * RATE < whole <= 20 * RATE * 1.01
    assert most_in(made, 10) <= 1.01 * 10 * RATE + 2 * BURST_SECONDS * RATE


def test_a_schedule_of_one_gup_alone_loses_no_time_when_its_rate_rises(nodes):
    (one, _), now = nodes
    run([one], now, 1, lambda _: (1000,))
    assert one.taken  # and it now owes two seconds at this rate
    one.taken.clear()
    run([one], now, 1, lambda _: (RATE,))
    assert sum(size for _, size in one.taken) >= RATE - 2 * PIECE


def test_a_waiter_looks_again_within_a_slice(nodes, monkeypatch):
    """It owes two seconds; the time that it sleeps is bounded, as the rate may change meanwhile."""
    (one, _), now = nodes
    one.share[0] = 1000
    one.take(now[0])
    assert one.wan._try(one.waiter, PIECE) > 1
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        now[0] += int(seconds * SECOND)
        one.share[0] = RATE

    monkeypatch.setattr(bandwidth, "asyncio", SimpleNamespace(sleep=sleep))
    one.wan._waiting.clear()
    coroutine = one.wan._take(PIECE, Share(2))
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert slept
    assert max(slept) <= 0.02
    assert len(slept) <= 2
