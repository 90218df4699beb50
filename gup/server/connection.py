"""One client's connection: reads requests, answers hits from the hot cache, sends responses as the socket
takes them.

Sockets are non-blocking and watched by the worker's poller. There is no transport; a task exists only while a
response is awaited.
"""

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from gup.config import Listen
from gup.content.client_identity import Stated
from gup.errors import Problem
from gup.phases import FillClock, RequestClock
from gup.server.access_log import AccessLog
from gup.server.downloads import Downloads, Ticket, stopping
from gup.server.handler import Handler, Later
from gup.server.hot_cache import HotCache, HotRow
from gup.server.peer import PeerHandler
from gup.server.ranges import Span
from gup.server.request import MAX_HEAD_BYTES, check_begun, parse_head
from gup.server.response import BROKEN, FINISHED, Response, ResponseWriter

_READ_BYTES = 4096  # heads are short, and memory for more would be taken at every read
_TURN_BYTES = 2 << 20  # the most one connection sends before others have their turn
_LINGER_SECONDS = 2.0
_CRLF = b"\r\n"
_HEAD_END = b"\r\n\r\n"
_SLICE_SECONDS = 0.05
_LEAST_SLICE_BYTES = 1024
HANDED = b"\0"
"""Stands for the address of the connection's other end."""
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
_MOST_EVENTS = 256
_FEW_EVENTS = 8  # after fewer, another poll at once is not worth a system call
_LOOKS = 4  # per turn of the event loop: timers and fills must not wait long


def close_by_reset(sock: socket.SocketType) -> None:
    """Have `close` send a reset: the client notices at once, and no data stays in the kernel."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Phase(Enum):
    READING = auto()
    WAITING = auto()  # for the handler's response
    QUEUED = auto()  # for a download slot
    SENDING = auto()
    LINGERING = auto()  # all is sent; until the client has closed
    CLOSED = auto()


_READING = Phase.READING


class Watched(Protocol):
    def on_ready(self, events: int) -> None:
        """The socket is ready for these."""


class Poller:
    """Which client sockets are ready: one epoll of the worker's own, which the event loop watches.

    The loop sees one descriptor, readable when any client socket is ready. Sockets in the loop's own selector
    would cost a handle, a key and a context for each event (1 µs of the 7 that a small hit takes) and as much
    memory for each idle connection. Level-triggered: what was not read or written is reported again.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        loop.add_reader(self._epoll.fileno(), self._turn)

    def watch(self, fd: int, watched: Watched, before: int, events: int) -> None:
        """Change the watched events from `before`; with 0 not even errors are reported."""
        if not before:
            self._watched[fd] = watched
            self._epoll.register(fd, events)
        elif events:
            self._epoll.modify(fd, events)
        else:
            self._epoll.unregister(fd)
            del self._watched[fd]

    def forget(self, fd: int) -> None:
        """The descriptor is about to be closed, which unregisters it."""
        self._watched.pop(fd, None)

    def close(self) -> None:
        assert not self._watched
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _turn(self) -> None:
        for _ in range(_LOOKS):
            ready = self._epoll.poll(0, _MOST_EVENTS)
            for fd, events in ready:
                found = self._watched.get(fd)
                if found is not None:  # None: an earlier event of this list closed it
                    found.on_ready(events)
            if len(ready) < _FEW_EVENTS:
                return


class Pacer:
    """A rate limit of one connection, or of one address: after a slice it waits until the bytes are paid for.

    Times are seconds on any one monotonic clock. `among`: this worker's share of the rate is one part in so
    many.
    """

    __slots__ = ("__weakref__", "_among", "_paid_until", "_per_second", "slice_bytes")

    def __init__(self, per_second: int, now: float, among: Callable[[], float] = lambda: 1.0) -> None:
        self._per_second = per_second
        self._among = among
        self._paid_until = now
        self.slice_bytes = max(_LEAST_SLICE_BYTES, int(per_second * _SLICE_SECONDS))

    def delay_seconds(self, now: float) -> float:
        return max(0.0, self._paid_until - now)

    def took(self, sent_bytes: int, now: float) -> None:
        """A late timer is compensated, by one slice at most."""
        seconds = sent_bytes * self._among() / self._per_second
        self._paid_until = max(self._paid_until, now - _SLICE_SECONDS) + seconds


@dataclass(slots=True)
class Context:
    """What the connections of one worker share. Only the listener changes it.

    `now` (monotonic) and `wall_now` are updated ten times a second, `date` once, as a new object.
    """

    loop: asyncio.AbstractEventLoop
    listen: Listen
    poller: Poller
    handler: Handler | PeerHandler
    hot_cache: HotCache
    downloads: Downloads
    access_log: AccessLog
    on_close: Callable[["Connection"], None]
    now: float = 0.0
    wall_now: float = 0.0
    date: bytes = b""


@dataclass(slots=True, eq=False)
class Connection:
    """`since` is when the present phase last made progress, on the context's coarse clock."""

    _context: Context
    _sock: socket.SocketType
    peer: str
    client: str
    """For fair shares: the address, or this connection alone for addresses in `clients.shared`."""
    _pacers: tuple[Pacer, ...]
    handed: bytes = HANDED
    """What is told to the worker that it is handed over to."""
    since: float = field(init=False)
    _fd: int = field(init=False)
    _phase: Phase = _READING
    _pending: bytearray = field(default_factory=bytearray)
    _eof: bool = False
    _watched: int = 0
    _task: asyncio.Task[None] | None = None
    _response: Response | None = None
    _ticket: Ticket | None = None
    _writer: ResponseWriter | None = None
    _times: RequestClock | None = None
    """Of a request that has to wait for something."""

    def __post_init__(self) -> None:
        self.since = self._context.now
        self._fd = self._sock.fileno()

    @property
    def idle(self) -> bool:
        """Whether it may be closed without losing a response."""
        return self._phase is _READING and not self._pending

    # --- reading

    def begin(self) -> None:
        """Read the first request, which has arrived already as a rule: then a client that wants no more than
        one hit costs the poller nothing.
        """
        self._readable()
        if self._phase is not Phase.CLOSED and not self._eof:
            self._watch(self._watched | READ)

    def on_ready(self, events: int) -> None:
        """The socket is ready. Errors and hang-ups show when it is read or written."""
        if events & ~WRITE and self._watched & READ:
            self._readable()
        if events & ~READ and self._watched & WRITE:
            self._writable()

    def _readable(self) -> None:
        try:
            piece = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not piece:
            # The client sends no more, but may still read its response. A queued client counts as gone,
            # although it might read: its queue position is for the others.
            self._eof = True
            if self._phase in (_READING, Phase.QUEUED, Phase.LINGERING):
                self.close()
            else:
                self._watch(self._watched & ~READ)
        elif self._phase is _READING:
            if not self._pending:
                found = self._context.hot_cache.look_up(piece)
                if found is not None and self._send_hot(*found):
                    return
                self.since = self._context.now
            self._pending += piece
            self._advance()
        elif self._phase is not Phase.LINGERING:
            self._pending += piece
            if len(self._pending) > MAX_HEAD_BYTES:
                self._watch(self._watched & ~READ)  # the client waits for responses before it may send more

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._context.poller.watch(self._fd, self, self._watched, events)
            self._watched = events

    def _advance(self) -> None:
        """Answer the requests that have arrived, in order, as far as that needs no waiting."""
        pending = self._pending
        while self._phase is _READING and pending:
            while pending.startswith(_CRLF):  # RFC 9112 section 2.2: empty lines before a request line
                del pending[: len(_CRLF)]
            end = pending.find(_HEAD_END)
            if end < 0:
                try:
                    check_begun(pending)
                except Problem as problem:
                    self.refuse(problem)
                break
            head = bytes(pending[: end + len(_HEAD_END)])
            del pending[: len(head)]
            found = self._context.hot_cache.look_up(head) if len(head) <= MAX_HEAD_BYTES else None
            if found is None or not self._send_hot(*found):
                self._answer(head)
        if self._phase is _READING and self._eof:
            self.close()
        elif self._phase is _READING:
            self._watch(self._watched | READ)

    # --- answering from the hot cache, in the callback that read the request; docs/performance.md has figures

    def _send_hot(self, row: HotRow, span: Span, client: Stated | bytes, last: bool) -> bool:
        """Send a ready-made response; False when nothing was sent.

        `last`: the client wants no further response. Then only a whole small body is sent.
        """
        context = self._context
        began = context.access_log.clock()
        if row.small and span is row.whole and not self._pacers:
            message = row.message
            if row.message_date is not context.date:
                message = context.hot_cache.make_message(row, context.date, context.wall_now)
            if message is not None:
                self._send_message(row, message, client, began, last=last)
                return True
        if last:
            return False
        if row.download:
            try:
                ticket = self._ticket = context.downloads.take_ticket(self.client)
            except Problem as problem:
                self._send(context.handler.refuse(problem, keep_alive=True), began)
                return True
            if ticket.slot is None:
                self._response = context.access_log.of_row(row, b"", span, client, began)
                self._response.first_byte = None  # logged if the client leaves
                self._queue(ticket, lambda: self._send_span(row, span, client, began), began, row.key_text)
                return True
        self._send_span(row, span, client, began)
        return True

    def _send_message(
        self, row: HotRow, message: bytes, client: Stated | bytes, began: float, *, last: bool
    ) -> None:
        log = self._context.access_log
        body_at = len(message) - row.length
        if last:
            end = body_at - len(_CRLF)
            message = b"%bConnection: close\r\n%b" % (message[:end], message[end:])
            body_at = len(message) - row.length
        try:
            sent = self._sock.send(message)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        log.begin_hot(self.peer, row, log.hit_at)
        self.since = self._context.now
        body_sent = max(0, sent - body_at)
        log.words[row.sent_at] += body_sent
        log.words[row.stream_at] += body_sent
        if sent < len(message):
            response = log.of_row(row, message[sent:body_at], row.whole, client, began)
            response.close = last
            self._start(response, body_sent)
            return
        log.end_hot(self.peer, row, log.hit_at, row.whole, client, began)
        if last:  # no received byte is unread, so this close sends no reset
            self.close()

    def _send_span(self, row: HotRow, span: Span, client: Stated | bytes, began: float) -> None:
        context, log = self._context, self._context.access_log
        at = log.hit_at if span is row.whole else log.part_hit_at
        head = row.head(context.date, context.wall_now, span)
        log.begin_hot(self.peer, row, at)
        self.since = context.now
        length = span.stop - span.start
        sent, offered = 0, min(length, _TURN_BYTES)
        if not self._pacers and self._times is None and row.in_page_cache(span.start, offered, context.now):
            try:
                head = head[self._sock.send(head, socket.MSG_MORE) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.close()
                return
            if not head:
                # An error means a full socket or a failing disk; the next try, in `_write`, finds out which.
                with contextlib.suppress(OSError):
                    sent = os.sendfile(self._fd, row.entry.fd, span.start, offered)
                log.words[row.sent_at] += sent
                log.words[row.stream_at] += sent
                if sent == length:
                    log.end_hot(self.peer, row, at, span, client, began)
                    if row.download:
                        self._release()
                    return
        self._start(log.of_row(row, head, span, client, began), sent)

    # --- answering by the handler

    def _answer(self, head: bytes) -> None:
        context, began = self._context, self._context.access_log.clock()
        try:
            request = parse_head(head, self.client)
        except Problem as problem:
            self.refuse(problem)
            return
        if request.plain and request.keep_alive and request.minor_version == 1:
            row = context.hot_cache.find_target(request.target)
            if row is not None and request.header("via") is None:
                client = context.access_log.declarations.of(request.headers)
                self._send_hot(row, row.whole, client, last=False)
                return
        response = context.handler.respond(request)
        if isinstance(response, Response):
            self._send(response, began)
            return
        self._phase = Phase.WAITING
        self._response = Response(
            0, b"", request=request, result="gone", began=began
        )  # logged if the client leaves
        times = self._begin_times(began, "disk")
        self._task = context.loop.create_task(self._answer_later(response, began, times))

    async def _answer_later(self, later: Later, began: float, times: RequestClock) -> None:
        try:
            response = await later(times)
        finally:
            self._task = None
        times.enter("sending")
        self._send(response, began)
        self._advance()

    def _begin_times(self, began: float, phase: str = "sending") -> RequestClock:
        log = self._context.access_log
        times = self._times = RequestClock(log.clock, phase, began)
        log.waiting[times] = self.peer
        return times

    def refuse(self, problem: Problem) -> None:
        """Answer with a problem and close: it is unknown where the next request begins."""
        response = self._context.handler.refuse(problem, keep_alive=False)
        self._send(response, self._context.access_log.clock())

    def _send(self, response: Response, began: float) -> None:
        response.began = began
        self._response, self._ticket = response, response.ticket

        def begin() -> None:
            self._context.access_log.begin(self.peer, response)
            self._start(response)

        if self._ticket is not None and self._ticket.slot is None:
            self._queue(self._ticket, begin, began)
        else:
            begin()

    def _queue(self, ticket: Ticket, send: Callable[[], None], began: float, key: str = "") -> None:
        times = self._times or self._begin_times(began)
        times.key = times.key or key
        times.behind = self._context.downloads.holders()
        times.enter("download_queue")

        def admitted() -> None:
            times.enter("sending")
            self._phase = _READING  # what is sent at once has no phase of its own
            send()
            self._advance()

        ticket.on_admitted = admitted
        self._phase = Phase.QUEUED

    def reject(self) -> None:
        """The service stops: reject a queued download, so that its client can ask another GUP."""
        if self._phase is Phase.QUEUED:
            self._release()
            self.refuse(stopping())

    def _start(self, response: Response, body_sent: int = 0) -> None:
        """`body_sent` bytes of its body have been sent already: the rest when the socket takes more."""
        self._response = response
        self._phase = Phase.SENDING
        self.since = self._context.now
        if self._writer is None:
            self._writer = ResponseWriter(self._context.access_log.words)
        self._writer.start(response, body_sent)
        if self._ticket is not None:
            self._ticket.sent_bytes = lambda writer=self._writer: writer.sent_bytes
        if body_sent:
            self._wait_for("client")
            self._watch(self._watched | WRITE)
        else:
            self._write(self._writer)

    def _write(self, writer: ResponseWriter) -> None:
        context, pacers = self._context, self._pacers
        budget = _TURN_BYTES
        for pacer in pacers:
            budget = 0 if pacer.delay_seconds(context.loop.time()) else min(budget, pacer.slice_bytes)
        try:
            while budget > 0:
                done = writer.write(self._sock, budget)
                if done <= 0:
                    self._stopped(writer, done)
                    return
                budget -= done
                self.since = context.now
                for pacer in pacers:
                    pacer.took(done, context.loop.time())
                if writer.full:
                    break
        except (BlockingIOError, InterruptedError):
            self._wait_for("client")
            self._watch(self._watched | WRITE)
            return
        except OSError:
            self.close()
            return
        # continue when the socket takes more, or when the bytes sent are paid for
        delay = max((pacer.delay_seconds(context.loop.time()) for pacer in pacers), default=0.0)
        self._wait_for("rate" if delay else "client")
        if delay:
            context.loop.call_later(delay, self._writable)
        self._watch(self._watched & ~WRITE if delay else self._watched | WRITE)

    def _wait_for(self, what: FillClock | str) -> None:
        """The response waits for this from now on."""
        times = self._times
        if times is None:
            assert self._response is not None
            times = self._begin_times(self._response.began)
        times.wait_for(what)

    def _stopped(self, writer: ResponseWriter, why: int) -> None:
        """The response is complete, waits for more of its body, or is broken."""
        if why == FINISHED:
            self._finish()
        elif why == BROKEN:
            self.cut()
        else:
            self._watch(self._watched & ~WRITE)
            assert self._response is not None
            assert self._response.body is not None
            self._wait_for(self._response.body.times)
            self._response.body.wait(writer.position, self._writable)

    def _writable(self) -> None:
        if self._phase is Phase.SENDING:
            assert self._writer is not None
            self._write(self._writer)
            self._advance()

    def _finish(self) -> None:
        assert self._response is not None
        close = self._response.close or self._context.handler.draining
        self._log_end(complete=True)
        self._watch(self._watched & ~WRITE)
        self._release()
        self.since = self._context.now
        if not close:
            self._phase = _READING
        elif self._eof:
            self.close()
        else:  # let the client read its response before closing: with bytes unread, that resets
            self._phase = Phase.LINGERING
            self._pending.clear()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            self._watch(self._watched | READ)

    # --- the end

    def _log_end(self, *, complete: bool) -> None:
        if self._response is not None:
            sent = self._writer.sent_bytes if self._phase is Phase.SENDING and self._writer else 0
            self._context.access_log.end(
                self.peer, self._response, sent, complete=complete, times=self._times
            )

    def _release(self) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._context.downloads.give_back(ticket)
        response, self._response = self._response, None
        if response is not None and response.body is not None:
            response.body.forget(self._writable)
            response.body.leave()
        if self._writer is not None:
            self._writer.end()
        times, self._times = self._times, None
        if times is not None:
            del self._context.access_log.waiting[times]

    def cut(self) -> None:
        """End now, with a reset: the client must never take a part for the whole."""
        close_by_reset(self._sock)
        self.close()

    def hand_over(self, to: socket.socket) -> bool:
        """Pass the idle connection to another process; False when the queue to it is full."""
        assert self.idle
        try:
            socket.send_fds(to, [self.handed], [self._fd])
        except OSError:
            return False
        self._watch(0)  # closing does not end it, since the other process has it open
        self.close()
        return True

    def close(self) -> None:
        """Close now. A fill continues without this client."""
        if self._phase is Phase.CLOSED:
            return
        self._log_end(complete=False)
        self._phase = Phase.CLOSED
        self._context.poller.forget(self._fd)
        self._release()
        if self._task is not None:
            self._task.cancel()
        self._sock.close()
        self._context.on_close(self)

    # --- time

    def expired(self, now: float) -> bool:
        """Whether the present phase has lasted too long without progress; see Listener's sweep."""
        listen = self._context.listen
        since = now - self.since
        if self._phase is _READING:
            return since > (listen.header_timeout if self._pending else listen.idle_timeout)
        if self._phase is Phase.SENDING and self._watched & WRITE:  # the client does not read
            return since > listen.write_timeout
        return self._phase is Phase.LINGERING and since > _LINGER_SECONDS

    def expire(self) -> None:
        """Time is up: a client that has sent a part of a head gets a 408, an unfinished response is cut."""
        if self._phase is _READING and self._pending:
            self.refuse(Problem("request-timeout", "the request head took too long to arrive"))
        elif self._phase is Phase.SENDING:
            self.cut()
        else:
            self.close()
