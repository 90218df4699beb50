"""An upstream under a test's control: every answer scripted, stopped at gates, cut, falsified, counted."""

import contextlib
import email.utils
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from gup.demo.content import decide
from harness.waiting import until

PIECE_BYTES = 1 << 14
GATE_TIMEOUT_SECONDS = 50.0


class Gate:
    """The upstream stops here until the test opens it. `reached` tells that somebody stands before it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait_reached(self, timeout_seconds: float = 10.0) -> None:
        assert self._reached.wait(timeout_seconds), "nobody came to the gate"

    @property
    def is_reached(self) -> bool:
        return self._reached.is_set()

    def _pass(self, stopping: Callable[[], bool]) -> None:
        self._reached.set()
        deadline = time.monotonic() + GATE_TIMEOUT_SECONDS
        while not self._open.wait(0.05):
            if stopping() or time.monotonic() > deadline:
                raise ConnectionAbortedError("the gate stayed shut")


@dataclass(frozen=True, slots=True)
class Answer:
    """One scripted answer.

    Offsets (`gates`, `reset_at`, `close_at`) are offsets in the whole body, also when a range is sent; a gate
    at offset 0 stands between head and body. `announced`: a Content-Length that may lie; None with `framed`
    False: neither length nor chunks, the end of the connection ends the body.
    """

    body: bytes = b""
    status: int = 200
    reason: str = "Scripted"
    etag: str | None = None
    last_modified: float | None = None
    content_type: str = "application/octet-stream"
    fields: tuple[tuple[str, str], ...] = ()
    ranges: bool = True
    announced: int | None = None
    framed: bool = True
    chunked: bool = False
    head_gate: Gate | None = None
    gates: tuple[tuple[int, Gate], ...] = ()
    reset_at: int | None = None
    close_at: int | None = None
    if_range: bool = True
    """Whether `If-Range` is heeded; else a range is given whatever it says."""
    range_shift: int = 0
    """A 206 starts that many bytes after what was asked."""
    range_body: bytes | None = None
    """A 206 takes its bytes from here instead (an upstream whose content changed under its validators)."""
    cut_after: int | None = None
    """The connection ends after so many body bytes of this answer, wherever in the body it began."""
    stall_after: int | None = None
    """After so many body bytes of this answer nothing more comes, until the upstream is stopped."""
    garbage_at: int | None = None
    """Of a chunked body: bytes that are no chunk, after which the connection stays open."""
    piece_seconds: float = 0.0
    """Pause after each piece of 16 KiB."""


@dataclass(slots=True)
class Seen:
    """One request and what was sent in answer. Times are on the monotonic clock."""

    method: str
    path: str
    fields: list[tuple[str, str]]
    peer_port: int
    at: float
    status: int = 0
    body_bytes: int = 0
    first_byte_at: float = 0.0
    done: bool = False
    aborted: bool = False
    """Whether the other side went away before everything was sent."""

    def header(self, name: str) -> str | None:
        values = [value for found, value in self.fields if found == name.lower()]
        return ", ".join(values) if values else None


@dataclass(slots=True)
class _Script:
    answers: list[Answer]
    path: str
    asked: int = 0


class ScriptedUpstream:
    """A server with a thread a connection. Unknown paths get 404; the last answer of a path repeats."""

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        congestion: str | None = None,
    ) -> None:
        self._tls = tls
        self._listener = socket.create_server((host, port), backlog=512)
        if congestion:
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self._lock = threading.Lock()
        self._scripts: dict[str, _Script] = {}
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self.seen: list[Seen] = []
        self.exact = False
        """Whether paths are told apart by case, as most file systems do."""
        self._accepting = self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, path: str, *answers: Answer) -> None:
        """What `path` answers from now on: one after the other, the last for ever."""
        with self._lock:
            self._scripts[_plain(path)] = _Script(list(answers), _decoded(path))

    def requests(self, path: str | None = None, *, method: str = "GET") -> list[Seen]:
        """What was asked for, of one path or of all content."""
        with self._lock:
            found = [seen for seen in self.seen if seen.method == method]
        if path is None:
            return [seen for seen in found if seen.path.startswith("/content/")]
        return [seen for seen in found if _plain(seen.path) == _plain(path)]

    def body_bytes(self, path: str) -> int:
        return sum(seen.body_bytes for seen in self.requests(path))

    def wait_for_request(self, path: str, number: int = 1, timeout_seconds: float = 10.0) -> Seen:
        """The `number`-th GET of `path`, when it has come."""
        return until(
            lambda: self.requests(path)[number - 1 : number],
            f"request {number} for {path}",
            timeout_seconds,
        )[0]

    def stop(self) -> None:
        """Close everything: from now on connections are refused."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    # --- threads

    def _spawn(self, run: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=arguments, name="scripted-upstream")
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._stopping:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
            self._spawn(self._serve, connection, peer[1])

    def _serve(self, accepted: socket.socket, peer_port: int) -> None:
        connection = accepted
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(accepted, server_side=True)
                with self._lock:
                    self._connections = self._connections - {accepted} | {connection}
            buffer = bytearray()
            while not self._stopping and self._one(connection, peer_port, buffer):
                pass
        except OSError:
            pass  # the other side went away: `aborted` tells it
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _one(self, connection: socket.socket, peer_port: int, buffer: bytearray) -> bool:
        """One request and its answer; False when the connection is over."""
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            piece = connection.recv(65536)
            if not piece:
                return False
            buffer += piece
        request_line, *lines = buffer[:end].decode("latin-1").split("\r\n")
        del buffer[: end + 4]
        method, path, _ = request_line.split(" ")
        fields = [(n.strip().lower(), v.strip()) for n, _, v in (line.partition(":") for line in lines)]
        seen = Seen(method, path, fields, peer_port, time.monotonic())
        answer = self._next(path, seen)
        try:
            return self._send(connection, seen, answer)
        except OSError:
            seen.aborted = True
            raise
        finally:
            seen.done = True

    def _next(self, path: str, seen: Seen) -> Answer:
        with self._lock:
            self.seen.append(seen)
            script = self._scripts.get(_plain(path))
            if script is None or (self.exact and script.path != _decoded(path)):
                return Answer(b"not here", 404, content_type="text/plain")
            answer = script.answers[min(script.asked, len(script.answers) - 1)]
            script.asked += 1
            return answer

    def _send(self, connection: socket.socket, seen: Seen, answer: Answer) -> bool:
        answer, start, stop = _broken_off(*_choose(answer, seen))
        seen.status = answer.status
        if answer.head_gate:
            answer.head_gate._pass(lambda: self._stopping)
        if answer.reset_at is not None and answer.reset_at < 0:
            _reset(connection)
            return False
        connection.sendall(_head(answer, start, stop))
        if seen.method == "HEAD" or answer.status in (204, 304):
            return True
        for piece in _pieces(answer, start, stop, lambda: self._stopping):
            seen.first_byte_at = seen.first_byte_at or time.monotonic()
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
            seen.body_bytes += len(piece)
            if answer.piece_seconds:
                time.sleep(answer.piece_seconds)
        if answer.garbage_at is not None:
            connection.sendall(b"no chunk\r\n")
            return True
        if answer.reset_at is not None and answer.reset_at <= stop:
            _reset(connection)
            return False
        if answer.close_at is not None and answer.close_at <= stop:
            return False
        if answer.chunked:
            connection.sendall(b"0\r\n\r\n")
        return answer.framed and answer.announced is None


def _plain(path: str) -> str:
    return _decoded(path).upper()


def _decoded(path: str) -> str:
    return re.sub("%7[bB]", "{", re.sub("%7[dD]", "}", path))


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _choose(answer: Answer, seen: Seen) -> tuple[Answer, int, int]:
    """The answer to this request's conditions and range, with the span of the body to send."""
    whole = (answer, 0, len(answer.body))
    if answer.status != 200:
        return whole
    heeded = {"range": answer.ranges, "if-range": answer.if_range}
    headers = {name.title(): value for name, value in seen.fields if heeded.get(name, True)}
    status, start, stop = decide(headers, answer.etag, answer.last_modified, len(answer.body))
    if status == 200:
        return whole
    if status == 304:
        return replace(answer, status=304, body=b""), 0, 0
    start += answer.range_shift
    if start >= stop:
        return replace(answer, status=416, body=b""), 0, 0
    if answer.range_body is not None:
        answer = replace(answer, body=answer.range_body)
    return replace(answer, status=206), start, stop


def _broken_off(answer: Answer, start: int, stop: int) -> tuple[Answer, int, int]:
    """With the offsets in the body that `cut_after` and `stall_after` mean for this span of it."""
    if answer.cut_after is not None and start + answer.cut_after < stop:
        answer = replace(answer, close_at=start + answer.cut_after)
    if answer.stall_after is not None and start + answer.stall_after < stop:
        answer = replace(answer, gates=(*answer.gates, (start + answer.stall_after, Gate())))
    return answer, start, stop


def _date(answer: Answer) -> str | None:
    return email.utils.formatdate(answer.last_modified, usegmt=True) if answer.last_modified else None


def _head(answer: Answer, start: int, stop: int) -> bytes:
    fields = [("Content-Type", answer.content_type), *answer.fields]
    if answer.etag:
        fields.append(("ETag", answer.etag))
    if date := _date(answer):
        fields.append(("Last-Modified", date))
    if answer.status == 206:
        fields.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(answer.body)}"))
    if answer.status == 304:
        pass
    elif answer.chunked:
        fields.append(("Transfer-Encoding", "chunked"))
    elif answer.announced is not None:
        fields.append(("Content-Length", str(answer.announced)))
    elif answer.framed:
        fields.append(("Content-Length", str(stop - start)))
    else:
        fields.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _pieces(answer: Answer, start: int, stop: int, stopping: Callable[[], bool]) -> Iterator[bytes]:
    """The body's span in small pieces that end at gates and cuts; waits at the gates."""
    cut = min(x for x in (answer.reset_at, answer.close_at, answer.garbage_at, stop) if x is not None)
    gates = dict(_gates(answer.gates, start))
    marks = sorted({offset for offset in gates if offset < stop} | {cut})
    at = start
    while True:
        if at in gates:
            gates.pop(at)._pass(stopping)
        if at >= min(cut, stop):
            return
        until_ = min(at + PIECE_BYTES, *(mark for mark in marks if mark > at), stop)
        yield answer.body[at:until_]
        at = until_


def _gates(gates: Sequence[tuple[int, Gate]], start: int) -> list[tuple[int, Gate]]:
    return [(offset, gate) for offset, gate in gates if offset >= start]
