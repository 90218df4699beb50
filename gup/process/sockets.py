"""The listening sockets, which children inherit: opened by the supervisor, or passed by systemd.

Also the rest of systemd's protocol: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3), which do nothing
unless systemd started the service.
"""

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gup.config import Listen
from gup.errors import GupError

_LOG = logging.getLogger(__name__)

_FIRST_FD = 3
VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
"""systemd's, for the supervisor only: removed from the environment of children."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """Open for as long as the service runs: connections wait in their queues while a child is replaced.

    `shared`: whether each worker listens on all data sockets (systemd's), or on some of its own. None is
    closed when there are fewer workers: the kernel would reset the connections in its queue. `peers` are for
    members of the cluster, none without one.
    """

    data: list[socket.socket]
    admin: list[socket.socket]
    shared: bool
    peers: list[socket.socket]

    @property
    def all(self) -> Sequence[socket.socket]:
        return (*self.data, *self.admin, *self.peers)

    def peers_of_worker(self, number: int, workers: int) -> Sequence[socket.socket]:
        return self.peers[number::workers]

    def of_worker(self, number: int, workers: int) -> Sequence[socket.socket]:
        return self.data if self.shared else self.data[number::workers]

    def extend(self, workers: int, backlog: int) -> None:
        """Have a socket for each worker. GupError, and nothing has changed, when there can be no more."""
        added: list[tuple[list[socket.socket], list[socket.socket]]] = []
        try:
            for present in (self.data, self.peers):
                missing = workers - len(present)
                if not present or missing <= 0 or (self.shared and present is self.data):
                    continue
                new: list[socket.socket] = []
                added.append((present, new))
                host, port = present[0].getsockname()[:2]
                _bind(new, host, port, backlog, missing, joins=True)
        except BaseException:
            close(*(sock for _, new in added for sock in new))
            raise
        for present, new in added:
            present.extend(new)


def open_listeners(
    listen: Listen, workers: int, passed: tuple[list[int], list[int]], peers: tuple[str, int] | None = None
) -> Listeners:
    """All sockets, listening and non-blocking. GupError names the address that can't be bound.

    `passed` are systemd's descriptors for the data plane and for the control plane, `peers` is the address
    for members of the cluster.
    """
    opened = Listeners([], [], bool(passed[0]), [])
    data, admin = opened.data, opened.admin
    try:
        _adopt(data, passed[0], listen.backlog)
        if not data:
            _bind(data, listen.address, listen.port, listen.backlog, workers)
        _adopt(admin, passed[1], listen.backlog)
        if not admin:
            _bind(admin, listen.admin_address, listen.admin_port, min(listen.backlog, 128), 1)
        if peers is not None:
            _bind(opened.peers, *peers, listen.backlog, workers)
    except BaseException:
        close(*opened.all)
        raise
    return opened


def close(*sockets: socket.socket) -> None:
    for sock in sockets:
        sock.close()


def url(sockets: Sequence[socket.socket], *, tls: bool = False) -> str:
    name = sockets[0].getsockname()
    if sockets[0].family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"{'https' if tls else 'http'}://{_authority(*name[:2])}"


def _bind(
    opened: list[socket.socket], host: str, port: int, backlog: int, count: int, *, joins: bool = False
) -> None:
    """Open `count` sockets on one address; the kernel spreads connections among them (SO_REUSEPORT).

    The first is bound without that option, so that binding fails if any other process listens there:
    otherwise two services would share the port. It gets the option afterwards, for the others. With `joins`
    there are sockets of ours already.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        for number in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM)
            opened.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if number or joins:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            if not number:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            address = sock.getsockname()  # for port 0, the port that the kernel chose
            sock.listen(backlog)
            sock.setblocking(False)
    except OSError as error:
        raise GupError(f"can't listen on {_authority(host, port)}: {error.strerror}") from error


def _adopt(opened: list[socket.socket], fds: Sequence[int], backlog: int) -> None:
    for fd in fds:
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise GupError(f"descriptor {fd} from systemd is no socket: {error.strerror}") from error
        opened.append(sock)
        os.set_inheritable(fd, False)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise GupError(f"descriptor {fd} from systemd is not a listening stream socket")
        sock.listen(backlog)
        sock.setblocking(False)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- systemd


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
    """`watchdog_seconds` is the longest time between two WATCHDOG=1; None without a watchdog."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = environment.get("WATCHDOG_USEC", "")
        for_this_process = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        self.watchdog_seconds = (
            int(usec) / 1e6 if usec.isdecimal() and int(usec) and for_this_process else None
        )

    def send(self, *assignments: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            _LOG.warning("systemd did not get the message %s: %s", assignments, error)
