"""The listening sockets of one worker: accepts connections, times them out, and drains them at the end.

A worker that leaves because others take its place closes no connection of its own accord, since a client may
be sending its next request just then. It hands each idle one to those others, which go on with it.
"""

import asyncio
import contextlib
import heapq
import logging
import socket
import time
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from gup import config
from gup.cache.fair_shares import client_of, networks_of
from gup.errors import Problem, is_exhausted
from gup.server.admission import Admission
from gup.server.connection import HANDED, READ, Connection, Context, Pacer, Poller, close_by_reset
from gup.server.handler import Handler
from gup.server.peer import PeerAdmission, PeerHandler
from gup.server.proxy_protocol import client_in, missing_bytes
from gup.units import format_http_date

log = logging.getLogger("gup.listener")

_ACCEPTS_A_TURN = 64
_CROWD = 128
_CROWD_UNSENT_BYTES = 1 << 20
"""With _CROWD connections in a worker, further ones have at most this much in the kernel unsent. Send buffers
of 4 MB for a thousand downloads exceed what the kernel spends on TCP (tcp_mem), which slows down all of them.
"""
_PAUSE_SECONDS = 0.1  # after running out of descriptors, so that open connections can end
_QUIET_SECONDS = 60.0  # running out is logged again only after this long without it
_TICK_SECONDS = 0.1
_IDLE_FOUND = 256
_HANDED_BYTES = 64  # an address and a port
_PROXY_HEADER_SECONDS = 1.0


def _reset(sock: socket.SocketType) -> None:
    close_by_reset(sock)
    sock.close()


class ProxiedConnection:
    """A connection from a proxy until its PROXY header is read, which names the client to admit.

    Not a byte behind the header is read: what follows is as if the client had just connected, and other
    connections have no part in any of this.
    """

    __slots__ = ("_header", "_listener", "_watched", "address", "port", "since", "sock")

    def __init__(
        self, listener: "Listener", sock: socket.SocketType, address: str, port: int, now: float
    ) -> None:
        self._listener, self.sock, self.address, self.port, self.since = listener, sock, address, port, now
        self._header, self._watched = b"", False

    def on_ready(self, events: int = READ) -> None:
        del events
        listener = self._listener
        try:
            while missing := missing_bytes(self._header):
                piece = self.sock.recv(missing)
                if not piece:
                    listener.end_proxied(self)
                    return
                self._header += piece
        except (BlockingIOError, InterruptedError):
            if not self._watched:
                self._watched = True
                listener.poller.watch(self.sock.fileno(), self, 0, READ)
        except OSError:
            listener.end_proxied(self)
        except Problem as problem:
            listener.refuse_proxied(self, problem)
        else:
            listener.admit_proxied(self, client_in(self._header))

    def forget(self) -> None:
        """Another object watches the socket from now on, or it is closed."""
        if self._watched:
            self._listener.poller.watch(self.sock.fileno(), self, READ, 0)


class Listener:
    """All client connections of one worker, and the coarse clock they share.

    One sweep a second ends them, instead of a timer for each connection. `handed` is a pair of sockets: by
    the first come idle connections of workers that leave, by the second this worker's go when it leaves.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        handed: tuple[socket.socket, socket.socket] | None,
        settings: config.Settings,
        handler: Handler | PeerHandler,
        admission: Admission | PeerAdmission,
        on_second: Callable[[float], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets, self._handler, self._admission = sockets, handler, admission
        self._handed = handed
        self._leaving = False
        self._on_second = on_second
        self._address_pacers: WeakValueDictionary[str, Pacer] = WeakValueDictionary()
        self._use(settings.clients)
        self._context = Context(
            self._loop,
            settings.listen,
            Poller(self._loop),
            handler,
            handler.hot_cache,
            handler.downloads,
            handler.access_log,
            self._closed,
        )
        self.poller = self._context.poller
        self._connections: set[Connection] = set()
        self._proxied: set[ProxiedConnection] = set()
        self._idle: list[Connection] = []
        self._none_idle_at = 0
        self._quiet_until = 0.0
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0

    def start(self) -> None:
        for listening in self._sockets:
            listening.setblocking(False)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
            self._loop.add_reader(listening.fileno(), self._accept, listening)
        if self._handed is not None:
            self._loop.add_reader(self._handed[0].fileno(), self._receive_handed, self._handed[0])
        self._tick()

    def apply(self, settings: config.Settings) -> None:
        self._handler.apply(settings)
        self._admission.apply(settings)
        self._use(settings.clients)
        for connection in [c for c in self._connections if not self._admission.is_allowed(c.peer)]:
            connection.cut()
        self._context.listen = settings.listen

    def _use(self, clients: config.Clients) -> None:
        self._clients, self._is_shared = clients, networks_of(clients.shared)
        self._address_pacers.clear()

    # --- accepting

    def _accept(self, listening: socket.socket) -> None:
        family = listening.family
        for _ in range(_ACCEPTS_A_TURN):
            try:
                fd, address = listening._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - 2 µs less
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if is_exhausted(error):
                    self._pause(listening, error)
                    return
                raise
            sock = socket.SocketType(family, socket.SOCK_STREAM, 0, fd)
            is_proxy = self._admission.is_proxy
            if is_proxy is not None and is_proxy(address[0]):
                self._await_header(sock, *address[:2])
            else:
                self._admit(sock, *address[:2])

    def _admit(self, sock: socket.SocketType, address: str, port: int, handed: bytes = HANDED) -> None:
        if self._admission.admit(address, self._make_room):
            self._make(sock, address, port, handed).begin()
        else:
            _reset(sock)

    def _make(self, sock: socket.SocketType, address: str, port: int, handed: bytes = HANDED) -> Connection:
        """The connection of a client that is admitted, and counted."""
        sock.setblocking(False)
        if len(self._connections) >= _CROWD:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _CROWD_UNSENT_BYTES)
        client = f"{address} {port}" if self._is_shared(address) else client_of(address)
        connection = Connection(self._context, sock, address, client, self._pacers(client), handed)
        self._connections.add(connection)
        self._handler.access_log.connected.add(address)
        return connection

    # --- connections of proxies

    def _await_header(self, sock: socket.SocketType, address: str, port: int) -> None:
        if not self._admission.reserve(self._make_room):
            _reset(sock)
            return
        sock.setblocking(False)
        proxied = ProxiedConnection(self, sock, address, port, self._loop.time())
        self._proxied.add(proxied)
        proxied.on_ready()  # the header has arrived already as a rule

    def admit_proxied(self, proxied: ProxiedConnection, client: tuple[str, int] | None) -> None:
        """The header names this client; None: the proxy asks for itself."""
        self._forget_proxied(proxied)
        if client is None:
            self._admit(proxied.sock, proxied.address, proxied.port)
        else:
            address, port = client
            self._admit(proxied.sock, address, port, f"{address} {port}".encode())

    def refuse_proxied(self, proxied: ProxiedConnection, problem: Problem) -> None:
        """Answer the proxy that this is no header."""
        self._forget_proxied(proxied)
        if self._admission.admit(proxied.address, self._make_room):
            self._make(proxied.sock, proxied.address, proxied.port).refuse(problem)
        else:
            _reset(proxied.sock)

    def end_proxied(self, proxied: ProxiedConnection) -> None:
        """Its header did not come whole."""
        self._forget_proxied(proxied)
        proxied.sock.close()
        self._note_ended()

    def _forget_proxied(self, proxied: ProxiedConnection) -> None:
        proxied.forget()
        self._proxied.discard(proxied)
        self._admission.release()

    def _expire_proxied(self, now: float) -> None:
        for proxied in [p for p in self._proxied if now - p.since > _PROXY_HEADER_SECONDS]:
            self._admission.refuse("proxy")
            self.end_proxied(proxied)

    # --- limits

    def _pacers(self, client: str) -> tuple[Pacer, ...]:
        """The allowances of a new connection: its own, and that of its address."""
        limits, now = self._clients, self._loop.time()
        own = (Pacer(limits.rate, now),) if limits.rate else ()
        if not limits.rate_per_address:
            return own
        pacer = self._address_pacers.get(client)
        if pacer is None:
            pacer = Pacer(limits.rate_per_address, now, lambda: self._admission.among(client))
            self._address_pacers[client] = pacer
        return (*own, pacer)

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest; False when there is none.

        Refusals must be cheap: one search finds many, and one that finds none is not repeated for a second.
        """
        if not self._idle and self._none_idle_at != self._second:
            idle = (connection for connection in self._connections if connection.idle)
            self._idle = heapq.nsmallest(_IDLE_FOUND, idle, key=lambda connection: connection.since)[::-1]
            self._none_idle_at = 0 if self._idle else self._second
        while self._idle:
            if (connection := self._idle.pop()).idle:
                connection.close()
                return True
        return False

    def _pause(self, listening: socket.socket, why: OSError) -> None:
        now = self._context.now
        if now >= self._quiet_until:
            log.warning("no more connections can be accepted for now: %s", why.strerror)
        self._quiet_until = now + _QUIET_SECONDS
        self._loop.remove_reader(listening.fileno())
        self._make_room()

        def resume() -> None:
            if listening.fileno() >= 0:  # else the worker is leaving
                self._loop.add_reader(listening.fileno(), self._accept, listening)

        self._loop.call_later(_PAUSE_SECONDS, resume)

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._admission.leave(connection.peer)
        self._note_ended()

    def _note_ended(self) -> None:
        if not self._connections and not self._proxied:
            self._empty.set()

    # --- time

    def _tick(self) -> None:
        context = self._context
        context.now, context.wall_now = self._loop.time(), time.time()
        if self._leaving:
            self._hand_over()
        if self._proxied:
            self._expire_proxied(context.now)
        if int(context.wall_now) != self._second:
            self._second = int(context.wall_now)
            context.date = format_http_date(context.wall_now).encode()
            for connection in [c for c in self._connections if c.expired(context.now)]:
                connection.expire()
            context.hot_cache.refresh()
            context.hot_cache.forget_messages()
            context.downloads.each_second()
            self._on_second(context.wall_now)
        self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)

    # --- the end

    async def leave(self) -> None:
        """Accept no more; returns when each connection has been handed over, or was closed by its client.

        Without a time limit: a response that its client takes ends, and one that it doesn't is cut after
        `listen.write_timeout`.
        """
        self._stop_accepting()
        self._leaving = True
        self._empty.clear()
        self._hand_over()
        if self._connections or self._proxied:
            await self._empty.wait()

    def _stop_accepting(self) -> None:
        for listening in self._sockets:
            self._loop.remove_reader(listening.fileno())
            listening.close()
        if self._handed is not None:
            self._loop.remove_reader(self._handed[0].fileno())
        self._sockets = ()

    def _hand_over(self) -> None:
        """Those that are idle now, as far as the queue has room; the rest at the next tick."""
        for connection in [c for c in self._connections if c.idle]:
            if self._handed is None:
                connection.close()
            elif not connection.hand_over(self._handed[1]):
                return

    def _receive_handed(self, receiving: socket.socket) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                handed, fds, _, _ = socket.recv_fds(receiving, _HANDED_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            for fd in fds:
                sock = socket.socket(fileno=fd)
                try:
                    address, port = handed.decode().split() if handed != HANDED else sock.getpeername()[:2]
                except OSError:  # the client is gone
                    sock.close()
                    continue
                self._admission.count(address)
                self._make(sock, address, int(port), handed).begin()

    async def drain(self, timeout_seconds: float) -> None:
        context = self._context
        self._handler.draining = True
        context.hot_cache.drop()  # nothing is learned any more: every response now ends its connection
        self._leaving = False
        self._stop_accepting()
        self._empty.clear()
        for connection in [c for c in self._connections if c.idle]:
            connection.close()
        for proxied in list(self._proxied):
            self.end_proxied(proxied)
        context.downloads.stop()
        for connection in list(self._connections):
            connection.reject()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._empty.wait()
        for connection in list(self._connections):
            connection.expire()
            connection.close()
        context.downloads.close()
        context.poller.close()
        if self._timer is not None:
            self._timer.cancel()
        for end in self._handed or ():
            end.close()
