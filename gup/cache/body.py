"""Bodies as a connection reads them, and those that grow while they arrive; never fetches, never sends."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Protocol

from gup.cache.record import Head
from gup.cache.store import OpenFile

CUT = -1
"""What `available` answers when the rest will never come: the connection is to be cut."""

_WAKE_SECONDS = 0.025
_WAKE_BYTES = 64 * 1024
_WAKE_AT_LATEST_SECONDS = 0.2

Callback = Callable[[], None]


class Body(Protocol):
    """What a connection needs of a body. Offsets and lengths in bytes."""

    head: Head
    source: str

    @property
    def fd(self) -> int:
        """Descriptor to send from, -1 when the bytes are to be had from `view` only."""

    def available(self, offset: int, want: int) -> int:
        """How many bytes from `offset` can be sent now without blocking; 0: wait; CUT: never."""

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for bodies without a descriptor."""

    def wait(self, offset: int, callback: Callback) -> None:
        """Call back once when asking for `offset` again is worth it."""

    def forget(self, callback: Callback) -> None:
        """Take a `wait` back."""

    def end(self) -> int | None:
        """The body's length as soon as it is sure."""

    def leave(self) -> None:
        """A reader is gone. Called once by each."""


async def read_whole(body: Body, most: int) -> bytes:
    """The first `most` bytes of a body, for use in this process; what can't be had is left out."""
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


class GrowingBody:
    """A body that is being written: what is published of it may be sent.

    Its fill (leader or follower) alone calls `publish`, `complete` and `fail`. Waiters run at the first
    published byte and at the end at once, in between at most every 25 ms and only for 64 KiB more (or after
    200 ms): a thousand waiters must not eat the cores.
    """

    source = "fill"

    def __init__(self, head: Head, generation: int, file: OpenFile, now: float) -> None:
        """`now` is on the monotonic clock."""
        self.head = head
        self.generation = generation
        self.file = file
        self.published = 0
        self.failed = False
        self.readers = 0
        self._length: int | None = None
        self._waiting: dict[Callback, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._woken_at = 0.0
        self._woken_bytes = 0
        self._began_at = self._published_at = now
        self.on_leave: Callback | None = None
        self._began_bytes = 0

    @property
    def fd(self) -> int:
        return self.file.fd

    def seconds_to(self, offset: int, now: float) -> float:
        """How long the fill will take to reach `offset` at its present rate.

        Where nothing has come for a while, the time of that silence is the best guess.
        """
        missing = offset - self.published
        if missing <= 0:
            return 0.0
        gained = self.published - self._began_bytes
        silent_seconds = now - self._published_at
        return max(missing * (now - self._began_at) / gained if gained > 0 else 0.0, silent_seconds)

    def age_seconds(self, now: float) -> float:
        """How long it has been growing, as far as this process knows."""
        return now - self._began_at

    @property
    def ended(self) -> bool:
        return self.failed or self._length is not None

    def end(self) -> int | None:
        return self._length if self._length is not None else self.head.length

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(os.pread(self.file.fd, length, offset))

    def available(self, offset: int, want: int) -> int:
        if offset < self.published:
            return min(want, self.published - offset)
        return CUT if self.failed else 0

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    def leave(self) -> None:
        self.readers -= 1
        if self.on_leave is not None:
            self.on_leave()

    def publish(self, size: int) -> None:
        """The first `size` bytes are in the file."""
        assert size >= self.published
        if size == self.published:
            return
        first = self.published == 0
        if first and size > _WAKE_BYTES:
            self._began_bytes = size  # a part that was there before says nothing of the rate
        self.published = size
        self._published_at = time.monotonic()
        if first or size == self.head.length:
            self._wake()
        elif self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def complete(self, length: int) -> None:
        """All is published, and right."""
        assert self.published == length
        self._length = length
        self._wake()

    def fail(self) -> None:
        """The rest will never come: readers are cut when they have sent what there is."""
        if not self.ended:
            self.failed = True
            self._wake()

    def _tick(self) -> None:
        self._timer = None
        due = time.monotonic() - self._woken_at >= _WAKE_AT_LATEST_SECONDS
        if due or self.published - self._woken_bytes >= _WAKE_BYTES:
            self._wake()
        elif self._waiting and self.published > self._woken_bytes:
            self._timer = asyncio.get_running_loop().call_later(_WAKE_SECONDS, self._tick)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken_at = time.monotonic()
        self._woken_bytes = self.published
        for callback in [c for c, at in self._waiting.items() if at < self.published or self.ended]:
            self._waiting.pop(callback, None)
            callback()
