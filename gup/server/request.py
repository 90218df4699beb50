"""Parsing a request head into a checked `Request`, and the limits of a head.

Two parsers must agree: a strict grammar of our own (RFC 9112), which prevents request smuggling, and llhttp,
which splits the fields.
"""

import re
from dataclasses import dataclass, field

import httptools

from gup.errors import Problem

MAX_HEAD_BYTES = 16384
MAX_TARGET_BYTES = 8192
MAX_HEADERS = 100
_TARGET_TOO_LONG = f"A request target may have at most {MAX_TARGET_BYTES} bytes."

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TLS_HANDSHAKE = b"\x16\x03"
_PROXY_V1, _PROXY_V2 = b"PROXY ", b"\0"  # of version 2 what follows two empty lines, which have been skipped
_BEGINNING = re.compile(rb"\r?\Z|[A-Za-z]")  # of all registered methods
_REQUEST_LINE = re.compile(_TOKEN + rb" ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])\r\n")
# No CR, LF or control but a tab inside a line; a line that begins with a space would be an obs-fold.
_FIELD_LINES = re.compile(rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
_LONGEST_METHOD_AND_VERSION_BYTES = 64
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_LENGTH = re.compile(r"[0-9]{1,18}")

_CONDITIONS = ("if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since")
_NOT_PLAIN = frozenset((*_CONDITIONS, "content-length", "range"))


@dataclass(frozen=True, slots=True)
class Request:
    """One well-formed request; it has no body, unless its method is one that `check_method` refuses.

    `headers` have names in lower case and values without surrounding white space, one character a byte.
    `head` is the text it was parsed from, `client` who shares with others (Connection.client).
    """

    method: str
    target: bytes
    minor_version: int
    headers: tuple[tuple[str, str], ...]
    keep_alive: bool
    head: bytes = field(default=b"", compare=False, repr=False)
    client: str = field(default="", compare=False)

    def header(self, name: str) -> str | None:
        """The field's value, its repetitions joined by ", " (RFC 9110 section 5.3); `name` in lower case."""
        values = _values(self.headers, name)
        return ", ".join(values) if values else None

    @property
    def plain(self) -> bool:
        """Whether it is a GET without body, range and condition, whose answer may be reused."""
        return self.method == "GET" and not any(name in _NOT_PLAIN for name, _ in self.headers)

    def check_method(self) -> None:
        """Problem "method-not-allowed" for all but GET and HEAD, CONNECT and `OPTIONS *` included."""
        if self.method not in ("GET", "HEAD"):
            raise _method_not_allowed()


def _values(headers: tuple[tuple[str, str], ...], name: str) -> list[str]:
    return [value for field, value in headers if field == name]


def _method_not_allowed() -> Problem:
    allow = (("Allow", "GET, HEAD"),)
    return Problem("method-not-allowed", "Content is read with GET or HEAD.", headers=allow)


def check_begun(buffer: bytes | bytearray) -> None:
    """Raise Problem when `buffer` cannot become a valid head.

    Without this a line that ends with LF, a TLS hello and HTTP/0.9 look like an incomplete head.
    """
    _check_size(buffer)
    _check_beginning(buffer)
    ends = buffer.count(b"\r\n")
    if buffer.count(b"\n") > ends or buffer.count(b"\r") - buffer.endswith(b"\r") > ends:
        raise Problem("bad-request", "Lines of a request head end with CRLF; this CR or LF stands alone.")
    if ends:
        _check_line(buffer)


def _check_beginning(buffer: bytes | bytearray) -> None:
    if buffer.startswith(_TLS_HANDSHAKE):
        raise Problem("bad-request", "This port speaks HTTP without TLS: ask for http://, not https://.")
    if not _BEGINNING.match(buffer):
        if buffer.startswith(_PROXY_V2):
            raise _foreign_proxy()
        raise Problem("bad-request", "This is not HTTP.")


def _foreign_proxy() -> Problem:
    return Problem(
        "bad-request",
        "A PROXY header is read only where a connection from an address in listen.proxy_protocol begins.",
    )


def _check_size(buffer: bytes | bytearray) -> None:
    """Problem when a head passes MAX_HEAD_BYTES: its request line is too long, or else its fields are."""
    if len(buffer) <= MAX_HEAD_BYTES:
        return
    line_end = buffer.find(b"\r\n")
    if line_end < 0 or line_end > MAX_TARGET_BYTES + _LONGEST_METHOD_AND_VERSION_BYTES:
        raise Problem("uri-too-long", _TARGET_TOO_LONG)
    raise Problem("head-too-large", f"A request head may have at most {MAX_HEAD_BYTES} bytes.")


def _check_line(head: bytes | bytearray) -> re.Match[bytes]:
    line = _REQUEST_LINE.match(head)
    if not line and head.startswith(_PROXY_V1):
        raise _foreign_proxy()
    if not line:
        raise Problem("bad-request", "The request line is malformed.")
    if len(line[1]) > MAX_TARGET_BYTES:
        raise Problem("uri-too-long", _TARGET_TOO_LONG)
    if line[2] not in (b"1.0", b"1.1"):
        raise Problem("http-version", f"HTTP/{line[2].decode()} is not supported here.")
    return line


class _Fields:
    def __init__(self) -> None:
        self.headers: list[tuple[str, str]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")))


def parse_head(head: bytes, client: str = "") -> Request:
    """`head` is whole, from its first letter to its CRLFCRLF.

    Problem "bad-request", "http-version", "uri-too-long" or "head-too-large"; "method-not-allowed" for a
    method that llhttp does not know.
    """
    _check_size(head)
    _check_beginning(head)
    line = _check_line(head)
    fields_at = line.end()
    if not _FIELD_LINES.fullmatch(head, fields_at):
        raise Problem("bad-request", "A header field is malformed.")
    if head.count(b"\r\n", fields_at) - 1 > MAX_HEADERS:
        raise Problem("head-too-large", f"A request may have at most {MAX_HEADERS} header fields.")
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # the head was parsed whole; gup offers no other protocol and ignores the upgrade
    except httptools.HttpParserInvalidMethodError as error:
        raise _method_not_allowed() from error
    except httptools.HttpParserError as error:
        raise Problem("bad-request", f"The request is malformed: {error}.") from error
    method = parser.get_method().decode("ascii")
    minor = 1 if parser.get_http_version() == "1.1" else 0
    headers = tuple(fields.headers)
    _check_framing(method, minor, headers)
    # RFC 9112 section 9.3.
    options = {option.strip(" \t").lower() for option in ",".join(_values(headers, "connection")).split(",")}
    keep_alive = "close" not in options and (minor == 1 or "keep-alive" in options)
    return Request(method, line[1], minor, headers, keep_alive, head, client)


def _check_framing(method: str, minor_version: int, headers: tuple[tuple[str, str], ...]) -> None:
    # RFC 9112 section 6.3 permits refusing this: peers that disagree on a length enable request smuggling.
    if _values(headers, "transfer-encoding"):
        raise Problem("bad-request", "Requests with Transfer-Encoding are not accepted.")
    lengths, hosts = _values(headers, "content-length"), _values(headers, "host")
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(length) for length in lengths):
        raise Problem("bad-request", "The Content-Length is malformed or repeated.")
    if method in ("GET", "HEAD") and any(int(length) for length in lengths):
        raise Problem("bad-request", f"A {method} request must not have a body.")
    # RFC 9112 section 3.2. An empty host is refused too: no http URL has one (RFC 9110 section 4.2.1).
    if len(hosts) > 1 or len(hosts) < minor_version:
        raise Problem("bad-request", "A request must have exactly one Host field.")
    if not all(_HOST.fullmatch(host) for host in hosts):
        raise Problem("bad-request", "The Host field is malformed.")
