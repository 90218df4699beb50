"""Clients over a fake process: who was seen, who took what, restarts pending; savings that add up; files that
break.
"""

import asyncio
import csv
import io
import random
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from control import calls
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.content.catalog import Label
from gup.control.stats.client_records import WINDOWS, ClientWindows, ReceivedParts, joined
from gup.control.stats.database import StatsDatabase
from gup.control.stats.history import METRICS
from gup.metrics import BY_NAME, STREAM_WASTED

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
PATCHES = "{11111111-2222-3333-4444-555555555555}"
DAY = 86400.0
NOON = 1_785_585_600.0
"""Of 2026-08-01, UTC."""
LABELS = {
    MONIKER: Label("Virus Definitions Win32", "14.3", "French", "virus_definitions"),
    PATCHES: Label("Client Patch 14.3", "14.3", "French", "client_patches"),
}
OLD, NEW = "14.3.4615.2000", "14.3.4615.2100"


@pytest.fixture
def site(world):
    """A world whose catalogue lists two streams, and whose time is that of the revisions in these tests."""
    world.now, world.installed_at = NOON, NOON - 3600
    own = world.settings.site.model_copy(update={"time_zone": "UTC"})
    world.settings = world.settings.model_copy(update={"site": own})
    before = world.dependencies
    world.dependencies = lambda admin: replace(
        before(admin), label_of=lambda stream, _file: LABELS.get(stream[2])
    )
    return world


def reporting(site, **changes):
    """The settings with other `[reports]`."""
    return site.settings.model_copy(update={"reports": site.settings.reports.model_copy(update=changes)})


def key(revision, file="full.zip", moniker=MONIKER):
    return f"14.3 RU2/French/{moniker}/{revision}/{file}"


def take(client, key_text, version="", language="", sent=1):
    return [f"10.0.0.{client}", key_text, version, language, sent]


def tell(world, *rows):
    world.tell(type="taken", at=world.now, rows=rows)


async def get(browser, world, path, status=200):
    found, told = await calls.get(browser, world, "/api/v1" + path)
    assert found == status, told
    return told


async def table(browser, world, path):
    """The rows of a report as CSV."""
    async with browser.get(f"{world.url}/api/v1{path}?format=csv") as answer:
        assert answer.content_type == "text/csv"
        return list(csv.DictReader(io.StringIO(await answer.text())))


async def asked(browser, world, path, *, clients):
    """The answer, once so many clients are known."""
    while True:
        if (await get(browser, world, "/clients"))["known"] == clients:
            return await get(browser, world, path)
        await asyncio.sleep(0.01)


def columns(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


def sent(site, count, **labels):
    site.counters.add("gup_client_sent_bytes_total", count, **labels or {"source": "cache"})


# --- clients


async def test_content_taken_here(site, browser):
    record = site.commit(site.key("260801002"), b"x" * 10)
    async with site.running():
        site.tell_committed(record)
        delta = "xdelta260801001_To_260801002.dax"
        tell(
            site,
            take(1, key("260801001"), OLD, "fr"),
            take(1, key("260801001", delta), OLD, "fr"),
            take(2, key("260801001")),
            take(3, key("260801001", delta), sent=0),  # asked only; says that it holds 001
            take(4, key("260731003"), sent=[0, 60, 100]),
            take(5, key("260731003"), sent=[0, 60, 100]),
            take(5, key("260731003"), sent=[50, 100, 100]),
            take(6, key("991231001")),  # no revision of this century's
        )
        (stream,) = (await asked(browser, site, "/report/content", clients=6))["content"]
    named = ("product", "language", "type", "moniker")
    assert columns([stream], *named) == [("Virus Definitions Win32", "French", "virus_definitions", MONIKER)]
    assert columns([stream], "newest_held", "newest_asked", "newest_taken") == [("260801002",) * 3]
    assert columns([stream], "clients", "current", "behind") == [(5, 1, 4)]
    assert columns(stream["revisions"], "revision", "clients", "took") == [
        ("260801002", 1, 1),
        ("260801001", 2, 2),
        ("260731003", 1, 1),
    ]
    assert columns(stream["lagging"], "address", "revision", "lag_revisions", "lag_seconds") == [
        ("10.0.0.4", None, 3, None),
        ("10.0.0.5", "260731003", 2, DAY),
        ("10.0.0.2", "260801001", 1, 0.0),
        ("10.0.0.3", "260801001", 1, 0.0),
    ]


async def test_a_machine_set_up_anew_stands_where_it_was_put(site, browser):
    async with site.running():
        tell(site, take(1, key("260801002")))
        site.now += 3600
        tell(site, take(1, key("260731001")))
        (found,) = (await asked(browser, site, "/report/content", clients=1))["content"]
    taken = columns(found["revisions"], "revision", "clients", "took")
    assert taken == [("260801002", 0, 1), ("260731001", 1, 1)]
    assert found["lag_revisions"] == 2  # nothing is held: the site lags behind all that is known


async def test_what_the_site_lacks_is_its_lag(site, browser):
    record = site.commit(site.key("260730001"), b"x")
    async with site.running():
        site.tell_committed(record)
        tell(site, take(1, key("260801001"), sent=0))
        (found,) = (await asked(browser, site, "/report/content", clients=1))["content"]
    assert (found["newest_held"], found["newest_asked"]) == ("260730001", "260801001")
    assert (found["lag_revisions"], found["lag_seconds"]) == (1, 2 * DAY)


async def test_restart_pending(site, browser):
    patch = key("260801001", moniker=PATCHES)
    async with site.running():
        builds = {1: OLD, 2: OLD, 3: "", 4: "14.3 RU2"}
        tell(site, *(take(client, patch, build, "fr") for client, build in builds.items()))
        tell(site, take(5, key("260801001"), OLD, "fr"))  # definitions need no restart
        site.now += 3600
        tell(
            site,
            take(1, key("260801002"), OLD, "fr"),
            take(2, key("260801002"), NEW, "fr"),
            take(2, patch, NEW, "fr"),  # the same once more
        )
        found = await asked(browser, site, "/report/clients", clients=5)
    assert found["catalogue_known"]
    assert (found["pending"], found["unknown"]) == (1, 2)
    assert columns(found["restart_pending"], "address", "state", "version") == [
        ("10.0.0.1", "pending", OLD),
        ("10.0.0.3", "unknown", None),
        ("10.0.0.4", "unknown", "14.3 RU2"),
    ]
    assert "Taken does not mean installed" in found["saying"]
    assert {"version": NEW, "language": "fr", "clients": 1} in found["clients"]


async def test_clients_page_by_page(site, browser):
    async with site.running():
        for number in range(1, 8):
            site.now += 1
            tell(site, take(number, key("260801001"), "14.3 RU2" if number % 2 else "", "fr"))
        page, found = await asked(browser, site, "/clients?limit=3", clients=7), []
        while page["cursor"]:
            found += page["clients"]
            page = await get(browser, site, f"/clients?limit=3&cursor={page['cursor']}")
        found += page["clients"]
        assert [row["address"] for row in found] == [f"10.0.0.{n}" for n in range(7, 0, -1)]
        some = await get(browser, site, "/clients?version=14.3%20ru2&seen=1h")
        assert (some["matching"], some["known"]) == (4, 7)
        for wrong in (
            "cursor=nonsense",
            "limit=0",
            "limit=x",
            "seen=2h",
            "cursor=WzEsICJhIl0=",
            "colour=red",
        ):
            await get(browser, site, f"/clients?{wrong}", 400)


async def test_what_clients_state_is_no_formula_in_a_table(site, browser):
    async with site.running():
        tell(site, take(1, key("260801001", moniker=PATCHES), "=cmd|' /C calc'!A0", '"a",b'))
        await asked(browser, site, "/clients", clients=1)
        row = (await table(browser, site, "/report/clients"))[0]
    assert (row["version"], row["language"]) == ("'=cmd|' /C calc'!A0", '"a",b')


async def test_addresses_are_hashed_or_left_out_when_the_settings_say_so(site, browser):
    async with site.running():
        tell(site, take(1, key("260801001")))
        await asked(browser, site, "/clients", clients=1)
    site.settings = reporting(site, addresses="hashed")
    async with site.running() as control:
        await control.state.reports.write_clients()
        tell(site, take(1, key("260801002")))  # of a worker that has not heard of it yet
        tell(site, ["h-0123456789abcdef", key("260801001"), "", "", 1])
        found = await asked(browser, site, "/clients", clients=2)
        content = (await get(browser, site, "/report/content"))["content"][0]
    assert all(row["address"].startswith("h-") for row in found["clients"])
    assert [row["clients"] for row in content["revisions"]] == [1, 1]
    for path in filter(Path.is_file, (site.store.root / "reports").rglob("*")):
        assert b"10.0.0.1" not in path.read_bytes(), path
    site.settings = reporting(site, addresses="off")
    async with site.running() as control:
        site.tell(type="used", at=site.now, clients=["h-0123456789abcdef"])
        await site.until(lambda: control.state.clients.counts(site.now)["1h"])
        found = await get(browser, site, "/clients")
        content = await get(browser, site, "/report/content")
    assert (found["known"], found["clients"], content["content"]) == (1, [], [])
    assert "reports.addresses is off" in content["note"]


async def test_who_was_not_seen_for_long_is_forgotten(site, browser):
    async with site.running() as control:
        tell(site, take(1, key("260801001")))
        site.now += DAY
        tell(site, *(take(n, key("260801001")) for n in range(2, 7)))
        await asked(browser, site, "/clients", clients=6)
        site.now += 89.5 * DAY
        for changes, known in (({}, 5), ({"max_clients": 3}, 3)):
            site.settings = reporting(site, **changes)
            await control.state.reports.prune()
            assert (await get(browser, site, "/clients"))["known"] == known


# --- the ledger


async def test_savings_by_day_add_up_over_restarts(site, browser):
    site.streams = [("14.3 RU2", "French", MONIKER)]
    received = "gup_upstream_received_bytes_total"
    async with site.running():
        sent(site, 1000)
        site.counters.add_stream("sent", 0, "full", 1000)
        site.counters.add(received, 300, upstream="manager", purpose="fill")
        site.counters.add_stream("received", 0, "full", 300)
        first = await get(browser, site, "/savings")
    sent(site, 50, source="fill")  # while no controller runs
    site.now += DAY
    async with site.running():
        sent(site, 7)
        site.counters.waste("overlap", (0, "full"), 5)
        site.counters.add(received, 100, upstream="manager", purpose="prefetch")
        second = await get(browser, site, "/report/savings")
        only_one = await get(browser, site, "/savings?days=1")
        rows = await table(browser, site, "/report/savings")
    assert first["today"] == first["since_install"]
    assert (first["today"]["saved_bytes"], first["days"][0]["day"]) == (700, "2026-08-01")
    whole = {"sent_bytes": 1000, "received_bytes": 300, "saved_bytes": 700, "wasted_bytes": 0}
    named = {"product": "Virus Definitions Win32", "language": "French", "kind": "full"}
    assert first["days"][0]["streams"] == [named | whole]
    assert [day["day"] for day in second["days"]] == ["2026-08-02", "2026-08-01"]
    today = second["today"]
    assert (today["sent_bytes"], today["received_bytes"], today["saved_bytes"]) == (57, 100, -43)
    assert today["wasted"]["overlap"] == today["wasted_bytes"] == 5
    assert second["since_install"]["sent_bytes"] == 1057 == sum(day["sent_bytes"] for day in second["days"])
    assert second["last_30_days"] == second["since_install"] == only_one["since_install"]
    assert [day["day"] for day in only_one["days"]] == ["2026-08-02"]
    sums = {name: sum(int(row[name]) for row in rows) for name in rows[0] if name.endswith("_bytes")}
    assert (sums["wasted_overlap_bytes"], sums["wasted_bytes"]) == (5, 5)
    assert sums["sent_bytes"] == 1000  # of streams: the rest was counted for none


async def test_what_was_counted_before_the_ledger_is_of_no_day(site, browser):
    sent(site, 900)
    site.now += 10 * DAY
    async with site.running():
        found = await get(browser, site, "/savings")
    assert [day["day"] for day in found["days"]] == [None]
    assert (found["today"]["sent_bytes"], found["since_install"]["sent_bytes"]) == (0, 900)


async def test_old_days_are_added_up(site, browser):
    site.settings = reporting(site, ledger=5 * DAY)
    async with site.running() as control:
        for _ in range(8):
            sent(site, 10)
            await control.state.history.write()
            await control.state.reports.prune()
            found = await get(browser, site, "/savings?days=100")
            site.now += DAY
    assert found["days"][-1]["day"] is None
    assert len(found["days"]) == 7
    assert sum(day["sent_bytes"] for day in found["days"]) == 80


async def test_counters_that_begin_anew_begin_anew_savings(site, browser):
    sent(site, 900)
    async with site.running():
        assert (await get(browser, site, "/savings"))["since_install"]["sent_bytes"] == 900
    site.installed_at = NOON
    sent(site, -600)
    async with site.running():
        assert (await get(browser, site, "/savings"))["since_install"]["sent_bytes"] == 300
    with closing(sqlite3.connect(site.store.root / "reports" / "stats.db")) as db:
        assert db.execute("SELECT sum(value) FROM old_days").fetchone() == (900,)


def test_every_counter_of_bytes_over_the_links_is_in_the_ledger():
    links = {name for name in BY_NAME if re.search("(sent|received|wasted)_bytes_total$", name)}
    assert links | {STREAM_WASTED.name} <= set(METRICS)


# --- the file


@pytest.mark.parametrize("damage", ["garbage", "truncated", "tables", "version"])
async def test_damaged_files_are_moved_aside(site, browser, damage, caplog):
    path = site.store.root / "reports" / "stats.db"
    async with site.running():
        tell(site, take(1, key("260801001")))
        sent(site, 900)
        await asked(browser, site, "/clients", clients=1)
    if damage == "garbage":
        path.write_bytes(b"not a database at all" * 500)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        statement = "DROP TABLE streams" if damage == "tables" else "PRAGMA user_version = 99"
        with closing(sqlite3.connect(path)) as db:
            db.execute(statement)
    async with site.running():
        tell(site, take(2, key("260801001")))
        found = await asked(browser, site, "/clients", clients=1)
        savings = await get(browser, site, "/savings")
    assert found["clients"][0]["address"] == "10.0.0.2"
    assert savings["since_install"]["sent_bytes"] == 900
    assert path.with_name("stats.db.damaged").exists()
    assert "stats.db was replaced by an empty one" in caplog.text


async def test_a_disk_that_refuses_loses_nothing(site, browser):
    folder = site.store.root / "reports"
    folder.write_text("a file where the folder should be")
    async with site.running() as control:
        refused = control.state.refusals.rows
        tell(site, take(1, key("260801001")))
        sent(site, 900)
        while "reports" not in refused:
            await control.state.reports.write_clients()
            await asyncio.sleep(0.01)
        await get(browser, site, "/report/content", 503)
        assert (await get(browser, site, "/savings"))["since_install"]["sent_bytes"] == 900
        folder.unlink()
        found = await asked(browser, site, "/report/content", clients=1)
        assert found["content"][0]["revisions"][0]["took"] == 1
        assert "reports" not in refused


def test_a_full_database_refuses_and_is_not_taken_for_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("gup.control.stats.database._MAX_PAGES", 60)
    database = StatsDatabase(tmp_path, lambda _what, _refusal: None)
    with pytest.raises(OSError, match="full"):
        database.transact(lambda db: db.execute("INSERT INTO points VALUES(1, 1, 1, zeroblob(1000000))"))
    count = database.transact(lambda db: db.execute("SELECT count(*) FROM points").fetchone())
    database.close()
    assert tuple(count) == (0,)
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["stats.db"]


# --- parts of bodies

spans = st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(spans, max_size=12))
@settings(max_examples=50)
def test_merged_parts_are_the_same_bytes(parts):
    found = joined(parts)
    assert {at for part in parts for at in range(*part)} == {at for part in found for at in range(*part)}
    assert all(one[1] < other[0] for one, other in pairwise(found))


def test_parts_are_forgotten_when_there_are_too_many():
    parts = ReceivedParts(most=2)
    for client in "abc":
        assert not parts.add(client, "key", 0, 5, 10)
    assert not parts.add("a", "key", 5, 10, 10)
    assert parts.add("c", "key", 5, 10, 10)


# --- windows


def test_clients_are_counted_by_window_and_forgotten_beyond_the_limit():
    book = ClientWindows(limit=3)
    book.see(["a"], 0.0)
    book.see(["b", "c"], 90_000.0)
    book.see(["a"], 100_000.0)
    assert book.counts(100_000.0) == {"1h": 1, "1d": 3, "7d": 3}
    book.see(["d"], 100_001.0)
    assert [address for address, _ in book.newest(9)] == ["d", "a", "c"]
    assert len(book.newest(1)) == 1


def test_newer_sightings_stay_when_clients_are_taken_back():
    before, after = ClientWindows(), ClientWindows()
    before.see(["a", "b"], 1.0)
    after.see(["a"], 5.0)
    after.restore(before.newest(9))
    assert after.newest(9) == [("a", 5.0), ("b", 1.0)]


def test_clients_are_counted_as_if_all_were_looked_at():
    chance, book, seen, now = random.Random(1), ClientWindows(), {}, 1e6
    for _ in range(600):
        now += chance.choice([0.0, 30.0, 1800.0, 3600.0, 40_000.0])
        names = [f"c{chance.randrange(80)}" for _ in range(chance.randrange(4))]
        book.see(names, now)
        seen |= dict.fromkeys(names, now)
        assert book.counts(now) == {
            window: sum(now - at <= seconds for at in seen.values()) for window, seconds in WINDOWS.items()
        }
        if chance.random() < 0.05:
            rows, book = book.newest(1000), ClientWindows()
            assert dict(rows) == seen
            book.restore(rows)
    newest = [at for _, at in book.newest(1000)]
    assert newest == sorted(newest, reverse=True)
