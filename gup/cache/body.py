"""A body as a connection reads it, and a growing one."""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from gup.cache.records import Head
from gup.cache.store import OpenFile
from gup.phases import FillClock

CUT = -1
"""Returned by `available` when the rest will never come: cut the connection."""

Callback = Callable[[], None]


class Body(Protocol):
    """A body, complete or growing. Offsets and lengths are in bytes."""

    @property
    def head(self) -> Head: ...

    @property
    def source(self) -> str:
        """Label `source` of gup_client_sent_bytes_total."""

    @property
    def times(self) -> FillClock | str:
        """What a reader waits for that waits for more: a fill, or the name of a phase."""

    @property
    def fd(self) -> int:
        """-1 when the bytes are available from `view` only."""

    def available(self, offset: int, want: int) -> int:
        """How many bytes from `offset` on can be sent now without blocking; 0: wait; CUT: never."""

    def view(self, offset: int, length: int) -> memoryview: ...

    def wait(self, offset: int, callback: Callback) -> None:
        """Call back once `available` may return something else for `offset`."""

    def forget(self, callback: Callback) -> None:
        """Cancel a `wait`."""

    def end(self) -> int | None:
        """The length, once it is certain."""

    def leave(self) -> None:
        """A reader is done. Each calls it once."""

    def unreadable(self) -> None:
        """Reading the body raised a disk error: this reader is being cut."""


async def read_whole(body: Body, most: int) -> bytes:
    """At most `most` bytes, fewer if the body breaks off; for use in this process."""
    got = bytearray()
    while len(got) < min(most, body.end() or most):
        amount = body.available(len(got), most - len(got))
        if amount > 0:
            got += body.view(len(got), amount)
            continue
        if amount == CUT:
            break
        woken = asyncio.Event()
        body.wait(len(got), woken.set)
        await woken.wait()
    return bytes(got)


_WINDOW_SECONDS = 4.0
_STEP_SECONDS = 0.5
"""Time between two marks: with the window, it bounds their number."""
_WAKE_SECONDS = 0.025
_WAKE_BYTES = 64 * 1024
_WAKE_AT_ONCE_BYTES = 256 * 1024
"""For each waiter."""
_WAKE_AT_LATEST_SECONDS = 0.2


class Pace:
    """The present rate of a growing body: the mean over its whole life would be wrong for minutes after a
    link has become slow. Times are monotonic.
    """

    __slots__ = ("_came_at", "_marks", "began_at")

    def __init__(self, now: float) -> None:
        self.began_at = self._came_at = now
        self._marks = deque([(now, 0)])

    def begin_with(self, size: int, now: float) -> None:
        """`size` bytes were there before, which says nothing about the rate."""
        self._came_at = now
        self._marks = deque([(now, size)])

    def came(self, size: int, now: float) -> None:
        self._came_at = now
        if now - self._marks[-1][0] >= _STEP_SECONDS:
            self._marks.append((now, size))
            while len(self._marks) > 1 and self._marks[1][0] <= now - _WINDOW_SECONDS:
                self._marks.popleft()

    def seconds_for(self, missing: int, size: int, now: float) -> float:
        """Estimated time for `missing` bytes beyond `size`; at least the time since the last bytes came."""
        if missing <= 0:
            return 0.0
        since, size_then = self._marks[0]
        gained = size - size_then
        return max(missing * (now - since) / gained if gained > 0 else 0.0, now - self._came_at)


class GrowingBody:
    """A body that is being written, and read by many connections (a Body).

    Only its fill, leader or follower, calls the methods below `growing`. Waiters run at once at the first
    published byte, at the end, and when 256 KiB more have come for each of them; else at most every 25 ms and
    only for 64 KiB more (or after 200 ms): a thousand waiters would otherwise use up the cores.
    """

    def __init__(self, head: Head, generation: int, file: OpenFile | None, now: float) -> None:
        """`now` is monotonic."""
        self.head = head
        self.generation = generation
        self.file = file
        self.in_memory = False
        self.published = 0
        self.failed = False
        self.readers = 0
        self.count_readers: Callable[[int], None] | None = None
        """Called with the change of the number of readers."""
        self.times: FillClock | str = "receiving"
        self._length: int | None = None
        self._waiting: dict[Callback, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._woken_at = 0.0
        self._woken_bytes = 0
        self._pace = Pace(now)

    # --- reading

    def reader(self) -> "GrowingBody":
        """Count one more reader; it calls `leave` when it is done."""
        self._change_readers(1)
        return self

    def leave(self) -> None:
        self._change_readers(-1)

    def _change_readers(self, change: int) -> None:
        self.readers += change
        if self.count_readers is not None:
            self.count_readers(change)

    @property
    def source(self) -> str:
        return "bypass" if self.in_memory else "fill"

    @property
    def fd(self) -> int:
        assert self.file is not None
        return self.file.fd

    def seconds_to(self, offset: int, now: float) -> float:
        return self._pace.seconds_for(offset - self.published, self.published, now)

    def age_seconds(self, now: float) -> float:
        return now - self._pace.began_at

    @property
    def ended(self) -> bool:
        return self.failed or self._length is not None

    def end(self) -> int | None:
        return self._length if self._length is not None else self.head.length

    def available(self, offset: int, want: int) -> int:
        if offset >= self.published or self.file is None:  # not arrived, held back, or revoked
            return CUT if self.failed else 0
        return min(want, self.published - offset)

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.fd, length, offset))

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    def unreadable(self) -> None:
        """The fill meets the error itself when it reads."""

    # --- growing

    def publish(self, size: int) -> None:
        """The first `size` bytes can be read."""
        if size <= self.published:
            return
        first, now = self.published == 0, time.monotonic()
        if first and size > _WAKE_BYTES:
            self._pace.begin_with(size, now)
        else:
            self._pace.came(size, now)
        self.published = size
        enough = size - self._woken_bytes >= _WAKE_AT_ONCE_BYTES * len(self._waiting) > 0
        if first or enough or size == self.head.length:
            self.wake()
        elif self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def hold_back(self) -> None:
        """The disk refused a write: readers pause until the file's bytes are verified and in memory."""
        self.file = None

    def go_on_in(self, file: OpenFile) -> None:
        """`file`, a memory file, now has all that is published."""
        self.file = file
        self.in_memory = True
        self.wake()

    def revoke(self) -> None:
        """Its memory is needed: remaining readers are cut."""
        self.file = None
        self.failed = True
        self.wake()

    def complete(self, length: int) -> None:
        """The whole body has arrived and is verified."""
        self.publish(length)
        assert self.published == length
        if self._length is None:
            self._length = length
            self.wake()

    def fail(self) -> None:
        if not self.ended:
            self.failed = True
            self.wake()

    def _tick(self) -> None:
        self._timer = None
        due = time.monotonic() - self._woken_at >= _WAKE_AT_LATEST_SECONDS
        if due or self.published - self._woken_bytes >= _WAKE_BYTES:
            self.wake()
        elif self._waiting and self.published > self._woken_bytes:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken_at = time.monotonic()
        self._woken_bytes = self.published
        for callback in [c for c, at in self._waiting.items() if at < self.published or self.ended]:
            self._waiting.pop(callback, None)
            callback()
