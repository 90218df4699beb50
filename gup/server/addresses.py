"""How many connections each address has open on the whole machine; refuses nobody itself.

Every worker counts in a column of its own in a shared file: no locks, and whatever a killed worker counted
goes when its successor empties the column. A column is no table of addresses but two rows of counts, an
address having one place in each (a count-min sketch): small, bounded, and never too low. It is too high only
for an address that shares both its places with others, which the size makes rare.
"""

import logging
import mmap
import os
from pathlib import Path

import xxhash

log = logging.getLogger("gup.addresses")

_ROWS = 2
_PLACES = 1 << 16
_COLUMN_WORDS = _ROWS * _PLACES
_COLUMN_BYTES = 4 * _COLUMN_WORDS
_MASK = _PLACES - 1


class Addresses:
    """Open connections by address. This worker's own are counted exactly, those of the others by the file."""

    def __init__(self, path: Path, column: int, columns: int) -> None:
        """`column` of `columns` is this worker's. Where the file can't be had, each worker counts alone."""
        self._own: dict[str, int] = {}
        self._file = _map(path, columns)
        words = memoryview(self._file).cast("I")
        parts = [
            words[n * _COLUMN_WORDS : (n + 1) * _COLUMN_WORDS] for n in range(len(words) // _COLUMN_WORDS)
        ]
        alone = len(parts) < columns
        self._column = parts.pop(0 if alone else column)
        self._others = parts
        self._column[:] = memoryview(bytes(_COLUMN_BYTES)).cast("I")

    def come(self, address: str) -> int:
        """One connection more of the address; how many it has now."""
        mine = self._own.get(address, 0) + 1
        self._own[address] = mine
        column = self._column
        first, second = _places(address)
        column[first] += 1
        column[second] += 1
        elsewhere = 0
        for other in self._others:
            elsewhere += min(other[first], other[second])
        return mine + elsewhere

    def gone(self, address: str) -> None:
        """One connection less."""
        left = self._own[address] - 1
        if left:
            self._own[address] = left
        else:
            del self._own[address]
        for place in _places(address):
            self._column[place] -= 1

    def close(self) -> None:
        """Let go of the file."""
        for view in (self._column, *self._others):
            view.release()
        if isinstance(self._file, mmap.mmap):
            self._file.close()


def _places(address: str) -> tuple[int, int]:
    hashed = xxhash.xxh3_64_intdigest(address.encode())
    return hashed & _MASK, _PLACES + (hashed >> 32 & _MASK)


def _map(path: Path, columns: int) -> "mmap.mmap | bytearray":
    """The shared file, made as long as it has to be; memory for one column where that fails."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # every block is had before it is mapped: storing into a hole kills the process on a full disk
            os.posix_fallocate(fd, 0, columns * _COLUMN_BYTES)
            return mmap.mmap(fd, columns * _COLUMN_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        log.warning(
            "connections of an address are counted by each worker alone: %s: %s", path, error.strerror
        )
        return bytearray(_COLUMN_BYTES)
