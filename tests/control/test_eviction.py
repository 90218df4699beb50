from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cache.records import FillState, Head, Phase
from gup.cache.store import Part
from gup.config import Cache
from gup.content.key import ContentKey, Kind
from gup.control.eviction import DiskUsage, Eviction, plan_evictions
from gup.control.index import Row, make_row

NOW = 1_000_000.0
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
    return plan_evictions(rows, disk, cache, NOW, need=limits.need)


def test_nothing_goes_while_everything_holds():
    assert planned([row()], [part()], Limits(size=200)) == []


def test_revisions_beyond_those_kept_go_with_their_deltas():
    rows = [row(f"26010100{n}") for n in range(1, 5)]
    rows += [row("260101001", Kind.DELTA), row("260101004", Kind.DELTA)]
    plan = planned(rows, [], Limits(keep=2))
    assert {e.reason for e in plan} == {"revision"}
    assert {e.key for e in plan} == {rows[0].key, rows[1].key, rows[4].key}


def test_a_delta_belongs_to_the_revision_it_leads_to_whatever_its_folder():
    newest = row("260101002")
    in_old_folder = row("260101001", Kind.DELTA, file="xdelta260101001_To_260101002.dax")
    assert planned([newest, in_old_folder], [], Limits(keep=1)) == []


def test_names_that_are_no_revisions_are_never_superseded():
    rows = [row("_", Kind.INDEX), row("latest", Kind.OTHER), row("260101001")]
    assert planned(rows, [], Limits(keep=1)) == []


def test_streams_are_judged_apart():
    rows = [row("260101001", stream="{A}"), row("260101002", stream="{B}")]
    assert planned(rows, [], Limits(keep=1)) == []


def test_long_unused_entries_go_and_pinned_ones_stay():
    rows = [row(age=31 * DAY), row("260101002", age=29 * DAY), row("260101003", age=99 * DAY, pinned=True)]
    plan = planned(rows, [], Limits(unused=30 * DAY))
    assert [(e.key, e.reason) for e in plan] == [(rows[0].key, "unused")]


def test_old_parts_go_unless_claimed():
    parts = [part(1, age=8 * DAY), part(2, age=8 * DAY, claimed=True), part(3, age=6 * DAY)]
    plan = planned([], parts, Limits(part_age=7 * DAY))
    assert [(e.part, e.reason) for e in plan] == [(parts[0], "part")]


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


def test_a_whole_body_waiting_for_its_commit_is_not_taken_for_space():
    whole, half = part(1, length=100), part(2, length=200)
    plan = planned([], [whole, half], Limits(size=0))
    assert [eviction.part for eviction in plan] == [half]


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
