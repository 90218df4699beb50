"""The hot lane: what is ready-made is answered in the callback that read the request; decides nothing.

All that a warm hit costs stands here, in order (times: six fields, 4 KiB, two workers; the two system calls
are most of the rest):

1. One `recv` has brought these bytes, and nothing of a request was pending before them.
2. They are looked up as they are (0.2 µs). The table has only whole heads that the parser took before as
   plain GETs, so that bytes found there need no second look: same bytes, same decision.
3. Second chance, for heads that differ from client to client: one regular expression that takes only what is
   plain beyond doubt finds the target, and perhaps a range (1.1 µs). The target is looked up.
4. A small body leaves together with its head, by one `send` of bytes that were put together once this second.
   A larger one: the head with MSG_MORE, then `sendfile`, which copies nothing.
5. What the socket does not take at once goes on as any other answer does.

Downloads (large bodies) wait for their turn first; paced connections send slice by slice. The table's rows
are dropped when rules or settings change, and closed when their files are unlinked: see gup.server.hot.
"""

import os
import socket
from typing import TYPE_CHECKING

from gup.errors import Problem
from gup.server.hot import HotRow, HotTable
from gup.server.plain import PLAIN_HEAD
from gup.server.ranges import Span

if TYPE_CHECKING:
    from gup.server.connection import Connection
    from gup.server.listener import Listener

_recognised = PLAIN_HEAD.fullmatch
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
            self.answer_whole(connection, row)
            return True
        plain = _recognised(head)
        if plain is None:
            return False
        target, *positions = plain.groups()
        row = self._hot.find_target(target)
        if row is None:
            return False
        if positions == _NO_RANGE:
            self.answer_whole(connection, row)
            return True
        return self._answer_part(connection, row, *positions)

    def _answer_part(
        self,
        connection: "Connection",
        row: HotRow,
        first: bytes | None,
        last: bytes | None,
        other_first: bytes | None,
        other_last: bytes | None,
    ) -> bool:
        """One range that can be satisfied, before Host or after it; False for any other: it is parsed."""
        if first is not None and other_first is not None:
            return False
        start, end = int(first or other_first or 0), int(last or other_last or 0)
        stop = min(end + 1, row.length)
        if start >= stop:
            return False
        self._when_due(connection, row, row.part_hit_at, start, stop)
        return True

    def answer_whole(self, connection: "Connection", row: HotRow) -> None:
        """Head and body."""
        listener = self._listener
        date = listener.date
        if connection.pacer is None:
            message = row.ready
            if row.ready_of is not date:
                message = self._hot.make_ready(row, date, listener.wall_now)
            if message is not None:
                self._send_ready(connection, row, message)
                return
        self._when_due(connection, row, row.hit_at, 0, row.length)

    def _send_ready(self, connection: "Connection", row: HotRow, message: bytes) -> None:
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
        self._words[row.sent_at] += body_sent
        self._words[row.stream_at] += body_sent
        if sent < len(message):
            rest = Span(body_sent, row.length)
            connection.begin(message[sent:body_at], (rest,), row.entry, row.sent_at, row.stream_at)
            connection.push()

    def _when_due(
        self, connection: "Connection", row: HotRow, counted_at: int, start: int, stop: int
    ) -> None:
        """Send bytes `start` to `stop` now, or, of a download, when its turn comes."""
        if not row.download:
            self._send_span(connection, row, counted_at, start, stop)
            return

        def go() -> None:
            self._send_span(connection, row, counted_at, start, stop)

        listener = self._listener
        try:
            turn = listener.downloads.ask()
        except Problem as problem:
            connection.send(listener.handler.refusal(problem, keep_alive=True))
            return
        connection.when_due(turn, go)

    def _send_span(
        self, connection: "Connection", row: HotRow, counted_at: int, start: int, stop: int
    ) -> None:
        listener = self._listener
        if counted_at == row.hit_at:
            head = row.head(listener.date, listener.wall_now)
        else:
            head = row.part_head(listener.date, listener.wall_now, start, stop)
        self._count_hit(connection, row, counted_at)
        if connection.pacer is None and row.at_hand(start, stop, listener.now):
            try:
                head, start = self._send_at_once(connection, row, head, start, stop)
            except OSError:
                connection.close()
                return
            if start == stop:
                if row.download:
                    connection.finish()  # gives its turn back
                return
        connection.begin(head, (Span(start, stop),), row.entry, row.sent_at, row.stream_at)
        connection.push()

    def _send_at_once(
        self, connection: "Connection", row: HotRow, head: bytes, start: int, stop: int
    ) -> tuple[bytes, int]:
        """What of head and span the socket does not take at once. OSError: the client is gone."""
        try:
            sent = connection.sock.send(head, socket.MSG_MORE)
        except (BlockingIOError, InterruptedError):
            return head, start
        if sent < len(head):
            return head[sent:], start
        try:
            sent = os.sendfile(connection.fd, row.entry.fd, start, stop - start)
        except OSError:  # the socket is full, or the disk fails: the next try, in `push`, tells
            sent = 0
        self._words[row.sent_at] += sent
        self._words[row.stream_at] += sent
        return b"", start + sent

    def _count_hit(self, connection: "Connection", row: HotRow, at: int) -> None:
        listener = self._listener
        self._words[at] += 1
        uses = listener.tally.uses
        uses[row.key_text] = uses.get(row.key_text, 0) + 1
        connection.since = listener.now
