"""One look at everything in the cache directory, asked for by the operator; the service goes on meanwhile."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gup.cache.audit import Finding, check_entry, check_part, check_stray, contents, put_right
from gup.cache.store import Store
from gup.content.key import ContentKey
from gup.control.claiming import to_its_end
from gup.control.index import Index
from gup.control.reconcile import index_again
from gup.control.surroundings import Surroundings

_log = logging.getLogger("gup.control.verify")
_GRACE_SECONDS = 60.0
"""A stray file younger than this may be one that is just being made."""
_PATIENCE_SECONDS = 10.0
"""How long the end of other work on damaged entries is waited for, when all else has been looked at."""
_PAUSE_SECONDS = 0.2
_MOST_FINDINGS = 10_000


@dataclass(frozen=True, slots=True)
class Found:
    """A finding, and what became of it: `mended` None when that was not asked for."""

    finding: Finding
    mended: bool | None = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        finding = self.finding
        return {
            "where": finding.where,
            "path": finding.path,
            "key": finding.key.text if finding.key else None,
            "detail": finding.detail,
            "mended": self.mended,
            "why_not": self.why or None,
        }


class Verification:
    """At most one at a time. Its last result stays to be read until the next begins."""

    def __init__(self, around: Surroundings, index: Index) -> None:
        self._around = around
        self._index = index
        self._store: Store = around.store
        self._claims = around.claims
        self._task: asyncio.Task[None] | None = None
        self._repair = False
        self._found: list[Found] = []
        self._damaged = self._mended = 0
        self._checked = self._total = self._busy = 0
        self._began_at: float | None = None
        self._ended_at: float | None = None
        self._failed = ""

    def start(self, *, repair: bool) -> bool:
        """Begin; False when one is under way."""
        if self._task is not None and not self._task.done():
            return False
        self._repair = repair
        self._found = []
        self._damaged = self._mended = self._checked = self._total = self._busy = 0
        self._began_at, self._ended_at, self._failed = time.time(), None, ""
        self._task = asyncio.create_task(self._run(), name="control verify")
        return True

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def progress(self) -> dict[str, Any]:
        """Everything for `/api/v1/verify`."""
        return {
            "running": self._began_at is not None and self._ended_at is None,
            "repair": self._repair,
            "began_at": self._began_at,
            "ended_at": self._ended_at,
            "failed": self._failed or None,
            "checked": self._checked,
            "total": self._total,
            "busy": self._busy,
            "damaged": self._damaged,
            "mended": self._mended,
            "found": [found.to_json() for found in self._found],
        }

    async def _run(self) -> None:
        try:
            await self._look()
        except asyncio.CancelledError:
            self._failed = "the service stopped"
            raise
        except Exception as error:  # noqa: BLE001 - whoever asked must be told
            self._failed = str(error) or type(error).__name__
            _log.exception("the verification ended early")
        finally:
            self._ended_at = time.time()

    async def _look(self) -> None:
        names = await asyncio.to_thread(contents, self._store, _GRACE_SECONDS)
        self._total = len(names.keys) + len(names.ids) + len(names.strays)
        claimed: list[ContentKey] = []
        for key in names.keys:
            with self._telling("body", self._store.body_path(key), key):
                if await self._entry_is_claimed(key):
                    claimed.append(key)
                    continue
            self._checked += 1
        for id_ in names.ids:
            with self._telling("state", self._store.state_path(id_)):
                self._busy += await self._is_claimed(int(id_[:16], 16) >> 2, id_=id_)
            self._checked += 1
        for path in names.strays:
            with self._telling("stray", path):
                for finding in await asyncio.to_thread(check_stray, self._store, path):
                    self._note(finding, mended=await self._put_right(finding))
            self._checked += 1
        await self._come_back(claimed)

    @contextmanager
    def _telling(self, where: str, path: Path, key: ContentKey | None = None) -> Iterator[None]:
        """What goes wrong with one thing is a finding: the others are looked at all the same."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - see above
            detail = f"it can't be looked at: {error or type(error).__name__}"
            finding = Finding(where, str(path.relative_to(self._store.root)), detail, key)
            self._count(finding)
            self._keep(Found(finding, False if self._repair else None, str(error)))

    async def _come_back(self, claimed: list[ContentKey]) -> None:
        """To entries that looked damaged while somebody worked on them: a fill's end takes a moment."""
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        while claimed and time.monotonic() < give_up_at:
            await asyncio.sleep(_PAUSE_SECONDS)
            still = []
            for key in claimed:
                with self._telling("body", self._store.body_path(key), key):
                    if await self._entry_is_claimed(key):
                        still.append(key)
            self._checked += len(claimed) - len(still)
            claimed = still
        self._checked += len(claimed)
        self._busy += len(claimed)

    async def _entry_is_claimed(self, key: ContentKey) -> bool:
        """Whether the entry looks damaged, and somebody works on it."""
        if not await asyncio.to_thread(check_entry, self._store, key):
            return False
        return await self._is_claimed(key.claim_offset, key=key)

    async def _is_claimed(self, offset: int, *, key: ContentKey | None = None, id_: str = "") -> bool:
        """Whether somebody works on the key: a commit under way looks like damage. If not, look again."""
        if not self._claims.try_claim(offset):
            return True
        mends: list[Finding] = []
        try:
            work = (check_entry, self._store, key) if key is not None else (check_part, self._store, id_)
            for finding in await to_its_end(*work):
                if finding.where == "body" and self._repair:
                    mends.append(finding)  # a fill, which takes the claim itself
                else:
                    self._note(finding, mended=await self._put_right(finding))
        finally:
            self._claims.release(offset)
        for finding in mends:
            await self._mend(finding)
        return False

    async def _put_right(self, finding: Finding) -> bool | None:
        """Drop what nobody can use, under the claim."""
        if not self._repair:
            return None
        await to_its_end(put_right, self._store, finding, alone=False)
        if finding.key is not None and finding.where == "record":
            self._index.discard(finding.key.text)
            self._around.raise_store_epoch()
        return True

    async def _mend(self, finding: Finding) -> None:
        assert finding.key is not None
        self._count(finding)
        problem = await self._around.mend(finding.key, True)
        if problem is None:
            await index_again(finding.key, self._index, self._store)
        self._keep(Found(finding, problem is None, problem.detail if problem is not None else ""))

    def _note(self, finding: Finding, *, mended: bool | None) -> None:
        self._count(finding)
        self._keep(Found(finding, mended))

    def _count(self, finding: Finding) -> None:
        _log.warning("%s: %s", finding.path, finding.detail)
        if finding.where != "stray":
            self._around.counters.add("gup_integrity_failures_total", where=finding.where)

    def _keep(self, found: Found) -> None:
        self._damaged += 1
        self._mended += bool(found.mended)
        if len(self._found) < _MOST_FINDINGS:
            self._found.append(found)
