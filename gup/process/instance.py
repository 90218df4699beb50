"""One service on one cache directory: the locks below run/, and who holds them; starts and ends nobody."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from gup.errors import StoreError

WAIT_SECONDS = 5.0
_POLL_SECONDS = 0.05


class Instance:
    """The hold on a cache directory. flock(2): the kernel frees it when the last copy of the file is closed.

    `instance.lock` is the supervisor's own. Children keep `children.lock` open, shared, so that a service
    whose supervisor was killed still counts as running until its last child has gone.
    """

    def __init__(
        self,
        run: Path,
        wait_seconds: float = WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """StoreError, naming the holders, when they do not go within the time."""
        self._wait = (clock() + wait_seconds, clock, sleep)
        self._own = _opened(run / "instance.lock")
        self.children_fd = -1
        try:
            self.children_fd = _opened(run / "children.lock")
            self._take(self._own, run)
            self._take(self.children_fd, run)
        except BaseException:
            self.close()
            raise
        # Nobody can come between: who wants children.lock must hold instance.lock first.
        fcntl.flock(self.children_fd, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):  # a full disk; the pid is for people only
            os.ftruncate(self._own, 0)
            os.pwrite(self._own, b"%d\n" % os.getpid(), 0)

    def _take(self, fd: int, run: Path) -> None:
        deadline, clock, sleep = self._wait
        while not _locked(fd):
            if clock() >= deadline:
                raise StoreError(_refusal(run))
            sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Let the directory go, as far as no child holds it."""
        os.close(self._own)
        if self.children_fd >= 0:
            os.close(self.children_fd)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"the cache directory can't be locked: {path}: {error.strerror}") from error


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise StoreError(f"the cache directory can't be locked: {error.strerror}") from error
    return True


def _refusal(run: Path) -> str:
    pids = holders(run)
    who = f"pid {', '.join(map(str, pids))}" if pids else "not visible from here"
    return f"another gup uses the cache directory {run.parent} ({who})"


def holders(run: Path) -> list[int]:
    """Processes, other than this one, that have a lock file open; of those that /proc shows to us."""
    files = set()
    for name in ("instance.lock", "children.lock"):
        with contextlib.suppress(FileNotFoundError):
            stat = (run / name).stat()
            files.add((stat.st_dev, stat.st_ino))
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return sorted(pid for pid in pids if pid != os.getpid() and _has_open(pid, files))


def _has_open(pid: int, files: set[tuple[int, int]]) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_is_one_of(entry, files) for entry in entries)
    except OSError:  # ended meanwhile, or another user's
        return False


def _is_one_of(entry: os.DirEntry[str], files: set[tuple[int, int]]) -> bool:
    try:
        stat = entry.stat()
    except OSError:  # closed meanwhile
        return False
    return (stat.st_dev, stat.st_ino) in files
