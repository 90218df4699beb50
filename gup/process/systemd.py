"""systemd: passed sockets, notifications and the watchdog; sd_listen_fds(3), sd_notify(3),
sd_watchdog_enabled(3). Nothing happens where the service was not started by systemd.
"""

import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

_LOG = logging.getLogger(__name__)

_FIRST_FD = 3
VARIABLES = (
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)
"""For the supervisor only: removed from the environment of children."""


@dataclass(frozen=True, slots=True)
class PassedSockets:
    """Descriptors of the sockets that systemd opened."""

    data: tuple[int, ...] = ()
    admin: tuple[int, ...] = ()


def passed_sockets(environment: Mapping[str, str], pid: int) -> PassedSockets:
    """The sockets named "data" and "admin" (FileDescriptorName=).

    If neither name is used, the first is data and the second admin.
    """
    if environment.get("LISTEN_PID") != str(pid):
        return PassedSockets()
    count = environment.get("LISTEN_FDS", "")
    fds = range(_FIRST_FD, _FIRST_FD + int(count)) if count.isdecimal() else range(0)
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    if len(names) == len(fds) and {"data", "admin"} & set(names):
        named = list(zip(names, fds, strict=True))
        return PassedSockets(
            tuple(fd for name, fd in named if name == "data"),
            tuple(fd for name, fd in named if name == "admin"),
        )
    return PassedSockets(tuple(fds[:1]), tuple(fds[1:2]))


class Notifier:
    """Sends the state of the service to systemd."""

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        """`address` is the value of NOTIFY_SOCKET; None sends nothing."""
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds
        """The longest time between two calls of `watchdog`; None without a watchdog."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], pid: int) -> "Notifier":
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        seconds = int(usec) / 1e6 if usec.isdecimal() and int(usec) and ours else None
        return cls(environment.get("NOTIFY_SOCKET"), seconds)

    def ready(self, status: str) -> None:
        """The service is ready, at the start and after each reload."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(text.encode(), self._address)
        except OSError as error:
            _LOG.warning("systemd did not get the message %r: %s", text, error)
