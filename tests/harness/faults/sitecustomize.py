"""Makes chosen system calls of the process that it is loaded into fail, wait or kill; for tests only.

Python imports a `sitecustomize` on PYTHONPATH before anything else. The plan is in the environment, in
GUP_TEST_FAULTS: a JSON list of rules, each an object of

call     a name (or a list of names) from the tables below, or "*" for all of them
path     pattern as for PurePath.match, compared from the right: "partial/*.part", "full.zip", ".*.gup"; of a
         call with two paths either may match; a descriptor counts as the path that it was opened by
do       an errno's name ("ENOSPC", "EIO", "EROFS", ...): fail with it, and do nothing
         "kill": SIGKILL to this process before the call; "kill-after": after it
         "kill-service": as "kill", but the parent and all its children at once
         "sleep:0.2": wait for so many seconds, then do the call
         "short:100": of a write, only the first 100 bytes
         "pass": nothing (to count or to log)
nth      act at the n-th matching call in this process only (from 1); without it at every one
from     act at the n-th matching call in this process and at every later one
while    act (and count) only while this file exists
once     this file is made, with the process' id in it, when the rule acts; it never acts where it exists:
         "kill" then strikes one process of all, and a test can wait for the file
offset   of a pread or preadv: match only where it begins at this byte of the file
process  "worker", "controller" or "supervisor": only there
log      a line "pid call path [path]" is appended to this file for each matching call

Every rule counts for itself; the first that acts decides, later ones don't see the call. Calls made from C
are not seen (SQLite, mmap, the writes of file objects; their `open` is seen, as "fopen").
"""

import builtins
import errno
import fcntl
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

BY_PATH = (
    "open", "unlink", "remove", "rmdir", "mkdir", "stat", "lstat", "statvfs", "scandir", "listdir", "utime",
    "truncate", "chmod", "access",
)  # fmt: skip
BY_TWO_PATHS = ("rename", "replace", "link", "symlink")
BY_DESCRIPTOR = (
    "write", "writev", "pwrite", "pwritev", "read", "readv", "pread", "preadv", "fsync", "fdatasync",
    "ftruncate", "fstat", "posix_fallocate", "lseek", "close",
)  # fmt: skip
SECOND_DESCRIPTOR = ("sendfile",)
TWO_DESCRIPTORS = ("copy_file_range",)
"""Besides these: `fopen` (open, io.open, Path.open and what uses it) and `fcntl` (fcntl.fcntl, locks)."""

_open, _write, _close, _readlink, _stat = os.open, os.write, os.close, os.readlink, os.stat
_ROLE = next(
    (name for name in ("worker", "controller") if f"gup.process.{name}" in sys.orig_argv), "supervisor"
)


def _path_of(argument: Any) -> str:
    if isinstance(argument, int):
        try:
            return _readlink(f"/proc/self/fd/{argument}").removesuffix(" (deleted)")
        except OSError:
            return ""
    try:
        return os.path.abspath(os.fsdecode(argument))  # noqa: PTH100 - it must not call what is wrapped
    except TypeError:
        return ""


def _exists(path: str) -> bool:
    try:
        _stat(path)
    except OSError:
        return False
    return True


class _Rule:
    def __init__(self, told: dict[str, Any]) -> None:
        call = told["call"]
        self.calls = [call] if isinstance(call, str) else call
        self.path = told["path"]
        self.do = told["do"]
        self.nth, self.first = told.get("nth"), told.get("from")
        self.flag, self.once, self.log = told.get("while"), told.get("once"), told.get("log")
        self.here = told.get("process", _ROLE) == _ROLE
        self.offset = told.get("offset")
        self.seen = 0

    def concerns(self, call: str) -> bool:
        return self.here and ("*" in self.calls or call in self.calls)

    def acts(self, call: str, paths: list[str], offset: Any) -> bool:
        """Whether the rule acts at this call; counts and logs it when it matches."""
        if not any(PurePath(path).match(self.path) for path in paths if path):
            return False
        if self.offset is not None and self.offset != offset:
            return False
        if self.flag is not None and not _exists(self.flag):
            return False
        self.seen += 1
        if self.log is not None:
            self._append(self.log, f"{os.getpid()} {call} {' '.join(paths)}\n")
        if self.nth is not None and self.seen != self.nth:
            return False
        if self.first is not None and self.seen < self.first:
            return False
        return self.once is None or self._first_of_all(self.once)

    @staticmethod
    def _append(path: str, line: str) -> None:
        fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        _write(fd, line.encode())
        _close(fd)

    @staticmethod
    def _first_of_all(path: str) -> bool:
        try:
            fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        _write(fd, str(os.getpid()).encode())
        _close(fd)
        return True


def _kill_service() -> None:
    parent = os.getppid()
    with open(f"/proc/{parent}/task/{parent}/children") as file:  # noqa: PTH123 - Path may be wrapped
        children = [int(word) for word in file.read().split()]
    for pid in (parent, *(child for child in children if child != os.getpid()), os.getpid()):
        os.kill(pid, signal.SIGKILL)


def _strike(do: str, original: Callable[..., Any], paths: list[str], args: Any, kwargs: Any) -> Any:
    word, _, amount = do.partition(":")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "kill-service":
        _kill_service()
    elif word == "sleep":
        time.sleep(float(amount))
    elif word == "short":
        args = (args[0], memoryview(args[1])[: int(amount)], *args[2:])
    elif word not in ("pass", "kill-after"):
        number = getattr(errno, word)
        raise OSError(number, os.strerror(number), *paths[:1])
    result = original(*args, **kwargs)
    if word == "kill-after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def _wrapped(
    call: str, original: Callable[..., Any], where: tuple[int, ...], rules: list[_Rule]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        paths = [_path_of(args[at]) for at in where if at < len(args)]
        for rule in rules:
            if rule.acts(call, paths, args[2] if len(args) > 2 else None):
                return _strike(rule.do, original, paths, args, kwargs)
        return original(*args, **kwargs)

    for names in (os.supports_fd, os.supports_dir_fd, os.supports_follow_symlinks, os.supports_effective_ids):
        if original in names:
            names.add(wrapper)
    return wrapper


def _install(rules: list[_Rule]) -> None:
    tables = {BY_PATH: (0,), BY_TWO_PATHS: (0, 1), BY_DESCRIPTOR: (0,)}
    tables |= {SECOND_DESCRIPTOR: (1,), TWO_DESCRIPTORS: (0, 1)}
    for names, where in tables.items():
        for name in names:
            if concerned := [rule for rule in rules if rule.concerns(name)]:
                setattr(os, name, _wrapped(name, getattr(os, name), where, concerned))
    if concerned := [rule for rule in rules if rule.concerns("fopen")]:
        builtins.open = io.open = _wrapped("fopen", io.open, (0,), concerned)
    if concerned := [rule for rule in rules if rule.concerns("fcntl")]:
        fcntl.fcntl = _wrapped("fcntl", fcntl.fcntl, (0,), concerned)


if "GUP_TEST_FAULTS" in os.environ:
    _install([_Rule(told) for told in json.loads(os.environ["GUP_TEST_FAULTS"])])
