"""Clients over raw sockets: one connection under byte-exact control, and hundreds that stream in one thread.

None retries or follows. `python -m harness.clients HOST PORT PATH SECONDS` probes from a process of its own.
"""

import contextlib
import enum
import ipaddress
import json
import select
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import xxhash

from harness.processes import until

RECEIVE_BYTES = 1 << 18
PROBES_PER_SECOND = 100


@dataclass(slots=True)
class Response:
    """What came back. `complete` is False when the connection ended before the body did."""

    version: str
    status: int
    reason: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    complete: bool = True
    reset: bool = False

    def header(self, name: str) -> str | None:
        """All lines of a field, joined as RFC 9110 5.3 does; None when there is none."""
        values = [value for field_name, value in self.fields if field_name == name.lower()]
        return ", ".join(values) if values else None

    @property
    def etag(self) -> str:
        value = self.header("etag")
        assert value is not None, self.fields
        return value


class Ended(AssertionError):  # noqa: N818 - an event, wanted by some tests
    """The connection ended where a head was expected. `reset` tells RST from a clean end."""

    def __init__(self, got: bytes, *, reset: bool) -> None:
        super().__init__(f"the connection {'was reset' if reset else 'ended'} after {got[:200]!r}")
        self.got = got
        self.reset = reset


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname, parts.port


def request_text(
    target: str, fields: dict[str, str], method: str = "GET", version: str = "HTTP/1.1"
) -> bytes:
    lines = [f"{method} {target} {version}", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def readable(sock: socket.socket, seconds: float) -> bool:
    """Whether something arrives within so long; unlike select(2) for descriptors above 1023 too."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def parsed_head(text: bytes) -> Response:
    status_line, *lines = text.decode("latin-1").split("\r\n")
    version, status, reason = (*status_line.split(" ", 2), "")[:3]
    fields = [(name.strip().lower(), value.strip()) for name, _, value in (x.partition(":") for x in lines)]
    return Response(version, int(status), reason, fields)


def proxy_header(client: str = "", port: int = 50_000, more: bytes = b"") -> bytes:
    """A PROXY header of version 2, of a client of a proxy; without one of the proxy itself (LOCAL)."""
    start = b"\r\n\r\n\0\r\nQUIT\n"
    if not client:
        return start + struct.pack("!BBH", 0x20, 0, len(more)) + more
    address = ipaddress.ip_address(client)
    ends = address.packed + bytes(len(address.packed)) + struct.pack("!HH", port, 2967)
    family = 0x11 if address.version == 4 else 0x21
    return start + struct.pack("!BBH", 0x21, family, len(ends + more)) + ends + more


class RawConnection:
    """One client connection: send bytes as they are, read parsed responses."""

    def __init__(
        self,
        address: tuple[str, int],
        timeout_seconds: float = 30.0,
        receive_buffer_bytes: int | None = None,
        source: str = "",
    ) -> None:
        """`source` is the address that the other side sees, of this machine's."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if receive_buffer_bytes is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            if source:
                self._socket.bind((source, 0))
            self._socket.settimeout(timeout_seconds)
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise
        self._buffer = bytearray()
        self._ended = False
        self.was_reset = False
        self.address = address
        self.local_port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, text: bytes) -> None:
        self._socket.sendall(text)

    def ask(
        self,
        target: str,
        headers: dict[str, str] | None = None,
        *,
        method: str = "GET",
        version: str = "HTTP/1.1",
    ) -> None:
        """Send one request, Host included unless given."""
        fields = {"Host": f"{self.address[0]}:{self.address[1]}", **(headers or {})}
        self.send(request_text(target, fields, method, version))

    def half_close(self) -> None:
        """Nothing more will be sent from here; answers are still read."""
        self._socket.shutdown(socket.SHUT_WR)

    def get(self, target: str, headers: dict[str, str] | None = None, *, method: str = "GET") -> Response:
        self.ask(target, headers, method=method)
        return self.response(method)

    def _more(self) -> bool:
        """Receive once; False at the end. TimeoutError when nothing comes."""
        if self._ended:
            return False
        try:
            piece = self._socket.recv(RECEIVE_BYTES)
        except ConnectionError:
            self.was_reset = self._ended = True
            return False
        if not piece:
            self._ended = True
        self._buffer += piece
        return bool(piece)

    def head(self) -> Response:
        """The next response's head; the body stays unread."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if not self._more():
                raise Ended(bytes(self._buffer), reset=self.was_reset)
        response = parsed_head(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        return response

    def response(self, method: str = "GET") -> Response:
        """The next final response with its body. A cut body is told by `complete`."""
        response = self.head()
        while 100 <= response.status < 200:
            response = self.head()
        self.finish(response, method)
        return response

    def begin(self, target: str, count: int = 0) -> Response:
        """Ask, and read the head of a 200 and so much of its body; `finish` reads the rest."""
        self.ask(target)
        response = self.head()
        assert response.status == 200, response
        response.body = self.read(count)
        assert len(response.body) == count, (target, len(response.body))
        return response

    def finish(self, response: Response, method: str = "GET") -> Response:
        """Read the body that belongs to `response`, or the rest of it."""
        if method == "HEAD" or response.status in (204, 304):
            return response
        length = response.header("content-length")
        if (response.header("transfer-encoding") or "").lower() == "chunked":
            response.complete = self._chunks(response)
        elif length is not None:
            assert length.isdecimal(), length
            response.body += self.read(int(length) - len(response.body))
            response.complete = len(response.body) == int(length)
        else:
            response.body = self.rest()
            response.complete = not self.was_reset
        response.reset = self.was_reset
        return response

    def drop(self, response: Response) -> int:
        """Receive the rest of a body of known length and keep none of it; the body's length."""
        length = int(response.header("content-length") or 0)
        left, buffer = length - len(response.body) - len(self._buffer), bytearray(RECEIVE_BYTES)
        while left > 0:
            count = self._socket.recv_into(buffer)
            assert count, f"the connection ended {left} bytes before its body"
            left -= count
        return length

    def _chunks(self, response: Response) -> bool:
        pieces = []
        try:
            while True:
                size = int(self._line().split(b";")[0], 16)
                if size == 0:
                    break
                piece = self.read(size)
                pieces.append(piece)
                if len(piece) < size or self._line():
                    return False
            while self._line():  # the trailer
                pass
        except Ended:
            return False
        finally:
            response.body = b"".join(pieces)
        return True

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if not self._more():
                raise Ended(bytes(self._buffer), reset=self.was_reset)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def read(self, count: int) -> bytes:
        """`count` bytes; fewer when the connection ends."""
        while len(self._buffer) < count and self._more():
            pass
        piece = bytes(self._buffer[:count])
        del self._buffer[:count]
        return piece

    def rest(self) -> bytes:
        """Everything until the connection ends."""
        while self._more():
            pass
        return self.read(len(self._buffer))

    def ended(self) -> bool:
        """Whether the other side ends the connection, with nothing more sent. TimeoutError if not."""
        return not self._more() and not self._buffer

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing arrives (not even the end) for that long: to show that gup waits."""
        if self._buffer or self._ended:
            return False
        return not readable(self._socket, seconds)


def fetch(
    address: tuple[str, int],
    target: str,
    headers: dict[str, str] | None = None,
    *,
    method: str = "GET",
    timeout_seconds: float = 30.0,
    body: bytes = b"",
    source: str = "",
) -> Response:
    """One request on a connection of its own, from the address `source`."""
    length = {"Content-Length": str(len(body))} if body else {}
    with RawConnection(address, timeout_seconds, source=source) as connection:
        connection.ask(target, {"Connection": "close", **length, **(headers or {})}, method=method)
        if body:
            connection.send(body)
        return connection.response(method)


def assert_problem(response: Response, status: int, slug: str | None = None) -> dict[str, object]:
    """The response is a whole RFC 9457 document of this status (and cause); the document."""
    assert (response.status, response.complete) == (status, True), response
    assert response.header("content-type") == "application/problem+json", response.fields
    document = json.loads(response.body)
    assert document["status"] == status, document
    assert document["title"], document
    if slug is not None:
        assert str(document["type"]).endswith(slug), document
    return document


def send_raw(address: tuple[str, int], text: bytes, timeout_seconds: float = 30.0) -> Response:
    """Send these bytes; the first response."""
    with RawConnection(address, timeout_seconds) as connection:
        connection.send(text)
        return connection.response()


# --- many at once, each byte hashed as it arrives, no body ever held


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


# --- a probe beside what a test does


def probe(address: tuple[str, int], path: str, seconds: float) -> dict[str, float]:
    """How long hits take, in milliseconds.

    Requests leave at fixed times over one kept connection; what a slow answer delays counts from when it
    should have left, so that slow answers do not hide in fewer samples.
    """
    took = []
    with RawConnection(address) as client:
        began = time.perf_counter()
        for number in range(int(PROBES_PER_SECOND * seconds)):
            due = began + number / PROBES_PER_SECOND
            time.sleep(max(0.0, due - time.perf_counter()))
            # its own lateness is not the server's
            due = max(due, time.perf_counter() - 1 / PROBES_PER_SECOND)
            answer = client.get(path)
            assert (answer.status, answer.complete) == (200, True), answer.status
            took.append(time.perf_counter() - due)
    took.sort()
    return {
        "count": len(took),
        **{f"p{share}": 1000 * took[min(len(took) - 1, len(took) * share // 100)] for share in (50, 90, 99)},
    }


@contextlib.contextmanager
def probing(address: tuple[str, int], path: str, seconds: float) -> Iterator[Callable[[], dict[str, float]]]:
    """A probe beside what the block does; the answer waits for its figures."""
    arguments = [sys.executable, "-m", "harness.clients", address[0], str(address[1]), path]
    with subprocess.Popen(
        [*arguments, str(seconds)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield lambda: json.loads(process.communicate(timeout=600)[0])
        finally:
            process.kill()


if __name__ == "__main__":
    host, port, path, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(probe((host, int(port)), path, float(seconds))))
