"""Failures that still stand, in memory: asking again costs no look at the disk; never decides what fails."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from gup.content.key import ContentKey
from gup.errors import Problem

_MOST = 10_000


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
