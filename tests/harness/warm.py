"""Starts without Python's own: services are forked off a template, a process that has imported gup already.

A start of a service costs 1.9 s of processor time, 1.6 of it for four interpreters and their imports, the
same each time: that was three quarters of the suite's. What results is what `python -m gup serve` makes: a
child of the test with these arguments, environment, folder and output, whose children the supervisor forks
where it would start an interpreter. In /proc all have the usual command lines and marks. `Gup` starts
interpreters where they matter, and everywhere with GUP_TEST_STARTS=python; tests that start the program
themselves start one, too.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.processes import MARK, environment

_ROOM = "x" * 200
"""An argument of the template: there its descendants' command lines are written."""
_NO_MARK = "0" * 32
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_REQUEST_BYTES = 1 << 17
_TESTS = Path(__file__).parents[1]
_PATH = ("PYTHONPATH", str(_TESTS.parent))


class Forked:
    """What subprocess.Popen has of a child, of one that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- the test's end


class Template:
    """Starts at the first request and ends with this process: both ends of `link` are closed then."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.link: socket.socket | None = None
        self._one = threading.Lock()

    def start(self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, output: int) -> Forked:
        """`gup` with these arguments, as a child of this process."""
        with self._one:
            if self.link is None:
                self._open()
            mask = int(Path("/proc/self/status").read_text().partition("\nUmask:")[2].split(None, 1)[0], 8)
            request = {"arguments": [*arguments], "env": dict(env), "folder": str(folder), "umask": mask}
            # whom the parent leaves becomes this process's child, not init's
            prctl = ctypes.CDLL(None).prctl
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.link, [json.dumps(request).encode()], [output])
                answer = self.link.recv(32)
            finally:
                prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert answer, "the template ended: its message is on standard error"
        return Forked(int(answer))

    def _open(self) -> None:
        self.link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.warm", str(other.fileno()), _ROOM],
                env=environment(_NO_MARK, {"PYTHONPATH": f"{_TESTS.parent}:{_TESTS}"}),
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )


TEMPLATE = Template()


def _network() -> Path:
    return Path("/proc/thread-self/ns/net").readlink()


_OWN_NETWORK = _network()
"""The template's: a test may have put this thread into another one, even before the template starts."""


def can_start(env: Mapping[str, str]) -> bool:
    """Whether a start by the template is an ordinary one: same interpreter, same network."""
    plain = all(name.startswith("GUP_") or (name, text) == _PATH for name, text in env.items())
    return plain and _network() == _OWN_NETWORK and os.environ.get("GUP_TEST_STARTS") != "python"


# --- the template's end

_IMPORTED = (
    *("gup.cli.app", "gup.cli.serve", "gup.cli.usable", "langcodes"),
    *("gup.process.supervisor", "gup.process.worker", "gup.process.controller"),
)


def _serve(link: socket.socket) -> list[str]:
    """Forks for each request. Returns in the new process, with its arguments."""
    for module in (
        "cli.app",
        "cli.serve",
        "cli.usable",
        "process.supervisor",
        "process.worker",
        "process.controller",
    ):
        importlib.import_module(f"gup.{module}")
    importlib.import_module("langcodes")
    child = sys.modules["gup.process.child"]
    child.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": _fork_child})  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()
    while True:
        text, descriptors, _, _ = socket.recv_fds(link, _REQUEST_BYTES, 1)
        if not text:
            sys.exit()
        told, tell = os.pipe()
        if between := os.fork():
            os.close(tell)
            with os.fdopen(told, "rb") as pid:
                answer = pid.read()
            os.waitpid(between, 0)
            os.close(descriptors[0])
            link.send(answer)
        elif pid := os.fork():
            os.write(tell, str(pid).encode())
            os._exit(0)
        else:
            break
    for descriptor in (told, tell):
        os.close(descriptor)
    link.close()
    for standard in (1, 2):
        os.dup2(descriptors[0], standard)
    os.close(descriptors[0])
    request = json.loads(text)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    _take_environment(request["env"])
    _show([sys.executable, "-m", "gup", *request["arguments"]], request["env"][MARK])
    return request["arguments"]


def _fork_child(
    command: Sequence[str], *, pass_fds: Sequence[int], stdin: int, env: Mapping[str, str], process_group: int
) -> Forked:
    """In the supervisor, instead of subprocess.Popen: the same process, without a new interpreter."""
    assert stdin == subprocess.DEVNULL, "as the supervisor's own is"
    if pid := os.fork():
        return Forked(pid)
    status = 1
    try:
        gc.freeze()  # else what the supervisor holds is closed as garbage, under numbers taken anew
        os.setpgid(0, process_group)
        for number in sorted(int(link.name) for link in Path("/proc/self/fd").iterdir()):
            if number > 2 and number not in pass_fds:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(number)
        _forget_signals()
        logging.getLogger().handlers.clear()
        _take_environment(env)
        _show(command)
        sys.argv = list(command[2:])
        del sys.modules[command[2]]
        status = _run(command[2])
    except BaseException:  # noqa: BLE001 - as an interpreter ends
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(module: str) -> int:
    """As an interpreter runs `-m module` and ends."""
    status: object = None
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as asked:
        status = asked.code
    except BaseException:  # noqa: BLE001 - whatever it is, an interpreter shows it
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _take_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _show(command: Sequence[str], mark: str = "") -> None:
    """Write the command line, and the mark into the environment, where /proc shows them (proc(5), stat)."""
    words = [int(word) for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1:]]
    arguments, arguments_end, variables, variables_end = words[44:48]
    size = arguments_end - arguments
    text = "\0".join(command).encode()[: size - 1]
    ctypes.memmove(arguments, text.ljust(size, b"\0"), size)
    if mark:
        empty = f"{MARK}={_NO_MARK}".encode()
        at = ctypes.string_at(variables, variables_end - variables).index(empty)
        ctypes.memmove(variables + at, f"{MARK}={mark}".encode(), len(empty))


if __name__ == "__main__":
    sys.argv = ["gup", *_serve(socket.socket(fileno=int(sys.argv[1])))]
    runpy.run_module("gup", run_name="__main__")
