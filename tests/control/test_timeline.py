"""The timeline against a list of all changes; its questions over a fake process; clocks and names."""

import csv
import functools
import io
import itertools
import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from control import calls
from control.test_usage_reports import DAY, MONIKER, NOON, PATCHES, key, reporting, take
from control.test_usage_reports import site as site  # noqa: PLC0414 - a fixture
from hypothesis import given
from hypothesis import strategies as st

from gup.control.api.past_revisions import read_moment
from gup.control.stats import timeline
from gup.control.stats.client_records import Batch, write_batch
from gup.control.stats.database import StatsDatabase

STREAM = ("14.3 RU2", "French", MONIKER)
HOUR = 3600


def revision(number):
    return f"2608{1 + number // 3:02}{1 + number % 3:03}"


class Model:
    """All changes, as a list; what the timeline says is compared with it."""

    def __init__(self):
        self.changes = []  # client, stream, time, revision

    def note(self, client, stream, at, number):
        before = self.at(client, stream, at)
        if before is None or before[1] != number:
            self.changes = [row for row in self.changes if row[:3] != (client, stream, at)]
            self.changes.append((client, stream, at, number))

    def rows(self, client, stream):
        return sorted(row[2:] for row in self.changes if row[:2] == (client, stream))

    def at(self, client, stream, at):
        return next((row for row in reversed(self.rows(client, stream)) if row[0] <= at), None)


@pytest.fixture
def database(tmp_path):
    opened = StatsDatabase(tmp_path, lambda *_: None)
    yield opened
    opened.close()


def standing(db, client, stream, at):
    lines = timeline.lines_of(db, [client])
    if stream not in lines:
        return timeline.Standing(None, None, exact=True)
    return timeline.Reader(db).at(lines[stream], at)


def streams(count):
    return [(*STREAM[:2], f"{{{number}}}") for number in range(count)]


class Run:
    """The timeline and the model, through random takes, days and reductions."""

    def __init__(self, database, seed):
        self.database, self.random = database, random.Random(seed)
        self.model, self.now, self.oldest = Model(), int(NOON), 0

    def take(self):
        client, stream, number = (self.random.randrange(limit) for limit in (3, 2, 20))
        self.now += self.random.choice((4, 600, 5000, 40_000))  # within 3 s the order of takes is not known
        batch = Batch()
        batch.see(f"10.0.0.{client}", self.now)
        batch._ask((f"10.0.0.{client}", streams(2)[stream], revision(number), "", True), (self.now, ""))
        self.database.transact(lambda db: write_batch(db, batch))
        self.model.note(client, stream, self.now, number)

    def pack(self):
        line, today = 0, self.now // DAY
        while line is not None:
            line = self.database.transact(functools.partial(timeline.pack_some, today=today, from_line=line))

    def thin(self):
        self.pack()
        while self.database.transact(
            lambda db: not self._is_thin(db) and timeline.reduce_some(db, self.oldest, 0)
        ):
            pass

    def drop(self):
        self.pack()
        self.oldest = max(self.oldest, int(self.now // DAY) - 3)
        while self.database.transact(lambda db: timeline.reduce_some(db, self.oldest)):
            pass

    @staticmethod
    def _is_thin(db):
        return db.execute("SELECT min(thin AND next < 0) FROM packed_days WHERE day >= 0").fetchone()[0] != 0

    def compare(self, db):
        """How many answers were not exact."""
        since, inexact = timeline.kept(db, NOON, self.oldest), 0
        for client, stream in itertools.product(range(3), range(2)):
            rows = self.model.rows(client, stream)
            moments = {self.now, int(NOON), *(at + off for at, _ in rows for off in (-1, 0, 7000))}
            for at in moments:
                if self.oldest * DAY <= at <= self.now:
                    found = standing(db, f"10.0.0.{client}", streams(2)[stream], at)
                    self._check(found, at, rows, exact=at >= since.exact_since)
                    inexact += not found.exact
        return inexact

    @staticmethod
    def _check(found, at, rows, *, exact):
        told = found.change and (found.change.at, timeline.revision_of(found.change.state))
        true = [(when, revision(number)) for when, number in rows if when <= at]
        assert found.exact or not exact
        if found.exact:
            assert told == (true[-1] if true else None)
        elif told is not None:
            assert told in true
            assert told[0] // DAY < at // DAY


@pytest.mark.parametrize("seed", range(6))
def test_it_says_what_a_list_of_all_changes_says(seed, database):
    """Exact answers are right. Where a day is thinned, what is told held before that day."""
    run = Run(database, seed)
    steps = run.random.choices(("pack", "thin", "drop", "take"), (4, 1.5, 1, 94), k=30 + 40 * seed)
    for step in steps:
        getattr(run, step)()
    told_by_day = database.transact(run.compare)
    assert told_by_day or "thin" not in steps[:-50] or "drop" in steps


@given(
    st.lists(
        st.tuples(st.integers(0, 1023), st.integers(0, 86_399), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=400,
        unique_by=lambda row: row[:2],
    ),
    st.integers(0, 1000),
)
def test_what_is_packed_is_unpacked(rows, chunk):
    first, day = chunk * 1024, 20_000 * 86_400
    rows = sorted((first + line, day + at, state) for line, at, state in rows)
    assert timeline.unpack(timeline.pack(rows, first, day), first, day) == rows


@given(st.integers(0, 2**31))
def test_a_body_that_is_damaged_says_nothing_and_stops_nothing(seed):
    rng = random.Random(seed)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        db.executescript(timeline.TABLES)
        body = bytearray(timeline.pack([(5, 86_400 + 7, 9), (6, 86_400 + 8, 9)], 0, 86_400))
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        db.execute("INSERT INTO packed VALUES(?, ?)", (1 << 20, bytes(body)))
        db.execute("INSERT INTO packed_days VALUES(1, 100, 0, 0)")
        assert timeline.Reader(db).at([7], 2 * 86_400).change is None


def test_a_client_that_changes_all_the_time_keeps_the_last_of_a_day(database):
    for number in range(300):
        batch = Batch()
        batch.see("10.0.0.1", NOON + 10 * number)
        batch._ask(("10.0.0.1", STREAM, revision(number % 2), "", True), (NOON + 10 * number, ""))
        database.transact(lambda db, batch=batch: write_batch(db, batch))

    def look(db):
        assert db.execute("SELECT count(*) FROM changes").fetchone()[0] == timeline.MAX_DAILY
        last = standing(db, "10.0.0.1", STREAM, NOON + 2990)
        assert (last.change.at, last.exact) == (NOON + 2990, True)
        assert not standing(db, "10.0.0.1", STREAM, NOON + 2500).exact

    database.transact(look)


def test_lines_are_bounded_and_those_of_known_clients_stay(database):
    batch = Batch()
    for number in range(50):
        batch.see(f"10.0.0.{number}", NOON + number)
        batch._ask((f"10.0.0.{number}", STREAM, revision(1), "", True), (NOON + number, ""))
    database.transact(lambda db: write_batch(db, batch))
    database.transact(lambda db: db.execute("DELETE FROM clients WHERE name = '10.0.0.3'"))

    def names():
        return set(database.transact(timeline.names_of))

    database.transact(lambda db: timeline.forget_some(db, NOON + 10))
    assert {f"10.0.0.{number}" for number in range(50)} - names() == {"10.0.0.3"}
    database.transact(lambda db: timeline.forget_some(db, NOON, 20))
    assert names() == {f"10.0.0.{number}" for number in range(30, 50)}


def test_a_file_of_an_earlier_version_begins_with_what_clients_have_now(database):
    batch = Batch()
    batch.see("10.0.0.1", NOON)
    batch._ask(("10.0.0.1", STREAM, revision(4), "", True), (NOON, ""))
    database.transact(lambda db: write_batch(db, batch))

    def forget(db):
        timeline.forget_clients(db)
        db.execute("DELETE FROM about WHERE name = 'timeline_since'")

    database.transact(forget)
    database.close()  # opened again, as after an upgrade
    assert database.transact(lambda db: timeline.begin(db, NOON + 60)) == NOON + 60
    database.transact(
        lambda db: [
            _same(standing(db, "10.0.0.1", STREAM, NOON + 70).change, NOON, revision(4)),
            _same(standing(db, "10.0.0.1", STREAM, NOON - 1).change, None, None),
        ]
    )


def _same(change, at, text):
    assert (change and change.at, change and timeline.revision_of(change.state)) == (at, text)


@pytest.mark.parametrize(
    ("text", "zone", "at", "note"),
    [
        ("2026-11-20 14:05", "Europe/Paris", 1_795_179_900, None),
        ("2026-11-20T14:05", "UTC", 1_795_183_500, None),
        ("2026-11-20T14:05+01:00", "UTC", 1_795_179_900, None),
        ("2026-11-20T14:05 01:00", "UTC", 1_795_179_900, None),  # a plus sign in a query
        ("2026-11-20T13:05Z", "UTC", 1_795_179_900, None),
        ("1795179900", "UTC", 1_795_179_900, None),
        ("2026-10-25 02:30", "Europe/Paris", 1_792_888_200, "2026-10-25T02:30+01:00"),
        ("2026-10-25T02:30+01:00", "Europe/Paris", 1_792_891_800, None),
        ("2026-03-29 02:30", "Europe/Paris", 1_774_747_800, "03:30"),
    ],
)
def test_times_are_read_in_the_sites_zone(text, zone, at, note):
    found, said = read_moment(text, ZoneInfo(zone))
    assert found == at
    assert (said is None) == (note is None)
    assert note is None or note in said


# --- over a fake process


async def get(browser, world, path, status=200):
    found, told = await calls.get(browser, world, f"/api/v1/report/timeline{path}")
    assert found == status, told
    return told


async def settle(control):
    await control.state.reports.write_clients()


def told(report):
    return [(row["revision"], row["how"], row["age_days"], row["exact"]) for row in report["standings"]]


async def heard(world, control, *rows):
    """Takes, as a worker tells of them, are written."""
    control.state.take([json.dumps({"type": "taken", "at": world.now, "rows": rows}).encode()])
    await settle(control)


async def test_which_revision_had_this_client_then(site, browser):
    async with site.running() as control:
        await heard(site, control, take(1, key("260731001")), take(2, key("260801001")))
        site.now += 6 * HOUR
        delta = "xdelta260731001_To_260801001.dax"
        await heard(site, control, take(1, key("260731001", delta)))
        site.now += 30 * HOUR
        delta = "xdelta260802001_To_260802002.dax"  # its manager has updated it; the delta breaks off
        await heard(site, control, take(1, key("260801001", delta), sent=0))
        await control.state.reports.prune()
        before = await get(browser, site, f"?client=10.0.0.1&at={NOON - 1:.0f}")
        assert told(before) == [(None, None, None, True)]
        for after, expected in (
            (0, ("260731001", "taken", 1, True)),
            (6 * HOUR - 1, ("260731001", "taken", 1, True)),
            (6 * HOUR, ("260801001", "taken", 0, True)),
            (36 * HOUR, ("260802001", "stated", 1, True)),
        ):
            found = await get(browser, site, f"?client=10.0.0.1&at={NOON + after:.0f}")
            assert told(found) == [expected]
        assert "Taken does not mean installed" in found["saying"]
        assert found["standings"][0]["product"] == "Virus Definitions Win32"
        assert found["seen_at"] == site.now
        for text, count in ((MONIKER, 1), ("virus def", 1), ("patch", 0)):
            found = await get(browser, site, f"?client=10.0.0.1&stream={text}")
            assert len(found["standings"]) == count
        assert "gup report content" in found["note"]
        listed = await get(browser, site, "?client=::ffff:10.0.0.1&days=3")
        assert [(row["revision"], row["how"]) for row in listed["changes"]] == [
            ("260802001", "stated"),
            ("260801001", "taken"),
            ("260731001", "taken"),
        ]
        nobody = await get(browser, site, "?client=10.0.0.99")
        assert (nobody["standings"], nobody["note"]) == ([], "there is no record of 10.0.0.99")
        for wrong in (
            *("client=10.0.0.300", "client=%3Dcmd", "at=yesterday", "at=14:05", "days=0", "at="),
            *(f"at={site.now + 5:.0f}", "at=9999999999999999", "at=2026-13-01"),
        ):
            await get(browser, site, f"?{wrong}", 400)
        assert told(await get(browser, site, "?client=10.0.0.1&at=0001-01-01")) == [(None, None, None, True)]


async def test_after_a_new_setup_the_older_one_counts(site, browser):
    """Also of a client that took deltas, which state a newer revision than the one that it took now."""
    async with site.running() as control:
        await heard(site, control, take(1, key("260731002", "xdelta260731002_To_260801001.dax")))
        site.now += HOUR
        await heard(site, control, take(1, key("260730001")))
        found = await get(browser, site, "?client=10.0.0.1")
        assert told(found) == [("260730001", "taken", 2, True)]
        site.now += HOUR  # what no manager had can't be stated
        await heard(site, control, take(1, key("260731002", "xdelta999999999_To_260801001.dax"), sent=0))
        assert told(await get(browser, site, "?client=10.0.0.1")) == [("260730001", "taken", 2, True)]


async def test_names_change_and_the_timeline_stays(site, browser):
    async with site.running() as control:
        await heard(site, control, take(1, key("260731001")))
    site.settings = reporting(site, addresses="hashed")
    async with site.running() as control:
        site.now += HOUR
        await heard(site, control, take(1, key("260801001")))
        found = await get(browser, site, "?client=10.0.0.1&days=2")
        assert [row["revision"] for row in found["changes"]] == ["260801001", "260731001"]
        assert found["client"].startswith("h-")
        by_hash = await get(browser, site, f"?client={found['client']}&days=2")
        assert by_hash["changes"] == found["changes"]
    for path in filter(Path.is_file, (site.store.root / "reports").rglob("*")):
        assert b"10.0.0.1" not in path.read_bytes(), path
    site.settings = reporting(site, addresses="full")
    async with site.running() as control:
        site.now += HOUR
        await heard(site, control, take(1, key("260801002")))
        found = await get(browser, site, "?client=10.0.0.1&days=2")
        assert [row["revision"] for row in found["changes"]] == ["260801002", "260801001", "260731001"]
        assert [row["revision"] for row in found["standings"]] == []
        assert told(await get(browser, site, "?client=10.0.0.1")) == [("260801002", "taken", 0, True)]
    site.settings = reporting(site, addresses="hashed")  # two records of one name
    async with site.running() as control:
        found = await get(browser, site, "?client=10.0.0.1&days=2")
        assert [row["revision"] for row in found["changes"]] == ["260801002", "260801001", "260731001"]
    site.settings = reporting(site, addresses="off")
    async with site.running() as control:
        await settle(control)
        found = await get(browser, site, "?client=10.0.0.1&days=2")
        assert (found["changes"], found["client"]) == ([], None)
        assert "reports.addresses is off" in found["note"]
        await control.state.reports.count_ages()
        assert "reports.addresses is off" in (await get(browser, site, ""))["note"]
    with closing(sqlite3.connect(site.store.root / "reports" / "stats.db")) as db:
        counts = [
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("known_clients", "lines", "changes", "packed")
        ]
    assert counts == [0, 0, 0, 0]


async def test_who_is_forgotten_keeps_its_timeline_while_that_is_kept(site, browser):
    site.settings = reporting(site, retention=5 * DAY, timeline=30 * DAY)
    async with site.running() as control:
        await heard(site, control, take(1, key("260731001")))
        for days, known in ((10, True), (21, False)):
            site.now += days * DAY
            await control.state.reports.prune()
            assert (await calls.get(browser, site, "/api/v1/clients"))[1]["known"] == 0
            found = await get(browser, site, "?client=10.0.0.1")
            assert (len(found["standings"]), found["seen_at"]) == (1 if known else 0, None)


async def test_the_sites_shares_by_age(site, browser):
    async with site.running() as control:
        await site.until(lambda: control.state.reports.ages)  # the first count, of nobody
        rows = {
            1: "260801001",
            2: "260731002",
            3: "260729001",
            4: "260726001",
            5: "260715001",
            6: "260501001",
        }
        await heard(
            site,
            control,
            *(take(client, key(name)) for client, name in rows.items()),
            take(7, key("260801001"), sent=0),
            *(take(client, key("260301001", moniker=PATCHES)) for client in (1, 2)),
        )
        await control.state.reports.count_ages()
        found = await get(browser, site, "?days=1")
        share = next(row for row in found["shares"] if row["product"] is None)
        ages = {"1d": 2, "3d": 1, "7d": 1, "30d": 1, "older": 1, "unknown": 1}
        assert (share["clients"], share["current"], share["ages"]) == (7, 1, ages)
        streams = {row["moniker"]: row for row in found["shares"] if row["product"]}
        assert (streams[PATCHES]["clients"], streams[PATCHES]["ages"]["older"]) == (2, 2)
        assert (streams[MONIKER]["ages"], streams[MONIKER]["newest"]) == (ages, "260801001")
        async with browser.get(f"{site.url}/metrics") as answer:
            text = await answer.text()
        assert 'gup_clients_by_age{age="1d"} 2.0' in text
        assert 'gup_clients_by_age{age="unknown"} 1.0' in text
        site.now += 8 * DAY  # nobody is active any more
        await control.state.reports.count_ages()
        latest = await get(browser, site, f"?at={site.now:.0f}")
        assert [row["clients"] for row in latest["shares"]] == [0]
        then = await get(browser, site, f"?at={NOON + 1800:.0f}")
        assert next(row for row in then["shares"] if row["product"] is None)["ages"] == ages
        nothing = await get(browser, site, f"?at={NOON + 2 * DAY:.0f}")
        assert (nothing["shares"], "was off" in nothing["note"]) == ([], True)
        days = await get(browser, site, "?days=30")
        assert len([row for row in days["shares"] if row["product"] is None]) == 2


async def test_old_hours_become_days(site, browser):
    async with site.running() as control:
        await heard(site, control, take(1, key("260801001")))
        for _ in range(30):
            await control.state.reports.count_ages()
            site.now += HOUR
        site.now += timeline.HOURLY_SECONDS
        await control.state.reports.prune()
        found = await get(browser, site, "?days=200")
        assert len([row for row in found["shares"] if row["product"] is None]) == 2
    with closing(sqlite3.connect(site.store.root / "reports" / "stats.db")) as db:
        assert db.execute("SELECT count(*) FROM shares WHERE stream = 0").fetchone() == (2,)


async def test_as_a_table_without_formulas(site, browser):
    async with site.running() as control:
        evil = "=HYPERLINK(1)"
        await heard(site, control, take(1, key("260801001", moniker=evil)), take(1, key("260801001")))
        await control.state.reports.count_ages()
        for query in ("client=10.0.0.1&at=1785585600", "client=10.0.0.1&days=2", "days=2"):
            async with browser.get(f"{site.url}/api/v1/report/timeline?format=csv&{query}") as answer:
                assert answer.content_type == "text/csv"
                rows = list(csv.DictReader(io.StringIO(await answer.text())))
            assert rows[0]["line"] == "record"
            assert "Taken does not mean installed" in rows[0]["meaning"]
            assert rows[0]["exact_since_at"].startswith("2026-08-01T12:00:00")
            assert len(rows) >= 3
            for row in rows:
                assert not any(value.startswith(("=", "+", "-", "@")) for value in row.values() if value)
        assert any(row["moniker"] == "'" + evil for row in rows)


async def test_a_clock_that_was_ahead(site, browser):
    async with site.running() as control:
        await heard(site, control, take(1, key("260730001")))
        await control.state.history.write()
        site.now += 40 * DAY
        await heard(site, control, take(1, key("260731001")), take(2, key("260731001")))
        await control.state.reports.count_ages()
        site.now += 3 * DAY
        await control.state.reports.prune()  # packs what is in the future
        await control.state.history.write()
        site.now -= 43 * DAY - 60
        await heard(site, control, take(1, key("260801001")))
        await control.state.history.write()
        site.now += 60
        for client, expected in ((1, ["260801001", "260730001"]), (2, ["260731001"])):
            found = await get(browser, site, f"?client=10.0.0.{client}&days=3")
            assert [row["revision"] for row in found["changes"]] == expected
            assert all(row["at"] <= site.now for row in found["changes"])
        site.now += HOUR
        await heard(site, control, take(2, key("260801001")))
        found = await get(browser, site, "?client=10.0.0.2&days=3")
        assert [row["revision"] for row in found["changes"]] == ["260801001", "260731001"]
        assert all(row["at"] <= site.now for row in (await get(browser, site, "?days=90"))["shares"])
