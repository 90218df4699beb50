"""aiohttp's connections, made strict: one from the pool is used only while it is open and silent.

Imports aiohttp, which takes longer than a worker may take to its first hit: imported when first needed.
"""

import asyncio
import select
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import aiohttp

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

_SENT_UNASKED = select.POLLIN | select.POLLPRI | select.POLLRDHUP
"""What a connection without a request must not show; POLLERR and POLLHUP are always told."""


@dataclass(slots=True)
class Attempt:
    """One request on its way to its answer's head. The connector and the middleware change it."""

    limit: asyncio.Timeout | None
    """Ends the wait for the head; it runs from when the connection stands. None when that is over: asyncio
    keeps the context, and with it this object, as long as the connection that was made in it.
    """
    head_seconds: float
    fresh: bool = False
    """Whether it must go over a new connection."""
    reused: bool = False
    """Whether it goes over one that has answered before."""

    def connecting(self) -> None:
        """Connecting has a limit of its own."""
        assert self.limit is not None
        self.limit.reschedule(None)

    def connected(self) -> None:
        assert self.limit is not None
        self.limit.reschedule(asyncio.get_running_loop().time() + self.head_seconds)


current: ContextVar[Attempt] = ContextVar("current")


class BrokeOff(aiohttp.ClientError):
    """A connection broke before the answer's head. Its cause is aiohttp's error."""


def is_quiet(connection: "Connection") -> bool:
    """Whether a connection is open and nothing has come over it that no request asked for.

    What the event loop has read already is with aiohttp's protocol (`should_close`), and what was encrypted
    as well; the rest is in the socket. aiohttp writes the request before the loop reads again: what comes
    unasked must have come by now, or is on the way at that very moment, which no client can tell.
    """
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing() or protocol.should_close:
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _SENT_UNASKED)
    return not poll.poll(0)


class Connector(aiohttp.TCPConnector):
    """Hands out a pooled connection only if it is quiet; others are closed, and the next one is looked at.

    It has no limit of its own: who waits for a connection would spend the time that connecting may take.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(limit=0, **options)
        self._used: WeakSet[ResponseHandler] = WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: "list[Trace]",
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's signature
    ) -> "Connection":
        """A connection for one request. The time for the head begins when it stands."""
        attempt = current.get()
        attempt.connecting()
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            assert protocol is not None
            attempt.reused = protocol in self._used
            if not attempt.reused:
                self._used.add(protocol)
                break
            if not attempt.fresh and is_quiet(connection):
                break
            connection.close()
        attempt.connected()
        return connection


async def ask_again_if_reused(
    request: aiohttp.ClientRequest,
    handler: Callable[[aiohttp.ClientRequest], Any],
) -> aiohttp.ClientResponse:
    """A middleware: what fails on a reused connection before the answer's head goes over a fresh one, once.

    Other breaks reach the caller as BrokeOff. aiohttp would send an idempotent request again by itself, over
    a new connection too; whether and when to try again is decided, and counted, in one place: download.
    """
    try:
        return await _once(request, handler)
    except aiohttp.ClientError:
        attempt = current.get()
        if not attempt.reused:
            raise
        attempt.fresh = True
    return await _once(request, handler)


async def _once(
    request: aiohttp.ClientRequest, handler: Callable[[aiohttp.ClientRequest], Any]
) -> aiohttp.ClientResponse:
    try:
        response: aiohttp.ClientResponse = await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise BrokeOff(str(error)) from error
    return response
