"""Storms of fulls: when one begins and ends, who makes it, what it costs; and what is asked for in vain."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from gup.content.key import ContentKey
from gup.control.traffic import (
    CALM_SECONDS,
    FULLS,
    MAX_ADDRESSES,
    WINDOW_SECONDS,
    Traffic,
    Unmet,
    newest_times,
    revision_time,
)

STREAM = ("any", "any", "{A}")
FULL, OTHER_FULL = ContentKey(*STREAM, "260101002", "full.zip"), ContentKey(*STREAM, "260101001", "full.zip")
DELTA = ContentKey(*STREAM, "260101001", "xdelta260101001_To_260101002.dax")


class Site:
    """Traffic over an index that holds two deltas of 2 bytes each, at a time that the test sets."""

    def __init__(self) -> None:
        self.now, self.deltas = 0.0, (2, 4)
        lengths = {FULL.text: 100, OTHER_FULL.text: 50}
        rows = {key: SimpleNamespace(length_bytes=length) for key, length in lengths.items()}
        table: Any = SimpleNamespace(get=rows.get, deltas=lambda _stream: self.deltas)
        self.traffic = Traffic(table, lambda: self.now)
        self.sent = self.traffic.sent

    def storm(self, now: float) -> bool:
        self.now = now
        self.traffic.look()
        return self.traffic.flags()[STREAM]

    def missed(self, revision: str, now: float) -> None:
        self.now = now
        self.traffic.missed(ContentKey(*STREAM, revision, "full.zip"))

    def unmet(self, now: float) -> Unmet | None:
        self.now = now
        return self.traffic.unmet().get(STREAM)


@pytest.fixture
def site() -> Site:
    return Site()


def test_many_fulls_are_a_storm_only_where_deltas_exist_and_are_asked_for_less(site):
    site.sent(FULL, FULLS - 1)
    assert not site.storm(1.0)
    site.sent(FULL, 1)
    site.deltas = (0, 0)
    assert not site.storm(1.0)
    site.deltas = (2, 4)
    assert site.storm(1.0)
    few = Site()
    few.sent(DELTA, FULLS)
    few.sent(FULL, FULLS)
    assert not few.storm(0.0)


def test_a_storm_ends_when_it_has_been_calm_for_a_while_and_both_are_logged_once(site, caplog):
    site.sent(FULL, FULLS)
    with caplog.at_level(logging.WARNING):
        assert all(site.storm(float(second)) for second in range(10))
        site.sent(DELTA, 10 * FULLS)
        assert site.storm(9.0 + CALM_SECONDS - 1)
        assert not site.storm(9.0 + CALM_SECONDS)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "a storm of fulls",
        "the storm of fulls of any/any/{A} is over, after 9 s",
    ]


def test_fulls_are_counted_over_this_window_and_the_last(site):
    site.now = WINDOW_SECONDS - 1
    site.sent(FULL, FULLS // 2)
    site.now = WINDOW_SECONDS
    site.sent(FULL, FULLS // 2)
    assert site.storm(WINDOW_SECONDS)
    assert not site.storm(2 * WINDOW_SECONDS + CALM_SECONDS)


def test_a_storm_tells_who_how_many_and_what_it_costs(site):
    for key, times in ((FULL, 30), (OTHER_FULL, 10), (DELTA, 3)):
        site.sent(key, times)
    for number in range(30):
        site.traffic.note_client(FULL, f"10.0.0.{number}", 1 + (number == 7))
    site.storm(6.0)
    [storm] = site.traffic.storms()
    assert (storm.stream, storm.since, storm.fulls, storm.deltas) == (STREAM, 6.0, 40, 3)
    assert (storm.clients, len(storm.addresses), storm.addresses[0]) == (30, 20, "10.0.0.7")
    assert (storm.lan_bytes, storm.wan_bytes, storm.delta_bytes) == (3500, 150, 2)


def test_memory_is_bounded(site):
    for number in range(1000):
        site.sent(ContentKey("any", "any", str(number), "260101002", "full.zip"), FULLS)
    for number in range(2 * MAX_ADDRESSES):
        site.traffic.note_client(FULL, str(number), 1)
    site.sent(FULL, FULLS)
    assert site.storm(0.0)
    assert len(site.traffic.flags()) == 50
    assert max(storm.clients for storm in site.traffic.storms()) == MAX_ADDRESSES


def test_what_is_asked_for_in_vain_is_remembered_while_somebody_asks(site):
    site.sent(OTHER_FULL, 1)
    site.missed("260102001", 10.0)
    site.missed("260102001", 400.0)
    site.missed("260101009", 401.0)
    assert site.unmet(402.0) == Unmet("260102001", 10.0, 400.0)
    assert site.traffic.newest() == {STREAM: "260101001"}
    assert site.unmet(5000.0) is None
    site.missed("260102001", 5000.0)
    assert site.unmet(5000.0) == Unmet("260102001", 5000.0, 5000.0)
    site.sent(ContentKey(*STREAM, "260102001", "full.zip"), 1)
    site.missed("260102002", 5000.0 + 40 * 86400)
    assert site.unmet(5000.0) is None, "the clock was put back since"
    for number in range(100):
        site.missed(f"2602{number:05}", 5000.0)
    assert site.unmet(5000.0).revision == "260200099"


def test_revisions_begin_with_their_day():
    assert revision_time("700102001") == 86400
    assert revision_time("269901001") is revision_time("260231001") is None


def test_newest_content_takes_the_latest_of_a_product():
    held = {("v1", "l", "{A}"): "260101001", ("v2", "l", "{A}"): "260103002", ("v", "l", "{B}"): "269999999"}
    times = newest_times(held, lambda stream: (stream[2], stream[1]))
    assert times == {("{A}", "l"): revision_time("260103002")}
