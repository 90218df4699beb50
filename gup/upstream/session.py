"""One upstream: requests to it, its pool of connections, and a response whose body is being read."""

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from gup import config
from gup.content.key import ANY, Variant
from gup.files import PEM_BYTES, FileError, read_file, trust
from gup.units import parse_http_date
from gup.upstream.bandwidth import ReceiveWindow, Share, Wan
from gup.upstream.exchange import (
    MOST_FIELD_BYTES,
    RemoteHead,
    UpstreamFailure,
    Validators,
    misframed,
    rejected,
    unreachable,
)

if TYPE_CHECKING:
    import aiohttp

# gup.upstream.connector imports aiohttp, so it is imported where it is used: see there.

_PATH = re.compile(r"/[!-~]*")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_TEXT = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_UNKNOWN_TYPE = "application/octet-stream"
_SLOW_READS = 4
"""`min_rate` must be reached over this many times `read_timeout`: a minute by default."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to an upstream."""

    path: str
    purpose: str
    stream: tuple[int, str] = (0, "other")
    """Slot and kind of the stream that the bytes are counted for."""
    start: int = 0
    stop: int | None = None
    """Offset after the last requested byte; None requests all from `start` on."""
    if_range: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    method: str = "GET"
    share: Share = field(default_factory=lambda: Share(2))
    """The WAN share that its bytes are charged to; all requests of a download have the same."""
    via: str | None = None
    """Via of the client's request; this node's is appended."""
    client: str = ""
    """The client's address; "" for a request of gup's own."""
    check: bool = False
    """Whether it is a health check: any response then means that the upstream is up."""

    @property
    def ranged(self) -> bool:
        return bool(self.start) or self.stop is not None

    def headers(self, own_via: str) -> dict[str, str]:
        via = f"{self.via}, {own_via}" if self.via else own_via
        fields = {"Accept-Encoding": "identity", "Via": via}
        if self.ranged:
            fields["Range"] = f"bytes={self.start}-{'' if self.stop is None else self.stop - 1}"
            if self.if_range:
                fields["If-Range"] = self.if_range
        if self.if_none_match:
            fields["If-None-Match"] = self.if_none_match
        if self.if_modified_since:
            fields["If-Modified-Since"] = self.if_modified_since
        return fields


class Upstream:
    """One upstream and its connections. A retired one finishes its requests and closes then."""

    def __init__(self, settings: config.Upstream, user_agent: str, via: str) -> None:
        self.settings = settings
        self.name = settings.name
        self.variant = Variant(settings.version, settings.language)
        self.in_use = 0
        """Requests in progress and responses being read; changed by Pool only."""
        self.retired = False
        self.node: str | None = None
        """A gup's name in Via, "" for another server; None until its first response."""
        self._via = via
        self._fixed = {"User-Agent": user_agent, **_declared(settings), **settings.headers}
        self._certificates = _certificates(settings)
        self._session: aiohttp.ClientSession | None = None
        self._free = asyncio.Semaphore(settings.max_connections)
        self._waiting = 0

    async def request(self, ask: Ask) -> "aiohttp.ClientResponse":
        """Send one request and return the response once its head is here; UpstreamFailure without one.

        Connecting may take `connect_timeout`, the head `first_byte_timeout` after that. The caller must have
        a connection by `take_connection`.
        """
        return await translated(
            self._request(ask), self.name, "upstream.first_byte_timeout", self.settings.proxy
        )

    async def _request(self, ask: Ask) -> "aiohttp.ClientResponse":
        from gup.upstream import connector  # noqa: PLC0415 - imports aiohttp

        settings, url = self.settings, self.url(ask.path)
        if self._session is None:
            self._session = connector.open_session(self._tls(), settings.connect_timeout)
        return await connector.send(
            self._session,
            ask.method,
            url,
            self.headers(ask),
            proxy=settings.proxy,
            head_seconds=settings.first_byte_timeout,
        )

    def url(self, path: str) -> str:
        """The URL of a percent-encoded path. UpstreamFailure for anything else, which could name a host."""
        if not _PATH.fullmatch(path):
            detail = f"{self.name} is not asked: {path[:80]!a} is no path"
            raise UpstreamFailure("error", "upstream-refused", detail, again=False)
        return self.settings.url + path

    def headers(self, ask: Ask) -> dict[str, str]:
        return {**self._fixed, **ask.headers(self._via)}

    def _tls(self) -> ssl.SSLContext | bool:
        settings = self.settings
        if not settings.url.startswith("https:"):
            return True
        if not settings.verify_tls:
            return False
        try:
            return trust(settings.ca_file) if settings.ca_file else True
        except FileError as error:  # changed since the settings were read
            raise unreachable(f"{self.name} can't be asked: upstream.ca_file: {error}") from error

    async def take_connection(self) -> None:
        """Wait until a request may be sent; `give_connection` must follow.

        UpstreamFailure, which does not count against the upstream, after `first_byte_timeout`.
        """
        self._waiting += 1
        try:
            async with asyncio.timeout(self.settings.first_byte_timeout):
                await self._free.acquire()
        except TimeoutError as error:
            detail = (
                f"all of upstream.max_connections ({self.settings.max_connections}) to {self.name} are in use"
            )
            raise UpstreamFailure("unreachable", "overloaded", detail, again=False) from error
        finally:
            self._waiting -= 1

    def give_connection(self) -> None:
        """Give back what `take_connection` took."""
        self._free.release()

    @property
    def crowded(self) -> bool:
        """Whether requests wait because all of `max_connections` are in use."""
        return self._waiting > 0

    def stays(self, settings: config.Upstream) -> bool:
        """Whether these settings, and the certificates in `ca_file`, are the same as this upstream's."""
        return settings == self.settings and _certificates(settings) == self._certificates

    @property
    def is_open(self) -> bool:
        return self._session is not None

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
            await asyncio.sleep(0)  # aiohttp closes its transports in the loop's next turn


def _declared(settings: config.Upstream) -> dict[str, str]:
    """The variant declared to another gup, which chooses content as for a client."""
    if settings.kind != "gup":
        return {}
    own = {name.lower() for name in settings.headers}
    declared = {"GUP-Client-Version": settings.version, "GUP-Client-Language": settings.language}
    return {name: text for name, text in declared.items() if text != ANY and name.lower() not in own}


def _certificates(settings: config.Upstream) -> bytes:
    """The content of `ca_file`; empty if it can't be read, which connecting reports."""
    if settings.ca_file is None:
        return b""
    with contextlib.suppress(FileError):
        return read_file(settings.ca_file, PEM_BYTES)
    return b""


async def translated(
    step: Awaitable[_Result], name: str, limit: str = "", proxy: str | None = None
) -> _Result:
    """Await one step of aiohttp's. Any failure of the network or the upstream becomes UpstreamFailure.

    `limit` is the setting that ends the wait. `proxy` is the URL of the web proxy in between: failures of its
    own are reported as such. A failure for lack of descriptors says nothing about the upstream.
    """
    try:
        return await step
    except Exception as error:
        from gup.upstream.connector import failure_of  # noqa: PLC0415 - imports aiohttp

        failure = failure_of(error, name, limit, proxy)
        if failure is None:
            raise
        raise failure from error


class Answer:
    """A response whose body is still to be read. Counts every byte that it returns."""

    def __init__(
        self,
        head: RemoteHead,
        response: "aiohttp.ClientResponse",
        upstream: Upstream,
        count: Callable[[int], None],
        wan: Wan,
        share: Share,
        broke: Callable[[UpstreamFailure], None],
        closed: Callable[[], None],
    ) -> None:
        self.head = head
        self._response = response
        self._upstream = upstream
        self._count = count
        self._wan = wan
        self._share = share
        self._broke = broke
        self._closed: Callable[[], None] | None = closed
        self._unread = b""
        """Taken from the connection by a `read` that was cancelled; already counted."""
        self._position = head.start
        self._ended = False
        settings = upstream.settings
        self._steadiness = Steadiness(settings.min_rate, _SLOW_READS * settings.read_timeout)
        connection = response.connection
        transport = connection.transport if connection is not None else None
        self._window = ReceiveWindow(
            wan, transport.get_extra_info("socket") if transport is not None else None
        )
        self._protocol = connection.protocol if connection is not None else None
        self._connection_end = self._protocol.closed if self._protocol is not None else None
        if self._connection_end is not None:
            self._connection_end.remove_done_callback(_take_exception)  # an earlier response's
            self._connection_end.add_done_callback(_take_exception)
            self._connection_end.add_done_callback(self._lost)

    def _lost(self, _end: object) -> None:
        """The connection has ended. After invalid HTTP aiohttp does not wake a reader, who would wait on."""
        content = self._response.content
        if content.exception() is None and not content.is_eof():
            content.set_exception(ConnectionResetError("the connection ended in mid-body"))

    @property
    def confirmed(self) -> bool:
        """Whether the end that `read` reports is certain: by a length or a last chunk."""
        return self.head.delimited

    @property
    def slow(self) -> bool:
        """Whether the body comes slower than `upstream.min_rate`."""
        return self._steadiness.slow

    async def read(self) -> bytes:
        """The next piece, paid for; empty at the end. UpstreamFailure when the body breaks off.

        `read_timeout` limits this wait alone: pauses between two reads don't count. A cancelled read loses
        nothing.
        """
        if self._unread:
            piece, self._unread = self._unread, b""
            return piece
        if self._ended:
            return b""
        if self.slow and self._upstream.crowded:
            detail = f"{self.head.upstream} sends less than upstream.min_rate, and others wait to ask it"
            raise UpstreamFailure("timeout", "upstream-timeout", detail, again=True)
        self._window.follow()
        # Without a rate not read(n): aiohttp would buffer n bytes, which are lost when the connection breaks.
        content, slice_bytes = self._response.content, self._wan.slice_bytes
        step = content.read(slice_bytes) if slice_bytes else content.readany()
        began = time.monotonic()
        try:
            piece = await translated(self._in_time(step), self.head.upstream, "upstream.read_timeout")
            self._advance(len(piece))
        except UpstreamFailure as failure:
            self._broke(failure)
            raise
        self._steadiness.note(time.monotonic() - began, len(piece))
        try:
            await self._wan.pay(len(piece), self._share)
        except asyncio.CancelledError:
            self._unread = piece
            raise
        finally:
            self._count(len(piece))
        return piece

    async def _in_time(self, step: Awaitable[bytes]) -> bytes:
        async with asyncio.timeout(self._upstream.settings.read_timeout):
            return await step

    def _advance(self, amount: int) -> None:
        """UpstreamFailure when fewer or more bytes come than the head announced."""
        self._position += amount
        self._ended = not amount
        stop = self.head.stop
        if stop is not None and self._ended and self._position < stop:
            detail = f"{self.head.upstream} ended at byte {self._position}, not at {stop} as announced"
            raise UpstreamFailure("error", "upstream-bad-body", detail, again=True)
        if stop is not None and (self._position > stop or (self._ended and self._trailed())):
            self._count(amount)
            raise rejected(f"{self.head.upstream} sent more bytes than it announced")

    def _trailed(self) -> bool:
        """Whether invalid HTTP followed the body: then the announced length was not the body's."""
        from gup.upstream.connector import is_no_http  # noqa: PLC0415 - imports aiohttp

        return self._protocol is not None and is_no_http(self._protocol.exception())

    def close(self) -> None:
        """Return the connection to the pool if the body was read to its end, else close it."""
        if self._connection_end is not None:  # the connection may be used again
            self._connection_end.remove_done_callback(self._lost)
            self._connection_end = None
        self._response.close() if not self._response.content.at_eof() else self._response.release()
        closed, self._closed = self._closed, None
        if closed is not None:
            closed()


def _take_exception(end: asyncio.Future[None]) -> None:
    """Retrieve the exception of an ended connection: asyncio logs those that nobody retrieves."""
    if not end.cancelled():
        end.exception()


class Steadiness:
    """Whether a body comes slower than its minimum rate. Only time spent waiting for the upstream counts.

    Waits of gup's own, for the WAN, the disk or a queue, are not noted here.
    """

    __slots__ = ("_amount", "_least_rate", "_waited", "_window", "slow")

    def __init__(self, least_rate_bytes_per_second: int, window_seconds: float) -> None:
        self._least_rate = least_rate_bytes_per_second
        self._window = window_seconds
        self._waited = 0.0
        self._amount = 0
        self.slow = False
        """The result of the last complete window."""

    def note(self, waited_seconds: float, amount: int) -> None:
        self._waited += waited_seconds
        self._amount += amount
        if self._waited >= self._window:
            self.slow = self._amount < self._least_rate * self._waited
            self._waited, self._amount = 0.0, 0


# --- the head of a response


def read_head(response: "aiohttp.ClientResponse", name: str) -> RemoteHead:
    """The head of a 200 or 206; UpstreamFailure when it can't be content."""
    encoding = ", ".join(_values(response, b"content-encoding")).lower()
    if encoding not in ("", "identity"):
        raise rejected(f"{name} sent Content-Encoding {encoding!r} though identity was asked for")
    for content_type in _values(response, b"content-type"):
        if content_type.split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
            raise rejected(f"{name} sent a web page ({content_type})")
    start, stop, length, delimited = _extent(response, name)
    if length == 0:
        raise rejected(f"{name} sent an empty body")
    headers = response.headers
    modified = _one(response, b"last-modified", _TEXT)
    return RemoteHead(
        response.status,
        start,
        length,
        _one(response, b"etag", _ETAG),
        modified if modified is not None and parse_http_date(modified) is not None else None,
        _one(response, b"content-type", _TEXT) or _UNKNOWN_TYPE,
        name,
        validators=Validators.of(headers.get("ETag"), headers.get("Last-Modified"), headers.get("Date")),
        stop=stop,
        delimited=delimited,
    )


def read_framing(response: "aiohttp.ClientResponse", name: str) -> tuple[int | None, bool]:
    """The Content-Length, and whether the body is chunked (RFC 9112 section 6).

    UpstreamFailure for ambiguous framing: two recipients could end such a body at different bytes, so it must
    not be stored.
    """
    codings = _values(response, b"transfer-encoding")
    lengths = _values(response, b"content-length")
    if codings:
        if [coding.lower() for coding in codings] != ["chunked"] or response.version != (1, 1):
            raise misframed(
                f"{name} sent Transfer-Encoding {', '.join(codings)!r}, which is not just chunked"
            )
        if lengths:
            raise misframed(f"{name} sent Content-Length beside Transfer-Encoding")
        return None, True
    if not lengths:
        return None, False
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise misframed(f"{name} sent Content-Length {', '.join(lengths)!r}, which is not one number")
    return int(lengths[0]), False


def _extent(response: "aiohttp.ClientResponse", name: str) -> tuple[int, int | None, int | None, bool]:
    """First byte, the one after the last, the whole body's length, and whether the end is confirmed."""
    own_length, chunked = read_framing(response, name)
    if response.status == 200:
        return 0, own_length, own_length, chunked or own_length is not None
    ranges = _values(response, b"content-range")
    match = _CONTENT_RANGE.fullmatch(ranges[0]) if len(ranges) == 1 else None
    if match is None:
        raise rejected(f"{name} sent 206 without a usable Content-Range")
    start, stop, total = int(match[1]), int(match[2]) + 1, match[3]
    if stop <= start or (total != "*" and stop > int(total)):
        raise rejected(f"{name} sent a Content-Range that contradicts itself: {match[0]}")
    if own_length not in (None, stop - start):
        raise rejected(f"{name} sent Content-Length {own_length} for {match[0]}")
    return start, stop, None if total == "*" else int(total), True


def _values(response: "aiohttp.ClientResponse", name: bytes) -> list[str]:
    """Each line of a field. Bytes over 127 are kept as Latin-1 (RFC 9110 section 5.5)."""
    found = (value for field, value in response.raw_headers if field.lower() == name)
    return [value.strip(b" \t").decode("latin-1") for value in found]


def _one(response: "aiohttp.ClientResponse", name: bytes, form: re.Pattern[str]) -> str | None:
    """A field's value; None when it is missing, ambiguous, too long, or does not match `form`."""
    values = set(_values(response, name))
    value = values.pop() if len(values) == 1 else ""
    return value if len(value) <= MOST_FIELD_BYTES and form.fullmatch(value) else None
