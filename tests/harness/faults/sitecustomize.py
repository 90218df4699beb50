"""Makes chosen system calls of the process that it is loaded into fail, wait or kill; for tests only.

Python imports a `sitecustomize` on PYTHONPATH before anything else. The plan is in the environment, in
GUP_TEST_FAULTS: a JSON list of rules, each an object of

call     a name (or a list of names) from the tables below
path     pattern as for PurePath.match, compared from the right: "partial/*.part", "full.zip", ".*.gup"; of a
         call with two paths either may match; a descriptor counts as the path that it was opened by
do       an errno's name ("ENOSPC", "EIO", "EROFS", ...): fail with it, and do nothing
         "kill": SIGKILL to this process before the call; "kill-after": after it
         "kill-service": as "kill", but the parent and all its children at once
         "sleep:0.2": wait for so many seconds, then do the call
         "short:100": of a write, only the first 100 bytes
         "pass": nothing (to log)
nth      act at the n-th matching call in this process only (from 1); without it at every one
from     act at the n-th matching call in this process and at every later one
while    act (and count) only while this file exists
once     this file is made, with the process' id in it, when the rule acts; it never acts where it exists:
         "kill" then strikes one process of all, and a test can wait for the file
offset   of a pread: match only where it begins at this byte of the file
process  "worker" or "controller": only there
log      a line "pid call path [path]" is appended to this file for each matching call

Every rule counts for itself; the first that acts decides, later ones don't see the call. Calls made from C
are not seen (SQLite, mmap, the writes of file objects; their `open` is seen, as "fopen").

And `time.time` adds what stands in the file GUP_TEST_CLOCK, at every call; monotonic time stays.
"""

import builtins
import errno
import functools
import io
import json
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

PATHS_OF = {
    (0,): "open unlink mkdir utime write pwrite pread fsync fdatasync ftruncate",
    (0, 1): "rename",
    (1,): "sendfile",
}
"""Which arguments of a call are paths or descriptors. Besides: `fopen` is open, io.open, Path.open."""

_open, _write, _close, _readlink, _stat = os.open, os.write, os.close, os.readlink, os.stat
_ROLE = next(
    (name for name in ("worker", "controller") if f"gup.process.{name}" in sys.orig_argv), "supervisor"
)


def _path_of(argument: Any) -> str:
    try:
        if isinstance(argument, int):
            return _readlink(f"/proc/self/fd/{argument}").removesuffix(" (deleted)")
        return os.path.abspath(os.fsdecode(argument))  # noqa: PTH100 - it must not call what is wrapped
    except (OSError, TypeError):
        return ""


def _exists(path: str) -> bool:
    try:
        _stat(path)
    except OSError:
        return False
    return True


def _put(path: str, text: str, flags: int) -> None:
    fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o644)
    _write(fd, text.encode())
    _close(fd)


class _Rule:
    def __init__(self, told: dict[str, Any]) -> None:
        self.calls = [told["call"]] if isinstance(told["call"], str) else told["call"]
        self.do = told["do"]
        self.told = told
        self.here = told.get("process", _ROLE) == _ROLE
        self.seen = 0

    def acts(self, call: str, paths: list[str], offset: Any) -> bool:
        """Whether the rule acts at this call; counts and logs it when it matches."""
        told = self.told
        if not any(PurePath(path).match(told["path"]) for path in paths if path):
            return False
        if told.get("offset", offset) != offset or ("while" in told and not _exists(told["while"])):
            return False
        self.seen += 1
        if "log" in told:
            _put(told["log"], f"{os.getpid()} {call} {' '.join(paths)}\n", os.O_APPEND)
        if told.get("nth", self.seen) != self.seen or told.get("from", 0) > self.seen:
            return False
        try:
            if "once" in told:
                _put(told["once"], str(os.getpid()), os.O_EXCL)
        except FileExistsError:
            return False
        return True


def _kill(*, service: bool) -> None:
    if service:
        parent = os.getppid()
        with open(f"/proc/{parent}/task/{parent}/children") as file:  # noqa: PTH123 - Path may be wrapped
            children = [int(word) for word in file.read().split()]
        for pid in (parent, *(child for child in children if child != os.getpid())):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _strike(do: str, original: Callable[..., Any], paths: list[str], args: Any, kwargs: Any) -> Any:
    word, _, amount = do.partition(":")
    if word in ("kill", "kill-service"):
        _kill(service=word == "kill-service")
    elif word == "sleep":
        time.sleep(float(amount))
    elif word == "short":
        args = (args[0], memoryview(args[1])[: int(amount)], *args[2:])
    elif word not in ("pass", "kill-after"):
        number = getattr(errno, word)
        raise OSError(number, os.strerror(number), *paths[:1])
    result = original(*args, **kwargs)
    if word == "kill-after":
        _kill(service=False)
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

    for names in (os.supports_fd, os.supports_dir_fd, os.supports_follow_symlinks):
        if original in names:
            names.add(wrapper)
    return wrapper


def _install(rules: list[_Rule]) -> None:
    for where, names in PATHS_OF.items():
        for name in names.split():
            if concerned := [rule for rule in rules if rule.here and name in rule.calls]:
                setattr(os, name, _wrapped(name, getattr(os, name), where, concerned))
    if concerned := [rule for rule in rules if rule.here and "fopen" in rule.calls]:
        builtins.open = io.open = _wrapped("fopen", io.open, (0,), concerned)


if "GUP_TEST_FAULTS" in os.environ:
    _install([_Rule(told) for told in json.loads(os.environ["GUP_TEST_FAULTS"])])

if "GUP_TEST_CLOCK" in os.environ:
    _fd = _open(os.environ["GUP_TEST_CLOCK"], os.O_RDONLY | os.O_CLOEXEC)
    _page = mmap.mmap(_fd, 8, prot=mmap.PROT_READ)
    _close(_fd)
    _real = time.time
    time.time = lambda: _real() + struct.unpack("=d", _page[:8])[0]
