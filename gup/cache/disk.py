"""The cache directory's disk: its errors, the room on it, and how far it is synced."""

import asyncio
import contextlib
import errno
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from gup.cache.records import MAX_BODY_BYTES, Record
from gup.errors import GupError, is_exhausted
from gup.files import replace_file, sync_file_system

log = logging.getLogger("gup.durability")

# --- errors and room

_PATIENCE_SECONDS = 2.0
"""Time for eviction to show an effect; it starts again with each effect."""
_SHORT_PATIENCE_SECONDS = 0.25
"""The same after a failure, for some time: not every miss shall wait in vain."""
_VAIN_SECONDS = 30.0
_MAKE_BYTES = 1 << 20
"""Evicted when a disk refuses though its figures promise room."""
_POLL_SECONDS = 0.02
_ASK_AGAIN_SECONDS = 0.1
_SETTLE_SECONDS = 0.25
"""A committed body is counted here for this long, until the controller has counted it."""
STEP_BYTES = 16 << 20
"""Room is reserved in steps of this size while a body's length is unknown."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_Result = TypeVar("_Result")
_Job = tuple["asyncio.Future[Any]", Callable[..., object], tuple[object, ...]]


class DiskError(GupError, OSError):
    """The cache directory's disk refused; other OSErrors have other causes, such as sockets or locks."""


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Around work on files of the cache directory: its OSErrors become DiskErrors with the same errno."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(error.errno, error.strerror or str(error), error.filename) from error


async def on_disk(executor: Executor, work: Callable[..., _Result], *arguments: object) -> _Result:
    """Run `work` on files of the cache directory in a thread. DiskError when the disk refuses."""
    return await asyncio.get_running_loop().run_in_executor(executor, _on_disk, work, *arguments)


class ShortJobs:
    """One thread for short work on files, such as the commit of a small body.

    A job wakes the thread only if it is idle, and results that come together wake the loop once: with many
    small fills that costs far less than a pool, whose threads also take the interpreter from each other.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: deque[tuple[asyncio.Future[Any], object, BaseException | None]] = deque()
        self._announced = False
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[..., _Result], *arguments: object) -> "asyncio.Future[_Result]":
        """The future result of `work`, of which a cancellation stops nothing. DiskError as `on_disk`."""
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(loop,), name="gup-short", daemon=True)
            self._thread.start()
        future: asyncio.Future[_Result] = loop.create_future()
        self._jobs.put((future, work, arguments))
        return future

    def close(self) -> None:
        """Wait for what is under way."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._do_next(loop):
            pass

    def _do_next(self, loop: asyncio.AbstractEventLoop) -> bool:
        """A function of its own: while the next job is waited for, none is referenced, with its files."""
        if (job := self._jobs.get()) is None:
            return False
        future, work, arguments = job
        try:
            self._done.append((future, _on_disk(work, *arguments), None))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._done.append((future, None, error))
        if not self._announced:
            self._announced = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._deliver)
        return True

    def _deliver(self) -> None:
        self._announced = False  # first: what is done from here on is announced again
        while self._done:
            future, result, failed = self._done.popleft()
            if not future.cancelled():
                future.set_result(result) if failed is None else future.set_exception(failed)


def _on_disk(work: Callable[..., _Result], *arguments: object) -> _Result:
    with disk_errors():
        return work(*arguments)


class Unstorable(GupError):  # noqa: N818 - an outcome, not our error
    """The body can't be stored: it is `too_large`, or there is no room now, perhaps on the `disk`."""

    def __init__(self, detail: str, *, disk: bool = False, too_large: bool = False) -> None:
        super().__init__(detail)
        self.disk = disk
        self.too_large = too_large


@dataclass(slots=True)
class Space:
    """Reservations of room, summed over all workers."""

    folder: Path
    max_size: Callable[[], int]
    min_free: Callable[[], int]
    used: Callable[[], int]
    """Bodies, unclaimed parts, and all reservations; 0 while that is unknown."""
    promise: Callable[[int], None]
    """Changes this worker's reservations."""
    need: Callable[[int, bool], None]
    """Asks the controller to evict that many bytes; with the flag, even if its figures show room."""
    evictions: Callable[[], int]
    """Changes with each eviction."""
    _settling: int = 0
    _in_vain_until: float = 0.0
    _free_bytes: int = 0
    _measured_at: float = -math.inf

    async def reserve(self, amount_bytes: int, held_bytes: int) -> None:
        """Reserve room, evicting if need be, for a body that has `held_bytes` already. Unstorable without.

        It is reserved first: eviction sees it, and of two that want the last room neither exceeds the limit.
        Nothing is evicted for a body that would not fit into the whole store.
        """
        wanted = held_bytes + amount_bytes
        if wanted > MAX_BODY_BYTES:
            detail = f"it is larger than a record can describe ({MAX_BODY_BYTES} bytes)"
            raise Unstorable(detail, too_large=True)
        if wanted > self.max_size():
            raise Unstorable(f"it is larger than cache.max_size ({wanted} bytes)", too_large=True)
        if not 0 < self.used() < self._short_on_disk(amount_bytes):
            self.promise(amount_bytes)
            made = False

            def missing() -> int:
                over = self.used() + self._settling - self.max_size()
                return max(over, self._short_on_disk(amount_bytes))

            try:
                made = await self._made(missing, lambda most: self.need(min(most, amount_bytes), False))
            finally:
                if not made:
                    self.promise(-amount_bytes)
            if made:
                return
        if self._short_on_disk(amount_bytes) > 0:
            raise Unstorable("eviction made no room: less than cache.min_free would stay free", disk=True)
        raise Unstorable("eviction made no room below cache.max_size")

    async def make_room(self) -> bool:
        """Evict for a disk that is full though its figures show room (quota, inodes); whether it did."""
        before = self.evictions()
        self.need(_MAKE_BYTES, True)
        return await self._made(lambda: int(self.evictions() == before), lambda _: None)

    async def _made(self, missing: Callable[[], int], ask: Callable[[int], None]) -> bool:
        """Wait until nothing is missing, as long as it decreases; False when it does not in time."""
        patience = _SHORT_PATIENCE_SECONDS if time.monotonic() < self._in_vain_until else _PATIENCE_SECONDS
        least, deadline, ask_at = 1 << 62, 0.0, 0.0
        while (amount := missing()) > 0:
            now = time.monotonic()
            if amount < least:
                least, deadline = amount, now + patience
            if now >= deadline:
                self._in_vain_until = now + _VAIN_SECONDS
                return False
            if now >= ask_at:
                ask(amount)
                ask_at = now + _ASK_AGAIN_SECONDS
            await asyncio.sleep(_POLL_SECONDS)
        self._in_vain_until = 0.0
        return True

    def release(self, amount_bytes: int, *, committed: bool) -> None:
        self.promise(-amount_bytes)
        if committed:
            self._settle(amount_bytes)
            asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._settle, -amount_bytes)

    def _settle(self, amount_bytes: int) -> None:
        self._settling += amount_bytes

    def _short_on_disk(self, amount_bytes: int) -> int:
        """Bytes that the disk lacks for this amount and `cache.min_free`; 0 or less when it has them."""
        if time.monotonic() - self._measured_at >= _POLL_SECONDS:
            with disk_errors():
                disk = os.statvfs(self.folder)
            self._free_bytes, self._measured_at = disk.f_bavail * disk.f_frsize, time.monotonic()
        return self.min_free() + amount_bytes - self._free_bytes


def refusal(error: DiskError | Unstorable) -> str:
    """The disk's error as a message. Raises errors with another cause: descriptors or memory ran out."""
    if isinstance(error, DiskError):
        if is_exhausted(error):
            raise error
        return f"the cache directory can't be written to: {error.strerror or error}"
    return str(error)


@dataclass(slots=True)
class Room:
    """One fill's reservation."""

    space: Space
    executor: Executor
    short: ShortJobs
    _promised: int = 0

    async def reserve(self, amount: int) -> None:
        await self.space.reserve(amount, self._promised)
        self._promised += amount

    async def keep(self, received: int) -> None:
        """Reserve room for a body with `received` bytes; for one of unknown length in steps."""
        while received > self._promised:
            await self.reserve(STEP_BYTES)

    def release(self, *, committed: bool) -> None:
        if self._promised:
            self.space.release(self._promised, committed=committed)
            self._promised = 0

    async def on_disk(self, work: Callable[..., _Result], *arguments: object, short: bool = False) -> _Result:
        """Run `work` in a thread; when the disk is full, evict and run it again: it must allow that."""
        try:
            if short:
                return await self.short.run(work, *arguments)
            return await on_disk(self.executor, work, *arguments)
        except DiskError as error:
            if error.errno not in _FULL or not await self.space.make_room():
                raise
        return await on_disk(self.executor, work, *arguments)


# --- durability: New entries are not synced one by one: the controller syncs the file system from time to
# time, and stores the time of the last sync as a mark. An entry that the mark covers, or that was stored
# since the machine started, is on the disk or in the page cache as it was written; of any other every chunk
# is compared before it is sent, in every mode (cache.verify).

_FILE = "synced"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MARGIN_SECONDS = 5.0
"""A record's time is taken a moment before its body is in place, and clocks are set."""


class Mark(BaseModel):
    """The last sync: the boot in which it was made, and its Unix time. 0: it failed."""

    boot_id: str = ""
    at: float = 0.0

    def covers(self, record: Record) -> bool:
        """Whether no power cut since then can have torn the record's body."""
        this_boot = self.at > 0 and self.boot_id == boot_id()
        return this_boot or record.stored_at <= self.at - _MARGIN_SECONDS


def boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def read_mark(run: Path) -> Mark:
    """A mark that covers nothing when there is none. Blocks."""
    try:
        return Mark.model_validate_json((run / _FILE).read_bytes())
    except (OSError, ValueError):
        return Mark()


def write_mark(run: Path, mark: Mark) -> None:
    replace_file(run / _FILE, mark.model_dump_json().encode())


@dataclass(slots=True)
class Durability:
    """Syncs every `interval()` seconds if `committed()`, a count, has changed; in the controller."""

    root: Path
    interval: Callable[[], float]
    committed: Callable[[], int]
    _synced_count: int = -1
    _failed: bool = False

    async def run(self) -> None:
        while True:
            await self.sync()
            await asyncio.sleep(max(self.interval(), 0.1))

    async def sync(self) -> None:
        """Sync if something was committed since the last time. A failure is logged once, and retried."""
        count = self.committed()
        if count == self._synced_count:
            return
        try:
            await asyncio.to_thread(self._sync)
        except OSError as error:
            if not self._failed:
                log.warning("the disk refuses to sync, so stored bodies are compared before use: %s", error)
            self._failed = True
        else:
            self._failed, self._synced_count = False, count

    def _sync(self) -> None:
        mark, began = Mark(boot_id=boot_id()), time.time()
        try:
            sync_file_system(self.root)
            mark.at = began
        finally:
            write_mark(self.root / "run", mark)
