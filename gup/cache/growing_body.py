"""Bodies that are still arriving, and their readers."""

import asyncio
import os
import time
from collections import deque

from gup.cache.body import CUT, Callback
from gup.cache.records import Head
from gup.cache.store import OpenFile

_WINDOW_SECONDS = 4.0
_STEP_SECONDS = 0.5
"""Between two marks: with the window, what bounds their number."""


class Pace:
    """How fast a body grows at present. Times are on the monotonic clock and never go back.

    The mean over its whole life would be wrong for minutes after a link has become slow.
    """

    __slots__ = ("_came_at", "_marks", "began_at")

    def __init__(self, now: float) -> None:
        self.began_at = self._came_at = now
        self._marks = deque([(now, 0)])

    def begin_with(self, size: int, now: float) -> None:
        """The first `size` bytes were there before, which tells nothing of the rate."""
        self._came_at = now
        self._marks = deque([(now, size)])

    def came(self, size: int, now: float) -> None:
        """The body has `size` bytes by now."""
        self._came_at = now
        if now - self._marks[-1][0] >= _STEP_SECONDS:
            self._marks.append((now, size))
            while len(self._marks) > 1 and self._marks[1][0] <= now - _WINDOW_SECONDS:
                self._marks.popleft()

    def seconds_for(self, missing: int, size: int, now: float) -> float:
        """How long `missing` bytes beyond `size` will take.

        Where nothing has come for a while, the time of that silence is the best guess.
        """
        if missing <= 0:
            return 0.0
        since, size_then = self._marks[0]
        gained, silent_seconds = size - size_then, now - self._came_at
        return max(missing * (now - since) / gained if gained > 0 else 0.0, silent_seconds)


_WAKE_SECONDS = 0.025
_WAKE_BYTES = 64 * 1024
_WAKE_AT_LATEST_SECONDS = 0.2


class Reader:
    """A growing body as one connection reads it (a Body)."""

    __slots__ = ("_body", "_late", "_on_leave")

    def __init__(self, body: "GrowingBody", on_leave: Callback | None, *, late: bool) -> None:
        self._body = body
        self._on_leave = on_leave
        self._late = late

    @property
    def growing(self) -> "GrowingBody":
        return self._body

    @property
    def published(self) -> int:
        """How much of it is there."""
        return self._body.published

    @property
    def head(self) -> Head:
        return self._body.head

    @property
    def source(self) -> str:
        """See Body."""
        return "cache" if self._late else self._body.source

    @property
    def fd(self) -> int:
        return self._body.fd

    def available(self, offset: int, want: int) -> int:
        """See Body."""
        return self._body.available(offset, want)

    def view(self, offset: int, length: int) -> memoryview:
        return self._body.view(offset, length)

    def wait(self, offset: int, callback: Callback) -> None:
        self._body.wait(offset, callback)

    def forget(self, callback: Callback) -> None:
        self._body.forget(callback)

    def end(self) -> int | None:
        return self._body.end()

    def leave(self) -> None:
        self._body.readers.remove(self)
        if self._on_leave is not None:
            self._on_leave()

    def unreadable(self) -> None:
        """Nothing: the fill will find out by itself, if it reads."""


class GrowingBody:
    """A body that is being written.

    Its fill (leader or follower) alone calls `publish`, `hold_back`, `go_on_in`, `complete` and `fail`.
    Waiters run at the first published byte and at the end at once, in between at most every 25 ms and only
    for 64 KiB more (or after 200 ms): a thousand waiters must not eat the cores.
    """

    def __init__(self, head: Head, generation: int, file: OpenFile | None, now: float) -> None:
        """`now` is on the monotonic clock."""
        self.head = head
        self.generation = generation
        self.file = file
        self.in_memory = False
        """Whether `file` is a memory file."""
        self.published = 0
        self.failed = False
        self.readers: list[Reader] = []
        self._length: int | None = None
        self._waiting: dict[Callback, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._woken_at = 0.0
        self._woken_bytes = 0
        self._pace = Pace(now)

    # --- reading

    def reader(self, on_leave: Callback | None = None, *, late: bool = False) -> Reader:
        """One reader more; it calls `leave` when it is done. `late`: it came when all was there."""
        reader = Reader(self, on_leave, late=late)
        self.readers.append(reader)
        return reader

    @property
    def source(self) -> str:
        """See Body."""
        return "bypass" if self.in_memory else "fill"

    @property
    def fd(self) -> int:
        """See Body."""
        assert self.file is not None
        return self.file.fd

    def seconds_to(self, offset: int, now: float) -> float:
        """How long the fill will take to reach `offset` at its present rate."""
        return self._pace.seconds_for(offset - self.published, self.published, now)

    def age_seconds(self, now: float) -> float:
        """How long it has been growing, as far as this process knows."""
        return now - self._pace.began_at

    @property
    def complete_in_file(self) -> bool:
        """Whether the part file has all of it, committed or not."""
        return self._length is not None and not self.in_memory

    @property
    def ended(self) -> bool:
        return self.failed or self._length is not None

    def end(self) -> int | None:
        return self._length if self._length is not None else self.head.length

    def available(self, offset: int, want: int) -> int:
        if offset >= self.published:
            return CUT if self.failed else 0
        if self.file is None:  # held back, or revoked
            return CUT if self.failed else 0
        return min(want, self.published - offset)

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.fd, length, offset))

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    # --- growing

    def publish(self, size: int) -> None:
        """The first `size` bytes are there."""
        assert size >= self.published
        if size == self.published:
            return
        first, now = self.published == 0, time.monotonic()
        if first and size > _WAKE_BYTES:
            self._pace.begin_with(size, now)
        else:
            self._pace.came(size, now)
        self.published = size
        if first or size == self.head.length:
            self.wake()
        elif self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def hold_back(self) -> None:
        """The disk refused: what is in the file is sent again when it was found right, and is in memory."""
        self.file = None

    def go_on_in(self, file: OpenFile) -> None:
        """From now on `file`, a memory file, has all that is published."""
        self.file = file
        self.in_memory = True
        self.wake()

    def revoke(self) -> None:
        """Its memory is needed: readers that are left are cut."""
        self.file = None
        self.failed = True
        self.wake()

    def complete(self, length: int) -> None:
        """All is published, and right."""
        assert self.published == length
        self._length = length
        self.wake()

    def fail(self) -> None:
        """The rest will never come: readers are cut when they have sent what there is."""
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
        """Let all look again at once who would find something."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken_at = time.monotonic()
        self._woken_bytes = self.published
        for callback in [c for c, at in self._waiting.items() if at < self.published or self.ended]:
            self._waiting.pop(callback, None)
            callback()
