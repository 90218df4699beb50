"""Hundreds of streaming clients in one thread: each byte hashed as it arrives, no body ever held."""

import contextlib
import enum
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Self

import xxhash

from harness.clients import parsed_head, request_text
from harness.waiting import until

RECEIVE_BYTES = 1 << 18


class End(enum.StrEnum):
    """How a client's transfer ended."""

    COMPLETE = "complete"
    LEFT = "left"
    CUT = "cut"
    RESET = "reset"
    REFUSED = "refused"


def body_digest(body: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(body)


@dataclass(slots=True)
class Client:
    """One client's transfer; written by the swarm's thread alone. Times are on the monotonic clock."""

    target: str
    headers: dict[str, str]
    leave_after_bytes: int | None
    asked_at: float = 0.0
    status: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    body_bytes: int = 0
    first_byte_at: float = 0.0
    """When the body's first byte arrived."""
    finished_at: float = 0.0
    end: End | None = None
    local_port: int = 0
    _digest: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    _socket: socket.socket | None = None
    _head: bytearray = field(default_factory=bytearray)
    _left: int | None = None

    @property
    def digest(self) -> int:
        return self._digest.intdigest()


class Swarm:
    """Clients of one address. `add` any time; the thread ends with `close`.

    Bodies need a Content-Length (or end with the connection): chunked bodies are asked with RawConnection.
    """

    def __init__(self, address: tuple[str, int], *, drops: bool = False) -> None:
        """`drops`: bodies are counted and not hashed, so that a thousand clients take little of the cores."""
        self._address = address
        self._drops = drops
        self.cpu_seconds = 0.0
        self._new: deque[Client] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._stopping = False
        self._buffer = bytearray(RECEIVE_BYTES)
        self.clients: list[Client] = []
        self._thread = threading.Thread(target=self._run, name="swarm")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stopping = True
        self._wake_write.send(b"x")
        self._thread.join()
        for client in self.clients:
            if client._socket is not None:
                client._socket.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def add(
        self,
        count: int,
        target: str,
        headers: dict[str, str] | None = None,
        *,
        leave_after_bytes: int | None = None,
    ) -> list[Client]:
        """`count` clients connect and ask now; with `leave_after_bytes` each closes at that body offset."""
        clients = [Client(target, headers or {}, leave_after_bytes) for _ in range(count)]
        self.clients += clients
        self._new.extend(clients)
        self._wake_write.send(b"x")
        return clients

    def wait(self, clients: list[Client] | None = None, timeout_seconds: float = 60.0) -> list[Client]:
        """Until all (or these) clients have ended."""
        waited = self.clients if clients is None else clients
        until(lambda: all(c.end for c in waited), "all clients ended", timeout_seconds)
        return waited

    def reach(self, body_bytes: int, clients: list[Client] | None = None, spare: int = 0) -> None:
        """Until all (or these) clients have so many bytes and no more, or up to `spare` fewer."""
        waited = self.clients if clients is None else clients
        until(
            lambda: all(body_bytes - spare <= c.body_bytes <= body_bytes for c in waited),
            f"all have {body_bytes} bytes",
        )

    # --- the thread

    def _run(self) -> None:
        while not self._stopping:
            for key, events in self._selector.select():
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_read.recv(4096)
                    self._connect_new()
                elif events & selectors.EVENT_WRITE:
                    self._ask(key.data)
                else:
                    self._receive(key.data)
            self.cpu_seconds = time.thread_time()

    def _connect_new(self) -> None:
        while self._new:
            client = self._new.popleft()
            client.asked_at = time.monotonic()
            client._socket = sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(self._address)
            self._selector.register(sock, selectors.EVENT_WRITE, client)

    def _ask(self, client: Client) -> None:
        sock = client._socket
        fields = {"Host": f"{self._address[0]}:{self._address[1]}", "Connection": "close", **client.headers}
        try:
            sock.send(request_text(client.target, fields))
        except OSError:
            self._finish(client, End.REFUSED)
            return
        client.local_port = sock.getsockname()[1]
        self._selector.modify(sock, selectors.EVENT_READ, client)

    def _receive(self, client: Client) -> None:
        try:
            dropped = socket.MSG_TRUNC if self._drops and client.status else 0  # the kernel copies nothing
            count = client._socket.recv_into(self._buffer, 0, dropped)
        except BlockingIOError:
            return
        except OSError:
            self._finish(client, End.RESET)
            return
        if count == 0:
            whole = client.status and client._left is None
            self._finish(client, End.COMPLETE if whole else End.CUT)
        elif client.status:
            self._body(client, memoryview(self._buffer)[:count])
        else:
            self._headers(client, self._buffer[:count])

    def _headers(self, client: Client, piece: bytearray) -> None:
        client._head += piece
        end = client._head.find(b"\r\n\r\n")
        if end < 0:
            return
        response = parsed_head(bytes(client._head[:end]))
        client.fields, client.status = dict(response.fields), response.status
        length = client.fields.get("content-length")
        client._left = int(length) if length is not None else None
        body = bytes(client._head[end + 4 :])
        client._head.clear()
        if body or client._left == 0:
            self._body(client, memoryview(body))

    def _body(self, client: Client, piece: memoryview) -> None:
        if client.leave_after_bytes is not None:
            piece = piece[: client.leave_after_bytes - client.body_bytes]
        if not client.body_bytes and len(piece):
            client.first_byte_at = time.monotonic()
        if not self._drops:
            client._digest.update(piece)
        client.body_bytes += len(piece)
        if client._left is not None:
            client._left -= len(piece)
        if client._left == 0:
            self._finish(client, End.COMPLETE)
        elif client.body_bytes == client.leave_after_bytes:
            self._finish(client, End.LEFT)

    def _finish(self, client: Client, end: End) -> None:
        self._selector.unregister(client._socket)
        client._socket.close()
        client._socket = None
        client.finished_at = time.monotonic()
        client.end = end
