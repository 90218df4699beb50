"""Changes to stored entries under their claim, and making the index agree with the disk."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from gup.cache.locks import Claims
from gup.cache.records import Record
from gup.cache.store import Store, Stored
from gup.content.key import ContentKey
from gup.control.dependencies import ControlDependencies
from gup.control.index import ROWS_AT_ONCE, Index, Row, row_of
from gup.errors import GupError

_log = logging.getLogger("gup.control.reconcile")
PATIENCE_SECONDS = 5.0
"""How long an operator's command waits for a fill of the same key."""
_POLL_SECONDS = 0.01
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class BusyError(GupError):
    """The entry can't be changed now: another process fills, revalidates or mends it."""

    def __init__(self, key: ContentKey) -> None:
        super().__init__(
            f"{key.text} is being fetched or checked at this moment, so nothing was changed: "
            "try again when that has ended"
        )


async def change(
    claims: Claims, key: ContentKey, work: Callable[[], _Result], patience_seconds: float = PATIENCE_SECONDS
) -> _Result:
    """Run `work` in a thread, holding the key's claim; BusyError when another holds it for too long."""
    give_up_at = time.monotonic() + patience_seconds
    while not claims.try_claim(key.claim_offset):
        if time.monotonic() >= give_up_at:
            raise BusyError(key)
        await asyncio.sleep(_POLL_SECONDS)
    try:
        return await to_its_end(work)
    finally:
        claims.release(key.claim_offset)


async def to_its_end(
    work: Callable[_Given, _Result], *arguments: _Given.args, **named: _Given.kwargs
) -> _Result:
    """Run `work` in a thread; a cancelled caller waits until the thread has ended.

    A thread can't be stopped: otherwise the caller would release its claim while the work goes on.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


ORPHAN_AGE_SECONDS = 600.0
"""A younger body without a record may belong to a commit that is under way."""


def _scan(store: Store, known: Mapping[str, Row]) -> tuple[list[Stored], set[str], list[Stored]]:
    """What is not as in `known`, the keys found, and the bodies whose record is missing or damaged."""
    changed, keys, orphans = [], set(), []
    for stored in store.scan():
        if stored.record is None:
            orphans.append(stored)
            continue
        keys.add(key := stored.key.text)
        if row_of(stored, known.get(key)) != known.get(key):
            changed.append(stored)
    return changed, keys, orphans


async def reconcile(dependencies: ControlDependencies, index: Index, now: float) -> None:
    """Scan the store and correct the index, except for rows that changed during the scan."""
    store, known = dependencies.store, dict(index.rows)
    with index.watch() as touched:
        changed, keys, orphans = await asyncio.to_thread(_scan, store, known)
        for number, stored in enumerate(changed, 1):
            if stored.key.text not in touched:
                index.put(row_of(stored, index.rows.get(stored.key.text)))
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
        gone = known.keys() - keys
        for key in gone - touched:
            index.discard(key)
    index.complete = True
    if changed or gone:
        _log.info("the index took over %d entries and dropped %d", len(changed), len(gone))
    await asyncio.to_thread(store.prune)
    for orphan in orphans:
        if now - orphan.used_at > ORPHAN_AGE_SECONDS:
            try:
                await _settle_orphan(orphan, dependencies, index)
            except Exception:  # noqa: BLE001 - one entry must not keep the others from being looked at
                _log.exception("could not repair %s", orphan.key.text)


async def index_again(key: ContentKey, index: Index, store: Store) -> None:
    """Put an entry that was mended or imported into the index."""
    stored = await asyncio.to_thread(store.stored, key)
    if stored is not None and stored.record is not None:
        index.put(row_of(stored, index.rows.get(key.text)))


async def _settle_orphan(orphan: Stored, dependencies: ControlDependencies, index: Index) -> None:
    """Mend a body that has its record. Remove one without a record, or that no upstream has any more.

    Not while a fill holds its claim, or an interrupted commit waits.
    """
    key, store = orphan.key, dependencies.store
    recorded = orphan.size_bytes > 0 and await asyncio.to_thread(_record, key, store) is not None
    if recorded:
        problem = await dependencies.mend(key, False)
        if problem is None:
            await index_again(key, index, store)
            return
        if problem.status not in (404, 410):
            return  # what is sound of it can be served, and the rest be had later
    with contextlib.suppress(BusyError):
        if await change(dependencies.claims, key, lambda: _remove_orphan(key, store), patience_seconds=0.0):
            if not recorded:
                dependencies.counters.add("gup_integrity_failures_total", where="record")
            _log.warning("removed a body without a usable record, or a record without its body: %s", key.text)


def _record(key: ContentKey, store: Store) -> Record | None:
    try:
        return store.load(key)
    except ValueError:
        return None


def _remove_orphan(key: ContentKey, store: Store) -> bool:
    """Remove what can't be served, under the claim; False when there is nothing, or it can be by now."""
    record = _record(key, store)
    if (record is not None and store.open_body(record) is not None) or store.state_path(key.id).exists():
        return False
    there = store.body_path(key).exists() or store.record_path(key).exists()
    store.remove(key)
    return there
