"""Which response a request for an existing body gets: status, head and spans of the body; sends nothing."""

import hashlib
from dataclasses import dataclass, replace

from gup.errors import Problem
from gup.server.conditions import Verdict, evaluate, range_allowed
from gup.server.problem import field_lines, render_parts, status_line
from gup.server.ranges import Span, parse_ranges
from gup.server.request import Request

UNBOUNDED = 1 << 62
"""Where the span of a body ends whose length is not known yet: wherever the body ends."""

_Fields = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Representation:
    """The body as clients are told of it. While `length` is None, `etag` is None too."""

    length: int | None
    etag: str | None
    last_modified: str | None
    content_type: str
    vary: str | None = None
    """The request's fields that chose it, where any did: a cache on the way must not give it to others."""


@dataclass(frozen=True, slots=True)
class Served:
    """Values of the fields that tell of this one response."""

    date: str
    via: str
    age_seconds: int
    cache_status: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A response, ready to be sent: `head`, then `segments` in order, literal bytes or spans of the body.

    `chunked`: what follows the head goes out in chunks. `close`: the connection ends after it.
    """

    status: int
    head: bytes
    segments: tuple[bytes | Span, ...]
    chunked: bool
    close: bool


class HeadTemplate:
    """The 200 head of a body of known length, ready but for Date and Age."""

    __slots__ = ("_middle", "_prefix", "_suffix")

    def __init__(
        self,
        representation: Representation,
        via: str,
        cache_status: str,
        *,
        keep_alive: bool,
        minor_version: int,
    ) -> None:
        assert representation.length is not None
        fields = [
            ("Content-Type", representation.content_type),
            ("Content-Length", str(representation.length)),
            *_told_always(representation),
            ("Accept-Ranges", "bytes"),
            ("Via", via),
            ("Cache-Status", cache_status),
            *_connection(not keep_alive, minor_version),
        ]
        self._prefix = status_line(200) + b"Date: "
        self._middle = b"\r\nAge: "
        self._suffix = b"\r\n" + field_lines(fields) + b"\r\n"

    def render(self, date: bytes, age: int) -> bytes:
        """The head; `date` is an IMF-fixdate, `age` whole seconds, not negative."""
        return b"%b%b%b%d%b" % (self._prefix, date, self._middle, age, self._suffix)


class PartTemplate:
    """The 206 head for one range of such a body to HTTP/1.1 on a connection that stays."""

    __slots__ = ("_length", "_prefix", "_suffix", "_type")

    def __init__(self, representation: Representation, via: str, cache_status: str) -> None:
        assert representation.length is not None
        self._length = representation.length
        self._prefix = status_line(206) + b"Date: "
        self._type = field_lines([("Content-Type", representation.content_type)])
        fields = [
            *_told_always(representation),
            ("Accept-Ranges", "bytes"),
            ("Via", via),
            ("Cache-Status", cache_status),
        ]
        self._suffix = b"\r\n" + field_lines(fields) + b"\r\n"

    def render(self, date: bytes, age: int, start: int, stop: int) -> bytes:
        """The head for the bytes from `start` up to, not including, `stop`."""
        return b"%b%b\r\nAge: %d\r\n%bContent-Length: %d\r\nContent-Range: bytes %d-%d/%d%b" % (
            self._prefix,
            date,
            age,
            self._type,
            stop - start,
            start,
            stop - 1,
            self._length,
            self._suffix,
        )


def plan(request: Request, representation: Representation, served: Served) -> Plan:
    """The response to a GET or HEAD: conditions first (RFC 9110 section 13.2.1), ranges after them.

    A body of unknown length has no ranges: it goes out in chunks, or to HTTP/1.0 until the connection closes.
    """
    answer = _plan_get(request, representation, served)
    # RFC 9110 section 9.3.2: the same head as for GET, and no content.
    return replace(answer, segments=(), chunked=False) if request.method == "HEAD" else answer


def _plan_get(request: Request, representation: Representation, served: Served) -> Plan:
    verdict = evaluate(request, representation.etag, representation.last_modified)
    if verdict is Verdict.FAILED:
        problem = Problem("precondition-failed", "The content is not the one that the request means.")
        return _refused(request, problem, served)
    if verdict is Verdict.NOT_MODIFIED:
        return _not_modified(request, representation, served)
    return _plan_content(request, representation, served)


def _plan_content(request: Request, representation: Representation, served: Served) -> Plan:
    if representation.length is None:
        return _streamed(request, representation, served)
    spans = _spans(request, representation, representation.length)
    if spans is None:
        return _whole(request, representation, representation.length, served)
    if not spans:
        return _unsatisfiable(request, representation.length, served)
    if len(spans) == 1:
        return _one_part(request, representation, spans[0], served)
    return _several_parts(request, representation, spans, served)


def _spans(request: Request, representation: Representation, length: int) -> list[Span] | None:
    """The spans to answer with, empty when none can be; None: with the whole body."""
    header = request.header("range")
    # RFC 9110 section 14.2: a range means something with GET only.
    if header is None or request.method != "GET":
        return None
    if not range_allowed(request, representation.etag, representation.last_modified):
        return None
    return parse_ranges(header, length)


def _whole(request: Request, representation: Representation, length: int, served: Served) -> Plan:
    template = HeadTemplate(
        representation,
        served.via,
        served.cache_status,
        keep_alive=request.keep_alive,
        minor_version=request.minor_version,
    )
    head = template.render(served.date.encode("ascii"), max(0, served.age_seconds))
    segments = (Span(0, length),) if length else ()
    return Plan(200, head, segments, chunked=False, close=not request.keep_alive)


def _streamed(request: Request, representation: Representation, served: Served) -> Plan:
    chunked = request.minor_version == 1
    close = not (chunked and request.keep_alive)
    fields = [("Content-Type", representation.content_type), *_told_always(representation)]
    if chunked:
        fields.append(("Transfer-Encoding", "chunked"))
    head = _head(200, served, fields, _connection(close, request.minor_version))
    return Plan(200, head, (Span(0, UNBOUNDED),), chunked, close)


def _not_modified(request: Request, representation: Representation, served: Served) -> Plan:
    return _answer(304, request, served, _told_always(representation), ())


def _one_part(request: Request, representation: Representation, span: Span, served: Served) -> Plan:
    fields = [
        ("Content-Type", representation.content_type),
        ("Content-Length", str(span.stop - span.start)),
        ("Content-Range", _content_range(span, representation)),
        *_told_always(representation),
        ("Accept-Ranges", "bytes"),
    ]
    return _answer(206, request, served, fields, (span,))


def _several_parts(
    request: Request, representation: Representation, spans: list[Span], served: Served
) -> Plan:
    """RFC 9110 section 15.3.7.2: a multipart body, each part with its own range and type."""
    boundary = _boundary(representation, spans)
    segments: list[bytes | Span] = []
    for span in spans:
        part = [
            ("Content-Type", representation.content_type),
            ("Content-Range", _content_range(span, representation)),
        ]
        opening = b"\r\n--" if segments else b"--"
        segments += [opening + boundary + b"\r\n" + field_lines(part) + b"\r\n", span]
    segments.append(b"\r\n--" + boundary + b"--\r\n")
    fields = [
        ("Content-Type", f"multipart/byteranges; boundary={boundary.decode()}"),
        ("Content-Length", str(sum(_size_bytes(segment) for segment in segments))),
        *_told_always(representation),
        ("Accept-Ranges", "bytes"),
    ]
    return _answer(206, request, served, fields, tuple(segments))


def _unsatisfiable(request: Request, length: int, served: Served) -> Plan:
    problem = Problem(
        "range-not-satisfiable",
        f"The content has {length} bytes.",
        headers=(("Content-Range", f"bytes */{length}"),),
    )
    return _refused(request, problem, served)


def _refused(request: Request, problem: Problem, served: Served) -> Plan:
    head, body = render_parts(
        problem, date=served.date, via=served.via, instance=None, keep_alive=request.keep_alive
    )
    return Plan(problem.status, head, (body,), chunked=False, close=not request.keep_alive)


def _answer(
    status: int, request: Request, served: Served, fields: _Fields, segments: tuple[bytes | Span, ...]
) -> Plan:
    close = not request.keep_alive
    head = _head(status, served, fields, _connection(close, request.minor_version))
    return Plan(status, head, segments, chunked=False, close=close)


def _head(status: int, served: Served, fields: _Fields, connection: _Fields) -> bytes:
    lines = [
        ("Date", served.date),
        ("Age", str(max(0, served.age_seconds))),
        *fields,
        ("Via", served.via),
        ("Cache-Status", served.cache_status),
        *connection,
    ]
    return status_line(status) + field_lines(lines) + b"\r\n"


def _told_always(representation: Representation) -> _Fields:
    """Validators and Vary, which a 304 has as well (RFC 9110 section 15.4.5)."""
    fields = (
        ("ETag", representation.etag),
        ("Last-Modified", representation.last_modified),
        ("Vary", representation.vary),
    )
    return [(name, value) for name, value in fields if value is not None]


def _connection(close: bool, minor_version: int) -> _Fields:
    # RFC 9112 section 9.3: to stay is the rule in HTTP/1.1 and must be said in 1.0.
    if close:
        return [("Connection", "close")]
    return [] if minor_version else [("Connection", "keep-alive")]


def _content_range(span: Span, representation: Representation) -> str:
    return f"bytes {span.start}-{span.stop - 1}/{representation.length}"


def _size_bytes(segment: bytes | Span) -> int:
    return len(segment) if isinstance(segment, bytes) else segment.stop - segment.start


def _boundary(representation: Representation, spans: list[Span]) -> bytes:
    # The same question has the same answer; 128 bits of a hash do not occur in the body by chance.
    asked = f"{representation.etag} {representation.length} {spans}"
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest().encode("ascii")
