"""The committed bodies that a process has open, and which of their chunks may be sent."""

import asyncio
import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import StrEnum

from gup.cache.body import CUT, Body, Callback
from gup.cache.disk import on_disk, read_mark
from gup.cache.inflight import FillDependencies
from gup.cache.records import CHUNK_BYTES, Record
from gup.cache.store import OpenFile, in_page_cache, is_chunk_sound, span_of
from gup.content.key import ContentKey, Kind

_WARM_SECONDS = 30.0
"""A chunk sent within this time is assumed to be in the page cache."""
_UNKNOWN, _SOUND, _BAD = range(3)


class Entry:
    """A body's record, its file, and the state of its chunks: unknown, sound, or bad.

    A bad chunk is never sent: its readers are cut there, and request the rest again. In `trusting` entries
    every chunk is assumed sound until damage is found.
    """

    source = "cache"
    times = "disk"

    def __init__(
        self,
        record: Record,
        file: OpenFile,
        executor: Executor,
        on_damage: Callable[["Entry"], None],
        *,
        trusting: bool = False,
        is_purged: Callable[[Record], bool] = lambda _record: False,
    ) -> None:
        self.record = record
        self.head = record.head
        self.key = record.key
        self.file = file
        self.fd = file.fd
        self.counted = False
        self.all_verified = trusting
        self._trusting = trusting
        self._chunks = bytearray([_SOUND if trusting else _UNKNOWN]) * len(record.sums)
        self._warm = [0.0] * len(record.sums)
        self._reading: set[int] = set()
        self._waiting: dict[Callback, int] = {}
        self._executor = executor
        self._on_damage = on_damage
        self._is_purged = is_purged

    @property
    def is_removed(self) -> bool:
        """Whether it is for those alone that read it already."""
        return os.fstat(self.fd).st_nlink == 0 or self._is_purged(self.record)

    @property
    def damaged(self) -> bool:
        return _BAD in self._chunks

    def end(self) -> int:
        return self.record.length

    def leave(self) -> None:
        """The descriptor stays open as long as the entry is referenced."""

    def doubt(self) -> None:
        """The file may have changed: every chunk is compared again before it is sent."""
        self._trusting = self.all_verified = False
        self._chunks = self._chunks.replace(bytes([_SOUND]), bytes([_UNKNOWN]))

    def unreadable(self) -> None:
        """See Body. Comparing every chunk again finds the bad one."""
        self.doubt()
        self._on_damage(self)

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.fd, length, offset))

    # --- reading

    def available(self, offset: int, want: int) -> int:
        """See Body. Compares a chunk before its first byte is sent, and reads cold ones ahead in a thread.

        Looks at every chunk of `want`, so it should be no more than is sent at once.
        """
        chunk = offset // CHUNK_BYTES
        if self._chunks[chunk] == _BAD:
            return CUT
        now, end = time.monotonic(), min(offset + want, self.record.length)
        if not self._is_ready(chunk, now):
            self._read_ahead(chunk)
            if chunk + 1 < len(self._chunks) and self._chunks[chunk + 1] == _UNKNOWN:
                self._read_ahead(chunk + 1)
            return 0
        while (stop := (chunk + 1) * CHUNK_BYTES) < end and self._is_ready(chunk + 1, now):
            chunk += 1
        return min(stop, end) - offset

    def _is_ready(self, chunk: int, now: float) -> bool:
        if self._chunks[chunk] != _SOUND:
            return False
        cold = now - self._warm[chunk] > _WARM_SECONDS
        if cold and not in_page_cache(self.fd, *span_of(self.record, chunk)):
            return False
        self._warm[chunk] = now
        return True

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset // CHUNK_BYTES

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    async def is_sound_at(self, offset: int) -> bool:
        while (amount := self.available(offset, 1)) == 0:
            compared = asyncio.Event()
            self.wait(offset, compared.set)
            try:
                await compared.wait()
            finally:
                self.forget(compared.set)
        return amount != CUT

    def _read_ahead(self, chunk: int) -> None:
        if chunk not in self._reading:
            self._reading.add(chunk)
            future = asyncio.get_running_loop().run_in_executor(self._executor, self._compare, chunk)
            trusted = self._trusting
            future.add_done_callback(lambda done: self._compared(chunk, done, trusted))

    def _compare(self, chunk: int) -> bool:
        if not self._trusting:
            return is_chunk_sound(self.fd, self.record, chunk)
        start, length = span_of(self.record, chunk)
        with contextlib.suppress(OSError):
            return len(os.pread(self.fd, length, start)) == length
        return False

    def _compared(self, chunk: int, done: "asyncio.Future[bool]", trusted: bool) -> None:
        self._reading.discard(chunk)
        if done.cancelled():
            return
        if not done.result():
            self._chunks[chunk] = _BAD
        elif self._trusting or not trusted:  # else it was only read, before it was doubted
            self._chunks[chunk] = _SOUND
        self._warm[chunk] = time.monotonic()
        self.all_verified = self._chunks.count(_SOUND) == len(self._chunks)
        if not done.result():
            self._on_damage(self)
        for callback in [call for call, at in self._waiting.items() if at == chunk]:
            self._waiting.pop(callback, None)
            callback()


class Entries:
    """Open entries. Bounded; the least recently used is closed first. Changes here alone, on the loop."""

    def __init__(self, dependencies: FillDependencies, max_open: int) -> None:
        self.on_damage: Callable[[Entry], None]
        """Called at every damaged chunk that a reader comes to; set once, before any entry is opened."""
        self._deps = dependencies
        self._max_open = max_open
        self._rows: OrderedDict[ContentKey, Entry] = OrderedDict()
        self._epoch = dependencies.store_epoch()
        self._mode = dependencies.settings.cache.verify

    def known(self, key: ContentKey) -> Entry | None:
        """The entry if it is open, updated with other processes' changes."""
        if self._deps.settings.cache.verify != self._mode:  # a reload: verify what was trusted
            self._mode = self._deps.settings.cache.verify
            self._rows.clear()
        if self._deps.store_epoch() != self._epoch:
            self._epoch = self._deps.store_epoch()
            self.close_removed()
        return self._rows.get(key)

    def is_purged(self, record: Record) -> bool:
        return self._deps.purges.name_head(record.key, record.kind, record, pinned=record.pinned)

    async def get(self, key: ContentKey) -> Entry | None:
        """The entry, opened if need be; None when its record or body is missing or not as recorded."""
        entry = self.known(key)
        if entry is None:
            found = await on_disk(self._deps.executor, self.load, key)
            return None if found is None else self.put(*found)
        self.used(entry)
        return entry

    async def get_damaged(self, key: ContentKey) -> Entry | None:
        """The entry with its damaged body, for the chunks that are sound; None without any file."""
        store = self._deps.store
        record, file = await on_disk(
            self._deps.executor, lambda: (store.load_or_none(key), store.open_whatever(key))
        )
        if record is None or file is None or (entry := self.put(record, file, trusting=False)) is None:
            return None
        entry.counted = True
        entry.doubt()
        return entry

    def load(self, key: ContentKey) -> tuple[Record, OpenFile, bool] | None:
        """Record and body from the disk, and whether they are trusted; blocks."""
        record = self._deps.store.load_or_none(key)
        file = self._deps.store.open_body(record) if record is not None else None
        if record is None or file is None or self.is_purged(record):
            return None
        return record, file, self._mode == "scrub" and read_mark(self._deps.store.run).covers(record)

    def put(self, record: Record, file: OpenFile, trusting: bool) -> Entry | None:
        """The entry as found on disk; one that is open already takes over its record. None when it was purged
        meanwhile.
        """
        if self.is_purged(record):
            return None
        entry = self._rows.get(record.key)
        if entry is None or not self.adopt(entry, record):
            executor, purged = self._deps.executor, self.is_purged
            entry = Entry(record, file, executor, self.on_damage, trusting=trusting, is_purged=purged)
            self._rows[record.key] = entry
        self.used(entry)
        return entry

    def used(self, entry: Entry) -> None:
        if self._rows.get(entry.key) is entry:
            self._rows.move_to_end(entry.key)
        while len(self._rows) > self._max_open:
            self._rows.popitem(last=False)

    def drop(self, entry: Entry) -> None:
        if self._rows.get(entry.key) is entry:
            del self._rows[entry.key]

    def adopt(self, entry: Entry, record: Record) -> bool:
        if record.etag != entry.record.etag or record.generation != entry.record.generation:
            self.drop(entry)
            return False
        entry.record = record
        return True

    def clear(self) -> None:
        self._rows.clear()

    def close_removed(self) -> None:
        """Call when the store's epoch was raised."""
        for entry in [entry for entry in self._rows.values() if entry.is_removed]:
            del self._rows[entry.key]

    def changed(self) -> list[Entry]:
        """Entries whose file has changed without being replaced: closed, and doubted.

        gup never writes to a published file; 1 µs each.
        """
        found = []
        for entry in list(self._rows.values()):
            stat = os.fstat(entry.fd)
            if not entry.record.fits(stat) and stat.st_nlink and not entry.counted:
                self.drop(entry)
                entry.doubt()
                found.append(entry)
        return found


class Result(StrEnum):
    HIT = "hit"
    MISS = "miss"
    COLLAPSED = "collapsed"
    REVALIDATED = "revalidated"
    STALE = "stale"
    BYPASS = "bypass"


@dataclass(slots=True)
class Opened:
    """A body to read, and its result. `ranges`: whether spans of it may be served."""

    body: Body
    result: Result
    key: ContentKey
    kind: Kind
    age_seconds: int = 0
    ranges: bool = True
    entry: Entry | None = None
