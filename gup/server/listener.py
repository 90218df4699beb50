"""The listening sockets of one worker: accepts, refuses, keeps time for all connections; reads no request."""

import asyncio
import contextlib
import heapq
import logging
import socket
import struct
import time
from collections.abc import Callable, Sequence

from gup import config
from gup.errors import is_exhausted
from gup.server.admission import Admission
from gup.server.connection import Connection
from gup.server.downloads import Downloads
from gup.server.handler import Handler
from gup.server.hot import HotTable
from gup.server.lane import Lane
from gup.server.pacing import Pacing, kernel_paces
from gup.server.poller import Poller
from gup.server.tally import Tally
from gup.units import format_http_date

log = logging.getLogger("gup.listener")

_ACCEPTS_A_TURN = 64
_PAUSE_SECONDS = 0.1
"""After running out of descriptors: what is open gets time to end."""
_QUIET_SECONDS = 60.0
"""It is logged once, until it has not happened for so long."""
_TICK_SECONDS = 0.1
_IDLE_FOUND = 256
_RESET = struct.pack("ii", 1, 0)


class Listener:
    """All client connections of one worker, and the coarse clock they share.

    `now` (monotonic) and `wall_now` move ten times a second here, `date` once; timeouts are kept by one sweep
    a second, not by a timer for each connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: Sequence[socket.socket],
        settings: config.Settings,
        handler: Handler,
        hot: HotTable,
        tally: Tally,
        downloads: Downloads,
        admission: Admission,
        *,
        on_second: Callable[[float], None],
    ) -> None:
        self.loop = loop
        self.settings = settings
        self.handler = handler
        self.tally = tally
        self.lane = Lane(hot, self)
        self.poller = Poller(loop)
        self.hot = hot
        self.downloads = downloads
        self.accounts = handler.accounts
        self.draining = False
        self._sockets = list(sockets)
        self._admission = admission
        self._kernel_paces: bool | None = None
        self._choose_pacing()
        self._idle: list[Connection] = []
        self._none_idle_at = 0
        self._quiet_until = 0.0
        self._connections: set[Connection] = set()
        self._on_second = on_second
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self.date = b""
        self._read_clocks()

    def start(self) -> None:
        """Begin to accept."""
        for listening in self._sockets:
            listening.setblocking(False)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
            self.loop.add_reader(listening.fileno(), self._accept, listening)
        self._tick()

    def apply(self, settings: config.Settings) -> None:
        """New settings for what connects and times out from now on."""
        self.settings = settings
        self.handler.apply(settings)
        self.accounts.apply(settings)
        self.hot.drop()
        self._admission.apply(settings)
        self._choose_pacing()

    def _choose_pacing(self) -> None:
        """Who paces is found out once, when there first is a rate; that holds the loop up for 60 ms."""
        rate = self.settings.clients.rate
        if rate and self._kernel_paces is None:
            self._kernel_paces = kernel_paces()
        self.pacing = Pacing(rate, by_kernel=bool(self._kernel_paces))

    # --- accepting

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if is_exhausted(error):
                    self._pause(listening, error)
                    return
                raise
            self._admit(sock, address[0])

    def _admit(self, sock: socket.socket, address: str) -> None:
        if not self._admission.admit(address, self._make_room):
            # reset, not closed: nothing of it stays in the kernel, and the client knows at once
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
            return
        sock.setblocking(False)
        pacer = self.pacing.begin(sock, self.loop.time()) if self.pacing.per_second else None
        self._connections.add(Connection(self, sock, address, pacer))
        self.tally.clients.add(address)

    def _make_room(self) -> bool:
        """Close the connection that has idled longest; whether there was one.

        Refusals must be cheap: a search finds many, and one that finds none is not repeated for a second.
        """
        if not self._idle and self._none_idle_at != self._second:
            idle = (connection for connection in self._connections if connection.idle)
            self._idle = heapq.nsmallest(_IDLE_FOUND, idle, key=lambda connection: connection.since)[::-1]
            self._none_idle_at = 0 if self._idle else self._second
        while self._idle:
            connection = self._idle.pop()
            if connection.idle:
                connection.close()
                return True
        return False

    def _pause(self, listening: socket.socket, why: OSError) -> None:
        if self.now >= self._quiet_until:
            log.warning("no more connections can be accepted for now: %s", why.strerror)
        self._quiet_until = self.now + _QUIET_SECONDS
        self.loop.remove_reader(listening.fileno())
        self._make_room()

        def resume() -> None:
            if not self.draining:
                self.loop.add_reader(listening.fileno(), self._accept, listening)

        self.loop.call_later(_PAUSE_SECONDS, resume)

    def gone(self, connection: Connection) -> None:
        """A connection has closed."""
        self._connections.discard(connection)
        self._admission.left(connection.peer)
        if not self._connections:
            self._empty.set()

    # --- time

    def _read_clocks(self) -> None:
        self.now = self.loop.time()
        self.wall_now = time.time()

    def _tick(self) -> None:
        self._read_clocks()
        if int(self.wall_now) != self._second:
            self._second = int(self.wall_now)
            self._each_second()
        self._timer = self.loop.call_later(_TICK_SECONDS, self._tick)

    def _each_second(self) -> None:
        self.date = format_http_date(self.wall_now).encode()
        for connection in [c for c in self._connections if c.expired(self.now)]:
            connection.expire()
        self.downloads.each_second()
        self._on_second(self.wall_now)

    # --- the end

    async def drain(self, timeout_seconds: float) -> None:
        """Stop accepting, let answers under way end, then close what is left."""
        self.draining = self.handler.draining = True
        self.hot.drop()  # nothing is learned any more: every answer from now on ends its connection
        for listening in self._sockets:
            self.loop.remove_reader(listening.fileno())
            listening.close()
        self._empty.clear()
        for connection in [c for c in self._connections if c.idle]:
            connection.close()
        self.downloads.stop()
        for connection in [c for c in self._connections if c.queued]:
            connection.turn_away()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._empty.wait()
        for connection in list(self._connections):
            connection.expire()
            connection.close()
        self.downloads.close()
        self.poller.close()
        if self._timer is not None:
            self._timer.cancel()
