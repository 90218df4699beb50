"""Responses: what is sent for a body, by the request's conditions and ranges, and what for a problem.

Pure: nothing here reads a body or a socket.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from gup.cache.body import Body
from gup.cache.records import Head
from gup.content.client_identity import NOTHING, Stated
from gup.content.key import Kind
from gup.errors import Problem
from gup.server.conditions import Verdict, evaluate, range_allowed
from gup.server.downloads import Ticket
from gup.server.ranges import Span, parse_ranges
from gup.server.request import Request

UNBOUNDED = 1 << 62
"""Where the span of a body of unknown length stops: wherever the body ends."""

_UNSAFE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")

_Fields = list[tuple[str, str]]


@dataclass(slots=True)
class Response:
    """A response: `head`, then `segments` in order, literal bytes or spans of the body.

    Made by `plan`, `refuse` or the hot cache; the handler adds what is counted and logged, the connection
    the two times.
    """

    status: int
    head: bytes
    segments: tuple[bytes | Span, ...] = ()
    chunked: bool = False
    """Whether the segments go out in chunks."""
    close: bool = False
    """Whether the connection ends after it."""

    body: Body | None = None
    """What the spans are of. Whoever drops the response leaves the body."""
    ticket: Ticket | None = None
    """Of a download, which begins when it has a slot."""
    sent_at: int = 0
    stream_at: int = 0
    """The counters' words that count its body bytes."""

    method: str | None = None
    """None: the request could not be read."""
    result: str = ""
    key: str | None = None
    kind: Kind | None = None
    stored: bool = False
    """Whether it is answered from a committed entry."""
    target: str = ""
    client: Stated | bytes = NOTHING
    """What the client states; or its request's head, to be read only if somebody wants to know."""
    problem: str | None = None
    began: float = 0.0
    first_byte: float | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """What a head says of one response besides the body's own head.

    `vary` names the request's fields that chose the body, where any did: no cache may give it to others.
    `ranges`: whether spans of the body may be sent.
    """

    date: str
    via: str
    age_seconds: int
    cache_status: str
    vary: str | None = None
    ranges: bool = True


def plan(request: Request, head: Head, serving: Serving) -> Response:
    """The response to a GET or HEAD: conditions first (RFC 9110 section 13.2.1), ranges after them.

    A body of unknown length has no ranges: it goes out in chunks, or to HTTP/1.0 until the connection closes.
    """
    response = _plan_get(request, head, serving)
    if request.method == "HEAD":  # RFC 9110 section 9.3.2: the same head as for GET, and no content
        response.segments, response.chunked = (), False
    return response


def _plan_get(request: Request, head: Head, serving: Serving) -> Response:
    verdict = evaluate(request, head.etag, head.last_modified)
    if verdict is Verdict.FAILED:
        problem = Problem("precondition-failed", "The content is not the one that the request means.")
        return _refused(request, problem, serving)
    if verdict is Verdict.NOT_MODIFIED:
        return _response(304, request, serving, _validators(head, serving.vary), ())
    if head.length is None:
        return _streamed(request, head, serving)
    spans = _spans(request, head, head.length) if serving.ranges else None
    return _of_known_length(request, head, spans, serving)


def _spans(request: Request, head: Head, length: int) -> list[Span] | None:
    """The spans to answer with, empty when none can be satisfied; None: the whole body."""
    header = request.header("range")
    # RFC 9110 section 14.2: a range means something with GET only.
    if header is None or request.method != "GET" or not range_allowed(request, head.etag, head.last_modified):
        return None
    return parse_ranges(header, length)


def _streamed(request: Request, head: Head, serving: Serving) -> Response:
    chunked = request.minor_version == 1
    close = not (chunked and request.keep_alive)
    fields = [("Content-Type", head.content_type), *_validators(head, serving.vary)]
    if chunked:
        fields.append(("Transfer-Encoding", "chunked"))
    text = _head(200, serving, fields, _connection(close, request.minor_version))
    return Response(200, text, (Span(0, UNBOUNDED),), chunked, close)


def _of_known_length(request: Request, head: Head, spans: list[Span] | None, serving: Serving) -> Response:
    """`spans` as they are asked for; None: the whole body."""
    if spans == []:
        problem = Problem(
            "range-not-satisfiable",
            f"The content has {head.length} bytes.",
            headers=(("Content-Range", f"bytes */{head.length}"),),
        )
        return _refused(request, problem, serving)
    if spans is not None and len(spans) > 1:
        return _multipart(request, head, spans, serving)
    template = HeadTemplate(
        head,
        serving.via,
        serving.cache_status,
        serving.vary,
        keep_alive=request.keep_alive,
        minor_version=request.minor_version,
    )
    date, age, close = serving.date.encode("ascii"), max(0, serving.age_seconds), not request.keep_alive
    if spans is not None:
        return Response(206, template.part(date, age, spans[0]), tuple(spans), close=close)
    assert head.length is not None
    whole = (Span(0, head.length),) if head.length else ()
    return Response(200, template.whole(date, age), whole, close=close)


def _multipart(request: Request, head: Head, spans: list[Span], serving: Serving) -> Response:
    """RFC 9110 section 15.3.7.2: a multipart body, each part with its own range and type."""
    # The same question has the same answer; 128 bits of a hash do not occur in the body by chance.
    asked = f"{head.etag} {head.length} {spans}".encode()
    boundary = hashlib.blake2b(asked, digest_size=16).hexdigest()
    segments: list[bytes | Span] = []
    for span in spans:
        part = [
            ("Content-Type", head.content_type),
            ("Content-Range", f"bytes {span.start}-{span.stop - 1}/{head.length}"),
        ]
        opening = ("\r\n" if segments else "") + f"--{boundary}\r\n"
        segments += [opening.encode() + field_lines(part) + b"\r\n", span]
    segments.append(f"\r\n--{boundary}--\r\n".encode())
    length = sum(len(part) if isinstance(part, bytes) else part.stop - part.start for part in segments)
    fields = [
        ("Content-Type", f"multipart/byteranges; boundary={boundary}"),
        ("Content-Length", str(length)),
        *_validators(head, serving.vary),
        ("Accept-Ranges", "bytes"),
    ]
    return _response(206, request, serving, fields, tuple(segments))


def _refused(request: Request, problem: Problem, serving: Serving) -> Response:
    return refuse(problem, date=serving.date, via=serving.via, keep_alive=request.keep_alive)


def _response(
    status: int, request: Request, serving: Serving, fields: _Fields, segments: tuple[bytes | Span, ...]
) -> Response:
    close = not request.keep_alive
    head = _head(status, serving, fields, _connection(close, request.minor_version))
    return Response(status, head, segments, close=close)


# --- problems (RFC 9457)


def refuse(problem: Problem, *, date: str, via: str, keep_alive: bool) -> Response:
    """The response to a request that met `problem`. To HEAD its head alone is sent."""
    document = {
        **problem.extensions,  # first, so that none of them takes a standard member's place
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
        # whole seconds, rounded up: nobody is told to come back too early
        *([] if retry_after is None else [("Retry-After", str(max(0, math.ceil(retry_after))))]),
        *problem.headers,
        ("Via", via),
        ("Cache-Status", f"gup; detail={problem.slug}"),
        ("Connection", "keep-alive" if keep_alive else "close"),  # HTTP/1.0 must be told that it stays
    ]
    head = status_line(problem.status) + field_lines(fields) + b"\r\n"
    return Response(problem.status, head, (body,), close=not keep_alive)


# --- heads


class HeadTemplate:
    """The heads of a body of known length, whole or of one range, ready but for Date, Age and the range."""

    __slots__ = ("_fields", "_length", "_type")

    def __init__(
        self,
        head: Head,
        via: str,
        cache_status: str,
        vary: str | None,
        *,
        keep_alive: bool = True,
        minor_version: int = 1,
    ) -> None:
        assert head.length is not None
        fields = [
            *_validators(head, vary),
            ("Accept-Ranges", "bytes"),
            ("Via", via),
            ("Cache-Status", cache_status),
            *_connection(not keep_alive, minor_version),
        ]
        self._length = head.length
        self._type = field_lines([("Content-Type", head.content_type)])
        self._fields = field_lines(fields) + b"\r\n"

    def whole(self, date: bytes, age: int) -> bytes:
        """The head of a 200; `date` is an IMF-fixdate, `age` whole seconds, not negative."""
        return b"HTTP/1.1 200 OK\r\nDate: %b\r\nAge: %d\r\n%bContent-Length: %d\r\n%b" % (
            (date, age, self._type, self._length, self._fields)
        )

    def part(self, date: bytes, age: int, span: Span) -> bytes:
        """The head of a 206."""
        range_lines = b"Content-Length: %d\r\nContent-Range: bytes %d-%d/%d\r\n" % (
            (span.stop - span.start, span.start, span.stop - 1, self._length)
        )
        return b"HTTP/1.1 206 Partial Content\r\nDate: %b\r\nAge: %d\r\n%b%b%b" % (
            (date, age, self._type, range_lines, self._fields)
        )


def _head(status: int, serving: Serving, fields: _Fields, connection: _Fields) -> bytes:
    lines = [
        ("Date", serving.date),
        ("Age", str(max(0, serving.age_seconds))),
        *fields,
        ("Via", serving.via),
        ("Cache-Status", serving.cache_status),
        *connection,
    ]
    return status_line(status) + field_lines(lines) + b"\r\n"


def _validators(head: Head, vary: str | None) -> _Fields:
    """Validators and Vary, which a 304 has as well (RFC 9110 section 15.4.5)."""
    fields = (("ETag", head.etag), ("Last-Modified", head.last_modified), ("Vary", vary))
    return [(name, value) for name, value in fields if value is not None]


def _connection(close: bool, minor_version: int) -> _Fields:
    # RFC 9112 section 9.3: to stay is the rule in HTTP/1.1 and must be said in 1.0.
    if close:
        return [("Connection", "close")]
    return [] if minor_version else [("Connection", "keep-alive")]


def status_line(status: int) -> bytes:
    """The first line of a response, with its CRLF; HTTP/1.1 to a client of 1.0 too (RFC 9110 section 6.2)."""
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode("ascii")


def field_lines(fields: Iterable[tuple[str, str]]) -> bytes:
    """Fields as they stand in a head, each with its CRLF. No value ends its line (RFC 9110 section 5.5)."""
    return "".join(f"{name}: {_UNSAFE.sub(' ', value)}\r\n" for name, value in fields).encode("latin-1")
