"""systemd: passed sockets, notifications and the watchdog; sd_listen_fds(3), sd_notify(3),
sd_watchdog_enabled(3). Nothing happens where the service was not started by systemd.
"""

import logging
import socket
from collections.abc import Mapping

_LOG = logging.getLogger(__name__)

_FIRST_FD = 3
VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
"""For the supervisor only: removed from the environment of children."""


def passed_sockets(environment: Mapping[str, str], pid: int) -> tuple[list[int], list[int]]:
    """Descriptors of the sockets named "data" and "admin" (FileDescriptorName=).

    If neither name is used, the first is data and the second admin.
    """
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(pid) or not count.isdecimal():
        return [], []
    fds = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    if len(names) != len(fds) or not {"data", "admin"} & set(names):
        return fds[:1], fds[1:2]
    named = list(zip(names, fds, strict=True))
    return [fd for name, fd in named if name == "data"], [fd for name, fd in named if name == "admin"]


class Notifier:
    """Sends the state of the service to systemd.

    `watchdog_seconds` is the longest time between two WATCHDOG=1; None without a watchdog.
    """

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        self.watchdog_seconds = int(usec) / 1e6 if usec.isdecimal() and int(usec) and ours else None

    def send(self, *assignments: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            _LOG.warning("systemd did not get the message %s: %s", assignments, error)
