"""Integrity jobs: the scrubber in the background, and verification on command."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gup.cache.chunks import read_aside, span_of
from gup.cache.integrity import Finding, check_entry, check_part, check_stray, contents, put_right
from gup.cache.records import Record
from gup.cache.store import OpenFile, Store
from gup.config import Cache
from gup.content.key import ContentKey
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.index import Index
from gup.control.reconcile import index_again, to_its_end
from gup.jsonmodel import InvalidError, Members

_log = logging.getLogger("gup.control.integrity")

_SCRUB_NOTE = "scrub"
_MAX_KEY = 5 * 241
_IDLE_SECONDS = 1.0
"""Between two checks whether a pass is due."""
_MOST_BEHIND_SECONDS = 1.0
"""Time on a slow disk that the scrubber makes up for by reading faster, at most."""


@dataclass(slots=True)
class Pass:
    """One pass over the store in the order of keys. `after` is the last key that was read.

    Only the scrubber changes it; it is stored with the index, so that a restart continues the pass.
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
        """The stored pass; a new one when that is malformed."""
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
    """Compares all bodies with their sums, pass after pass, at `cache.scrub_rate`; damage is mended.

    What it read does not stay in the page cache.
    """

    def __init__(
        self,
        dependencies: ControlDependencies,
        index: Index,
        settings: Callable[[], Cache],
        clock: Callable[[], float],
    ) -> None:
        self._dependencies = dependencies
        self._index = index
        self._settings = settings
        self._clock = clock
        self._pass = Pass()
        self._paid_until = 0.0

    def restore(self) -> None:
        """Continue the stored pass; after the index was opened."""
        self._pass = Pass.from_json(self._index.note(_SCRUB_NOTE))

    def save(self) -> None:
        self._index.set_note(_SCRUB_NOTE, asdict(self._pass))

    def progress(self) -> schemas.Scrub:
        """The pass for `/api/v1/status`."""
        now, settings = self._pass, self._settings()
        left = now.began_at + settings.scrub_interval if now.began_at else None
        return schemas.Scrub(
            running=now.running and settings.scrub_rate > 0,
            rate_bytes_per_second=settings.scrub_rate or None,
            began_at=now.began_at or None,
            ended_at=now.ended_at if not now.running and now.ended_at else None,
            next_at=left if not now.running and settings.scrub_rate else None,
            checked=now.checked,
            checked_bytes=now.checked_bytes,
            entries=len(self._index.rows),
            entries_bytes=self._index.total_bytes,
            damaged=now.damaged,
            mended=now.mended,
        )

    async def keep(self) -> None:
        """Run the passes that are due; never returns."""
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
        """Read the bodies that this pass has not read; False when scrubbing was turned off."""
        self._paid_until = time.monotonic()
        while rows := await self._index.page("key", 1, after=(0, self._pass.after)):
            if self._settings().scrub_rate <= 0:
                return False
            await self._scrub_or_tell(rows[0].key)
            self._pass.after = rows[0].key
            self._pass.checked += 1
            self.save()
        return True

    async def _scrub_or_tell(self, text: str) -> None:
        """Read one body. An error is logged and the pass goes on."""
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
            record = self._dependencies.store.load(key)
        except ValueError:
            return None, None
        return record, self._dependencies.store.open_body(record) if record is not None else None

    async def _look_at_odd(self, key: ContentKey) -> None:
        """Check under the claim whether the entry is damaged, or was just removed or replaced."""
        claims = self._dependencies.claims
        if not claims.try_claim(key.claim_offset):
            return
        try:
            found = await asyncio.to_thread(check_entry, self._dependencies.store, key)
        finally:
            claims.release(key.claim_offset)
        for finding in found:
            if finding.where == "body":  # a record's damage is found, and counted, by whoever needs it
                await self._damaged(key, finding.detail)

    async def _damaged(self, key: ContentKey, detail: str) -> None:
        self._pass.damaged += 1
        self._dependencies.counters.add("gup_integrity_failures_total", where="body")
        _log.warning("damaged body of %s: %s", key.text, detail)
        problem = await self._dependencies.mend(key, True)
        if problem is None:
            self._pass.mended += 1
            await index_again(key, self._index, self._dependencies.store)
        else:
            _log.warning("%s could not be mended: %s", key.text, problem.detail)

    async def _pay(self, amount_bytes: int) -> None:
        """Wait until the rate allows to read so much."""
        now = time.monotonic()
        rate = self._settings().scrub_rate
        self._paid_until = max(self._paid_until, now - _MOST_BEHIND_SECONDS)
        if rate:
            self._paid_until += amount_bytes / rate
        await asyncio.sleep(max(0.0, self._paid_until - now))


_GRACE_SECONDS = 60.0
"""A younger stray file may be one that is being made."""
_PATIENCE_SECONDS = 10.0
"""How long to wait at the end for the claims of entries that look damaged."""
_PAUSE_SECONDS = 0.2
_MOST_FINDINGS = 10_000


class Verification:
    """Verification of everything in the cache directory, at most one at a time; keeps the last result."""

    def __init__(self, dependencies: ControlDependencies, index: Index) -> None:
        self._dependencies = dependencies
        self._index = index
        self._store: Store = dependencies.store
        self._claims = dependencies.claims
        self._task: asyncio.Task[None] | None = None
        self._repair = False
        self._found: list[schemas.Finding] = []
        self._damaged = self._mended = 0
        self._checked = self._total = self._busy = 0
        self._began_at: float | None = None
        self._ended_at: float | None = None
        self._failed = ""

    def start(self, *, repair: bool) -> bool:
        """Start; False when one is running."""
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

    def progress(self) -> schemas.Verification:
        """Progress and findings."""
        return schemas.Verification(
            running=self._began_at is not None and self._ended_at is None,
            repair=self._repair,
            began_at=self._began_at,
            ended_at=self._ended_at,
            failed=self._failed or None,
            checked=self._checked,
            total=self._total,
            busy=self._busy,
            damaged=self._damaged,
            mended=self._mended,
            found=list(self._found),
        )

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
        """An exception becomes a finding; the other files are looked at all the same."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - see above
            detail = f"it can't be looked at: {error or type(error).__name__}"
            finding = Finding(where, str(path.relative_to(self._store.root)), detail, key)
            self._count(finding)
            self._keep(finding, False if self._repair else None, str(error))

    async def _come_back(self, claimed: list[ContentKey]) -> None:
        """Check again the entries that looked damaged while somebody held their claim."""
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
        """Whether the entry looks damaged and somebody holds its claim."""
        if not await asyncio.to_thread(check_entry, self._store, key):
            return False
        return await self._is_claimed(key.claim_offset, key=key)

    async def _is_claimed(self, offset: int, *, key: ContentKey | None = None, id_: str = "") -> bool:
        """Whether somebody holds the claim: a commit under way looks like damage. If not, check again."""
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
        """Remove what nobody can use, under the claim."""
        if not self._repair:
            return None
        await to_its_end(put_right, self._store, finding, alone=False)
        if finding.key is not None and finding.where == "record":
            self._index.discard(finding.key.text)
            self._dependencies.raise_store_epoch()
        return True

    async def _mend(self, finding: Finding) -> None:
        assert finding.key is not None
        self._count(finding)
        problem = await self._dependencies.mend(finding.key, True)
        if problem is None:
            await index_again(finding.key, self._index, self._store)
        self._keep(finding, problem is None, problem.detail if problem is not None else "")

    def _note(self, finding: Finding, *, mended: bool | None) -> None:
        self._count(finding)
        self._keep(finding, mended)

    def _count(self, finding: Finding) -> None:
        _log.warning("%s: %s", finding.path, finding.detail)
        if finding.where != "stray":
            self._dependencies.counters.add("gup_integrity_failures_total", where=finding.where)

    def _keep(self, finding: Finding, mended: bool | None, why_not: str = "") -> None:
        self._damaged += 1
        self._mended += bool(mended)
        if len(self._found) < _MOST_FINDINGS:
            self._found.append(
                schemas.Finding(
                    where=finding.where,
                    path=finding.path,
                    key=finding.key.text if finding.key else None,
                    detail=finding.detail,
                    mended=mended,
                    why_not=why_not or None,
                )
            )
