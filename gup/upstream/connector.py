"""All that needs aiohttp: its connections, made strict, and its exceptions, translated.

Importing aiohttp takes longer than a worker's start up to its first hit, so this module is imported by the
first request to an upstream (gup.upstream.session).
"""

import asyncio
import select
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL

from gup.errors import exhausted, is_exhausted
from gup.files import pending_events
from gup.upstream.exchange import UpstreamFailure, proxy_in_words, proxy_refused, unreachable

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

__all__ = ["URL", "HttpProcessingError", "is_quiet", "open_session", "translated"]

_SENT_UNASKED = select.POLLIN | select.POLLPRI | select.POLLRDHUP
"""Events that an idle connection must not have; POLLERR and POLLHUP are always reported."""
_KEEPALIVE_SECONDS = 4.0
"""How long an idle connection is kept: shorter than by most servers, proxies and firewalls."""
_PROBE_AFTER_SECONDS = 10
_PROBE_EVERY_SECONDS = 5
_Result = TypeVar("_Result")


def open_session(
    tls: ssl.SSLContext | bool, connect_seconds: float, head_seconds: float
) -> aiohttp.ClientSession:
    """A pool of connections to one upstream.

    Connecting may take `connect_seconds`; from then on the response's head may take `head_seconds`, including
    any 1xx responses before it.
    """

    def make_socket(address: Any) -> socket.socket:
        made = socket.socket(family=address[0], type=address[1], proto=address[2])
        # The kernel ends a connection whose peer has vanished.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_SECONDS)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_SECONDS)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(connect_seconds * 1000)))
        return made

    return aiohttp.ClientSession(
        connector=_Connector(
            head_seconds, ssl=tls, socket_factory=make_socket, keepalive_timeout=_KEEPALIVE_SECONDS
        ),
        request_class=_Request,
        middlewares=(_retry_if_reused,),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept-Encoding", "Accept"),
        # No sock_read: its timer also runs while gup itself pauses, and fires on pooled connections (aiohttp
        # issues 12953 and 13000). The head and Answer.read have time limits of their own.
        timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds, sock_connect=connect_seconds),
    )


class _Request(aiohttp.ClientRequest):
    limit: asyncio.Timeout
    """Limits the wait for the head; starts when there is a connection."""
    fresh = False
    reused = False


class _Connector(aiohttp.TCPConnector):
    """Reuses a pooled connection only if it is quiet; closes it otherwise and tries the next.

    The number of connections is not limited here: waiting for one would use up the time for connecting.
    """

    def __init__(self, head_seconds: float, **options: Any) -> None:
        super().__init__(limit=0, **options)
        self._head_seconds = head_seconds
        self._used: WeakSet[ResponseHandler] = WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: "list[Trace]",
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's signature
    ) -> "Connection":
        assert isinstance(req, _Request)
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            assert protocol is not None
            req.reused = protocol in self._used
            if not req.reused or (not req.fresh and is_quiet(connection)):
                break
            if (transport := connection.transport) is not None:
                transport.abort()  # TLS would wait for a peer that has closed, or sent what nobody asked for
            connection.close()
        self._used.add(protocol)
        req.limit.reschedule(asyncio.get_running_loop().time() + self._head_seconds)
        return connection


def is_quiet(connection: "Connection") -> bool:
    """Whether a connection is open and has received nothing since its last response.

    Data that the event loop has read, or that was encrypted, shows in aiohttp's protocol (`should_close`);
    the rest is still in the socket. aiohttp writes the request before the loop reads again, so only data that
    arrives at that very moment escapes, which no client can tell from the response.
    """
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing() or protocol.should_close:
        return False
    return not pending_events(transport.get_extra_info("socket").fileno(), _SENT_UNASKED)


async def _retry_if_reused(
    request: aiohttp.ClientRequest, handler: Callable[[aiohttp.ClientRequest], Any]
) -> aiohttp.ClientResponse:
    """A middleware: a request that fails on a reused connection is sent once more, on a fresh one.

    Other breaks are raised as _BrokeOff: aiohttp would repeat an idempotent request by itself, even on a new
    connection; but retries are decided and counted by gup.upstream.download.
    """
    assert isinstance(request, _Request)
    while True:
        try:
            async with asyncio.timeout(None) as request.limit:
                response: aiohttp.ClientResponse = await handler(request)
            return response  # noqa: TRY300 - the way out of the loop
        except aiohttp.ClientError as error:
            if request.reused and not request.fresh:
                request.fresh = True
                continue
            broke = isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError)
            if broke and not isinstance(error, aiohttp.ClientConnectorError):
                raise _BrokeOff(str(error)) from error
            raise


class _BrokeOff(aiohttp.ClientError):
    """The connection broke before the head of the response; the cause is aiohttp's error."""


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
        failure = failure_of(error, name, limit, proxy)
        if failure is None:
            raise
        raise failure from error


def failure_of(  # noqa: C901, PLR0911 - a table
    error: BaseException, name: str, limit: str, proxy: str | None
) -> UpstreamFailure | None:
    """The failure that an exception of aiohttp or of the network means; None for any other exception."""
    if isinstance(error, _BrokeOff) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and is_exhausted(error):
        return UpstreamFailure("unreachable", "overloaded", exhausted(error).detail, again=True)
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return unreachable(f"{name} did not accept a connection in time")
    if isinstance(error, aiohttp.ServerTimeoutError | TimeoutError):
        detail = f"{name} did not answer in time" + (f" ({limit})" if limit else "")
        return UpstreamFailure("timeout", "upstream-timeout", detail)
    if isinstance(error, aiohttp.ClientSSLError):
        return unreachable(f"{name}: TLS: {_tls_reason(error)}")
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return unreachable(f"{name}: {proxy_in_words(proxy)} can't be reached: {error.strerror}", again=True)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return proxy_refused(name, proxy, error.status, error.message)
    if isinstance(error, aiohttp.ClientConnectorError):
        # The proxy's name is looked up first.
        at_proxy = proxy is not None and error.host == urlsplit(proxy).hostname
        peer = f"{name}: {proxy_in_words(proxy)}" if at_proxy else name
        return unreachable(f"{peer} can't be reached: {error.strerror or error}", again=True)
    if isinstance(error, aiohttp.InvalidURL):
        return UpstreamFailure("error", "upstream-refused", f"{name}: bad URL {error}")
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return UpstreamFailure(
            "error", "upstream-error", f"{name} violated HTTP: {error.message}", again=True
        )
    # aiohttp raises RuntimeError when its connection has gone and no reader was told.
    if isinstance(error, aiohttp.ClientError | OSError | asyncio.IncompleteReadError | RuntimeError):
        detail = f"{name} broke off: {error or type(error).__name__}"
        return UpstreamFailure("error", "upstream-error", detail, again=True)
    return None


def _tls_reason(error: aiohttp.ClientSSLError) -> str:
    cause: BaseException = getattr(error, "certificate_error", None) or error.os_error
    reason = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or str(cause)
    return (
        f"certificate refused: {reason}" if isinstance(cause, ssl.SSLCertVerificationError) else str(reason)
    )
