"""Decides what has to go, and in which order; never touches the disk.

Three passes: what is superseded beyond `keep_revisions` or unused too long goes in any case; then, while
there is too much (or too little left free), abandoned parts, superseded deltas, superseded fulls, the least
recently used, and index files at the very end. Pinned entries and claimed parts stay whatever happens.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gup.cache.store import Part
from gup.content.key import Kind
from gup.control.rows import Row, Stream

Reason = Literal["unused", "revision", "size", "free", "part"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What has to hold. A `max_unused_seconds`, `max_part_age_seconds` or `keep_revisions` of 0 is no limit.

    `need_bytes` is room that a worker asks for on top; more than `max_size_bytes` can't be had and counts as
    none, since evicting everything would not help either. `refused_bytes` go whatever `free_bytes` says:
    the disk refused a write, for a quota or for want of inodes.
    """

    max_size_bytes: int
    min_free_bytes: int
    free_bytes: int
    max_unused_seconds: float
    keep_revisions: int
    max_part_age_seconds: float
    need_bytes: int = 0
    refused_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Eviction:
    """One thing to remove: an entry (`key`) or a part (`part`, then `key` is its id)."""

    key: str
    reason: Reason
    size_bytes: int
    part: Part | None = None


def plan_evictions(
    entries: Sequence[Row], parts: Sequence[Part], limits: Limits, now: float
) -> list[Eviction]:
    """What to remove, in this order. `limits.free_bytes` is what is free before anything is removed."""
    newest, expendable = _revisions(entries, limits.keep_revisions)
    plan: list[Eviction] = []
    spare_parts: list[Part] = []
    for part in parts:
        if part.claimed:
            continue
        if limits.max_part_age_seconds and now - part.modified_at > limits.max_part_age_seconds:
            plan.append(Eviction(part.id, "part", part.size_bytes, part))
        elif part.size_bytes and not _is_journal(part):
            spare_parts.append(part)
    spare: list[Row] = []
    for row in entries:
        if row.pinned:
            continue
        if row.key in expendable:
            plan.append(Eviction(row.key, "revision", row.length_bytes))
        elif limits.max_unused_seconds and now - row.used_at > limits.max_unused_seconds:
            plan.append(Eviction(row.key, "unused", row.length_bytes))
        else:
            spare.append(row)
    total = sum(row.length_bytes for row in entries) + sum(part.size_bytes for part in parts)
    _make_room(plan, _by_worth(spare_parts, spare, newest), total, limits)
    return plan


def _is_journal(part: Part) -> bool:
    """A whole body whose commit was interrupted: recovery publishes it soon."""
    return part.state is not None and part.state.record is not None


def _revisions(entries: Iterable[Row], keep: int) -> tuple[dict[Stream, str], set[str]]:
    """The newest revision of each stream, and the keys whose revision is beyond the `keep` newest."""
    by_stream: dict[Stream, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in entries:
        if (revision := row.content_revision) is not None:
            by_stream[row.stream_id][revision].append(row.key)
    newest: dict[Stream, str] = {}
    expendable: set[str] = set()
    for stream, keys_of in by_stream.items():
        ordered = sorted(keys_of, reverse=True)  # equal length: text order is number order
        newest[stream] = ordered[0]
        if keep:
            for revision in ordered[keep:]:
                expendable.update(keys_of[revision])
    return newest, expendable


def _by_worth(parts: Iterable[Part], rows: Iterable[Row], newest: dict[Stream, str]) -> list[Eviction]:
    """Everything that may go for space, what is missed least first. The reason is filled in later."""

    def rank(row: Row) -> tuple[int, float]:
        revision = row.content_revision
        superseded = revision is not None and revision != newest[row.stream_id]
        if row.kind is Kind.INDEX:
            return 3, row.used_at
        if not superseded:
            return 2, row.used_at
        return (0 if row.kind is Kind.DELTA else 1), row.used_at

    ordered_parts = sorted(parts, key=lambda part: part.modified_at)
    return [Eviction(part.id, "part", part.size_bytes, part) for part in ordered_parts] + [
        Eviction(row.key, "size", row.length_bytes) for row in sorted(rows, key=rank)
    ]


def _make_room(plan: list[Eviction], candidates: list[Eviction], total: int, limits: Limits) -> None:
    """Add candidates to `plan` until size and free space hold."""
    freed = sum(eviction.size_bytes for eviction in plan)
    need = limits.need_bytes if limits.need_bytes <= limits.max_size_bytes else 0
    too_big = total + need - limits.max_size_bytes - freed
    too_little = max(limits.min_free_bytes + need - limits.free_bytes, limits.refused_bytes) - freed
    for candidate in candidates:
        if too_big <= 0 and too_little <= 0:
            return
        reason: Reason = "size" if too_big > 0 else "free"
        if candidate.part is not None:
            reason = "part"
        plan.append(Eviction(candidate.key, reason, candidate.size_bytes, candidate.part))
        too_big -= candidate.size_bytes
        too_little -= candidate.size_bytes
