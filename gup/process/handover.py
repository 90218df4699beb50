"""The handover from one program to another in the supervisor's process: `gup upgrade`.

The supervisor first has the new program tried in a process of its own, which reads the settings and imports
what children run. Then it replaces its own program by exec: process, children, sockets and locks stay. The
new program starts children of its own beside the old ones.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

import gup
from gup.config import Settings
from gup.errors import GupError
from gup.process.shared_memory import PAGE_FORMAT

VARIABLE = "_GUP_HANDOVER"
"""Of the environment: the descriptor of a memory file with a Handover."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Blocked while the program is replaced: they wait for the new one."""

_FORMAT = 1
_TRIAL_SECONDS = 30.0
_MOST_LINES = 10
_OUTPUT_BYTES = 65536
_LOADED = ("gup.process.worker", "gup.process.controller")


class KeptFile(BaseModel, frozen=True):
    """A file of counters; see Earlier for `moved`, which the present one doesn't have."""

    fd: int
    moved: dict[str, int] | None = None


class KeptChild(BaseModel, frozen=True):
    """A ChildSlot with a running process. `file` is the descriptor of the one that it counts in."""

    role: Literal["worker", "controller"]
    number: int
    block: int
    pid: int
    channel_fd: int
    file: int
    phase: str
    current: bool
    generation: int
    started_at: float
    ready_at: float


class Handover(BaseModel, frozen=True):
    """All that a supervisor has. `files`: the present one is the last."""

    format: int = _FORMAT
    page_format: int = PAGE_FORMAT
    version: str = gup.__version__
    pid: int
    settings: dict[str, Any]
    workers: int
    data_fds: list[int]
    admin_fds: list[int]
    peer_fds: list[int] = []
    shared_sockets: bool
    page_fd: int
    shares_fd: int
    event_fds: tuple[int, int]
    handed_fds: dict[str, tuple[int, int]]
    lock_fds: tuple[int, int]
    files: list[KeptFile]
    children: list[KeptChild]

    @property
    def descriptors(self) -> set[int]:
        pairs = (self.event_fds, self.lock_fds, *self.handed_fds.values())
        found = {*self.data_fds, *self.admin_fds, *self.peer_fds, self.page_fd, self.shares_fd}
        found |= {fd for pair in pairs for fd in pair}
        return found | {file.fd for file in self.files} | {child.channel_fd for child in self.children}

    def to_file(self) -> int:
        fd = os.memfd_create("gup-handover", os.MFD_CLOEXEC)
        os.write(fd, self.model_dump_json().encode())
        return fd

    def old_settings(self) -> Settings:
        return Settings.model_validate(self.settings)


def received(environment: Mapping[str, str]) -> Handover | None:
    """What the program before hands over, if it does; GupError when this version can't take it over."""
    if VARIABLE not in environment:
        return None
    fd = int(environment[VARIABLE])
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    given = json.loads(text)
    wanted, found = (_FORMAT, PAGE_FORMAT), (given.get("format"), given.get("page_format"))
    why = f"its processes share memory in another format ({found}, not {wanted})"
    if found == wanted:
        try:
            handover = Handover.model_validate(given)
            handover.old_settings()
        except ValidationError as error:
            why = "; ".join(str(error).splitlines()[1:3])
        else:
            return handover
    raise GupError(
        f"gup {gup.__version__} can't take over from a running gup {given.get('version')}: {why}; "
        "restart the service instead"
    )


def load_children() -> None:
    """Import what children run: that a module is missing or malformed shows here."""
    for name in _LOADED:
        importlib.import_module(name)


def command() -> list[str]:
    """The command line that started this process: the program may be another one now."""
    return [sys.executable, *sys.orig_argv[1:]]


class Trial:
    """A process that runs the new program, which says what it can't take over, and ends."""

    def __init__(self, handover: Handover, environment: Mapping[str, str]) -> None:
        """OSError when it can't be started."""
        self._output = os.memfd_create("gup-trial", os.MFD_CLOEXEC)
        given = handover.to_file()
        try:
            self.process = subprocess.Popen(  # noqa: S603 - our own command line
                command(),
                pass_fds=(given,),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env={**environment, VARIABLE: str(given)},
                process_group=0,
            )
        except BaseException:
            os.close(self._output)
            raise
        finally:
            os.close(given)
        self._until = time.monotonic() + _TRIAL_SECONDS

    def problems(self, now: float) -> list[str] | None:
        """None while it runs; what is wrong with the new program, nothing if it can take over."""
        status = self.process.poll()
        if status is None:
            if now < self._until:
                return None
            self.stop()
            return [f"the new program was not ready within {_TRIAL_SECONDS:g} s"]
        lines = os.pread(self._output, _OUTPUT_BYTES, 0).decode(errors="replace").splitlines()
        os.close(self._output)
        if status == 0 and lines and lines[-1].startswith(_CAN):
            return []
        return _told(lines) or [f"the new program ended with status {status}"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._output)


_CAN = "gup can take over: "


def say_so() -> None:
    """The last line of a trial that found nothing wrong."""
    print(f"{_CAN}{gup.__version__}", flush=True)  # noqa: T201 - read by Trial


def _told(lines: Sequence[str]) -> list[str]:
    """What a failed trial said: of a traceback the error and where it was raised."""
    if any(line.startswith("Traceback") for line in lines):
        places = [line.strip() for line in lines if line.startswith("  File ")]
        return [f"{lines[-1]} ({places[-1]})" if places else lines[-1]]
    return [line.removeprefix("gup: ") for line in lines if line.strip()][-_MOST_LINES:]


def replace_program(handover: Handover, environment: Mapping[str, str], waiting: Sequence[int]) -> None:
    """Become the new program, with the signals `waiting`; OSError when it can't be executed."""
    given = handover.to_file()
    kept = [*handover.descriptors, given]
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for number in waiting:
            os.kill(os.getpid(), number)
        for fd in kept:
            os.set_inheritable(fd, True)
        os.execve(command()[0], command(), {**environment, VARIABLE: str(given)})  # noqa: S606
    finally:
        for fd in kept:
            os.set_inheritable(fd, False)
        os.close(given)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
