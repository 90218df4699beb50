"""Reports over a fake process: who took what, restarts pending, savings that add up, files that break."""

import asyncio
import csv
import io
import re
import sqlite3
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.catalog import Label
from gup.control.stats.client_records import ReceivedParts, joined
from gup.control.stats.database import StatsDatabase
from gup.control.stats.savings import METRICS
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

pytestmark = pytest.mark.usefixtures("no_blocking_call")


@pytest.fixture
def site(world):
    """A world whose catalogue lists two streams, and whose time is that of the revisions in these tests."""
    world.now = NOON
    world.settings = world.settings.model_copy(
        update={"site": world.settings.site.model_copy(update={"time_zone": "UTC"})}
    )
    before = world.surroundings

    def surroundings(admin):
        found = before(admin)
        object.__setattr__(found, "installed_at", NOON - 3600)
        object.__setattr__(found, "label_of", lambda stream, _file: LABELS.get(stream[2]))
        return found

    world.surroundings = surroundings
    return world


def key(revision, file="full.zip", moniker=MONIKER):
    return f"14.3 RU2/French/{moniker}/{revision}/{file}"


def tell(world, *rows, at=None):
    world.tell(type="taken", at=world.now if at is None else at, rows=rows)


async def get(browser, world, path):
    async with browser.get(world.url + "/api/v1" + path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def asked(browser, world, path, *, clients):
    """The answer, once so many clients are known."""
    while True:
        known = (await get(browser, world, "/clients"))["known"]
        if known == clients:
            return await get(browser, world, path)
        await asyncio.sleep(0.01)


async def test_content_taken_here(site, browser):
    record = site.commit(site.key("260801002"), b"x" * 10)
    async with site.running():
        site.tell_committed(record)
        delta = "xdelta260801001_To_260801002.dax"
        tell(
            site,
            ["10.0.0.1", key("260801001"), "14.3.4615.2000", "fr", 1],
            ["10.0.0.1", key("260801001", delta), "14.3.4615.2000", "fr", 1],
            ["10.0.0.2", key("260801001"), "", "", 1],
            ["10.0.0.3", key("260801001", delta), "", "", 0],  # asked only; says that it holds 001
            ["10.0.0.4", key("260731003"), "", "", [0, 60, 100]],
            ["10.0.0.5", key("260731003"), "", "", [0, 60, 100]],
            ["10.0.0.5", key("260731003"), "", "", [50, 100, 100]],
            ["10.0.0.6", key("991231001"), "", "", 1],  # no revision of this century's
        )
        found = (await asked(browser, site, "/report/content", clients=6))["content"]
    assert len(found) == 1
    stream = found[0]
    assert (stream["product"], stream["language"], stream["type"], stream["moniker"]) == (
        "Virus Definitions Win32",
        "French",
        "virus_definitions",
        MONIKER,
    )
    assert (stream["newest_held"], stream["newest_asked"], stream["newest_taken"]) == ("260801002",) * 3
    assert (stream["clients"], stream["current"], stream["behind"]) == (5, 1, 4)
    assert {row["revision"]: (row["clients"], row["took"]) for row in stream["revisions"]} == {
        "260801002": (1, 1),
        "260801001": (2, 2),
        "260731003": (1, 1),
    }
    assert [
        (c["address"], c["revision"], c["lag_revisions"], c["lag_seconds"]) for c in stream["lagging"]
    ] == [
        ("10.0.0.4", None, 3, None),
        ("10.0.0.5", "260731003", 2, DAY),
        ("10.0.0.2", "260801001", 1, 0.0),
        ("10.0.0.3", "260801001", 1, 0.0),
    ]


async def test_a_machine_set_up_anew_stands_where_it_was_put(site, browser):
    async with site.running():
        tell(site, ["10.0.0.1", key("260801002"), "", "", 1])
        site.now += 3600
        tell(site, ["10.0.0.1", key("260731001"), "", "", 1])
        found = (await asked(browser, site, "/report/content", clients=1))["content"][0]
    assert [(row["revision"], row["clients"], row["took"]) for row in found["revisions"]] == [
        ("260801002", 0, 1),
        ("260731001", 1, 1),
    ]
    assert found["lag_revisions"] == 2  # nothing is held: the site lags behind all that is known


async def test_what_the_site_lacks_is_its_lag(site, browser):
    record = site.commit(site.key("260730001"), b"x")
    async with site.running():
        site.tell_committed(record)
        tell(site, ["10.0.0.1", key("260801001"), "", "", 0])
        found = (await asked(browser, site, "/report/content", clients=1))["content"][0]
    assert (found["newest_held"], found["newest_asked"]) == ("260730001", "260801001")
    assert (found["lag_revisions"], found["lag_seconds"]) == (1, 2 * DAY)


async def test_restart_pending(site, browser):
    builds = {
        "10.0.0.1": "14.3.4615.2000",
        "10.0.0.2": "14.3.4615.2000",
        "10.0.0.3": "",
        "10.0.0.4": "14.3 RU2",
    }
    async with site.running():
        tell(
            site,
            *(
                [client, key("260801001", moniker=PATCHES), build, "fr", 1]
                for client, build in builds.items()
            ),
        )
        tell(site, ["10.0.0.5", key("260801001"), "14.3.4615.2000", "fr", 1])  # definitions need no restart
        site.now += 3600
        tell(
            site,
            ["10.0.0.1", key("260801002"), "14.3.4615.2000", "fr", 1],
            ["10.0.0.2", key("260801002"), "14.3.4615.2100", "fr", 1],
            ["10.0.0.2", key("260801001", moniker=PATCHES), "14.3.4615.2100", "fr", 1],  # the same once more
        )
        found = await asked(browser, site, "/report/clients", clients=5)
    assert found["catalogue_known"]
    assert (found["pending"], found["unknown"]) == (1, 2)
    assert [(row["address"], row["state"], row["version"]) for row in found["restart_pending"]] == [
        ("10.0.0.1", "pending", "14.3.4615.2000"),
        ("10.0.0.3", "unknown", None),
        ("10.0.0.4", "unknown", "14.3 RU2"),
    ]
    assert "Taken is not installed" in found["saying"]
    assert {"version": "14.3.4615.2100", "language": "fr", "clients": 1} in found["clients"]


async def test_clients_page_by_page(site, browser):
    async with site.running():
        for number in range(1, 8):
            site.now += 1
            tell(site, [f"10.0.0.{number}", key("260801001"), "14.3 RU2" if number % 2 else "", "fr", 1])
        first = await asked(browser, site, "/clients?limit=3", clients=7)
        assert [row["address"] for row in first["clients"]] == ["10.0.0.7", "10.0.0.6", "10.0.0.5"]
        second = await get(browser, site, f"/clients?limit=3&cursor={first['cursor']}")
        third = await get(browser, site, f"/clients?limit=3&cursor={second['cursor']}")
        assert [row["address"] for row in (*second["clients"], *third["clients"])] == [
            f"10.0.0.{number}" for number in (4, 3, 2, 1)
        ]
        assert third["cursor"] is None
        some = await get(browser, site, "/clients?version=14.3%20ru2&seen=1h")
        assert (some["matching"], some["known"]) == (4, 7)
        for wrong in (
            "cursor=nonsense",
            "limit=0",
            "limit=x",
            "seen=2h",
            "colour=red",
            "cursor=WzEsICJhIl0=",
        ):
            async with browser.get(f"{site.url}/api/v1/clients?{wrong}") as answer:
                assert answer.status == 400, wrong


# --- the ledger


async def test_savings_by_day_add_up_over_restarts(site, browser):
    site.streams = [("14.3 RU2", "French", MONIKER)]
    add = site.counters.add
    async with site.running():
        add("gup_client_sent_bytes_total", 1000, source="cache")
        site.counters.add_stream("sent", 0, "full", 1000)
        add("gup_upstream_received_bytes_total", 300, upstream="manager", purpose="fill")
        site.counters.add_stream("received", 0, "full", 300)
        first = await get(browser, site, "/savings")
    add("gup_client_sent_bytes_total", 50, source="fill")  # while no controller runs
    site.now += DAY
    async with site.running():
        add("gup_client_sent_bytes_total", 7, source="cache")
        site.counters.waste("overlap", (0, "full"), 5)
        add("gup_upstream_received_bytes_total", 100, upstream="manager", purpose="prefetch")
        second = await get(browser, site, "/report/savings")
        only_one = await get(browser, site, "/savings?days=1")
        async with browser.get(f"{site.url}/api/v1/report/savings?format=csv") as answer:
            table = list(csv.DictReader(io.StringIO(await answer.text())))
    assert first["today"] == first["since_install"]
    assert (first["today"]["saved_bytes"], first["days"][0]["day"]) == (700, "2026-08-01")
    assert first["days"][0]["streams"] == [
        {
            "product": MONIKER,
            "language": "French",
            "kind": "full",
            "sent_bytes": 1000,
            "received_bytes": 300,
            "saved_bytes": 700,
            "wasted_bytes": 0,
        }
    ]
    assert [day["day"] for day in second["days"]] == ["2026-08-02", "2026-08-01"]
    today = second["today"]
    assert (today["sent_bytes"], today["received_bytes"], today["saved_bytes"]) == (57, 100, -43)
    assert today["wasted"]["overlap"] == today["wasted_bytes"] == 5
    assert second["since_install"]["sent_bytes"] == 1057 == sum(day["sent_bytes"] for day in second["days"])
    assert second["last_30_days"] == second["since_install"]
    assert [day["day"] for day in only_one["days"]] == ["2026-08-02"]
    assert only_one["since_install"] == second["since_install"]
    assert sum(int(row["wasted_overlap_bytes"]) for row in table) == 5
    assert sum(int(row["wasted_bytes"]) for row in table) == 5
    assert sum(int(row["sent_bytes"]) for row in table) == 1000  # of streams: the rest was counted for none


async def test_what_was_counted_before_the_ledger_is_of_no_day(site, browser):
    site.counters.add("gup_client_sent_bytes_total", 900, source="cache")
    site.now += 10 * DAY
    async with site.running():
        found = await get(browser, site, "/savings")
    assert [day["day"] for day in found["days"]] == [None]
    assert found["today"]["sent_bytes"] == 0
    assert found["since_install"]["sent_bytes"] == 900


async def test_old_days_are_added_up(site, browser):
    site.settings = site.settings.model_copy(
        update={"reports": site.settings.reports.model_copy(update={"ledger": 5 * DAY})}
    )
    total = 0
    for number in range(8):
        async with site.running() as control:
            site.counters.add("gup_client_sent_bytes_total", 10 + number, source="cache")
            total += 10 + number
            await control.state.history.write()
            await control.state.reports.prune()
            found = await get(browser, site, "/savings?days=100")
        site.now += DAY
    assert found["days"][-1]["day"] is None
    assert len(found["days"]) == 7
    assert sum(day["sent_bytes"] for day in found["days"]) == total


# --- addresses, retention, trouble


async def test_addresses_are_hashed_when_the_settings_say_so(site, browser):
    async with site.running():
        tell(site, ["10.0.0.1", key("260801001"), "", "", 1])
        await asked(browser, site, "/clients", clients=1)
    site.settings = site.settings.model_copy(
        update={"reports": site.settings.reports.model_copy(update={"addresses": "hashed"})}
    )
    async with site.running() as control:
        await control.state.reports.write_clients()
        tell(site, ["10.0.0.1", key("260801002"), "", "", 1])  # of a worker that has not heard of it yet
        tell(site, ["h-0123456789abcdef", key("260801001"), "", "", 1])
        found = await asked(browser, site, "/clients", clients=2)
        content = (await get(browser, site, "/report/content"))["content"][0]
    assert all(row["address"].startswith("h-") for row in found["clients"])
    assert {row["revision"]: row["clients"] for row in content["revisions"]} == {
        "260801002": 1,
        "260801001": 1,
    }
    for path in (site.store.root / "reports").iterdir():
        assert b"10.0.0.1" not in path.read_bytes(), path
    site.settings = site.settings.model_copy(
        update={"reports": site.settings.reports.model_copy(update={"addresses": "off"})}
    )
    async with site.running():
        site.tell(type="used", at=site.now, clients=["h-0123456789abcdef"])
        found = await get(browser, site, "/clients")
        for _ in range(1000):
            if found["seen"]["1h"]:
                break
            await asyncio.sleep(0.01)
            found = await get(browser, site, "/clients")
        content = await get(browser, site, "/report/content")
    assert (found["known"], found["clients"], content["content"]) == (1, [], [])
    assert "reports.addresses is off" in content["note"]


async def test_who_was_not_seen_for_long_is_forgotten(site, browser):
    async with site.running() as control:
        tell(site, ["10.0.0.1", key("260801001"), "", "", 1])
        site.now += DAY
        tell(site, *([f"10.0.1.{n}", key("260801001"), "", "", 1] for n in range(5)))
        await asked(browser, site, "/clients", clients=6)
        site.now += 89.5 * DAY
        await control.state.reports.prune()
        assert (await get(browser, site, "/clients"))["known"] == 5
        control.state.settings = site.settings.model_copy(
            update={"reports": site.settings.reports.model_copy(update={"max_clients": 3})}
        )
        await control.state.reports.prune()
        assert (await get(browser, site, "/clients"))["known"] == 3


@pytest.mark.parametrize("damage", ["garbage", "truncated", "tables", "version"])
async def test_damaged_files_are_moved_aside(site, browser, damage, caplog):
    async with site.running():
        tell(site, ["10.0.0.1", key("260801001"), "", "", 1])
        site.counters.add("gup_client_sent_bytes_total", 900, source="cache")
        await asked(browser, site, "/clients", clients=1)
    folder = site.store.root / "reports"
    harm(folder / "stats.db", damage)
    async with site.running():
        tell(site, ["10.0.0.2", key("260801001"), "", "", 1])
        found = await asked(browser, site, "/clients", clients=1)
        savings = await get(browser, site, "/savings")
    assert found["clients"][0]["address"] == "10.0.0.2"
    assert savings["since_install"]["sent_bytes"] == 900
    assert (folder / "stats.db.damaged").exists()
    assert "stats.db is begun anew" in caplog.text


def harm(path, how):
    if how == "garbage":
        path.write_bytes(b"not a database at all" * 500)
        return
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
        return
    with sqlite3.connect(path) as db:
        if how == "version":
            db.execute("PRAGMA user_version = 99")
        else:
            for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                db.execute(f"DROP TABLE {table}")
    db.close()


async def test_a_disk_that_refuses_loses_nothing(site, browser):
    folder = site.store.root / "reports"
    folder.write_text("a file where the folder should be")
    async with site.running() as control:
        tell(site, ["10.0.0.1", key("260801001"), "", "", 1])
        site.counters.add("gup_client_sent_bytes_total", 900, source="cache")
        while "reports" not in control.state.refusals.rows:
            await control.state.reports.write_clients()
            await asyncio.sleep(0.01)
        async with browser.get(site.url + "/api/v1/report/content") as answer:
            assert answer.status == 503
        savings = await get(browser, site, "/savings")
        assert savings["since_install"]["sent_bytes"] == 900
        folder.unlink()
        found = await asked(browser, site, "/report/content", clients=1)
        assert found["content"][0]["revisions"][0]["took"] == 1
        assert "reports" not in control.state.refusals.rows


async def test_what_clients_state_is_no_formula_in_a_table(site, browser):
    async with site.running():
        tell(site, ["10.0.0.1", key("260801001", moniker=PATCHES), "=cmd|' /C calc'!A0", '"a",b', 1])
        await asked(browser, site, "/clients", clients=1)
        async with browser.get(site.url + "/api/v1/report/clients?format=csv") as answer:
            assert answer.content_type == "text/csv"
            row = next(csv.DictReader(io.StringIO(await answer.text())))
    assert row["version"] == "'=cmd|' /C calc'!A0"
    assert row["language"] == '"a",b'


async def test_malformed_news_is_passed_over(site, browser):
    async with site.running() as control:
        good = ["10.0.0.1", key("260801001"), "", "", 1]
        for wrong in (
            ["<script>", key("260801001"), "", "", 1],
            ["10.0.0.1", "no key", "", "", 1],
            ["10.0.0.1", key("260801001"), "", "", [5, 5, 10]],
            ["10.0.0.1", key("260801001"), "", "", 2],
            ["10.0.0.1", key("260801001")],
        ):
            tell(site, wrong)
        tell(site, good)
        await asked(browser, site, "/clients", clients=1)
        assert control.state.malformed_events == 5


async def test_counters_that_begin_anew_begin_anew_savings(site, browser):
    site.counters.add("gup_client_sent_bytes_total", 900, source="cache")
    async with site.running():
        assert (await get(browser, site, "/savings"))["since_install"]["sent_bytes"] == 900
    before = site.surroundings

    def surroundings(admin):
        found = before(admin)
        object.__setattr__(found, "installed_at", NOON)
        return found

    site.surroundings = surroundings
    site.counters.add("gup_client_sent_bytes_total", -600, source="cache")
    async with site.running():
        assert (await get(browser, site, "/savings"))["since_install"]["sent_bytes"] == 300
    with closing(sqlite3.connect(site.store.root / "reports" / "stats.db")) as db:
        assert db.execute("SELECT sum(value) FROM old_days").fetchone() == (900,)


# --- the files and pure parts


def test_a_full_database_refuses_and_is_not_taken_for_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("gup.control.stats.database._MAX_PAGES", 60)
    database = StatsDatabase(tmp_path)
    with pytest.raises(OSError, match="full"):
        database.transact(lambda db: db.execute("INSERT INTO points VALUES(1, 1, 1, zeroblob(1000000))"))
    count = database.transact(lambda db: db.execute("SELECT count(*) FROM points").fetchone())
    database.close()
    assert count == (0,)
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["stats.db"]


spans = st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(spans, max_size=12))
def test_merged_parts_are_the_same_bytes(parts):
    found = joined(parts)
    assert {at for part in parts for at in range(*part)} == {at for part in found for at in range(*part)}
    assert all(one[1] < other[0] for one, other in pairwise(found))


def test_pieces_are_forgotten_when_there_are_too_many():
    pieces = ReceivedParts(most=2)
    assert not pieces.add("a", "key", 0, 5, 10)
    for client in "bc":
        assert not pieces.add(client, "key", 0, 5, 10)
    assert not pieces.add("a", "key", 5, 10, 10)
    assert pieces.add("c", "key", 5, 10, 10)


def test_every_counter_of_bytes_over_the_links_is_in_the_ledger():
    links = {name for name in BY_NAME if re.search("(sent|received|wasted)_bytes_total$", name)}
    assert links | {STREAM_WASTED.name} <= set(METRICS)
