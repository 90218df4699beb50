"""Problems as responses (RFC 9457), and how a response head is written; decides nothing, sends nothing."""

import json
import math
import re
from collections.abc import Iterable
from http import HTTPStatus

from gup.errors import Problem

_UNSAFE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")


def clean(value: str) -> str:
    """`value` as a field value: nothing in it can end the line (RFC 9110 section 5.5)."""
    return _UNSAFE.sub(" ", value)


def field_lines(fields: Iterable[tuple[str, str]]) -> bytes:
    """Fields as they stand in a head, each with its CRLF."""
    return "".join(f"{name}: {clean(value)}\r\n" for name, value in fields).encode("latin-1")


def status_line(status: int) -> bytes:
    """The first line of a response, with its CRLF; HTTP/1.1 to a client of 1.0 too (RFC 9110 section 6.2)."""
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode("ascii")


def render(
    problem: Problem,
    *,
    date: str,
    via: str,
    instance: str | None,
    head_only: bool,
    keep_alive: bool,
) -> bytes:
    """The whole response to a request that met `problem`; `instance` is the request's own URI."""
    head, body = render_parts(problem, date=date, via=via, instance=instance, keep_alive=keep_alive)
    return head if head_only else head + body


def render_parts(
    problem: Problem, *, date: str, via: str, instance: str | None, keep_alive: bool
) -> tuple[bytes, bytes]:
    """Head and body of the response; the head alone answers a HEAD request."""
    body = _document(problem, instance)
    fields = [
        ("Date", date),
        ("Content-Type", "application/problem+json"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),  # RFC 9111 section 4.2.2 would let others keep a 404, 405, 410 or 414
        *_retry_after(problem.retry_after_seconds),
        *problem.headers,
        ("Via", via),
        ("Cache-Status", f"gup; detail={problem.slug}"),
        ("Connection", "keep-alive" if keep_alive else "close"),  # a client of 1.0 must be told that it stays
    ]
    return status_line(problem.status) + field_lines(fields) + b"\r\n", body


def _retry_after(seconds: float | None) -> list[tuple[str, str]]:
    # Whole seconds, rounded up: nobody is told to come back too early.
    return [] if seconds is None else [("Retry-After", str(max(0, math.ceil(seconds))))]


def _document(problem: Problem, instance: str | None) -> bytes:
    document = {
        **problem.extensions,  # first, so that none of them takes a standard member's place
        "type": f"urn:gup:problem:{problem.slug}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
    }
    if instance is not None:
        document["instance"] = instance
    return json.dumps(document, default=str).encode("ascii")
