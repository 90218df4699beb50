"""Who is on the list: rows and probes in, silence and answers over time; without any process."""

import pytest

from gup.cluster.member_list import Member
from gup.cluster.membership import GONE_SECONDS, PROTOCOL, Membership, Row, read_row, write_row

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
    assert found.peers()[0].state[0] == "unlike"


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


def test_the_state_of_a_member_says_why_it_is_not_asked():
    found = membership()
    found.see([row("b")], 0.0)
    (b,) = found.peers()
    assert b.state == ("unknown", "not known yet")
    found.answered("b", 0.0, ready=False)
    assert b.state[0] == "not-ready"
    found.answered("b", 0.0, ready=True, known="b=5")
    assert (b.state, b.known) == (("ready", ""), "b=5")
    found.failed("b", "Connection refused", refused=True)
    assert b.state == ("unreachable", "Connection refused")


def gone(found):
    return {name: (one.left, one.at) for name, one in found.gone.items()}


def test_who_has_left_or_fallen_silent_is_told_for_a_day_with_its_last_figures():
    found = membership()
    found.see([row("b", totals={"x": 1}), row("c", totals={"x": 2})], 0.0)
    found.see([row("b", totals={"x": 3}), row("c", totals={"x": 4}, leaving=True)], 1.0)
    found.look(1.0)
    assert gone(found) == {"c": (True, 1.0)}
    found.look(1.0 + TIMEOUT)
    assert gone(found) == {"b": (False, 1.0), "c": (True, 1.0)}
    assert {name: one.row.totals["x"] for name, one in found.gone.items()} == {"b": 3, "c": 4}
    found.see([row("b")], 10.0)
    assert gone(found) == {"c": (True, 1.0)}, "b is back"
    found.look(1.0 + GONE_SECONDS)
    assert "c" not in found.gone


def test_a_machine_that_is_back_with_another_name_is_not_gone():
    found = membership()
    found.see([row("b", leaving=True), row("c", leaving=True)], 0.0)
    found.see([row("d", address="http://b:1")], 1.0)
    assert list(found.gone) == ["c"], "else its bytes would count twice"


def test_of_very_many_that_came_and_went_the_latest_are_told():
    found = membership()
    for number in range(40):
        found.see([row(f"n{number}", leaving=True)], float(number))
    assert list(found.gone) == [f"n{number}" for number in range(24, 40)]
