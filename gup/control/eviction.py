"""Eviction: keeps the store within its limits."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import aiofiles.os

from gup.cache.purges import (
    FILE,
    Purge,
    Selection,
    add_purge,
    keep_purges,
    read_purges,
)
from gup.cache.store import Part, Store
from gup.cluster.orders import KEPT_SECONDS
from gup.config import Cache
from gup.content.key import ContentKey
from gup.control.dependencies import (
    PATIENCE_SECONDS,
    BusyError,
    ControlDependencies,
    change,
)
from gup.control.eviction_plan import MOST_PLANNED, DiskUsage, Eviction, plan_evictions
from gup.control.index import Index
from gup.control.threads import to_its_end
from gup.errors import GupError
from gup.units import format_size

_log = logging.getLogger("gup.control.eviction")

_BATCH = 64
_REST_SECONDS = 0.5
"""Pause after a run, unless the store is too large or a worker asks for room."""
_RECENT_SECONDS = 86400.0
_COMMITS_SECONDS = 60.0
"""A commit that had begun at a purge is known by then."""


class Evictor:
    """Keeps the store within its limits, one eviction run at a time."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        index: Index,
        now: Callable[[], float],
        on_removed: Callable[[str, str], None] = lambda _key, _why: None,
    ) -> None:
        """`now` returns the time (Unix seconds) that ages are measured from. `on_removed` is told each
        entry's key, and why it was removed.
        """
        self._dependencies = dependencies
        self._store = dependencies.store
        self._claims = dependencies.claims
        self._index = index
        self._now = now
        self._on_removed = on_removed
        self._running = asyncio.Lock()
        self._due = asyncio.Event()
        self._urgent = asyncio.Event()
        self._need_bytes = 0
        self._refused_bytes = 0
        self._stopped = False
        self._disk = DiskUsage((), 0, 0)  # as last measured
        self._noting = asyncio.Lock()
        self.unconfirmed: tuple[str, ...] = ()
        """Members of the cluster that have not confirmed the last purge."""
        self._purged_at = 0.0
        """Unix seconds of the last purge."""
        self._left: set[ContentKey] = set()
        """Purged, but their claim was taken."""
        self.recent_evicted = 0
        """Entries evicted for space since the start that had been used within a day."""

    def look_soon(self) -> None:
        """Something was committed: check the limits soon, at once when they are exceeded."""
        self._due.set()
        self._tell(self._disk)
        held_bytes = self._index.rows.total_bytes + self._disk.parts_bytes
        if held_bytes > self._dependencies.settings().cache.max_size:
            self._urgent.set()

    def need(self, size_bytes: int, *, refused: bool = False) -> None:
        """A worker needs this much room now. `refused`: the disk refused a write, whatever statvfs says."""
        self._need_bytes += size_bytes
        if refused:
            self._refused_bytes = max(self._refused_bytes, size_bytes)
        self._due.set()
        self._urgent.set()

    async def stop(self) -> None:
        """Return when the present run has ended; nothing more is evicted."""
        self._stopped = True
        async with self._running:
            return

    async def keep(self, interval_seconds: float) -> None:
        """Evict when asked to, and every `interval_seconds` in any case; never returns."""
        while True:
            await _wait(self._due, interval_seconds)
            self._due.clear()
            self._urgent.clear()
            try:
                await self.evict()
            except OSError as error:
                _log.warning("eviction could not finish: %s", error)
            await _wait(self._urgent, min(_REST_SECONDS, interval_seconds))

    async def measure(self) -> DiskUsage:
        entries_bytes = self._index.rows.total_bytes
        figures = await aiofiles.os.statvfs(self._store.root)
        parts = await asyncio.to_thread(self._store.parts)
        return DiskUsage(tuple(parts), figures.f_bavail * figures.f_frsize, entries_bytes)

    async def evict(self) -> list[Eviction]:
        """Evict what exceeds the limits; return what was removed. Nothing before the index is complete."""
        async with self._running:
            if self._stopped or not self._index.complete:
                return []
            need, self._need_bytes = self._need_bytes, 0
            refused, self._refused_bytes = self._refused_bytes, 0
            disk, done = await self.measure(), list[Eviction]()
            while True:
                promised = self._dependencies.promised_bytes() - disk.parts_bytes + disk.idle_parts_bytes
                room = {"need": max(need, promised), "refused": refused}
                plan = plan_evictions(
                    self._index.rows, disk, self._dependencies.settings().cache, self._now(), **room
                )
                removed: list[Eviction] = []
                for at in range(0, len(plan), _BATCH):
                    if not self._stopped:
                        removed += await self._remove(plan[at : at + _BATCH])
                done += removed
                refused -= sum(eviction.size_bytes for eviction in removed)
                disk = await self.measure() if removed else disk
                if len(plan) < MOST_PLANNED or not removed:
                    break
            self._tell(disk)
            return done

    async def _remove(self, plan: Sequence[Eviction]) -> list[Eviction]:
        """Remove those whose key is unclaimed, holding the claim meanwhile.

        Claims are taken and released on the event loop only: two threads of a process would both get one.
        """
        with contextlib.ExitStack() as claims:
            removable = [one for one in plan if claims.enter_context(self._store.claimed(one.id))]
            done = await to_its_end(self._remove_all, removable)
        counters = self._dependencies.counters
        for eviction in done:
            if eviction.part is None:
                row = self._index.rows.get(eviction.key)
                if row is not None and row.hits and eviction.reason in ("size", "free"):
                    self.recent_evicted += self._now() - row.used_at < _RECENT_SECONDS
                self._index.discard(eviction.key)
                self._on_removed(eviction.key, f"evicted ({eviction.reason})")
            counters.add("gup_evictions_total", reason=eviction.reason)
            counters.add("gup_evicted_bytes_total", eviction.size_bytes, reason=eviction.reason)
        if done:
            self._dependencies.raise_store_epoch()
            freed = sum(eviction.size_bytes for eviction in done)
            _log.info("evicted %d entries and parts, %d bytes", len(done), freed)
        return done

    def _remove_all(self, plan: Sequence[Eviction]) -> list[Eviction]:
        done: list[Eviction] = []
        for eviction in plan:
            try:
                if eviction.part is None:
                    self._store.remove(ContentKey.parse(eviction.key))
                elif not remove_part(self._store, eviction.part):
                    continue
                done.append(eviction)
            except (GupError, OSError) as error:
                _log.warning("can't evict %s: %s", eviction.key, error)
        return done

    # --- purges

    async def purge(self, key: ContentKey) -> int:
        """Remove an entry, pinned or not, and its parts for an operator; the bytes freed. Open readers
        continue.

        From now on nothing is served of this key that was fetched before. Waits a little for a fill in
        progress to free the claim; after that the files are removed as soon as it is free.
        """
        noted = await self._note(Selection(key=key.text), [key])
        freed = noted + await self._remove_purged(key, PATIENCE_SECONDS)
        await self._purged()
        return freed

    async def purge_all(self, keys: Sequence[ContentKey], selection: Selection | None) -> tuple[int, int]:
        """How many were purged, and the bytes freed.

        With `selection` nothing that it selects is served any more that was fetched before; files whose claim
        is taken go later. Without, or where uses matter, only what is stored is removed, and what is claimed
        is left.
        """
        freed, self.unconfirmed = 0, ()
        if selection is not None:
            freed += await self._note(selection, keys)
        busy, lasts = 0, selection is not None and selection.unused_since is None
        try:
            for number, key in enumerate(keys, 1):
                removed = await (self._remove_purged(key, 0.0) if lasts else self._remove_stored(key))
                freed, busy = freed + (removed or 0), busy + (removed is None)
                if number % _BATCH == 0:
                    self._dependencies.raise_store_epoch()
            if lasts:
                freed += await self._remove_parts()
            if selection is not None and lasts and selection.fetched_before is not None:
                await self.apply(selection)  # copies that were stored later
        finally:
            await self._purged()
        return len(keys) - busy, freed

    async def _note(self, selection: Selection, keys: Sequence[ContentKey]) -> int:
        """Note a purge on disk, then in all processes. On a full disk what it selects makes room first: the
        bytes freed by that.
        """
        freed = 0
        async with self._noting:
            self._purged_at = time.time()
            try:
                await self._write(selection)
            except OSError:
                for key in keys:
                    with contextlib.suppress(BusyError):
                        freed += await change(self._claims, key, partial(self._store.purge, key), 0.0)
                await self._write(selection)
        return freed

    async def _write(self, selection: Selection) -> None:
        book, wall = self._dependencies.book, time.time()
        if book is not None:
            self.unconfirmed = await book.issue("purge", selection.given())
            return
        purges, _ = await asyncio.to_thread(read_purges, self._store.run / FILE)
        last = max((purge.number for purge in purges), default=0)
        await to_its_end(add_purge, self._store.run, Purge(max(last + 1, int(wall * 1000)), wall, selection))
        self._dependencies.share_purges()

    async def apply(self, selection: Selection) -> None:
        """Another node has ordered a purge, which is noted already: remove what it selects here."""
        self._purged_at = time.time()
        unused, before = selection.unused_since, selection.fetched_before
        async for rows in self._index.rows.every(selection.stream):
            for row in rows:
                key = ContentKey.parse(row.key)
                if not selection.selects(key, row.kind, pinned=row.pinned):
                    continue
                if unused is None:
                    await self._remove_purged(key, 0.0)
                elif row.used_at < unused and (before is None or row.stored_at < before):
                    await self._remove_stored(key)
        await self._remove_parts()
        await self._purged()

    async def _remove_stored(self, key: ContentKey) -> int | None:
        """Remove what is stored of a key; the bytes freed, None when its claim is taken."""
        try:
            freed = await change(self._claims, key, partial(self._store.purge, key), 0.0)
        except BusyError:
            return None
        self._forget(key)
        return freed

    async def _remove_purged(self, key: ContentKey, patience_seconds: float) -> int:
        """Remove what a purge names; the bytes freed. Tried again later when the claim is taken."""
        try:
            freed = await change(self._claims, key, lambda: self._remove_named(key), patience_seconds)
        except BusyError:
            self._left.add(key)
            return 0
        self._left.discard(key)
        if freed is None:
            return 0
        self._forget(key)
        return freed + self._dependencies.drop_memory(key)

    def _remove_named(self, key: ContentKey) -> int | None:
        """Bytes freed; None when the entry was fetched after the purge. Blocks; the claim is held."""
        store, name_head = self._store, self._dependencies.purges.name_head
        record, state = store.load_or_none(key), None
        with contextlib.suppress(ValueError):
            state = store.load_state(key.id)
        if record is not None and not name_head(key, record.kind, record, pinned=record.pinned):
            return None
        if state is None or state.head is None:
            return store.purge(key)
        if name_head(key, state.kind, state.head, pinned=state.pinned):
            return store.purge(key)
        return store.remove(key)

    async def _remove_parts(self) -> int:
        """Remove the parts that a purge names; those of fills under way are removed by their leaders."""
        freed = 0
        for part in await asyncio.to_thread(self._store.parts):
            state = part.state
            if state is None or state.head is None:
                continue
            if self._dependencies.purges.name_head(state.key, state.kind, state.head, pinned=state.pinned):
                freed += await self._remove_purged(state.key, 0.0)
        return freed

    async def remove_left(self) -> None:
        """Remove what was purged while its claim was taken; to be called once a second."""
        for key in list(self._left):
            if await self._remove_purged(key, 0.0):
                self._dependencies.raise_store_epoch()

    def note_committed(self, key: ContentKey) -> None:
        """A commit may have been under way when a purge named it."""
        if abs(time.time() - self._purged_at) < _COMMITS_SECONDS:
            self._left.add(key)

    async def purge_again(self) -> None:
        """At the start: remove what was purged before, if an earlier controller died before it could."""
        run = self._store.run
        purges, _ = await asyncio.to_thread(read_purges, run / FILE)
        kept = [purge for purge in purges if time.time() - purge.at < KEPT_SECONDS]
        if len(kept) < len(purges) and self._dependencies.cluster is None:
            await asyncio.to_thread(keep_purges, run, kept)
        if not kept:
            return
        self._dependencies.share_purges()
        latest = kept[-1].at + _COMMITS_SECONDS
        async for rows in self._index.rows.every():
            for row in rows:
                key = ContentKey.parse(row.key)
                if row.stored_at <= latest and self._dependencies.purges.name(key, row.kind, ""):
                    self._left.add(key)
        await self._remove_parts()

    def _forget(self, key: ContentKey) -> None:
        self._index.discard(key.text)
        self._on_removed(key.text, "purged by an operator")

    async def _purged(self) -> None:
        self._dependencies.raise_store_epoch()
        self._tell(await self.measure())

    def _tell(self, disk: DiskUsage) -> None:
        self._disk = disk
        if self._index.complete:
            self._dependencies.set_store_bytes(self._index.rows.total_bytes + disk.idle_parts_bytes)


def remove_part(store: Store, part: Part) -> bool:
    """Remove a part unless it changed since the plan was made. The caller holds the key's claim."""
    path = store.part_path(part.id, part.generation) if part.generation else store.state_path(part.id)
    try:
        if path.stat().st_mtime != part.modified_at:
            return False
    except FileNotFoundError:
        return False
    state = None
    with contextlib.suppress(ValueError):
        state = store.load_state(part.id)
    described = state.generation if state is not None else part.generation
    of_another = part.generation not in (0, described) and store.part_path(part.id, described).exists()
    if part.generation:
        store.drop_part(part.id, part.generation)
    if not of_another:
        store.drop_state(part.id)
    return True


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may swallow a cancellation
            await event.wait()


JUMP_SECONDS = 3600.0
"""A wall clock that gains or loses this much on the time since boot was set."""
GAP_SECONDS = 7 * 86400.0
"""At the start: if nothing was used for this long, the clock may be wrong."""
BELIEVED_AFTER_SECONDS = 86400.0


def boot_clock() -> float:
    """Seconds since boot, suspension included; this clock can't be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class AgeClock:
    """The time that ages are measured from: the wall clock, but a jump ahead counts only after a day.

    Otherwise a clock that is a year ahead for an hour would make everything unused for longer than
    `cache.max_unused` and empty the store. A jump back is followed at once: it makes everything younger.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = boot_clock
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._made_at = wall()
        self._offset = self._made_at - steady()  # to be added to the time since boot
        self._begun = False
        self._doubted_since: float | None = None

    def begin(self, last_use_before: Callable[[float], float | None]) -> None:
        """At the first call: start from the last use of all that is stored, which shows the earlier time."""
        if self._begun:
            return
        self._begun = True
        last = last_use_before(self._made_at)
        if last is not None and self._made_at - last > GAP_SECONDS:
            self._offset = last - self._steady()

    def __call__(self) -> float:
        steady, wall = self._steady(), self._wall()
        ahead, since = wall - steady - self._offset, self._doubted_since
        if ahead <= JUMP_SECONDS or (since is not None and steady - since >= BELIEVED_AFTER_SECONDS):
            self._offset, self._doubted_since = wall - steady, None
        elif since is None:
            self._doubted_since = steady
            _log.warning("the clock jumped %.0f s ahead: for a day ages are measured as if it had not", ahead)
        return steady + self._offset


def no_room(length_bytes: int, held_bytes: int, free_bytes: int, limits: Cache) -> str:
    """Why a body of this size can't be imported, "" when it can: an import evicts nothing."""
    if held_bytes + length_bytes > limits.max_size:
        limit = format_size(limits.max_size)
        return f"cache.max_size ({limit}) would be exceeded, and an import evicts nothing"
    if free_bytes - length_bytes < limits.min_free:
        return f"the disk would have less than cache.min_free ({format_size(limits.min_free)}) left"
    return ""
