"""The hot lane: what is ready-made is answered in the callback that read the request; decides nothing.

All that a warm hit costs stands here, in order (times: six fields, 4 KiB, two workers; the two system calls
are most of the rest):

1. One `recv` has brought these bytes, and nothing of a request was pending before them.
2. They are looked up as they are (0.2 µs). The table has only whole heads that the parser took before as
   plain GETs, so that bytes found there need no second look: same bytes, same decision.
3. Second chance, for heads that differ from client to client: one regular expression that takes only what is
   plain beyond doubt finds the target, and perhaps a range (1.1 µs). The target is looked up.
4. A small body leaves together with its head, by one `send` of bytes that were put together once this second.
   A larger one: the head with MSG_MORE, then `sendfile`, which copies nothing; one over 2 MiB passes through
   a buffer, which is received faster (docs/performance.md).
5. What the socket does not take at once goes on as any other answer does.
6. A head that asks for the connection's end, else plain: the same for few bytes, and the socket is closed.

Downloads (large bodies) wait for their turn first; paced connections send slice by slice. The table's rows
are dropped when rules or settings change, and closed when their files are unlinked: see gup.server.hot.
"""

import os
import socket
from functools import partial
from typing import TYPE_CHECKING

from gup.errors import Problem
from gup.server.accounts import Teller
from gup.server.hot import HotRow, HotTable
from gup.server.outgoing import Outgoing
from gup.server.plain import PLAIN_HEAD, without_close
from gup.server.ranges import Span

if TYPE_CHECKING:
    from gup.server.connection import Connection
    from gup.server.listener import Listener

_recognised = PLAIN_HEAD.fullmatch
_CRLF = b"\r\n"
_NO_RANGE = [None] * 4


class Lane:
    """Answers connections of one worker from its hot table."""

    def __init__(self, hot: HotTable, listener: "Listener") -> None:
        self._hot = hot
        self._listener = listener
        self._words = listener.tally.words

    def answer(self, connection: "Connection", head: bytes) -> bool:
        """Answer a whole head, or bytes that may be one; False: nothing was done."""
        row = self._hot.find(head)
        if row is not None:
            self.answer_whole(connection, row, row.stated)
            return True
        plain = _recognised(head)
        if plain is None:
            return self._answer_last(connection, head)
        target, *positions = plain.groups()
        row = self._hot.find_target(target)
        if row is None:
            return False
        if positions == _NO_RANGE:
            self.answer_whole(connection, row, head)
            return True
        span = _span(row, *positions)
        if span is None:
            return False
        self._when_due(connection, row, 206, span, head)
        return True

    def answer_whole(self, connection: "Connection", row: HotRow, teller: Teller) -> None:
        """Head and body. `teller` tells whom it is for, in reports and log."""
        if row.few and connection.pacer is None:
            listener = self._listener
            date = listener.date
            message = row.ready
            if row.ready_of is not date:
                message = self._hot.make_ready(row, date, listener.wall_now)
            if message is not None:
                self._send_ready(connection, row, message, teller)
                return
        self._when_due(connection, row, 200, row.whole, teller)

    def _answer_last(self, connection: "Connection", head: bytes) -> bool:
        """Answer a plain head that asks for few bytes, and for the connection's end after them."""
        rest = without_close(head)
        plain = _recognised(rest) if rest is not None else None
        if plain is None or connection.pacer is not None:
            return False
        target, *positions = plain.groups()
        row = self._hot.find_target(target) if positions == _NO_RANGE else None
        message = self._ready(row) if row is not None and row.few else None
        if row is None or message is None:
            return False
        connection.close_after = True
        at = len(message) - row.length - len(_CRLF)
        self._send_ready(connection, row, b"%bConnection: close\r\n%b" % (message[:at], message[at:]), head)
        return True

    def _ready(self, row: HotRow) -> bytes | None:
        """Head and body of few bytes; None when they are not at hand."""
        listener = self._listener
        if row.ready_of is listener.date:
            return row.ready
        return self._hot.make_ready(row, listener.date, listener.wall_now)

    def _send_ready(self, connection: "Connection", row: HotRow, message: bytes, teller: Teller) -> None:
        words, accounts = self._words, self._listener.accounts
        logged = (words[row.hit_at] + 1) % accounts.every == accounts.first
        began = accounts.clock() if logged else 0.0
        try:
            sent = connection.sock.send(message)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            connection.close()
            return
        self._count_hit(connection, row, row.hit_at)
        body_at = len(message) - row.length
        body_sent = max(0, sent - body_at)
        words[row.sent_at] += body_sent
        words[row.stream_at] += body_sent
        if sent == len(message):
            accounts.taken(connection.peer, row, teller)
            if logged:
                accounts.log_hot(connection.peer, accounts.of_row(row, 200, row.whole, teller, began))
            if connection.close_after:  # nothing that came is unread, so this resets nothing
                connection.close()
            return
        head = message[sent:body_at]
        self._go_on(connection, row, 200, head, row.whole, body_sent, teller, accounts.clock())

    def _go_on(
        self,
        connection: "Connection",
        row: HotRow,
        status: int,
        head: bytes,
        span: Span,
        sent: int,
        teller: Teller,
        began: float,
    ) -> None:
        """Leave the rest, of which the socket took `sent` bytes at once, to the connection."""
        connection.account = self._listener.accounts.of_row(row, status, span, teller, began)
        rest = Span(span.start + sent, span.stop)
        connection.begin(Outgoing(self._words, head, (rest,), row.entry, row.sent_at, row.stream_at))
        connection.push(sent)

    def _when_due(
        self, connection: "Connection", row: HotRow, status: int, span: Span, teller: Teller
    ) -> None:
        """Send the span now, or, of a download, when its turn comes."""
        listener = self._listener
        began = listener.accounts.clock()
        if row.download:
            try:
                turn = listener.downloads.ask()
            except Problem as problem:
                connection.send(listener.handler.refusal(problem, keep_alive=True))
                return
            if not turn.come:
                connection.when_due(
                    turn, partial(self._send_span, connection, row, status, span, teller, began)
                )
                return
            connection.turn = turn
        self._send_span(connection, row, status, span, teller, began)

    def _send_span(
        self,
        connection: "Connection",
        row: HotRow,
        status: int,
        span: Span,
        teller: Teller,
        began: float,
    ) -> None:
        listener = self._listener
        if status == 200:
            head, counted_at = row.head(listener.date, listener.wall_now), row.hit_at
        else:
            head = row.part_head(listener.date, listener.wall_now, span.start, span.stop)
            counted_at = row.part_hit_at
        self._count_hit(connection, row, counted_at)
        sent = 0
        if connection.pacer is None and row.at_hand(span.start, span.stop, listener.now):
            try:
                head, sent = self._send_at_once(connection, row, head, span)
            except OSError:
                connection.close()
                return
            if sent == span.stop - span.start:
                self._has_left(connection, row, status, counted_at, span, teller, began)
                return
        self._go_on(connection, row, status, head, span, sent, teller, began)

    def _has_left(
        self,
        connection: "Connection",
        row: HotRow,
        status: int,
        counted_at: int,
        span: Span,
        teller: Teller,
        began: float,
    ) -> None:
        """All of it has left at once."""
        accounts = self._listener.accounts
        if status == 200:
            accounts.taken(connection.peer, row, teller)
        else:
            accounts.part_taken(connection.peer, row, span, teller)
        if self._words[counted_at] % accounts.every == accounts.first:
            account = accounts.of_row(row, status, span, teller, began)
            accounts.log_hot(connection.peer, account)
        if row.download:
            connection.give_turn_back()

    def _send_at_once(
        self, connection: "Connection", row: HotRow, head: bytes, span: Span
    ) -> tuple[bytes, int]:
        """What of the head the socket does not take at once, and how much of the span it does.

        OSError: the client is gone.
        """
        try:
            sent = connection.sock.send(head, socket.MSG_MORE)
        except (BlockingIOError, InterruptedError):
            return head, 0
        if sent < len(head):
            return head[sent:], 0
        try:
            sent = os.sendfile(connection.fd, row.entry.fd, span.start, span.stop - span.start)
        except OSError:  # the socket is full, or the disk fails: the next try, in `push`, tells
            sent = 0
        self._words[row.sent_at] += sent
        self._words[row.stream_at] += sent
        return b"", sent

    def _count_hit(self, connection: "Connection", row: HotRow, at: int) -> None:
        listener = self._listener
        self._words[at] += 1
        uses = listener.tally.uses
        uses[row.key_text] = uses.get(row.key_text, 0) + 1
        if row.full:
            listener.tally.took_full(connection.peer, row.key_text)
        connection.since = listener.now


def _span(
    row: HotRow,
    first: bytes | None,
    last: bytes | None,
    other_first: bytes | None,
    other_last: bytes | None,
) -> Span | None:
    """One range that can be satisfied, before Host or after it; None for any other: it is parsed."""
    if first is not None and other_first is not None:
        return None
    start, end = int(first or other_first or 0), int(last or other_last or 0)
    stop = min(end + 1, row.length)
    return Span(start, stop) if start < stop else None
