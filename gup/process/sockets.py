"""The listening sockets: bound or taken over here once, then only handed on; accepts no connection."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from gup.config import Listen
from gup.errors import GupError
from gup.process.notify import PassedSockets


@dataclass(frozen=True, slots=True)
class Listeners:
    """Open for as long as the service runs, so that connections wait while a child is replaced."""

    data: tuple[socket.socket, ...]
    admin: tuple[socket.socket, ...]
    shared: bool
    """Whether every worker listens on all data sockets (systemd's), or each on its own."""

    def of_worker(self, slot: int) -> list[int]:
        if self.shared:
            return [sock.fileno() for sock in self.data]
        return [self.data[slot].fileno()]

    def of_controller(self) -> list[int]:
        return [sock.fileno() for sock in self.admin]

    def close_data(self) -> None:
        for sock in self.data:
            sock.close()

    def close(self) -> None:
        for sock in (*self.data, *self.admin):
            sock.close()


def open_listeners(listen: Listen, workers: int, passed: PassedSockets) -> Listeners:
    """All sockets, listening and non-blocking; GupError names the address that can't be had."""
    opened: list[socket.socket] = []
    try:
        if passed.data:
            opened += (_taken_over(fd, listen.backlog) for fd in passed.data)
        else:
            opened += _bind(listen.address, listen.port, listen.backlog, workers)
        data = len(opened)
        if passed.admin:
            opened += (_taken_over(fd, listen.backlog) for fd in passed.admin)
        else:
            opened += _bind(listen.admin_address, listen.admin_port, min(listen.backlog, 128), 1)
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return Listeners(tuple(opened[:data]), tuple(opened[data:]), shared=bool(passed.data))


def url(sockets: Sequence[socket.socket], *, tls: bool = False) -> str:
    """`http://H:P` of the first socket."""
    scheme = "https" if tls else "http"
    sock = sockets[0]
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _bind(host: str, port: int, backlog: int, count: int) -> list[socket.socket]:
    """`count` sockets on one address, among which the kernel spreads connections (SO_REUSEPORT, socket(7)).

    The first is bound without that option, which is refused when any process listens there: else two services
    would share the port, and each get some of the clients. It gets the option afterwards, for the others.
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
            address = sock.getsockname()  # with port 0, the one that the kernel chose
            sock.listen(backlog)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise GupError(f"can't listen on {_shown(host, port)}: {error.strerror}") from error
    return sockets


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _taken_over(fd: int, backlog: int) -> socket.socket:
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
