"""Clients over raw sockets: one connection under byte-exact control. Never retries, never follows."""

import json
import select
import socket
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

RECEIVE_BYTES = 1 << 18


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


def parsed_head(text: bytes) -> Response:
    status_line, *lines = text.decode("latin-1").split("\r\n")
    version, status, reason = (*status_line.split(" ", 2), "")[:3]
    fields = [(name.strip().lower(), value.strip()) for name, _, value in (x.partition(":") for x in lines)]
    return Response(version, int(status), reason, fields)


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
        return not select.select([self._socket], [], [], seconds)[0]


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
