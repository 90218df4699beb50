"""Claims: which process may fetch a key. Kernel byte-range locks on one file that is never written to."""

import errno
import os
from pathlib import Path

from gup.fsutil import is_range_locked, lock_range, unlock_range

_BESIDE = 1 << 62  # beyond every claim, which has 62 bits


def want_offset(key_id: str) -> int:
    """The lock that is held while clients wait for a body whose fill another process leads.

    `key_id` is the key's 32 digits, whose other half makes the claim's offset.
    """
    return int(key_id[16:], 16) >> 2 | _BESIDE


class Claims:
    """The claims that this process holds (gup.fsutil.lock_range).

    The kernel frees them however the process dies. Two holders in one process would share the open file and
    not see each other, so the set of held offsets is asked first.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held: set[int] = set()

    def try_claim(self, offset: int) -> bool:
        """Take the claim at `offset` (62 bits) if nobody has it; OSError when the lock table is full."""
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
        self._held.remove(offset)
        unlock_range(self._fd, offset)

    def held(self, offset: int) -> bool:
        """Whether this process holds the claim."""
        return offset in self._held

    def taken(self, offset: int) -> bool:
        """Whether any process holds the claim at this moment."""
        return offset in self._held or is_range_locked(self._fd, offset)

    def any_taken(self, first: int, count: int) -> bool:
        """Whether any process holds one of `count` claims from `first` on: one system call for all."""
        held = any(first <= offset < first + count for offset in self._held)
        return held or is_range_locked(self._fd, first, count)

    def close(self) -> None:
        """Give up all claims."""
        os.close(self._fd)
        self._held.clear()
