"""One upstream: requests to it, its connections, and how the head of a response is read."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gup import config
from gup.content.key import ANY, Variant
from gup.files import PEM_BYTES, FileError, read_file, trust
from gup.phases import PhaseClock
from gup.units import parse_http_date
from gup.upstream.bandwidth import Share
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

_PATH = re.compile(r"/[!-~]*")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_TEXT = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_UNKNOWN_TYPE = "application/octet-stream"
_READ_AHEAD_BYTES = 1 << 20
"""Limit of aiohttp's buffer without a rate; it is lost, and fetched again, when a connection breaks."""
_LIMITED_READ_AHEAD_BYTES = 4096
"""The same with a rate: buffered bytes escape the rate limit."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to an upstream.

    `stream` is the slot and the kind that the bytes are counted for; `stream_of_body`, if set, tells them
    anew when a body comes. `stop` is the offset after the last requested byte; None requests all from
    `start` on. The bytes are charged to `share`, which all requests of a download have in common. `passed`
    are the gups that the client's request came through. `client` is who asked, "" for a request of gup's
    own. `check`: a health check, for which any response is good. `key` is the content key; `held`: a
    member of the cluster is to answer only with what it holds, and to fetch nothing. `own_etag` is the tag of
    the body here, which members have in common, beside upstream's in `if_none_match`. `promotes`: a member is
    to promote the fill that it sends. `signed` are the fields of a signed question to a member. `times` is
    the clock of what it is asked for.
    """

    path: str
    purpose: str
    stream: tuple[int, str] = (0, "other")
    stream_of_body: Callable[[], tuple[int, str]] | None = None
    start: int = 0
    stop: int | None = None
    if_range: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    method: str = "GET"
    share: Share = field(default_factory=lambda: Share(2))
    passed: tuple[str, ...] = ()
    client: str = ""
    check: bool = False
    key: str = ""
    held: bool = False
    own_etag: str | None = None
    promotes: bool = False
    signed: Mapping[str, str] = field(default_factory=dict)
    times: PhaseClock | None = None

    @property
    def ranged(self) -> bool:
        return bool(self.start) or self.stop is not None


class Upstream:
    """One upstream and its connections. A retired one finishes its requests and closes then."""

    def __init__(self, settings: config.Upstream, user_agent: str, via: str) -> None:
        self.settings, self.name = settings, settings.name
        self.variant = Variant(settings.version, settings.language)
        self.in_use = 0
        """Requests in progress and responses being read; changed by Pool only."""
        self.retired = False
        self.node: str | None = None
        """A gup's name in Via, "" for another server; None until its first response."""
        self.ahead_seconds: float | None = None
        """How far this machine's clock is ahead of its own; None until a response tells."""
        self._via = via
        fixed = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._fixed = fixed | _declared(settings) | settings.headers
        self._certificates = _certificates(settings)
        self._session: aiohttp.ClientSession | None = None
        self.free = asyncio.Semaphore(settings.max_connections)
        """Taken by `take_connection`; Pool releases it."""
        self.waiting = 0
        """Requests that wait for a connection."""

    async def request(self, ask: Ask, *, limited: bool = False) -> "aiohttp.ClientResponse":
        """Send one request and return the response once its head is here; UpstreamFailure without one.

        `limited`: the WAN has a rate. The caller must have a connection by `take_connection`.
        """
        from gup.upstream import connector  # noqa: PLC0415 - imports aiohttp

        settings, url = self.settings, self.url(ask.path)
        if self._session is None:
            limits = settings.connect_timeout, settings.first_byte_timeout
            self._session = connector.open_session(self._tls(), *limits)
        step = self._session.request(
            ask.method,
            connector.URL(url, encoded=True),
            headers=self.headers(ask),
            allow_redirects=False,
            proxy=settings.proxy,
            read_bufsize=_LIMITED_READ_AHEAD_BYTES if limited else _READ_AHEAD_BYTES,
        )
        return await connector.translated(step, self.name, "upstream.first_byte_timeout", settings.proxy)

    def url(self, path: str) -> str:
        """The URL of a percent-encoded path. UpstreamFailure for anything else, which could name a host."""
        if not _PATH.fullmatch(path):
            detail = f"{self.name} is not asked for {path[:80]!a}: that is not a path"
            raise UpstreamFailure("error", "upstream-refused", detail)
        return self.settings.url + path

    def headers(self, ask: Ask) -> dict[str, str]:
        last = "" if ask.stop is None else ask.stop - 1
        fields = {
            "Range": f"bytes={ask.start}-{last}" if ask.ranged else None,
            "If-Range": ask.if_range if ask.ranged else None,
            "If-None-Match": ask.if_none_match,
            "If-Modified-Since": ask.if_modified_since,
            "Via": ", ".join((*(f"1.1 {name} (gup)" for name in ask.passed), self._via)),
        }
        return self._fixed | {name: text for name, text in fields.items() if text} | dict(ask.signed)

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
        """Wait until a request may be sent; `free.release` must follow.

        UpstreamFailure, which does not count against the upstream, after `first_byte_timeout`.
        """
        if not self.free.locked():
            await self.free.acquire()
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(self.settings.first_byte_timeout):
                await self.free.acquire()
        except TimeoutError as error:
            most = self.settings.max_connections
            detail = f"all of upstream.max_connections ({most}) to {self.name} are in use"
            raise UpstreamFailure("unreachable", "overloaded", detail) from error
        finally:
            self.waiting -= 1

    def stays(self, settings: config.Upstream) -> bool:
        """Whether these settings, and the certificates in `ca_file`, are the same as this upstream's."""
        return settings == self.settings and _certificates(settings) == self._certificates

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
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
    if settings.ca_file is not None:
        with contextlib.suppress(FileError):
            return read_file(settings.ca_file, PEM_BYTES)
    return b""


# --- the head of a response


class Fields:
    """The fields of a response's head, each line apart. Bytes over 127 are kept as Latin-1 (RFC 9110 5.5)."""

    def __init__(self, response: "aiohttp.ClientResponse", name: str) -> None:
        self.response = response
        self.name = name
        self._lines: dict[bytes, list[str]] = {}
        for field_, value in response.raw_headers:
            self._lines.setdefault(field_.lower(), []).append(value.strip(b" \t").decode("latin-1"))

    def all(self, name: bytes) -> list[str]:
        return self._lines.get(name, [])

    def one(self, name: bytes, form: re.Pattern[str]) -> str | None:
        """None when the field is missing, ambiguous, too long, or does not match `form`."""
        values = set(self.all(name))
        value = values.pop() if len(values) == 1 else ""
        return value if len(value) <= MOST_FIELD_BYTES and form.fullmatch(value) else None

    def head(self, age_seconds: int) -> RemoteHead:
        """The head of a 200 or 206; UpstreamFailure when it can't be content."""
        encoding = ", ".join(self.all(b"content-encoding")).lower()
        if encoding not in ("", "identity"):
            raise rejected(f"{self.name} sent Content-Encoding {encoding!r} though identity was requested")
        for content_type in self.all(b"content-type"):
            if content_type.split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
                raise rejected(f"{self.name} sent a web page ({content_type})")
        start, stop, length, delimited = self._extent()
        if length == 0:
            raise rejected(f"{self.name} sent an empty body")
        headers = self.response.headers
        modified = self.one(b"last-modified", _TEXT)
        if modified is not None and parse_http_date(modified) is None:
            modified = None
        return RemoteHead(
            status=self.response.status,
            start=start,
            length=length,
            etag=self.one(b"etag", _ETAG),
            last_modified=modified,
            content_type=self.one(b"content-type", _TEXT) or _UNKNOWN_TYPE,
            upstream=self.name,
            age_seconds=age_seconds,
            validators=Validators.of(headers.get("ETag"), headers.get("Last-Modified"), headers.get("Date")),
            stop=stop,
            delimited=delimited,
        )

    def framing(self) -> tuple[int | None, bool]:
        """The Content-Length, and whether the body is chunked (RFC 9112 section 6).

        UpstreamFailure for ambiguous framing: two recipients could end such a body at different bytes, so it
        must not be stored.
        """
        codings, lengths = self.all(b"transfer-encoding"), self.all(b"content-length")
        if codings:
            if [coding.lower() for coding in codings] != ["chunked"] or self.response.version != (1, 1):
                sent = f"Transfer-Encoding {', '.join(codings)!r}"
                raise misframed(f"{self.name} sent {sent}, which is not just chunked")
            if lengths:
                raise misframed(f"{self.name} sent Content-Length beside Transfer-Encoding")
            return None, True
        if not lengths:
            return None, False
        if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
            sent = ", ".join(lengths)
            raise misframed(f"{self.name} sent Content-Length {sent!r}, which is not one number")
        return int(lengths[0]), False

    def _extent(self) -> tuple[int, int | None, int | None, bool]:
        """First byte, the one after the last, the whole body's length, and whether the end is confirmed."""
        own_length, chunked = self.framing()
        if self.response.status == 200:
            return 0, own_length, own_length, chunked or own_length is not None
        ranges = self.all(b"content-range")
        match = _CONTENT_RANGE.fullmatch(ranges[0]) if len(ranges) == 1 else None
        if match is None:
            raise rejected(f"{self.name} sent 206 without a usable Content-Range")
        start, stop, total = int(match[1]), int(match[2]) + 1, match[3]
        if stop <= start or (total != "*" and stop > int(total)):
            raise rejected(f"{self.name} sent a Content-Range that contradicts itself: {match[0]}")
        if own_length not in (None, stop - start):
            raise rejected(f"{self.name} sent Content-Length {own_length} for {match[0]}")
        return start, stop, None if total == "*" else int(total), True
