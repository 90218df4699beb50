"""What is evicted, and in which order: pure, so that the service and a replay of its demand decide alike."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal, Protocol

from gup.config import Cache
from gup.content.key import ContentKey

if TYPE_CHECKING:
    from gup.cache.store import Part

Reason = Literal["unused", "revision", "size", "free", "part"]


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """The disk as it was measured. `entries_bytes` is what the index held just before.

    Before, not after: a part that is committed in between would be counted as a part and as an entry, and too
    much would be evicted. Counted as neither, it is found by the next check, which its event requests.
    """

    parts: tuple["Part", ...]
    free_bytes: int
    entries_bytes: int

    @property
    def parts_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def size_bytes(self) -> int:
        return self.entries_bytes + self.parts_bytes

    @property
    def idle_parts_bytes(self) -> int:
        """Size of the unclaimed parts; for the others their fills have reserved the room."""
        return sum(part.size_bytes for part in self.parts if not part.claimed)


@dataclass(frozen=True, slots=True)
class Eviction:
    key: str
    reason: Reason
    size_bytes: int
    part: "Part | None" = None

    @property
    def id(self) -> str:
        """That of the key, which has to be claimed."""
        return self.part.id if self.part else ContentKey.parse(self.key).id


class Candidate(Protocol):
    """An entry that may be evicted."""

    @property
    def key(self) -> str: ...
    @property
    def length_bytes(self) -> int: ...


class Evictable(Protocol):
    """What is chosen from: the entries of the store (EntryTable), or those of a replay of the demand.

    None of what its methods give is pinned.
    """

    def beyond(self, keep: int) -> Iterator[Candidate]:
        """Those of revisions beyond the `keep` newest of their stream."""

    def unused_since(self, at: float) -> Iterator[Candidate]:
        """Those that were not used since then (Unix seconds)."""

    def by_worth(self) -> Iterator[Candidate]:
        """All, the least valuable first."""


MOST_PLANNED = 1000


def plan_evictions(
    entries: Evictable, disk: DiskUsage, limits: Cache, now: float, *, need: int = 0, refused: int = 0
) -> list[Eviction]:
    """What to evict, in this order; at most some thousand. Limits of 0 on age and revisions are none.

    It looks at what it evicts, not at all entries. `need` is room that workers ask for on top, in bytes; more
    than `max_size` counts as none, since evicting everything would not help. `refused` bytes are freed
    however much is free: the disk refused a write, because of a quota or for lack of inodes.
    """
    plan: list[Eviction] = []
    spare: list[Eviction] = []
    for part in sorted(disk.parts, key=lambda part: part.modified_at):
        eviction = Eviction(part.id, "part", part.size_bytes, part)
        if not part.claimed:
            if limits.max_part_age and now - part.modified_at > limits.max_part_age:
                plan.append(eviction)
            elif part.size_bytes and not _is_whole(part):
                spare.append(eviction)
    due: dict[str, Eviction] = {}
    beyond = entries.beyond(limits.keep_revisions) if limits.keep_revisions else iter(())
    unused = entries.unused_since(now - limits.max_unused) if limits.max_unused else iter(())
    whys: tuple[tuple[Iterator[Candidate], Reason], ...] = ((beyond, "revision"), (unused, "unused"))
    for rows, reason in whys:
        for row in islice(rows, MOST_PLANNED):
            due.setdefault(row.key, Eviction(row.key, reason, row.length_bytes))
    plan += due.values()
    freed = sum(eviction.size_bytes for eviction in plan)
    need = need if need <= limits.max_size else 0
    too_big = disk.size_bytes + need - limits.max_size - freed
    too_little = max(limits.min_free + need - disk.free_bytes, refused) - freed
    of_entries = (Eviction(row.key, "size", row.length_bytes) for row in entries.by_worth())
    for eviction in chain(spare, of_entries):
        if (too_big <= 0 and too_little <= 0) or len(plan) >= MOST_PLANNED:
            break
        if eviction.key in due:
            continue
        free = too_big <= 0 and eviction.part is None
        plan.append(replace(eviction, reason="free") if free else eviction)
        too_big -= eviction.size_bytes
        too_little -= eviction.size_bytes
    return plan


def _is_whole(part: "Part") -> bool:
    state = part.state
    if state is None or state.head is None:
        return False
    return (part.generation, part.size_bytes) == (state.generation, state.head.length)
