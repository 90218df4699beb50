"""What is evicted in which order, the limits under a running control plane, and the clock of ages."""

import asyncio
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
from control.calls import limited
from hypothesis import given
from hypothesis import strategies as st

from gup.cache.records import FillState, Head, Phase
from gup.cache.store import Part
from gup.config import Cache
from gup.content.key import ContentKey, Kind
from gup.control.entry_table import EntryTable, Row, make_row
from gup.control.eviction import (
    BELIEVED_AFTER_SECONDS,
    GAP_SECONDS,
    AgeClock,
    remove_part,
)
from gup.control.eviction_plan import DiskUsage, Eviction, plan_evictions

NOW = 1_800_000_000.0
DAY = 86400.0
BIG = 1 << 50


def row(revision="260101001", kind=Kind.FULL, size=100, age=0.0, *, pinned=False, stream="{S}", file=""):
    names = {Kind.FULL: "full.zip", Kind.INDEX: "ContentInfo.txt", Kind.OTHER: "payload.7z"}
    name = file or names.get(kind) or f"xdelta250101001_To_{revision}.dax"
    key = ContentKey("v", "l", stream, revision, name)
    return make_row(key, kind, size, stored_at=NOW - age, used_at=NOW - age, pinned=pinned)


def part(number=1, size=100, age=0.0, *, claimed=False, length=None):
    """With `length`, its state tells that the whole body has so many bytes."""
    id_ = f"{number:032x}"
    key = ContentKey("v", "l", "{S}", "260101001", f"p{number}")
    head = Head(length, '"tag"', "application/zip", None, "manager", None)
    state = FillState(key, Kind.FULL, 1, Phase.STREAMING, head) if length else None
    return Part(id_, 1, size, NOW - age, claimed, state)


@dataclass(frozen=True)
class Limits:
    size: int = BIG
    free: int = 0
    available: int = BIG
    unused: float = 0.0
    keep: int = 0
    part_age: float = 0.0
    need: int = 0


def planned(rows, parts, limits: Limits) -> list[Eviction]:
    space = {"max_size": limits.size, "min_free": limits.free, "keep_revisions": limits.keep}
    cache = Cache.model_construct(**space, max_unused=limits.unused, max_part_age=limits.part_age)
    disk = DiskUsage(tuple(parts), limits.available, sum(row.length_bytes for row in rows))
    with closing(EntryTable()) as table:
        for one in rows:
            table.put(one)
        return plan_evictions(table, disk, cache, NOW, need=limits.need)


THIRTY, WEEK = 30 * DAY, 7 * DAY
PLANS = {
    "nothing goes while all holds": ([row(), part()], Limits(size=200), {}),
    "revisions beyond those kept, with their deltas": (
        [*(row(f"26010100{n}") for n in range(1, 5)), *(row(f"26010100{n}", Kind.DELTA) for n in (1, 4))],
        Limits(keep=2),
        dict.fromkeys((0, 1, 4), "revision"),
    ),
    "a delta belongs to the revision it leads to, whatever its folder": (
        [row("260101002"), row("260101001", Kind.DELTA, file="xdelta260101001_To_260101002.dax")],
        Limits(keep=1),
        {},
    ),
    "names that are no revisions are not superseded": (
        [row("_", Kind.INDEX), row("latest", Kind.OTHER), row("260101001")], Limits(keep=1), {},
    ),
    "streams are judged apart": (
        [row("260101001", stream="{A}"), row("260101002", stream="{B}")], Limits(keep=1), {},
    ),
    "long unused entries go and pinned ones stay": (
        [row(age=31 * DAY), row("260101002", age=29 * DAY), row("260101003", age=99 * DAY, pinned=True)],
        Limits(unused=THIRTY),
        {0: "unused"},
    ),
    "old parts go unless claimed": (
        [part(1, age=8 * DAY), part(2, age=8 * DAY, claimed=True), part(3, age=6 * DAY)],
        Limits(part_age=WEEK),
        {0: "part"},
    ),
    "a whole body waiting for its commit is not taken for space": (
        [part(1, length=100), part(2, length=200)], Limits(size=0), {1: "part"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("held", "limits", "gone"), PLANS.values(), ids=PLANS)
def test_what_goes_and_why(held, limits, gone):
    plan = planned([r for r in held if isinstance(r, Row)], [p for p in held if isinstance(p, Part)], limits)
    names = [one.key if isinstance(one, Row) else one.id for one in held]
    assert {names.index(eviction.key): eviction.reason for eviction in plan} == gone


def test_for_space_go_parts_then_superseded_deltas_fulls_then_least_recently_used_then_indexes():
    old_delta = row("260101001", Kind.DELTA, age=1)
    old_full = row("260101001", age=2)
    new_full_unused = row("260101002", age=9)
    new_delta_used = row("260101002", Kind.DELTA, age=3)
    index = row("_", Kind.INDEX, age=99)
    abandoned = part(7)
    rows = [index, new_delta_used, new_full_unused, old_full, old_delta]
    plan = planned(rows, [abandoned], Limits(size=0))
    assert [e.key for e in plan] == [
        abandoned.id, old_delta.key, old_full.key, new_full_unused.key, new_delta_used.key, index.key,
    ]  # fmt: skip
    assert [e.reason for e in plan] == ["part"] + ["size"] * 5


@pytest.mark.parametrize(
    ("given_limits", "reasons"),
    [
        (Limits(size=299), ["size"]),
        (Limits(size=300), []),
        (Limits(size=300, need=1), ["size"]),
        (Limits(size=300, need=301), []),
        (Limits(free=1000, available=900), ["free"]),
        (Limits(free=1000, available=899), ["free", "free"]),
        (Limits(free=1000, available=1000, need=150), ["free", "free"]),
        (Limits(size=250, free=1000, available=850), ["size", "free"]),
    ],
)  # fmt: skip
def test_only_as_much_as_needed_goes(given_limits, reasons):
    rows = [row(f"26010100{n}") for n in range(3)]
    assert [e.reason for e in planned(rows, [], given_limits)] == reasons


rows_strategy = st.lists(
    st.builds(
        row,
        revision=st.sampled_from([f"26010{d}00{n}" for d in range(1, 4) for n in range(3)] + ["_"]),
        kind=st.sampled_from(Kind),
        size=st.integers(1, 1000),
        age=st.floats(0, 90 * DAY),
        pinned=st.booleans(),
        stream=st.sampled_from(["{A}", "{B}"]),
    ),
    max_size=25,
    unique_by=lambda r: r.key,
)
parts_strategy = st.lists(
    st.builds(
        part,
        number=st.integers(1, 99),
        size=st.integers(0, 1000),
        age=st.floats(0, 30 * DAY),
        claimed=st.booleans(),
        length=st.sampled_from([None, 100, 1000]),
    ),
    max_size=6,
    unique_by=lambda p: p.id,
)
limits_strategy = st.builds(
    Limits,
    size=st.integers(0, 8000),
    free=st.integers(0, 3000),
    available=st.integers(0, 6000),
    unused=st.sampled_from([0.0, 30 * DAY]),
    keep=st.integers(0, 4),
    part_age=st.sampled_from([0.0, 7 * DAY]),
    need=st.integers(0, 2000),
)


@given(rows_strategy, parts_strategy, limits_strategy)
def test_what_a_plan_never_does_and_always_reaches(rows: list[Row], parts: list[Part], given_limits: Limits):
    plan = planned(rows, parts, given_limits)
    gone = {e.key for e in plan}
    assert len(gone) == len(plan), "something is evicted twice"
    assert not any(r.pinned for r in rows if r.key in gone)
    assert not any(p.claimed for p in parts if p.id in gone)
    for stream in {r.stream_id for r in rows}:
        revisions = [r for r in rows if r.stream_id == stream and r.content_revision]
        newest = max((r.content_revision for r in revisions), default=None)
        superseded = {e.key for e in plan if e.reason == "revision"}
        assert not any(r.key in superseded for r in revisions if r.content_revision == newest)
    freed = sum(e.size_bytes for e in plan)
    total = sum(r.length_bytes for r in rows) + sum(p.size_bytes for p in parts)
    need = given_limits.need if given_limits.need <= given_limits.size else 0
    held = total - freed + need <= given_limits.size
    held = held and given_limits.available + freed >= given_limits.free + need
    whole = {p.id for p in parts if p.state and p.state.head.length == p.size_bytes}
    movable = {r.key for r in rows if not r.pinned}
    movable |= {p.id for p in parts if not p.claimed and p.size_bytes and p.id not in whole}
    assert held or movable <= gone
    after = replace(given_limits, available=given_limits.available + freed)
    rest = [r for r in rows if r.key not in gone]
    again = planned(rest, [p for p in parts if p.id not in gone], after)
    assert [e for e in again if e.reason in ("unused", "size", "free")] == [], "nothing is left to do"


# --- a running control plane


async def test_commits_beyond_the_limit_evict_the_least_recently_used_soon(world):
    world.settings = limited(world.settings, max_size=1000)
    old = world.commit(world.key("_", "old.7z"), b"o" * 600, Kind.OTHER, at=10.0)
    async with world.running() as control:
        new = await asyncio.to_thread(
            world.commit, world.key("_", "new.7z"), b"n" * 600, Kind.OTHER, world.now
        )
        begun = asyncio.get_running_loop().time()
        world.tell_committed(new)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
        assert asyncio.get_running_loop().time() - begun < 5.0
        # The old entry may have gone while the new one was still a part: parts count too.
        await world.until(lambda: set(control.state.index.rows) == {new.key.text})
        await world.until(lambda: world.store_bytes[-1:] == [600])
    assert not world.store.body_path(old.key).exists()
    assert world.counters.get("gup_evicted_bytes_total", reason="size") == 600
    assert world.epochs == 1


async def test_evict_now_spares_what_is_claimed_or_pinned(world, browser):
    pinned = world.commit(world.key("_", "pinned.7z"), kind=Kind.OTHER)
    filled = world.commit(world.key("_", "filled.7z"), kind=Kind.OTHER)
    free = world.commit(world.key("_", "free.7z"), kind=Kind.OTHER)
    with world.claimed(pinned.key) as store:
        store.set_pinned(pinned.key, True)
    abandoned, under_way = world.key("260101008"), world.key("260101009")
    world.begin_part(abandoned, b"a" * 9, 99)
    world.begin_part(under_way, b"u" * 9, 99)
    for key in (filled.key, under_way):
        assert world.claims.try_claim(key.claim_offset)
    async with world.running() as control:
        await world.apply(control, limited(world.settings, max_size=0))
        async with browser.post(world.url + "/api/v1/evict") as answer:
            assert answer.status == 200
        await world.until(lambda: set(control.state.index.rows) == {pinned.key.text, filled.key.text})
    assert not world.store.body_path(free.key).exists()
    assert not world.store.part_path(abandoned.id, 1).exists()
    assert not world.store.state_path(abandoned.id).exists()
    assert world.store.part_path(under_way.id, 1).exists()
    assert world.counters.get("gup_evictions_total", reason="part") == 1
    assert not world.claims.held(free.key.claim_offset)


async def test_nothing_is_evicted_while_the_index_is_incomplete(world):
    record = world.commit()
    world.settings = limited(world.settings, max_size=0)
    async with world.running() as control:
        control.state.index.complete = False
        done = await control.state.evictor.evict()
        assert done == []
        control.state.index.complete = True
        await control.state.evictor.evict()
    assert not world.store.body_path(record.key).exists()


async def test_a_part_that_went_on_meanwhile_is_not_removed(world):
    key = world.key("260101009")
    world.begin_part(key, b"a" * 9, 99)
    async with world.running() as control:
        (part,) = (await control.state.evictor.measure()).parts
        await asyncio.to_thread(world.begin_part, key, b"more" * 9, 99)
        assert not await asyncio.to_thread(remove_part, world.store, part)
    assert world.store.part_path(key.id, 1).exists()


# --- the clock by which entries grow old

MONTH = 30 * 86400.0


@dataclass
class Machine:
    wall: float = NOW
    boot: float = 1000.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def ages(machine) -> AgeClock:
    return AgeClock(lambda: machine.wall, lambda: machine.boot)


DAY_LONG = BELIEVED_AFTER_SECONDS
JUMPS = {  # the clock is put forward by so much, then so much time passes; what is shown
    "right, and corrected a little": [(2.0, 3600.0, 3602.0 * n) for n in range(1, 100)],
    "ahead, and back": [(0, 0, 0), (12 * MONTH, 3600, 3600), (-12 * MONTH, 60, 3660)],
    "ahead for a day": [(MONTH, 0, 0), (0, DAY_LONG - 1, DAY_LONG - 1), (0, 1, MONTH + DAY_LONG)],
    "back": [(-MONTH, 0, -MONTH)],
}


@pytest.mark.parametrize("jumps", JUMPS.values(), ids=JUMPS)
def test_a_jump_ahead_is_not_believed_before_it_stood_for_a_day_and_one_back_counts_at_once(
    machine, ages, jumps
):
    for jump, seconds, shown in jumps:
        machine.wall += jump
        machine.passes(seconds)
        assert ages() == NOW + shown


@pytest.mark.parametrize(("gap", "believed"), [(GAP_SECONDS - 1, True), (GAP_SECONDS + 1, False)])
def test_at_the_start_the_last_use_is_what_the_clock_is_held_to(machine, ages, gap, believed):
    ages.begin(lambda at: max(used for used in (NOW - 2 * gap, NOW - gap, NOW + 1) if used < at))
    assert (ages() == NOW) is believed
    machine.passes(BELIEVED_AFTER_SECONDS + 1)
    ages()
    machine.passes(BELIEVED_AFTER_SECONDS + 1)
    assert ages() == machine.wall


def test_a_last_use_in_the_future_changes_nothing(ages):
    ages.begin(lambda _at: None)
    assert ages() == NOW
