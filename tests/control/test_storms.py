"""Storms of fulls: when one begins and ends, who makes it, what it costs; and what is asked for in vain."""

import logging

from gup.content.key import Kind
from gup.control.traffic import CALM_SECONDS, FULLS, MAX_ADDRESSES, WINDOW_SECONDS, Demand, Storms, Unmet

STREAM = ("any", "any", "{A}")
FULL, OTHER_FULL = "any/any/{A}/260101002/full.zip", "any/any/{A}/260101001/full.zip"
DELTA = "any/any/{A}/260101001/xdelta260101001_To_260101002.dax"


def always(_stream) -> bool:
    return True


def never(_stream) -> bool:
    return False


def test_many_fulls_are_a_storm_only_where_deltas_exist_and_are_asked_for_less():
    storms = Storms()
    storms.count(STREAM, Kind.FULL, FULL, FULLS - 1, 0.0)
    storms.look(1.0, always)
    assert storms.flags() == {STREAM: False}
    storms.count(STREAM, Kind.FULL, FULL, 1, 1.0)
    storms.look(1.0, never)
    assert storms.flags() == {STREAM: False}
    storms.look(1.0, always)
    assert storms.flags() == {STREAM: True}
    few = Storms()
    few.count(STREAM, Kind.DELTA, DELTA, FULLS, 0.0)
    few.count(STREAM, Kind.FULL, FULL, FULLS, 0.0)
    few.look(0.0, always)
    assert few.flags() == {STREAM: False}


def test_a_storm_ends_when_it_has_been_calm_for_a_while_and_both_are_logged_once(caplog):
    storms = Storms()
    storms.count(STREAM, Kind.FULL, FULL, FULLS, 0.0)
    with caplog.at_level(logging.WARNING):
        for second in range(10):
            storms.look(float(second), always)
        storms.count(STREAM, Kind.DELTA, DELTA, 10 * FULLS, 10.0)
        storms.look(9.0 + CALM_SECONDS - 1, always)
        assert storms.flags() == {STREAM: True}
        storms.look(9.0 + CALM_SECONDS, always)
        assert storms.flags() == {STREAM: False}
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "a storm of fulls",
        "the storm of fulls of any/any/{A} is over, after 9 s",
    ]


def test_fulls_are_counted_over_this_window_and_the_last():
    storms = Storms()
    storms.count(STREAM, Kind.FULL, FULL, FULLS // 2, WINDOW_SECONDS - 1)
    storms.count(STREAM, Kind.FULL, FULL, FULLS // 2, WINDOW_SECONDS)
    storms.look(WINDOW_SECONDS, always)
    assert storms.flags() == {STREAM: True}
    for second in range(int(2 * WINDOW_SECONDS), int(2 * WINDOW_SECONDS + CALM_SECONDS) + 2):
        storms.look(float(second), always)
    assert storms.flags() == {STREAM: False}


def test_a_storm_tells_who_how_many_and_what_it_costs():
    storms = Storms()
    storms.count(STREAM, Kind.FULL, FULL, 30, 5.0)
    storms.count(STREAM, Kind.FULL, OTHER_FULL, 10, 5.0)
    storms.count(STREAM, Kind.DELTA, DELTA, 3, 5.0)
    for number in range(30):
        storms.note_client(STREAM, f"10.0.0.{number}", 1 + (number == 7), 5.0)
    storms.look(6.0, always)
    lengths = {FULL: 100, OTHER_FULL: 50}
    [storm] = storms.standing(lengths.__getitem__, lambda _: 2)
    assert (storm.stream, storm.since, storm.fulls, storm.deltas) == (STREAM, 6.0, 40, 3)
    assert (storm.clients, len(storm.addresses), storm.addresses[0]) == (30, 20, "10.0.0.7")
    assert (storm.lan_bytes, storm.wan_bytes, storm.delta_bytes) == (3500, 150, 2)


def test_memory_is_bounded():
    storms = Storms()
    for number in range(2 * MAX_ADDRESSES):
        storms.note_client(STREAM, str(number), 1, 0.0)
    for number in range(1000):
        storms.count(("any", "any", str(number)), Kind.FULL, FULL, FULLS, 0.0)
    storms.look(0.0, always)
    assert len(storms.flags()) == 50
    assert all(storm.clients <= MAX_ADDRESSES for storm in storms.standing(lambda _: 0, lambda _: 0))


def test_what_is_asked_for_in_vain_is_remembered_while_somebody_asks():
    demand = Demand()
    demand.met(STREAM, "260101001")
    assert demand.newest() == {STREAM: "260101001"}
    demand.unmet(STREAM, "260102001", 10.0)
    demand.unmet(STREAM, "260102001", 400.0)
    demand.unmet(STREAM, "260101009", 401.0)
    assert demand.missed(402.0) == {STREAM: Unmet("260102001", 10.0, 400.0)}
    assert demand.newest() == {STREAM: "260101001"}
    assert demand.missed(5000.0) == {}
    demand.unmet(STREAM, "260102001", 5000.0)
    assert demand.missed(5000.0) == {STREAM: Unmet("260102001", 5000.0, 5000.0)}
    demand.met(STREAM, "260102001")
    assert demand.missed(5000.0) == {}
    for number in range(100):
        demand.unmet(STREAM, f"2602{number:05}", 5000.0)
    assert demand.missed(5000.0)[STREAM].revision == "260200099"
