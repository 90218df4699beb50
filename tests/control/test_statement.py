"""The statement of a month: exact money, edges of months, what is missing, incidents; hostile names."""

import asyncio
import base64
import html.parser
import random
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import date
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from aiohttp import web
from control import calls
from control.test_timeline import heard
from control.test_usage_reports import DAY, MONIKER, key, reporting, sent, take
from control.test_usage_reports import site as site  # noqa: PLC0414 - a fixture
from harness.browser import browser as chromium
from hypothesis import given
from hypothesis import strategies as st

from gup.content.catalog import Label
from gup.control.alarms import ALARMS
from gup.control.api.months import PLAIN, chosen_month, money, month_of
from gup.control.stats.database import StatsDatabase
from gup.control.stats.history import Recorder, add_covered, covered_days
from gup.control.stats.incidents import Incidents, incidents, prune_incidents

PARIS = ZoneInfo("Europe/Paris")
OCTOBER = month_of(2026, 10, ZoneInfo("UTC"))
HOUR = 3600


async def report(browser, world, month="", status=200):
    query = f"?month={month}" if month else ""
    found, told = await calls.get(browser, world, f"/api/v1/report/month{query}")
    assert found == status, told
    return told


async def document(browser, world, month=""):
    query = f"?month={month}" if month else ""
    async with browser.get(f"{world.url}/api/v1/report/statement{query}") as answer:
        assert (answer.status, answer.content_type) == (200, "text/html"), await answer.text()
        return await answer.text(), answer.headers


# --- money and months


@given(st.integers(-(2**70), 2**70), st.decimals(0, 999_999_999, places=6, allow_nan=False))
def test_money_is_exact_to_the_hundredth(count, price):
    exact = Fraction(count) * Fraction(price) / 10**9
    found = money(count, f"{price:f}")
    assert found.as_tuple().exponent == -2
    assert abs(Fraction(found) - exact) <= Fraction(1, 200)
    if abs(Fraction(found) - exact) == Fraction(1, 200):
        assert abs(found) >= abs(exact)


@pytest.mark.parametrize(
    ("count", "price", "expected"),
    [
        (10**9, "0.08", "0.08"),
        (1_062_500_000, "0.08", "0.09"),  # 0.085
        (-1_062_500_000, "0.08", "-0.09"),
        (123_456_789_012, "0.1", "12.35"),  # 12.3456789012
        (62_499_999, "0.08", "0.00"),
        (62_500_000, "0.08", "0.01"),
        (2**60, "999999999.999999", "1152921504606845823.08"),
        (0, "5", "0.00"),
    ],
)
def test_money(count, price, expected):
    assert money(count, price) == Decimal(expected)


@pytest.mark.parametrize(
    ("year", "number", "zone", "seconds"),
    [
        (2026, 2, PARIS, 28 * DAY),
        (2024, 2, PARIS, 29 * DAY),
        (2026, 3, PARIS, 31 * DAY - HOUR),
        (2026, 10, PARIS, 31 * DAY + HOUR),
        (2026, 12, PARIS, 31 * DAY),
        (2026, 10, ZoneInfo("UTC"), 31 * DAY),
        (2026, 10, None, None),
    ],
)
def test_edges_of_months(year, number, zone, seconds):
    month = month_of(year, number, zone)
    assert seconds is None or month.until - month.since == seconds
    days = list(month.days())
    assert days[0] == date(year, number, 1)
    assert {day.month for day in days} == {number}
    assert month_of(*((year, number + 1) if number < 12 else (year + 1, 1)), zone).since == month.until


def test_which_month():
    now, installed_at = OCTOBER.until + 5 * DAY, OCTOBER.since + 11 * DAY

    def chosen(text):
        return chosen_month(text, now, installed_at, ZoneInfo("UTC")).name

    assert (chosen(None), chosen("2026-10"), chosen("2026-11")) == ("2026-10", "2026-10", "2026-11")
    for wrong in (
        "2026-12",
        "2027-01",
        "2026-13",
        "2026-00",
        "2026",
        "October",
        "2026-1",
        "٢٠٢٦-10",
        "9999-12",
    ):
        with pytest.raises(web.HTTPBadRequest) as refused:
            chosen(wrong)
        assert refused.value.text.startswith("month: ")
    with pytest.raises(web.HTTPNotFound) as refused:
        chosen("2026-09")
    assert "12 October 2026" in refused.value.text


def test_each_alarm_has_plain_words():
    assert PLAIN.keys() == {type_.name for type_ in ALARMS}


# --- a month


@pytest.fixture
def october(site):
    """A site that was installed on the 12th of October 2026, at noon, in Paris."""
    own = site.settings.site.model_copy(update={"time_zone": "Europe/Paris"})
    site.settings = reporting(site, price_per_gb="0.08", currency="EUR").model_copy(update={"site": own})
    site.now = site.installed_at = month_of(2026, 10, PARIS).since + 11 * DAY + 12 * HOUR
    return site


async def pass_time(world, control, seconds, monotonic):
    """gup runs for so long."""
    for _ in range(8):
        world.now += seconds / 8
        monotonic.now += seconds / 8
        await control.state.history.write()


@pytest.fixture
def monotonic(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    before = Recorder.__init__

    def init(self, *given):
        before(self, *given, lambda: clock.now)

    monkeypatch.setattr(Recorder, "__init__", init)
    return clock


async def test_a_month_with_a_late_start_and_a_pause(october, browser, monotonic):
    received = "gup_upstream_received_bytes_total"
    begin = october.now
    async with october.running() as control:
        await october.until(lambda: control.state.incidents._standing is not None)
        sent(october, 40_000_000_000)
        october.counters.add(received, 10_000_000_000, upstream="manager", purpose="fill")
        for day in range(4):
            await heard(october, control, take(1, key(f"2610{12 + day}001")), take(2, key("261012001")))
            await control.state.reports.count_ages()
            await pass_time(october, control, DAY, monotonic)
        today = await report(browser, october, "2026-10")
        assert today["so_far"]
        assert any("not over" in text for text in today["reservations"])
    october.now += 3 * DAY  # off
    async with october.running() as control:
        await control.state.history.write()
        sent(october, 5_000_000)
        for _ in range(14):
            await pass_time(october, control, DAY, monotonic)
            await control.state.reports.count_ages()
        found = await report(browser, october)
        text, headers = await document(browser, october, "2026-10")
        await report(browser, october, "2026-12", 400)
        await report(browser, october, "2026-09", 404)
        november = await report(browser, october, "2026-11")
    assert found["month"] == "2026-10"
    assert (found["since"], found["until"]) == (begin, month_of(2026, 10, PARIS).until)
    assert not found["so_far"]
    traffic = found["traffic"]
    assert (traffic["sent_bytes"], traffic["received_bytes"]) == (40_005_000_000, 10_000_000_000)
    assert found["saved_money"] == "2.40"  # 30.005 GB at 0.08
    days = {day["day"]: day for day in found["days"]}
    assert len(days) == 31
    assert (days["2026-10-11"]["due_seconds"], days["2026-10-12"]["due_seconds"]) == (0, 12 * HOUR)
    assert days["2026-10-25"]["due_seconds"] == 25 * HOUR
    assert sum(day["saved_bytes"] for day in found["days"]) == traffic["saved_bytes"]
    said = " ".join(found["reservations"])
    assert "gup was installed on 12 October 2026" in said
    assert "switched off from 17 October to 18 October" in said
    assert "0.08 EUR" in said
    assert (found["clients_most"], found["counts"], found["counted_by"]) == (2, 17, "hour")
    assert 0 < found["within_a_day"] < 0.5
    assert november["month"] == "2026-11"
    assert "2.40 EUR" in text
    assert "style-src 'sha256-" in headers["Content-Security-Policy"]


async def test_days_that_the_ledger_has_added_up_are_said_to_be(site, browser):
    site.settings = reporting(site, ledger=10 * DAY)
    site.installed_at -= 100 * DAY
    async with site.running():
        sent(site, 10**9)
        found = await report(browser, site, "2026-07")
    assert any("Single days before 22 July 2026" in said for said in found["reservations"])
    assert found["counts"] == 0
    assert any("were not counted" in said for said in found["reservations"])


async def test_without_a_price_no_money(site, browser):
    async with site.running():
        sent(site, 10**9)
        found = await report(browser, site, "2026-08")
        text, _ = await document(browser, site, "2026-08")
    assert (found["price_per_gb"], found["saved_money"]) == (None, None)
    assert "money" not in text.lower()


async def test_more_fetched_than_delivered(site, browser):
    site.settings = reporting(site, price_per_gb="2", currency="€")
    async with site.running():
        received = "gup_upstream_received_bytes_total"
        site.counters.add(received, 3 * 10**9, upstream="manager", purpose="prefetch")
        sent(site, 10**9)
        found = await report(browser, site, "2026-08")
        text, _ = await document(browser, site, "2026-08")
    assert found["saved_money"] == "-4.00"
    assert "\N{MINUS SIGN}4.00 €" in text
    assert "more was fetched than was needed" in text


VOID = {"meta", "br", "link", "img"}


class Checked(html.parser.HTMLParser):
    """Elements that are closed in their order, and what refers to something outside."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.tags, self.styles = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href", "background"):
                self.outside.append((tag, name, value))
            if name == "style" or name.startswith("on"):
                self.styles.append((tag, name, value))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_document(text):
    checked = Checked()
    checked.feed(text)
    checked.close()
    assert checked.open == []
    assert (checked.outside, checked.styles) == ([], [])
    assert not checked.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\(|@import|https?://", text)


async def test_hostile_names_do_nothing_and_nothing_is_outside(site, browser):
    evil = "<script>alert(1)</script>\"'><img src=x>&{{7*7}}"
    before = site.dependencies
    site.dependencies = lambda admin: replace(
        before(admin), label_of=lambda *_: Label(evil, "14.3", evil, "virus_definitions")
    )
    site.settings = reporting(site, price_per_gb="0.5", currency="<b>")
    site.streams = [("14.3 RU2", "French", MONIKER)]
    async with site.running() as control:
        sent(site, 1000)
        site.counters.add_stream("sent", 0, "full", 1000)
        await heard(site, control, take(1, key("260801001"), "<u>1</u>", "<i>"))
        await control.state.reports.count_ages()
        text, _ = await document(browser, site, "2026-08")
        async with browser.get(f"{site.url}/api/v1/report/statement?month=<script>") as answer:
            assert answer.status == 400
    check_document(text)
    assert "&lt;script&gt;alert(1)" in text
    assert "{{7*7}}" in text


async def test_without_addresses_machines_are_not_known(site, browser):
    site.settings = reporting(site, addresses="off")
    async with site.running():
        found = await report(browser, site, "2026-08")
        text, _ = await document(browser, site, "2026-08")
    assert (found["clients_most"], found["within_a_day"], found["versions"]) == (None, None, [])
    assert any("reports.addresses is off" in said for said in found["reservations"])
    check_document(text)


# --- incidents


def alarm(name, id_, since, severity="warning", subject=""):
    return SimpleNamespace(name=name, id=id_, since=since, severity=severity, subject=subject)


async def test_incidents_are_kept_over_restarts_and_clipped_to_the_month(site, browser):
    august = month_of(2026, 8, ZoneInfo("UTC"))
    site.installed_at = august.since - 40 * DAY
    site.now = august.since - 2 * HOUR
    async with site.running() as control:
        book = control.state.incidents
        await site.until(lambda: book._standing is not None)  # the collector's own looks find nothing
        down = alarm("upstream-down", "a", site.now, subject="head-office")
        await book.look([down])
        site.now = august.since + HOUR
        away = alarm("no-upstream", "b", site.now, "critical")
        await book.look([down, away])
        book._standing = None  # as after kill -9: what stood goes on under its id
        await book.look([down, away])
        site.now += HOUR
        await book.look([away])
        site.now += HOUR
        await book.look([])
        again = alarm("upstream-down", "c", site.now, subject="<b>")
        await book.look([again])
        site.now += 60
        found = await report(browser, site, "2026-08")
        await book.look([])
        text, _ = await document(browser, site, "2026-08")
        july = await report(browser, site, "2026-07")
    rows = {(row["name"], row["subject"]): row for row in found["incidents"]}
    assert rows["no-upstream", None]["seconds"] == 2 * HOUR
    assert rows["upstream-down", "head-office"]["seconds"] == 2 * HOUR
    assert (rows["upstream-down", "<b>"]["seconds"], rows["upstream-down", "<b>"]["lasts"]) == (60, True)
    assert found["incidents"][0]["name"] == "no-upstream"
    assert [row["began_at"] for row in found["notable"]] == [down.since, away.since, again.since]
    assert [row["seconds"] for row in july["incidents"]] == [2 * HOUR]
    assert "&lt;b&gt;" in text
    check_document(text)


async def test_an_incident_that_no_restart_knows_ends_then(tmp_path):
    database, now = StatsDatabase(tmp_path, lambda *_: None), 100.0
    first = Incidents(database, lambda: now)
    await first.look([alarm("no-upstream", "a", 90.0)])
    now = 500.0
    await Incidents(database, lambda: now).look([])
    found = await database.run(lambda db: incidents(db, 0, 1000))
    assert [(one.began_at, one.ended_at) for one in found] == [(90.0, 500.0)]
    await database.run(lambda db: prune_incidents(db, 600.0))
    assert await database.run(lambda db: incidents(db, 0, 1000)) == []
    await database.stop()


def test_seconds_of_a_day_add_up():
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE covered(day TEXT PRIMARY KEY, seconds REAL NOT NULL)")
        assert covered_days(db, "2026-10-01", "2026-10-31") == (None, {})
        rng = random.Random(1)
        parts = {day: [rng.random() for _ in range(20)] for day in ("2026-09-30", "2026-10-12")}
        for day, seconds in parts.items():
            for one in seconds:
                add_covered(db, day, one)
        first, found = covered_days(db, "2026-10-01", "2026-10-31")
        assert (first, found) == ("2026-09-30", {"2026-10-12": pytest.approx(sum(parts["2026-10-12"]))})


# --- on paper


async def full_month(world, browser, monotonic):
    """The statement of an October in which much happened."""
    rng = random.Random(3)
    world.streams = [("14.3 RU2", "French", MONIKER)]
    world.now = world.installed_at = month_of(2026, 10, PARIS).since + 11 * DAY + 12 * HOUR
    async with world.running() as control:
        book = control.state.incidents
        await world.until(lambda: book._standing is not None)
        for day in range(22):
            received = rng.randrange(3 * 10**8)
            sent(world, 8 * received + rng.randrange(10**9))
            world.counters.add(
                "gup_upstream_received_bytes_total", received, upstream="manager", purpose="fill"
            )
            world.counters.add_stream("sent", 0, "full", 5 * received)
            world.counters.add_stream("sent", 0, "delta", 3 * received)
            world.counters.add_stream("received", 0, "full", received)
            weekend = (day + 3) % 7 < 2
            for client in range(1, 60):
                if rng.random() < (0.15 if weekend else 0.8):
                    version = rng.choice(("14.3.4615.2000", "14.3 RU2", ""))
                    row = take(client, key(f"2610{12 + day:02}001"), version, "fr")
                    if 12 + day <= 31:
                        await heard(world, control, row)
            await control.state.reports.count_ages()
            if day in (4, 9):
                rows = [alarm("upstream-down", f"u{day}", world.now, subject="head-office")]
                if day == 9:
                    rows.append(alarm("no-upstream", "n", world.now, "critical"))
                await book.look(rows)
            await pass_time(world, control, HOUR, monotonic)
            await book.look([])
            if day in (15, 16):
                world.now += 23 * HOUR  # off
                monotonic.now += 3600
            else:
                await pass_time(world, control, 23 * HOUR, monotonic)
        return (await document(browser, world, "2026-10"))[0]


@pytest.mark.long
@pytest.mark.needs("chromium")
async def test_it_is_printed_on_few_pages(october, browser, monotonic, tmp_path):
    text = await full_month(october, browser, monotonic)
    check_document(text)
    file = tmp_path / "statement.html"
    file.write_text(text)
    pages, wide, complaints = await asyncio.to_thread(printed, file, tmp_path / "statement.pdf")
    assert pages in (2, 3)
    assert not wide, "nothing is wider than a telephone's window or the sheet"
    assert complaints == []


def printed(file, pdf):
    """Pages of the PDF that Chromium makes, whether anything is too wide, and what it complained of."""
    with chromium() as page:
        page.open(file.as_uri())
        wide = []
        for width in (390, 794):
            page.look(width=width)
            wide += page.run("return document.documentElement.scrollWidth > innerWidth ? [innerWidth] : []")
            page.picture(file.with_name(f"statement-{width}.png"))
        settings = {"preferCSSPageSize": True, "printBackground": True}
        made = base64.b64decode(page._tell("Page.printToPDF", **settings)["data"])
        pdf.write_bytes(made)
        assert all(url.startswith("file://") for url in page.requests())
        complaints = page.complaints()
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", made)), wide, complaints
