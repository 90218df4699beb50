"""One client's connection: reads heads, sends answers as the socket takes them; knows nothing of content.

Non-blocking sockets, watched by the worker's poller: no transport, and a task only while an answer has
to be waited for.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from gup.cache.body import Body
from gup.errors import Problem
from gup.server.accounts import Account
from gup.server.downloads import Turn, stopping
from gup.server.handler import Reply
from gup.server.outgoing import BROKEN, FINISHED, Outgoing
from gup.server.pacing import Pacer
from gup.server.phase import Phase, allowed_seconds
from gup.server.poller import READ, WRITE
from gup.server.request import MAX_HEAD_BYTES as LONGEST_HEAD_BYTES
from gup.server.request import Request, check_begun, find_head_end, parse_head, skip_leading_newlines

if TYPE_CHECKING:
    from gup.server.listener import Listener

_READ_BYTES = 4096
"""Heads are short, and memory for more would be taken at every read."""
_TURN_BYTES = 1 << 20
"""The most one connection sends before others have their turn."""
_LINGER_BYTES = 256 * 1024
_RESET = struct.pack("ii", 1, 0)


_READING = Phase.READING


class Connection:
    """States move READING → (WAITING →) (QUEUED →) SENDING → READING …, then (LINGERING →) CLOSED.

    QUEUED: the answer is ready, but it is a download and its turn has not come. Whoever closes its end then
    is taken to be gone, even if it might still read: its place is for those who wait.

    `since` is when the present state last made progress, on the listener's coarse clock: its sweep compares
    it with the timeouts.
    """

    __slots__ = (
        "_asked",
        "_began",
        "_body",
        "_eof",
        "_lingered",
        "_listener",
        "_outgoing",
        "_paced",
        "_pending",
        "_reply",
        "_task",
        "_waits",
        "_watched",
        "account",
        "close_after",
        "fd",
        "pacer",
        "peer",
        "phase",
        "since",
        "sock",
        "turn",
    )

    def __init__(self, listener: "Listener", sock: socket.socket, peer: str, pacer: Pacer | None) -> None:
        self._listener = listener
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.phase = Phase.READING
        self.since = listener.now
        self._pending = bytearray()
        self._eof = False
        self._watched = 0
        self._task: asyncio.Task[None] | None = None
        self.pacer = pacer
        self._paced: asyncio.TimerHandle | None = None
        self._lingered = 0
        self._began = 0.0
        self._asked: Request | None = None
        self._clear()
        self._watch(READ)

    def _clear(self) -> None:
        """Forget the answer that was sent last."""
        self._reply: Reply | None = None
        self._body: Body | None = None
        self._outgoing: Outgoing | None = None
        self.close_after = False
        """Whether it ends with the answer that is being sent."""
        self._waits = False
        self.turn: Turn | None = None
        self.account: Account | None = None

    @property
    def idle(self) -> bool:
        """Whether it may be closed without anybody losing an answer."""
        return self.phase is Phase.READING and not self._pending

    @property
    def head_begun(self) -> bool:
        return self.phase is Phase.READING and bool(self._pending)

    @property
    def stalled(self) -> bool:
        """Whether the client does not take what is offered to it."""
        return self.phase is Phase.SENDING and bool(self._watched & WRITE)

    @property
    def queued(self) -> bool:
        """Whether it waits for its turn to download."""
        return self.phase is Phase.QUEUED

    # --- reading

    def on_ready(self, events: int) -> None:
        """The socket is ready. Errors and hang-ups are told by trying what was wanted of it."""
        if events & ~WRITE and self._watched & READ:
            self._readable()
        if events & ~READ and self._watched & WRITE:
            self._writable()

    def _readable(self) -> None:
        try:
            piece = self.sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not piece:
            self._ended()
        elif self.phase is _READING:
            self._arrived(piece)
        elif self.phase is Phase.LINGERING:
            self._lingered += len(piece)
            if self._lingered > _LINGER_BYTES:
                self.close()
        else:
            self._pending += piece
            if len(self._pending) > LONGEST_HEAD_BYTES:
                self._stop_reading()  # the client waits for answers before it may send more

    def _arrived(self, piece: bytes) -> None:
        """Bytes at a message start, or more of a head that had begun. The hot lane is the first look-up."""
        if not self._pending:
            if self._listener.lane.answer(self, piece):
                return
            self.since = self._listener.now
        self._pending += piece
        self.advance()

    def _ended(self) -> None:
        """The client sends no more; it may still read what it asked for."""
        self._eof = True
        if self.phase in (Phase.READING, Phase.QUEUED, Phase.LINGERING):
            self.close()
        else:
            self._stop_reading()

    def _stop_reading(self) -> None:
        self._watch(self._watched & ~READ)

    def _go_on_reading(self) -> None:
        if not self._eof:
            self._watch(self._watched | READ)

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._listener.poller.watch(self.fd, self, self._watched, events)
            self._watched = events

    def advance(self) -> None:
        """Answer the heads that have arrived, one after the other, as far as that needs no waiting."""
        while self.phase is Phase.READING and self._pending:
            del self._pending[: skip_leading_newlines(self._pending)]
            end = find_head_end(self._pending)
            if end < 0:
                self._check_begun()
                break
            head = bytes(self._pending[:end])
            del self._pending[:end]
            self._answer(head)
        if self.phase is Phase.READING:
            if self._eof:
                self.close()
            else:
                self._go_on_reading()

    def _check_begun(self) -> None:
        """Refuse at once what has no end yet and never can be a head."""
        try:
            check_begun(self._pending)
        except Problem as problem:
            self.refuse(problem)

    def _answer(self, head: bytes) -> None:
        listener = self._listener
        if listener.lane.answer(self, head):
            return
        self._began = listener.loop.time()
        try:
            request = parse_head(head)
        except Problem as problem:
            self.refuse(problem)
            return
        if request.plain and request.keep_alive and request.minor_version == 1:
            row = listener.hot.find_target(request.target)
            if row is not None and request.header("via") is None:
                listener.lane.answer_whole(self, row, listener.accounts.declarations.of(request.headers))
                return
        reply = listener.handler.answer_now(request, head)
        if reply is not None:
            self.send(reply)
            return
        self.phase = Phase.WAITING
        self._asked = request
        answering = listener.handler.answer(request, head, self.peer)
        self._task = listener.loop.create_task(self._answer_later(answering))

    async def _answer_later(self, answer: Coroutine[None, None, Reply]) -> None:
        try:
            reply = await answer
        finally:
            self._task = None
        if self.phase is Phase.WAITING:
            self.send(reply)
            self.advance()
            return
        if reply.body is not None:
            reply.body.leave()
        if reply.turn is not None:
            self._listener.downloads.leave(reply.turn)

    def refuse(self, problem: Problem) -> None:
        """Answer with a problem and close: the framing can't be trusted any more."""
        self.send(self._listener.handler.refusal(problem, close=True))

    # --- sending

    def send(self, reply: Reply) -> None:
        """Send an answer, when its turn has come; the connection reads on when it has left."""
        self._reply = reply
        self._body = reply.body
        self.account = account = reply.account
        if account is not None:
            account.began = self._began
        self.when_due(reply.turn, self._send_reply)

    def _send_reply(self) -> None:
        reply = self._reply
        assert reply is not None
        self._listener.handler.begin(reply, self.peer)
        self.begin(reply.outgoing(self._listener.tally.words))
        self.close_after = reply.close
        self.push()

    def when_due(self, turn: Turn | None, go: Callable[[], None]) -> None:
        """Call `go` now, or when the download's turn comes."""
        self.turn = turn
        if turn is None or turn.come:
            go()
            return

        def due() -> None:
            self.phase = Phase.READING  # what leaves at once has no phase of its own
            go()
            self.advance()

        turn.go = due
        self.phase = Phase.QUEUED

    def turn_away(self) -> None:
        """The service stops and the download has not begun: let the client ask another."""
        self._leave_body()
        self._clear()
        self.refuse(stopping())

    def begin(self, outgoing: Outgoing) -> None:
        """An answer is to leave; `push` sends it."""
        self.phase = Phase.SENDING
        self.since = self._listener.now
        self._body = outgoing.body
        self._outgoing = outgoing

    def push(self, sent_before: int = 0) -> None:
        """Send as much as the socket takes and the body has, at most one turn's worth."""
        budget = _TURN_BYTES if self.pacer is None else self._slice(self.pacer)
        outgoing = self._outgoing
        assert outgoing is not None
        outgoing.sent_bytes += sent_before
        try:
            while budget > 0:
                done = outgoing.push(self.sock, budget)
                if done <= 0:
                    self._stopped(outgoing, done)
                    return
                budget -= done
                self.since = self._listener.now
                if self.pacer is not None:
                    self.pacer.took(done, self._listener.loop.time())
                if outgoing.full:
                    break
            self._go_on_writing()
        except (BlockingIOError, InterruptedError):
            self._want_write(wanted=True)
        except OSError:
            self.close()

    def _stopped(self, outgoing: Outgoing, why: int) -> None:
        """Nothing more leaves for now: the answer has ended, or its body has no more, or never will."""
        if why == FINISHED:
            self.finish()
        elif why == BROKEN:
            self._cut()
        else:
            assert self._body is not None
            self._want_write(wanted=False)
            self._waits = True
            self._body.wait(outgoing.position, self._woken)

    def _slice(self, pacer: Pacer) -> int:
        """How much may leave at this moment."""
        return 0 if pacer.delay_seconds(self._listener.loop.time()) else pacer.slice_bytes

    def _go_on_writing(self) -> None:
        """When the socket takes more; or, paced by ourselves, when what has left is paid for."""
        loop = self._listener.loop
        delay = self.pacer.delay_seconds(loop.time()) if self.pacer is not None else 0.0
        if delay and self._paced is None:
            self._paced = loop.call_later(delay, self._paid)
        self._want_write(wanted=not delay)

    def _paid(self) -> None:
        self._paced = None
        self._writable()

    def _woken(self) -> None:
        self._waits = False
        self._writable()

    def _writable(self) -> None:
        if self.phase is Phase.SENDING:
            self.push()
            self.advance()

    def _want_write(self, *, wanted: bool) -> None:
        self._watch(self._watched | WRITE if wanted else self._watched & ~WRITE)

    def finish(self) -> None:
        """The answer has left: go on with the next request, or end."""
        close = self.close_after or self._listener.draining
        self._tell(complete=True)
        self._want_write(wanted=False)
        self._leave_body()
        self._clear()
        self.since = self._listener.now
        if not close:
            self.phase = Phase.READING
        elif self._eof:
            self.close()
        else:
            self._linger()

    # --- the end

    def _tell(self, *, complete: bool) -> None:
        """Say what became of the answer, once."""
        account, self.account = self.account, None
        if account is not None:
            sent = self._outgoing.sent_bytes if self._outgoing is not None else 0
            self._listener.accounts.end(self.peer, account, sent, complete=complete)

    def _leave_body(self) -> None:
        """Give back what the answer held: its turn, and its place among the body's readers."""
        self.give_turn_back()
        body, self._body = self._body, None
        if body is not None:
            if self._waits:
                body.forget(self._woken)
            body.leave()

    def give_turn_back(self) -> None:
        """The download has left, or never will."""
        turn, self.turn = self.turn, None
        if turn is not None:
            self._listener.downloads.leave(turn)

    def _linger(self) -> None:
        """Let the client read its answer before the connection goes: closing with bytes unread resets it."""
        self.phase = Phase.LINGERING
        self._pending.clear()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self._go_on_reading()

    def _cut(self) -> None:
        """End with a reset: the client must never take a part for the whole."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def close(self) -> None:
        """End now. Whatever was being fetched goes on without this client."""
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        self._tell(complete=False)
        self._watch(0)
        self._leave_body()
        if self._paced is not None:
            self._paced.cancel()
            self._paced = None
        if self._task is not None:
            assert self._asked is not None
            self._task.cancel()
            self._task = None
            self._listener.accounts.left(self.peer, self._asked, self._began)
        self.sock.close()
        self._listener.gone(self)

    def expired(self, now: float) -> bool:
        """Whether the client has used up its time; see Listener's sweep."""
        listen, grace = self._listener.settings.listen, self._listener.pacing.grace_seconds
        allowed = allowed_seconds(
            self.phase, listen, begun=bool(self._pending), stalled=self.stalled, grace_seconds=grace
        )
        return now - self.since > allowed

    def expire(self) -> None:
        """End because time is up: a begun head is told so, a begun answer is cut."""
        if self.head_begun:
            self.refuse(Problem("request-timeout", "the request head took too long to arrive"))
        elif self.phase is Phase.SENDING:
            self._cut()
        else:
            self.close()
