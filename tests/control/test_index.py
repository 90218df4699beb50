import asyncio
import json
import pickle
import random
import sqlite3
import threading
import tracemalloc
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.cache.store import Store
from gup.content.key import ContentKey, Kind
from gup.control.entry_table import ORDERS, ROW, make_row
from gup.control.index import DamagedIndexError, Index, IndexFile
from gup.control.integrity_jobs import Pass, read_pass
from gup.control.prefetch import PrefetchQueue, Revisions
from gup.control.reconcile import ORPHAN_AGE_SECONDS, reconcile


def row(name="full.zip", size=10, revision="260101001", **more):
    key = ContentKey("14.3 RU2", "French", "{S}", revision, name)
    return make_row(key, Kind.FULL, size, stored_at=5.0, used_at=6.0, **more)


class Opened(Index):
    """An index in a folder; `damages` are what it called damage."""

    def __init__(self, folder):
        self.damages = []
        super().__init__(folder, lambda: self.damages.append(1), lambda _: None)

    async def closed_with(self, *rows):
        for one in rows:
            self.put(one)
        self.complete = True
        await self.close()

    def state(self):
        return self.rows, self.complete, len(self.damages)


@pytest.fixture
async def opened(tmp_path):
    """Opens indexes in one folder, one after the other; closes what a test left open."""
    alive = []

    async def open_(folder=tmp_path / "index"):
        alive.append(index := Opened(folder))
        await index.open()
        return index

    yield open_
    for index in alive:
        if not index._thread._shutdown:
            await index.close()


async def test_rows_and_notes_come_back_after_a_restart(opened):
    index = await opened()
    index.notes["clients"] = [["10.0.0.1", 4.0]]
    await index.closed_with(row(hits=3))
    again = await opened()
    assert again.state() == ({row().key: row(hits=3)}, True, 0)
    assert (again.notes["clients"], again.rows.total_bytes) == ([["10.0.0.1", 4.0]], 10)
    again.discard(row().key)
    await again.close()
    assert (await opened()).rows == {}, "discarded rows stay away"


async def test_an_index_that_never_was_complete_is_not_trusted(opened):
    index = await opened()
    index.put(row())
    await index.close()
    assert (await opened()).state() == ({}, False, 0)


async def test_totals_and_newest_revisions_follow_the_rows(opened):
    index = await opened()
    index.put(row(size=10))
    index.put(row(size=30))
    index.put(row(size=5, revision="260101002"))
    assert index.rows.total_bytes == 35
    assert index.rows.newest_held() == {("14.3 RU2", "French", "{S}"): "260101002"}
    index.discard(row(revision="260101002").key)
    index.discard("never/there/at/all/x")
    assert index.rows.total_bytes == 30
    assert index.rows.newest_held() == {("14.3 RU2", "French", "{S}"): "260101001"}
    index.discard(row().key)
    assert (index.rows.total_bytes, index.rows.newest_held()) == (0, {})


HARM = {
    "overwritten": lambda _: b"not a database at all" * 1000,
    "truncated": lambda text: text[:5000],
    "scribbled over": lambda text: text[:100] + b"\xff" * (len(text) - 100),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
async def test_a_damaged_index_is_replaced_and_counted(opened, tmp_path, harm):
    await (await opened()).closed_with(*(row(f"f{n}") for n in range(200)))
    file = tmp_path / "index" / "cache.db"
    file.write_bytes(harm(file.read_bytes()))
    for extra in ("cache.db-wal", "cache.db-shm"):
        file.with_name(extra).unlink(missing_ok=True)
    index = await opened()
    assert (*index.state(), index.opened) == ({}, False, 1, True)
    await index.closed_with(row("new"))
    assert set((await opened()).rows) == {row("new").key}


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


PICKLE = pickle.dumps(Bomb())
IS_ROW = "WHERE key LIKE 'entry:%'"


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("UPDATE Cache SET mode = 4, value = ?", [PICKLE]),
        (f"UPDATE Cache SET raw = 0, key = ? {IS_ROW}", [PICKLE]),
        *((f"UPDATE Cache SET value = ? {IS_ROW}", [text]) for text in ("{", "[]", '{"key": "a/b/c/d/e"}')),
        (f"UPDATE Cache SET key = 'entry:a/b/c/d/e' {IS_ROW}", []),
        ("UPDATE Cache SET value = '99' WHERE key = 'about:format'", []),
    ],
    ids=["pickled value", "pickled key", "no JSON", "no row", "half a row", "another key", "another format"],
)
async def test_a_changed_file_is_damage_and_no_pickle_is_ever_loaded(opened, tmp_path, change, values):
    await (await opened()).closed_with(row())
    with closing(sqlite3.connect(tmp_path / "index" / "cache.db", isolation_level=None)) as database:
        database.execute(change, values)
    assert (await opened()).state() == ({}, False, 1)


async def test_nothing_on_disk_is_a_pickle(opened, tmp_path):
    await (await opened()).closed_with(row())
    with closing(sqlite3.connect(tmp_path / "index" / "cache.db")) as database:
        for mode, value in database.execute("SELECT mode, value FROM Cache"):
            assert (mode, json.loads(value) is not None) == (3, True)


async def test_damage_while_running_is_healed_from_memory(opened):
    index = await opened()
    index.put(row("a"))
    index.complete = True
    await index.flush()
    real = index._file.write

    def write_once_damaged(*_values, **_more):
        index._file.write = real
        raise DamagedIndexError("the disk forgot")

    index._file.write = write_once_damaged
    index.put(row("b"))
    await index.flush()
    assert len(index.damages) == 1
    await index.close()
    assert set((await opened()).rows) == {row("a").key, row("b").key}


async def test_a_folder_that_cannot_be_used_leaves_the_index_in_memory(opened, tmp_path):
    (tmp_path / "index").write_text("a file where the folder should be")
    index = await opened()
    index.put(row())
    await index.flush()
    assert index.opened
    assert row().key in index.rows
    (tmp_path / "index").unlink()
    await index.closed_with()
    assert row().key in (await opened()).rows, "what could not be written stayed due"


async def test_what_happens_while_opening_wins_over_the_file(opened, tmp_path):
    await (await opened()).closed_with(row("old", size=1), row("gone", size=1), row("kept", size=1))
    index = Opened(tmp_path / "index")
    may_read, real = threading.Event(), index._file.load

    def slow_load():
        may_read.wait(10)
        return real()

    index._file.load = slow_load
    opening = asyncio.create_task(index.open())
    await asyncio.sleep(0)
    index.put(row("old", size=50))
    index.discard(row("gone").key)
    may_read.set()
    await opening
    assert {one.file: one.length_bytes for one in index.rows.values()} == {"old": 50, "kept": 1}
    await index.close()


# --- reconciling


async def test_reconciling_takes_the_disk_over(world, opened):
    record = world.commit(body=b"12345", at=100.0)
    index = await opened(world.store.index)
    index.put(row("lost"))
    known = make_row(record.key, Kind.FULL, 4, stored_at=1.0, used_at=90.0, hits=12, sent_bytes=48)
    index.put(known)
    await reconcile(world.dependencies(), index, 200.0)
    assert set(index.rows) == {record.key.text}
    found = index.rows[record.key.text]
    assert (found.used_at, found.hits, found.sent_bytes) == (100.0, 12, 48), "what no record knows stays"
    assert (index.complete, index.rows.total_bytes) == (True, 5)


async def test_a_record_is_read_again_only_when_a_file_of_its_entry_changed(world, opened, monkeypatch):
    """Also by the next process: the index file has the mark. Reading 100,000 records took half a minute."""
    records = [world.commit(world.key(f"26010100{number}"), at=100.0) for number in range(4)]
    read, really = [], Store.load

    def load(store, key):
        read.append(key.revision)
        return really(store, key)

    monkeypatch.setattr(Store, "load", load)

    async def read_by_reconciling(index):
        read.clear()
        await reconcile(world.dependencies(), index, 200.0)
        return sorted(read)

    index = await opened(world.store.index)
    assert len(await read_by_reconciling(index)) == 4
    assert await read_by_reconciling(index) == []
    await index.close()
    index = await opened(world.store.index)
    assert await read_by_reconciling(index) == []
    with world.claimed(records[0].key) as store:
        store.set_pinned(records[0].key, True)
    index.put(index.rows[records[1].key.text].used(1, 1, 150.0))
    world.store.touch(records[1].key, 150.0)
    world.commit(records[2].key, b"a newer body", at=100.0)
    world.store.record_path(records[3].key).write_bytes(b"damaged")
    assert await read_by_reconciling(index) == ["260101000", "260101002", "260101003"]
    assert index.rows[records[0].key.text].pinned
    assert index.rows[records[2].key.text].length_bytes == len(b"a newer body")
    assert records[3].key.text not in index.rows


async def test_reconciling_does_not_overrule_what_happens_meanwhile(world, opened, monkeypatch):
    purged = world.commit(world.key("260101001"))
    index = await opened(world.store.index)
    scanned, go_on = threading.Event(), threading.Event()
    real = world.store.stored

    def slowly(_store, key):
        found = real(key)
        scanned.set()
        go_on.wait(10)
        return found

    monkeypatch.setattr(type(world.store), "stored", slowly)
    task = asyncio.create_task(reconcile(world.dependencies(), index, 200.0))
    await asyncio.to_thread(scanned.wait, 10)
    index.discard(purged.key.text)
    index.put(row("fresh"))
    go_on.set()
    await task
    assert set(index.rows) == {row("fresh").key}


async def test_a_cancelled_reconcile_ends_after_its_thread_whenever_that_comes(world, opened, monkeypatch):
    """Also one that is only waiting for its thread's end: nothing else would end that."""
    walking, go_on = threading.Event(), threading.Event()
    index = await opened(world.store.index)

    def slowly(_store):
        walking.set()
        go_on.wait(10)
        return iter(())

    monkeypatch.setattr(type(world.store), "prune", slowly)
    task = asyncio.create_task(reconcile(world.dependencies(), index, 200.0))
    await asyncio.to_thread(walking.wait, 10)
    for _ in range(2):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gup-reconcile")]


async def test_old_bodies_without_a_record_are_removed_and_young_ones_left(world, opened):
    record = world.commit()
    world.store.record_path(record.key).write_bytes(b"{damaged")
    index = await opened(world.store.index)
    written = world.store.body_path(record.key).stat().st_mtime
    await reconcile(world.dependencies(), index, written + 1)
    assert world.store.body_path(record.key).exists()
    assert world.counters.get("gup_integrity_failures_total", where="record") == 0
    now = written + ORPHAN_AGE_SECONDS + 1
    await reconcile(world.dependencies(), index, now)
    assert not world.store.body_path(record.key).exists()
    assert not world.store.record_path(record.key).exists()
    assert world.counters.get("gup_integrity_failures_total", where="record") == 1
    assert index.rows == {}


async def test_an_orphan_whose_key_is_claimed_is_left_alone(world, opened):
    record = world.commit()
    world.store.record_path(record.key).unlink()
    index = await opened(world.store.index)
    assert world.claims.try_claim(record.key.claim_offset)
    await reconcile(world.dependencies(), index, 1e10)
    assert world.store.body_path(record.key).exists()


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """Another process' lock: it stands for all that SQLite may say at a transaction's beginning."""
    monkeypatch.setattr("gup.control.index.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(tmp_path / "cache.db", isolation_level=None)
    yield lambda taken: other.execute("BEGIN IMMEDIATE" if taken else "ROLLBACK")
    other.close()


def test_a_refused_write_is_no_damage_and_is_not_tried_for_ever(tmp_path, lock):
    file = IndexFile(tmp_path)
    file.load()
    file.write({row("a").key: row("a")}, {}, whole=True)
    changes = {row("b").key: row("b"), row("a").key: None}, {"note": [1]}
    lock(True)
    with pytest.raises(OSError, match="can't be written: database is locked"):
        file.write(*changes, whole=True)
    lock(False)
    file.write(*changes, whole=True)
    assert (file.load(), file.read_rows(), file.read_rows()) == ({"note": [1]}, [row("b")], [])
    file.close()


def test_an_index_that_can_not_be_emptied_now_is_no_damage(tmp_path, lock, monkeypatch):
    file, really = IndexFile(tmp_path), IndexFile._open

    def open_(self):
        really(self)
        lock(True)

    monkeypatch.setattr(IndexFile, "_open", open_)
    with pytest.raises(OSError, match="can't be opened: database is locked"):
        file.load()
    lock(False)
    file.close()


# --- pages


def listed(rows, order, descending):
    return sorted(rows, key=lambda one: (ORDERS[order](one), one.key), reverse=descending)


@pytest.mark.parametrize("seed", range(3))
async def test_pages_are_what_sorting_all_rows_would_give(opened, seed):
    chance = random.Random(seed)
    index = await opened()

    def change():
        for _ in range(chance.randrange(60)):
            name = f"f{chance.randrange(50)}"
            key = row(name).key
            match chance.randrange(3):
                case 0:
                    index.put(row(name, size=chance.randrange(5)))
                case 1 if key in index.rows:
                    index.put(index.rows[key].used(1, 0, float(chance.randrange(99))))
                case 2:
                    index.discard(key)

    for _ in range(30):
        change()
        order, descending = chance.choice(list(ORDERS)), chance.random() < 0.5
        found = index.rows.page(order, 1000, descending=descending)
        expected = listed(index.rows.values(), order, descending)
        assert found == expected
        if expected:
            last = chance.choice(expected)
            rest = expected[expected.index(last) + 1 :][:5]
            place = ORDERS[order](last), last.key
            assert index.rows.page(order, 5, descending=descending, after=place) == rest


async def test_rows_are_found_by_their_stream(opened):
    index = await opened()
    index.put(row("a"))
    index.put(row("b"))
    index.discard(row("b").key)
    assert [index.rows.of_stream(stream) for stream in index.rows.streams()] == [[row("a")]]
    index.discard(row("a").key)
    assert (index.rows.streams(), index.rows.of_stream(row("a").stream_id)) == ([], [])


def plans_of(table, ask):
    """How SQLite goes about what `ask` has the table do: the steps of each statement's plan."""
    asked = []
    table._database.set_trace_callback(asked.append)
    ask(table)
    table._database.set_trace_callback(None)
    return [step[3] for one in asked for step in table._database.execute(f"EXPLAIN QUERY PLAN {one}")]


ASKED = {
    "a row": lambda table: table.get(row("f00005").key),
    "a change": lambda table: (table.put(row("f00005", size=3)), table.page("key", 1)),
    "a newer revision": lambda table: (table.put(row("x", revision="260101002")), table.page("key", 1)),
    "its end": lambda table: (table.discard(row("x", revision="260101002").key), table.page("key", 1)),
    **{f"a page by {order}": lambda table, order=order: table.page(order, 2) for order in ORDERS},
    **{
        f"the next page by {order}": lambda table, order=order: table.page(
            order, 2, descending=True, after=(6.0, row("f00005").key)
        )
        for order in ORDERS
    },
    "a stream": lambda table: table.of_stream(row().stream_id),
    "revisions beyond those kept": lambda table: list(islice(table.beyond(0), 2)),
    "what is unused": lambda table: list(islice(table.unused_since(99.0), 2)),
    "the least valuable": lambda table: list(islice(table.by_worth(), 2)),
    "the last use": lambda table: table.last_use_before(99.0),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_what_is_asked_of_many_rows_is_found_by_an_index(ask, table):
    for number in range(300):
        table.put(row(f"f{number:05}"))
    plan = plans_of(table, ask)
    assert plan, "nothing was asked"
    assert not [step for step in plan if "SEARCH" not in step and " USING " not in step], plan
    assert not [step for step in plan if "TEMP B-TREE" in step], "sorting costs more the more rows there are"


def test_rows_are_worth_less_when_they_are_superseded_and_more_when_they_are_the_newest_again(table):
    old, new = row(revision="260101001"), row(revision="260101002")
    delta = replace(row("xdelta260101000_To_260101001.dax"), kind=Kind.DELTA)
    for one in (old, delta, replace(new, used_at=1.0)):
        table.put(one)
        assert len(list(table.by_worth())) == len(table)
    assert [one.key for one in table.by_worth()] == [delta.key, old.key, new.key]
    table.discard(new.key)
    assert [one.key for one in table.by_worth()] == [old.key, delta.key]
    table.put(replace(old, pinned=True))
    assert [one.key for one in table.by_worth()] == [delta.key]


def test_an_entry_takes_little_memory(table):
    """Of Python's: objects and sorted lists took 4 KiB each. SQLite's pages are counted too."""
    count = 2000
    tracemalloc.start()
    for number in range(count):
        name = f"xdelta{number:09d}_To_260101001.dax"
        table.put(replace(row(name), used_at=float(number), stored_at=float(number), hits=number))
    table.page("used", 1)
    python_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    (pages,), (page_bytes,) = (
        table._database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
    )
    assert (python_bytes + pages * page_bytes) / count < 1024


# --- rows and notes as they are read back


def read_row(text):
    return ROW.validate_json(text, strict=True)


KNOWN = row(hits=3, pinned=True, sent_bytes=7, received_bytes=9)
FIELDS = json.loads(ROW.dump_json(KNOWN))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(FIELDS)), inner),
    max_leaves=6,
)


@settings(max_examples=25)
@given(st.sampled_from(list(FIELDS)), anything)
def test_a_row_of_the_index_is_a_row_or_invalid(name, value):
    try:
        read = read_row(json.dumps(FIELDS | {name: value}))
    except ValueError:
        return
    assert read_row(ROW.dump_json(read)) == read


@settings(max_examples=25)
@given(anything)
def test_what_was_noted_is_taken_back_or_left_out(value):
    assert isinstance(read_pass(value), Pass)
    queue, revisions = PrefetchQueue(), Revisions()
    queue.restore([value])
    revisions.restore([value])
    assert list(queue.rows) == list(revisions.streams) == []
    with pytest.raises(ValueError, match=r"."):
        read_row(json.dumps(value))
