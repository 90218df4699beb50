"""The hot lane's table: heads and targets whose answer is ready-made; decides nothing it was not told before.

A row is found by a request's whole head, byte for byte, or (second chance: heads differ from client to
client) by its target once the head was parsed as a plain GET. Same bytes, same decision: rows hold only what
the handler decided before, for entries that are open, verified and fresh.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from gup.cache.entry import Entry
from gup.content.declared import NOTHING, Stated
from gup.server.response import HeadTemplate

MAX_HEAD_BYTES = 2048
"""Longer heads are not looked up."""
_MOST_ROWS = 8192
SMALL_BYTES = 32 * 1024
"""A body up to this size leaves with its head in one `send`."""


@dataclass(slots=True, eq=False)
class HotRow:
    """A ready-made answer. `fresh_until` is monotonic; `validated_at` is wall time, for Age."""

    entry: Entry
    template: HeadTemplate
    length: int
    download: bool
    """Whether it takes a download slot."""
    key_text: str
    sent_at: int
    """Word that counts body bytes."""
    stream_at: int
    hit_at: int
    """Word that counts hits."""
    fresh_until: float
    validated_at: float
    full: bool = False
    """Whether it is told who takes it."""
    used: bool = True
    stated: Stated = NOTHING
    """What the client states whose head the row is found by; a target alone tells nothing of it."""

    def small(self) -> bytes | None:
        """The body's bytes if they are few and in the page cache."""
        if self.length > SMALL_BYTES or self.entry.available(0, 1) <= 0:
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

    `policy` and `store` read the shared epochs: a change of the first drops the table, of the second every
    row whose file has no link left.
    """

    def __init__(
        self, policy: Callable[[], int], store: Callable[[], int], close_removed: Callable[[], object]
    ) -> None:
        self._by_head: dict[bytes, HotRow] = {}
        self._by_target: dict[bytes, HotRow] = {}
        self._policy = policy
        self._store = store
        self._close_removed = close_removed
        self._seen = (policy(), store())
        self._drops = 0

    def drop(self) -> None:
        """Forget everything: the settings that it was decided by are no longer those of this process.

        The policy's epoch alone would not do: it rises when new settings are sent, so a decision by the old
        ones may still be learned after it.
        """
        self._by_head.clear()
        self._by_target.clear()
        self._drops += 1

    def find(self, head: bytes, now: float) -> HotRow | None:
        """The row of a whole head."""
        row = self._by_head.get(head)
        return row if row is not None and self._valid(row, now) else None

    def find_target(self, target: bytes, now: float) -> HotRow | None:
        """The row of a plain, keep-alive HTTP/1.1 GET for `target`."""
        row = self._by_target.get(target)
        return row if row is not None and self._valid(row, now) else None

    def _valid(self, row: HotRow, now: float) -> bool:
        if self._seen != (self._policy(), self._store()):
            self.refresh()
            return False
        if now >= row.fresh_until or not row.entry.all_verified:
            return False
        row.used = True
        return True

    @property
    def epochs(self) -> tuple[int, int, int]:
        """Read before a decision; `learn` refuses it when they have changed since."""
        return self._policy(), self._store(), self._drops

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
        policy, store = self._policy(), self._store()
        if policy != self._seen[0]:
            self._by_head.clear()
            self._by_target.clear()
        if store != self._seen[1]:
            self._close_removed()
            for table in (self._by_head, self._by_target):
                for name in [n for n, row in table.items() if os.fstat(row.entry.fd).st_nlink == 0]:
                    del table[name]
        self._seen = (policy, store)


def _insert(table: dict[bytes, HotRow], name: bytes, row: HotRow) -> None:
    while len(table) >= _MOST_ROWS:
        oldest = next(iter(table))
        candidate = table.pop(oldest)
        if candidate.used:
            candidate.used = False
            table[oldest] = candidate
    table[name] = row
