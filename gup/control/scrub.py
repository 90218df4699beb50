"""The scrubber: reads all stored bodies at its own rate, pass after pass, and has damage mended."""

import asyncio
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gup.cache.audit import check_entry
from gup.cache.chunks import read_aside, span_of
from gup.cache.record import Record
from gup.cache.store import OpenFile
from gup.config import Cache
from gup.content.key import ContentKey
from gup.control.index import Index
from gup.control.reconcile import index_again
from gup.control.surroundings import Surroundings
from gup.jsonmodel import InvalidError, Members

_log = logging.getLogger("gup.control.scrub")
_NOTE = "scrub"
_MAX_KEY = 5 * 241
_IDLE_SECONDS = 1.0
"""Between two looks at the settings while there is nothing to read."""
_MOST_BEHIND_SECONDS = 1.0
"""What a slow disk kept it from reading is made up for by so much at most."""


@dataclass(slots=True)
class Pass:
    """One pass over the store, in the order of keys. `after` is the last key that it has read.

    The scrubber alone changes it; it is kept with the index, so that a restart goes on where it was.
    """

    began_at: float = 0.0
    ended_at: float = 0.0
    after: str = ""
    checked: int = 0
    checked_bytes: int = 0
    damaged: int = 0
    mended: int = 0

    @property
    def running(self) -> bool:
        return self.began_at > self.ended_at

    @classmethod
    def from_json(cls, fields: object) -> "Pass":
        """What was kept; a new pass when that makes no sense."""
        try:
            members = Members(fields, "pass")
            return cls(
                members.time("began_at"),
                members.time("ended_at"),
                members.text("after", _MAX_KEY),
                *(members.whole(name) for name in ("checked", "checked_bytes", "damaged", "mended")),
            )
        except InvalidError:
            return cls()


class Scrubber:
    """Never reads faster than `cache.scrub_rate`, nor keeps what it read in the page cache."""

    def __init__(
        self,
        around: Surroundings,
        index: Index,
        settings: Callable[[], Cache],
        clock: Callable[[], float],
    ) -> None:
        self._around = around
        self._index = index
        self._settings = settings
        self._clock = clock
        self._pass = Pass()
        self._paid_until = 0.0

    def restore(self) -> None:
        """Go on where the last run was; when the index has been opened."""
        self._pass = Pass.from_json(self._index.note(_NOTE))

    def save(self) -> None:
        self._index.set_note(_NOTE, asdict(self._pass))

    def progress(self) -> dict[str, Any]:
        """Its part of `/api/v1/status`."""
        now, settings = self._pass, self._settings()
        left = now.began_at + settings.scrub_interval if now.began_at else None
        return {
            "running": now.running and settings.scrub_rate > 0,
            "rate_bytes_per_second": settings.scrub_rate or None,
            "began_at": now.began_at or None,
            "ended_at": now.ended_at if not now.running and now.ended_at else None,
            "next_at": left if not now.running and settings.scrub_rate else None,
            "checked": now.checked,
            "checked_bytes": now.checked_bytes,
            "entries": len(self._index.rows),
            "entries_bytes": self._index.total_bytes,
            "damaged": now.damaged,
            "mended": now.mended,
        }

    async def keep(self) -> None:
        """Pass after pass; for a job that never ends."""
        while True:
            if not self._due():
                await asyncio.sleep(_IDLE_SECONDS)
                continue
            if not self._pass.running:
                self._pass = Pass(began_at=self._clock())
            if await self._go_through():
                self._pass.ended_at = max(self._clock(), self._pass.began_at)
                self.save()
                _log.info(
                    "read %d bodies, %d bytes: %d damaged, %d mended",
                    self._pass.checked,
                    self._pass.checked_bytes,
                    self._pass.damaged,
                    self._pass.mended,
                )
            await asyncio.sleep(_IDLE_SECONDS)  # also where scrub_interval is 0

    def _due(self) -> bool:
        settings = self._settings()
        if not self._index.complete or settings.scrub_rate <= 0:
            return False
        now = self._clock()
        # A clock set back must not put the next pass off for years.
        waited = not 0 <= now - self._pass.began_at < settings.scrub_interval
        return self._pass.running or waited

    async def _go_through(self) -> bool:
        """Read what this pass has not read; False when that was turned off."""
        keys = await asyncio.to_thread(sorted, list(self._index.rows))
        self._paid_until = time.monotonic()
        for text in keys[bisect_right(keys, self._pass.after) :]:
            if self._settings().scrub_rate <= 0:
                return False
            await self._scrub_or_tell(text)
            self._pass.after = text
            self._pass.checked += 1
            self.save()
        return True

    async def _scrub_or_tell(self, text: str) -> None:
        """Read one body; whatever is wrong with it, the pass goes on."""
        try:
            await self._scrub(ContentKey.parse(text))
        except Exception:  # noqa: BLE001 - one entry must not stop the pass over all
            _log.exception("%s could not be scrubbed", text)

    async def _scrub(self, key: ContentKey) -> None:
        record, file = await asyncio.to_thread(self._open, key)
        if record is None or file is None:
            await self._look_at_odd(key)
            return
        for chunk in range(len(record.sums)):
            length = span_of(record, chunk)[1]
            await self._pay(length)
            sound = await asyncio.to_thread(read_aside, file.fd, record, chunk)
            self._pass.checked_bytes += length
            if not sound:
                if os.fstat(file.fd).st_nlink:  # else another body has taken its place
                    await self._damaged(key, f"chunk {chunk} does not agree with its sum")
                return

    def _open(self, key: ContentKey) -> tuple[Record | None, OpenFile | None]:
        try:
            record = self._around.store.load(key)
        except ValueError:
            return None, None
        return record, self._around.store.open_body(record) if record is not None else None

    async def _look_at_odd(self, key: ContentKey) -> None:
        """Removed or replaced meanwhile, or damaged: told apart under the claim."""
        claims = self._around.claims
        if not claims.try_claim(key.claim_offset):
            return
        try:
            found = await asyncio.to_thread(check_entry, self._around.store, key)
        finally:
            claims.release(key.claim_offset)
        for finding in found:
            if finding.where == "body":  # a record's damage is found, and counted, by whoever needs it
                await self._damaged(key, finding.detail)

    async def _damaged(self, key: ContentKey, detail: str) -> None:
        self._pass.damaged += 1
        self._around.counters.add("gup_integrity_failures_total", where="body")
        _log.warning("damaged body of %s: %s", key.text, detail)
        problem = await self._around.mend(key, True)
        if problem is None:
            self._pass.mended += 1
            await index_again(key, self._index, self._around.store)
        else:
            _log.warning("%s could not be mended: %s", key.text, problem.detail)

    async def _pay(self, amount_bytes: int) -> None:
        """Wait until so much may be read."""
        now = time.monotonic()
        rate = self._settings().scrub_rate
        self._paid_until = max(self._paid_until, now - _MOST_BEHIND_SECONDS)
        if rate:
            self._paid_until += amount_bytes / rate
        await asyncio.sleep(max(0.0, self._paid_until - now))
