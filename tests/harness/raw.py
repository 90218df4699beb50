"""An upstream that says exactly the bytes a test gives it, when the test wants: framing, strays, pauses."""

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self


class Over(Exception):  # noqa: N818 - an event
    """The connection is to be closed now."""


@dataclass(slots=True)
class Talk:
    """One request of a connection, and the means to answer it. `number` counts on its connection, from 1."""

    method: str
    path: str
    lines: list[tuple[str, str]]
    number: int
    peer_port: int
    _connection: socket.socket
    _stopping: threading.Event
    at: float = field(default_factory=time.monotonic)

    @property
    def fields(self) -> dict[str, str]:
        return dict(self.lines)

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

    def __init__(
        self,
        answer: Callable[[Talk], None] | None = None,
        tls: ssl.SSLContext | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if answer is not None:
            self.answer = answer
        self._tls = tls
        self._listener = socket.create_server((host, port), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.connections = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._accepting = self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def refuse(self) -> None:
        """Refuse connections from now on; those that are open stay."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()

    def stop(self) -> None:
        """Refuse connections and end those that are open."""
        self._stopping.set()
        self.refuse()
        self.hang_up()

    def hang_up(self) -> None:
        """End all connections, and their threads: for who goes on with the upstream in another test."""
        with self._lock:
            connections, threads = list(self._open), self._threads[1:]
            del self._threads[1:]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()

    def _reply(self, talk: Talk) -> None:
        self.answer(talk)

    def _spawn(self, run: Callable[..., None], *given: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=given, name="upstream")
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open.add(connection)
                self._spawn(self._serve, connection, peer[1])

    def _serve(self, accepted: socket.socket, peer_port: int) -> None:
        buffer, number, connection = bytearray(), 0, accepted
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(accepted, server_side=True)
                with self._lock:
                    self._open = self._open - {accepted} | {connection}
            while not self._stopping.is_set():
                while (end := buffer.find(b"\r\n\r\n")) < 0:
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    buffer += piece
                first, *lines = buffer[:end].decode("latin-1").split("\r\n")
                del buffer[: end + 4]
                number += 1
                method, path, _ = first.split(" ")
                fields = [
                    (n.strip().lower(), v.strip()) for n, _, v in (line.partition(":") for line in lines)
                ]
                self.asked.append((method, path))
                self._reply(Talk(method, path, fields, number, peer_port, connection, self._stopping))
        except (Over, OSError):
            return
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
