"""The listening sockets: opened by the supervisor, or passed by systemd, and inherited by the children."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from gup.config import Listen
from gup.errors import GupError
from gup.process.systemd import PassedSockets


@dataclass(frozen=True, slots=True)
class Listeners:
    """Open for as long as the service runs: connections wait in their queues while a child is replaced."""

    data: tuple[socket.socket, ...]
    admin: tuple[socket.socket, ...]
    shared: bool
    """Whether each worker listens on all data sockets (systemd's), or on one of its own."""

    def of_worker(self, number: int) -> list[int]:
        return [sock.fileno() for sock in (self.data if self.shared else self.data[number : number + 1])]

    def of_controller(self) -> list[int]:
        return [sock.fileno() for sock in self.admin]

    def close_data(self) -> None:
        for sock in self.data:
            sock.close()

    def close(self) -> None:
        for sock in (*self.data, *self.admin):
            sock.close()


def open_listeners(listen: Listen, workers: int, passed: PassedSockets) -> Listeners:
    """All sockets, listening and non-blocking. GupError names the address that can't be bound."""
    opened: list[socket.socket] = []
    try:
        if passed.data:
            opened += (_from_systemd(fd, listen.backlog) for fd in passed.data)
        else:
            opened += _bind(listen.address, listen.port, listen.backlog, workers)
        data = len(opened)
        if passed.admin:
            opened += (_from_systemd(fd, listen.backlog) for fd in passed.admin)
        else:
            opened += _bind(listen.admin_address, listen.admin_port, min(listen.backlog, 128), 1)
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return Listeners(tuple(opened[:data]), tuple(opened[data:]), shared=bool(passed.data))


def url(sockets: Sequence[socket.socket], *, tls: bool = False) -> str:
    """The URL of the first socket, or `unix:PATH`."""
    sock = sockets[0]
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    return f"{'https' if tls else 'http'}://{_authority(*sock.getsockname()[:2])}"


def _bind(host: str, port: int, backlog: int, count: int) -> list[socket.socket]:
    """`count` sockets on one address; the kernel spreads connections among them (SO_REUSEPORT, socket(7)).

    The first is bound without that option, so that binding fails if any other process listens there:
    otherwise two services would share the port. It gets the option afterwards, for the others.
    """
    sockets: list[socket.socket] = []
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        for number in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if number:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            if not number and count > 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            address = sock.getsockname()  # for port 0, the port that the kernel chose
            sock.listen(backlog)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise GupError(f"can't listen on {_authority(host, port)}: {error.strerror}") from error
    return sockets


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _from_systemd(fd: int, backlog: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise GupError(f"descriptor {fd} from systemd is no socket: {error.strerror}") from error
    os.set_inheritable(fd, False)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise GupError(f"descriptor {fd} from systemd is not a listening stream socket")
    sock.listen(backlog)
    sock.setblocking(False)
    return sock
