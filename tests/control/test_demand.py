"""The record of demand on disk, and the replay: it must decide as the service's own tables do."""

import asyncio
import random
from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.config import Cache, Settings
from gup.content.key import ContentKey, Kind
from gup.control.entry_table import EntryTable, make_row
from gup.control.events import Committed, Refused, Take
from gup.control.eviction_plan import DiskUsage, plan_evictions
from gup.control.replay import Replay, with_size
from gup.control.stats import demand
from gup.control.stats.demand import DemandRecord
from gup.control.stats.demand_files import Key, Line, Op, files, read_groups, read_keys, read_lines

NOW = 1_800_000_000.0
DAY = 86400.0
BIG = 1 << 50


def full(stream=1, revision=1) -> ContentKey:
    return ContentKey("any", "any", f"{{{stream}}}", f"260101{revision:03d}", "full.zip")


def delta(stream, origin, revision) -> ContentKey:
    name = f"xdelta260101{origin:03d}_To_260101{revision:03d}.dax"
    return ContentKey("any", "any", f"{{{stream}}}", f"260101{revision:03d}", name)


INDEX = ContentKey("any", "any", "_", "_", "ContentInfo.txt")
KEYS = [
    *((full(stream, revision), Kind.FULL) for stream in (1, 2, 3) for revision in range(1, 6)),
    *((delta(stream, one, one + 1), Kind.DELTA) for stream in (1, 2) for one in range(1, 5)),
    (INDEX, Kind.INDEX),
]
LENGTHS = [37 * number % 90 + 10 for number in range(len(KEYS))]


class Model:
    """The service's own table and decision, one request after the other."""

    def __init__(self, limits: Cache) -> None:
        self.table, self.limits, self.fetched = EntryTable(), limits, 0

    def request(self, number: int, at: float) -> None:
        key, kind = KEYS[number]
        row = self.table.get(key.text)
        if row is None:
            self.fetched += LENGTHS[number]
            if LENGTHS[number] > self.limits.max_size:
                return
            self.evict(at, LENGTHS[number])
            row = make_row(key, kind, LENGTHS[number], stored_at=at, used_at=at)
        self.table.put(row.used(1, 0, at))
        self.evict(at, 0)

    def evict(self, at: float, need: int) -> None:
        plan = plan_evictions(
            self.table, DiskUsage((), BIG, self.table.total_bytes), self.limits, at, need=need
        )
        for eviction in plan:
            self.table.discard(eviction.key)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(20, 900), min_size=1, max_size=4),
    keep=st.sampled_from([0, 1, 2, 4]),
    unused=st.sampled_from([0.0, 900.0]),
)
def test_stores_of_several_sizes_evict_as_the_service_does(seed, sizes, keep, unused):
    """Both are driven by the same requests: what they fetched is equal to the byte."""
    chance, at, lines = random.Random(seed), NOW, []
    own = Cache.model_construct(
        max_size=0, min_free=0, keep_revisions=keep, max_unused=unused, max_part_age=0.0
    )
    models = [Model(with_size(own, size)) for size in sizes]
    for _ in range(120):
        number = min(len(KEYS) - 1, int(chance.expovariate(0.12)))
        at += chance.choice((1.0, 1.0, 30.0, 700.0))
        lines.append(Line(at, 1.0, 0, 0, 0, 0, 0, [number, int(Op.USE), 1]))
        for model in models:
            model.evict(at, 0)  # as the service does every some seconds
            model.request(number, at)
    keys = {n: Key(key.text, kind, LENGTHS[n], local=False) for n, (key, kind) in enumerate(KEYS)}
    replay = Replay([with_size(own, size) for size in sizes])
    for line in lines:
        replay._tidy_at = -DAY  # as the service does, before each
        replay._take(line, keys)
    assert [store.wan_bytes for store in replay.stores] == [model.fetched for model in models]
    assert [store.total_bytes for store in replay.stores] == [m.table.total_bytes for m in models]
    for model in models:
        model.table.close()


def rows_of(*rows, **line) -> Line:
    return Line(line.get("at", NOW), 1.0, 0, 0, 0, 0, 0, [int(n) for row in rows for n in row])


def replayed(size, *lines, keys=None, since=0.0):
    keys = keys or {n: Key(key.text, kind, 100, local=False) for n, (key, kind) in enumerate(KEYS)}
    replay = Replay([with_size(Cache(), size)], since)
    for line in lines:
        replay._take(line, keys)
    return replay


CASES = {
    "one fetch for a crowd": ([(0, Op.USE, 50), (0, Op.MORE, 20)], 1000, 100, 70),
    "what does not fit is fetched for each": ([(0, Op.USE, 3), (0, Op.MORE, 2)], 99, 500, 5),
    "a client that left costs its fill": ([(0, Op.FILL, 0)], 1000, 100, 0),
    "prefetched once, then hit": ([(0, Op.PREFETCH, 0), (0, Op.USE, 4)], 1000, 100, 4),
    "prefetched for nobody": ([(0, Op.PREFETCH, 0), (0, Op.PREFETCH, 0)], 1000, 100, 0),
    "a purge has it fetched again": ([(0, Op.USE, 1), (0, Op.PURGED, 1), (0, Op.USE, 1)], 1000, 200, 2),
    "a body that changed is fetched": ([(0, Op.USE, 1), (0, Op.CHANGED, 40), (0, Op.USE, 1)], 1000, 140, 2),
    "no upstream had it": ([(0, Op.FAILED, 1)], 1000, 0, 0),
    "imported": ([(0, Op.PLACED, 0), (0, Op.USE, 3)], 1000, 0, 3),
    "pinned ones stay": ([(0, Op.USE, 1), (0, Op.PIN, 1), (5, Op.USE, 1), (10, Op.USE, 1), (0, Op.USE, 1)],
                         200, 300, 4),
    "and go when they no longer are": (
        [(0, Op.PLACED, 1), (0, Op.UNPIN, 1), (5, Op.USE, 1), (10, Op.USE, 1), (0, Op.USE, 1)], 200, 300, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "size", "wan", "requests"), CASES.values(), ids=CASES)
def test_what_is_fetched(rows, size, wan, requests):
    replay = replayed(size, rows_of(*rows))
    assert (replay.stores[0].wan_bytes, replay.requests) == (wan, requests)


def test_only_what_came_later_is_counted_and_what_came_before_fills_the_store():
    lines = [rows_of((0, Op.USE, 1), at=NOW), rows_of((0, Op.USE, 1), (1, Op.USE, 1), at=NOW + 100)]
    replay = replayed(1000, *lines, since=NOW + 50)
    assert (replay.stores[0].wan_bytes, replay.requests, replay.distinct_bytes) == (100, 2, 200)


def test_a_body_of_unknown_size_counts_as_a_request_and_is_fetched_when_it_is_known():
    unknown = {0: Key(KEYS[0][0].text, Kind.FULL, -1, local=False)}
    replay = replayed(1000, rows_of((0, Op.USE, 2)), keys=unknown)
    assert (replay.unknown, replay.stores[0].wan_bytes) == (2, 0)
    replay._take(rows_of((0, Op.USE, 1)), {0: unknown[0]._replace(length_bytes=100)})
    assert replay.stores[0].wan_bytes == 100


def test_what_another_member_has_sent_did_not_cross_the_wan():
    local = {0: Key(KEYS[0][0].text, Kind.FULL, 100, local=True)}
    assert replayed(1000, rows_of((0, Op.USE, 2)), keys=local).stores[0].wan_bytes == 0


# --- the record


class World:
    """A record in a folder, with a table of entries, a clock and settings that can be changed."""

    def __init__(self, folder, **reports) -> None:
        self.now, self.table, self.refusals = NOW, EntryTable(), []
        self.settings = Settings.model_validate({"reports": reports, "cache": {"max_size": 10**9}})
        self.totals = Counter()
        self.folder = folder / "reports" / "demand"
        self._root = folder
        self.start()

    def start(self) -> None:
        own = SimpleNamespace(
            settings=lambda: self.settings,
            totals=lambda: self.totals,
            store=SimpleNamespace(root=self._root),
        )
        note = lambda what, why: self.refusals.append((what, why))  # noqa: E731
        self.record = DemandRecord(own, self.table, lambda: self.now, note)

    def miss(self, key, length=100, *, kind=Kind.FULL, asked=1, path=True):
        known = self.table.get(key.text)
        path = f"/content/{key.stream}/{key.revision}/{key.file}" if path else ""
        event = Committed.model_construct(
            key=key, length=length, kind=kind, replaced=False, path=path, received=length
        )
        self.record.committed(event, known)
        self.table.put(make_row(key, kind, length, stored_at=self.now, used_at=self.now))
        if asked:
            self.record.asked(key, asked)

    def rows(self) -> list[tuple[str, str, int]]:
        found = []
        for path in files(self.folder):
            starts = read_keys(path)
            for start, line in read_lines(path):
                them = iter(line.rows)
                found += [(starts[start][n].text, Op(op).name, c) for n, op, c in zip(*[them] * 3)]  # noqa: B905
        return found


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    with closing(made.table):
        yield made


A, B, C = full(1), full(2), full(3)


async def test_a_request_is_one_row_however_its_fetch_is_told(world):
    world.miss(A, asked=3)  # a small one: stored before its requests are told
    world.record.asked(B, 1)  # a large one: asked for, still fetched
    world.record.asked(B, 4)
    world.miss(B, asked=2)  # those that it served at last
    world.record.used(A, 5, world.table.get(A.text))
    await world.record.write()
    assert world.rows() == [(B.text, "USE", 1), (B.text, "MORE", 6), (A.text, "USE", 8)]


async def test_a_fill_whose_client_left_is_told_after_a_while(world):
    world.miss(A, asked=0)
    await world.record.write()
    assert world.rows() == []
    world.now += 6
    await world.record.write()
    assert world.rows() == [(A.text, "FILL", 0)]


async def test_bodies_that_are_passed_through_are_fetched_for_each_request(world):
    world.record.asked(A, 1)
    world.record.unstorable(A, 5000)
    world.record.asked(A, 2)
    await world.record.write()
    assert world.rows() == [(A.text, "USE", 3)]
    assert read_keys(files(world.folder)[0])[0][0].length_bytes == 5000


async def test_prefetches_purges_pins_failures_and_index_files(world):
    world.miss(A, path=False, asked=0)
    world.record.pinned(A.text, pinned=True)
    world.record.removed(A.text)
    world.record.failed(B)
    world.miss(INDEX, kind=Kind.INDEX, asked=0)
    world.miss(INDEX, 120, kind=Kind.INDEX, asked=0)
    await world.record.write()
    assert [row[1:] for row in world.rows()] == [
        *(("PREFETCH", 0), ("PIN", 1), ("PURGED", 1), ("FAILED", 1), ("FILL", 1), ("CHANGED", 120))
    ]


async def test_a_restart_goes_on_where_a_crash_tore_the_file(world):
    world.miss(A)
    await world.record.write()
    (path,) = files(world.folder)
    with path.open("ab") as file:
        file.write(b"R\0\0\0\1\0\0\xff\xffnot all of it")
    world.start()
    world.record.used(A, 2, world.table.get(A.text))
    world.miss(B)
    await world.record.write()
    assert world.rows() == [(A.text, "USE", 1), (A.text, "USE", 2), (B.text, "USE", 1)]
    assert len(files(world.folder)) == 1


async def test_what_was_stored_before_the_record_began_is_in_it_and_is_not_fetched(world):
    world.table.put(make_row(A, Kind.FULL, 100, stored_at=NOW - DAY, used_at=NOW - DAY, pinned=True))
    world.record.used(A, 1, world.table.get(A.text))
    world.miss(B)
    await world.record.write()
    assert world.rows()[0] == (A.text, "PLACED", 1)
    replay = Replay([with_size(Cache(), 1000)])
    replay.run(world.folder)
    assert (replay.stores[0].wan_bytes, replay.requests) == (100, 2)


async def test_a_file_a_day_and_the_oldest_go(world, monkeypatch):
    world.settings = Settings.model_validate({"reports": {"demand": "3d"}})
    for _ in range(8):
        world.miss(A)
        await world.record.write()
        world.now += DAY + 1
    assert 3 <= len(files(world.folder)) <= 5
    monkeypatch.setattr(demand, "MOST_BYTES", 0)
    monkeypatch.setattr(demand, "_FILE_BYTES", 0)
    world.miss(B)
    await world.record.write()
    assert len(files(world.folder)) == 1


async def test_without_a_record_nothing_is_kept(world):
    world.miss(A)
    await world.record.write()
    world.settings = Settings.model_validate({"reports": {"demand": 0}})
    world.miss(B)
    await world.record.write()
    assert files(world.folder) == []
    world.start()
    await world.record.write()
    assert files(world.folder) == []


async def test_a_disk_that_refuses_is_told_and_loses_little(world, monkeypatch):
    world.miss(A)
    await world.record.write()
    append, refusing = demand.append, [True]

    def full_disk(path, frames, size):
        if refusing[0]:
            with path.open("ab") as file:
                file.write(b"R torn")
            raise OSError(28, "No space left on device")
        return append(path, frames, size)

    monkeypatch.setattr(demand, "append", full_disk)
    world.miss(B)
    await world.record.write()
    assert world.refusals[-1] == ("demand", "No space left on device")
    world.miss(C)
    await world.record.write()
    refusing.clear()
    refusing.append(False)
    await world.record.write()
    assert world.refusals[-1] == ("demand", None)
    assert world.rows() == [(key.text, "USE", 1) for key in (A, B, C)]


async def test_damage_ends_a_file_and_nothing_else(world):
    world.miss(A)
    await world.record.write()
    world.now += DAY + 1
    world.miss(B)
    await world.record.write()
    first, second = files(world.folder)
    content = bytearray(first.read_bytes())
    content[-3] ^= 0xFF
    first.write_bytes(content)
    replay = Replay([with_size(Cache(), 1000)])
    replay.run(world.folder)
    assert second.exists()
    assert replay.requests >= 1


async def test_groups_state_no_client(world):
    take = Take("10.1.2.3", A, "14.3", "French", 1)
    world.record.taken([take, take])
    world.record.refused([Refused("10.1.2.3", "version", A.stream, "14.2", "", 7)])
    await world.record.write(everything=True)
    found = {group[:2]: group[3:] for group in read_groups(world.folder, 0.0)}
    assert found == {("14.3", "French"): (2, 0), ("14.2", ""): (0, 7)}
    assert b"10.1.2.3" not in b"".join(path.read_bytes() for path in files(world.folder))


async def test_news_while_it_writes_is_not_lost(world):
    async def go_on():
        for number in range(1, 200):
            world.miss(full(1, number))
            await asyncio.sleep(0)

    await asyncio.gather(go_on(), *(world.record.write() for _ in range(5)))
    await world.record.write()
    assert len({row[0] for row in world.rows()}) == 199
