"""Integrity jobs: the scrubber in the background, and verification on command."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from gup.cache.integrity import Finding, check_entry, check_part, check_stray, contents, put_right
from gup.cache.records import Record
from gup.cache.store import OpenFile, read_aside, span_of
from gup.content.key import ContentKey
from gup.control.api import schemas
from gup.control.dependencies import BusyError, ControlDependencies, change
from gup.control.index import Index
from gup.control.threads import to_its_end
from gup.errors import Problem
from gup.jsonmodel import Count, Time

_log = logging.getLogger("gup.control.integrity")

_SCRUB_NOTE = "scrub"
_IDLE_SECONDS = 1.0
"""Between two checks whether a pass is due."""
_MOST_BEHIND_SECONDS = 1.0
"""A slow disk delays the scrubber; it reads faster afterwards to compensate this much at most."""


class Pass(BaseModel):
    """One pass over the store in the order of keys, stored with the index so that a restart continues it.

    `after` is the last key that was read. Only the scrubber changes it.
    """

    began_at: Time = 0.0
    ended_at: Time = 0.0
    after: str = ""
    checked: Count = 0
    checked_bytes: Count = 0
    damaged: Count = 0
    mended: Count = 0

    @property
    def running(self) -> bool:
        return self.began_at > self.ended_at


def read_pass(note: object) -> Pass:
    """A new pass when the stored one is malformed."""
    try:
        return Pass.model_validate(note)
    except ValueError:
        return Pass()


class Scrubber:
    """Compares all bodies with their sums at `cache.scrub_rate`, bypassing the page cache, and repairs
    damage.
    """

    def __init__(self, dependencies: ControlDependencies, index: Index, clock: Callable[[], float]) -> None:
        self._dependencies = dependencies
        self._index = index
        self._clock = clock
        self._pass = Pass()
        self._paid_until = 0.0

    def restore(self) -> None:
        """Continue the stored pass; after the index was opened."""
        self._pass = read_pass(self._index.notes.get(_SCRUB_NOTE))

    def save(self) -> None:
        self._index.notes[_SCRUB_NOTE] = self._pass.model_dump()

    def progress(self) -> schemas.Scrub:
        """The pass for `/api/v1/status`."""
        now, settings = self._pass, self._dependencies.settings().cache
        waits = not now.running and settings.scrub_rate and now.began_at
        return schemas.Scrub(
            running=now.running and settings.scrub_rate > 0,
            rate_bytes_per_second=settings.scrub_rate or None,
            began_at=now.began_at or None,
            ended_at=now.ended_at if not now.running and now.ended_at else None,
            next_at=now.began_at + settings.scrub_interval if waits else None,
            entries=len(self._index.rows),
            entries_bytes=self._index.rows.total_bytes,
            **now.model_dump(include={"checked", "checked_bytes", "damaged", "mended"}),
        )

    async def keep(self) -> None:
        while True:
            if self._due():
                if not self._pass.running:
                    self._pass = Pass(began_at=self._clock())
                await self._go_through()
            await asyncio.sleep(_IDLE_SECONDS)  # also where scrub_interval is 0

    def _due(self) -> bool:
        settings = self._dependencies.settings().cache
        if not self._index.complete or settings.scrub_rate <= 0:
            return False
        # A clock set back must not put the next pass off for years.
        return self._pass.running or not 0 <= self._clock() - self._pass.began_at < settings.scrub_interval

    async def _go_through(self) -> None:
        """Read the bodies that this pass has not read, while scrubbing is on."""
        self._paid_until, now = time.monotonic(), self._pass
        while rows := self._index.rows.page("key", 1, after=(0, now.after)):
            if self._dependencies.settings().cache.scrub_rate <= 0:
                return
            try:
                await self._scrub(ContentKey.parse(rows[0].key))
            except Exception:  # noqa: BLE001 - one entry must not stop the pass over all
                _log.exception("%s could not be scrubbed", rows[0].key)
            now.after = rows[0].key
            now.checked += 1
            self.save()
        now.ended_at = max(self._clock(), now.began_at)
        self.save()
        text = "read %d bodies, %d bytes: %d damaged, %d repaired"
        _log.info(text, now.checked, now.checked_bytes, now.damaged, now.mended)

    async def _scrub(self, key: ContentKey) -> None:
        opened = await asyncio.to_thread(self._open, key)
        if opened is None:
            await self._look_at_odd(key)
            return
        record, file = opened
        for chunk in range(len(record.sums)):
            length = span_of(record, chunk)[1]
            await self._pay(length)
            sound = await asyncio.to_thread(read_aside, file.fd, record, chunk)
            self._pass.checked_bytes += length
            if not sound:
                if os.fstat(file.fd).st_nlink:  # else another body has replaced it
                    await self._damaged(key, f"chunk {chunk} does not agree with its sum")
                return

    def _open(self, key: ContentKey) -> tuple[Record, OpenFile] | None:
        store = self._dependencies.store
        record = store.load_or_none(key)
        file = store.open_body(record) if record is not None else None
        return (record, file) if record is not None and file is not None else None

    async def _look_at_odd(self, key: ContentKey) -> None:
        """Check under the claim whether the entry is damaged, or was just removed or replaced."""
        check = partial(check_entry, self._dependencies.store, key)
        try:
            found = await change(self._dependencies.claims, key, check, patience_seconds=0.0)
        except BusyError:
            return
        for finding in found:
            if finding.where == "body":  # a damaged record is found and counted by its next user
                await self._damaged(key, finding.detail)

    async def _damaged(self, key: ContentKey, detail: str) -> None:
        self._pass.damaged += 1
        self._dependencies.counters.add("gup_integrity_failures_total", where="body")
        _log.warning("damaged body of %s: %s", key.text, detail)
        problem = await _mend(key, self._dependencies, self._index)
        if problem is None:
            self._pass.mended += 1
        else:
            _log.warning("%s could not be repaired: %s", key.text, problem.detail)

    async def _pay(self, amount_bytes: int) -> None:
        """Wait until the rate permits reading this much."""
        now, rate = time.monotonic(), self._dependencies.settings().cache.scrub_rate
        self._paid_until = max(self._paid_until, now - _MOST_BEHIND_SECONDS)
        if rate:
            self._paid_until += amount_bytes / rate
        await asyncio.sleep(max(0.0, self._paid_until - now))


async def _mend(key: ContentKey, dependencies: ControlDependencies, index: Index) -> Problem | None:
    problem = await dependencies.mend(key, True)
    if problem is None:
        await index.read_again(key, dependencies.store)
    return problem


_GRACE_SECONDS = 60.0
"""A younger stray file may still be written."""
_PATIENCE_SECONDS = 10.0
"""Time limit at the end for the claims of entries that look damaged."""
_PAUSE_SECONDS = 0.2
_MOST_FINDINGS = 10_000
_Check = Callable[[], list[Finding]]
_NEVER = schemas.Verification(
    running=False, repair=False, began_at=None, ended_at=None, failed=None, found=[],
    checked=0, total=0, busy=0, damaged=0, mended=0,
)  # fmt: skip


class Verification:
    """Verification of everything in the cache directory, at most one at a time; keeps the last result."""

    def __init__(self, dependencies: ControlDependencies, index: Index) -> None:
        self._dependencies = dependencies
        self._index = index
        self._store = dependencies.store
        self._task: asyncio.Task[None] | None = None
        self._result = _NEVER

    def start(self, *, repair: bool) -> bool:
        """False when one is running."""
        if self._result.running:
            return False
        begun = {"running": True, "repair": repair, "began_at": time.time(), "found": []}
        self._result = _NEVER.model_copy(update=begun)
        self._task = asyncio.create_task(self._run(), name="control verify")
        return True

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def progress(self) -> schemas.Verification:
        return self._result.model_copy(update={"found": list(self._result.found)})

    async def _run(self) -> None:
        result = self._result
        try:
            await self._look()
        except asyncio.CancelledError:
            result.failed = "the service stopped"
            raise
        except Exception as error:  # noqa: BLE001 - whoever asked must be told
            result.failed = str(error) or type(error).__name__
            _log.exception("the verification ended early")
        finally:
            result.running, result.ended_at = False, time.time()

    async def _look(self) -> None:
        store, result = self._store, self._result
        names = await asyncio.to_thread(contents, store, _GRACE_SECONDS)
        result.total = len(names.keys) + len(names.ids) + len(names.strays)
        claimed = [key for key in names.keys if not await self._is_checked(key)]
        for id_ in names.ids:
            check, path = partial(check_part, store, id_), store.state_path(id_)
            result.busy += not await self._check(check, "state", path, id_)
            result.checked += 1
        for path in names.strays:
            await self._check(partial(check_stray, store, path), "stray", path)
            result.checked += 1
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        while claimed and time.monotonic() < give_up_at:
            await asyncio.sleep(_PAUSE_SECONDS)
            claimed = [key for key in claimed if not await self._is_checked(key)]
        result.checked += len(claimed)
        result.busy += len(claimed)

    async def _is_checked(self, key: ContentKey) -> bool:
        """Check an entry; False when it looks damaged while its claim is held."""
        check, path = partial(check_entry, self._store, key), self._store.body_path(key)
        checked = await self._check(check, "body", path, key.id, key)
        self._result.checked += checked
        return checked

    async def _check(
        self, check: _Check, where: str, path: Path, id_: str | None = None, key: ContentKey | None = None
    ) -> bool:
        """Check and note findings; False when the claim is held: a commit in progress looks like damage. An
        entry is read without its claim first. An exception becomes a finding.
        """
        store, repair = self._store, self._result.repair
        try:
            if key is not None and not await asyncio.to_thread(check):
                return True
            with store.claimed(id_) if id_ is not None else contextlib.nullcontext(True) as ours:
                if not ours:
                    return False
                found = await to_its_end(check)
                for finding in found if repair else ():
                    if finding.where != "body":  # bodies are repaired by a fill, which takes the claim itself
                        await to_its_end(put_right, store, finding, alone=False)
                    if finding.where == "record" and finding.key is not None:
                        self._index.discard(finding.key.text)
                        self._dependencies.raise_store_epoch()
            for finding in found:
                problem = None
                if repair and finding.where == "body" and key is not None:
                    problem = await _mend(key, self._dependencies, self._index)
                why_not = problem.detail if problem is not None else None
                self._note(finding, problem is None if repair else None, why_not)
        except Exception as error:  # noqa: BLE001 - the other files are looked at all the same
            detail = f"it can't be checked: {error or type(error).__name__}"
            finding = Finding(where, str(path.relative_to(store.root)), detail, key)
            self._note(finding, False if self._result.repair else None, str(error) or None)
        return True

    def _note(self, finding: Finding, mended: bool | None, why_not: str | None = None) -> None:
        result = self._result
        _log.warning("%s: %s", finding.path, finding.detail)
        if finding.where != "stray":
            self._dependencies.counters.add("gup_integrity_failures_total", where=finding.where)
        result.damaged += 1
        result.mended += bool(mended)
        if len(result.found) < _MOST_FINDINGS:
            key = finding.key.text if finding.key else None
            shown = {"where": finding.where, "path": finding.path, "key": key, "detail": finding.detail}
            result.found.append(
                schemas.Finding.model_validate(shown | {"mended": mended, "why_not": why_not})
            )
