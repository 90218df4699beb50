"""The client doctor: each finding, and what must not be one."""

import contextlib
import sqlite3
import time

import pytest

from gup.content.key import ContentKey
from gup.control.events import Part, Take
from gup.control.stats.client_records import Batch, ReceivedParts, prune, write_batch
from gup.control.stats.database import StatsDatabase
from gup.control.stats.doctor import DAY, FINDINGS, REFUSALS, SHOWN, examine

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
NOW = 1785801600.0
"""2026-08-04."""
REVISIONS = [f"2607{day:02}003" for day in range(20, 32)] + ["260801003", "260802003", "260803003"]
STREAM = ("any", "any", MONIKER)


def key(revision, file="full.zip"):
    return ContentKey.parse(f"any/any/{MONIKER}/{revision}/{file}")


class Site:
    def __init__(self, folder):
        self.database = StatsDatabase(folder, lambda *_: None)
        self._parts = ReceivedParts()
        self.now = NOW

    def _write(self, batch):
        self.database.transact(lambda db: write_batch(db, batch))

    def take(self, client, revision, ago=0.0, *, came_from="", sent=1, version="14.3.1.0", days=1):
        """Taken on each of so many days, the last of which was `ago` seconds ago."""
        file = f"xdelta{came_from}_To_{revision}.dax" if came_from else "full.zip"
        for day in range(days - 1, -1, -1):
            batch = Batch()
            batch.add(
                Take(client, key(revision, file), version, "", sent), NOW - ago - day * DAY, self._parts
            )
            self._write(batch)

    def see(self, client, ago=0.0):
        batch = Batch()
        batch.see(client, NOW - ago)
        self._write(batch)

    def change(self, change):
        batch = Batch()
        change(batch)
        self._write(batch)

    def found(self, now=None):
        return self.database.transact(lambda db: examine(db, now or self.now, lambda stream: stream[2]))

    def findings(self, now=None):
        return sorted((row.client, row.finding) for row in self.found(now).rows)


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.database.close()


def neighbours(site, count=10, newest="260803003", net="10.1.1"):
    """Sound clients that get deltas, seen on each of the last days."""
    for number in range(count):
        for ago in (3 * DAY, 2 * DAY, DAY):
            site.see(f"{net}.{number + 10}", ago)
        site.take(f"{net}.{number + 10}", newest, 3600.0, came_from="260802003")


def test_a_sound_site_has_no_findings(site):
    neighbours(site)
    found = site.found()
    assert (found.rows, found.sick, found.clients, found.left_out) == ([], 0, 10, 0)
    assert set(found.counts) == set(FINDINGS)


def test_the_same_full_again_and_again(site):
    site.take("10.1.1.1", "260803003", days=3)
    (row,) = site.found().rows
    assert (row.client, row.finding, row.times, row.what) == ("10.1.1.1", "repeated-full", 3, "260803003")
    assert "3 times within 2 d" in row.seen.replace("days", "d") or "3 times within" in row.seen
    assert site.findings(NOW + 15 * DAY) == [], "it is over"


def test_fulls_of_a_stream_that_is_kept_back_are_no_finding(site):
    """Its clients are redirected to the newest that all may have, and may take it several times."""
    site.take("10.1.1.1", "260803003", days=3)
    found = site.database.transact(lambda db: examine(db, NOW, lambda stream: stream[2], {MONIKER}))
    assert found.rows == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_new_machine_takes_one_full_and_a_machine_set_up_anew_a_second(site, times):
    neighbours(site)
    site.take("10.1.1.1", "260803003", days=times)
    assert site.findings() == []


def test_a_client_that_never_gets_a_delta(site):
    neighbours(site)
    for ago, revision in ((3 * DAY, "260801003"), (2 * DAY, "260802003"), (DAY / 2, "260803003")):
        site.take("10.1.1.1", revision, ago)
    assert site.findings() == [("10.1.1.1", "no-delta")]
    site.take("10.1.1.1", "260803003", 60.0, came_from="260802003")
    assert site.findings() == [], "it got one"


def test_fulls_where_nobody_gets_a_delta_are_no_clients_fault(site):
    for ago, revision in ((3 * DAY, "260801003"), (2 * DAY, "260802003"), (DAY / 2, "260803003")):
        site.take("10.1.1.1", revision, ago)
        site.take("10.1.1.2", revision, ago)
    assert site.findings() == []


def test_a_client_that_falls_behind_its_neighbours(site):
    neighbours(site)
    site.take("10.1.1.1", "260728003", 6 * DAY)
    for ago in (2 * DAY, DAY, 0.0):
        site.see("10.1.1.1", ago)
    (row,) = site.found().rows
    assert (row.client, row.finding, row.what) == ("10.1.1.1", "behind", "260728003")
    assert "10 of 10 neighbours in 10.1.1.0/24 have 260803003 or newer" in row.seen


def test_a_client_that_was_off_over_a_holiday(site):
    neighbours(site)
    site.take("10.1.1.1", "260722003", 13 * DAY)
    site.see("10.1.1.1", 60.0)
    assert site.findings() == []


def test_a_subnet_that_is_behind_as_a_whole_has_no_single_sick_client(site):
    neighbours(site, 30)
    for number in range(5):
        client = f"10.2.2.{number + 1}"
        site.take(client, "260728003", 6 * DAY)
        for ago in (2 * DAY, DAY, 0.0):
            site.see(client, ago)
    assert site.findings() == []


def test_hashed_clients_have_the_site_as_neighbours(site):
    for number in range(10):
        name = f"h-{number:016x}"
        site.take(name, "260803003", 3600.0, came_from="260802003")
    site.take("h-ffffffffffffffff", "260728003", 6 * DAY)
    for ago in (2 * DAY, DAY, 0.0):
        site.see("h-ffffffffffffffff", ago)
    assert site.findings() == [("h-ffffffffffffffff", "behind")]
    assert "at this site" in site.found().rows[0].seen


def test_a_client_that_asks_for_what_the_rules_refuse(site):
    for ago in range(REFUSALS):
        site.change(lambda batch, ago=ago: batch.refuse("10.1.1.1", "language", MONIKER, 1, NOW - ago * 60.0))
    site.change(lambda batch: batch.refuse("10.1.1.2", "language", MONIKER, REFUSALS - 1, NOW))
    site.change(lambda batch: batch.refuse("10.1.1.3", "client_patches_off", MONIKER, 50, NOW))
    site.change(lambda batch: batch.refuse("10.1.1.4", "hold", MONIKER, 50, NOW))
    assert site.findings() == [("10.1.1.1", "refused")]
    assert site.findings(NOW + 3 * DAY) == [], "it asks no more"


def resume(site, client, times, seconds, *, finish=False):
    for number in range(times):
        site.take(
            client, "260803003", seconds * (1 - number / (times - 1)) + 1, sent=Part(number, number + 1, 90)
        )
    if finish:
        site.take(client, "260803003", 0.0, sent=Part(times, 90, 90))


def test_a_client_that_resumes_for_ever(site):
    resume(site, "10.1.1.1", 12, 7200.0)
    (row,) = site.found().rows
    assert (row.client, row.finding, row.times) == ("10.1.1.1", "unfinished", 12)
    assert "full.zip" in row.seen


def test_a_resumed_download_that_did_finish(site):
    resume(site, "10.1.1.1", 12, 7200.0, finish=True)
    assert site.findings() == []


def test_a_download_manager_with_parallel_ranges(site):
    resume(site, "10.1.1.1", 16, 40.0, finish=True)
    resume(site, "10.1.1.2", 16, 40.0)
    assert site.findings() == []


def test_an_address_in_clients_shared(site):
    site.take("10.1.1.1", "260803003", days=4)
    assert site.findings() == [("10.1.1.1", "repeated-full")]

    def share(batch):
        batch.see("10.1.1.1", NOW)
        batch.share("10.1.1.1")

    site.change(share)
    assert (site.findings(), site.found().left_out) == ([], 1)


def test_an_address_that_states_several_versions_in_turn(site):
    for number in range(6):
        site.take("10.1.1.1", "260803003", 3600.0 - 60 * number, version=f"14.3.{number % 2}.0")
    assert (site.findings(), site.found().left_out) == ([], 1)


def test_an_upgrade_is_one_machine(site):
    for number, version in enumerate(("14.3.1.0", "14.3.1.0", "14.3.2.0", "14.3.2.0")):
        site.take("10.1.1.1", "260803003", DAY * (4 - number), version=version)
    assert site.findings() == [("10.1.1.1", "repeated-full")]


def test_an_empty_history_and_a_file_of_an_earlier_version(tmp_path):
    site = Site(tmp_path)
    assert site.found().rows == []
    site.database.close()
    with contextlib.closing(sqlite3.connect(site.database.path)) as db:
        for table in ("habits", "visits", "refused", "deltas", "slow"):
            db.execute(f"DROP TABLE {table}")
    assert site.found().rows == []
    site.take("10.1.1.1", "260803003", days=3)
    assert site.findings() == [("10.1.1.1", "repeated-full")]
    site.database.close()


def test_what_is_old_is_forgotten(site):
    site.take("10.1.1.1", "260803003", days=3)
    site.change(lambda batch: batch.refuse("10.1.1.1", "language", MONIKER, 9, NOW))
    site.database.transact(lambda db: prune(db, NOW + 100 * DAY, 90 * DAY, 1000))
    for table in ("clients", "habits", "visits", "refused", "deltas"):
        count = site.database.transact(
            lambda db, t=table: db.execute(f"SELECT count(*) FROM {t}").fetchone()[0]
        )
        assert count == 0, table


@pytest.mark.long
def test_a_hundred_thousand_clients(site, figures):
    batch = Batch()
    revisions = REVISIONS[-3:]
    for number in range(100_000):
        name = f"10.{number // 65536}.{number // 256 % 256}.{number % 256}"
        batch.seen[name] = (NOW, "14.3.1.0", "")
        revision = revisions[2] if number % 20 else REVISIONS[0]
        batch.asked[name, STREAM, revision, "", True] = (NOW - 5 * DAY, "14.3.1.0")
        if number % 50 == 0:
            batch.habits.fulls[name, STREAM, revision] = [3, NOW]
    began = time.monotonic()
    site.database.transact(lambda db: write_batch(db, batch))
    written = time.monotonic() - began
    site.database.transact(lambda db: db.execute("UPDATE visits SET days = 7"))
    found = site.found()
    figures(
        f"100,000 clients: written in {written:.1f} s, examined in {found.seconds:.2f} s, {found.sick} sick"
    )
    assert len(found.rows) == 2 * SHOWN
    assert found.counts["behind"] == 5000
    assert found.counts["repeated-full"] == 2000
