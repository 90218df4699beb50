"""The WAN's budget: periods, cheap hours and forecasts as tables; the ledger over restarts and jumps."""

import json
from calendar import timegm
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Settings, WanBudget
from gup.control.budget_keeper import ordinal
from gup.control.wan_budget import (
    FILE,
    MOST_DAYS,
    BudgetLedger,
    Counts,
    Forecast,
    NodeDays,
    Period,
    cheap_at,
    counted,
    forecast,
    midnight,
    next_cheap,
    period_of,
    read_node,
    write_node,
)
from gup.metrics import series, stream_series

PARIS = ZoneInfo("Europe/Paris")
NIGHT = {"days": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"], "from": "22:00", "to": "06:00"}


def settings(zone="Europe/Paris", **budget):
    return Settings.model_validate({"wan": {"budget": budget}, "site": {"time_zone": zone}})


def at(text, zone=PARIS):
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("begins", "day", "first", "after"),
    [
        (1, "2026-11-30", "2026-11-01", "2026-12-01"),
        (1, "2026-12-31", "2026-12-01", "2027-01-01"),
        (12, "2026-11-11", "2026-10-12", "2026-11-12"),
        (12, "2026-11-12", "2026-11-12", "2026-12-12"),
        (12, "2027-01-01", "2026-12-12", "2027-01-12"),
        (31, "2026-02-27", "2026-01-31", "2026-02-28"),
        (31, "2026-02-28", "2026-02-28", "2026-03-31"),
        (31, "2028-02-29", "2028-02-29", "2028-03-31"),
        (30, "2028-02-28", "2028-01-30", "2028-02-29"),
        (31, "2026-04-30", "2026-04-30", "2026-05-31"),
    ],
)
def test_months_begin_on_their_day_or_their_last_one(begins, day, first, after):
    found = period_of(WanBudget(begins=begins), date.fromisoformat(day))
    assert found == Period(date.fromisoformat(first), date.fromisoformat(after))


@given(st.integers(1, 31), st.dates(date(1990, 1, 1), date(2100, 1, 1)))
def test_every_day_belongs_to_one_period_and_periods_follow_each_other(begins, day):
    budget = WanBudget(begins=begins)
    found = period_of(budget, day)
    assert found.first <= day < found.after
    assert period_of(budget, found.after).first == found.after
    assert period_of(budget, found.first - timedelta(days=1)).after == found.first
    assert 28 <= (found.after - found.first).days <= 31
    assert period_of(WanBudget(per="day"), day) == Period(day, day + timedelta(days=1))


def test_midnight_is_the_site_s_also_when_clocks_change():
    spring, autumn = date(2026, 3, 29), date(2026, 10, 25)
    for day, hours in ((spring, 23), (autumn, 25), (date(2026, 7, 1), 24)):
        length = midnight(settings(), day + timedelta(days=1)) - midnight(settings(), day)
        assert length == hours * 3600
    # Beirut skips midnight: the day begins at one.
    beirut = settings("Asia/Beirut")
    assert datetime.fromtimestamp(midnight(beirut, spring), ZoneInfo("Asia/Beirut")).hour == 1
    assert midnight(settings("UTC"), spring) == timegm((2026, 3, 29, 0, 0, 0))


def test_cheap_hours_are_by_the_site_s_clocks():
    night = settings(cheap=[NIGHT])
    for text, cheap in (("2026-11-30 21:59", False), ("2026-11-30 22:00", True), ("2026-11-30 05:59", True)):
        assert cheap_at(night, at(text)) is cheap
    assert not cheap_at(night, at("2026-11-30 06:00"))
    assert next_cheap(night, at("2026-11-30 12:00")) == at("2026-11-30 22:00")
    assert next_cheap(night, at("2026-11-30 22:00")) == at("2026-12-01 22:00")
    sunday = settings(cheap=[{"days": ["sun"], "from": "00:00", "to": "24:00"}])
    assert next_cheap(sunday, at("2026-11-30 12:00")) == at("2026-12-06 00:00")  # from a Monday
    assert next_cheap(settings(), at("2026-11-30 12:00")) is None


# --- the forecast

NOVEMBER = Period(date(2026, 11, 1), date(2026, 12, 1))
DAY = date(2026, 11, 11)


def days_before(today, *used):
    return {today - timedelta(days=ago): count for ago, count in enumerate(used, 1)}


@pytest.mark.parametrize(
    ("limit", "used", "days", "gone", "expected"),
    [
        # Nothing is known: an hour of the period must be over.
        (1000, 0, {}, 0.03, Forecast()),
        (1000, 10, {DAY: 10}, 0.5, Forecast(400, None, "period", 0)),
        (300, 10, {DAY: 10}, 0.5, Forecast(400, (date(2026, 11, 25), 0.0 + 0.0), "period", 0)),
        # One whole day, after that of the installation.
        (5000, 150, days_before(DAY, 100, 50), 0.5, Forecast(2100, None, "days", 1)),
        # Idle days are days, too.
        (5000, 60, days_before(DAY, 60, 0, 0, 5), 0.0, Forecast(60 + 20 * 20, None, "days", 3)),
        (5000, 5000, days_before(DAY, 100, 50), 0.5, Forecast(5000 + 1950, None, "days", 1)),
    ],
)
def test_the_forecast_says_by_what_it_is_judged(limit, used, days, gone, expected):
    found = forecast(limit, used, NOVEMBER, days, DAY, gone)
    assert (found.expected_bytes, found.basis, found.days) == (
        expected.expected_bytes,
        expected.basis,
        expected.days,
    )
    assert (found.runs_out is None) == (expected.runs_out is None)
    if found.runs_out is not None:
        assert found.runs_out[0] == expected.runs_out[0]


def test_weekdays_differ():
    """100 on each working day, nothing at weekends: it runs out in the afternoon of a Monday."""
    days = {
        day: 0 if day.weekday() >= 5 else 100 for day in (DAY - timedelta(days=ago) for ago in range(1, 30))
    }
    used = sum(count for day, count in days.items() if day >= NOVEMBER.first)
    found = forecast(used + 350, used, NOVEMBER, days, DAY, 0.0)  # a Wednesday
    assert found.basis == "weekdays"
    assert found.runs_out == (date(2026, 11, 16), pytest.approx(0.5))
    assert found.expected_bytes == used + 14 * 100
    enough = forecast(used + 1401, used, NOVEMBER, days, DAY, 0.0)
    assert enough.runs_out is None


@given(
    st.integers(1, 10**13),
    st.lists(st.integers(0, 10**12), max_size=60),
    st.floats(0, 1),
    st.dates(NOVEMBER.first, NOVEMBER.after - timedelta(days=1)),
)
def test_a_forecast_is_never_below_what_is_used_and_runs_out_within_the_period(limit, used, gone, today):
    days = days_before(today, *used)
    own = sum(count for day, count in days.items() if day >= NOVEMBER.first)
    found = forecast(limit, own, NOVEMBER, days, today, gone)
    assert found.expected_bytes is None or found.expected_bytes >= own
    if found.runs_out is not None:
        assert today <= found.runs_out[0] < NOVEMBER.after
        assert 0 <= found.runs_out[1] <= 1
        assert found.expected_bytes >= limit


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th")),
        *((21, "21st"), (22, "22nd"), (23, "23rd"), (30, "30th"), (31, "31st")),
    ],
)
def test_days_of_the_month(number, text):
    assert ordinal(number) == text


# --- the ledger


class Service:
    """A service whose counters survive; `start` begins another run of it."""

    def __init__(self, run, zone="Europe/Paris"):
        self.run, self.zone, self.cheap = run, zone, []
        self.totals, self.base, self.started_at = Counter(), Counter(), 1000.0
        self.installed_at, self.now, self.clock = at("2026-11-01 10:00"), at("2026-11-10 10:00"), 0.0
        self.start().look()

    def start(self, *, node="a"):
        self.started_at += 1
        self.base = Counter(self.totals)
        self.ledger = BudgetLedger(self.run, node, self.counts(), self.now, self.settings())
        return self

    def settings(self):
        return settings(self.zone, cheap=self.cheap)

    def counts(self):
        own = {name: count - self.base[name] for name, count in self.totals.items()}
        return Counts(dict(self.totals), own, self.started_at, self.installed_at)

    def receive(self, amount, kind="full", purpose="fill"):
        self.totals[series("gup_upstream_received_bytes_total", {"upstream": "m", "purpose": purpose})] += (
            amount
        )
        self.totals[stream_series("received", 3, kind)] += amount

    def look(self, *, save=True):
        self.ledger.look(self.counts(), self.now, self.settings(), self.clock)
        if save:
            self.ledger.save(self.ledger.text())

    def used(self, first="2026-11-01"):
        found = self.ledger.used(date.fromisoformat(first))
        return found["all"] - found["cheap"]


@pytest.fixture
def service(tmp_path):
    return Service(tmp_path)


def test_figures_of_the_counters():
    totals = {
        series("gup_upstream_received_bytes_total", {"upstream": "a", "purpose": "fill"}): 5,
        series("gup_upstream_received_bytes_total", {"upstream": "gone", "purpose": "prefetch"}): 7,
        stream_series("received", 0, "delta"): 12,
        stream_series("sent", 0, "delta"): 99,
        'gup_peer_received_bytes_total{slot="0"}': 99,
    }
    assert counted(totals) == {"all": 12, "background": 7, "delta": 12}


@hypothesis.settings(max_examples=15)
@given(plan=st.lists(st.sampled_from(["receive", "look", "save", "kill", "restart"]), max_size=20))
def test_whatever_dies_when_no_byte_is_lost_or_counted_twice(plan, tmp_path_factory):
    service, sent = Service(tmp_path_factory.mktemp("run")), 0
    for step in plan:
        match step:
            case "receive":
                sent += 7
                service.receive(7)
            case "look" | "save":
                service.look(save=step == "save")
            case "kill":  # the controller alone
                service.ledger = BudgetLedger(
                    service.run, "a", service.counts(), service.now, service.settings()
                )
            case "restart":
                service.start()
    service.look()
    assert service.used() == sent
    assert service.ledger.used(date(2026, 11, 1))["full"] == sent


def test_what_was_counted_before_a_restart_is_of_the_day_of_the_last_reading(service):
    service.receive(100)
    service.look()
    service.receive(30)
    service.now = at("2026-11-11 00:00:05")
    service.start()
    service.receive(5)
    service.look()
    assert [figures[0] for figures in service.ledger.own.days.values()] == [130, 5]


def test_after_a_power_cut_the_file_is_right_where_the_counters_are_behind(service):
    service.receive(100)
    service.look()
    service.totals.clear()
    service.receive(60)
    service.start()
    assert service.used() == 100
    service.receive(5)
    service.look()
    assert service.used() == 105


def test_counters_that_were_reset_begin_at_zero(service):
    service.receive(100)
    service.look()
    service.totals.clear()
    service.installed_at += 1000
    service.start()
    service.receive(30)
    service.look()
    assert service.used() == 130


def test_counters_that_lag_for_a_moment_during_an_upgrade_wait(service):
    service.receive(100)
    service.look()
    service.totals.subtract(dict.fromkeys(service.totals, 40))
    service.look()
    service.receive(70)  # 30 more than were read
    service.look()
    assert service.used() == 130


def test_a_damaged_file_is_moved_aside(service, caplog):
    service.receive(100)
    service.look()
    (service.run / FILE).write_text("{")
    service.start()
    assert service.used() == 0
    assert service.ledger.is_new
    assert (service.run / f"{FILE}.damaged").read_text() == "{"
    assert "is not known" in caplog.text


def test_the_days_of_before_come_from_the_savings_ledger(service):
    service.receive(100)
    (service.run / FILE).unlink()
    service.start()  # this version's first
    service.receive(20)
    service.look()
    service.receive(3)  # read by the savings ledger, and not here yet
    one = series("gup_upstream_received_bytes_total", {"upstream": "m", "purpose": "fill"})
    kind = stream_series("received", 3, "full")
    days = {"": {one: 5}, "2026-11-09": {one: 60, kind: 60}, "2026-11-10": {one: 58, kind: 58}}
    service.ledger.seed(days)
    service.look()
    assert service.ledger.by_day() == {date(2026, 11, 9): 60, date(2026, 11, 10): 58}
    assert not service.ledger.is_new


def test_cheap_bytes_do_not_count_but_for_the_second_of_the_change(service):
    service.cheap, service.now = [NIGHT], at("2026-11-10 21:59:59")
    service.look()
    service.receive(1)
    service.now += 1
    service.look()
    service.receive(100)
    service.now += 1
    service.look()
    assert service.used() == 1
    assert service.ledger.used(date(2026, 11, 1))["cheap"] == 100
    service.receive(10)
    service.start()  # before the next reading: still in these hours
    assert service.used() == 1


def test_a_clock_that_was_ahead_puts_nothing_into_another_period_for_ever(service):
    service.receive(10)
    service.look()
    service.now = at("2027-05-01 12:00")
    service.receive(20)
    service.look()
    service.now = at("2026-11-10 10:01")
    service.receive(30)
    service.look()
    assert service.used() == 60
    service.clock += 601
    service.look()
    assert service.ledger.by_day() == {date(2026, 11, 10): 60}
    service.now = at("2026-12-02 10:00")
    service.look()
    assert service.used("2026-12-01") == 0


def test_a_clock_that_is_behind_puts_nothing_into_an_earlier_period(service):
    service.receive(10)
    service.look()
    for wrong in (0.0, at("2026-11-05 10:00")):
        service.now = wrong
        service.receive(20)
        service.look()
    service.now = at("2026-11-10 11:00")
    service.look()
    assert service.ledger.by_day() == {date(2026, 11, 10): 50}


def test_days_are_bounded(service):
    for number in range(MOST_DAYS + 50):
        service.now += 86400
        service.receive(number + 1)
        service.look(save=False)
    assert len(service.ledger.own.days) == MOST_DAYS


# --- of other nodes


def row(node, id_, seq, **days):
    return NodeDays(
        node, id_, {day.replace("_", "-").removeprefix("d"): [n] for day, n in days.items()}, 5.0, seq
    )


def test_rows_of_others_are_taken_when_they_are_later_and_kept(service):
    service.receive(100)
    service.look()
    service.ledger.merge([row("b", "1b", 2, d2026_11_09=7), row("c", "1c", 1, d2026_10_09=1000)])
    assert service.used() == 107
    service.ledger.merge([row("b", "1b", 1, d2026_11_09=3), row("b", "2b", 1, d2026_11_10=30)])
    assert service.used() == 137  # b was installed anew: both count
    service.look()
    service.start()
    assert service.used() == 137
    text = write_node(service.ledger.own)
    assert read_node(text).days == service.ledger.own.days


def test_what_this_node_has_told_and_lost_is_taken_back(service):
    service.receive(100)
    service.look()
    told, file = write_node(service.ledger.own), (service.run / FILE).read_bytes()
    old = json.loads(file)
    old["own"]["days"], old["own"]["seq"] = {}, 0
    (service.run / FILE).write_text(json.dumps(old))  # from a backup
    service.totals.clear()
    service.start()
    service.receive(5)
    service.look()
    service.ledger.merge([read_node(told)])
    assert service.used() == 105
    assert service.ledger.own.seq > read_node(told).seq


def test_after_a_kill_nothing_of_the_last_second_is_lost_for_what_was_told_before(service):
    service.receive(100)
    service.look(save=False)
    told = write_node(service.ledger.own)
    service.receive(3)  # never told
    service.start()
    service.ledger.merge([read_node(told)])
    assert service.used() == 103


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "{", "[]", "{}", "[" * 100_000),
        *('{"node":"a","id":"z","days":{}}', '{"node":"a","id":"1","days":{"x":[1]}}'),
        '{"node":"a","id":"1","days":{"2026-01-01":[-1]}}',
    ],
)
def test_what_is_no_row_is_none(text):
    assert read_node(text) is None


def test_the_machine_s_own_zone():
    today = datetime.now(UTC).date()
    assert abs(midnight(settings(""), today) - midnight(settings("UTC"), today)) <= 14 * 3600
