"""One upstream: its connections, a request to it, an answer being read; chooses and retries nothing."""

import asyncio
import contextlib
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gup import config
from gup.content.key import ANY, Variant
from gup.files import PEM_BYTES, FileError, read_file, trust
from gup.upstream.bandwidth import ReceiveWindow, Share, Wan
from gup.upstream.exchange import RemoteHead, UpstreamFailure, is_no_http, rejected, translated

if TYPE_CHECKING:
    import aiohttp

_PATH = re.compile(r"/[!-~]*")
_READ_AHEAD_BYTES = 4096
"""What aiohttp may hold when a connection breaks: it throws that away, and it is fetched again."""
_SLOW_READS = 4
"""`min_rate` holds over so many times `read_timeout`: a minute by default."""
_KEEPALIVE_SECONDS = 4.0
"""How long an idle connection is kept: less than servers, proxies and firewalls usually do."""
_PROBE_AFTER_SECONDS = 10
_PROBE_EVERY_SECONDS = 5


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


class Steadiness:
    """Whether a body has come slower than its least rate. Only time spent waiting for upstream counts.

    What gup itself spends waiting, for its share of the WAN, for the disk or in a queue, is not noted here.
    """

    __slots__ = ("_amount", "_least_rate", "_waited", "_window", "slow")

    def __init__(self, least_rate_bytes_per_second: int, window_seconds: float) -> None:
        self._least_rate = least_rate_bytes_per_second
        self._window = window_seconds
        self._waited = 0.0
        self._amount = 0
        self.slow = False
        """What the last whole window told."""

    def note(self, waited_seconds: float, amount: int) -> None:
        self._waited += waited_seconds
        self._amount += amount
        if self._waited >= self._window:
            self.slow = self._amount < self._least_rate * self._waited
            self._waited, self._amount = 0.0, 0


class Answer:
    """An answer whose body is still to be read. Counts every byte it hands out."""

    def __init__(
        self,
        head: RemoteHead,
        response: "aiohttp.ClientResponse",
        upstream: "Upstream",
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
        """Taken from the connection by a `read` that was cancelled; it is counted."""
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
            self._connection_end.remove_done_callback(_note_end)  # of an answer before on this connection
            self._connection_end.add_done_callback(_note_end)
            self._connection_end.add_done_callback(self._lost)

    def _lost(self, _end: object) -> None:
        """The connection has gone. After what is no HTTP aiohttp tells no reader, who would wait on."""
        content = self._response.content
        if content.exception() is None and not content.is_eof():
            content.set_exception(ConnectionResetError("the connection ended in mid-body"))

    @property
    def confirmed(self) -> bool:
        """Whether its end, when `read` has told it, is sure: by a length or a last chunk."""
        return self.head.delimited

    @property
    def slow(self) -> bool:
        """Whether it comes slower than `upstream.min_rate`."""
        return self._steadiness.slow

    async def read(self) -> bytes:
        """The next piece, paid for; empty at the end. UpstreamFailure when it breaks off.

        `read_timeout` is for this wait alone: while nobody reads, nothing runs out. Cancelled, it loses
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
        # Without a rate not read(n): that makes aiohttp hold n bytes, lost when the connection breaks.
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
        """UpstreamFailure when fewer or more bytes come than the head told."""
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
        """Whether what came after the body is no HTTP: then the announced length was not the body's."""
        return self._protocol is not None and is_no_http(self._protocol.exception())

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


def _notice_death(made: socket.socket, timeout_seconds: float) -> None:
    """Have the kernel end a connection whose other side has gone without a word."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_seconds * 1000)))


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
        self._free = asyncio.Semaphore(settings.max_connections)
        self._waiting = 0

    @property
    def crowded(self) -> bool:
        """Whether requests wait because all of `max_connections` are in use."""
        return self._waiting > 0

    async def take_connection(self) -> None:
        """Return when a request may be made; `give_connection` must follow when its answer was read.

        UpstreamFailure, for which the upstream is not to blame, when none is free for `first_byte_timeout`.
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
        """What `take_connection` took is free for another request."""
        self._free.release()

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

        from gup.upstream.connector import Connector, ask_again_if_reused  # noqa: PLC0415

        settings = self.settings

        def make_socket(address: Any) -> socket.socket:
            made = socket.socket(family=address[0], type=address[1], proto=address[2])
            _notice_death(made, settings.connect_timeout)
            return made

        return aiohttp.ClientSession(
            connector=Connector(
                ssl=self._tls() if settings.url.startswith("https:") else True,
                socket_factory=make_socket,
                keepalive_timeout=_KEEPALIVE_SECONDS,
            ),
            middlewares=(ask_again_if_reused,),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_READ_AHEAD_BYTES,
            skip_auto_headers=("Accept-Encoding", "Accept"),
            # No sock_read: its timer goes on while gup itself pauses, and fires on connections in the pool
            # (aiohttp issues 12953 and 13000). Heads and pieces are timed here, where it is known who waits.
            timeout=aiohttp.ClientTimeout(
                total=None, connect=settings.connect_timeout, sock_connect=settings.connect_timeout
            ),
        )

    async def request(self, ask: Ask) -> "aiohttp.ClientResponse":
        """Send one request; its answer, of which the head is here. UpstreamFailure when there is none.

        Connecting may take `connect_timeout`, and from then on the head `first_byte_timeout`, however many
        1xx answers come before it. Not to be called without `take_connection`.
        """
        return await translated(
            self._request(ask), self.name, "upstream.first_byte_timeout", self.settings.proxy
        )

    async def _request(self, ask: Ask) -> "aiohttp.ClientResponse":
        import yarl  # noqa: PLC0415 - comes with aiohttp

        from gup.upstream.connector import Attempt, current  # noqa: PLC0415

        async with asyncio.timeout(None) as limit:
            attempt = Attempt(limit, self.settings.first_byte_timeout)
            before = current.set(attempt)
            try:
                return await self.session().request(
                    ask.method,
                    yarl.URL(self.url(ask.path), encoded=True),
                    headers=self.headers(ask),
                    allow_redirects=False,
                    proxy=self.settings.proxy,
                )
            finally:
                current.reset(before)
                attempt.limit = None

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
