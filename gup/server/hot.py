"""The hot lane's table: heads and targets whose answer is ready-made; decides nothing it was not told before.

A row is found by a request's whole head, byte for byte, or (second chance: heads differ from client to
client) by its target once the head was seen to be a plain GET. Same bytes, same decision: rows hold only what
the handler decided before, for entries that are open, verified and fresh.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gup.cache.checksum import CHUNK_BYTES
from gup.cache.entry import Entry
from gup.content.client_identity import NOTHING, Stated
from gup.server.ranges import Span
from gup.server.response import HeadTemplate, PartTemplate

MAX_HEAD_BYTES = 2048
"""Longer heads are not learned."""
_MOST_ROWS = 8192
SMALL_BYTES = 32 * 1024
"""A body up to this size leaves with its head in one `send`."""
_MOST_READY_BYTES = 4 << 20
_WARM_SECONDS = 5.0
"""How long a body of one chunk is not asked again whether it is in the page cache; see Entry.available."""


@dataclass(slots=True, eq=False)
class HotRow:
    """A ready-made answer. `fresh_until` is monotonic; `validated_at` is wall time, for Age.

    What begins with an underscore is made anew for each date (an object of its own every second), by these
    methods alone.
    """

    entry: Entry
    template: HeadTemplate
    part_template: PartTemplate
    length: int
    download: bool
    """Whether it takes a download slot."""
    key_text: str
    sent_at: int
    """Word that counts body bytes."""
    stream_at: int
    hit_at: int
    """Word that counts hits."""
    part_hit_at: int
    """Word that counts hits answered with a range."""
    fresh_until: float | None
    """None: for ever."""
    validated_at: float
    full: bool = False
    """Whether it is told who takes it."""
    few: bool = field(init=False)
    """Whether its bytes are few enough to leave with the head."""
    whole: Span = field(init=False)
    used: bool = True
    stated: Stated = NOTHING
    """What the client states whose head the row is found by; a target alone tells nothing of it."""
    ready: bytes | None = None
    """Head and body together, right while `ready_of` is the date."""
    ready_of: bytes | None = None
    _head: bytes = b""
    _head_of: bytes | None = None
    _warm_until: float = 0.0

    def __post_init__(self) -> None:
        self.few = self.length <= SMALL_BYTES
        self.whole = Span(0, self.length)

    def head(self, date: bytes, wall_now: float) -> bytes:
        """The head of the whole answer; Age is exact to a second, as Date is."""
        if self._head_of is not date:
            self._head = self.template.render(date, self._age(wall_now))
            self._head_of = date
        return self._head

    def part_head(self, date: bytes, wall_now: float, start: int, stop: int) -> bytes:
        """The head of a 206 with the bytes from `start` up to, not including, `stop`."""
        return self.part_template.render(date, self._age(wall_now), start, stop)

    def _age(self, wall_now: float) -> int:
        return max(0, int(wall_now - self.validated_at))

    def at_hand(self, start: int, stop: int, now: float) -> bool:
        """Whether all of these bytes may leave without waiting for the disk."""
        if now < self._warm_until:
            return True
        if self.entry.available(start, stop - start) < stop - start:
            return False
        if self.length <= CHUNK_BYTES:
            self._warm_until = now + _WARM_SECONDS
        return True

    def small(self) -> bytes | None:
        """The body's bytes if they are few and in the page cache."""
        if not self.few or self.entry.available(0, 1) <= 0:
            return None
        try:
            piece = os.pread(self.entry.fd, self.length, 0)
        except OSError:
            piece = b""
        if len(piece) != self.length:
            self.entry.unreadable()
            return None
        return piece


class HotTable:
    """Bounded; rows that were not used go first (one pass of grace).

    `shared_epochs` reads those of policy and store: a change of the first drops the table, of the second
    every row whose file has no link left.
    """

    def __init__(
        self, shared_epochs: Callable[[], tuple[int, int]], close_removed: Callable[[], object]
    ) -> None:
        self._by_head: dict[bytes, HotRow] = {}
        self._by_target: dict[bytes, HotRow] = {}
        self._shared = shared_epochs
        self._close_removed = close_removed
        self._seen = shared_epochs()
        self._drops = 0
        self._ready: list[HotRow] = []
        self._ready_bytes = 0

    def drop(self) -> None:
        """Forget everything: the settings that it was decided by are no longer those of this process.

        The policy's epoch alone would not do: it rises when new settings are sent, so a decision by the old
        ones may still be learned after it.
        """
        self._by_head.clear()
        self._by_target.clear()
        self.forget_ready()
        self._drops += 1

    def find(self, head: bytes) -> HotRow | None:
        """The row of a whole head."""
        row = self._by_head.get(head)
        return row if row is not None and self._valid(row) else None

    def find_target(self, target: bytes) -> HotRow | None:
        """The row of a plain, keep-alive HTTP/1.1 GET for `target`."""
        row = self._by_target.get(target)
        return row if row is not None and self._valid(row) else None

    def _valid(self, row: HotRow) -> bool:
        if self._shared() != self._seen:
            self.refresh()
            return False
        if row.fresh_until is not None and time.monotonic() >= row.fresh_until:
            return False
        row.used = True
        return row.entry.all_verified

    @property
    def epochs(self) -> tuple[int, int, int]:
        """Read before a decision; `learn` refuses it when they have changed since."""
        return (*self._shared(), self._drops)

    def learn(
        self, head: bytes | None, target: bytes | None, row: HotRow, epochs: tuple[int, int, int]
    ) -> None:
        """Remember a decision made while `epochs` were in force; without `target`, for that head alone."""
        if epochs != self.epochs:
            return
        if epochs[:2] != self._seen:
            self.refresh()
        if head is not None and len(head) <= MAX_HEAD_BYTES:
            _insert(self._by_head, head, row)
        if target is not None:
            _insert(self._by_target, target, row)

    def refresh(self) -> None:
        """Take the epochs' changes in."""
        policy, store = self._shared()
        if policy != self._seen[0]:
            self._by_head.clear()
            self._by_target.clear()
        if store != self._seen[1]:
            self._close_removed()
            for table in (self._by_head, self._by_target):
                for name in [n for n, row in table.items() if os.fstat(row.entry.fd).st_nlink == 0]:
                    del table[name]
        self._seen = (policy, store)

    # --- answers that are ready for a second

    def make_ready(self, row: HotRow, date: bytes, wall_now: float) -> bytes | None:
        """Head and body together, if the body is few bytes; kept while the date is right.

        No cache: what is used is read again every second, and `forget_ready` bounds how long it is held.
        """
        piece = row.small()
        if piece is None:
            return None
        message = row.head(date, wall_now) + piece
        if self._ready_bytes + len(message) <= _MOST_READY_BYTES:
            row.ready, row.ready_of = message, date
            self._ready.append(row)
            self._ready_bytes += len(message)
        return message

    def forget_ready(self) -> None:
        """To be called each second."""
        for row in self._ready:
            row.ready = row.ready_of = None
        self._ready.clear()
        self._ready_bytes = 0


def _insert(table: dict[bytes, HotRow], name: bytes, row: HotRow) -> None:
    while len(table) >= _MOST_ROWS:
        oldest = next(iter(table))
        candidate = table.pop(oldest)
        if candidate.used:
            candidate.used = False
            table[oldest] = candidate
    table[name] = row
