"""Child processes: a child's slot in the supervisor, its start, and the control channel between both."""

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

from gup.config import Settings

if TYPE_CHECKING:
    from gup.process.shared_memory import SharedFile

Message = dict[str, Any]

READY_SECONDS = 30.0  # a child must report that it is ready within this time
BEAT_SECONDS = 30.0  # a child without a heartbeat for this long is considered hung
CLOSING_SECONDS = 2.0  # a child must exit this soon after it has closed its control channel
QUICK_SECONDS = 5.0  # a child that lived shorter failed quickly; each in a row delays the next start
_FIRST_MESSAGE_SECONDS = 10.0


# --- the supervisor's end


class Phase(Enum):
    WAITING = auto()
    STARTING = auto()
    READY = auto()
    LEAVING = auto()  # others serve in its place: it finishes what it has
    KILLED = auto()  # but not reaped yet
    ENDED = auto()  # no successor in this slot


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.STARTING, Phase.WAITING, Phase.ENDED}),
    Phase.STARTING: frozenset({Phase.READY, Phase.LEAVING, Phase.KILLED, Phase.WAITING, Phase.ENDED}),
    Phase.READY: frozenset({Phase.LEAVING, Phase.KILLED, Phase.WAITING, Phase.ENDED}),
    Phase.LEAVING: frozenset({Phase.KILLED, Phase.ENDED}),
    Phase.KILLED: frozenset({Phase.WAITING, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class Assignment(BaseModel, frozen=True):
    """The first message to a child. The descriptors are open in the child under these numbers.

    `listen_fds` are bound, listening and non-blocking; so are `peer_fds`, for members of the cluster.
    `page_fd` is for Page, with rows of `blocks` words, `shared_fd` for SharedFile, `shares_fd` for
    FairShares.
    `event_fd` is a SOCK_SEQPACKET socket: the workers' end or the controller's. By two others, `handed_fds`,
    leaving workers hand idle connections to those that take their place: the end to receive from, and the end
    to send to. `lock_fd` holds
    run/children.lock while it is open. `generation` is 1 for the first process in the place, and one more for
    each successor.
    """

    role: Literal["worker", "controller"]
    slot: int
    block: int
    blocks: int
    settings: Settings
    listen_fds: tuple[int, ...]
    peer_fds: tuple[int, ...] = ()
    handed_fds: tuple[int, int]
    page_fd: int
    shared_fd: int
    shares_fd: int
    event_fd: int
    lock_fd: int
    generation: int

    @property
    def descriptors(self) -> set[int]:
        own = self.page_fd, self.shared_fd, self.shares_fd, self.event_fd, self.lock_fd
        return {*own, *self.handed_fds, *self.listen_fds, *self.peer_fds}


@dataclass(slots=True, eq=False)
class ChildSlot:
    """A child and its successors: one worker number, or the controller. Times are monotonic seconds."""

    role: Literal["worker", "controller"]
    number: int
    block: int  # of counters in the shared file
    shared: "SharedFile | None" = None  # that it counts in
    phase: Phase = Phase.WAITING
    child: "Child | None" = None
    generation: int = 0
    start_at: float = 0.0
    started_at: float = 0.0
    ready_at: float = 0.0
    closed_at: float | None = None  # when the child closed its control channel
    leave_until: float = math.inf  # a child that is leaving must have exited by then
    quick_failures: int = 0

    @property
    def name(self) -> str:
        return f"worker {self.number}" if self.role == "worker" else self.role

    @property
    def inherited(self) -> bool:
        """Whether its process runs the program before this one."""
        return self.child is not None and isinstance(self.child.process, Inherited)

    def move(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], (self.phase, phase)
        self.phase = phase

    def start(self, now: float) -> None:
        self.move(Phase.STARTING)
        self.generation += 1
        self.started_at = now
        self.closed_at = None

    def became_ready(self, now: float) -> None:
        """A message that a killed child sent before its death changes nothing."""
        if self.phase is Phase.STARTING:
            self.move(Phase.READY)
            self.ready_at = now

    def exited(self, now: float, *, restart: bool) -> None:
        """With `restart` a successor is due after a delay."""
        self.child = None
        if not restart:
            self.move(Phase.ENDED)
            return
        self.quick_failures = self.quick_failures + 1 if now - self.started_at < QUICK_SECONDS else 0
        self.start_at = now + delay_seconds(self.quick_failures)
        self.move(Phase.WAITING)

    def reason_to_kill(self, now: float, last_beat: float, watched_from: float) -> str | None:
        """Why the child must be killed, or None.

        `last_beat` is 0 before the first heartbeat. Time before `watched_from` does not count: the whole
        machine may have been suspended. A controller need not send heartbeats before its first one.
        """
        if self.phase not in (Phase.STARTING, Phase.READY, Phase.LEAVING):
            return None
        if now > self.leave_until:
            return "it took too long to leave"
        if self.closed_at is not None and now - self.closed_at > CLOSING_SECONDS:
            return "it closed its control channel but did not exit"
        if self.phase is Phase.STARTING and now - max(self.started_at, watched_from) > READY_SECONDS:
            return f"it was not ready within {READY_SECONDS:g} s"
        beats = self.phase is not Phase.STARTING and (last_beat > 0 or self.role == "worker")
        if beats and now - max(last_beat, self.ready_at, watched_from) > BEAT_SECONDS:
            return f"it sent no heartbeat for {BEAT_SECONDS:g} s"
        return None


def delay_seconds(quick_failures: int) -> float:
    """Delay before the next start after that many quick failures in a row: 0, 0, 0.1, 0.2, … 5."""
    return 0.0 if quick_failures < 2 else min(0.1 * 2.0 ** min(quick_failures - 2, 10), 5.0)


class Channel:
    """One end of a control channel: each message is JSON in a memory file that is passed over the socket.

    The text itself would have to fit into the socket's buffer (212,992 bytes by default), and the settings of
    many upstreams don't. Each end trusts the other: both belong to one service.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.fileno, self.close = sock.fileno, sock.close
        sock.setblocking(False)

    def send(self, message: Message) -> bool:
        """False when the other end is closed or its queue is full."""
        with os.fdopen(os.memfd_create("gup-message", os.MFD_CLOEXEC), "wb") as file:
            file.write(json.dumps(message, separators=(",", ":")).encode())
            file.flush()
            try:
                socket.send_fds(self._socket, [b"\0"], [file.fileno()])
            except OSError:
                return False
        return True

    def receive(self) -> list[Message] | None:
        """All queued messages. None when the other end is closed and everything has been read."""
        messages: list[Message] = []
        with contextlib.suppress(BlockingIOError):
            while (message := self.receive_one()) is not None:
                messages.append(message)
            return messages or None
        return messages

    def receive_one(self) -> Message | None:
        """The next message; None at the end. BlockingIOError when none is queued."""
        fds: list[int] = []
        with contextlib.suppress(ConnectionError):
            _, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
        if not fds:
            return None
        with os.fdopen(fds[0], "rb") as file:
            file.seek(0)  # the sender's write has moved the shared offset
            message: Message = json.load(file)
        return message


class Process(Protocol):
    """What the supervisor uses of a subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def kill(self) -> None: ...


class Inherited:
    """A child process that the program which ran in this process before has started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        status = self._wait(0)
        assert status is not None
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


class Child(Channel):
    """A running child process, and the supervisor's end of the channel to it. Close it after its exit."""

    def __init__(self, sock: socket.socket, process: Process) -> None:
        super().__init__(sock)
        self.process = process

    @classmethod
    def start(
        cls, command_line: Sequence[str], assignment: Assignment, environment: Mapping[str, str]
    ) -> "Child":
        """Start the process and send its assignment. OSError when it can't be started."""
        own_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child_end:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own interpreter, no input of others
                    [*command_line, str(child_end.fileno())],
                    pass_fds=(*assignment.descriptors, child_end.fileno()),
                    stdin=subprocess.DEVNULL,
                    env=dict(environment),
                    process_group=0,  # Ctrl-C on the terminal reaches only the supervisor, which drains
                )
            except BaseException:
                own_end.close()
                raise
        child = cls(own_end, process)
        child.send(assignment.model_dump(mode="json", by_alias=True))
        return child


# --- the child's end


class Parent(Channel):
    """A child's end of the channel to its supervisor. When the channel ends, the child must exit."""

    def __init__(self, argv: Sequence[str] = sys.argv) -> None:
        """Wait for the assignment. SystemExit without a supervisor: `gup serve` alone starts children."""
        if len(argv) != 2 or not argv[1].isdecimal():
            raise SystemExit(f"{argv[0]} is started by gup serve only")
        super().__init__(socket.socket(fileno=int(argv[1])))
        first = None
        if select.select([self], [], [], _FIRST_MESSAGE_SECONDS)[0]:
            first = self.receive_one()  # the second message may be queued already: the event loop reads it
        if first is None:
            self.close()
            raise SystemExit("the supervisor is gone")
        self.assignment = Assignment.model_validate(first)
        # They were made inheritable for this process. Processes that it starts must not get them.
        for fd in (*self.assignment.descriptors, self.fileno()):
            os.set_inheritable(fd, False)
