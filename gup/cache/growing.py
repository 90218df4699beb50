"""Bodies that are still arriving, and their readers; writes and fetches nothing.

What is published of a body may be sent. It lies in the part file, or, from some offset on, in a ring: see
`gup.cache.ring`.
"""

import asyncio
import os
import time

from gup.cache.body import CUT, Callback
from gup.cache.checksum import CHUNK_BYTES, chunk_sum
from gup.cache.pace import Pace
from gup.cache.record import Head
from gup.cache.ring import Ring
from gup.cache.store import OpenFile

_WAKE_SECONDS = 0.025
_WAKE_BYTES = 64 * 1024
_WAKE_AT_LATEST_SECONDS = 0.2


class Reader:
    """A growing body as one connection reads it (a Body). Where it stands decides what a ring must keep."""

    __slots__ = ("_body", "_late", "_on_leave", "begun", "left_behind", "position")

    def __init__(self, body: "GrowingBody", on_leave: Callback | None, *, late: bool) -> None:
        self._body = body
        self._on_leave = on_leave
        self._late = late
        self.position = 0
        self.begun = False
        """Whether it has asked for bytes: one whose turn to download has not come keeps nobody waiting."""
        self.left_behind = False
        """Set by a ring that does not wait for it any more."""

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
        self.begun = True
        if offset != self.position:
            self.position = offset
            self._body.moved()
        return CUT if self.left_behind else self._body.available(offset, want)

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
        self._body.moved()
        if self._on_leave is not None:
            self._on_leave()

    def unreadable(self) -> None:
        """Nothing: the fill will find out by itself, if it reads."""


class GrowingBody:
    """A body that is being written.

    Its fill (leader or follower) alone calls `publish`, `go_on_in`, `complete` and `fail`. Waiters run at the
    first published byte and at the end at once, in between at most every 25 ms and only for 64 KiB more (or
    after 200 ms): a thousand waiters must not eat the cores.
    """

    def __init__(self, head: Head, generation: int, file: OpenFile | None, now: float) -> None:
        """`now` is on the monotonic clock. Without a file, `go_on_in` must follow."""
        self.head = head
        self.generation = generation
        self.file = file
        self.ring: Ring | None = None
        self.published = 0
        self.failed = False
        self.readers: list[Reader] = []
        self.on_move: Callback | None = None
        """Called when a reader has gone on or left, once there is a ring."""
        self._sums: tuple[int, ...] | None = None
        self._in_file = 0
        self._chunk: tuple[int, bytes] = -1, b""
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
        return "fill" if self.ring is None else "bypass"

    @property
    def whole(self) -> bool:
        """Whether a new reader can have it from its first byte on."""
        return self.ring is None or self.ring.whole

    @property
    def fd(self) -> int:
        """See Body. -1 when the file is not enough or not trusted: `view` then takes from file and memory."""
        if self.ring is not None or self._sums is not None:
            return -1
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
        """Whether the file has all of it, committed or not."""
        return self._length is not None and self.ring is None

    @property
    def ended(self) -> bool:
        return self.failed or self._length is not None

    def end(self) -> int | None:
        return self._length if self._length is not None else self.head.length

    def available(self, offset: int, want: int) -> int:
        if offset >= self.published:
            return CUT if self.failed else 0
        want = min(want, self.published - offset)
        ring = self.ring
        if ring is None:
            return self._in_sound_chunk(offset, want)
        if offset < ring.origin:
            return self._in_sound_chunk(offset, min(want, ring.origin - offset))
        return len(ring.view(offset, want)) if offset >= ring.start else CUT

    def view(self, offset: int, length: int) -> memoryview:
        if self.ring is not None and offset >= self.ring.origin:
            return self.ring.view(offset, length)
        if self._sums is not None:
            chunk, piece = self._chunk
            at = offset - chunk * CHUNK_BYTES
            return memoryview(piece)[at : at + length]
        assert self.file is not None
        return memoryview(os.pread(self.file.fd, length, offset))

    def _in_sound_chunk(self, offset: int, want: int) -> int:
        """How much of `want` the file has; of a distrusted one, what lies in one chunk that is as written.

        That blocks for reading a chunk, which is in the page cache as a rule.
        """
        if self._sums is None:
            return want if self.file is not None else CUT
        chunk = offset // CHUNK_BYTES
        if self._chunk[0] != chunk:
            piece = self._read_chunk(chunk)
            if piece is None:
                return CUT
            self._chunk = chunk, piece
        return min(want, chunk * CHUNK_BYTES + len(self._chunk[1]) - offset)

    def _read_chunk(self, chunk: int) -> bytes | None:
        assert self._sums is not None
        start = chunk * CHUNK_BYTES
        if self.file is None:
            return None
        try:
            piece = os.pread(self.file.fd, min(CHUNK_BYTES, self._in_file - start), start)
        except OSError:
            return None
        return piece if chunk_sum(piece) == self._sums[chunk] else None

    def wait(self, offset: int, callback: Callback) -> None:
        self._waiting[callback] = offset

    def forget(self, callback: Callback) -> None:
        self._waiting.pop(callback, None)

    def moved(self) -> None:
        """A reader stands elsewhere than before."""
        if self.on_move is not None:
            self.on_move()

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

    def distrust(self, size: int, sums: tuple[int, ...]) -> None:
        """The disk refused: of the `size` bytes in the file nothing is sent that does not agree with its sum.

        A write that failed late may have lost what was written long before, and a read would not tell.
        """
        self._in_file, self._sums = size, sums

    def go_on_in(self, ring: Ring) -> None:
        """From now on bytes come into `ring` only. What the file has of it can still be read."""
        assert ring.origin >= self.published or ring.whole
        self.ring = ring

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
