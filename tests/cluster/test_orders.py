"""Orders: gaps, losses, any order and any clock; and that no body outlives an order that its node knows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gup.cluster.orders import (
    KEPT_SECONDS,
    MAX_KNOWN,
    KnownText,
    Order,
    OrderLog,
    covers,
    knows,
    read_order,
    stamped,
    unstamped,
    write_order,
)

NOW = 2_000_000.0
LATE = int(NOW * 1000) + 10


def order(node, number, after=0, action="purge", at=NOW, **what):
    return Order(node, number, after, at, action, what)


def test_an_order_is_the_same_when_it_was_written_and_read():
    one = order("x", 7, 3, key="a/b/c/d/e")
    assert read_order(write_order(one)) == one
    for text in (
        "",
        "{}",
        "\ud800",
        write_order(one).replace("purge", "later"),
        write_order(order("a b", 1)),
    ):
        assert read_order(text) is None


def test_numbers_grow_with_the_time_and_never_fall():
    log = OrderLog("a")
    first, second = log.write(NOW, "purge", {}), log.write(NOW - 3600, "purge", {})
    assert (first.number, first.after) == (NOW * 1000, 0)
    assert (second.number, second.after) == (first.number + 1, first.number)
    assert log.known(NOW) == f"a={second.number}"


@pytest.mark.parametrize(
    ("text", "number", "is_known"),
    [
        ("b=5+9", 5, True),
        ("b=5+9", 7, False),
        ("b=5+9", 9, True),
        ("b=5+9", 10, False),
        ("a=9", 1, False),
        ("", 1, False),
        ("b=x b=7", 7, True),
        ("b=5++ +b", 5, False),
    ],
)
def test_what_is_known_is_a_number_for_each_writer_and_single_ones(text, number, is_known):
    assert knows(text, "b", number) is is_known


def test_what_another_does_not_know_is_counted_while_it_holds():
    log = OrderLog("a")
    first, _, third = (log.write(NOW + n, "purge", {}) for n in range(3))
    assert [log.unknown_to(known, NOW) for known in ("", f"a={first.number}", log.known(NOW))] == [3, 2, 0]
    assert log.unknown_to(f"a={first.number}+{third.number}", NOW) == 1
    assert log.unknown_to("", NOW + KEPT_SECONDS + 1.5) == 1, "the first two are over"


def test_a_gap_is_seen_and_filled():
    log = OrderLog("a")
    assert log.take(order("b", LATE, 0), NOW)
    assert log.take(order("b", LATE + 9, LATE + 5), NOW)
    assert log.take(order("b", LATE + 12, LATE + 9), NOW)
    assert not log.take(order("b", LATE + 9, LATE + 5), NOW), "known"
    assert (log.known(NOW), log.has_gap(NOW)) == (f"b={LATE}+{LATE + 9}-{LATE + 12}", True)
    log.take(order("b", LATE + 5, LATE), NOW)
    assert (log.known(NOW), log.has_gap(NOW)) == (f"b={LATE + 12}", False)


@pytest.mark.parametrize(
    ("text", "other", "is_covered"),
    [
        ("b=9", "b=5+9", True),
        ("b=5+9", "b=9", False),  # it lacks what is between 5 and 9
        ("b=5+9-12", "b=5+9+11", True),
        ("b=5+9+11", "b=5+9-11", False),
        ("b=5+9-12", "b=5+8-10", False),
        ("", "b=0+3", False),
        ("b=3", "", True),
        ("", "c=0", True),
    ],
)
def test_who_lacks_something_is_seen(text, other, is_covered):
    assert covers(text, other) is is_covered


def test_orders_that_all_have_lost_do_not_make_it_too_long():
    """A gap costs as much behind it as it has itself, and thousands of gaps no more than fits into a head."""
    log = OrderLog("a", [order("b", LATE + number, LATE + number - 1) for number in range(2000)])
    assert len(log.known(NOW)) < 40
    gaps = OrderLog("a", [order("b", LATE + 2 * number, LATE + 2 * number - 1) for number in range(3000)])
    known = stamped(gaps.known(NOW), NOW)
    assert TypeAdapter(KnownText).validate_python(known) == known
    assert len(known) > MAX_KNOWN - 100
    assert all(knows(known, "b", each.number) for each in gaps.orders), "else its bodies would not be served"


def test_a_body_says_when_its_fetch_began():
    for known in ("", "a=5", "a=5 @b=7"):
        assert unstamped(stamped(known, 12.5)) == (known, 12.5)
        assert unstamped(known) == (known, None)


def test_what_came_before_all_that_is_kept_is_no_gap():
    log = OrderLog("a", [order("b", LATE, int((NOW - KEPT_SECONDS - 9) * 1000))])
    assert not log.has_gap(NOW)
    assert OrderLog("a", [order("b", LATE, LATE - 20)]).has_gap(NOW)


def test_what_is_too_old_is_dropped_and_taken_from_nobody_but_a_pin_stands():
    old = NOW - KEPT_SECONDS - 1
    log = OrderLog("a")
    assert not log.take(order("b", 3, at=old), NOW)
    assert log.take(order("b", 4, action="pin", at=old, key="k"), NOW)
    log.forget(NOW)
    assert log.standing(("pin", "k")).number == 4
    assert log.take(order("c", 6, action="unpin", at=NOW - 1, key="k"), NOW)
    log.forget(NOW)
    assert [each.action for each in log.orders] == ["unpin"]
    assert not log.take(order("b", 4, action="pin", at=old, key="k"), NOW), "not again"
    log.forget(NOW + KEPT_SECONDS)
    assert (log.orders, log.is_pinned("k")) == ([], False)


def test_a_hold_stands_until_it_is_released_and_the_release_stands():
    """A node that was off for longer than orders are kept does not bring the hold back."""
    what = {"stream": "s", "revision": "1"}
    log, old = OrderLog("a"), NOW - KEPT_SECONDS - 1
    assert log.take(order("b", 4, action="hold", at=old, **what), NOW)
    assert log.take(order("b", 5, action="hold", at=old, stream="s", revision="2"), NOW)
    log.forget(NOW)
    assert [each.number for each in log.holds()] == [4, 5]
    released = log.write(NOW, "release", what)
    assert [each.number for each in log.holds()] == [5]
    log.forget(NOW + 2 * KEPT_SECONDS)
    assert released in log.orders
    assert not log.take(order("b", 4, action="hold", at=old, **what), NOW + 2 * KEPT_SECONDS)


def test_the_later_word_counts_also_when_the_clock_was_set_back():
    log, what = OrderLog("a"), {"stream": "s", "revision": "1"}
    log.take(order("b", LATE, action="hold", at=NOW + 3600, **what), NOW)
    released = log.write(NOW, "release", what)
    assert (log.holds(), released.at > NOW + 3600) == ([], True)
    assert log.write(NOW - 60, "hold", what) in log.holds()


NODES, KEYS = 4, 2


class Node:
    """Orders select one key each. `bodies`: key, what its node knew as text, and what it knew in truth."""

    def __init__(self, name):
        self.name, self.log, self.bodies = name, OrderLog(name), []

    def names(self, key, known):
        return any(not knows(known, o.node, o.number) and o.what["key"] == key for o in self.log.orders)

    def served(self):
        return [body for body in self.bodies if not self.names(body[0], body[1])]


MOVES = ["write", "tell", "tell", "tell", "fetch", "copy", "copy", "restart", "lose"]


def move(what, node, other, chance, now):
    """One step of one node; `chance` chooses."""
    key = chance % KEYS
    if what == "write":
        node.log.write(now, "purge", {"key": key})
    elif what == "tell" and (orders := other.log.orders):
        node.log.take(orders[chance % len(orders)], NOW)
    elif what == "fetch":
        truth = {(each.node, each.number) for each in node.log.orders}
        node.bodies.append((key, node.log.known(now), truth))
        assert not node.names(*node.bodies[-1][:2]), "what was fetched just now is served"
    elif what == "copy" and (held := other.served()):
        body = held[chance % len(held)]
        node.bodies += [] if node.names(*body[:2]) else [body]
    elif what == "restart":
        node.log = OrderLog(node.name, [read_order(write_order(each)) for each in node.log.orders])
    elif what == "lose":
        node.log, node.bodies = OrderLog(node.name), []


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(MOVES), st.integers(0, NODES - 1), st.integers(0, NODES - 1), st.integers(0, 1000)
        ),
        max_size=60,
    ),
    st.lists(st.integers(-3600, 3600), min_size=NODES, max_size=NODES),
)
def test_no_body_outlives_an_order_that_its_node_knows(moves, clocks):
    """Orders are told one by one, in any order or never; clocks differ; nodes restart, or lose their disk."""
    nodes = [Node(f"n{number}") for number in range(NODES)]
    for step, (what, at, other, chance) in enumerate(moves):
        move(what, nodes[at], nodes[other], chance, NOW + step + clocks[at])
        for each in nodes:
            for key, _, truth in each.served():
                assert all((o.node, o.number) in truth for o in each.log.orders if o.what["key"] == key)
    for one in nodes:
        for other in nodes:
            for each in other.log.orders:
                one.log.take(each, NOW)
    every = {(o.node, o.number) for node in nodes for o in node.log.orders}
    assert {(o.node, o.number) for o in nodes[-1].log.orders} == every
