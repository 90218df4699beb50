"""Child processes: a child's slot in the supervisor, its start, and the control channel between both."""

import array
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import Any, Literal

from gup.config import Settings

Role = Literal["worker", "controller"]
Message = dict[str, Any]

READY_SECONDS = 30.0
"""A child must report that it is ready within this time."""
BEAT_SECONDS = 30.0
"""A child without a heartbeat for this long is considered hung."""
CLOSING_SECONDS = 2.0
"""A child must exit this soon after it has closed its control channel."""
QUICK_SECONDS = 5.0
"""A child that lived shorter than this failed quickly; each in a row delays the next start."""
_FIRST_DELAY_SECONDS = 0.1
_LAST_DELAY_SECONDS = 5.0
_FIRST_MESSAGE_SECONDS = 10.0
_INLINE_BYTES = 32 * 1024
"""Longer messages are sent as a memory file: a packet must fit into the socket's buffer (212,992 bytes by
default), and the settings of many upstreams don't."""


# --- the supervisor's end


class Phase(Enum):
    """States of a child slot."""

    WAITING = auto()  # until `start_at`
    STARTING = auto()
    READY = auto()
    KILLED = auto()  # but not reaped yet
    ENDED = auto()  # the service is stopping: no successor


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.STARTING, Phase.WAITING, Phase.ENDED}),
    Phase.STARTING: frozenset({Phase.READY, Phase.KILLED, Phase.WAITING, Phase.ENDED}),
    Phase.READY: frozenset({Phase.KILLED, Phase.WAITING, Phase.ENDED}),
    Phase.KILLED: frozenset({Phase.WAITING, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


@dataclass(slots=True)
class ChildSlot:
    """A child and its successors: one worker number, or the controller. Only the supervisor changes it.

    `block` is its block of counters in the shared file. Times are monotonic seconds.
    """

    role: Role
    number: int
    block: int
    phase: Phase = Phase.WAITING
    child: "Child | None" = None
    generation: int = 0
    start_at: float = 0.0
    started_at: float = 0.0
    ready_at: float = 0.0
    closed_at: float | None = None
    """When the child closed its control channel."""
    quick_failures: int = 0

    @property
    def name(self) -> str:
        return f"worker {self.number}" if self.role == "worker" else self.role

    def move(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], (self.phase, phase)
        self.phase = phase

    def start(self, now: float) -> None:
        """A child is about to be started; the caller sets `child` afterwards."""
        self.move(Phase.STARTING)
        self.generation += 1
        self.started_at = now
        self.closed_at = None

    def ready(self, now: float) -> None:
        """The child reported that it is ready. Ignored when the child has been killed meanwhile."""
        if self.phase is Phase.STARTING:
            self.move(Phase.READY)
            self.ready_at = now

    def exited(self, now: float, *, restart: bool) -> None:
        """The child has exited; with `restart` a successor is due after a delay."""
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
        if self.phase not in (Phase.STARTING, Phase.READY):
            return None
        if self.closed_at is not None and now - self.closed_at > CLOSING_SECONDS:
            return "it closed its control channel but did not exit"
        if self.phase is Phase.STARTING and now - max(self.started_at, watched_from) > READY_SECONDS:
            return f"it was not ready within {READY_SECONDS:g} s"
        beats = self.phase is Phase.READY and (last_beat > 0 or self.role == "worker")
        if beats and now - max(last_beat, self.ready_at, watched_from) > BEAT_SECONDS:
            return f"it sent no heartbeat for {BEAT_SECONDS:g} s"
        return None


def delay_seconds(quick_failures: int) -> float:
    """Delay before the next start after that many quick failures in a row: 0, 0, 0.1, 0.2, … 5."""
    if quick_failures < 2:
        return 0.0
    return float(min(_FIRST_DELAY_SECONDS * 2 ** min(quick_failures - 2, 10), _LAST_DELAY_SECONDS))


@dataclass(frozen=True, slots=True)
class Assignment:
    """The first message to a child. The descriptors are open in the child under these numbers.

    `listen_fds` are bound, listening and non-blocking. `event_fd` is a SOCK_SEQPACKET socket: the workers'
    end or the controller's. `lock_fd` holds run/children.lock while it is open. `generation` is 1 for the
    slot's first process and one more for each successor.
    """

    role: Role
    slot: int
    block: int
    settings: dict[str, Any]
    listen_fds: list[int]
    shared_fd: int
    event_fd: int
    lock_fd: int
    generation: int


def dump(settings: Settings) -> dict[str, Any]:
    """Settings as JSON that Settings.model_validate reads."""
    return settings.model_dump(mode="json", by_alias=True)


def command(role: str) -> list[str]:
    """The command line of a child; the number of its control descriptor is appended."""
    return [sys.executable, "-m", f"gup.process.{role}"]


class Channel:
    """One end of a control channel: JSON messages of any length over a SOCK_SEQPACKET socket.

    Each end trusts the other: both belong to one service.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> bool:
        """Queue the message. False when the other end is closed or its queue is full."""
        text = json.dumps(message, separators=(",", ":")).encode()
        try:
            if len(text) <= _INLINE_BYTES:
                self._socket.send(text)
            else:
                self._send_file(text)
        except (BlockingIOError, ConnectionError):
            return False
        return True

    def _send_file(self, text: bytes) -> None:
        with os.fdopen(os.memfd_create("gup-message", os.MFD_CLOEXEC), "wb") as file:
            file.write(text)
            file.flush()
            socket.send_fds(self._socket, [b"\0"], [file.fileno()])

    def receive(self) -> list[Message] | None:
        """All queued messages. None when the other end is closed and everything has been read."""
        messages: list[Message] = []
        while True:
            try:
                message = self.receive_one()
            except BlockingIOError:
                return messages
            if message is None:
                return messages or None
            messages.append(message)

    def receive_one(self) -> Message | None:
        """The next message; None at the end. BlockingIOError when none is queued."""
        room = socket.CMSG_SPACE(array.array("i").itemsize)
        try:
            text, ancillary, flags, _ = self._socket.recvmsg(_INLINE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        for _, _, fds in ancillary:
            with os.fdopen(array.array("i", fds)[0], "rb") as file:
                file.seek(0)  # the sender's write has moved the shared offset
                text = file.read()
        if not text:
            return None
        message: Message = json.loads(text)
        return message

    def close(self) -> None:
        self._socket.close()


class Child(Channel):
    """A running child process, and the supervisor's end of the channel to it. Close it after its exit."""

    def __init__(
        self, command_line: Sequence[str], assignment: Assignment, environment: Mapping[str, str]
    ) -> None:
        """Start the process and send its assignment. OSError when it can't be started.

        It gets a process group of its own: Ctrl-C on the terminal reaches only the supervisor, which drains.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(ours)
        fds = {assignment.shared_fd, assignment.event_fd, assignment.lock_fd, *assignment.listen_fds}
        try:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter, no input of others
                [*command_line, str(theirs.fileno())],
                pass_fds=(*fds, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                process_group=0,
            )
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()
        self.send(asdict(assignment))


# --- the child's end


class Parent(Channel):
    """A child's end of the channel to its supervisor. When the channel ends, the child must exit."""

    def __init__(self, sock: socket.socket) -> None:
        """Wait for the assignment. SystemExit when there is no supervisor."""
        super().__init__(sock)
        select.select([self], [], [], _FIRST_MESSAGE_SECONDS)
        try:
            first = self.receive_one()  # the second message may be queued already: the event loop reads it
        except BlockingIOError:
            first = None
        if first is None:
            self.close()
            raise SystemExit("the supervisor is gone")
        own = self.assignment = Assignment(**first)
        # They were made inheritable for this process. Processes that it starts must not get them.
        for fd in (own.shared_fd, own.event_fd, own.lock_fd, *own.listen_fds, self.fileno()):
            os.set_inheritable(fd, False)

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> "Parent":
        """From a child's command line. SystemExit when `gup serve` has not started this process."""
        if len(argv) != 2 or not argv[1].isdecimal():
            raise SystemExit(f"{argv[0]} is started by gup serve only")
        return cls(socket.socket(fileno=int(argv[1])))

    def settings(self) -> Settings:
        """The settings at the start."""
        return Settings.model_validate(self.assignment.settings)
