"""One upstream: its connections, a request to it, an answer being read; chooses and retries nothing."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gup import config
from gup.content.key import ANY, Variant
from gup.files import PEM_BYTES, FileError, read_file, trust
from gup.upstream.bandwidth import ReceiveWindow, Share, Wan
from gup.upstream.exchange import RemoteHead, UpstreamFailure, translated

if TYPE_CHECKING:
    import aiohttp

_PATH = re.compile(r"/[!-~]*")
_READ_AHEAD_BYTES = 4096
"""What aiohttp may hold when a connection breaks: it throws that away, and it is fetched again."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: where, from which byte to which, and under which conditions."""

    path: str
    purpose: str
    stream: tuple[int, str] = (0, "other")
    """Slot and kind that the bytes are counted under."""
    start: int = 0
    stop: int | None = None
    if_range: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    method: str = "GET"
    share: Share = field(default_factory=lambda: Share(2))
    """What its bytes of the WAN are reckoned to: one for all tries of a download."""
    via: str | None = None
    """Of the client's request; this node's is put after it."""
    client: str = ""
    """Whose request it is, by address; "" of nobody's."""
    check: bool = False
    """Whether it is a health check: any answer tells that the upstream lives."""

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


class Answer:
    """An answer whose body is still to be read. Counts every byte it hands out."""

    def __init__(
        self,
        head: RemoteHead,
        response: "aiohttp.ClientResponse",
        count: Callable[[int], None],
        wan: Wan,
        share: Share,
        broke: Callable[[UpstreamFailure], None],
        closed: Callable[[], None],
    ) -> None:
        self.head = head
        self._response = response
        self._count = count
        self._wan = wan
        self._share = share
        self._broke = broke
        self._closed: Callable[[], None] | None = closed
        self._unread = b""
        """Taken from the connection by a `read` that was cancelled; it is counted."""
        connection = response.connection
        transport = connection.transport if connection is not None else None
        self._window = ReceiveWindow(
            wan, transport.get_extra_info("socket") if transport is not None else None
        )
        protocol = connection.protocol if connection is not None else None
        self._connection_end = protocol.closed if protocol is not None else None
        if self._connection_end is not None:
            self._connection_end.remove_done_callback(_note_end)  # of an answer before on this connection
            self._connection_end.add_done_callback(_note_end)
            self._connection_end.add_done_callback(self._lost)

    def _lost(self, _end: object) -> None:
        """The connection has gone. After what is no HTTP aiohttp tells no reader, who would wait on."""
        content = self._response.content
        if content.exception() is None and not content.is_eof():
            content.set_exception(ConnectionResetError("the connection ended in mid-body"))

    async def read(self) -> bytes:
        """The next piece, paid for; empty at the end. UpstreamFailure when it breaks off.

        Cancelled, it loses nothing.
        """
        if self._unread:
            piece, self._unread = self._unread, b""
            return piece
        self._window.follow()
        # Without a rate not read(n): that makes aiohttp hold n bytes, lost when the connection breaks.
        content, slice_bytes = self._response.content, self._wan.slice_bytes
        step = content.read(slice_bytes) if slice_bytes else content.readany()
        try:
            piece = await translated(step, self.head.upstream)
        except UpstreamFailure as failure:
            self._broke(failure)
            raise
        try:
            await self._wan.pay(len(piece), self._share)
        except asyncio.CancelledError:
            self._unread = piece
            raise
        finally:
            self._count(len(piece))
        return piece

    def close(self) -> None:
        """Give the connection back when the body was read to its end, else close it."""
        if self._connection_end is not None:  # the connection may live on
            self._connection_end.remove_done_callback(self._lost)
            self._connection_end = None
        self._response.close() if not self._response.content.at_eof() else self._response.release()
        closed, self._closed = self._closed, None
        if closed is not None:
            closed()


def _note_end(end: asyncio.Future[None]) -> None:
    """How a connection ended is of no interest once its answer was read: or asyncio complains in the log."""
    if not end.cancelled():
        end.exception()


def _declared(settings: config.Upstream) -> dict[str, str]:
    """Another gup has to be told which of its managers' content is meant: it chooses as for a client."""
    if settings.kind != "gup":
        return {}
    own = {name.lower() for name in settings.headers}
    stated = {"GUP-Client-Version": settings.version, "GUP-Client-Language": settings.language}
    return {name: text for name, text in stated.items() if text != ANY and name.lower() not in own}


def _certificates(settings: config.Upstream) -> bytes:
    """What `ca_file` holds; nothing where it can't be read: connecting tells why."""
    if settings.ca_file is None:
        return b""
    with contextlib.suppress(FileError):
        return read_file(settings.ca_file, PEM_BYTES)
    return b""


class Upstream:
    """One upstream and its connections. Retired, it ends what is under way and closes then."""

    def __init__(self, settings: config.Upstream, user_agent: str, via: str) -> None:
        self.settings = settings
        self.name = settings.name
        self.variant = Variant(settings.version, settings.language)
        self.in_use = 0
        """Requests under way and answers that are being read; Pool alone changes it."""
        self.retired = False
        self.node: str | None = None
        """A gup's name in Via, "" of another server; None as long as it has not answered."""
        self._via = via
        self._fixed = {"User-Agent": user_agent, **_declared(settings), **settings.headers}
        self._certificates = _certificates(settings)
        self._session: aiohttp.ClientSession | None = None

    def url(self, path: str) -> str:
        """The URL of a percent-encoded path; UpstreamFailure for anything else, which could name a host."""
        if not _PATH.fullmatch(path):
            detail = f"{self.name} is not asked: {path[:80]!a} is no path"
            raise UpstreamFailure("error", "upstream-refused", detail, again=False)
        return self.settings.url + path

    def headers(self, ask: Ask) -> dict[str, str]:
        return {**self._fixed, **ask.headers(self._via)}

    def session(self) -> "aiohttp.ClientSession":
        if self._session is None:
            self._session = self._open()
        return self._session

    def _open(self) -> "aiohttp.ClientSession":
        import aiohttp  # noqa: PLC0415 - see exchange.translated

        settings = self.settings

        connector = aiohttp.TCPConnector(
            limit=settings.max_connections,
            ssl=self._tls() if settings.url.startswith("https:") else True,
            keepalive_timeout=30.0,
        )
        session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_READ_AHEAD_BYTES,
            skip_auto_headers=("Accept-Encoding", "Accept"),
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=settings.connect_timeout + settings.read_timeout,
                sock_connect=settings.connect_timeout,
                sock_read=settings.read_timeout,
            ),
        )
        # aiohttp sends an idempotent request again by itself when a connection breaks, a new one too. Whether
        # and when to try again is decided, and counted, in one place: download. There is no public switch.
        session._retry_connection = False  # noqa: SLF001
        return session

    def _tls(self) -> ssl.SSLContext | bool:
        if not self.settings.verify_tls:
            return False
        try:
            return trust(self.settings.ca_file) if self.settings.ca_file else True
        except FileError as error:  # it was right at the start, or at the last reload
            detail = f"{self.name} can't be asked: upstream.ca_file: {error}"
            raise UpstreamFailure("unreachable", "upstream-unreachable", detail, again=False) from error

    def stays(self, settings: config.Upstream) -> bool:
        """Whether these settings, with the file that they name, are those that this one was made of."""
        return settings == self.settings and _certificates(settings) == self._certificates

    @property
    def is_open(self) -> bool:
        return self._session is not None

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
            await asyncio.sleep(0)  # aiohttp closes its transports in the loop's next turn
