"""The file of a body that is arriving: appends, sums and withholds; never fetches, never commits."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from gup.cache.checksum import CHUNK_BYTES, ChunkSums, chunk_sum
from gup.cache.store import OpenFile, Store

WITHHELD_BYTES = 4096
"""The end of a body, written only when the whole has been found right: nobody ever holds a bad file whole."""
_ZIP_END = b"PK\5\6"
_ZIP_END_BYTES = 22
ZIP_TAIL_BYTES = _ZIP_END_BYTES + 0xFFFF
"""A ZIP's end record with the longest comment (APPNOTE.TXT 4.3.16)."""


@dataclass(frozen=True, slots=True)
class Salvage:
    """What a part left by a dead leader is worth: its size, and how far its chunks agree with their sums."""

    size: int
    verified: int
    sums: list[int]

    @property
    def whole(self) -> bool:
        """Whether no chunk that has a sum is damaged."""
        return len(self.sums) * CHUNK_BYTES == self.verified


def survey(part: Path, sums_file: Path) -> Salvage:
    """Compare a part with its sums. Blocks for as long as reading the part takes."""
    packed = sums_file.read_bytes() if sums_file.exists() else b""
    sums = [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed) // 8 * 8, 8)]
    with part.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        sums = sums[: size // CHUNK_BYTES]
        good = 0
        for expected in sums:
            if chunk_sum(os.pread(file.fileno(), CHUNK_BYTES, good * CHUNK_BYTES)) != expected:
                break
            good += 1
    return Salvage(size, good * CHUNK_BYTES, sums)


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
    """One part under one leader. `received` counts what was added, `written` what is published.

    Writing happens in a thread, one step at a time; `on_published` is called on the loop after each. The
    descriptors close with the last reference, so never under a thread that still writes.
    """

    def __init__(
        self,
        file: OpenFile,
        sums_file: OpenFile,
        executor: Executor,
        length: int | None,
        on_published: Callable[[int], None],
    ) -> None:
        self.received = 0
        self.written = 0
        self._file = file
        self._sums_file = sums_file
        self._sums = ChunkSums()
        self._executor = executor
        self._length = length
        self._on_published = on_published
        self._held = bytearray()
        """What was received and is not written: offsets from `written` on."""
        self._in_file = 0
        """How far the file goes: beyond `written` when a write was refused in its middle."""
        self._unsaved_sums = bytearray()

    @classmethod
    def create(
        cls,
        store: Store,
        id_: str,
        generation: int,
        executor: Executor,
        length: int | None,
        on_published: Callable[[int], None],
    ) -> "PartWriter":
        """A new, empty part; OSError when the disk refuses."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        file = OpenFile(store.part_path(id_, generation), flags)
        sums = OpenFile(store.sums_path(id_, generation), flags)
        return cls(file, sums, executor, length, on_published)

    @classmethod
    def reopen(
        cls,
        store: Store,
        id_: str,
        generation: int,
        executor: Executor,
        length: int | None,
        on_published: Callable[[int], None],
        salvage: Salvage,
    ) -> "PartWriter":
        """Go on with a part that `survey` found whole; its unsummed tail is summed. Blocks on the disk."""
        file = OpenFile(store.part_path(id_, generation), os.O_RDWR)
        sums = OpenFile(store.sums_path(id_, generation), os.O_RDWR | os.O_CREAT)
        writer = cls(file, sums, executor, length, on_published)
        os.ftruncate(sums.fd, 8 * len(salvage.sums))
        os.lseek(sums.fd, 0, os.SEEK_END)
        writer._sums = ChunkSums(list(salvage.sums))
        position = salvage.verified
        while position < salvage.size:
            piece = os.pread(file.fd, CHUNK_BYTES, position)
            writer._save_sums(writer._sums.add(piece))
            position += len(piece)
        writer.received = writer.written = writer._in_file = salvage.size
        return writer

    def copy_from(self, source: OpenFile, verified: int, sums: list[int]) -> None:
        """Begin with the good chunks of a damaged part. Blocks on the disk."""
        position = 0
        while position < verified:
            position += os.copy_file_range(source.fd, self._file.fd, verified - position, position, position)
        good = sums[: verified // CHUNK_BYTES]
        self._sums = ChunkSums(list(good))
        self._save_sums(good)
        self.received = self.written = self._in_file = verified

    def take(self, piece: bytes) -> None:
        """Take the next bytes into memory; `write_sure` is to follow."""
        self._held += piece
        self.received += len(piece)

    async def write_sure(self) -> None:
        """Write all but what is withheld. OSError when the disk refuses; it may be asked again."""
        last_sure = (self._length or self.received) - WITHHELD_BYTES
        await self._write(min(self.received, max(last_sure, self.written)) - self.written)

    async def add(self, piece: bytes) -> None:
        """Take and write."""
        self.take(piece)
        await self.write_sure()

    async def write_withheld(self) -> None:
        """Publish the end: the whole has been found right."""
        await self._write(len(self._held))

    @property
    def held(self) -> bytes:
        """What was received and is not published."""
        return bytes(self._held)

    @property
    def sums(self) -> tuple[int, tuple[int, ...]]:
        """How much the file has, and the sums of that."""
        return self._in_file, self._sums.so_far()

    async def settle(self) -> tuple[tuple[int, ...], int]:
        """Make it durable; the body's sums and the file's mtime (ns)."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._sync)

    async def reread(self, offset: int, length: int) -> bytes:
        """Bytes received before, be they written or withheld."""
        loop = asyncio.get_running_loop()
        in_file = max(0, min(length, self.written - offset))
        piece = (
            await loop.run_in_executor(self._executor, os.pread, self._file.fd, in_file, offset)
            if in_file
            else b""
        )
        if len(piece) < length:
            at = offset + len(piece) - self.written
            piece += bytes(self._held[at : at + length - len(piece)])
        return piece

    async def _write(self, amount: int) -> None:
        if amount <= 0:
            return
        piece = bytes(self._held[:amount])
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._write_now, piece)
        del self._held[:amount]
        self.written += amount
        self._on_published(self.written)

    def _write_now(self, piece: bytes) -> None:
        """Go on where the last try ended, be it in mid-piece or between bytes and sums."""
        while rest := memoryview(piece)[self._in_file - self.written :]:
            done = os.pwrite(self._file.fd, rest, self._in_file)
            self._unsaved_sums += _packed(self._sums.add(rest[:done]))
            self._in_file += done
        self._save_sums([])

    def _save_sums(self, completed: list[int]) -> None:
        self._unsaved_sums += _packed(completed)
        while self._unsaved_sums:
            done = os.write(self._sums_file.fd, self._unsaved_sums)
            del self._unsaved_sums[:done]

    def _sync(self) -> tuple[tuple[int, ...], int]:
        os.fsync(self._file.fd)
        return self._sums.finish(), os.fstat(self._file.fd).st_mtime_ns


def _packed(sums: list[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in sums)
