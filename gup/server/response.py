"""Responses: planned by the request's conditions and ranges, or for a problem.

Everything is decided before the first byte is sent; the writer at the end sends it without waiting.
"""

import errno
import hashlib
import json
import math
import os
import re
import socket
from dataclasses import dataclass, field
from http import HTTPStatus

from gup.cache.body import CUT, Body
from gup.cache.records import Head
from gup.content.client_identity import NOTHING, Stated
from gup.content.key import Kind
from gup.errors import Problem
from gup.server.conditions import evaluate, range_allowed
from gup.server.downloads import Ticket
from gup.server.ranges import Span, parse_ranges
from gup.server.request import Request

WAIT = 0  # the body has no more for now: `body.wait(position, …)` returns when it has
FINISHED = -1
BROKEN = -2  # the rest will never come: reset the connection
# Errors that reading a file can have and writing to a socket never has.
_DISK_ERRORS = frozenset(
    {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO}
)
_LAST_CHUNK = b"0\r\n\r\n"
UNBOUNDED = 1 << 62  # stop of the span of a body of unknown length

_UNSAFE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
_Fields = list[tuple[str, str]]


@dataclass(slots=True)
class Response:
    """A response: `head`, then `segments` in order, literal bytes or spans of `body`.

    Made by `plan`, `refuse` or the hot cache; the handler adds what is counted and logged, the connection the
    two times. Its owner must leave the body and give the ticket back.
    """

    status: int
    head: bytes
    segments: tuple[bytes | Span, ...] = ()
    close: bool = False  # whether the connection ends after it
    chunked: bool = False
    request: Request | None = field(default=None, compare=False)  # None: unreadable, or a hot hit

    body: Body | None = None
    ticket: Ticket | None = None  # of a download; it begins when the ticket has a slot
    sent_at: int = 0
    stream_at: int = 0  # position of the counter of its stream's body bytes; 0: none

    result: str = ""
    key: str | None = None
    kind: Kind | None = None
    stored: bool = False  # from a committed entry
    client: Stated | bytes = NOTHING  # of the hot cache: what the client states, or the head that states it
    problem: str | None = None
    rule: str = ""  # of the delivery rules, that refused it
    began: float = 0.0
    first_byte: float | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """What a head states of one response besides the body's own fields.

    `vary` names the request's fields that chose the body, if any: caches must not give it to other clients.
    `ranges`: whether spans of the body may be sent.
    """

    date: str
    via: str
    age_seconds: int
    cache_status: str
    vary: str | None = None
    ranges: bool = True


def plan(request: Request, head: Head, serving: Serving) -> Response:
    """The response to a GET or HEAD: conditions first (RFC 9110 section 13.2.1), then ranges.

    A body of unknown length has no ranges: it is sent in chunks, or to HTTP/1.0 until the connection closes.
    """
    status = evaluate(request, head.etag, head.last_modified)
    if status == 412:
        problem = Problem("precondition-failed", "The content does not match the request's condition.")
        response = refuse(problem, serving.date, serving.via, keep_alive=request.keep_alive)
    elif status == 304:
        response = _response(304, request, serving, _validators(head, serving.vary), ())
    elif head.length is None:
        response = _streamed(request, head, serving)
    else:
        response = _of_known_length(request, head, head.length, serving)
    if request.method == "HEAD":  # RFC 9110 section 9.3.2: the same head as for GET, and no content
        response.segments, response.chunked = (), False
    response.request = request
    return response


def _streamed(request: Request, head: Head, serving: Serving) -> Response:
    chunked = request.minor_version > 0
    fields = [("Content-Type", head.content_type), *_validators(head, serving.vary)]
    fields += [("Transfer-Encoding", "chunked")] if chunked else []
    response = _response(200, request, serving, fields, (Span(0, UNBOUNDED),), close=not chunked)
    response.chunked = chunked
    return response


def _of_known_length(request: Request, head: Head, length: int, serving: Serving) -> Response:
    ranges, spans = request.header("range"), None
    # RFC 9110 section 14.2: a range is defined for GET only.
    wanted = ranges is not None and request.method == "GET" and serving.ranges
    if wanted and range_allowed(request, head.etag, head.last_modified):
        spans = parse_ranges(str(ranges), length)
    if spans == []:
        content_range = (("Content-Range", f"bytes */{length}"),)
        problem = Problem("range-not-satisfiable", f"The content has {length} bytes.", headers=content_range)
        return refuse(problem, serving.date, serving.via, keep_alive=request.keep_alive)
    if spans is not None and len(spans) > 1:
        return _multipart(request, head, spans, serving)
    ((start, stop),) = spans or [Span(0, length)]
    fields = [("Content-Type", head.content_type), ("Content-Length", str(stop - start))]
    if spans is not None:
        fields.append(("Content-Range", f"bytes {start}-{stop - 1}/{length}"))
    fields += [*_validators(head, serving.vary), ("Accept-Ranges", "bytes")]
    status = 200 if spans is None else 206
    return _response(status, request, serving, fields, (Span(start, stop),) if length else ())


def _multipart(request: Request, head: Head, spans: list[Span], serving: Serving) -> Response:
    """RFC 9110 section 15.3.7.2: a multipart body, each part with its own range and type."""
    # Deterministic for the same request; 128 bits of a hash do not occur in the body by chance.
    asked = f"{head.etag} {head.length} {spans}".encode()
    boundary = hashlib.blake2b(asked, digest_size=16).hexdigest()
    segments: list[bytes | Span] = []
    for span in spans:
        content_range = f"bytes {span.start}-{span.stop - 1}/{head.length}"
        part = field_lines([("Content-Type", head.content_type), ("Content-Range", content_range)])
        segments += [b"%b--%b\r\n%b\r\n" % (b"\r\n" if segments else b"", boundary.encode(), part), span]
    segments.append(f"\r\n--{boundary}--\r\n".encode())
    length = sum(len(part) if isinstance(part, bytes) else part.stop - part.start for part in segments)
    fields = [
        ("Content-Type", f"multipart/byteranges; boundary={boundary}"),
        ("Content-Length", str(length)),
        *_validators(head, serving.vary),
        ("Accept-Ranges", "bytes"),
    ]
    return _response(206, request, serving, fields, tuple(segments))


# --- problems (RFC 9457)


def refuse(problem: Problem, date: str, via: str, *, keep_alive: bool) -> Response:
    """HEAD gets the head only."""
    document = {
        **problem.extensions,  # first, so that none of them replaces a standard member
        "type": f"urn:gup:problem:{problem.slug}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
    }
    body = json.dumps(document, default=str).encode("ascii")
    retry_after = problem.retry_after_seconds
    fields = [
        ("Date", date),
        ("Content-Type", "application/problem+json"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),  # RFC 9111 section 4.2.2 would let others keep a 404, 405, 410 or 414
        # whole seconds, rounded up: no client retries too early
        *([] if retry_after is None else [("Retry-After", str(max(0, math.ceil(retry_after))))]),
        *problem.headers,
        ("Via", via),
        ("Cache-Status", f"gup; detail={problem.slug}"),
        ("Connection", "keep-alive" if keep_alive else "close"),  # HTTP/1.0 needs it to stay open
    ]
    return Response(problem.status, _lines(problem.status, fields), (body,), close=not keep_alive)


# --- heads


def _response(
    status: int,
    request: Request,
    serving: Serving,
    fields: _Fields,
    segments: tuple[bytes | Span, ...],
    *,
    close: bool = False,
) -> Response:
    close = close or not request.keep_alive
    lines = [
        ("Date", serving.date),
        ("Age", str(max(0, serving.age_seconds))),
        *fields,
        ("Via", serving.via),
        ("Cache-Status", serving.cache_status),
        # RFC 9112 section 9.3: persistence is the default in HTTP/1.1 and must be stated in 1.0.
        *([("Connection", "close" if close else "keep-alive")] if close or not request.minor_version else []),
    ]
    return Response(status, _lines(status, lines), segments, close)


def _validators(head: Head, vary: str | None) -> _Fields:
    """Validators and Vary, which a 304 has as well (RFC 9110 section 15.4.5)."""
    fields = (("ETag", head.etag), ("Last-Modified", head.last_modified), ("Vary", vary))
    return [(name, value) for name, value in fields if value is not None]


def _lines(status: int, fields: _Fields) -> bytes:
    """HTTP/1.1 to a client of 1.0 too (RFC 9110 section 6.2)."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % ((status, HTTPStatus(status).phrase.encode(), field_lines(fields)))


def field_lines(fields: _Fields) -> bytes:
    """Each field with its CRLF. No value can end its line (RFC 9110 section 5.5)."""
    return "".join(f"{name}: {_UNSAFE.sub(' ', value)}\r\n" for name, value in fields).encode("latin-1")


# --- writing


@dataclass(slots=True, eq=False)
class ResponseWriter:
    """Writes a connection's responses. Counts body bytes in two of `words` when the socket takes them."""

    words: "memoryview[int]"
    position: int = 0
    sent_bytes: int = 0
    full: bool = False  # the socket took less of the body than it was offered: retrying at once is useless
    _response: Response | None = None
    _segments: tuple[bytes | Span, ...] = ()
    _literal: bytes | memoryview = b""
    _stop: int = 0
    _chunk_left: int = 0

    def start(self, response: Response, body_sent: int = 0) -> None:
        """Begin `response`, of whose body `body_sent` bytes have been sent already."""
        self._response, self._segments = response, response.segments
        self._chunk_left = self.position = self._stop = 0
        self.sent_bytes, self.full = body_sent, False
        literal = response.head
        if response.body is None:  # then literal bytes are no content, and not counted
            literal += b"".join(segment for segment in response.segments if isinstance(segment, bytes))
            self._segments = ()
        self._literal = memoryview(literal)
        if body_sent:
            self._next_segment(response)
            self.position += body_sent

    def end(self) -> None:
        self._response, self._segments = None, ()

    def write(self, sock: socket.SocketType, most: int) -> int:
        """Send some bytes, at most `most` of the body; returns how many, or WAIT, FINISHED, BROKEN.

        BlockingIOError when the socket takes none, another OSError when the client is gone.
        """
        response = self._response
        assert response is not None
        while True:
            if self._literal:
                return self._write_literal(sock, more=bool(self._segments) or self.position < self._stop)
            if self.position < self._stop:
                assert response.body is not None
                done = self._write_span(sock, response, response.body, min(most, self._stop - self.position))
                end = response.body.end() if not done else None
                if end is None or self.position < end:
                    return done
                self._stop = self.position  # the length was unknown at first, and the body is complete now
                if response.chunked:
                    self._literal = memoryview(_LAST_CHUNK)
            elif self._segments:
                self._next_segment(response)
            else:
                return FINISHED

    def _write_literal(self, sock: socket.SocketType, *, more: bool) -> int:
        done = sock.send(self._literal, socket.MSG_MORE if more else 0)
        self._literal = self._literal[done:]
        return done

    def _write_span(self, sock: socket.SocketType, response: Response, body: Body, want: int) -> int:
        available = body.available(self.position, want)
        if available <= 0:
            return BROKEN if available == CUT else WAIT
        if response.chunked:
            if self._chunk_left == 0:
                self._chunk_left = available
                self._literal = memoryview(b"%x\r\n" % available)
                return self._write_literal(sock, more=True)
            available = min(available, self._chunk_left)
        try:
            if body.fd >= 0:
                sent = os.sendfile(sock.fileno(), body.fd, self.position, available)
            else:
                sent = sock.send(body.view(self.position, available))
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            sent = 0
        self.full = sent < available
        self._count(response, sent)
        self.position += sent
        if response.chunked:
            self._chunk_left -= sent
            if self._chunk_left == 0:
                self._literal = memoryview(b"\r\n")
        if not sent:  # unreadable, or shorter than it was: the missing bytes will never come
            body.unreadable()
            return BROKEN
        return sent

    def _next_segment(self, response: Response) -> None:
        segment, self._segments = self._segments[0], self._segments[1:]
        if isinstance(segment, Span):
            self.position, self._stop = segment.start, segment.stop
        else:  # the boundary of a multipart body
            self._literal = memoryview(segment)
            self._count(response, len(segment))

    def _count(self, response: Response, sent: int) -> None:
        self.sent_bytes += sent
        self.words[response.sent_at] += sent
        if response.stream_at:
            self.words[response.stream_at] += sent
