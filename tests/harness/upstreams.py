"""Upstreams: one that says exactly what it is told, one with scripted answers, a stock nginx; a web proxy.

Those in this process record each request with what was sent in answer; nginx is read through its own log.
"""

import base64
import contextlib
import email.utils
import os
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import trustme

from gup.demo.content import decide
from harness.content import Tree
from harness.needs import program
from harness.processes import end, environment, free_port, listens, until

PIECE_BYTES = 1 << 14
GATE_TIMEOUT_SECONDS = 100.0


class Over(Exception):  # noqa: N818 - an event
    """The connection is to be closed now."""


@dataclass(slots=True)
class Request:
    """One request of a connection, the means to answer it, and what was sent. Times are monotonic.

    `number` counts on its connection, from 1.
    """

    method: str
    path: str
    fields: list[tuple[str, str]]
    number: int
    peer_port: int
    _connection: socket.socket
    _stopping: threading.Event
    at: float = field(default_factory=time.monotonic)
    body: bytes = b""
    status: int = 0
    body_bytes: int = 0
    first_byte_at: float = 0.0
    done: bool = False
    aborted: bool = False
    """Whether the other side went away before everything was sent."""

    def header(self, name: str) -> str | None:
        values = [value for found, value in self.fields if found == name.lower()]
        return ", ".join(values) if values else None

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

    def tunnel(self, other: socket.socket) -> None:
        """Carry bytes both ways until both sides have ended."""
        back = threading.Thread(target=_carry, args=(self._connection, other))
        back.start()
        _carry(other, self._connection)
        back.join()
        raise Over


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def ok(body: bytes, *lines: str) -> bytes:
    """A complete answer."""
    head = "\r\n".join(("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *lines))
    return head.encode("latin-1") + b"\r\n\r\n" + body


class RawUpstream:
    """Calls `answer` for each request, in a thread a connection; Over closes the connection."""

    def __init__(
        self,
        answer: Callable[[Request], None] | None = None,
        tls: ssl.SSLContext | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if answer is not None:
            self.reply = answer
        self._tls = tls
        self._listener = socket.create_server((host, port), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self.seen: list[Request] = []
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
                request = Request(method, path, fields, number, peer_port, connection, self._stopping)
                length = int(request.header("content-length") or 0)
                while len(buffer) < length and (piece := connection.recv(65536)):
                    buffer += piece
                request.body = bytes(buffer[:length])
                del buffer[:length]
                with self._lock:
                    self.seen.append(request)
                self._reply(request)
        except (Over, OSError):
            return
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _reply(self, request: Request) -> None:
        try:
            self.reply(request)
        except OSError:
            request.aborted = True
            raise
        finally:
            request.done = True

    def requests(self, path: str | None = None, *, method: str = "GET") -> list[Request]:
        """What was asked for, of one path or of all content."""
        with self._lock:
            found = [seen for seen in self.seen if seen.method == method]
        if path is None:
            return [seen for seen in found if seen.path.startswith("/content/")]
        return [seen for seen in found if _plain(seen.path) == _plain(path)]

    def body_bytes(self, path: str) -> int:
        return sum(seen.body_bytes for seen in self.requests(path))

    def wait_for_request(self, path: str, number: int = 1, timeout_seconds: float = 30.0) -> Request:
        """The `number`-th GET of `path`, when it has come."""
        what = f"request {number} for {path}"
        return until(lambda: self.requests(path)[number - 1 : number], what, timeout_seconds)[0]

    def wait_done(self, path: str, number: int = 1) -> Request:
        """The same when its answer was sent, or broken off."""
        seen = self.wait_for_request(path, number)
        until(lambda: seen.done, f"request {number} for {path} is answered")
        return seen


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

    def _pass(self, stopping: threading.Event) -> None:
        self._reached.set()
        deadline = time.monotonic() + GATE_TIMEOUT_SECONDS
        while not self._open.wait(0.05):
            if stopping.is_set() or time.monotonic() > deadline:
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

    def chosen(self, request: Request) -> tuple["Answer", int, int]:
        """The answer to this request's conditions and range, with the span of the body to send."""
        whole = (self, 0, len(self.body))
        if self.status != 200:
            return whole
        heeded = {"range": self.ranges, "if-range": self.if_range}
        headers = {name.title(): value for name, value in request.fields if heeded.get(name, True)}
        status, start, stop = decide(headers, self.etag, self.last_modified, len(self.body))
        if status == 200:
            return whole
        start += self.range_shift
        if status == 304 or start >= stop:
            return replace(self, status=status if status == 304 else 416, body=b""), 0, 0
        body = self.body if self.range_body is None else self.range_body
        return replace(self, status=206, body=body), start, stop

    def broken_off(self, start: int, stop: int) -> "Answer":
        """With the offsets in the body that `cut_after` and `stall_after` mean for this span of it."""
        answer = self
        if self.cut_after is not None and start + self.cut_after < stop:
            answer = replace(answer, close_at=start + self.cut_after)
        if self.stall_after is not None and start + self.stall_after < stop:
            answer = replace(answer, gates=(*answer.gates, (start + self.stall_after, Gate())))
        return answer

    def head(self, start: int, stop: int) -> bytes:
        fields = [("Content-Type", self.content_type), *self.fields]
        if self.etag:
            fields.append(("ETag", self.etag))
        if self.last_modified:
            fields.append(("Last-Modified", email.utils.formatdate(self.last_modified, usegmt=True)))
        if self.status == 206:
            fields.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(self.body)}"))
        if self.status == 304:
            pass
        elif self.chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        elif self.framed:
            length = stop - start if self.announced is None else self.announced
            fields.append(("Content-Length", str(length)))
        else:
            fields.append(("Connection", "close"))
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in fields)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def pieces(self, start: int, stop: int, stopping: threading.Event) -> Iterator[bytes]:
        """The body's span in small pieces that end at gates and cuts; waits at the gates."""
        cut = min(x for x in (self.reset_at, self.close_at, self.garbage_at, stop) if x is not None)
        gates = {offset: gate for offset, gate in self.gates if offset >= start}
        marks = sorted({offset for offset in gates if offset < stop} | {cut})
        at = start
        while True:
            if at in gates:
                gates.pop(at)._pass(stopping)
            if at >= min(cut, stop):
                return
            until_ = min(at + PIECE_BYTES, *(mark for mark in marks if mark > at), stop)
            yield self.body[at:until_]
            at = until_


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
        self.exact = False
        super().__init__(tls=tls, host=host, port=port)
        if congestion:
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())

    def answer(self, path: str, *answers: Answer | bytes) -> None:
        """What `path` answers from now on: one after the other, the last for ever; bytes have the tag "a"."""
        made = [Answer(each, etag='"a"') if isinstance(each, bytes) else each for each in answers]
        with self._lock:
            self._scripts[_plain(path)] = _Script(_decoded(path), made)

    def _next(self, path: str) -> Answer:
        with self._lock:
            script = self._scripts.get(_plain(path))
            if script is None or (self.exact and script.path != _decoded(path)):
                return Answer(b"not here", 404, content_type="text/plain")
            script.asked += 1
            return script.answers[min(script.asked, len(script.answers)) - 1]

    def reply(self, request: Request) -> None:
        answer, start, stop = self._next(request.path).chosen(request)
        answer = answer.broken_off(start, stop)
        request.status = answer.status
        if answer.head_gate:
            answer.head_gate._pass(self._stopping)
        if answer.reset_at is not None and answer.reset_at < 0:
            request.reset()
        request.send(answer.head(start, stop))
        if request.method == "HEAD" or answer.status in (204, 304):
            return
        for piece in answer.pieces(start, stop, self._stopping):
            request.first_byte_at = request.first_byte_at or time.monotonic()
            request.send(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
            request.body_bytes += len(piece)
            time.sleep(answer.piece_seconds)
        if answer.garbage_at is not None:
            request.send(b"no chunk\r\n")
            return
        if answer.reset_at is not None and answer.reset_at <= stop:
            request.reset()
        if answer.close_at is not None and answer.close_at <= stop:
            raise Over
        if answer.chunked:
            request.send(b"0\r\n\r\n")
        if not answer.framed or answer.announced is not None:
            raise Over


def _decoded(path: str) -> str:
    return re.sub("%7[bB]", "{", re.sub("%7[dD]", "}", path))


def _plain(path: str) -> str:
    return _decoded(path).upper()


# --- what stands on the way


class WebProxy(RawUpstream):
    """A small web proxy: absolute-form requests are sent on, CONNECT opens a tunnel."""

    def __init__(self, user: str = "") -> None:
        self._password = f"Basic {base64.b64encode(user.encode()).decode()}" if user else None
        super().__init__()
        self.url = f"http://{user + '@' if user else ''}127.0.0.1:{self.port}"

    def reply(self, request: Request) -> None:
        if request.header("proxy-authorization") != self._password:
            request.send(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            raise Over
        parts = urlsplit(request.path if "//" in request.path else f"//{request.path}")
        with socket.create_connection((parts.hostname, parts.port or 80), 10) as upstream:
            if request.method == "CONNECT":
                request.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                kept = [
                    f"{name}: {value}"
                    for name, value in request.fields
                    if not name.startswith("proxy-") and name != "connection"
                ]
                lines = [f"{request.method} {parts.path} HTTP/1.1", *kept, "Connection: close", "", ""]
                upstream.sendall("\r\n".join(lines).encode("latin-1") + request.body)
            request.tunnel(upstream)


class Authority:
    """A private certificate authority. Its servers are those of these names, or 127.0.0.1."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ca = folder, folder / "ca.pem"
        self._authority = trustme.CA(organization_name=name)
        self._authority.cert_pem.write_to_path(self.ca)

    def server(self, *names: str) -> str:
        """nginx directives of a server with a certificate for these names."""
        file, issued = self.folder / "server.pem", self._authority.issue_cert(*(names or ("127.0.0.1",)))
        issued.private_key_and_cert_chain_pem.write_to_path(file)
        return f"ssl_certificate {file}; ssl_certificate_key {file}; ssl_protocols TLSv1.2 TLSv1.3;"

    def context(self) -> ssl.SSLContext:
        """The same for a server of Python's."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert("127.0.0.1").configure_cert(made)
        return made


def certificate(cert: Path, key: Path) -> None:
    """A new certificate for 127.0.0.1 with its authority's, so that the file trusts itself, and its key."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert.write_bytes(issued.cert_chain_pems[0].bytes() + authority.cert_pem.bytes())
    key.touch(0o600)
    issued.private_key_pem.write_to_path(key)


# --- a stock upstream as a real process


@dataclass(frozen=True, slots=True)
class Logged:
    """One request as the upstream's own log has it. Times are Unix seconds, to the millisecond."""

    method: str
    path: str
    status: int
    body_bytes: int
    range: str
    ended_at: float = 0.0


_NGINX = """\
daemon off;
{user}worker_processes 1;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    log_format counted '$request_method|$request_uri|$status|$body_bytes_sent|$http_range'
                       '|$msec';
    access_log {prefix}/access.log counted;
    types {{ }}
    default_type application/octet-stream;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    sendfile on;
    keepalive_timeout 65;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        {extra}
    }}
}}
"""


class Nginx:
    """A stock nginx over a tree. `rate` (such as "10m") slows answers; `extra` goes into its server block."""

    def __init__(self, tree: Tree, prefix: Path, *, rate: str = "", extra: str = "") -> None:
        nginx = program("nginx")
        self.tree = tree
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._prefix = prefix
        self._mark = uuid.uuid4().hex
        prefix.mkdir(parents=True, exist_ok=True)
        config = prefix / "nginx.conf"
        config.write_text(
            _NGINX.format(
                user="" if os.geteuid() else "user root;\n",
                prefix=prefix,
                port=self.port,
                root=tree.root,
                extra=(f"limit_rate {rate};\n" if rate else "") + extra,
            )
        )
        self._command = [nginx, "-p", str(prefix), "-c", str(config), "-e", str(prefix / "error.log")]
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(self._command, env=environment(self._mark), stdin=subprocess.DEVNULL)
        until(lambda: listens(("127.0.0.1", self.port)) or process.poll() is not None, "nginx listens", 10)
        assert process.poll() is None, (self._prefix / "error.log").read_text()
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        end(self._process, self._mark)

    def restart(self) -> None:
        """Start again on the same port, after `stop`."""
        self._process = self._start()

    def log(self, path: str | None = None, *, methods: Sequence[str] = ("GET",)) -> list[Logged]:
        """What nginx logged, of one path or of all. A request is logged when it has ended."""
        rows = [_nginx_row(line) for line in (self._prefix / "access.log").read_text().splitlines()]
        return [
            row
            for row in rows
            if row.method in methods and (path is None or _decoded(row.path) == _decoded(path))
        ]

    def requests(self, path: str) -> int:
        return len(self.log(path))

    def body_bytes(self, path: str) -> int:
        return sum(row.body_bytes for row in self.log(path))


def _nginx_row(line: str) -> Logged:
    method, path, status, size, range_, ended = line.split("|")
    return Logged(method, path, int(status), int(size), range_.removeprefix("-"), float(ended))


class Elsewhere:
    """What a service stands before and nobody starts here: another gup, or nothing. `table`: its settings."""

    def __init__(self, port: int, **table: str) -> None:
        self.port, self.url, self.table = port, f"http://127.0.0.1:{port}", table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""
