"""The control plane as a service: its web application and periodic jobs, from start to stop."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any

from aiohttp import web

from gup.cache.archive import ArchiveError
from gup.cache.purges import reserve_room
from gup.config import Settings
from gup.content.key import ContentKey
from gup.control.alarms import AlarmCollector
from gup.control.api import (
    archives,
    budget,
    entries,
    holds,
    maintenance,
    months,
    past_revisions,
    sizing,
    statistics,
    status,
    trials,
    why,
)
from gup.control.api.endpoint import ENDPOINTS, STATE, Endpoint, openapi, problem
from gup.control.auth import Access, AccessRequest, is_near, presented, refusal
from gup.control.dependencies import BusyError, ControlDependencies
from gup.control.eviction import AgeClock
from gup.control.page import live, statement
from gup.control.prefetch import LANES
from gup.control.reconcile import reconcile
from gup.control.state import ControlState
from gup.errors import GupError
from gup.metrics import RECEIVERS

_log = logging.getLogger("gup.control.service")
_MAX_REQUEST_BYTES = 64 * 1024
_MOST_CONNECTIONS = 500
_SERVER = "gup"
"""The Server field: no versions, which would tell what to attack."""
ACCESS: web.AppKey[Access] = web.AppKey("access", Access)
BUSY: web.AppKey[set[web.RequestHandler]] = web.AppKey("busy", set)
"""Connections whose request is being answered."""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(state: ControlState, access: Access | None = None) -> web.Application:
    """The web application over `state`; without `access` no request may change anything."""
    app = web.Application(middlewares=[_busy, _problems, _guard], client_max_size=_MAX_REQUEST_BYTES)
    app[STATE] = state
    app[ACCESS] = access or Access()
    app[BUSY] = set()
    app[ENDPOINTS] = (
        *status.ENDPOINTS,
        *entries.ENDPOINTS,
        *archives.Archives().endpoints,
        *statistics.ENDPOINTS,
        *past_revisions.ENDPOINTS,
        *sizing.ENDPOINTS,
        *months.ENDPOINTS,
        *statement.ENDPOINTS,
        *trials.ENDPOINTS,
        *maintenance.ENDPOINTS,
        *holds.ENDPOINTS,
        *budget.ENDPOINTS,
        *why.ENDPOINTS,
        *live.ENDPOINTS,
        Endpoint("GET", "/api/v1/openapi.json", openapi),
    )
    app.add_routes(endpoint.route() for endpoint in app[ENDPOINTS])
    live.set_up(app)
    app.on_response_prepare.append(_security_headers)
    return app


@web.middleware
async def _busy(request: web.Request, handler: _Handler) -> web.StreamResponse:
    busy, connection = request.app[BUSY], request.protocol
    busy.add(connection)
    try:
        return await handler(request)
    finally:
        busy.discard(connection)


@web.middleware
async def _guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
    access = request.app[ACCESS]
    shown, peer = presented(request.headers.get("Authorization")), _address(request, "peername")
    asked = AccessRequest(
        method=request.method,
        path=request.path,
        host=request.headers.get("Host", ""),
        origin=request.headers.get("Origin"),
        fetch_site=request.headers.get("Sec-Fetch-Site"),
        peer=peer,
        local=_address(request, "sockname"),
        right=access.tokens.right(shown, near=is_near(peer)),
        bearer=shown is not None and not shown.by_browser,
    )
    refused = refusal(asked, access.listener)
    if refused is not None:
        response = problem(refused.status, refused.detail)
        for challenge in refused.challenges:
            response.headers.add("WWW-Authenticate", challenge)
        if asked.right is None:
            access.note_wrong_token(peer)
        return response
    answer = await handler(request)
    if asked.changes:
        _log.info("%s %s for %s: %d", asked.method, asked.path, peer or "this machine", answer.status)
    return answer


def _address(request: web.Request, end: str) -> str | None:
    name = request.transport.get_extra_info(end) if request.transport else None
    if isinstance(name, tuple):
        return str(name[0])
    return "" if isinstance(name, str | bytes) else None  # the path of a socket in the file system


@web.middleware
async def _problems(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """The only place that turns errors into problem documents (RFC 9457)."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        response = problem(error.status, error.text or "")
        for name in ("Allow", "Retry-After"):
            if name in error.headers:
                response.headers[name] = error.headers[name]
        return response
    except BusyError as error:
        return problem(409, str(error))
    except ArchiveError as error:
        return problem(400, str(error))
    except (GupError, OSError) as error:
        _log.warning("%s %s: %s", request.method, request.path, error)
        return problem(503, str(error))
    except Exception:  # noqa: BLE001 - our own mistake becomes a 500, logged
        _log.exception("%s %s failed", request.method, request.path)
        return problem(500, HTTPStatus(500).description)


async def _security_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """On every response, just before its head is sent; on streams too."""
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["Server"] = _SERVER


class _Connection(web.RequestHandler):
    """A client's connection. aiohttp would answer a malformed head with its text, and log a traceback."""

    __slots__ = ("received",)
    received: bool
    """Whether anything has come since this was last cleared."""

    def data_received(self, data: bytes) -> None:
        self.received = True
        super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            response = super().handle_error(request, status, exc, message)
        else:
            what = type(exc).__name__
            _log.warning("a request from %s is not well-formed HTTP (%s)", request.remote, what)
            response = problem(status, "This is not well-formed HTTP, or its head is too long.")
            response.force_close()
        response.headers["Server"] = _SERVER
        return response


class _Refused(asyncio.Protocol):
    """A connection for which there is no room."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


class Jobs:
    """Runs named jobs. An exception is logged; a periodic job runs again at its next turn."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(self._guarded(name, work), name=f"control {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it never began

    def every(self, seconds: float, name: str, turn: Callable[[], Awaitable[None]]) -> None:
        """Run `turn` now and again `seconds` after each end."""

        async def repeat() -> None:
            while True:
                await self._guarded(name, turn())
                await asyncio.sleep(seconds)

        self.start(name, repeat())

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _guarded(name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001 - must end neither the control plane nor the job's later turns
            _log.exception("the job %r failed", name)


_SHUTDOWN_SECONDS = 2.0
_RESTART_SECONDS = 1.0
_SPACE_SECONDS = 5.0
_GATHER_SECONDS = 0.05
"""Events are taken at most this often; they wait in the socket."""


_LEAVE_ROUNDS = 20
_QUIET_SECONDS = 0.05
"""A connection without a request for so long, and with nothing to send, is idle."""


async def _discard(work: Awaitable[object]) -> None:
    await work


class Control:
    """The control plane. `start` returns when its address answers; `stop` leaves no task or socket.

    The database is opened and the store scanned in the background; until then `/readyz` says so and nothing
    is evicted.
    """

    def __init__(
        self,
        dependencies: ControlDependencies,
        clock: Callable[[], float] = time.time,
        ages: AgeClock | None = None,
    ) -> None:
        """`ages` is the clock that ages are measured with, by default `clock`."""
        self.state = ControlState(dependencies, clock, ages)
        self._dependencies = dependencies
        self._jobs = Jobs()
        self._access = Access()
        self._app = make_app(self.state, self._access)
        self._runner = web.AppRunner(self._app, handle_signals=False, shutdown_timeout=_SHUTDOWN_SECONDS)
        self._listening: asyncio.Server | None = None
        self._next_events: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        dependencies = self._dependencies
        await self._access.open(dependencies.settings().listen, dependencies.store.run, dependencies.admin)
        dependencies.events.setblocking(False)
        self._await_events()
        await self._runner.setup()
        limit = dependencies.settings().listen.header_timeout if self._access.tls else None
        self._listening = await asyncio.get_running_loop().create_server(
            self._accept, sock=dependencies.admin, ssl=self._access.tls, ssl_handshake_timeout=limit
        )
        if self._access.tls is None:
            asyncio.get_running_loop().add_reader(dependencies.handed[0], self._receive_handed)
        await self.state.budget.save()
        self._jobs.every(0.5, "budget", self.state.budget.look)
        self._jobs.start("open", self._open())
        self._jobs.start("open statistics", self._open_statistics())

    def _await_events(self) -> None:
        asyncio.get_running_loop().add_reader(self._dependencies.events, self._take_events)

    def _take_events(self) -> None:
        """Take what waits. More is awaited a little later: a wake-up costs more than an event."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._dependencies.events)
        rest_seconds = 0.0 if self.state.take_events() else _GATHER_SECONDS
        self._next_events = loop.call_later(rest_seconds, self._await_events)

    def _accept(self) -> asyncio.Protocol:
        """A new connection. Where there are too many, the one that has asked for nothing for longest goes.

        It ends when a head is not here in `listen.header_timeout`, counted from the response before.
        """
        server, busy = self._runner.server, self._app[BUSY]
        assert server is not None
        open_now = [connection for connection in server.connections if connection.transport is not None]
        if len(open_now) >= _MOST_CONNECTIONS:
            idle = next((connection for connection in open_now if connection not in busy), None)
            if idle is None:
                return _Refused()
            idle.force_close()
        timeout = self._dependencies.settings().listen.header_timeout
        loop = asyncio.get_running_loop()
        own: dict[str, Any] = {"access_log": None}  # there is none
        connection = _Connection(server, loop=loop, keepalive_timeout=timeout, **own)
        connection.received = False
        return connection

    async def _open_statistics(self) -> None:
        self.state.clients.restore(await self.state.reports.newest_clients())
        self._jobs.every(1.0, "meter", self.state.meter)
        self._jobs.every(10.0, "history", self.state.history.write)
        await self.state.budget.seed(self.state.history)

    async def _open(self) -> None:
        """Open the index, then begin what depends on it."""
        jobs, state = self._jobs, self.state
        with contextlib.suppress(OSError):  # a purge says so
            await asyncio.to_thread(reserve_room, self._dependencies.store.run)
        await state.index.open()
        jobs.every(10.0, "demand", state.demand.write)
        state.scrubber.restore()
        state.prefetcher.restore()
        # Jobs that never return end only by a programming error; they are started again.
        jobs.every(_RESTART_SECONDS, "space", lambda: state.evictor.keep(_SPACE_SECONDS))
        jobs.every(_RESTART_SECONDS, "scrub", state.scrubber.keep)
        for lane in range(len(LANES)):
            jobs.every(_RESTART_SECONDS, f"prefetch {lane}", partial(state.prefetcher.run, lane))
        jobs.every(600.0, "reconcile", self._reconcile)
        jobs.every(1.0, "flush", self._flush)
        if (book := self._dependencies.book) is not None:
            await book.begin(state.carry_out)
        jobs.start("purge", state.evictor.purge_again())
        jobs.every(1.0, "purge", state.evictor.remove_left)
        jobs.every(60.0, "touch", self._touch)
        jobs.every(2.0, "reports", state.reports.write_clients)
        jobs.every(2.0, "timings", state.timings.write)
        jobs.every(600.0, "ages", state.reports.count_ages)
        jobs.every(2.0, "doctor", state.doctor.turn)
        jobs.every(3600.0, "prune", state.reports.prune)
        jobs.every(2.0, "recover", self._dependencies.recover)
        collector = AlarmCollector(state)
        await collector.restore()
        jobs.every(1.0, "watch", collector.look)
        for receiver in RECEIVERS:
            jobs.every(0.5, f"alarms to {receiver}", partial(state.notifications.send, receiver))
        jobs.every(5.0, "prefetch", state.prefetcher.look_over)
        jobs.every(1.0, "holds", state.holds.look)
        jobs.every(0.5, "outbreak", state.outbreak.keep)

    def _receive_handed(self) -> None:
        """Go on with an idle connection of the controller that leaves."""
        with contextlib.suppress(BlockingIOError):
            for fd in socket.recv_fds(self._dependencies.handed[0], 1, 1, socket.MSG_CMSG_CLOEXEC)[1]:
                loop, sock = asyncio.get_running_loop(), socket.socket(fileno=fd)
                sock.setblocking(False)
                self._jobs.start(
                    "take a connection", _discard(loop.connect_accepted_socket(self._accept, sock))
                )

    async def leave(self) -> None:
        """Another controller takes this one's place: accept no more, and hand it the idle connections.

        Before `stop`, which closes what is left: TLS, and what is still busy after a while, such as a stream
        of events. Closing an idle one would fail a request that its client sends just then.
        """
        loop, dependencies = asyncio.get_running_loop(), self._dependencies
        # not Server.close(): it closes what has just been accepted
        loop.remove_reader(dependencies.admin.fileno())
        loop.remove_reader(dependencies.handed[0])
        for _ in range(_LEAVE_ROUNDS if self._access.tls is None else 0):
            for connection in self._open_connections():
                connection.received = False
            await asyncio.sleep(_QUIET_SECONDS)
            for connection in self._open_connections():
                if connection not in self._app[BUSY] and not connection.received:
                    self._hand_over(connection)
            if not self._open_connections():
                break

    def _open_connections(self) -> list[_Connection]:
        assert self._runner.server is not None
        found = self._runner.server.connections
        return [one for one in found if one.transport is not None and isinstance(one, _Connection)]

    def _hand_over(self, connection: _Connection) -> None:
        transport = connection.transport
        assert isinstance(transport, asyncio.Transport)
        if transport.is_closing() or transport.get_write_buffer_size():
            return
        with contextlib.suppress(OSError):
            fd = transport.get_extra_info("socket").fileno()
            socket.send_fds(self._dependencies.handed[1], [b"\0"], [fd])
            transport.abort()  # closes this process's copy alone

    async def stop(self) -> None:
        state = self.state
        if self._next_events is not None:
            self._next_events.cancel()
        asyncio.get_running_loop().remove_reader(self._dependencies.events)
        asyncio.get_running_loop().remove_reader(self._dependencies.handed[0])
        while state.take_events():
            pass
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()
        await state.evictor.stop()
        await state.verification.stop()
        await state.sizing.stop()
        await self._jobs.stop()
        await state.notifications.close()
        state.scrubber.save()
        await self._repin()
        await self._touch()
        await state.meter()
        await state.history.write()
        await state.budget.look()
        await state.budget.save()
        await state.reports.write_clients()
        await state.timings.write()
        await state.demand.write(everything=True)
        await state.database.stop()
        await state.index.close()

    async def apply(self, settings: Settings) -> None:
        """The listening address stays."""
        await self._access.read(settings.listen, self._dependencies.store.run)
        await self.state.notifications.apply(settings.alarms)
        self.state.evictor.look_soon()
        if self.state.index.opened:
            await self.state.demand.write()  # or removes it

    # --- jobs

    async def _reconcile(self) -> None:
        await reconcile(self._dependencies, self.state.index, self.state.clock())
        self.state.evictor.look_soon()

    async def _flush(self) -> None:
        await self._repin()
        self.state.prefetcher.save()
        await self.state.index.flush()

    async def _repin(self) -> None:
        """Pin new generations of pinned entries on disk, and what was ordered to be pinned before it was
        known here; failures are retried at the next turn.
        """
        refusals = self.state.refusals
        for text in list(self.state.repin):
            key = ContentKey.parse(text)
            try:
                await self.state.set_pinned(key, pinned=True, patience_seconds=0.0)
            except BusyError:
                continue
            except OSError as error:
                refusals.note("pins", error.strerror or str(error))
                return
            self.state.repin.discard(text)
        refusals.note("pins", None)

    async def _touch(self) -> None:
        """Write revisions named again, and times of last use to the bodies: they survive the loss of the
        index.
        """
        due, self.state.touches = self.state.touches, {}

        def touch_all() -> None:
            for key, used_at in due.items():
                self._dependencies.store.touch(ContentKey.parse(key), used_at)

        await asyncio.to_thread(touch_all)
        self.state.prefetcher.save(all_=True)
