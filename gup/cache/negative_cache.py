"""Failures that still stand, for all processes; and the upstreams that are on hold for one key."""

import hashlib
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from enum import IntEnum

from gup.cache.records import MEMORY_SECONDS, Hold, Told
from gup.content.key import ContentKey
from gup.errors import PROBLEMS, Problem
from gup.jsonmodel import MAX_INTEGER
from gup.upstream.exchange import RemoteHead, UpstreamFailure, bounded

FAILURE_WORDS = 32
"""Words of one row of the table of failures."""
_WAYS = 4
"""A key's failure stands in one of so many rows."""
_SLUGS = tuple(PROBLEMS)
LONGEST_HOLD_SECONDS = 900.0
"""Between two looks at a body that was found wrong."""


class _Word(IntEnum):
    """The words of a row."""

    KEY_HIGH = 0
    """0: the row is free, or being written."""
    KEY_LOW = 1
    UNTIL = 2
    """Monotonic nanoseconds."""
    WHAT = 3
    """The slug's place in PROBLEMS in the upper half, the detail's length in bytes in the lower one."""
    DETAIL = 4
    """The first of the words with the detail in UTF-8, cut to what has room."""


class NegativeCache:
    """What could not be had, and need not be asked for again yet: one table in shared memory.

    Bounded: a new row replaces the one of its four that ends first. `words` change while `locked` is held;
    a reader that finds its key takes the lock, too, so that it reads no row by half.
    """

    def __init__(self, words: "memoryview[int]", locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._words = words
        self._locked = locked
        self._sets = len(words) // FAILURE_WORDS // _WAYS

    def get(self, key: ContentKey, path: str) -> Problem | None:
        """The problem to answer with while the failure stands, with the time that is left."""
        high, low = _halves(key, path)
        if not any(row[_Word.KEY_HIGH] == high for row in self._rows(high)):
            return None
        with self._locked():
            row = self._find(high, low)
            if row is None:
                return None
            left = (row[_Word.UNTIL] - time.monotonic_ns()) / 1e9
            if left <= 0:
                row[_Word.KEY_HIGH] = 0
                return None
            slug, size = _SLUGS[row[_Word.WHAT] >> 32], row[_Word.WHAT] & 0xFFFF_FFFF
            detail = row[_Word.DETAIL :].tobytes()[:size].decode(errors="ignore")
        return problem_that_stands(slug, detail, left)

    def put(self, key: ContentKey, path: str, problem: Problem, seconds: float) -> None:
        """Remember for so long that `key` could not be had, asked for by `path`."""
        if seconds <= 0:
            return
        high, low = _halves(key, path)
        room = 8 * (FAILURE_WORDS - _Word.DETAIL)
        detail = problem.detail.encode(errors="replace")[:room]
        with self._locked():
            row = self._find(high, low) or min(
                self._rows(high), key=lambda row: row[_Word.UNTIL] * bool(row[0])
            )
            row[_Word.KEY_HIGH] = 0
            row[_Word.KEY_LOW] = low
            row[_Word.UNTIL] = time.monotonic_ns() + int(seconds * 1e9)
            row[_Word.WHAT] = _SLUGS.index(problem.slug) << 32 | len(detail)
            row[_Word.DETAIL :] = memoryview(detail.ljust(room, b"\0")).cast("Q")
            row[_Word.KEY_HIGH] = high

    def forget(self, key: ContentKey, path: str) -> None:
        """It is here by now."""
        high, low = _halves(key, path)
        if any(row[_Word.KEY_HIGH] == high for row in self._rows(high)):
            with self._locked():
                row = self._find(high, low)
                if row is not None:
                    row[_Word.KEY_HIGH] = 0

    def _find(self, high: int, low: int) -> "memoryview[int] | None":
        rows = self._rows(high)
        return next((r for r in rows if r[_Word.KEY_HIGH] == high and r[_Word.KEY_LOW] == low), None)

    def _rows(self, high: int) -> "list[memoryview[int]]":
        first = high % self._sets * _WAYS * FAILURE_WORDS
        starts = range(first, first + _WAYS * FAILURE_WORDS, FAILURE_WORDS)
        return [self._words[at : at + FAILURE_WORDS] for at in starts]


def _halves(key: ContentKey, path: str) -> tuple[int, int]:
    """A failure belongs to the spelling that was asked: upstream may have the same under another one."""
    digest = hashlib.blake2b(f"{key.text} {path}".encode(), digest_size=16).digest()
    high, low = struct.unpack("=QQ", digest)
    return high or 1, low


def problem_that_stands(slug: str, detail: str, left_seconds: float) -> Problem:
    """A remembered failure for one more client. `Retry-After` stands where trying again may help."""
    absent = PROBLEMS[slug].status in (404, 410)
    return Problem(slug, detail, retry_after_seconds=None if absent else max(left_seconds, 1.0))


def told_by(head: RemoteHead) -> Told:
    """What tells an upstream's body from its next one."""
    etag, modified = (bounded(text) if text is not None else None for text in (head.etag, head.last_modified))
    return etag, modified, None if head.length is None else min(head.length, MAX_INTEGER)


class Holds:
    """The upstreams that one key is not asked for: by their own Retry-After, or since what came was wrong.

    A wrong body is waited for `first_seconds`, doubled each time it is found wrong again, up to 15 minutes.
    After the wait its head is asked for: one that tells another body is a new chance and begins anew.
    """

    def __init__(
        self,
        rows: Iterable[Hold],
        first_seconds: float,
        clock: Callable[[], float],
        tell: Callable[[str, str], None] = lambda _upstream, _detail: None,
    ) -> None:
        """`tell` is called with an upstream and what is wrong with its body."""
        self._first_seconds = first_seconds or 1.0
        self._clock = clock
        self._tell = tell
        now = clock()
        self._rows = {row.upstream: row for row in rows if row.remembers(now)}

    @property
    def rows(self) -> tuple[Hold, ...]:
        return tuple(self._rows.values())

    def note(self, upstream: str, failure: UpstreamFailure, head: RemoteHead | None) -> None:
        """Take in why an upstream's answer was of no use; `head` is that of a body that was read."""
        if failure.retry_after_seconds is not None:
            self._hold(upstream, failure.retry_after_seconds)
        elif failure.outcome == "rejected":
            self._reject(upstream, head)
            self._tell(upstream, failure.detail)

    def _hold(self, upstream: str, seconds: float) -> None:
        before = self._rows.get(upstream)
        times, told, forgotten_at = (
            (before.times, before.told, before.forgotten_at) if before is not None else (0, None, 0.0)
        )
        until = self._clock() + seconds
        self._rows[upstream] = Hold(upstream, until, seconds, times, told, forgotten_at)

    def _reject(self, upstream: str, head: RemoteHead | None) -> None:
        now, before = self._clock(), self._rows.get(upstream)
        told = told_by(head) if head is not None else None
        if before is None or (told is not None and before.told not in (None, told)):
            times, known, forgotten_at = 1, told, 0.0
        else:
            times, known, forgotten_at = before.times + 1, told or before.told, before.forgotten_at
        seconds = min(self._first_seconds * 2.0 ** min(times - 1, 30), LONGEST_HOLD_SECONDS)
        if told is not None:
            forgotten_at = now + MEMORY_SECONDS
        forgotten_at = max(forgotten_at, now + seconds + LONGEST_HOLD_SECONDS)
        self._rows[upstream] = Hold(upstream, now + seconds, seconds, times, known, forgotten_at)

    def seconds_left(self, upstream: str) -> float:
        """Time until it may be asked; 0: now."""
        row = self._rows.get(upstream)
        return row.seconds_left(self._clock()) if row is not None else 0.0

    def is_wrong(self, head: RemoteHead) -> bool:
        """Whether `head` tells the body that was found wrong. Without validators nobody can tell."""
        row = self._rows.get(head.upstream)
        return row is not None and row.told == told_by(head) and bool(head.etag or head.last_modified)
