"""Reconciling: compares the index with the store and corrects it, in the background."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from gup.cache.store import Seen, Store, Stored
from gup.content.key import ContentKey
from gup.control.dependencies import BusyError, ControlDependencies, change
from gup.control.entry_table import ROWS_AT_ONCE, row_of
from gup.control.index import Index
from gup.control.threads import to_its_end

_log = logging.getLogger("gup.control.index")
ORPHAN_AGE_SECONDS = 600.0
"""A younger body without a record may belong to a commit that is under way."""
_RESOLUTION_SECONDS = 0.001
_NICENESS = 10
"""Linux has it for each thread; the thread's place in the disk's queue follows from it."""


async def reconcile(dependencies: ControlDependencies, index: Index, now: float) -> None:
    """Walk through the store and correct the index, except for rows that changed meanwhile.

    A record is read only where the index does not have its file's mark. The walk has a thread of its own, of
    low priority: it may take its time, and clients have the right of way.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="gup-reconcile", initializer=_yield_to_others)

    try:
        with index.watch() as touched:
            orphans = await _compare(dependencies.store, index, touched, thread)
        index.complete = True
        await asyncio.get_running_loop().run_in_executor(thread, dependencies.store.prune)
    finally:
        await to_its_end(thread.shutdown)
    for orphan in orphans:
        if now - orphan.used_at > ORPHAN_AGE_SECONDS:
            try:
                await _settle_orphan(orphan, dependencies, index)
            except Exception:  # noqa: BLE001 - one entry must not keep the others from being looked at
                _log.exception("could not repair %s", orphan.key.text)


def _yield_to_others() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


async def _compare(store: Store, index: Index, touched: set[str], thread: ThreadPoolExecutor) -> list[Stored]:
    """Correct the index; the bodies whose record is missing or damaged."""
    loop, walk = asyncio.get_running_loop(), store.walk()
    found: set[int] = set()  # hashes of the keys: a tenth of the keys themselves
    orphans: list[Stored] = []
    gained = lost = 0
    while seen := await loop.run_in_executor(thread, lambda: list(islice(walk, ROWS_AT_ONCE))):
        unknown = [ContentKey.parse(one.key) for one in seen if not _is_known(one, index)]
        found.update(hash(one.key) for one in seen)
        if unknown:
            read = await loop.run_in_executor(thread, _read, store, unknown)
            orphans += (stored for stored in read if stored.record is None)
            gained += sum(_take(stored, index, touched) for stored in read if stored.record is not None)
            sound = {stored.key for stored in read if stored.record is not None}
            found.difference_update(hash(key.text) for key in unknown if key not in sound)
    async for rows in index.rows.every():
        for row in rows:
            if hash(row.key) not in found and row.key not in touched:
                index.discard(row.key)
                lost += 1
    if gained or lost:
        _log.info("the index gained %d entries and lost %d", gained, lost)
    return orphans


def _is_known(seen: Seen, index: Index) -> bool:
    """Whether the index has the row of these very files. It notes a time of use before the disk has it."""
    row = index.rows.get(seen.key)
    if row is None or not seen.mark or seen.used_at > row.used_at + _RESOLUTION_SECONDS:
        return False
    return (row.mark, row.length_bytes) == (seen.mark, seen.body_bytes)


def _read(store: Store, keys: Iterable[ContentKey]) -> list[Stored]:
    return [stored for key in keys if (stored := store.stored(key)) is not None]


def _take(stored: Stored, index: Index, touched: set[str]) -> bool:
    """Take over what was read, unless its row changed meanwhile; whether it is a new one."""
    known = index.rows.get(stored.key.text)
    row = row_of(stored, known)
    if stored.key.text in touched or row == known:
        return False
    index.put(row)
    return known is None


async def _settle_orphan(orphan: Stored, dependencies: ControlDependencies, index: Index) -> None:
    """Repair a body that has its record. Remove one without a record, or that no upstream has any more.

    Not while a fill holds its claim, or an interrupted commit waits.
    """
    key, store = orphan.key, dependencies.store
    recorded = orphan.size_bytes > 0 and await asyncio.to_thread(store.load_or_none, key) is not None
    if recorded:
        problem = await dependencies.mend(key, False)
        if problem is None:
            await index.read_again(key, store)
            return
        if problem.status not in (404, 410):
            return  # its sound chunks can be served, and the rest be fetched later
    with contextlib.suppress(BusyError):
        if await change(dependencies.claims, key, lambda: _remove_orphan(key, store), patience_seconds=0.0):
            if not recorded:
                dependencies.counters.add("gup_integrity_failures_total", where="record")
            _log.warning("removed a body without a usable record, or a record without its body: %s", key.text)


def _remove_orphan(key: ContentKey, store: Store) -> bool:
    """Remove what can't be served, under the claim; False when there is nothing, or it is sound by now."""
    record = store.load_or_none(key)
    if (record is not None and store.open_body(record) is not None) or store.state_path(key.id).exists():
        return False
    there = store.body_path(key).exists() or store.record_path(key).exists()
    store.remove(key)
    return there
