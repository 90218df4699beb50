"""Processes: found in /proc, ended exactly where a test started them; waiting for a condition."""

import contextlib
import itertools
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
MEASURED = "COVERAGE_PROCESS_CONFIG"
"""Set by `coverage run`: a Python process that has it in its environment is measured."""
MARK = "SYSTEM_TEST_MARK"
"""In the environment of every process that a test starts, so that none can hide by changing its parent."""


def until(found: Callable[[], Found], what: str, timeout_seconds: float = 30.0) -> Found:
    """The first true answer of `found`; AssertionError naming `what` when the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = found()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds} s: {what} (last: {answer!r})")
        time.sleep(0.005)


def quiet_clock() -> float:
    """Monotonic seconds, without those in which a process of the machine waited for a processor.

    What is bounded by it may be late on a busy machine, for it was not given the time.
    """
    stalled = 0
    with contextlib.suppress(OSError):  # a kernel without pressure stall information
        stalled = int(_PRESSURE.read_text().partition("total=")[2].split()[0])
    return time.monotonic() - stalled / 1e6


_PRESSURE = Path("/proc/pressure/cpu")
_PORTS = range(10_000, 32_000)
"""Below those that the kernel gives to connections, which would take a free one before it is used."""
_next_port = itertools.cycle((*_PORTS[131 * os.getpid() % len(_PORTS) :], *_PORTS))
"""Test processes that run at the same time begin at different ones."""


def free_port() -> int:
    """A loopback port that nothing uses."""
    for port in _next_port:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def marked(mark: str) -> list[int]:
    """The living processes (no zombies) whose environment carries `mark`."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def environment(mark: str, extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of gup, marked; what it starts is not measured."""
    left_out = ("GUP_", "NOTIFY_", MEASURED)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, MARK: mark, **(extra or {})}


def end(process: subprocess.Popen[bytes], mark: str, timeout_seconds: float = 10.0) -> None:
    """SIGTERM, then SIGKILL, to the process and whatever it left behind."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_seconds)
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout_seconds)
    until(lambda: not marked(mark), "all processes of the test ended")


def children_of(pid: int) -> list[int]:
    """Read from one small file a thread: psutil would read the whole of /proc."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (thread / "children").read_text().split())
    return sorted(found)


def command_line(pid: int) -> list[str]:
    """The process's arguments; empty when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(address) == 0


def owners_of_connection(local_port: int, remote_port: int, among: list[int]) -> list[int]:
    """Which of the processes hold the loopback TCP connection from `local_port` to `remote_port`."""
    inodes = _asked_inodes(local_port, remote_port)
    if inodes is None:
        inodes = _listed_inodes(local_port, remote_port)
    links = {f"socket:[{inode}]" for inode in inodes}
    return [pid for pid in among if links & set(open_files(pid))]


def _asked_inodes(local_port: int, remote_port: int) -> set[int] | None:
    """From 127.0.0.1 to 127.0.0.1, by sock_diag(7): the list would go through all that the kernel has.

    None when there is no such connection; none of a process while it waits to be accepted.
    """
    address = socket.inet_aton("127.0.0.1") + bytes(12)
    wanted = _DIAG_REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0xFFFFFFFF) + _PORTS_OF.pack(
        local_port, remote_port
    )
    wanted += 2 * address + bytes(4) + b"\xff" * 8
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as asking:
        asking.send(_MESSAGE.pack(_MESSAGE.size + len(wanted), _BY_FAMILY, _REQUEST, 0, 0) + wanted)
        answer = asking.recv(4096)
    if _MESSAGE.unpack_from(answer)[1] != _BY_FAMILY:
        return None
    (inode,) = _INODE.unpack_from(answer)
    return {inode} - {0}


_MESSAGE = struct.Struct("=IHHII")
_DIAG_REQUEST = struct.Struct("=BBxxI")
_PORTS_OF = struct.Struct("!HH")
_INODE = struct.Struct("=84xI")
_NETLINK_SOCK_DIAG, _BY_FAMILY, _REQUEST = 4, 20, 1


def _listed_inodes(local_port: int, remote_port: int) -> set[int]:
    ends = re.compile(rf"^ *\d+: \w+:{local_port:04X} \w+:{remote_port:04X} .*$", re.MULTILINE)
    return {int(line.split()[9]) for line in ends.findall(Path("/proc/net/tcp").read_text())}


def open_files(pid: int) -> list[str]:
    """What the process's descriptors point to; empty when it is gone."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(str(link.readlink()))
    return found


@contextlib.contextmanager
def only_descriptors(pid: int, spare: int) -> Iterator[None]:
    """Meanwhile the process can open `spare` descriptors more than it has, and no more."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in range(hard) if number not in used)
    most = next(number for place, number in enumerate(free) if place == spare)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
