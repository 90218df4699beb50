"""Chunks of bodies: their sums, and whether the bytes on disk agree with them. Blocks on the disk."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import xxhash

from gup.jsonmodel import InvalidError, Members, parse, shown

if TYPE_CHECKING:
    from gup.cache.records import Record

CHUNK_BYTES = 1 << 20
"""Bodies are summed in pieces of this size; the last piece is what is left."""
_SUMS = re.compile(r"[0-9a-f]*")


class ChunkSums:
    """Sums a body as it is written, piece after piece (xxh3-64 of each chunk)."""

    def __init__(self, done: list[int] | None = None) -> None:
        self.done: list[int] = done or []
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0

    def add(self, piece: bytes | memoryview) -> list[int]:
        """Sum `piece`; the sums of the chunks that it completed."""
        rest = memoryview(piece)
        completed: list[int] = []
        while rest:
            part = rest[: CHUNK_BYTES - self._open_bytes]
            self._open.update(part)
            self._open_bytes += len(part)
            rest = rest[len(part) :]
            if self._open_bytes == CHUNK_BYTES:
                completed.append(self._close())
        return completed

    def so_far(self) -> tuple[int, ...]:
        """The sums of all that was added; the last may be that of a chunk that is not whole yet."""
        return (*self.done, self._open.intdigest()) if self._open_bytes else tuple(self.done)

    def foretold(self, pieces: Iterable[bytes | memoryview]) -> list[int]:
        """The sums that adding `pieces`, the body's last, would bring about; nothing is added."""
        other = ChunkSums()
        other._open, other._open_bytes = self._open.copy(), self._open_bytes
        for piece in pieces:
            other.add(piece)
        return list(other.finish())

    def finish(self) -> tuple[int, ...]:
        """All sums of the body, a last short chunk included."""
        if self._open_bytes:
            self._close()
        return tuple(self.done)

    def _close(self) -> int:
        value = self._open.intdigest()
        self.done.append(value)
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0
        return value


def chunk_sum(piece: bytes | memoryview) -> int:
    """The sum of one whole chunk."""
    return xxhash.xxh3_64_intdigest(piece)


def pack_sums(sums: tuple[int, ...] | list[int]) -> str:
    """Sums as text: 16 hexadecimal digits each, joined."""
    return "".join(f"{value:016x}" for value in sums)


def unpack_sums(text: str, length: int) -> tuple[int, ...]:
    """What `pack_sums` packed of a body of `length` bytes; InvalidError when it is not such a text."""
    if not _SUMS.fullmatch(text) or len(text) != 16 * -(-length // CHUNK_BYTES):
        raise InvalidError(f"the chunk sums are not those of a body of {length} bytes: {shown(text)}")
    return tuple(int(text[at : at + 16], 16) for at in range(0, len(text), 16))


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(fields: dict[str, Any]) -> bytes:
    """`fields` as JSON with a `checksum` member over the rest."""
    checksum = xxhash.xxh3_64_hexdigest(_canonical(fields))
    return json.dumps({**fields, "checksum": checksum}, ensure_ascii=False, indent=1).encode() + b"\n"


def unseal(text: bytes, model: str, most_bytes: int) -> Members:
    """The members of a JSON text made by `seal`; InvalidError when it is too long or a bit of it is wrong."""
    members = Members(parse(text, model, most_bytes), model)
    checksum = members.values.pop("checksum", None)
    try:
        right = xxhash.xxh3_64_hexdigest(_canonical(members.values))
    except (ValueError, RecursionError) as error:  # what UTF-8 can't encode
        raise InvalidError(f"{model}: not what is written there: {error}") from error
    if checksum != right:
        raise InvalidError(f"{model}: the checksum is wrong")
    return members


_PROBE_STEP_BYTES = 128 * 1024


def span_of(record: "Record", chunk: int) -> tuple[int, int]:
    """Offset and length of a chunk, in bytes."""
    start = chunk * CHUNK_BYTES
    return start, min(CHUNK_BYTES, record.length - start)


def read_chunk(fd: int, record: "Record", chunk: int) -> bytes | None:
    """The chunk's bytes if they are those that were stored, else None: so is what can't be read at all."""
    start, length = span_of(record, chunk)
    try:
        piece = os.pread(fd, length, start)
    except OSError:
        return None
    return piece if is_sound(piece, record, chunk) else None


def is_sound(piece: bytes | bytearray, record: "Record", chunk: int) -> bool:
    """Whether `piece` is the whole chunk that was stored."""
    return len(piece) == span_of(record, chunk)[1] and chunk_sum(memoryview(piece)) == record.sums[chunk]


def read_aside(fd: int, record: "Record", chunk: int) -> bool:
    """Whether the chunk is sound, looked at without keeping its pages: clients' own stay in the page cache.

    Pages that were there before are compared as they are: they are what a client would be sent.
    """
    start, length = span_of(record, chunk)
    known = in_page_cache(fd, start, length)
    try:
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_RANDOM)  # no reading ahead into the next chunk
        sound = read_chunk(fd, record, chunk) is not None
        if not known:
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return sound


def is_chunk_sound(fd: int, record: "Record", chunk: int) -> bool:
    """Whether the chunk is what was stored. A mismatch counts when it is seen twice, then from the disk."""
    if read_chunk(fd, record, chunk) is not None:
        return True
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, *span_of(record, chunk), os.POSIX_FADV_DONTNEED)
    return read_chunk(fd, record, chunk) is not None


def sound_chunks(fd: int, record: "Record") -> int:
    """How many chunks from the first on are what was stored. Blocks for as long as reading them takes."""
    for chunk in range(len(record.sums)):
        if not is_chunk_sound(fd, record, chunk):
            return chunk
    return len(record.sums)


def in_page_cache(fd: int, start: int, length: int) -> bool:
    """Whether reading these bytes would not wait for the disk, by samples; never blocks."""
    probe = [bytearray(1)]
    try:
        for offset in (*range(start, start + length, _PROBE_STEP_BYTES), start + length - 1):
            if not os.preadv(fd, probe, offset, os.RWF_NOWAIT):
                return True  # shorter than recorded: whoever reads it finds out
    except OSError as error:
        # A file system that can't tell counts as warm; what can't be read is found out in the thread.
        return error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
    return True
