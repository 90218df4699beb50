"""What systemd hands to a service and wants to hear from it; does nothing where there is no systemd.

sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
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
"""Meant for the supervisor alone: children get an environment without them."""


@dataclass(frozen=True, slots=True)
class PassedSockets:
    """Descriptors that systemd listens on for us."""

    data: tuple[int, ...] = ()
    admin: tuple[int, ...] = ()


def passed_sockets(environment: Mapping[str, str], pid: int) -> PassedSockets:
    """Sockets named "data" and "admin" (FileDescriptorName=); without these names the second is admin's."""
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
    """Tells systemd how the service stands."""

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        """`address` is that of NOTIFY_SOCKET; None: nobody listens."""
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds
        """Within which `watchdog` must be called again and again; None: nobody watches."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], pid: int) -> "Notifier":
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        seconds = int(usec) / 1e6 if usec.isdecimal() and int(usec) and ours else None
        return cls(environment.get("NOTIFY_SOCKET"), seconds)

    def ready(self, status: str) -> None:
        """The service serves; also after a reload."""
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
            _LOG.warning("systemd could not be told %r: %s", text, error)
