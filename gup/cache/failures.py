"""Failures that still stand, in memory: asking again costs no disk. Upstreams that are on hold for a key."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gup.cache.state import MEMORY_SECONDS, Hold, Told
from gup.content.key import ContentKey
from gup.errors import Problem
from gup.jsonmodel import MAX_INTEGER
from gup.upstream.exchange import RemoteHead, UpstreamFailure, bounded

_MOST = 10_000
LONGEST_HOLD_SECONDS = 900.0
"""Between two looks at a body that was found wrong."""


@dataclass(slots=True)
class Failures:
    """Failures that still stand, remembered in this process so that they cost no look at the disk."""

    clock: Callable[[], float]
    rows: OrderedDict[ContentKey, tuple[float, Problem]] = field(default_factory=OrderedDict)

    def get(self, key: ContentKey) -> Problem | None:
        row = self.rows.get(key)
        if row is None:
            return None
        left = row[0] - self.clock()
        if left <= 0:
            del self.rows[key]
            return None
        problem = row[1].again()
        if problem.retry_after_seconds is not None:
            problem.retry_after_seconds = max(left, 1.0)
        return problem

    def put(self, key: ContentKey, problem: Problem, ttl_seconds: float) -> None:
        self.rows[key] = (self.clock() + ttl_seconds, problem)
        self.rows.move_to_end(key)
        while len(self.rows) > _MOST:
            self.rows.popitem(last=False)


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
