"""The part of a fill: written, summed, its end withheld until the whole is verified."""

import asyncio
import errno
import os
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from gup.cache.disk import Room, Unstorable, on_disk
from gup.cache.records import CHUNK_BYTES, ChunkSums, chunk_sum
from gup.cache.store import OpenFile
from gup.files import start_writeback

_Result = TypeVar("_Result")
_FLUSH_BYTES = 8 << 20
"""Written to the disk in steps of this size, to avoid long bursts."""
WITHHELD_BYTES = 4096
"""The end of a body, written only when the whole has been verified: a bad file is never complete."""
_ZIP_END = b"PK\5\6"
_ZIP_END_BYTES = 22
ZIP_TAIL_BYTES = _ZIP_END_BYTES + 0xFFFF
"""A ZIP's end record with the longest comment (APPNOTE.TXT 4.3.16)."""


@dataclass(frozen=True, slots=True)
class Salvage:
    """The value of a dead leader's part: its size, and how far its chunks agree with their sums.

    `sealed`: all of it does, including a last short chunk; its sum is written when the body has been
    verified.
    """

    size: int
    verified: int
    sums: list[int]
    sealed: bool = False

    @property
    def whole(self) -> bool:
        """Whether no chunk that has a sum is damaged."""
        return len(self.sums) * CHUNK_BYTES == self.verified

    def holds(self, length: int | None) -> bool:
        """Whether it has every byte of a body of this length. Of an unknown one a short chunk is the end."""
        return self.sealed and (self.size == length if length is not None else self.size % CHUNK_BYTES > 0)


def survey(part: Path) -> Salvage:
    """Compare a part with its sums. Blocks for as long as reading the part takes."""
    sums_file = part.with_suffix(".sums")
    packed = sums_file.read_bytes() if sums_file.exists() else b""
    kept = [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed) // 8 * 8, 8)]
    with part.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        sums = kept[: size // CHUNK_BYTES]
        good = 0
        for expected in sums:
            if chunk_sum(os.pread(file.fileno(), CHUNK_BYTES, good * CHUNK_BYTES)) != expected:
                break
            good += 1
        sealed = good == size // CHUNK_BYTES and len(kept) == -(-size // CHUNK_BYTES) > 0
        if sealed and size % CHUNK_BYTES:
            sealed = chunk_sum(os.pread(file.fileno(), CHUNK_BYTES, good * CHUNK_BYTES)) == kept[-1]
    return Salvage(size, good * CHUNK_BYTES, sums, sealed)


def ends_as_named(part: Path, file: str) -> bool:
    """Whether the content of a complete part fits this file name: see `zip_end_is_right`."""
    if not file.lower().endswith(".zip"):
        return True
    with part.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        start = max(0, size - ZIP_TAIL_BYTES)
        return zip_end_is_right(os.pread(opened.fileno(), size - start, start))


def zip_end_is_right(tail: bytes) -> bool:
    """Whether `tail`, the last bytes of a body, ends in a ZIP's end record (APPNOTE.TXT 4.3.16)."""
    at = tail.rfind(_ZIP_END)
    while at >= 0:
        comment = int.from_bytes(tail[at + 20 : at + 22], "little")
        if at + _ZIP_END_BYTES + comment == len(tail):
            return True
        at = tail.rfind(_ZIP_END, 0, at)
    return False


class PartWriter:
    """One part under one leader. `received` counts bytes taken, `written` those that clients may be sent.

    Writing happens in a thread, one step at a time, and continues where a refused step ended. Files are made
    with the first write; descriptors close with the last reference: never under a thread that still writes.
    """

    def __init__(
        self,
        path: str | Path,
        room: Room,
        length: int | None,
        disk_is_bad: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`disk_is_bad` says why nothing must be stored now; it is asked before the files are made."""
        self.received = 0
        self.written = 0
        self._path = path
        self._file: OpenFile | None = None
        self._sums_file: OpenFile | None = None
        self._sums = ChunkSums()
        self._room = room
        self._disk_is_bad = disk_is_bad
        self.length = length
        self._held: deque[memoryview] = deque()
        """Received and not `written`."""
        self._in_file = 0
        """End of the file's bytes: beyond `written` when a step was refused in its middle."""
        self._unsaved_sums = bytearray()
        self._flushed = 0
        """Up to here the kernel was told to write the file to the disk."""
        self._in_memory = False

    def begin_in_memory(self, file: OpenFile) -> None:
        self._file, self._sums_file, self._in_memory = file, None, True
        self._unsaved_sums.clear()

    def reopen(self, salvage: Salvage) -> None:
        """Continue a part that `survey` found whole; its unsummed tail is summed. Blocks on the disk."""
        file = self._file = OpenFile(self._path, os.O_RDWR)
        if salvage.sums:
            sums_fd = self._opened_sums().fd
            os.ftruncate(sums_fd, 8 * len(salvage.sums))
            os.lseek(sums_fd, 0, os.SEEK_END)
        self._sums = ChunkSums(list(salvage.sums))
        position = salvage.verified
        while position < salvage.size:
            piece = os.pread(file.fd, CHUNK_BYTES, position)
            self._save_sums(self._sums.add(piece))
            position += len(piece)
        self.received = self.written = self._in_file = salvage.size

    def copy_from(self, source: OpenFile, salvage: Salvage) -> None:
        """Begin with the good chunks of a damaged part. Blocks on the disk."""
        position, own = 0, self._opened()
        while position < salvage.verified:
            rest = salvage.verified - position
            position += os.copy_file_range(source.fd, own.fd, rest, position, position)
        good = salvage.sums[: salvage.verified // CHUNK_BYTES]
        self._sums = ChunkSums(list(good))
        self._save_sums(good)
        self.received = self.written = self._in_file = salvage.verified

    def copy_memory(self, source: OpenFile, length: int) -> None:
        """Write a complete body from a memory file. Blocks on the disk; may be repeated."""
        file = self._opened()
        while self._in_file < length:
            self._append(file, os.pread(source.fd, min(CHUNK_BYTES, length - self._in_file), self._in_file))
        self._save_sums([])
        self.received = self.written = length

    def move(self, file: OpenFile) -> None:
        """Continue in `file`, a memory file, with all that was written.

        OSError when that is not what arrived: a write that failed late may have lost earlier bytes, which a
        read alone would not show. Blocks on the disk.
        """
        for chunk, expected in enumerate(self._sums.finish()):
            at = chunk * CHUNK_BYTES
            piece = memoryview(os.pread(self.file.fd, min(CHUNK_BYTES, self._in_file - at), at))
            if chunk_sum(piece) != expected:
                raise OSError(errno.EIO, "the bytes read back differ from those written")
            while piece:
                done = os.pwrite(file.fd, piece, at)
                piece, at = piece[done:], at + done
        self.begin_in_memory(file)

    @property
    def file(self) -> OpenFile:
        assert self._file is not None
        return self._file

    @property
    def exists(self) -> bool:
        """Whether some of it may be on the disk."""
        return (self._file is not None or self._sums_file is not None) and not self._in_memory

    # --- writing

    def take(self, piece: bytes) -> None:
        """Take the next bytes into memory; `write_sure` or `write_all` must follow."""
        self._held.append(memoryview(piece))
        self.received += len(piece)

    @property
    def unwritten(self) -> int:
        last_sure = (self.length or self.received) - WITHHELD_BYTES
        return min(self.received, max(last_sure, self.written)) - self.written

    async def write_sure(self, then: Callable[[], None] = lambda: None) -> None:
        """Write all but what is withheld, then call `then` in the same thread. DiskError when the disk
        refuses.
        """
        pieces = self._first_held(self.unwritten)

        def write() -> None:
            if pieces:
                self._write_now(pieces)
            then()

        await self._in_thread(write)
        self._note_written(pieces)

    async def write_all(self, then: Callable[[tuple[int, ...]], _Result], *, short: bool = False) -> _Result:
        """Write the rest, since the whole has been verified; then call `then` with the sums of the whole body
        in the same thread; `short`: that does not take long. DiskError as above.

        The sum of a last short chunk is written before its bytes: a part of full size is known to be
        complete.
        """
        pieces = list(self._held)

        def write() -> _Result:
            if self._sums_file is not None and self._in_file == self.written:
                foretold = _packed(self._sums.foretold(pieces))
                os.pwrite(self._sums_file.fd, foretold, 8 * len(self._sums.done))
            self._write_now(pieces)
            return then(self._sums.finish())

        result = await self._in_thread(write, short=short)
        self._note_written(pieces)
        return result

    async def reread(self, offset: int, length: int) -> bytes:
        """Bytes received before, whether written or not."""
        in_file = max(0, min(length, self.written - offset))
        at = offset + in_file - self.written
        held = b"".join(self._held)[at : at + length - in_file] if in_file < length else b""
        if not in_file:
            return held
        return await self._in_thread(os.pread, self.file.fd, in_file, offset) + held

    async def _in_thread(
        self, work: Callable[..., _Result], *arguments: object, short: bool = False
    ) -> _Result:
        """Without eviction for a memory file, since that frees no memory."""
        if self._in_memory:
            return await on_disk(self._room.executor, work, *arguments)
        return await self._room.on_disk(work, *arguments, short=short)

    def _first_held(self, amount: int) -> list[memoryview]:
        pieces = []
        for piece in self._held:
            if amount <= 0:
                break
            pieces.append(piece[:amount])
            amount -= len(piece)
        return pieces

    def _note_written(self, pieces: list[memoryview]) -> None:
        for piece in pieces:
            whole = self._held.popleft()
            if len(piece) < len(whole):
                self._held.appendleft(whole[len(piece) :])
            self.written += len(piece)

    def _write_now(self, pieces: list[memoryview]) -> None:
        """Continue where the last attempt ended, in mid-piece or between bytes and sums."""
        file, at = self._opened(), self.written
        if not self._in_file and len(pieces) > 1:  # one call for all of a small body
            pieces = [memoryview(b"".join(pieces))]
        for piece in pieces:
            while rest := piece[max(0, self._in_file - at) :]:
                self._append(file, rest)
            at += len(piece)
        if not self._in_memory and self._in_file - self._flushed >= _FLUSH_BYTES:
            start_writeback(file.fd, self._flushed, self._in_file - self._flushed)
            self._flushed = self._in_file
        self._save_sums([])

    def _append(self, file: OpenFile, piece: bytes | memoryview) -> None:
        done = os.pwrite(file.fd, piece, self._in_file)
        self._unsaved_sums += _packed(self._sums.add(memoryview(piece)[:done]))
        self._in_file += done

    def _save_sums(self, completed: list[int]) -> None:
        self._unsaved_sums += _packed(completed)
        if self._in_memory:  # no other process can take it over
            self._unsaved_sums.clear()
        while self._unsaved_sums:
            done = os.write(self._opened_sums().fd, self._unsaved_sums)
            del self._unsaved_sums[:done]

    def _opened(self) -> OpenFile:
        """The part. Its sums file is made with it if it will need one: later a descriptor may be missing."""
        if self._file is None:
            if (why := self._disk_is_bad()) is not None:
                raise Unstorable(why, disk=True)
            if (self.length or CHUNK_BYTES) >= CHUNK_BYTES:
                self._opened_sums()
            self._file = OpenFile(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        return self._file

    def _opened_sums(self) -> OpenFile:
        if self._sums_file is None:
            self._sums_file = OpenFile(Path(self._path).with_suffix(".sums"), os.O_RDWR | os.O_CREAT)
        return self._sums_file


def _packed(sums: list[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in sums)


_MOST_HELD_BYTES = 2 << 20
"""Reading pauses while this much waits for a slow disk."""


class WriteBehind:
    """Runs `write` in a task of its own while `writer` has bytes that may be written.

    A disk error is raised at the next call, or at the end of the `async with` block; a call that is waiting
    is woken. After the block, however it ended, no write is under way.
    """

    def __init__(self, writer: PartWriter, write: Callable[[], Awaitable[None]]) -> None:
        self._writer = writer
        self._write = write
        self._writing: asyncio.Task[None] | None = None
        self._limit: asyncio.Timeout | None = None

    async def begin(self, *, wait: bool = False) -> None:
        """Have all that may be written written soon; with `wait`, or when too much is held, return when it
        is.
        """
        if self._writing is not None and self._writing.done():
            await self._finish()
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_all())
            self._writing.add_done_callback(self._wake)
        if wait or self._writer.unwritten >= _MOST_HELD_BYTES:
            await self._finish()

    async def meanwhile(self, read: Callable[[], Awaitable[_Result]]) -> _Result:
        """What `read` returns; cancelled when the disk refuses a write, since the next piece may be long in
        coming.
        """
        if self._writing is not None and self._writing.done():
            await self._finish()
        try:
            async with asyncio.timeout(None) as self._limit:
                return await read()
        except TimeoutError:
            await self._finish()
            raise
        finally:
            self._limit = None

    def _wake(self, writing: asyncio.Task[None]) -> None:
        if self._limit is not None and not writing.cancelled() and writing.exception() is not None:
            self._limit.reschedule(0)

    async def _finish(self) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    async def _write_all(self) -> None:
        while self._writer.unwritten:
            await self._write()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            await self._finish()
        elif self._writing is not None:
            await asyncio.wait([self._writing])
            self._writing.exception()  # retrieved: the other error decides the fill's end
