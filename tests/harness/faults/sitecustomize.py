"""Injects faults into calls on files of a started service; owns no test, and is nothing that gup ships.

Python imports this at its start when this folder stands in PYTHONPATH (`harness.faulty.faults` sets that up).
`GUP_TEST_FAULTS` holds a JSON list of rules:

    {"call": "pwrite", "path": "partial/*.part", "nth": 3, "do": "ENOSPC"}

call   a name, or several with "|" between them, of `CALLS` below ("open" is both os.open and io.open).
path   pattern of the file's path, or of its end; of a rename the source's or the target's.
nth    the rule takes effect at this call of those that match, counted by process; absent: at every one.
do     an errno's name ("ENOSPC"): raised instead of the call. "kill": SIGKILL to this process before the
       call, "kill-after": after it. "sleep:0.2": that pause before it. "short": a write takes half, a read
       gives half. "log": nothing.
while  a file: the rule counts and takes effect only while that exists.
once   a file made at the first effect: the rule has no other, in whatever process, or after a restart.
role   "worker", "controller" or "supervisor": only there.

`GUP_TEST_FAULTS_LOG` names a file that gets a line `pid role call path number do` for every call that a rule
matched (`do` is "-" where it took no effect). Calls that C makes itself (sqlite, writes of file objects) are
not seen.
"""

import builtins
import errno
import fnmatch
import functools
import io
import json
import os
import signal
import sys
import threading
import time

_PATH = {"open", "unlink", "remove", "mkdir", "rmdir", "utime", "truncate", "listdir", "scandir", "stat"}
_TWO_PATHS = {"rename", "replace", "link"}
_FD = {"pwrite", "write", "fsync", "fdatasync", "pread", "preadv", "read", "posix_fallocate", "ftruncate"}
_TWO_FDS = {"sendfile": (1,), "copy_file_range": (0, 1)}
CALLS = _PATH | _TWO_PATHS | _FD | set(_TWO_FDS)
_WRITES = {"pwrite", "write"}
_READS = {"pread": 1, "read": 1, "sendfile": 3}
"""Position of the length among a reading call's arguments."""


def _role():
    words = " ".join(sys.orig_argv)
    for role in ("worker", "controller"):
        if f"gup.process.{role}" in words:
            return role
    return "supervisor"


class _Faults:
    def __init__(self, rules, log):
        self.role = _role()
        self.rules = [rule for rule in rules if rule.get("role", self.role) == self.role]
        self.counts = [0] * len(self.rules)
        self.log = log
        self.lock = threading.Lock()
        self.inside = threading.local()
        self.real = {name: getattr(os, name) for name in CALLS}

    def matching(self, call, paths):
        for at, rule in enumerate(self.rules):
            if call not in rule["call"].split("|"):
                continue
            pattern = rule.get("path", "*")
            found = [p for p in paths if fnmatch.fnmatch(p, pattern) or fnmatch.fnmatch(p, f"*/{pattern}")]
            if found:
                yield at, rule, found[0]

    def exists(self, path):
        try:
            self.real["stat"](path)
        except OSError:
            return False
        return True

    def takes_effect(self, at, rule):
        with self.lock:
            self.counts[at] += 1
            number = self.counts[at]
        if "nth" in rule and number != rule["nth"]:
            return number, False
        if "once" in rule:
            try:
                os.close(self.real["open"](rule["once"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return number, False
        return number, True

    def note(self, call, path, number, do):
        if self.log:
            line = f"{os.getpid()} {self.role} {call} {path} {number} {do}\n".encode()
            fd = self.real["open"](self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            self.real["write"](fd, line)
            os.close(fd)

    def actions(self, call, paths):
        """What is to be done about this call: (path, action) of each rule that takes effect."""
        found = []
        for at, rule, path in self.matching(call, paths):
            if "while" in rule and not self.exists(rule["while"]):
                continue
            number, effective = self.takes_effect(at, rule)
            self.note(call, path, number, rule["do"] if effective else "-")
            if effective:
                found.append((path, rule["do"]))
        return found

    def paths(self, call, arguments):
        try:
            if call in _PATH:
                return [_text(arguments[0])] if arguments else []
            if call in _TWO_PATHS:
                return [_text(argument) for argument in arguments[:2]]
            positions = _TWO_FDS.get(call, (0,))
            return [_file(arguments[at]) for at in positions]
        except (OSError, TypeError, ValueError):
            return []

    def call(self, call, function, arguments, keywords):
        if getattr(self.inside, "here", False):
            return function(*arguments, **keywords)
        self.inside.here = True
        try:
            actions = self.actions(call, self.paths(call, arguments))
        finally:
            self.inside.here = False
        after = False
        for path, do in actions:
            if do == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif do == "kill-after":
                after = True
            elif do.startswith("sleep:"):
                time.sleep(float(do.partition(":")[2]))
            elif do == "short":
                arguments = _shortened(call, arguments)
            elif do != "log":
                number = getattr(errno, do)
                raise OSError(number, os.strerror(number), path)
        result = function(*arguments, **keywords)
        if after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def _text(path):
    return _file(path) if isinstance(path, int) else os.fsdecode(path)


def _file(fd):
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - pathlib may be wrapped itself


def _shortened(call, arguments):
    changed = list(arguments)
    if call in _WRITES:
        changed[1] = memoryview(changed[1])[: max(1, len(changed[1]) // 2)]
    elif call in _READS and len(changed) > _READS[call]:
        changed[_READS[call]] = max(1, changed[_READS[call]] // 2)
    return tuple(changed)


def _wrapped(faults, call, function):
    @functools.wraps(function)
    def wrapper(*arguments, **keywords):
        return faults.call(call, function, arguments, keywords)

    return wrapper


def _install():
    faults = _Faults(json.loads(os.environ["GUP_TEST_FAULTS"]), os.environ.get("GUP_TEST_FAULTS_LOG"))
    wanted = {name for rule in faults.rules for name in rule["call"].split("|")}
    assert wanted <= CALLS, f"unknown calls: {wanted - CALLS}"
    for call in wanted:
        setattr(os, call, _wrapped(faults, call, faults.real[call]))
    if "open" in wanted:
        io.open = builtins.open = _wrapped(faults, "open", io.open)


if os.environ.get("GUP_TEST_FAULTS"):
    _install()
