"""A committed body that this process has open, and which of its chunks may be sent; never fetches it."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor

from gup.cache.body import CUT, Callback
from gup.cache.checksum import CHUNK_BYTES
from gup.cache.chunks import in_page_cache, read_chunk, span_of
from gup.cache.record import Record
from gup.cache.store import OpenFile
from gup.content.key import ContentKey
from gup.errors import Problem

_WARM_SECONDS = 30.0
"""A chunk sent within this time is taken to be in the page cache still."""
_MOST_MENDS = 3
"""A disk on which the same body is bad again and again is believed at last."""


class Entry:
    """A body's record, its file, and what was found of its chunks: not yet looked at, sound, or bad.

    A bad chunk is never sent. While the body is being mended its readers wait; mended, they go on in the new
    file, which has the same bytes; not mended, those that come to a bad chunk are cut. `trusting` entries
    take every chunk to be sound until somebody else finds damage.

    The chunks' states, `file` and `mending` change here alone; `record` is replaced by the cache when it was
    validated anew.
    """

    source = "cache"

    def __init__(
        self,
        record: Record,
        file: OpenFile,
        executor: Executor,
        on_damage: Callable[["Entry"], None],
        *,
        trusting: bool = False,
    ) -> None:
        self.record = record
        self.head = record.head
        self.file = file
        self.mending = False
        self.problem: Problem | None = None
        """Why it could not be mended at the last try."""
        self.noted = False
        """Whether its damage is counted already."""
        self._trusting = trusting
        self._mends = 0
        self._bad: set[int] = set()
        self._warm = [0.0] * len(record.sums)
        self._reading: set[int] = set()
        self._waiting: dict[Callback, int] = {}
        self._executor = executor
        self._on_damage = on_damage
        self._forget_looks()

    def _forget_looks(self) -> None:
        chunks = len(self.record.sums)
        self._verified = bytearray(b"\1" * chunks if self._trusting else chunks)
        self._unverified = 0 if self._trusting else chunks
        self.all_verified = self._trusting
        """Whether all of it may be sent without another look."""

    @property
    def fd(self) -> int:
        return self.file.fd

    @property
    def key(self) -> ContentKey:
        return self.record.key

    @property
    def damaged(self) -> bool:
        return bool(self._bad)

    def end(self) -> int:
        return self.record.length

    def leave(self) -> None:
        """Nothing: the descriptor lives as long as somebody holds the entry."""

    def unreadable(self) -> None:
        """Which chunk it was is found out, and mended; until then none is sent without another look."""
        self.doubt()
        if not self.mending:
            self._on_damage(self)

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.file.fd, length, offset))

    # --- reading

    def available(self, offset: int, want: int) -> int:
        """See Body. Verifies a chunk before its first byte leaves, and reads cold ones ahead in a thread."""
        chunk = offset // CHUNK_BYTES
        if self._bad and chunk in self._bad:
            return self.missing(chunk)
        now = time.monotonic()
        if not self._ready(chunk, now):
            self._read_ahead(chunk)
            if (chunk + 1) < len(self._verified) and not self._verified[chunk + 1]:
                self._read_ahead(chunk + 1)
            return 0
        end = min((chunk + 1) * CHUNK_BYTES, self.record.length)
        return min(want, end - offset)

    def is_bad(self, chunk: int) -> bool:
        return chunk in self._bad

    def missing(self, chunk: int) -> int:
        """What `available` answers for a chunk if it is bad; 0 also when it is not."""
        return CUT if chunk in self._bad and not self.mending else 0

    def _ready(self, chunk: int, now: float) -> bool:
        if not self._verified[chunk]:
            return False
        if now - self._warm[chunk] > _WARM_SECONDS and not in_page_cache(
            self.file.fd, *span_of(self.record, chunk)
        ):
            return False
        self._warm[chunk] = now
        return True

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset // CHUNK_BYTES

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    async def sound_at(self, offset: int) -> bool:
        """Whether the chunk at `offset` may be sent: looked at first if need be, mended if that goes."""
        while (amount := self.available(offset, 1)) == 0:
            looked = asyncio.Event()
            self.wait(offset, looked.set)
            try:
                await looked.wait()
            finally:
                self.forget(looked.set)
        return amount != CUT

    def _read_ahead(self, chunk: int) -> None:
        if chunk in self._reading or chunk in self._bad:
            return
        self._reading.add(chunk)
        loop = asyncio.get_running_loop()
        file = self.file
        future = loop.run_in_executor(self._executor, self._look_at, file, chunk)
        future.add_done_callback(lambda done: self._looked(chunk, file, done))

    def _look_at(self, file: OpenFile, chunk: int) -> bool:
        if not self._trusting:
            return read_chunk(file.fd, self.record, chunk) is not None
        start, length = span_of(self.record, chunk)
        try:
            return len(os.pread(file.fd, length, start)) == length
        except OSError:
            return False

    def _looked(self, chunk: int, file: OpenFile, done: "asyncio.Future[bool]") -> None:
        self._reading.discard(chunk)
        if done.cancelled():
            return
        if file is not self.file:
            self._wake(chunk)  # mended meanwhile: the new file is looked at
            return
        if done.result():
            self._warm[chunk] = time.monotonic()
            if not self._verified[chunk]:
                self._verified[chunk] = 1
                self._unverified -= 1
                self.all_verified = self._unverified == 0 and not self._bad
            self._wake(chunk)
        else:
            self.found_bad(chunk, file)

    # --- damage

    def found_bad(self, chunk: int, file: OpenFile) -> None:
        """A chunk of `file` is not what was stored. Told to the cache, which may begin to mend."""
        if file is self.file and chunk not in self._bad:
            self._bad.add(chunk)
            self.all_verified = False
            if not self.mending:
                self._on_damage(self)
        if not self.mending:
            self._wake(chunk)

    def doubt(self) -> None:
        """The file is not as it was: every chunk is looked at again before it is sent."""
        self._trusting = False
        self._forget_looks()

    def begin_mending(self) -> bool:
        """Readers of bad chunks wait from now on; False when it was tried in vain too often."""
        if self._mends >= _MOST_MENDS:
            return False
        self.mending = True
        return True

    def mended(self, record: Record, file: OpenFile) -> None:
        """`file` has the same body, whole."""
        self._mends += 1
        self.mending, self.problem = False, None
        self.record, self.file = record, file
        self._bad.clear()
        self._warm = [0.0] * len(record.sums)
        self._forget_looks()
        self._wake_all()

    def not_mended(self, problem: Problem | None) -> None:
        """The bad chunks can't be had: readers that come to one are cut. None: there is another body now."""
        self.mending, self.problem = False, problem
        self._wake_all()

    def _wake(self, chunk: int) -> None:
        for callback in [call for call, at in self._waiting.items() if at == chunk]:
            self._waiting.pop(callback, None)
            callback()

    def _wake_all(self) -> None:
        for callback in list(self._waiting):
            self._waiting.pop(callback, None)
            callback()
