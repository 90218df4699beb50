"""The negative cache of all processes, and the upstreams that are on hold for one key."""

import ctypes
import hashlib
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from gup.cache.records import MEMORY_SECONDS, BodyIdentity, Hold
from gup.content.key import ContentKey
from gup.errors import PROBLEMS, Problem
from gup.jsonmodel import MAX_INTEGER
from gup.upstream.exchange import RemoteHead, UpstreamFailure, bounded

_WAYS = 4
"""A key's failure is in one of this many rows."""
_SLUGS = tuple(PROBLEMS)
LONGEST_HOLD_SECONDS = 900.0
"""Longest time before a body that was found wrong is checked again."""


class _Row(ctypes.Structure):
    """One failure. Its detail is in UTF-8, cut to the space there is."""

    key: "ctypes.Array[ctypes.c_ubyte]"
    """All 0: the row is free."""
    until_ns: int
    slug: int
    """Index in PROBLEMS."""
    detail: bytes
    _fields_ = (
        ("key", ctypes.c_ubyte * 16),
        ("until_ns", ctypes.c_uint64),
        ("slug", ctypes.c_uint64),
        ("detail", ctypes.c_char * 224),
    )


FAILURE_WORDS = ctypes.sizeof(_Row) // 8
_FREE = bytes(16)
_KEY = struct.Struct("=QQ")


class NegativeCache:
    """Failures for which upstreams need not be asked again yet: one table in shared memory.

    Bounded: a new row replaces the one of its four that ends first. `words` change while `locked` is held; a
    reader that finds its key takes the lock, too, so that it reads no half-written row.
    """

    def __init__(self, words: "memoryview[int]", locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._words = words
        self._locked = locked
        self._sets = len(words) // FAILURE_WORDS // _WAYS

    def get(self, key: ContentKey, path: str) -> Problem | None:
        asked = _digest(key, path)
        if self._find(asked) is None:
            return None
        with self._locked():
            row = self._find(asked)
            left = (row.until_ns - time.monotonic_ns()) / 1e9 if row is not None else 0.0
            if row is None or left <= 0:
                return None
            return remembered_problem(_SLUGS[row.slug], row.detail.decode(errors="ignore"), left)

    def put(self, key: ContentKey, path: str, problem: Problem, seconds: float) -> None:
        """`path` is the one requested upstream."""
        if seconds <= 0:
            return
        asked = _digest(key, path)
        with self._locked():
            row = self._find(asked) or min(self._rows(asked), key=lambda row: row.until_ns)
            row.until_ns = time.monotonic_ns() + int(seconds * 1e9)
            row.slug = _SLUGS.index(problem.slug)
            row.detail = problem.detail.encode(errors="replace").replace(b"\0", b" ")[:224]
            row.key[:] = list(asked)

    def forget(self, key: ContentKey, path: str) -> None:
        asked = _digest(key, path)
        if self._find(asked) is not None:
            with self._locked():
                if (row := self._find(asked)) is not None:
                    row.key[:] = list(_FREE)
                    row.until_ns = 0

    def _find(self, asked: bytes) -> _Row | None:
        key, first = _KEY.unpack(asked), self._first(asked)
        for row in range(first, first + _WAYS):
            at = row * FAILURE_WORDS
            if self._words[at] == key[0] and self._words[at + 1] == key[1]:
                return self._row(row)
        return None

    def _rows(self, asked: bytes) -> list[_Row]:
        first = self._first(asked)
        return [self._row(row) for row in range(first, first + _WAYS)]

    def _first(self, asked: bytes) -> int:
        return int.from_bytes(asked[:8], "big") % self._sets * _WAYS

    def _row(self, number: int) -> _Row:
        return _Row.from_buffer(self._words, number * ctypes.sizeof(_Row))


def _digest(key: ContentKey, path: str) -> bytes:
    """A failure is remembered by the requested spelling: upstream may have the same under another one."""
    return hashlib.blake2b(f"{key.text} {path}".encode(), digest_size=16).digest()


def remembered_problem(slug: str, detail: str, left_seconds: float) -> Problem:
    """`Retry-After` is set where trying again may help."""
    absent = PROBLEMS[slug].status in (404, 410)
    retry = None if absent else max(left_seconds, 1.0)
    return Problem(slug, detail, retry_after_seconds=retry, stands_seconds=left_seconds)


def identity_of(head: RemoteHead) -> BodyIdentity:
    etag, modified = (bounded(text) if text is not None else None for text in (head.etag, head.last_modified))
    return etag, modified, None if head.length is None else min(head.length, MAX_INTEGER)


class Holds:
    """The upstreams that one key is not requested from: by their own Retry-After, or after a wrong body.

    A wrong body is on hold for `first_seconds`, doubled each time it is found wrong again, up to 15 minutes.
    After that its head is requested: another body starts anew.
    """

    def __init__(
        self,
        rows: Iterable[Hold],
        first_seconds: float,
        clock: Callable[[], float],
        tell: Callable[[str, str], None] = lambda _upstream, _detail: None,
    ) -> None:
        self._first_seconds = first_seconds or 1.0
        self._clock = clock
        self._tell = tell
        now = clock()
        self._rows = {row.upstream: row for row in rows if row.remembers(now)}

    @property
    def rows(self) -> tuple[Hold, ...]:
        return tuple(self._rows.values())

    def note(self, upstream: str, failure: UpstreamFailure, head: RemoteHead | None) -> None:
        """Record why an upstream's answer was rejected; `head` is that of a body that was read."""
        if failure.retry_after_seconds is not None:
            self._hold(upstream, failure.retry_after_seconds)
        elif failure.outcome == "rejected":
            self._reject(upstream, head)
            self._tell(upstream, failure.detail)

    def _hold(self, upstream: str, seconds: float) -> None:
        before = self._rows.get(upstream)
        times, identity, forgotten_at = (
            (before.times, before.identity, before.forgotten_at) if before is not None else (0, None, 0.0)
        )
        until = self._clock() + seconds
        self._rows[upstream] = Hold(upstream, until, seconds, times, identity, forgotten_at)

    def _reject(self, upstream: str, head: RemoteHead | None) -> None:
        now, before = self._clock(), self._rows.get(upstream)
        identity = identity_of(head) if head is not None else None
        if before is None or (identity is not None and before.identity not in (None, identity)):
            times, known, forgotten_at = 1, identity, 0.0
        else:
            times, known, forgotten_at = before.times + 1, identity or before.identity, before.forgotten_at
        seconds = min(self._first_seconds * 2.0 ** min(times - 1, 30), LONGEST_HOLD_SECONDS)
        if identity is not None:
            forgotten_at = now + MEMORY_SECONDS
        forgotten_at = max(forgotten_at, now + seconds + LONGEST_HOLD_SECONDS)
        self._rows[upstream] = Hold(upstream, now + seconds, seconds, times, known, forgotten_at)

    def seconds_left(self, upstream: str) -> float:
        row = self._rows.get(upstream)
        return row.seconds_left(self._clock()) if row is not None else 0.0

    def is_wrong(self, head: RemoteHead) -> bool:
        """Whether `head` is of the body that was found wrong. Without validators that is unknown."""
        row = self._rows.get(head.upstream)
        return row is not None and row.identity == identity_of(head) and bool(head.etag or head.last_modified)
