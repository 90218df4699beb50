"""A committed body for one reader, sent from memory, each byte compared a moment before; no descriptor.

For `cache.verify = "always"`: a chunk is read, compared with its sum, and sent from memory.
"""

import asyncio
import os
from concurrent.futures import Executor
from dataclasses import dataclass

from gup.cache.body import CUT, Callback
from gup.cache.checksum import CHUNK_BYTES
from gup.cache.chunks import is_sound, read_chunk, span_of
from gup.cache.entry import Entry
from gup.cache.store import OpenFile

_INLINE_BYTES = 128 * 1024
"""Shorter bodies are read and summed (some 30 µs) on the loop, if they are in the page cache."""
_WHOLE_CHUNKS_BYTES = 64 << 20
_SLICE_BYTES = 64 * 1024


@dataclass(slots=True)
class Holders:
    """How many readers of this process hold bytes. Beyond 64 MiB each keeps less of a chunk and reads it more
    often, so that memory stays bounded however many clients there are, and however slow.
    """

    count: int = 0

    @property
    def most_bytes(self) -> int:
        """How much a reader may keep."""
        return CHUNK_BYTES if self.count * CHUNK_BYTES <= _WHOLE_CHUNKS_BYTES else _SLICE_BYTES


class CheckedBody:
    """One reader's view of an entry; damage is the entry's affair."""

    source = "cache"
    fd = -1

    def __init__(self, entry: Entry, executor: Executor, holders: Holders) -> None:
        self.head = entry.head
        self._entry = entry
        self._executor = executor
        self._holders = holders
        self._held = memoryview(b"")
        self._held_at = 0
        self._holds = False
        self._reading = False
        self._waiting: Callback | None = None

    def end(self) -> int:
        return self._entry.end()

    def available(self, offset: int, want: int) -> int:
        held = self._held_at + len(self._held) - offset
        if offset >= self._held_at and held > 0:
            return min(want, held)
        chunk = offset // CHUNK_BYTES
        if self._entry.is_bad(chunk):
            return self._entry.missing(chunk)
        if not self._reading and not self._read_now(chunk, offset):
            self._read(chunk, offset)
            return 0
        return 0 if self._reading else min(want, len(self._held))

    def view(self, offset: int, length: int) -> memoryview:
        at = offset - self._held_at
        return self._held[at : at + length]

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting = callback
        if not self._reading:  # the chunk is being mended
            self._entry.wait(offset, self._wake)

    def forget(self, callback: Callback) -> None:  # noqa: ARG002 - there is one reader only
        self._waiting = None
        self._entry.forget(self._wake)

    def leave(self) -> None:
        """The reader is served or gone: nothing is held for it."""
        self._held = memoryview(b"")
        if self._holds:
            self._holds = False
            self._holders.count -= 1

    def unreadable(self) -> None:
        """Nothing: what is sent is in memory."""

    async def sound_at(self, offset: int) -> bool:
        """See Entry.sound_at."""
        while (amount := self.available(offset, 1)) == 0:
            looked = asyncio.Event()
            self.wait(offset, looked.set)
            try:
                await looked.wait()
            finally:
                self.forget(looked.set)
        return amount != CUT

    def read_all(self) -> bool:
        """Read all of a short body here and now; False when that is not to be had, and nothing is held."""
        record = self._entry.record
        return record.length <= _INLINE_BYTES and not self._entry.damaged and self._read_now(0, 0)

    # --- reading

    def _read_now(self, chunk: int, offset: int) -> bool:
        """Read a short chunk here, if that does not wait for the disk and it is sound."""
        record, fd = self._entry.record, self._entry.fd
        start, length = span_of(record, chunk)
        if length > _INLINE_BYTES:
            return False
        piece = bytearray(length)
        try:
            if os.preadv(fd, [piece], start, os.RWF_NOWAIT) != length:
                return False
        except OSError:
            return False
        if not is_sound(piece, record, chunk):
            return False  # found again, and told, by the thread
        self._hold(piece, start, offset)
        return True

    def _read(self, chunk: int, offset: int) -> None:
        self._reading = True
        entry, file = self._entry, self._entry.file
        future = asyncio.get_running_loop().run_in_executor(
            self._executor, read_chunk, file.fd, entry.record, chunk
        )
        future.add_done_callback(lambda done: self._read_done(chunk, offset, file, done))

    def _read_done(
        self, chunk: int, offset: int, file: OpenFile, done: "asyncio.Future[bytes | None]"
    ) -> None:
        self._reading = False
        if done.cancelled():
            return
        piece = done.result()
        if piece is not None:
            if self._waiting is not None:  # else the reader has gone
                self._hold(piece, span_of(self._entry.record, chunk)[0], offset)
        else:
            self._entry.found_bad(chunk, file)
            if self._entry.is_bad(chunk) and self._entry.missing(chunk) != CUT:
                self._entry.wait(offset, self._wake)
                return
        self._wake()

    def _hold(self, piece: bytes | bytearray, start: int, offset: int) -> None:
        if not self._holds:
            self._holds = True
            self._holders.count += 1
        kept = piece[offset - start : offset - start + self._holders.most_bytes]
        self._held, self._held_at = memoryview(kept), offset

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()
