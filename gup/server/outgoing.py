"""What of one answer is still to leave: literal bytes and spans of a body, in order; it never waits."""

import errno
import os
import socket

from gup.cache.body import CUT, Body
from gup.server.ranges import Span

WAIT = 0
"""The body has no more for now: `body.wait(position, …)` tells when."""
FINISHED = -1
BROKEN = -2
"""The rest will never come: the connection is to be cut."""
_DISK_ERRORS = frozenset(
    {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO}
)
"""In what a read from a file can end, and a write to a socket never does."""
_LAST_CHUNK = b"0\r\n\r\n"
_COPY = memoryview(bytearray(256 * 1024))
"""What is copied passes through here, a piece at a time: it stays in the processor's cache."""
_LEAST_COPIED_BYTES = 16 * 1024


class Outgoing:
    """One answer on its way. Counts every body byte in two of `words` at the moment it leaves.

    Moved by `push` alone; `body` is the connection's to leave.
    """

    __slots__ = (
        "_chunk_left",
        "_chunked",
        "_copied_at_once",
        "_literal",
        "_segments",
        "_sent_at",
        "_stop",
        "_stream_at",
        "_words",
        "body",
        "full",
        "position",
        "sent_bytes",
    )

    def __init__(
        self,
        words: "memoryview[int]",
        head: bytes,
        segments: tuple[bytes | Span, ...],
        body: Body | None,
        sent_at: int,
        stream_at: int,
        *,
        chunked: bool = False,
    ) -> None:
        self.body = body
        self.position = 0
        self.sent_bytes = 0
        self.full = False
        """Whether the socket took less of the body than it was offered: asking again at once is in vain."""
        self._words = words
        self._literal = memoryview(head)
        self._segments = segments
        self._sent_at = sent_at
        self._stream_at = stream_at
        self._stop = 0
        self._chunked = chunked
        self._chunk_left = 0
        self._copied_at_once = len(_COPY)
        """Twice what the socket took last, at most: a slow client is not copied for in vain."""

    def push(self, sock: socket.socket, most: int) -> int:
        """Send some bytes, at most `most` of the body; how many, or WAIT, FINISHED, BROKEN.

        BlockingIOError when the socket takes none, another OSError when the client is gone.
        """
        while True:
            if self._literal:
                more = self._segments or self.position < self._stop
                done = sock.send(self._literal, socket.MSG_MORE if more else 0)
                self._literal = self._literal[done:]
                return done
            if self.position < self._stop:
                done = self._push_span(sock, min(most, self._stop - self.position))
                if done or not self._at_end():
                    return done
                self._stop = self.position
                if self._chunked:
                    self._literal = memoryview(_LAST_CHUNK)
            elif not self._next_segment():
                return FINISHED

    def _at_end(self) -> bool:
        """Whether a body whose length was not known at first has turned out to end here."""
        end = self.body.end() if self.body is not None else None
        return end is not None and self.position >= end

    def _push_span(self, sock: socket.socket, want: int) -> int:
        body = self.body
        assert body is not None
        available = body.available(self.position, want)
        if available <= 0:
            return BROKEN if available == CUT else WAIT
        if self._chunked:
            if self._chunk_left == 0:
                self._chunk_left = available
                self._literal = memoryview(b"%x\r\n" % available)
                done = sock.send(self._literal, socket.MSG_MORE)
                self._literal = self._literal[done:]
                return done
            available = min(available, self._chunk_left)
        if body.copied:
            available = min(available, self._copied_at_once)
        sent = self._send(sock, body, available)
        if body.copied:
            self._copied_at_once = min(max(2 * sent, _LEAST_COPIED_BYTES), len(_COPY))
        self.full = sent < available
        self._count(sent)
        self.position += sent
        if self._chunked:
            self._chunk_left -= sent
            if self._chunk_left == 0:
                self._literal = memoryview(b"\r\n")
        if not sent:  # unreadable, or shorter than it was: what is missing will never come
            body.unreadable()
            return BROKEN
        return sent

    def _send(self, sock: socket.socket, body: Body, amount: int) -> int:
        """How much was sent; 0 when the body's file can't be read."""
        try:
            if body.fd < 0:
                piece = body.view(self.position, amount)
            elif body.copied:
                piece = _COPY[: os.preadv(body.fd, [_COPY[:amount]], self.position)]
            else:
                return os.sendfile(sock.fileno(), body.fd, self.position, amount)
            return sock.send(piece) if piece else 0
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                return 0
            raise

    def _next_segment(self) -> bool:
        if not self._segments:
            return False
        segment, self._segments = self._segments[0], self._segments[1:]
        if isinstance(segment, Span):
            self.position, self._stop = segment.start, segment.stop
        else:
            self._literal = memoryview(segment)
            if self.body is not None:  # boundaries of a multipart body; a problem's text is not content
                self._count(len(segment))
        return True

    def _count(self, sent: int) -> None:
        self.sent_bytes += sent
        self._words[self._sent_at] += sent
        self._words[self._stream_at] += sent
