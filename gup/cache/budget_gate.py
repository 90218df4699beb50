"""Whether a fill may begin, by the budget of the WAN: background fills are held back first, then fulls, then
deltas; index files never.

The controller says in the page what is used (gup.control.wan_budget); what the workers have received since
counts at once. A fill under way goes on, and what is stored is served. During an outbreak definitions are
free.
"""

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime

from gup import config
from gup.cache.scheduler import Class, class_of
from gup.content.catalog import CLIENT_PATCHES, Label, opened_by_outbreak
from gup.content.routes import Route
from gup.errors import Problem
from gup.metrics import Counters
from gup.units import bytes_in_words, time_in_words

UNKNOWN, COUNTING, CHEAP = 0, 1, 2
"""Values of the page's word: before the controller's first reading; bytes count; cheap hours."""
_KNOWN_SECONDS = 10.0
"""The longest wait of a fill for the controller's first reading, after a start."""
_POLL_SECONDS = 0.01
_LONGEST_RETRY_SECONDS = 900.0
"""An outbreak, or a larger budget, may let it through before the period is over."""
_WORD_MASK = (1 << 64) - 1
SLUG = "wan-budget"


def is_spent(budget: config.WanBudget, used_bytes: int, class_: str) -> bool:
    """Whether fills of a class are held back when so much of a period's bytes is used."""
    shares = {"background": budget.background, "full": budget.fulls, "delta": budget.deltas}
    return budget.bytes > 0 and used_bytes >= shares[class_] * budget.bytes


class BudgetGate:
    """One process's view of the budget. `words` are the page's four, `received` is what all processes of this
    gup have received.
    """

    def __init__(
        self,
        words: "memoryview[int]",
        budget: Callable[[], config.WanBudget],
        received: Callable[[], int],
        counters: Counters,
        wall_clock: Callable[[], float],
    ) -> None:
        self._words, self._budget, self._received = words, budget, received
        self._counters, self._wall_clock = counters, wall_clock
        self.label: Callable[[Route], Label | None] = lambda _route: None
        """What the catalogues say of it. Set by the process, which knows them."""

    @classmethod
    def of(
        cls, budget: Callable[[], config.WanBudget], counters: Counters, wall_clock: Callable[[], float]
    ) -> "BudgetGate":
        """One that is shared with no other process."""
        return cls(memoryview(bytearray(32)).cast("Q"), budget, lambda: 0, counters, wall_clock)

    def publish(self, state: int, used: int, counted: int, opens_at: int) -> None:
        """For the controller: `used` of the budget when the counters stood at `counted`."""
        self._words[1] = used - counted & _WORD_MASK
        self._words[2], self._words[0] = opens_at, state

    def set_outbreak(self, until: float) -> None:
        """For the controller: Unix seconds at which it ends, 0: there is none."""
        self._words[3] = math.ceil(until)

    @property
    def outbreak(self) -> bool:
        until = self._words[3]
        return until > 0 and self._wall_clock() < until

    def frees(self, route: Route) -> bool:
        """Whether an outbreak opens everything for this content."""
        return self.outbreak and opened_by_outbreak(self.label(route))

    def class_of(self, route: Route, *, background: bool) -> str | None:
        """The label of metrics; None for what is never held back. Deltas of client patches count as fulls."""
        class_ = class_of(route)
        if class_ is Class.INDEX:
            return None
        if background:
            return "background"
        if class_ is not Class.DELTA:
            return "full"
        label = self.label(route) if self.holds("full") else None
        return "full" if label is not None and label.type == CLIENT_PATCHES else "delta"

    @property
    def used_bytes(self) -> int:
        used = self._words[1] + self._received() & _WORD_MASK
        # Below zero for a moment while `gup upgrade` adds up the counters of earlier processes.
        return used if used <= _WORD_MASK >> 1 else 0

    def holds(self, class_: str) -> bool:
        """Whether fills of a class are held back now, but for what an outbreak frees."""
        return self._words[0] == COUNTING and is_spent(self._budget(), self.used_bytes, class_)

    async def refuse(self, route: Route, *, background: bool) -> None:
        """Problem when the fill must not begin now; it is counted then."""
        if not self._budget().bytes or class_of(route) is Class.INDEX:
            return
        give_up_at = time.monotonic() + _KNOWN_SECONDS
        while self._words[0] == UNKNOWN and time.monotonic() < give_up_at:  # noqa: ASYNC110 - its memory
            await asyncio.sleep(_POLL_SECONDS)
        class_ = self.class_of(route, background=background)
        if class_ is not None and self.holds(class_) and not self.frees(route):
            self.count_held(class_)
            raise self._problem(class_)

    def is_held(self, route: Route, *, background: bool) -> bool:
        class_ = self.class_of(route, background=background)
        return class_ is not None and self.holds(class_) and not self.frees(route)

    def count_held(self, class_: str) -> None:
        self._counters.add("gup_wan_budget_held_back_total", **{"class": class_})

    def _problem(self, class_: str) -> Problem:
        budget, used, now = self._budget(), self.used_bytes, self._wall_clock()
        opens_at = self._words[2]
        what = {"background": "nothing is fetched in the background", "full": "no full package is fetched"}
        detail = (
            f"{bytes_in_words(used)} of {bytes_in_words(budget.bytes)} a {budget.per} are used "
            f"(wan.budget): {what.get(class_, 'only index files are fetched')}"
        )
        retry = _LONGEST_RETRY_SECONDS
        if opens_at > now:
            at = datetime.fromtimestamp(opens_at, UTC)
            detail += f" before {at:%Y-%m-%d %H:%M} UTC, in {time_in_words(opens_at - now)}"
            retry = min(retry, opens_at - now)
        problem = Problem(SLUG, detail, retry_after_seconds=max(1.0, retry))
        problem.extensions = {"held": class_, **self.stated()}
        return problem

    def stated(self) -> dict[str, object]:
        """Further members of the problem document."""
        budget, opens_at = self._budget(), self._words[2]
        at = datetime.fromtimestamp(opens_at, UTC).isoformat(timespec="seconds") if opens_at else None
        return {
            "budget_bytes": budget.bytes,
            "used_bytes": self.used_bytes,
            "per": budget.per,
            "opens_at": at,
        }
