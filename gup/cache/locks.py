"""Locks that all processes share: claims of keys, and slots for work that is limited per machine."""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gup.files import is_range_locked, lock_range, unlock_range

_BESIDE = 1 << 62  # beyond every claim, which has 62 bits


def claim_offset(id_: str) -> int:
    """ContentKey.claim_offset of the key with this id."""
    return int(id_[:16], 16) >> 2


def waiters_offset(id_: str) -> int:
    """The lock that is held while clients wait for a body whose fill another process leads."""
    return int(id_[16:], 16) >> 2 | _BESIDE


def aside_offset(id_: str, generation: int) -> int:
    """The lock that a leader holds whose body was purged, as long as it goes on for those that read it."""
    return (int(id_[16:], 16) ^ generation * 0x9E3779B97F4A7C15) & (1 << 62) - 1 | _BESIDE


class Claims:
    """The claims that this process holds (gup.files.lock_range).

    The kernel frees them however the process dies. Two holders in one process would share the open file and
    not see each other, so the set of held offsets is checked first.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held: set[int] = set()
        self._threads = threading.Lock()

    def try_claim(self, offset: int) -> bool:
        """Take the claim at `offset` (62 bits) if it is free; OSError when the lock table is full."""
        with self._threads:
            if offset in self._held:
                return False
            try:
                lock_range(self._fd, offset, wait=False)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return False
                raise
            self._held.add(offset)
            return True

    def release(self, offset: int) -> None:
        with self._threads:
            self._held.remove(offset)
            unlock_range(self._fd, offset)

    def held(self, offset: int) -> bool:
        return offset in self._held

    def taken(self, offset: int) -> bool:
        return offset in self._held or is_range_locked(self._fd, offset)

    def any_taken(self, first: int, count: int) -> bool:
        """Whether any process holds one of `count` claims from `first` on: one system call for all."""
        held = any(first <= offset < first + count for offset in self._held)
        return held or is_range_locked(self._fd, first, count)

    def close(self) -> None:
        os.close(self._fd)
        self._held.clear()


class Occupied:
    """Whether a key may have files in the cache directory: a byte for each hash, in memory of all processes.

    A byte is set before a key's first file is made, and for the rest of the run. So a miss of what was never
    here needs no look at the disk. Until the directory has been gone through, any key may have files.
    """

    def __init__(self, table: "memoryview[int]") -> None:
        """`table`: bytes, the first of which says whether it is complete."""
        self._table = table
        self._slots = len(table) - 1

    def note(self, offset: int) -> None:
        """A key's claim is at `offset`."""
        self._table[1 + offset % self._slots] = 1

    def maybe(self, offset: int) -> bool:
        return not self._table[0] or self._table[1 + offset % self._slots] != 0

    def complete(self) -> None:
        self._table[0] = 1


@dataclass(frozen=True, slots=True)
class Slots:
    """`count()` byte locks from `first` on: each is one slot, freed by the kernel if its holder dies."""

    claims: Claims
    first: int
    count: Callable[[], int]

    def try_take(self, most: int | None = None) -> int | None:
        """A free slot, if any; with `most`, one of the first `most`."""
        count = self.count() if most is None else min(most, self.count())
        return next(
            (slot for slot in range(self.first, self.first + count) if self.claims.try_claim(slot)), None
        )

    def give_back(self, slot: int) -> None:
        self.claims.release(slot)

    def taken(self) -> int:
        """Slots held by all processes now: a system call for each, if there are any."""
        first, count = self.first, self.count()
        if not self.claims.any_taken(first, count):
            return 0
        return sum(self.claims.taken(slot) for slot in range(first, first + count))
