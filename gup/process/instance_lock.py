"""The lock by which one cache directory belongs to one running service."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from gup.errors import StoreError

WAIT_SECONDS = 5.0
_POLL_SECONDS = 0.05


class InstanceLock:
    """Holds a cache directory by flock(2): the kernel unlocks a file when its last descriptor is closed.

    `instance.lock` is held by the supervisor alone. Children keep `children.lock` open and locked shared, so
    that a service whose supervisor was killed counts as running until its last child has exited.
    """

    def __init__(self, run: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        """Take both locks. StoreError names the processes that hold them longer than `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds
        self._own = _open(run / "instance.lock")
        self.children_fd = -1
        try:
            self.children_fd = _open(run / "children.lock")
            for fd in (self._own, self.children_fd):
                _lock(fd, run, deadline)
        except BaseException:
            self.close()
            raise
        # Unlocked in between, but only the holder of instance.lock locks children.lock.
        fcntl.flock(self.children_fd, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):  # a full disk; the pid is only for people
            os.ftruncate(self._own, 0)
            os.pwrite(self._own, b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        """Release the directory, unless a child still holds it."""
        os.close(self._own)
        if self.children_fd >= 0:
            os.close(self.children_fd)


def holders(run: Path) -> list[int]:
    """Pids of other processes that have a lock file open, as far as /proc shows them."""
    files = set()
    for name in ("instance.lock", "children.lock"):
        with contextlib.suppress(FileNotFoundError):
            stat = (run / name).stat()
            files.add((stat.st_dev, stat.st_ino))
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return sorted(pid for pid in pids if pid != os.getpid() and not files.isdisjoint(_open_files(pid)))


def _open_files(pid: int) -> set[tuple[int, int]]:
    """Device and inode of each open file; empty for an exited process or another user's."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile
                stat = entry.stat()
                found.add((stat.st_dev, stat.st_ino))
    return found


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"the cache directory can't be locked: {path}: {error.strerror}") from error


def _lock(fd: int, run: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                pids = holders(run)
                who = f"pid {', '.join(map(str, pids))}" if pids else "not visible from here"
                raise StoreError(f"another gup uses the cache directory {run.parent} ({who})") from error
        except OSError as error:
            raise StoreError(f"the cache directory can't be locked: {error.strerror}") from error
        else:
            return
        time.sleep(_POLL_SECONDS)
