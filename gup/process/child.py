"""Both ends of a child process: how the supervisor starts it, and what it finds; decides no restart."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gup.config import Settings
from gup.process.channel import Channel, Message

Role = Literal["worker", "controller"]

_FIRST_MESSAGE_SECONDS = 10.0


def dump(settings: Settings) -> dict[str, Any]:
    """Settings as JSON, which Settings.model_validate reads back."""
    return settings.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The first message to a child. Its descriptors are open in the child, under these numbers.

    `listen_fds` are bound, listening and non-blocking. `event_fd` is a SOCK_SEQPACKET socket: the workers'
    end, or the controller's. `lock_fd` holds run/children.lock for as long as it is open. `generation` is 1
    for the seat's first process, and one more for each successor.
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


def command(role: str) -> list[str]:
    """How a child is started; the number of its control descriptor is put after it."""
    return [sys.executable, "-m", f"gup.process.{role}"]


class Child:
    """A child process, in the supervisor."""

    def __init__(
        self, command_line: Sequence[str], assignment: Assignment, environment: Mapping[str, str]
    ) -> None:
        """Start it and send its assignment; OSError when it can't be started.

        In a process group of its own: Ctrl-C on the terminal reaches the supervisor only, which drains.
        """
        self.assignment = assignment
        self._channel, theirs = Channel.pair()
        fds = {assignment.shared_fd, assignment.event_fd, assignment.lock_fd, *assignment.listen_fds}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, no input of others
                [*command_line, str(theirs.fileno())],
                pass_fds=(*fds, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                process_group=0,
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._channel.send(asdict(assignment))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def fd(self) -> int:
        """The control channel, to wait on."""
        return self._channel.fileno()

    def poll(self) -> int | None:
        """Its exit status, minus a signal's number; None while it runs."""
        return self._process.poll()

    def send(self, message: Message) -> bool:
        """False when it is gone or does not read."""
        return self._channel.send(message)

    def receive(self) -> list[Message] | None:
        """What it sent; None when it closed the channel: it is ending."""
        return self._channel.receive()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait()

    def close(self) -> None:
        """After its end."""
        self._channel.close()


class Parent:
    """The supervisor, in a child. When the channel ends, the supervisor is gone and the child must exit."""

    def __init__(self, channel: Channel, assignment: Assignment) -> None:
        self._channel = channel
        self.assignment = assignment

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> "Parent":
        """Take over the control descriptor and the assignment; SystemExit when there is no supervisor."""
        if len(argv) != 2 or not argv[1].isdecimal():
            raise SystemExit(f"{argv[0]} is started by gup serve only")
        channel = Channel(socket.socket(fileno=int(argv[1])))
        select.select([channel], [], [], _FIRST_MESSAGE_SECONDS)
        try:
            first = channel.receive_one()  # a second one may wait already: the loop finds it
        except BlockingIOError:
            first = None
        if first is None:
            channel.close()
            raise SystemExit("the supervisor is gone")
        parent = cls(channel, Assignment(**first))
        parent._keep_descriptors()
        return parent

    def _keep_descriptors(self) -> None:
        """Ours were made inheritable on the way here; no process that we start gets them."""
        own = self.assignment
        for fd in (own.shared_fd, own.event_fd, own.lock_fd, *own.listen_fds, self.fileno()):
            os.set_inheritable(fd, False)

    def settings(self) -> Settings:
        return Settings.model_validate(self.assignment.settings)

    def fileno(self) -> int:
        return self._channel.fileno()

    def send(self, message: Message) -> bool:
        """False when the supervisor is gone or does not read."""
        return self._channel.send(message)

    def receive(self) -> list[Message] | None:
        """What it sent; None at the end."""
        return self._channel.receive()

    def close(self) -> None:
        self._channel.close()
