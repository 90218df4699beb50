"""Keeps the store within its limits: measures, lets `eviction` decide, removes. Never decides itself."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gup.cache.claim import Claims
from gup.cache.store import Part, Store
from gup.config import Cache
from gup.content.key import ContentKey
from gup.control.claiming import change, to_its_end
from gup.control.eviction import Eviction, Limits, plan_evictions
from gup.control.index import Index
from gup.control.rows import Row
from gup.errors import GupError
from gup.metrics import Counters

_log = logging.getLogger("gup.control.space")
_BATCH = 64
_REST_SECONDS = 0.05
_RECENT_SECONDS = 86400.0
_REST_FACTOR = 20
"""After a plan nobody waits for, so many times its duration pass: with 1e5 entries one takes some 0.3 s."""


@dataclass(frozen=True, slots=True)
class Disk:
    """What a look at the disk showed. `entries_bytes` is what the index held just before.

    Before, not after: a part that is committed meanwhile would be counted as part and as entry, and twice as
    much evicted. Counted as neither, it is made up for by the look that its event asks for.
    """

    parts: tuple[Part, ...]
    free_bytes: int
    entries_bytes: int

    @property
    def parts_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """Bodies and parts together."""
        return self.entries_bytes + self.parts_bytes

    @property
    def idle_parts_bytes(self) -> int:
        """Of parts that nobody fills: for the others their fills have promised the room already."""
        return sum(part.size_bytes for part in self.parts if not part.claimed)


class Space:
    """Runs evictions one at a time. `limits` (the `[cache]` settings) is replaced by a reload."""

    def __init__(  # noqa: PLR0913 - its collaborators
        self,
        store: Store,
        claims: Claims,
        counters: Counters,
        index: Index,
        limits: Cache,
        *,
        raise_store_epoch: Callable[[], None],
        set_store_bytes: Callable[[int], None],
        promised_bytes: Callable[[], int],
        now: Callable[[Iterable[float]], float],
        drop_memory: Callable[[ContentKey], int] = lambda _key: 0,
    ) -> None:
        """`now` gives the time by which things are too old, from all their last uses; Unix seconds."""
        self.limits = limits
        self._store = store
        self._claims = claims
        self._counters = counters
        self._index = index
        self._raise_store_epoch = raise_store_epoch
        self._set_store_bytes = set_store_bytes
        self._promised_bytes = promised_bytes
        self._now = now
        self._drop_memory = drop_memory
        self._running = asyncio.Lock()
        self._due = asyncio.Event()
        self._urgent = asyncio.Event()
        self._need_bytes = 0
        self._refused_bytes = 0
        self._stopped = False
        self._disk = Disk((), 0, 0)  # at the last look
        self.recent_evicted = 0
        """Entries evicted for space, since the start, that somebody had used within a day."""

    # --- being asked

    def look_soon(self) -> None:
        """Something was committed: look, at once when it is too much already."""
        self._due.set()
        if self._index.complete:
            self._set_store_bytes(self._index.total_bytes + self._disk.idle_parts_bytes)
        if self._index.total_bytes + self._disk.parts_bytes > self.limits.max_size:
            self._urgent.set()

    def need(self, size_bytes: int, *, refused: bool = False) -> None:
        """A worker wants so much room now; `refused`: the disk has none, whatever its figures say."""
        self._need_bytes += size_bytes
        if refused:
            self._refused_bytes = max(self._refused_bytes, size_bytes)
        self._due.set()
        self._urgent.set()

    async def stop(self) -> None:
        """Remove nothing more; returns when what is under way has ended."""
        self._stopped = True
        async with self._running:
            return

    async def keep(self, interval_seconds: float) -> None:
        """Look when asked, and every `interval_seconds` in any case; for a job that never ends."""
        while True:
            await _wait(self._due, interval_seconds)
            self._due.clear()
            self._urgent.clear()
            begun = time.monotonic()
            try:
                await self.evict()
            except OSError as error:
                _log.warning("eviction could not finish: %s", error)
            rest = max(_REST_SECONDS, _REST_FACTOR * (time.monotonic() - begun))
            await _wait(self._urgent, min(rest, interval_seconds))

    # --- looking and removing

    async def measure(self) -> Disk:
        """Look at the parts and the file system."""
        return await asyncio.to_thread(self._measure, self._index.total_bytes)

    def _measure(self, entries_bytes: int) -> Disk:
        figures = os.statvfs(self._store.root)
        free_bytes = figures.f_bavail * figures.f_frsize
        return Disk(tuple(self._store.parts(self._claims)), free_bytes, entries_bytes)

    async def evict(self) -> list[Eviction]:
        """Remove what has to go; what was really removed. Nothing before the index is complete."""
        async with self._running:
            if self._stopped or not self._index.complete:
                return []
            need, self._need_bytes = self._need_bytes, 0
            refused, self._refused_bytes = self._refused_bytes, 0
            rows = list(self._index.rows.values())  # before the measuring, see Disk
            disk = await self.measure()
            need = max(need, self._promised_bytes() - disk.parts_bytes + disk.idle_parts_bytes)
            plan = await self._plan(rows, disk, need, refused)
            done: list[Eviction] = []
            for at in range(0, len(plan), _BATCH):
                if self._stopped:
                    break
                done += await self._remove(plan[at : at + _BATCH])
            if done:
                disk = await self.measure()
            self._tell(disk)
            return done

    async def _plan(
        self, rows: Sequence[Row], disk: Disk, need_bytes: int, refused_bytes: int
    ) -> list[Eviction]:
        cache = self.limits
        limits = Limits(
            max_size_bytes=cache.max_size,
            min_free_bytes=cache.min_free,
            free_bytes=disk.free_bytes,
            max_unused_seconds=cache.max_unused,
            keep_revisions=cache.keep_revisions,
            max_part_age_seconds=cache.max_part_age,
            need_bytes=need_bytes,
            refused_bytes=refused_bytes,
        )

        def plan() -> list[Eviction]:
            return plan_evictions(rows, disk.parts, limits, self._now(row.used_at for row in rows))

        return await asyncio.to_thread(plan)

    async def _remove(self, plan: Sequence[Eviction]) -> list[Eviction]:
        """Remove those that nobody fills at this moment: the key's claim is held meanwhile.

        Claims are taken and given back on the loop only: two threads of one process would both get one.
        """
        ours: list[Eviction] = []
        try:
            for eviction in plan:
                if self._claims.try_claim(_offset(eviction)):
                    ours.append(eviction)  # noqa: PERF401 - what was claimed before an OSError is released
            done = await to_its_end(self._remove_all, ours)
        finally:
            for eviction in ours:
                self._claims.release(_offset(eviction))
        for eviction in done:
            if eviction.part is None:
                self._note_recent(eviction)
                self._index.discard(eviction.key)
            self._counters.add("gup_evictions_total", reason=eviction.reason)
            self._counters.add("gup_evicted_bytes_total", eviction.size_bytes, reason=eviction.reason)
        if done:
            self._raise_store_epoch()
            _log.info("evicted %d, %d bytes", len(done), sum(eviction.size_bytes for eviction in done))
        return done

    def _note_recent(self, eviction: Eviction) -> None:
        row = self._index.rows.get(eviction.key)
        if row is not None and row.hits and eviction.reason in ("size", "free"):
            self.recent_evicted += self._now((row.used_at,)) - row.used_at < _RECENT_SECONDS

    def _remove_all(self, plan: Sequence[Eviction]) -> list[Eviction]:
        done: list[Eviction] = []
        for eviction in plan:
            try:
                if eviction.part is None:
                    self._store.remove(ContentKey.parse(eviction.key))
                elif not self._remove_part(eviction.part):
                    continue
            except (GupError, OSError) as error:
                _log.warning("%s can't be evicted: %s", eviction.key, error)
            else:
                done.append(eviction)
        return done

    def _remove_part(self, part: Part) -> bool:
        """Remove a part if it is still as it was when the plan was made. The caller holds the key's claim."""
        store = self._store
        path = store.part_path(part.id, part.generation) if part.generation else store.state_path(part.id)
        try:
            if path.stat().st_mtime != part.modified_at:
                return False
        except FileNotFoundError:
            return False
        if part.generation and _is_of_another(part, store):
            store.drop_part(part.id, part.generation)
        else:
            store.remove_part(part)
        return True

    async def purge(self, key: ContentKey) -> int:
        """Remove an entry for the operator, even a pinned one, and what lies unfinished of it; bytes freed.

        Readers read on to the end. What a fill under way is about to store goes too, if it ends soon enough:
        BusyError when not.
        """
        freed = await change(self._claims, key, lambda: self._store.purge(key))
        freed += self._drop_memory(key)
        self._index.discard(key.text)
        self._raise_store_epoch()
        self._tell(await self.measure())
        return freed

    def _tell(self, disk: Disk) -> None:
        self._disk = disk
        if self._index.complete:
            self._set_store_bytes(self._index.total_bytes + disk.idle_parts_bytes)


def _is_of_another(part: Part, store: Store) -> bool:
    """Whether the state belongs to another generation of which there is a part."""
    try:
        state = store.load_state(part.id)
    except ValueError:
        return False
    if state is None or state.generation == part.generation:
        return False
    return store.part_path(part.id, state.generation).exists()


def _offset(eviction: Eviction) -> int:
    """The claim of the key that an eviction is about."""
    if eviction.part is not None:
        return int(eviction.part.id[:16], 16) >> 2
    return ContentKey.parse(eviction.key).claim_offset


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
