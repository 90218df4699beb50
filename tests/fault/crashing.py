"""Records a process's changes to one folder, call by call, and kills it before the one that was asked for.

`install` puts itself under `os`, `io.open` and `fcntl`: production code knows nothing of it and pays nothing.
A step is one call that changes the folder or a lock on a file in it; step 1 is the first.
"""

import contextlib
import fcntl
import io
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES_NAMES = ("create", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
_real_open, _real_close, _real_readlink = os.open, os.close, os.readlink
_real_read, _real_write, _real_stat = os.read, os.write, os.stat
_real_unlink, _real_utime = os.unlink, os.utime


class Crash:
    """The plan for one process, and its log: a line a step, written past everything that is wrapped.

    `torn`: the fatal write is done by half. `group`: the parent process dies first, so that all end. What a
    rename replaces and an unlink removes is copied to the log's name with ".kept.<step>" first: a power cut
    may bring it back (`cut_power`).
    """

    def __init__(self, root: Path, log: Path, at: int, *, torn: bool = False, group: bool = False) -> None:
        self._root = os.path.realpath(root) + "/"
        self._kept = str(log) + ".kept"
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._at = at
        self._torn = torn
        self._group = group
        self._steps = 0
        self._lock = threading.Lock()

    def mark(self, text: str) -> None:
        """Note an event of the scenario among the steps."""
        _real_write(self._log, f"mark {text}\n".encode())

    def step(
        self, name: str, path: object, half: Callable[[], object] | None = None, source: object = None
    ) -> None:
        """One call is about to be made on `path` (a name or a descriptor), with what comes from `source`."""
        place = self.place(path)
        if place is None:
            return
        if source is not None:
            place = f"{self.place(source)}\t{place}"
        with self._lock:
            self._steps += 1
            if self._steps == self._at:
                if self._torn and half is not None:
                    half()
                    _real_write(self._log, f"{name} {place}\n".encode())
                if self._group:
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            if name in ("rename", "replace", "unlink", "remove"):
                _copy(path, f"{self._kept}.{self._steps}")
            _real_write(self._log, f"{name} {place}\n".encode())

    def place(self, path: object) -> str | None:
        try:
            named = _real_readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        except OSError:
            return None
        named = os.path.abspath(named)  # noqa: PTH100 - Path.resolve would follow links, and be slow
        return named.removeprefix(self._root) if named.startswith(self._root) else None


def _copy(source: Any, target: str) -> None:
    """Keep a file's bytes and time, if there is such a file."""
    try:
        fd = _real_open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    copy = _real_open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while piece := _real_read(fd, 1 << 20):
            _real_write(copy, piece)
        times = _real_stat(fd)
        _real_utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    except IsADirectoryError:
        _real_unlink(target)
    finally:
        _real_close(fd)
        _real_close(copy)


class _Raw(io.FileIO):
    """A file opened through `io.open`: its writes are steps."""

    crash: Crash

    def write(self, piece: Any) -> int | None:
        self.crash.step("write", self.fileno(), lambda: _real_write(self.fileno(), _half(piece)))
        return super().write(piece)


_ONE = ("unlink", "remove", "rmdir", "mkdir", "utime", "truncate", "ftruncate", "fsync", "fdatasync")
_TWO = ("rename", "replace", "link", "copy_file_range")


def install(crash: Crash) -> None:  # noqa: C901 - a table of calls
    """Wrap everything that changes files. For good: the process ends with it."""
    for name in _ONE + _TWO:
        _wrap(crash, name, on=int(name in _TWO))
    real_pwrite, real_open, real_io_open, real_fcntl = os.pwrite, os.open, io.open, fcntl.fcntl

    def write(fd: int, piece: Any) -> int:
        crash.step("write", fd, lambda: _real_write(fd, _half(piece)))
        return _real_write(fd, piece)

    def pwrite(fd: int, piece: Any, offset: int) -> int:
        crash.step("pwrite", fd, lambda: real_pwrite(fd, _half(piece), offset))
        return real_pwrite(fd, piece, offset)

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and not os.path.exists(path):  # noqa: PTH110 - called with texts too
            crash.step("create", path)
        elif flags & os.O_TRUNC and flags & (os.O_WRONLY | os.O_RDWR):
            crash.step("truncate", path)
        return real_open(path, flags, mode, dir_fd=dir_fd)

    def io_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if mode != "wb" or crash.place(file) is None:
            return real_io_open(file, mode, *rest, **named)
        crash.step("create", file)
        raw = _Raw(file, mode)
        raw.crash = crash
        return io.BufferedWriter(raw)

    def fcntl_(fd: int, command: int, *rest: Any) -> Any:
        if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW):
            crash.step("lock", fd)
        return real_fcntl(fd, command, *rest)

    os.write, os.pwrite, os.open, io.open, fcntl.fcntl = write, pwrite, open_, io_open, fcntl_


def _half(piece: Any) -> memoryview:
    return memoryview(piece)[: len(piece) // 2]


def _wrap(crash: Crash, name: str, on: int) -> None:
    real = getattr(os, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        crash.step(name, arguments[on], source=arguments[0] if on else None)
        return real(*arguments, **named)

    setattr(os, name, wrapped)


def cut_power(root: Path, log: Path, steps: list[str], chance: random.Random) -> None:
    """Leave below `root` what a power cut after these steps may leave.

    1. Names change in order (a journal's order), and only a sync of their folder or of the file system makes
    them sure: some of the last changes since then are undone, what they replaced or removed comes back.
    2. Files that were written and not synced afterwards are short, or end in zeros.
    """
    sure = max((at for at, line in enumerate(steps, 1) if _syncs_names(root, line)), default=0)
    names = [at for at, line in enumerate(steps, 1) if at > sure and line.split(" ")[0] in _CHANGES_NAMES]
    undone = names[chance.randrange(len(names) + 1) :]
    for at in reversed(undone):
        _undo(root, steps[at - 1], Path(f"{log}.kept.{at}"))
    left = steps[: undone[0] - 1] if undone else steps
    for name in unsynced(left):
        path = root / name
        if path.is_file() and path.parent.name != "run":
            _tear(path, chance)


def _syncs_names(root: Path, line: str) -> bool:
    name, _, place = line.partition(" ")
    return name == "syncfs" or (name == "fsync" and (root / place).is_dir())


def _undo(root: Path, line: str, kept: Path) -> None:
    name, _, place = line.partition(" ")
    source, _, target = place.rpartition("\t")
    path = root / target
    with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError, OSError):
        if name == "create":
            path.unlink()
        elif name in ("rename", "replace"):
            path.rename(root / source)
        elif name == "mkdir":
            path.rmdir()
        elif name == "rmdir":
            path.mkdir()
    if kept.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kept, path)


def _tear(path: Path, chance: random.Random) -> None:
    stat = path.stat()
    keep = chance.randrange(stat.st_size + 1)
    with path.open("r+b") as file:
        if chance.random() < 0.5:
            file.truncate(keep)
        else:
            file.seek(keep)
            file.write(bytes(stat.st_size - keep))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def unsynced(lines: list[str]) -> list[str]:
    """Files that were written and not made durable afterwards, under their last names: a power cut's prey.

    A rename may be tried twice, for want of its folder: the log tells what was begun.
    """
    dirty: dict[str, None] = {}
    moved: dict[str, str] = {}
    for line in lines:
        name, _, place = line.partition(" ")
        source, _, target = place.rpartition("\t")
        if name in ("write", "pwrite", "copy_file_range"):
            dirty[target] = None
        elif name in ("rename", "replace"):
            if moved.get(target) != source:
                dirty.pop(target, None)
            if source in dirty:
                del dirty[source]
                dirty[target] = None
                moved[target] = source
        elif name in ("fsync", "fdatasync", "unlink"):
            dirty.pop(place, None)
        elif name == "syncfs":
            dirty.clear()
    return list(dirty)
