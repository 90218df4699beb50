"""The history in memory and on disk: what points hold, what restarts, crashes and wrong clocks do to it."""

import copy
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.control.stats.database import StatsDatabase
from gup.control.stats.history import (
    DAY,
    HOUR,
    KEPT,
    MINUTE,
    SENT,
    History,
    Reached,
    added,
    load_points,
    shown,
    sums_of,
    write_points,
)
from gup.metrics import layout

NOON = 1_800_000_000 // DAY * DAY + 43_200
"""A time that a minute and an hour begin with."""


def sums(count):
    return +Counter({SENT: count, "requests.hit": 2 * count})


def begun(at=NOON, counted=0):
    history = History()
    history.begin([], None, Reached(sums(counted), 1.0, at), sums(counted))
    return history


def see(history, count, now, steady=None, **gauges):
    history.see(sums(count), now, now if steady is None else steady, **gauges)


def total(history, step=MINUTE):
    return added(history.between(step, float("-inf"), float("inf")))


def sent(points):
    return [(point.at, point.sums[SENT]) for point in points]


def saved_and_read(history, path):
    """What a new process finds, when this one is killed after this writing."""
    points, reached = history.due()
    database = StatsDatabase(path)
    database.transact(lambda db: write_points(db, points, reached))
    database.close()
    return load(path)


def load(path):
    database = StatsDatabase(path)
    found = database.transact(load_points)
    database.close()
    return found


def test_series_are_summed_by_figure():
    words = dict.fromkeys(layout(["one", "two"]), 0)
    assert sums_of(words) == Counter()
    words['gup_upstream_received_bytes_total{purpose="fill",upstream="one"}'] = 5
    words['gup_upstream_received_bytes_total{purpose="index",upstream="two"}'] = 6
    words['gup_client_sent_bytes_total{source="cache"}'] = 30
    words['gup_requests_total{code="200",result="hit"}'] = 2
    words['gup_requests_total{code="206",result="hit"}'] = 1
    found = shown(sums_of(words))
    assert (found["client_sent_bytes"], found["upstream_received_bytes"], found["saved_bytes"]) == (
        30,
        11,
        19,
    )
    assert found["requests"]["hit"] == sum(found["requests"].values()) == 3
    assert set(found["fills"]) == {"committed", "failed", "unstorable"}


def test_minutes_and_hours_hold_what_was_gained_in_them():
    history = begun()
    see(history, 10, NOON + 1)
    see(history, 15, NOON + 59)
    see(history, 40, NOON + 60)
    assert sent(history.series("hour", NOON + 60)) == [(NOON, 15), (NOON + 60, 25)]
    assert sent(history.series("week", NOON + 60)) == [(NOON, 40)]
    assert [point.covered_seconds for point in history.series("hour", NOON + 60)] == [58, 1]


def test_gauges_are_the_last_and_rates_the_highest():
    history = begun()
    see(history, 0, NOON, wan_rate=5, wan_limit=8, client_rate=70, entries_bytes=3)
    see(history, 0, NOON + 9, wan_rate=2, wan_limit=4, client_rate=90, entries_bytes=2)
    (point,) = history.series("hour", NOON + 9)
    assert (point.wan_peak, point.client_peak, point.wan_limit, point.entries_bytes) == (5, 90, 4, 2)


def test_spans_end_now_and_show_no_later_point():
    history = begun()
    for minute in range(26 * 60):
        see(history, minute, NOON + 60 * minute)
    end = NOON + 60 * (26 * 60 - 1)
    assert len(history.series("hour", end)) == 60 + 1  # the present one is on top
    assert len(history.series("hour", end + 59)) == 60 + 1
    assert len(history.series("day", end)) == 1440 + 1
    assert history.series("hour", NOON - 1) == []


def test_memory_and_file_are_bounded(tmp_path):
    history = begun()
    for minute in range(KEPT[MINUTE] + 100):
        see(history, minute, NOON + 60 * minute)
    for hour in range(KEPT[HOUR] + 50):
        see(history, 10_000 + hour, NOON + 10 * DAY + 3600 * hour)
    saved, _ = saved_and_read(history, tmp_path)
    assert sorted(point.step for point in saved) == [MINUTE] * KEPT[MINUTE] + [HOUR] * KEPT[HOUR]
    assert (tmp_path / "reports" / "stats.db").stat().st_size < 4_000_000


def test_a_killed_service_finds_its_last_counts_in_the_minute_written_last(tmp_path):
    history = begun()
    see(history, 10, NOON + 1)
    points, reached = saved_and_read(history, tmp_path / "h")
    # 7 more were counted, then all was killed; 8 hours later it starts and counts 2 at once
    after = NOON + 8 * HOUR
    again = History()
    again.begin(points, reached, Reached(sums(19), 1.0, after), sums(17))
    see(again, 20, after + 1)
    assert sent(again.series("day", after + 1)) == [(NOON, 17), (after, 3)]
    assert total(again) == total(again, HOUR) == sums(20)


def test_a_controller_that_was_away_for_a_moment_knows_what_others_counted(tmp_path):
    history = begun()
    see(history, 10, NOON)
    see(history, 10, NOON + 10)
    points, reached = saved_and_read(history, tmp_path / "h")
    again = History()
    again.begin(points, reached, Reached(sums(14), 1.0, NOON + 15), sums(0))
    see(again, 15, NOON + 62)
    assert sent(again.series("hour", NOON + 62)) == [(NOON, 14), (NOON + 60, 1)]
    assert again.series("hour", NOON + 62)[0].covered_seconds == 15


def test_counters_that_began_anew_have_gained_all_they_show(tmp_path):
    history = begun()
    see(history, 10, NOON)
    points, reached = saved_and_read(history, tmp_path / "h")
    again = History()
    again.begin(points, reached, Reached(sums(3), 2.0, NOON + 300), sums(0))
    see(again, 4, NOON + 301)
    assert total(again) == sums(14)


def test_counters_that_lost_their_last_seconds_take_nothing_back(tmp_path):
    history = begun()
    see(history, 10, NOON)
    points, reached = saved_and_read(history, tmp_path / "h")
    again = History()
    again.begin(points, reached, Reached(sums(8), 1.0, NOON + 300), sums(8))
    see(again, 8, NOON + 301)
    see(again, 9, NOON + 302)
    assert total(again) == sums(11)


def test_a_lost_history_does_not_take_earlier_years_for_this_minute():
    history = History()
    history.begin([], None, Reached(sums(1005), 1.0, NOON), sums(1000))
    see(history, 1006, NOON)
    assert total(history) == sums(6)


def test_an_hour_of_a_wrong_clock_takes_no_right_point_away(tmp_path):
    history = begun()
    count = 0
    for minute in range(1200):
        count += 1
        see(history, count, NOON + 60 * minute, steady=60 * minute)
    for minute in range(60):  # a year ahead
        count += 1
        see(history, count, NOON + 365 * DAY + 60 * minute, steady=60 * (1200 + minute))
    points, reached = saved_and_read(history, tmp_path / "h")
    again = History()
    again.begin(points, reached, Reached(sums(count), 1.0, NOON), sums(count))
    for minute in range(1200, 1400):
        count += 1
        see(again, count, NOON + 60 * minute, steady=60 * (minute + 60))
    end = NOON + 60 * 1399
    assert len(again.series("day", end)) == 1400  # no gap, and nothing of next year
    assert total(again) == sums(count)


def test_a_clock_that_is_put_back_adds_to_the_minutes_that_are_there():
    history = begun()
    see(history, 60, NOON, steady=0)
    see(history, 120, NOON + 60, steady=60)
    see(history, 180, NOON, steady=120)
    (point, _) = history.series("hour", NOON + 60)
    assert point.sums[SENT] == 120
    assert point.covered_seconds == 60  # so its rate is right


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(-DAY, DAY), st.sampled_from(["see", "killed", "write"])),
        max_size=40,
    )
)
def test_points_add_up_to_the_counters_whatever_happens(steps):
    history, written = begun(), ([], None)
    count, now, started_with = 0, float(NOON), 0
    for gained, later, what in steps:
        count, now = count + gained, now + later
        if what == "killed":
            history = History()
            history.begin(
                copy.deepcopy(written[0]), written[1], Reached(sums(count), 1.0, now), sums(started_with)
            )
            started_with = count
        see(history, count, now, steady=0.0)
        if what == "write" or written[1] is None:
            written = copy.deepcopy(list(history.between(MINUTE, -1e18, 1e18))), history.due()[1]
    see(history, count, now, steady=0.0)
    assert total(history) == sums(count)


@pytest.mark.parametrize(
    "damage",
    ["UPDATE points SET fields = '[]'", "UPDATE reached SET fields = '{}'"],
    ids=["row", "end"],
)
def test_a_damaged_history_is_begun_anew_and_leaves_the_rest_of_the_database(tmp_path, damage, caplog):
    history = begun()
    see(history, 10, NOON)
    saved_and_read(history, tmp_path)
    database = StatsDatabase(tmp_path)
    database.transact(lambda db: db.execute("INSERT INTO marks VALUES('series', 5)"))
    database.transact(lambda db: db.execute(damage))
    database.close()
    assert load(tmp_path) == ([], None)
    assert "begun anew" in caplog.text
    assert database.transact(lambda db: db.execute("SELECT * FROM marks").fetchall()) == [("series", 5)]
    database.close()
    see(history, 11, NOON + 60)
    points, reached = saved_and_read(history, tmp_path)
    assert reached.sums == sums(11)
    assert points
