"""Chunks of bodies: their sums, and whether the bytes on disk agree with them. Blocks on the disk."""

import contextlib
import errno
import os

from gup.cache.records import CHUNK_BYTES, Record, chunk_sum

_PROBE_STEP_BYTES = 128 * 1024


def span_of(record: Record, chunk: int) -> tuple[int, int]:
    """Offset and length of a chunk, in bytes."""
    start = chunk * CHUNK_BYTES
    return start, min(CHUNK_BYTES, record.length - start)


def _agrees(fd: int, record: Record, chunk: int) -> bool:
    """Whether the chunk's bytes are those that were stored; what can't be read at all is not."""
    start, length = span_of(record, chunk)
    try:
        piece = os.pread(fd, length, start)
    except OSError:
        return False
    return len(piece) == length and chunk_sum(piece) == record.sums[chunk]


def read_aside(fd: int, record: Record, chunk: int) -> bool:
    """Whether the chunk is sound, looked at without keeping its pages: clients' own stay in the page cache.

    Pages that were there before are compared as they are: they are what a client would be sent.
    """
    start, length = span_of(record, chunk)
    known = in_page_cache(fd, start, length)
    try:
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_RANDOM)  # no reading ahead into the next chunk
        sound = _agrees(fd, record, chunk)
        if not known:
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return sound


def is_chunk_sound(fd: int, record: Record, chunk: int) -> bool:
    """Whether the chunk is what was stored. A mismatch counts when it is seen twice, then from the disk."""
    if _agrees(fd, record, chunk):
        return True
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, *span_of(record, chunk), os.POSIX_FADV_DONTNEED)
    return _agrees(fd, record, chunk)


def sound_chunks(fd: int, record: Record) -> int:
    """How many chunks from the first on are what was stored. Blocks for as long as reading them takes."""
    chunks = range(len(record.sums))
    return next((chunk for chunk in chunks if not is_chunk_sound(fd, record, chunk)), len(chunks))


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
