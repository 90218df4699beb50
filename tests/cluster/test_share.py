"""What a node uses of the site's rate with a grant and without, and what it asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cluster.share import NOTICED_NS, Demand, floor, granted, without_grant

RATE = 1_000_000


@given(st.lists(st.integers(0, RATE), min_size=1, max_size=16), st.integers(0, 16))
def test_those_with_grants_leave_an_equal_part_to_each_without(shares, apart):
    scale = max(1, sum(shares))
    shares = [share * RATE // scale for share in shares]
    most = len(shares) + apart
    with_grants = sum(granted(share, apart, most) for share in shares)
    assert with_grants + apart * without_grant(RATE, NOTICED_NS, most) <= RATE


def test_without_a_grant_a_node_waits_until_the_others_must_have_noticed():
    assert without_grant(RATE, NOTICED_NS - 1, 3) == floor(RATE, 3) == 3333
    assert without_grant(RATE, NOTICED_NS, 3) == 333_333
    assert without_grant(RATE, NOTICED_NS, 0) == RATE // 4, "who knows of nobody is careful"
    assert floor(50, 3) == 1, "0 would be no limit"


class Reader:
    """A node looked at every 25 ms."""

    def __init__(self):
        self.demand, self.now, self.paid = Demand(), 100.0, [0, 0, 0]

    def looks(self, count, *, reads=(0, 0, 0), waits=(), share=RATE):
        """What it wants at the end, when it reads so many bytes a second of each class."""
        for _ in range(count):
            self.now += 0.025
            self.paid = [paid + rate * 0.025 for paid, rate in zip(self.paid, reads, strict=True)]
            wanted = self.demand.look(self.now, tuple(map(int, self.paid)), frozenset(waits), share, RATE)
        return wanted


def test_a_node_with_nothing_to_do_wants_nothing():
    assert Reader().looks(50) == (0, 0, 0)


def test_demand_that_begins_wants_all_of_its_class_at_the_first_look():
    reader = Reader()
    reader.looks(50)
    assert reader.looks(1, waits=[0]) == (RATE, 0, 0)


def test_a_node_that_upstream_limits_wants_a_little_more_than_it_gets():
    wanted = Reader().looks(50, reads=(0, 100_000, 40_000), share=500_000)
    assert wanted == (0, pytest.approx(125_000, rel=0.02), pytest.approx(50_000, rel=0.02))


@pytest.mark.parametrize("waits", [(), (1,)])
def test_a_node_that_its_share_limits_wants_all_that_there_is(waits):
    assert Reader().looks(50, reads=(0, 99_000, 0), waits=waits, share=100_000) == (0, RATE, 0)


def test_demand_ends_after_a_tenth_of_a_second():
    """Not at once: an upstream's bytes come in bursts."""
    reader = Reader()
    reader.looks(50, reads=(0, RATE, 0), waits=[1])
    assert reader.looks(3)[1] > 0
    assert reader.looks(2) == (0, 0, 0)
