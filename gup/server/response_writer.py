"""Writes one response at a time to a client's socket: its head, then its segments, without waiting."""

import errno
import os
import socket
from dataclasses import dataclass

from gup.cache.body import CUT, Body
from gup.server.ranges import Span
from gup.server.response import Response

WAIT = 0  # the body has no more for now: `body.wait(position, …)` tells when
FINISHED = -1
BROKEN = -2  # the rest will never come: the connection is to be reset
# Errors that reading a file can have and writing to a socket never has.
_DISK_ERRORS = frozenset(
    {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO}
)
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True, eq=False)
class ResponseWriter:
    """One connection's. Counts every body byte in two of `words` at the moment the socket takes it."""

    words: "memoryview[int]"
    position: int = 0
    sent_bytes: int = 0
    full: bool = False  # the socket took less of the body than it was offered: asking again is useless
    _response: Response | None = None
    _segments: tuple[bytes | Span, ...] = ()
    _literal: bytes | memoryview = b""
    _stop: int = 0
    _chunk_left: int = 0

    def start(self, response: Response, body_sent: int = 0) -> None:
        """Write `response` from now on, of whose body so many bytes have left already."""
        self._response, self._segments = response, response.segments
        self._chunk_left = self.position = self._stop = 0
        self.sent_bytes, self.full = body_sent, False
        literal = response.head
        if response.body is None:  # what is literal then is no content, and not counted
            literal += b"".join(segment for segment in response.segments if isinstance(segment, bytes))
            self._segments = ()
        self._literal = memoryview(literal)
        if body_sent:
            self._next_segment(response)
            self.position += body_sent

    def end(self) -> None:
        """Let go of the response."""
        self._response, self._segments = None, ()

    def write(self, sock: socket.socket, most: int) -> int:
        """Send some bytes, at most `most` of the body; returns how many, or WAIT, FINISHED, BROKEN.

        BlockingIOError when the socket takes none, another OSError when the client is gone.
        """
        response = self._response
        assert response is not None
        while True:
            if self._literal:
                return self._write_literal(sock, more=bool(self._segments) or self.position < self._stop)
            if self.position < self._stop:
                assert response.body is not None
                done = self._write_span(sock, response, response.body, min(most, self._stop - self.position))
                end = response.body.end() if not done else None
                if end is None or self.position < end:
                    return done
                self._stop = self.position  # the length was not known at first, and all is here
                if response.chunked:
                    self._literal = memoryview(_LAST_CHUNK)
            elif self._segments:
                self._next_segment(response)
            else:
                return FINISHED

    def _write_literal(self, sock: socket.socket, *, more: bool) -> int:
        done = sock.send(self._literal, socket.MSG_MORE if more else 0)
        self._literal = self._literal[done:]
        return done

    def _write_span(self, sock: socket.socket, response: Response, body: Body, want: int) -> int:
        available = body.available(self.position, want)
        if available <= 0:
            return BROKEN if available == CUT else WAIT
        if response.chunked:
            if self._chunk_left == 0:
                self._chunk_left = available
                self._literal = memoryview(b"%x\r\n" % available)
                return self._write_literal(sock, more=True)
            available = min(available, self._chunk_left)
        try:
            if body.fd >= 0:
                sent = os.sendfile(sock.fileno(), body.fd, self.position, available)
            else:
                sent = sock.send(body.view(self.position, available))
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            sent = 0
        self.full = sent < available
        self._count(response, sent)
        self.position += sent
        if response.chunked:
            self._chunk_left -= sent
            if self._chunk_left == 0:
                self._literal = memoryview(b"\r\n")
        if not sent:  # unreadable, or shorter than it was: what is missing will never come
            body.unreadable()
            return BROKEN
        return sent

    def _next_segment(self, response: Response) -> None:
        segment, self._segments = self._segments[0], self._segments[1:]
        if isinstance(segment, Span):
            self.position, self._stop = segment.start, segment.stop
        else:  # the boundary of a multipart body
            self._literal = memoryview(segment)
            self._count(response, len(segment))

    def _count(self, response: Response, sent: int) -> None:
        self.sent_bytes += sent
        self.words[response.sent_at] += sent
        self.words[response.stream_at] += sent
