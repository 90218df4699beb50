"""The lock by which one cache directory belongs to one running service."""

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path

from gup.errors import StoreError

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
_NAMES = ("instance.lock", "children.lock")


class InstanceLock:
    """Holds a cache directory by flock(2): the kernel unlocks a file when its last descriptor is closed.

    `instance.lock` is held by the supervisor alone. Children keep `children.lock` open and locked shared, so
    that a service whose supervisor was killed counts as running until its last child has exited.
    """

    def __init__(self, run: Path, wait_seconds: float = 0.0, fds: tuple[int, int] | None = None) -> None:
        """Take both locks. StoreError names the processes that hold them longer than `wait_seconds`.

        `fds` have them already: this process took them when it ran another program.
        """
        if fds is not None:
            self.fds = fds
            return
        deadline = time.monotonic() + wait_seconds
        with contextlib.ExitStack() as opened:
            taken = []
            try:
                for name in _NAMES:
                    taken.append(os.open(run / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                    opened.callback(os.close, taken[-1])
                for fd in taken:
                    _lock(fd, run, deadline)
            except OSError as error:
                raise StoreError(f"the cache directory can't be locked: {run}: {error.strerror}") from error
            own, children = self.fds = taken[0], taken[1]
            # Unlocked in between, but only the holder of instance.lock locks children.lock.
            fcntl.flock(children, fcntl.LOCK_SH)
            with contextlib.suppress(OSError):  # a full disk; the pid is only for people
                os.ftruncate(own, 0)
                os.pwrite(own, b"%d\n" % os.getpid(), 0)
            opened.pop_all()

    @property
    def children_fd(self) -> int:
        return self.fds[1]

    def close(self) -> None:
        """Release the directory, unless a child still holds it."""
        for fd in self.fds:
            os.close(fd)


def _lock(fd: int, run: Path, deadline: float) -> None:
    logged = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            left = deadline - time.monotonic()
            if left <= 0 or not logged:
                pids = ", ".join(map(str, holders(run)))
                who = f"pid {pids}" if pids else "its pid is not visible here"
                words = f"another gup uses the cache directory {run.parent} ({who})"
                if left <= 0:
                    raise StoreError(words) from error
                _LOG.warning("%s: waiting %.0f s for it to end", words, left)
                logged = True
        else:
            return
        time.sleep(_POLL_SECONDS)


def holders(run: Path) -> list[int]:
    """Pids of other processes that have a lock file open, as far as /proc shows them."""
    files = set()
    for name in _NAMES:
        with contextlib.suppress(FileNotFoundError):
            files.add(_identity((run / name).stat()))
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        pid = int(folder.parent.name)
        opened = set()
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # exited, or another user's
            for entry in entries:
                with contextlib.suppress(OSError):  # closed meanwhile
                    opened.add(_identity(entry.stat()))
        if pid != os.getpid() and files & opened:
            found.append(pid)
    return sorted(found)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
