"""Writes one response at a time to a client's socket: its head, then its segments, without waiting."""

import errno
import os
import socket

from gup.cache.body import CUT, Body
from gup.server.ranges import Span
from gup.server.response import Response

WAIT = 0
"""The body has no more for now: `body.wait(position, …)` tells when."""
FINISHED = -1
BROKEN = -2
"""The rest will never come: the connection is to be reset."""
_DISK_ERRORS = frozenset(
    {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO}
)
"""Errors that reading a file can have and writing to a socket never has."""
_LAST_CHUNK = b"0\r\n\r\n"


class ResponseWriter:
    """One connection's. Counts every body byte in two of `words` at the moment the socket takes it."""

    __slots__ = (
        "_body",
        "_chunk_left",
        "_chunked",
        "_literal",
        "_segments",
        "_sent_at",
        "_stop",
        "_stream_at",
        "_words",
        "full",
        "position",
        "sent_bytes",
    )

    def __init__(self, words: "memoryview[int]") -> None:
        self._words = words
        self._body: Body | None = None

    def start(self, response: Response, body_sent: int = 0) -> None:
        """Write `response` from now on, of whose body so many bytes have left already."""
        self._body = body = response.body
        self._segments = response.segments
        self._sent_at, self._stream_at = response.sent_at, response.stream_at
        self._chunked = response.chunked
        self._chunk_left = 0
        self.sent_bytes = body_sent
        self.position = self._stop = 0
        self.full = False
        """Whether the socket took less of the body than it was offered: asking again at once is useless."""
        literal = response.head
        if body is None:
            literal += b"".join(segment for segment in response.segments if isinstance(segment, bytes))
            self._segments = ()
        self._literal = memoryview(literal)
        if body_sent:
            self._next_segment()
            self.position += body_sent

    def end(self) -> None:
        """Let go of the body."""
        self._body = None
        self._segments = ()

    def write(self, sock: socket.socket, most: int) -> int:
        """Send some bytes, at most `most` of the body; returns how many, or WAIT, FINISHED, BROKEN.

        BlockingIOError when the socket takes none, another OSError when the client is gone.
        """
        while True:
            if self._literal:
                more = self._segments or self.position < self._stop
                done = sock.send(self._literal, socket.MSG_MORE if more else 0)
                self._literal = self._literal[done:]
                return done
            if self.position < self._stop:
                done = self._write_span(sock, min(most, self._stop - self.position))
                if done or not self._at_end():
                    return done
                self._stop = self.position
                if self._chunked:
                    self._literal = memoryview(_LAST_CHUNK)
            elif not self._segments:
                return FINISHED
            else:
                self._next_segment()

    def _at_end(self) -> bool:
        """Whether a body whose length was not known at first has turned out to end here."""
        end = self._body.end() if self._body is not None else None
        return end is not None and self.position >= end

    def _write_span(self, sock: socket.socket, want: int) -> int:
        body = self._body
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
        sent = self._send(sock, body, available)
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
        """Returns how much was sent; 0 when the body's file can't be read."""
        try:
            if body.fd >= 0:
                return os.sendfile(sock.fileno(), body.fd, self.position, amount)
            piece = body.view(self.position, amount)
            return sock.send(piece) if piece else 0
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                return 0
            raise

    def _next_segment(self) -> None:
        segment, self._segments = self._segments[0], self._segments[1:]
        if isinstance(segment, Span):
            self.position, self._stop = segment.start, segment.stop
        else:  # the boundary of a multipart body
            self._literal = memoryview(segment)
            self._count(len(segment))

    def _count(self, sent: int) -> None:
        self.sent_bytes += sent
        self._words[self._sent_at] += sent
        self._words[self._stream_at] += sent
