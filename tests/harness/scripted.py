"""Upstreams under a test's control: one says exactly the bytes it is told, one has scripted answers."""

import contextlib
import email.utils
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from gup.demo.content import decide
from harness.waiting import until

PIECE_BYTES = 1 << 14
GATE_TIMEOUT_SECONDS = 100.0


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


# --- scripted answers


class Gate:
    """The upstream stops here until the test opens it. `reached` tells that somebody stands before it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait_reached(self, timeout_seconds: float = 30.0) -> None:
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
    path: str
    answers: list[Answer] = field(default_factory=list)
    asked: int = 0


class ScriptedUpstream(RawUpstream):
    """Unknown paths get 404; the last answer of a path repeats. `exact`: paths are told apart by case."""

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        congestion: str = "",
    ) -> None:
        self._scripts: dict[str, _Script] = {}
        self.seen: list[Seen] = []
        self.exact = False
        super().__init__(tls=tls, host=host, port=port)
        if congestion:
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())

    def answer(self, path: str, *answers: Answer | bytes) -> None:
        """What `path` answers from now on: one after the other, the last for ever; bytes have the tag "a"."""
        made = [Answer(each, etag='"a"') if isinstance(each, bytes) else each for each in answers]
        with self._lock:
            self._scripts[_plain(path)] = _Script(_decoded(path), made)

    def requests(self, path: str | None = None, *, method: str = "GET") -> list[Seen]:
        """What was asked for, of one path or of all content."""
        with self._lock:
            found = [seen for seen in self.seen if seen.method == method]
        if path is None:
            return [seen for seen in found if seen.path.startswith("/content/")]
        return [seen for seen in found if _plain(seen.path) == _plain(path)]

    def body_bytes(self, path: str) -> int:
        return sum(seen.body_bytes for seen in self.requests(path))

    def wait_for_request(self, path: str, number: int = 1, timeout_seconds: float = 30.0) -> Seen:
        """The `number`-th GET of `path`, when it has come."""
        what = f"request {number} for {path}"
        return until(lambda: self.requests(path)[number - 1 : number], what, timeout_seconds)[0]

    def wait_done(self, path: str, number: int = 1) -> Seen:
        """The same when its answer was sent, or broken off."""
        seen = self.wait_for_request(path, number)
        until(lambda: seen.done, f"request {number} for {path} is answered")
        return seen

    def _reply(self, talk: Talk) -> None:
        seen = Seen(talk.method, talk.path, talk.lines, talk.peer_port, talk.at)
        try:
            self._send(talk, seen, self._next(seen))
        except OSError:
            seen.aborted = True
            raise
        finally:
            seen.done = True

    def _next(self, seen: Seen) -> Answer:
        with self._lock:
            self.seen.append(seen)
            script = self._scripts.get(_plain(seen.path))
            if script is None or (self.exact and script.path != _decoded(seen.path)):
                return Answer(b"not here", 404, content_type="text/plain")
            script.asked += 1
            return script.answers[min(script.asked, len(script.answers)) - 1]

    def _send(self, talk: Talk, seen: Seen, answer: Answer) -> None:
        answer, start, stop = _broken_off(*_choose(answer, seen))
        seen.status = answer.status
        if answer.head_gate:
            answer.head_gate._pass(self._stopping.is_set)
        if answer.reset_at is not None and answer.reset_at < 0:
            talk.reset()
        talk.send(_head(answer, start, stop))
        if seen.method == "HEAD" or answer.status in (204, 304):
            return
        for piece in _pieces(answer, start, stop, self._stopping.is_set):
            seen.first_byte_at = seen.first_byte_at or time.monotonic()
            talk.send(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
            seen.body_bytes += len(piece)
            time.sleep(answer.piece_seconds)
        self._finish(talk, answer, stop)

    @staticmethod
    def _finish(talk: Talk, answer: Answer, stop: int) -> None:
        if answer.garbage_at is not None:
            talk.send(b"no chunk\r\n")
            return
        if answer.reset_at is not None and answer.reset_at <= stop:
            talk.reset()
        if answer.close_at is not None and answer.close_at <= stop:
            raise Over
        if answer.chunked:
            talk.send(b"0\r\n\r\n")
        if not answer.framed or answer.announced is not None:
            raise Over


def _decoded(path: str) -> str:
    return re.sub("%7[bB]", "{", re.sub("%7[dD]", "}", path))


def _plain(path: str) -> str:
    return _decoded(path).upper()


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
    body = answer.body if answer.range_body is None else answer.range_body
    return replace(answer, status=206, body=body), start, stop


def _broken_off(answer: Answer, start: int, stop: int) -> tuple[Answer, int, int]:
    """With the offsets in the body that `cut_after` and `stall_after` mean for this span of it."""
    if answer.cut_after is not None and start + answer.cut_after < stop:
        answer = replace(answer, close_at=start + answer.cut_after)
    if answer.stall_after is not None and start + answer.stall_after < stop:
        answer = replace(answer, gates=(*answer.gates, (start + answer.stall_after, Gate())))
    return answer, start, stop


def _head(answer: Answer, start: int, stop: int) -> bytes:
    fields = [("Content-Type", answer.content_type), *answer.fields]
    if answer.etag:
        fields.append(("ETag", answer.etag))
    if answer.last_modified:
        fields.append(("Last-Modified", email.utils.formatdate(answer.last_modified, usegmt=True)))
    if answer.status == 206:
        fields.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(answer.body)}"))
    if answer.chunked and answer.status != 304:
        fields.append(("Transfer-Encoding", "chunked"))
    elif answer.framed and answer.status != 304:
        length = stop - start if answer.announced is None else answer.announced
        fields.append(("Content-Length", str(length)))
    elif answer.status != 304:
        fields.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _pieces(answer: Answer, start: int, stop: int, stopping: Callable[[], bool]) -> Iterator[bytes]:
    """The body's span in small pieces that end at gates and cuts; waits at the gates."""
    cut = min(x for x in (answer.reset_at, answer.close_at, answer.garbage_at, stop) if x is not None)
    gates = {offset: gate for offset, gate in answer.gates if offset >= start}
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
