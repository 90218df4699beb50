"""Who is on the list: rows and probes in, silence and answers over time; without any process."""

import pytest

from gup.cluster.member_list import Member
from gup.cluster.membership import PROTOCOL, Membership, Row, read_row, write_row

TIMEOUT = 5.0


def row(name, **changes):
    values = {
        "start": 1,
        "address": f"http://{name}:1",
        "protocol": PROTOCOL,
        "fingerprint": "f",
    }
    return Row(name, **values | changes)


def membership(**how):
    return Membership("a", "f", TIMEOUT, 0.0, **how)


def names(found):
    return [member.name for member in found.members()]


def asked(found):
    return [member.name for member in found.members() if member.askable]


def test_a_row_is_read_as_it_was_written_and_newer_words_are_left_out():
    one = row("b", apart=True, totals={"x": 1})
    assert read_row(write_row(one)) == one
    assert read_row(write_row(one)[:-1] + ',"newer": 1}') == one
    for text in (None, "", "{}", "[]", '{"name": "b"}'):
        assert read_row(text) is None


def test_a_member_is_asked_once_it_has_answered():
    found = membership()
    found.see([row("a"), row("b")], 0.0)
    assert (names(found), asked(found)) == (["b"], [])
    assert [member.name for member in found.due(0.0)] == ["b"]
    assert found.due(0.5) == []
    found.answered("b", 0.6, ready=True)
    assert asked(found) == ["b"]


def test_a_missing_row_takes_nobody_off_the_list_but_silence_does():
    found = membership()
    found.see([row("b"), row("c")], 0.0)
    for now in range(1, 20):
        found.answered("b", float(now), ready=True)
        found.see([row("a")], float(now))
        found.look(float(now))
        assert names(found) == (["b", "c"] if now < TIMEOUT else ["b"])
    found.look(19.0 + TIMEOUT)
    assert names(found) == []


def test_one_late_answer_is_no_failure_two_are_and_a_refusal_is_at_once():
    found = membership()
    found.see([row("b")], 0.0)
    found.answered("b", 0.0, ready=True)
    found.failed("b", "it does not answer")
    assert (asked(found), list(found.unreachable())) == (["b"], [])
    found.failed("b", "it does not answer")
    assert (asked(found), list(found.unreachable())) == ([], [("b", "http://b:1: it does not answer")])
    found.answered("b", 2.0, ready=True)
    assert asked(found) == ["b"]
    found.failed("b", "Connection refused", refused=True)
    assert asked(found) == []


def test_a_successor_is_probed_at_once_and_a_new_address_begins_anew():
    found = membership()
    found.see([row("b")], 0.0)
    found.due(0.0)
    found.failed("b", "gone", refused=True)
    found.see([row("b", start=2)], 0.1)
    assert [member.name for member in found.due(0.1)] == ["b"]
    found.answered("b", 0.2, ready=True)
    found.see([row("b", start=3, address="http://other:1")], 0.3)
    assert (asked(found), [member.address for member in found.due(0.3)]) == ([], ["http://other:1"])


@pytest.mark.parametrize("change", [{"protocol": PROTOCOL + 1}, {"fingerprint": "g"}])
def test_who_differs_is_listed_and_not_asked(change):
    found = membership()
    found.see([row("b", **change)], 0.0)
    found.answered("b", 0.0, ready=True)
    assert (names(found), asked(found), len(list(found.unlike()))) == (["b"], [], 1)


def test_who_may_use_the_wan_without_the_engine_knowing():
    found = membership()
    found.see([row("b"), row("c"), row("d", apart=True)], 0.0)
    assert found.without_grant() == 1
    found.see([row("b")], 0.2)
    assert found.without_grant() == 2
    found.failed("c", "Connection refused", refused=True)
    assert found.without_grant() == 1, "nobody is there who could"
    found.engine_is_away()
    assert found.without_grant() == 2


def test_the_most_members_of_ten_minutes():
    found = membership()
    assert found.most(0.0) == 0
    found.see([row("b"), row("c"), row("d", leaving=True)], 0.0)
    assert found.most(0.0) == 4, "who leaves still reads"
    assert names(found) == ["b", "c"]
    for now in range(0, 1300, 10):
        found.see([row("b"), row("c")] if now < 30 else [row("b")], float(now))
        found.answered("b", float(now), ready=True)
        found.look(float(now))
    assert found.most(1290.0) == 2


def test_a_node_begins_with_the_members_it_knew():
    found = membership(known=[Member("b", "http://b:1", True), Member("c", "http://c:1", False)], most=3)
    assert (names(found), asked(found), found.most(0.0)) == (["b", "c"], [], 3)
    for name in ("b", "c"):
        found.answered(name, 1.0, ready=True)
    assert asked(found) == ["b"], "the other one differed"
    found.look(1.0 + TIMEOUT)
    assert names(found) == []
