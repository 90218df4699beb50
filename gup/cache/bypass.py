"""A body, or a span of one, passed from upstream to a single client without being stored."""

import asyncio
from collections import deque
from collections.abc import Callable

from gup.cache.body import CUT, Callback
from gup.cache.part import WITHHELD_BYTES, ZIP_TAIL_BYTES
from gup.cache.record import Head
from gup.upstream.exchange import UpstreamFailure
from gup.upstream.session import Answer

WINDOW_BYTES = 256 * 1024
"""The most that is held between upstream and the client."""


class BypassBody:
    """Bytes `start` to `stop` of a body, read once and in order.

    `ends_right` tells of a whole body's last 64 KiB whether it may be so; until then its last 4 KiB are
    withheld, as those of a body that is stored are.

    Its own task reads upstream, and pauses while the window is full; the reader's `available` frees what
    lies before the offset it asks for.
    """

    source = "bypass"
    fd = -1

    def __init__(
        self,
        head: Head,
        answer: Answer,
        stop: int | None,
        done: Callable[[], None],
        ends_right: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.head = head
        self._answer = answer
        self._stop = stop
        self._done = done
        self._pieces: deque[bytes] = deque()
        self._base = answer.head.start
        """Offset of the first byte of `_pieces`."""
        self._position = self._base
        self._held = 0
        self._ends_right = ends_right
        self._withheld = 0 if ends_right is None else WITHHELD_BYTES
        self._ended = False
        self._failed = False
        self._room = asyncio.Event()
        self._waiting: Callback | None = None
        self._task = asyncio.get_running_loop().create_task(self._pump())

    def end(self) -> int | None:
        if self._stop is not None:
            return self._stop
        if self.head.length is not None:
            return self.head.length
        return self._base + self._held if self._ended else None

    def available(self, offset: int, want: int) -> int:
        self._free_before(offset)
        self._position = offset
        self._room.set()
        sure = self._base + self._held - self._withheld
        if self._pieces and offset < sure:
            return min(want, sure - offset, len(self._pieces[0]) - (offset - self._base))
        return CUT if self._failed else 0

    def view(self, offset: int, length: int) -> memoryview:
        at = offset - self._base
        return memoryview(self._pieces[0])[at : at + length]

    def wait(self, offset: int, callback: Callback) -> None:  # noqa: ARG002 - one reader, in order
        self._waiting = callback

    def forget(self, callback: Callback) -> None:  # noqa: ARG002 - there is one reader only
        self._waiting = None

    def leave(self) -> None:
        """The client is gone or served: nobody else wants these bytes."""
        self._task.cancel()

    def unreadable(self) -> None:
        """Nothing: it never touches the disk."""

    def _free_before(self, offset: int) -> None:
        while self._pieces and self._base + len(self._pieces[0]) <= offset:
            gone = len(self._pieces.popleft())
            self._base += gone
            self._held -= gone

    async def _pump(self) -> None:
        try:
            expected = self._expected()
            received, tail = 0, bytearray()
            while piece := await self._answer.read():
                received += len(piece)
                if expected is not None and received > expected:
                    self._failed = True
                    return
                if self._ends_right is not None:
                    tail = (tail + piece)[-ZIP_TAIL_BYTES:]
                self._pieces.append(piece)
                self._held += len(piece)
                self._wake()
                while self._base + self._held - self._position >= WINDOW_BYTES + self._withheld:
                    self._room.clear()
                    await self._room.wait()
            right = received == (expected or received)
            if right and (self._ends_right is None or self._ends_right(bytes(tail))):
                self._withheld = 0  # of an end that nobody knows, too: all that came is for the client
                self._ended = expected is not None or self._answer.confirmed
            self._failed = not self._ended
        except UpstreamFailure:
            self._failed = True
        finally:
            self._answer.close()
            self._done()
            self._wake()

    def _expected(self) -> int | None:
        end = self._stop if self._stop is not None else self.head.length
        return None if end is None else end - self._answer.head.start

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()
