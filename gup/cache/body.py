"""Bodies as a connection reads them, and the committed ones; never fetches, never sends."""

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

Callback = Callable[[], None]


class Body(Protocol):
    """What a connection needs of a body. Offsets and lengths in bytes."""

    @property
    def head(self) -> Head:
        """What is told of it."""

    @property
    def source(self) -> str:
        """Under which name its bytes are counted."""

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

    def unreadable(self) -> None:
        """Sending from `fd`, or `view`, raised an error of the disk: this reader is being cut."""


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

    def unreadable(self) -> None:
        """Nobody shall get it any more: a miss fetches it anew."""
        self._spoil()

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
            # A file system that can't tell counts as warm; what can't be read is found out in the thread.
            return error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
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
        else:
            self._spoil()
        for callback in [call for call, at in self._waiting.items() if at == chunk or self.damaged]:
            del self._waiting[callback]
            callback()

    def _spoil(self) -> None:
        if not self.damaged:
            self.damaged = True
            self.all_verified = False
            self._on_damage(self)
