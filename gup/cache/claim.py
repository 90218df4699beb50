"""Claims: which process may fetch a key. Kernel byte-range locks on one file that is never written to."""

import errno
import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid

_PASSING = 1 << 62  # beyond every claim, which has 62 bits


def passing_offset(claim_offset: int) -> int:
    """The lock beside a claim whose holder passes the body on and does not store it.

    A lock needs no room on a disk that has none: other processes learn of it whatever the disk refuses.
    """
    return claim_offset | _PASSING


def want_offset(key_id: str) -> int:
    """The lock that is held while clients wait for a body whose fill another process leads.

    `key_id` is the key's 32 digits, whose other half makes the claim's offset.
    """
    return passing_offset(int(key_id[16:], 16) >> 2)


def _lock(fd: int, kind: int, offset: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))


class Claims:
    """The claims that this process holds (F_OFD_SETLK write locks, fcntl(2)).

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
            _lock(self._fd, fcntl.F_WRLCK, offset)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        self._held.add(offset)
        return True

    def release(self, offset: int) -> None:
        self._held.remove(offset)
        _lock(self._fd, fcntl.F_UNLCK, offset)

    def held(self, offset: int) -> bool:
        """Whether this process holds the claim."""
        return offset in self._held

    def taken(self, offset: int) -> bool:
        """Whether any process holds the claim at this moment."""
        if offset in self._held:
            return True
        return self._locked(offset, 1)

    def any_taken(self, first: int, count: int) -> bool:
        """Whether any process holds one of `count` claims from `first` on: one system call for all."""
        return any(first <= held < first + count for held in self._held) or self._locked(first, count)

    def _locked(self, offset: int, length: int) -> bool:
        """Whether another process has a lock in this range."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
        return bool(_FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Give up all claims."""
        os.close(self._fd)
        self._held.clear()
