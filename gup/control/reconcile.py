"""Changes to stored entries under their claim, and making the index agree with the disk."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from gup.cache.locks import Claims
from gup.cache.store import Store, Stored
from gup.content.key import ContentKey
from gup.control.index import ROWS_AT_ONCE, Index, Row, row_of
from gup.errors import GupError, Problem
from gup.metrics import Counters

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
    claims: Claims,
    key: ContentKey,
    work: Callable[[], _Result],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
) -> _Result:
    """Run `work` in a thread, holding the key's claim.

    BusyError when somebody else holds it for longer than `patience_seconds`.
    """
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


_log = logging.getLogger("gup.control.reconcile")
ORPHAN_AGE_SECONDS = 600.0
"""A younger body without a record may belong to a commit that is under way."""


@dataclass(frozen=True, slots=True)
class Differences:
    """What has to change in the index, and the bodies whose record is missing or damaged."""

    put: tuple[Row, ...]
    gone: tuple[str, ...]
    orphans: tuple[Stored, ...]


def differences(found: list[Stored], rows: Mapping[str, Row]) -> Differences:
    """Compare what a scan found with the rows of the index."""
    put: list[Row] = []
    orphans: list[Stored] = []
    seen: set[str] = set()
    for stored in found:
        if stored.record is None:
            orphans.append(stored)
            continue
        key = stored.key.text
        seen.add(key)
        known = rows.get(key)
        row = row_of(stored, known)
        if row != known:
            put.append(row)
    return Differences(tuple(put), tuple(key for key in rows if key not in seen), tuple(orphans))


Mend = Callable[[ContentKey, bool], Awaitable[Problem | None]]
"""See ControlDependencies."""


async def reconcile(
    index: Index, store: Store, claims: Claims, counters: Counters, mend: Mend, now: float
) -> None:
    """Scan the store and correct the index, except for rows that changed during the scan."""
    known = dict(index.rows)
    with index.watch() as touched:
        found = await asyncio.to_thread(lambda: differences(list(store.scan()), known))
        for number, row in enumerate(found.put, 1):
            if row.key not in touched:
                index.put(row)
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
        for key in found.gone:
            if key not in touched:
                index.discard(key)
    index.complete = True
    if found.put or found.gone:
        _log.info("the index took over %d entries and dropped %d", len(found.put), len(found.gone))
    await asyncio.to_thread(store.prune)
    for orphan in found.orphans:
        if now - orphan.used_at > ORPHAN_AGE_SECONDS:
            try:
                await _settle_orphan(orphan, index, store, claims, counters, mend)
            except Exception:  # noqa: BLE001 - one entry must not keep the others from being looked at
                _log.exception("could not repair %s", orphan.key.text)


async def _settle_orphan(
    orphan: Stored, index: Index, store: Store, claims: Claims, counters: Counters, mend: Mend
) -> None:
    """Mend a body that has its record. Remove one without a record, or that no upstream has any more."""
    recorded = orphan.size_bytes > 0 and await asyncio.to_thread(_has_record, orphan.key, store)
    if recorded:
        problem = await mend(orphan.key, False)
        if problem is None:
            await index_again(orphan.key, index, store)
            return
        if problem.status not in (404, 410):
            return  # what is sound of it can be served, and the rest be had later
    await _remove_orphan(orphan, store, claims, counters, counted=recorded)


async def index_again(key: ContentKey, index: Index, store: Store) -> None:
    """Put an entry that was mended or imported into the index."""
    stored = await asyncio.to_thread(store.stored, key)
    if stored is not None and stored.record is not None:
        index.put(row_of(stored, index.rows.get(key.text)))


def _has_record(key: ContentKey, store: Store) -> bool:
    try:
        return store.load(key) is not None
    except ValueError:
        return False


async def _remove_orphan(
    orphan: Stored, store: Store, claims: Claims, counters: Counters, *, counted: bool
) -> None:
    """Remove a body that can't be served, unless a fill holds its claim or an interrupted commit waits."""
    offset = orphan.key.claim_offset
    if not claims.try_claim(offset):
        return
    try:
        if await to_its_end(_remove_if_still_orphan, orphan, store):
            if not counted:
                counters.add("gup_integrity_failures_total", where="record")
            _log.warning(
                "removed a body without a usable record, or a record without its body: %s", orphan.key.text
            )
    finally:
        claims.release(offset)


def _remove_if_still_orphan(orphan: Stored, store: Store) -> bool:
    try:
        record = store.load(orphan.key)
    except ValueError:
        record = None
    if record is not None and store.open_body(record) is not None:
        return False
    if store.state_path(orphan.key.id).exists():
        return False
    there = store.body_path(orphan.key).exists() or store.record_path(orphan.key).exists()
    store.remove(orphan.key)
    return there
