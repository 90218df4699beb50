"""Bodies as a connection reads them: committed, or growing while they arrive; never fetches, never sends."""

import asyncio
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

from gup.cache.checksum import CHUNK_BYTES, chunk_sum
from gup.cache.record import Head, Record
from gup.cache.store import OpenFile
from gup.content.key import ContentKey

CUT = -1
"""What `available` answers when the rest will never come: the connection is to be cut."""

_WARM_SECONDS = 30.0
"""A chunk sent within this time is taken to be in the page cache still."""
_PROBE_STEP_BYTES = 128 * 1024
_WAKE_SECONDS = 0.025
_WAKE_BYTES = 64 * 1024
_WAKE_AT_LATEST_SECONDS = 0.2

Callback = Callable[[], None]


class Body(Protocol):
    """What a connection needs of a body. Offsets and lengths in bytes."""

    head: Head
    source: str

    @property
    def fd(self) -> int:
        """Descriptor to send from, -1 when the bytes are to be had from `view` only."""

    def available(self, offset: int, want: int) -> int:
        """How many bytes from `offset` can be sent now without blocking; 0: wait; CUT: never."""

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for bodies without a descriptor."""

    def wait(self, offset: int, callback: Callback) -> None:
        """Call back once when asking for `offset` again is worth it."""

    def forget(self, callback: Callback) -> None:
        """Take a `wait` back."""

    def end(self) -> int | None:
        """The body's length as soon as it is sure."""

    def leave(self) -> None:
        """A reader is gone. Called once by each."""


async def read_whole(body: Body, most: int) -> bytes:
    """The first `most` bytes of a body, for use in this process; what can't be had is left out."""
    got = bytearray()
    while len(got) < min(most, body.end() or most):
        amount = body.available(len(got), most - len(got))
        if amount > 0:
            got += body.view(len(got), amount)
            continue
        if amount == CUT:
            break
        woken = asyncio.Event()
        body.wait(len(got), woken.set)
        await woken.wait()
    return bytes(got)


class Entry:
    """A committed body that this process has open: its record, file, and which chunks it has verified.

    `verified` and `_warm` change here alone; `record` is replaced by the cache when it was validated anew.
    """

    source = "cache"

    def __init__(
        self,
        record: Record,
        file: OpenFile,
        executor: Executor,
        on_damage: Callable[["Entry"], None],
    ) -> None:
        self.record = record
        self.head = record.head
        self.file = file
        self.damaged = False
        chunks = len(record.sums)
        self.all_verified = False
        self._verified = bytearray(chunks)
        self._unverified = chunks
        self._warm = [0.0] * chunks
        self._reading: set[int] = set()
        self._waiting: dict[Callback, int] = {}
        self._executor = executor
        self._on_damage = on_damage

    @property
    def fd(self) -> int:
        return self.file.fd

    @property
    def key(self) -> ContentKey:
        return self.record.key

    def end(self) -> int:
        return self.record.length

    def leave(self) -> None:
        """Nothing: the descriptor lives as long as somebody holds the entry."""

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.file.fd, length, offset))

    def available(self, offset: int, want: int) -> int:
        """See Body. Verifies a chunk before its first byte leaves, and reads cold ones ahead in a thread."""
        if self.damaged:
            return CUT
        chunk = offset // CHUNK_BYTES
        now = time.monotonic()
        if not self._ready(chunk, now):
            self._read_ahead(chunk)
            if (chunk + 1) < len(self._verified) and not self._verified[chunk + 1]:
                self._read_ahead(chunk + 1)
            return 0
        end = min((chunk + 1) * CHUNK_BYTES, self.record.length)
        return min(want, end - offset)

    def _ready(self, chunk: int, now: float) -> bool:
        if not self._verified[chunk]:
            return False
        if now - self._warm[chunk] > _WARM_SECONDS and not self._in_page_cache(chunk):
            return False
        self._warm[chunk] = now
        return True

    def _in_page_cache(self, chunk: int) -> bool:
        start = chunk * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, self.record.length)
        probe = [bytearray(1)]
        try:
            for offset in (*range(start, stop, _PROBE_STEP_BYTES), stop - 1):
                if not os.preadv(self.file.fd, probe, offset, os.RWF_NOWAIT):
                    return True  # shorter than recorded: the read in the thread finds out
        except OSError as error:
            return error.errno != errno.EAGAIN  # a file system that can't tell counts as warm
        return True

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset // CHUNK_BYTES

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    async def verify_first(self, offset: int = 0) -> bool:
        """Verify the chunk at `offset` if that is still to be done; whether the entry is sound so far."""
        if not self.damaged and self.available(offset, 1) == 0:
            done = asyncio.Event()
            self.wait(offset, done.set)
            await done.wait()
        return not self.damaged

    def _read_ahead(self, chunk: int) -> None:
        if chunk in self._reading:
            return
        self._reading.add(chunk)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._read_chunk, chunk)
        future.add_done_callback(lambda done: self._chunk_read(chunk, done))

    def _read_chunk(self, chunk: int) -> bool:
        start = chunk * CHUNK_BYTES
        length = min(CHUNK_BYTES, self.record.length - start)
        piece = os.pread(self.file.fd, length, start)
        return len(piece) == length and chunk_sum(piece) == self.record.sums[chunk]

    def _chunk_read(self, chunk: int, done: "asyncio.Future[bool]") -> None:
        self._reading.discard(chunk)
        if done.cancelled():
            return
        sound = done.exception() is None and done.result()
        if sound:
            self._warm[chunk] = time.monotonic()
            if not self._verified[chunk]:
                self._verified[chunk] = 1
                self._unverified -= 1
                self.all_verified = self._unverified == 0
        elif not self.damaged:
            self.damaged = True
            self.all_verified = False
            self._on_damage(self)
        for callback in [call for call, at in self._waiting.items() if at == chunk or self.damaged]:
            del self._waiting[callback]
            callback()


class GrowingBody:
    """A body that is being written: what is published of it may be sent.

    Its fill (leader or follower) alone calls `publish`, `complete` and `fail`. Waiters run at the first
    published byte and at the end at once, in between at most every 25 ms and only for 64 KiB more (or after
    200 ms): a thousand waiters must not eat the cores.
    """

    source = "fill"

    def __init__(self, head: Head, generation: int, file: OpenFile, now: float) -> None:
        """`now` is on the monotonic clock."""
        self.head = head
        self.generation = generation
        self.file = file
        self.published = 0
        self.failed = False
        self.readers = 0
        self._length: int | None = None
        self._waiting: dict[Callback, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._woken_at = 0.0
        self._woken_bytes = 0
        self._began_at = self._published_at = now
        self.on_leave: Callback | None = None
        self._began_bytes = 0

    @property
    def fd(self) -> int:
        return self.file.fd

    def seconds_to(self, offset: int, now: float) -> float:
        """How long the fill will take to reach `offset` at its present rate.

        Where nothing has come for a while, the time of that silence is the best guess.
        """
        missing = offset - self.published
        if missing <= 0:
            return 0.0
        gained = self.published - self._began_bytes
        silent_seconds = now - self._published_at
        return max(missing * (now - self._began_at) / gained if gained > 0 else 0.0, silent_seconds)

    def age_seconds(self, now: float) -> float:
        """How long it has been growing, as far as this process knows."""
        return now - self._began_at

    @property
    def ended(self) -> bool:
        return self.failed or self._length is not None

    def end(self) -> int | None:
        return self._length if self._length is not None else self.head.length

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.file.fd, length, offset))

    def available(self, offset: int, want: int) -> int:
        if offset < self.published:
            return min(want, self.published - offset)
        return CUT if self.failed else 0

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    def leave(self) -> None:
        self.readers -= 1
        if self.on_leave is not None:
            self.on_leave()

    def publish(self, size: int) -> None:
        """The first `size` bytes are in the file."""
        assert size >= self.published
        if size == self.published:
            return
        first = self.published == 0
        if first and size > _WAKE_BYTES:
            self._began_bytes = size  # a part that was there before says nothing of the rate
        self.published = size
        self._published_at = time.monotonic()
        if first or size == self.head.length:
            self._wake()
        elif self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def complete(self, length: int) -> None:
        """All is published, and right."""
        assert self.published == length
        self._length = length
        self._wake()

    def fail(self) -> None:
        """The rest will never come: readers are cut when they have sent what there is."""
        if not self.ended:
            self.failed = True
            self._wake()

    def _tick(self) -> None:
        self._timer = None
        due = time.monotonic() - self._woken_at >= _WAKE_AT_LATEST_SECONDS
        if due or self.published - self._woken_bytes >= _WAKE_BYTES:
            self._wake()
        elif self._waiting and self.published > self._woken_bytes:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken_at = time.monotonic()
        self._woken_bytes = self.published
        for callback in [c for c, at in self._waiting.items() if at < self.published or self.ended]:
            self._waiting.pop(callback, None)
            callback()
