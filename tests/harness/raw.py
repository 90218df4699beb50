"""An upstream that says exactly the bytes a test gives it, when the test wants: framing, strays, pauses."""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self


class Over(Exception):  # noqa: N818 - an event
    """The connection is to be closed now."""


@dataclass(slots=True)
class Talk:
    """One request of a connection, and the means to answer it."""

    method: str
    path: str
    fields: dict[str, str]
    number: int
    """Of the request on its connection, from 1."""
    _connection: socket.socket
    _stopping: threading.Event

    def send(self, text: bytes) -> None:
        self._connection.sendall(text)

    def pause(self, seconds: float) -> None:
        """Say nothing for so long; Over when the upstream is being stopped."""
        if self._stopping.wait(seconds):
            raise Over

    def reset(self) -> None:
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Over

    def say_goodbye(self) -> None:
        """End TLS in order. Without it, closing sends no close_notify."""
        assert isinstance(self._connection, ssl.SSLSocket)
        self._connection.unwrap()
        raise Over


def ok(body: bytes, *lines: str) -> bytes:
    """A complete answer."""
    head = "\r\n".join(("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *lines))
    return head.encode("latin-1") + b"\r\n\r\n" + body


class RawUpstream:
    """Calls `answer` for each request, in a thread a connection; Over closes the connection."""

    def __init__(self, answer: Callable[[Talk], None], tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for open_ in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                open_.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _spawn(self, run: Callable[..., None], *given: object) -> None:
        thread = threading.Thread(target=run, args=given, name="raw-upstream")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._open.add(connection)
            self._spawn(self._serve, connection)

    def _serve(self, accepted: socket.socket) -> None:
        buffer, number, connection = bytearray(), 0, accepted
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(accepted, server_side=True)
                self._open.add(connection)
                self._open.discard(accepted)
            while True:
                while (end := buffer.find(b"\r\n\r\n")) < 0:
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    buffer += piece
                first, *lines = buffer[:end].decode("latin-1").split("\r\n")
                del buffer[: end + 4]
                number += 1
                method, path, _ = first.split(" ")
                fields = {name.lower(): text.strip() for name, _, text in (x.partition(":") for x in lines)}
                self.asked.append((method, path))
                self.answer(Talk(method, path, fields, number, connection, self._stopping))
        except (Over, OSError):
            return
        finally:
            self._open.discard(connection)
            connection.close()
