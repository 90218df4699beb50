"""Every error of gup: one base class, and the table of problems that clients are answered with. No I/O."""

import errno
from typing import NamedTuple

SHOWN_BYTES = 512
"""The longest foreign text that a message shows."""


def quoted(text: str | bytes) -> str:
    r"""Text from outside (an upstream, a client, a file), fit for a message.

    At most SHOWN_BYTES of UTF-8, a longer one ends in "…"; what is not printable (controls, terminal escapes,
    marks of writing direction, bytes that are not UTF-8) is written as \x1b or \u202e. Idempotent. HTML must
    still be escaped.
    """
    if isinstance(text, bytes):
        text = text[: SHOWN_BYTES + 1].decode("utf-8", "surrogateescape")
    shown = printable(text[: SHOWN_BYTES + 1])
    encoded = shown.encode()
    if len(encoded) <= SHOWN_BYTES:
        return shown
    return encoded[: SHOWN_BYTES - len("…".encode())].decode("utf-8", "ignore") + "…"


def printable(text: str) -> str:
    """The same for text of any length."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class GupError(Exception):
    """Base of all errors that gup raises for faults outside of it; its own faults are asserted."""


class SettingsError(GupError):
    """`problems` has one printable sentence per mistake: key, value found, and what would be right."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [printable(problem) for problem in problems]  # names of keys may hold anything
        super().__init__("\n".join(self.problems))


class StoreError(GupError):
    """The cache directory could not be used as asked (full, read-only, foreign)."""


class ProblemType(NamedTuple):
    """One row of PROBLEMS: status code and title of an RFC 9457 problem."""

    status: int
    title: str


PROBLEMS: dict[str, ProblemType] = {
    "bad-request": ProblemType(400, "The request is not well-formed HTTP"),
    "bad-path": ProblemType(400, "The path is not a content path"),
    "forbidden-host": ProblemType(403, "This is not an open proxy"),
    "rule-refused": ProblemType(403, "The delivery rules do not allow this content for this client"),
    "not-content": ProblemType(404, "Only content is served here"),
    "upstream-not-found": ProblemType(404, "The upstream does not have this content"),
    "upstream-gone": ProblemType(410, "The upstream no longer has this content"),
    "method-not-allowed": ProblemType(405, "Only GET and HEAD are served here"),
    "request-timeout": ProblemType(408, "The request head did not arrive in time"),
    "precondition-failed": ProblemType(412, "A precondition of the request is not met"),
    "uri-too-long": ProblemType(414, "The request target is too long"),
    "range-not-satisfiable": ProblemType(416, "No part of the range lies within the content"),
    "head-too-large": ProblemType(431, "The request head is too large"),
    "internal-error": ProblemType(500, "Internal error"),
    "upstream-refused": ProblemType(502, "The upstream refused the request"),
    "upstream-error": ProblemType(502, "The upstream answered with an error"),
    "upstream-bad-body": ProblemType(502, "The upstream's answer is not the requested content"),
    "upstream-unsure-end": ProblemType(502, "The upstream's answer has no confirmed end"),
    "upstream-unreachable": ProblemType(502, "No upstream can be reached"),
    "overloaded": ProblemType(503, "Too many requests at once"),
    "no-upstream": ProblemType(503, "No upstream is configured for this content"),
    "draining": ProblemType(503, "The service is stopping"),
    "upstream-timeout": ProblemType(504, "The upstream did not answer in time"),
    "http-version": ProblemType(505, "Only HTTP/1.0 and HTTP/1.1 are supported"),
    "loop": ProblemType(508, "The request has passed through this node before"),
    # At the end: shared memory has their numbers, also that of an earlier version before `gup upgrade`.
    "queue-full": ProblemType(503, "Too much content is being fetched at once"),
    "on-hold": ProblemType(403, "An operator has put this revision on hold"),
    "wan-budget": ProblemType(503, "The budget of the WAN is used up for such content"),
    "canary": ProblemType(403, "This revision is new, and other clients get it first"),
    "newest-in-place": ProblemType(307, "This revision is kept back; the newest that all may have is given"),
}


class Problem(GupError):  # noqa: N818 - the word of RFC 9457
    """A failure of one request; only `server` turns it into a response.

    `slug` is a key of PROBLEMS; `retry_after_seconds` where trying again helps; `extensions` are further
    members of the problem document (RFC 9457 section 3.2). `stands_seconds`: how long it is remembered yet,
    of one that was remembered, here or by another member of the cluster.
    """

    def __init__(
        self,
        slug: str,
        detail: str,
        *,
        retry_after_seconds: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        extensions: dict[str, object] | None = None,
        stands_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.stands_seconds = stands_seconds
        self.slug, self.detail = slug, detail
        self.retry_after_seconds = retry_after_seconds
        self.headers = headers
        self.extensions = extensions or {}

    def again(self) -> "Problem":
        """A copy for one more request: an exception raised twice would gather tracebacks."""
        problem = Problem(self.slug, self.detail, headers=self.headers, extensions=self.extensions)
        problem.retry_after_seconds = self.retry_after_seconds
        return problem

    @property
    def status(self) -> int:
        return PROBLEMS[self.slug].status

    @property
    def title(self) -> str:
        return PROBLEMS[self.slug].title


_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOLCK})


def is_exhausted(error: OSError) -> bool:
    """Whether process or machine has run out of descriptors, memory or locks: no fault of disk or peer."""
    return error.errno in _EXHAUSTED


def exhausted(error: OSError) -> Problem:
    return Problem("overloaded", f"gup is out of resources: {error.strerror}", retry_after_seconds=1.0)
