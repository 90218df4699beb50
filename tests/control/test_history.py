"""The history: rates, what points hold, what restarts, crashes and wrong clocks do to them."""

import asyncio
import tempfile
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.config import Settings
from gup.control.stats.database import StatsDatabase
from gup.control.stats.history import (
    DAY,
    HOUR,
    KEPT,
    MINUTE,
    SENT,
    Point,
    RateWindow,
    Recorder,
    add_gain,
    added_up,
    points_of,
    shown,
    sums_of,
)
from gup.metrics import layout

NOON = 1_800_000_000 // DAY * DAY + 43_200
"""A time that a minute and an hour begin with."""


class Service:
    """Counters, clocks, and a recorder of them, which can be killed and begun again."""

    def __init__(self, path):
        self.count, self.now, self.steady, self.installed_at = 0, float(NOON), 0.0, 1.0
        self.database = StatsDatabase(path, lambda _what, _refusal: None)
        self.begin(0)

    def begin(self, count, later=0.0, *, controller_only=False):
        """A new process, so many seconds later; without the workers, the counts since the start go on."""
        self.count = count
        self.now += later
        self.steady += later
        if not controller_only:
            self.started_with = self.count
        self.recorder = Recorder(self, self.database, lambda: self.now, lambda: self.steady)

    settings = Settings

    def totals(self, less=0):
        sent = self.count - less
        return {
            'gup_client_sent_bytes_total{source="cache"}': sent,
            'gup_fills_total{outcome="failed"}': sent,
        }

    def since_start(self):
        return self.totals(self.started_with)

    async def read(self, count, *, later=0.0, clock=None):
        """The counters stand at `count`, so many seconds later, or when the wall clock shows `clock`."""
        self.count = count
        self.steady += later
        self.now = self.now + later if clock is None else clock
        await self.recorder.write()

    async def sent(self, span="day"):
        return [(point.at - NOON, point.sums[SENT]) for point in await self.recorder.series(span)]

    async def total(self, step=MINUTE):
        points = await self.database.run(lambda db: points_of(db, step, -1e18, 1e18))
        return added_up(point.sums for point in points)[SENT]


@asynccontextmanager
async def serving(path):
    service = Service(path)
    yield service
    await service.database.stop()


def test_series_are_summed_by_figure():
    words = dict.fromkeys(layout(["one", "two"]), 0)
    assert sums_of(words) == Counter()
    words['gup_upstream_received_bytes_total{purpose="fill",upstream="one"}'] = 5
    words['gup_upstream_received_bytes_total{purpose="index",upstream="two"}'] = 6
    words['gup_client_sent_bytes_total{source="cache"}'] = 30
    words['gup_requests_total{code="200",result="hit"}'] = 2
    words['gup_requests_total{code="206",result="hit"}'] = 1
    found = shown(sums_of(words))
    names = ("client_sent_bytes", "upstream_received_bytes", "saved_bytes")
    assert [found[name] for name in names] == [30, 11, 19]
    assert found["requests"]["hit"] == sum(found["requests"].values()) == 3
    assert set(found["fills"]) == {"committed", "failed", "unstorable"}


async def test_minutes_and_hours_hold_what_was_gained_in_them(tmp_path):
    async with serving(tmp_path) as service:
        for count, later in ((0, 0), (10, 1), (15, 58), (40, 1)):
            await service.read(count, later=later)
        assert await service.sent("hour") == [(0, 15), (60, 25)]
        assert await service.sent("week") == [(0, 40)]
        assert [point.covered_seconds for point in await service.recorder.series("hour")] == [59, 1]


def points(path, work):
    """The points of each length after `work`, in the order in which they were begun."""

    def look(db):
        work(db)
        return {step: sorted(points_of(db, step, 0, 1e18), key=lambda point: point.number) for step in KEPT}

    database = StatsDatabase(path, lambda _what, _refusal: None)
    try:
        return database.transact(look)
    finally:
        database.close()


def test_gauges_are_the_last_and_rates_the_highest(tmp_path):
    def work(db):
        add_gain(db, NOON, Counter(), 1.0, Point(wan_peak=5, wan_limit=8, client_peak=70, entries_bytes=3))
        add_gain(db, NOON, Counter(), 1.0, Point(wan_peak=2, wan_limit=4, client_peak=90, entries_bytes=2))

    (point,) = points(tmp_path, work)[MINUTE]
    assert (point.wan_peak, point.client_peak, point.wan_limit, point.entries_bytes) == (5, 90, 4, 2)


def test_points_beyond_those_kept_are_dropped_in_the_order_in_which_they_were_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(KEPT, MINUTE, 60)
    monkeypatch.setitem(KEPT, HOUR, 20)

    def work(db):
        for at in (*(NOON + 60 * n for n in range(160)), *(NOON - 3600 * n for n in range(70))):
            add_gain(db, at, Counter({SENT: 5}), 60.0, Point())

    found = {step: [point.number for point in kept] for step, kept in points(tmp_path, work).items()}
    assert [len(numbers) for numbers in found.values()] == [60, 20]
    assert all(numbers == list(range(numbers[0], numbers[0] + len(numbers))) for numbers in found.values())


READ, KILLED, AWAY, ANEW = "read", "killed", "the controller alone was away", "the counters begin anew"
RESTARTS = {
    "a killed service finds its last counts in the minute written last, eight hours later": (
        [(READ, 10, 0), (KILLED, 17, 8 * HOUR), (READ, 19, 0), (READ, 20, 1)],
        [(0, 17), (8 * HOUR, 3)],
    ),
    "a controller that was away for a moment knows what others counted": (
        [(READ, 10, 0), (READ, 10, 10), (AWAY, 12, 5), (READ, 14, 0), (READ, 15, 47)],
        [(0, 14), (60, 1)],
    ),
    "counters that began anew have gained all they show": (
        [(READ, 10, 0), (ANEW, 0, 300), (READ, 3, 0), (READ, 4, 1)],
        [(0, 10), (300, 4)],
    ),
    "counters that lost their last seconds in a power cut take nothing back": (
        [(READ, 10, 0), (KILLED, 8, 300), (READ, 8, 0), (READ, 9, 1)],
        [(0, 10), (300, 1)],
    ),
    "a lost history does not take earlier years for this minute": (
        [(KILLED, 1000, 0), (READ, 1005, 0)],
        [(0, 5)],
    ),
}


@pytest.mark.parametrize("case", RESTARTS)
async def test_restarts(tmp_path, case):
    steps, wanted = RESTARTS[case]
    async with serving(tmp_path) as service:
        for what, count, later in steps:
            if what == READ:
                await service.read(count, later=later)
            else:
                service.installed_at += what == ANEW
                service.begin(count, later, controller_only=what == AWAY)
        assert await service.sent() == wanted
        assert await service.total() == await service.total(HOUR) == sum(gained for _, gained in wanted)
        covered = (await service.recorder.series("day"))[0].covered_seconds
        assert covered == (15 if any(what == AWAY for what, *_ in steps) else 0)


async def test_an_hour_of_a_wrong_clock_takes_no_right_point_away(tmp_path):
    year = 365 * DAY
    minutes = [*range(1200), *range(year // 60, year // 60 + 60), *range(1200, 1400)]

    def work(db):
        for minute in minutes:
            add_gain(db, NOON + 60 * minute, Counter({SENT: 1}), 60.0, Point())

    points(tmp_path, work)
    async with serving(tmp_path) as service:
        service.now = NOON + 60 * 1399
        assert len(await service.recorder.series("day")) == 1400  # no gap, and nothing of next year
        assert await service.total() == len(minutes)
        assert len(await service.recorder.series("hour")) == 60 + 1  # the present one is on top


async def test_a_clock_that_is_put_back_adds_to_the_minutes_that_are_there(tmp_path):
    async with serving(tmp_path) as service:
        await service.read(60)
        await service.read(120, later=60)
        await service.read(180, later=60, clock=NOON)
        service.now = NOON + 60.0
        point, _ = await service.recorder.series("hour")
        assert (point.sums[SENT], point.covered_seconds) == (120, 60)  # so its rate is right


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(-DAY, DAY), st.sampled_from(["read", "killed", "away"])),
        max_size=20,
    )
)
@settings(max_examples=25, deadline=None)
def test_points_add_up_to_the_counters_whatever_happens(steps):
    async def run(path):
        async with serving(Path(path)) as service:
            await service.read(0)
            for gained, later, what in steps:
                if what != "read":
                    service.begin(service.count + gained // 2, controller_only=what == "away")
                await service.read(service.count + gained, clock=service.now + later)
            assert await service.total() == service.count

    with tempfile.TemporaryDirectory() as path:
        asyncio.run(run(path))


async def test_a_damaged_point_is_left_out(tmp_path):
    async with serving(tmp_path) as service:
        await service.read(10)
        await service.read(12, later=60)
        damage = "UPDATE points SET fields = '[]' WHERE step = 60 AND number = 0"
        await service.database.run(lambda db: db.execute(damage))
        assert await service.sent("hour") == [(60, 2)]


# --- rates


@pytest.mark.parametrize(
    ("seconds", "readings"),  # counter, time, increase, rate
    [
        (600.0, [(100, 0, 0, 0), (103, 1, 3, 3), (103, 500, 3, 0), (103, 1300, 0, 0), (104, 1301, 1, 0)]),
        (5.0, [(0, 0, 0, 0), *((1000 * n, n, 1000 * min(n, 5), 1000) for n in range(1, 50))]),
        (5.0, [(500, 0, 0, 0), (0, 1, 0, 0)]),  # it fell
    ],
)
def test_increase_and_rate_are_those_of_the_window(seconds, readings):
    window = RateWindow(seconds)
    assert window.bytes_per_second() == 0
    for total, now, increase, rate in readings:
        assert (window.see(total, float(now)), window.bytes_per_second()) == (increase, rate), now
