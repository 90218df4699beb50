import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cache.records import FillState, Head, Phase
from gup.cache.store import Part
from gup.content.key import ContentKey, Kind
from gup.control.eviction import Limits, plan_evictions
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


def limits(size=BIG, free=0, available=BIG, unused=0.0, keep=0, part_age=0.0, need=0):
    return Limits(size, free, available, unused, keep, part_age, need)


def names(plan):
    return [
        (eviction.key.rsplit("/", 2)[-2:] if "/" in eviction.key else [eviction.key]) for eviction in plan
    ]


def test_nothing_goes_while_everything_holds():
    assert plan_evictions([row()], [part()], limits(size=200), NOW) == []


def test_revisions_beyond_those_kept_go_with_their_deltas():
    rows = [row(f"26010100{n}") for n in range(1, 5)] + [
        row("260101001", Kind.DELTA),
        row("260101004", Kind.DELTA),
    ]
    plan = plan_evictions(rows, [], limits(keep=2), NOW)
    assert {e.reason for e in plan} == {"revision"}
    assert {e.key for e in plan} == {rows[0].key, rows[1].key, rows[4].key}


def test_a_delta_belongs_to_the_revision_it_leads_to_whatever_its_folder():
    newest = row("260101002")
    in_old_folder = row("260101001", Kind.DELTA, file="xdelta260101001_To_260101002.dax")
    assert plan_evictions([newest, in_old_folder], [], limits(keep=1), NOW) == []


def test_names_that_are_no_revisions_are_never_superseded():
    rows = [row("_", Kind.INDEX), row("latest", Kind.OTHER), row("260101001")]
    assert plan_evictions(rows, [], limits(keep=1), NOW) == []


def test_streams_are_judged_apart():
    rows = [row("260101001", stream="{A}"), row("260101002", stream="{B}")]
    assert plan_evictions(rows, [], limits(keep=1), NOW) == []


def test_long_unused_entries_go_and_pinned_ones_stay():
    rows = [row(age=31 * DAY), row("260101002", age=29 * DAY), row("260101003", age=99 * DAY, pinned=True)]
    plan = plan_evictions(rows, [], limits(unused=30 * DAY), NOW)
    assert [(e.key, e.reason) for e in plan] == [(rows[0].key, "unused")]


def test_old_parts_go_unless_claimed():
    parts = [part(1, age=8 * DAY), part(2, age=8 * DAY, claimed=True), part(3, age=6 * DAY)]
    plan = plan_evictions([], parts, limits(part_age=7 * DAY), NOW)
    assert [(e.part, e.reason) for e in plan] == [(parts[0], "part")]


def test_for_space_go_parts_then_superseded_deltas_fulls_then_least_recently_used_then_indexes():
    old_delta = row("260101001", Kind.DELTA, age=1)
    old_full = row("260101001", age=2)
    new_full_unused = row("260101002", age=9)
    new_delta_used = row("260101002", Kind.DELTA, age=3)
    index = row("_", Kind.INDEX, age=99)
    abandoned = part(7)
    rows = [index, new_delta_used, new_full_unused, old_full, old_delta]
    plan = plan_evictions(rows, [abandoned], limits(size=0), NOW)
    assert [e.key for e in plan] == [
        abandoned.id, old_delta.key, old_full.key, new_full_unused.key, new_delta_used.key, index.key,
    ]  # fmt: skip
    assert [e.reason for e in plan] == ["part"] + ["size"] * 5


@pytest.mark.parametrize(
    ("given_limits", "reasons"),
    [
        (limits(size=299), ["size"]),
        (limits(size=300), []),
        (limits(size=300, need=1), ["size"]),
        (limits(size=300, need=301), []),
        (limits(free=1000, available=900), ["free"]),
        (limits(free=1000, available=899), ["free", "free"]),
        (limits(free=1000, available=1000, need=150), ["free", "free"]),
        (limits(size=250, free=1000, available=850), ["size", "free"]),
    ],
)  # fmt: skip
def test_only_as_much_as_needed_goes(given_limits, reasons):
    rows = [row(f"26010100{n}") for n in range(3)]
    assert [e.reason for e in plan_evictions(rows, [], given_limits, NOW)] == reasons


def test_a_whole_body_waiting_for_its_commit_is_not_taken_for_space():
    whole, half = part(1, length=100), part(2, length=200)
    plan = plan_evictions([], [whole, half], limits(size=0), NOW)
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
    limits,
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
    plan = plan_evictions(rows, parts, given_limits, NOW)
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
    need = given_limits.need_bytes if given_limits.need_bytes <= given_limits.max_size_bytes else 0
    held = (
        total - freed + need <= given_limits.max_size_bytes
        and given_limits.free_bytes + freed >= given_limits.min_free_bytes + need
    )
    movable = {r.key for r in rows if not r.pinned} | {
        p.id
        for p in parts
        if not p.claimed and p.size_bytes and not (p.state and p.state.head.length == p.size_bytes)
    }
    assert held or movable <= gone


@given(rows_strategy, parts_strategy, limits_strategy)
def test_a_second_plan_finds_nothing_left_to_do(rows: list[Row], parts: list[Part], given_limits: Limits):
    plan = plan_evictions(rows, parts, given_limits, NOW)
    gone = {e.key for e in plan}
    freed = sum(e.size_bytes for e in plan)
    after = Limits(
        given_limits.max_size_bytes,
        given_limits.min_free_bytes,
        given_limits.free_bytes + freed,
        given_limits.max_unused_seconds,
        given_limits.keep_revisions,
        given_limits.max_part_age_seconds,
        given_limits.need_bytes,
    )
    rest = [r for r in rows if r.key not in gone]
    again = plan_evictions(rest, [p for p in parts if p.id not in gone], after, NOW)
    assert [e for e in again if e.reason == "unused"] == []
    assert [e for e in again if e.reason in ("size", "free")] == []
