"""The load of cold keys: clients that ask for fresh keys, each over one connection, until time or keys end.

One thread on epoll; the kernel drops the bodies (MSG_TRUNC), so that a client costs a fraction of any server.
"""

import re
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_BUFFER_BYTES = 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
PATIENCE_SECONDS = 60.0


@dataclass(slots=True)
class Fetched:
    """What came. `firsts` are seconds from each request to its body's first byte."""

    firsts: list[float] = field(default_factory=list)
    body_bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the clients."""


class _Client:
    __slots__ = ("asked_at", "head", "left", "sock")

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.asked_at, self.head, self.left = 0.0, b"", -1

    def ask(self, path: str) -> None:
        self.head, self.left, self.asked_at = b"", -1, time.monotonic()
        self.sock.send(b"GET %b HTTP/1.1\r\nHost: gup\r\n\r\n" % path.encode())


def fetch_all(port: int, paths: Iterator[str], clients: int, seconds: float = PATIENCE_SECONDS) -> Fetched:
    """Ask until `seconds` are over or there is no path left, and wait for what was asked.

    AssertionError for anything but a whole 200.
    """
    found, buffer = Fetched(), bytearray(_BUFFER_BYTES)
    open_ = [_Client(port) for _ in range(clients)]
    by_descriptor, poll = {client.sock.fileno(): client for client in open_}, select.epoll()
    busy, began, spent = 0, time.monotonic(), time.process_time()
    for client in open_:
        if path := next(paths, None):
            poll.register(client.sock, select.EPOLLIN)
            client.ask(path)
            busy += 1
    while busy:
        events = poll.poll(PATIENCE_SECONDS)
        assert events, f"no answer within {PATIENCE_SECONDS:g} s"
        for descriptor, _ in events:
            client = by_descriptor[descriptor]
            if not _receive(client, buffer, found):
                continue
            path = next(paths, None) if time.monotonic() - began < seconds else None
            if path:
                client.ask(path)
            else:
                busy -= 1
                poll.unregister(client.sock)
    found.seconds, found.cpu_seconds = time.monotonic() - began, time.process_time() - spent
    poll.close()
    for client in open_:
        client.sock.close()
    return found


def _receive(client: _Client, buffer: bytearray, found: Fetched) -> bool:
    """Receive once; whether the answer is whole."""
    if client.left >= 0:
        got = client.sock.recv_into(buffer, 0, socket.MSG_TRUNC)
        assert got, "the connection ended in a body"
        body = got
    else:
        got = client.sock.recv_into(buffer, 1 << 14)
        assert got, f"the connection ended: {client.head!r}"
        client.head += buffer[:got]
        head, end, rest = client.head.partition(b"\r\n\r\n")
        if not end:
            return False
        length = _LENGTH.search(head)
        assert head.startswith(b"HTTP/1.1 200"), head.decode("latin-1")
        assert length, head
        client.left, body = int(length[1]), len(rest)
        client.head = b""
    if body and client.asked_at:
        found.firsts.append(time.monotonic() - client.asked_at)
        client.asked_at = 0.0
    client.left -= body
    found.body_bytes += body
    return client.left == 0
