"""The rest of one large body, received from its connection straight into buffers that are handed out.

aiohttp copies each byte three times between the socket and its reader. For bodies of many megabytes the
connection is taken over from it (`set_protocol` of asyncio's transports); it is closed after the body.
"""

import asyncio
import contextlib

Piece = bytes | memoryview

BUFFER_BYTES = 1 << 20
_MOST_BUFFERS = 6
"""Kept for reuse: new memory costs more than the copies that are saved."""


class Receiver(asyncio.BufferedProtocol):
    """Receives `rest` bytes, and one more to tell whether the upstream sends too many.

    Reading pauses while a buffer is full of bytes that nobody has taken. A buffer is used again only when
    nothing refers to a piece of it any more, so a piece is good for as long as it is kept.
    """

    def __init__(self, transport: asyncio.Transport, rest: int) -> None:
        self._transport = transport
        self._before = transport.get_protocol()
        self._missing = rest
        self._buffers: list[bytearray] = []
        self._view = memoryview(b"")
        self._filled = self._taken = 0
        self._paused = False
        self._error: Exception | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._begin_buffer()
        transport.set_protocol(self)

    @property
    def at_end(self) -> bool:
        """Whether there is nothing to take, and never will be."""
        return self._taken == self._filled and (self._missing <= 0 or self._ended)

    def take(self, most: int) -> memoryview:
        """What has come, at most `most` bytes; empty if nothing. Raises the error of a broken connection."""
        if self._taken == self._filled and self._missing > 0 and self._error is not None:
            raise self._error
        piece = self._view[self._taken : min(self._filled, self._taken + most)]
        self._taken += len(piece)
        if self._taken == len(self._view):
            self._begin_buffer()
        if self._paused and self._filled < len(self._view):
            self._paused = False
            self._transport.resume_reading()
        return piece

    async def wait(self) -> None:
        """Until there is something to take, or the end."""
        while self._taken == self._filled and not self.at_end and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _begin_buffer(self) -> None:
        self._view.release()
        buffer = next(filter(_is_unused, self._buffers), None)
        if buffer is None:
            buffer = bytearray(BUFFER_BYTES)
            if len(self._buffers) < _MOST_BUFFERS:
                self._buffers.append(buffer)
        self._view = memoryview(buffer)
        self._filled = self._taken = 0

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- called by the transport

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._view[self._filled : self._filled + max(self._missing, 0) + 1]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        self._missing -= nbytes
        if self._missing <= 0 or self._filled == len(self._view):
            self._paused = self._missing > 0
            with contextlib.suppress(RuntimeError):  # closing
                self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._error = exc or ConnectionResetError("the connection ended in mid-body")
        self._ended = exc is None
        self._wake()
        self._before.connection_lost(exc)  # aiohttp waits for it


def _is_unused(buffer: bytearray) -> bool:
    """Whether nothing refers to its bytes: only then can its size be changed."""
    try:
        last = buffer.pop()
    except BufferError:
        return False
    buffer.append(last)
    return True
