"""The queue of fills for their places: who goes next, and who had better not wait; never fills anything.

Two classes of places, `fill.max` of each. Deltas and index files (*urgent*) take places of their own, so that
fulls under way never hold them up; everything else (*bulk*) takes one only while fewer than `fill.max` fills
of both classes stream. In each class the more urgent priority goes first, then who came first, over all
processes.

A fill that will not have its place within its patience is refused at once rather than when its patience has
ended: by what waits before it and by how long fills held their places lately.

Who goes on with a fill whose leader died *inherits* that leader's place. The kernel has freed it by then, and
another fill may have it already: so there are places for heirs alone, and as long as one is taken, a bulk
place less is given.
"""

import asyncio
import contextlib
import math
import random
import time
from bisect import insort
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from gup.cache.backlog import PRIORITIES, Backlog
from gup.cache.slots import Slots
from gup.errors import Problem
from gup.upstream.bandwidth import Turns, rank

_BULK_PRIORITY = 2
"""From this priority on a fill is bulk."""
_POLL_SECONDS = 0.01
"""Between two looks at places that other processes hold: the kernel tells nobody when a lock is freed."""
_THINK_AGAIN_SECONDS = 1.0
"""Between two looks of one who waits at whether it still makes sense."""
_DOUBT = 2.0
"""Who waits already gives up only when its turn is expected so many times later than its patience ends."""
_MOST_WAITING = 1000
"""In one process. Each holds a claim, and a task."""
_LONGEST_RETRY_SECONDS = 300.0


@dataclass(slots=True, order=True)
class _Waiter:
    priority: int
    number: int
    since_ns: int = field(compare=False, default_factory=time.monotonic_ns)
    first: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


class Place:
    """A place that is held. It may be left early, by a fill that needs nothing more of the link."""

    __slots__ = ("_leave",)

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def leave(self) -> None:
        """Give the place back, unless that was done."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


class FillQueue:
    """The fills of one process that wait, in order; `turns` and `backlog` are shared with the others."""

    def __init__(
        self,
        urgent: Slots,
        bulk: Slots,
        inherited: Slots,
        patience_seconds: Callable[[], float],
        turns: Turns,
        backlog: Backlog,
    ) -> None:
        self._classes = (urgent, bulk)
        self._inherited = inherited
        self._patience_seconds = patience_seconds
        self._turns = turns
        self._backlog = backlog
        self._waiting: list[_Waiter] = []
        self._numbers = 0

    # --- whether to wait

    def expected_seconds(self, priority: int, *, ahead: float = 1.0) -> float:
        """How long a fill of this priority will wait, if its equals ahead of it are that share of all.

        0.0 when a place is free or nothing is known yet.
        """
        slots = self._classes[_class(priority)]
        if not any(self._backlog.waiting(other) for other in range(priority + 1)) and self._room(priority):
            return 0.0
        seconds = 0.0
        for other in range(priority + 1):
            waiting = self._backlog.waiting(other) * (ahead if other == priority else 1.0)
            if _class(other) == _class(priority):
                seconds += waiting * self._backlog.mean_held_seconds(_class(other))
        seconds += self._backlog.mean_held_seconds(_class(priority))  # until the next place is free
        return seconds / max(1, slots.count())

    def hopeless(self, priority: int) -> bool:
        """Whether a fill that comes now had better be refused at once."""
        if len(self._waiting) >= _MOST_WAITING:
            return True
        return self.expected_seconds(priority) > self._patience_seconds()

    def retry_seconds(self, priority: int) -> float:
        """When one that was refused may try again with hope: spread, so that not all come at once.

        The queue is never much longer than the patience, so it has room again within that time.
        """
        patience = max(1.0, self._patience_seconds())
        expected = self.expected_seconds(priority) or patience
        spread = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        return min(max(1.0, min(expected, patience) * spread), _LONGEST_RETRY_SECONDS)

    def refusal(self, priority: int) -> Problem:
        """Told to the clients of a fill that would not get its place in time."""
        return Problem(
            "overloaded",
            "as much as the link to upstream can carry is being fetched, and more waits before this",
            retry_after_seconds=self.retry_seconds(priority),
        )

    def idle(self) -> bool:
        """Whether no process has a fill that streams or waits."""
        return not self.waiting() and not any(slots.taken() for slots in (*self._classes, self._inherited))

    def waiting(self) -> int:
        """Fills that wait for their place, in all processes."""
        return sum(self._backlog.waiting(priority) for priority in range(PRIORITIES))

    # --- waiting

    @contextlib.asynccontextmanager
    async def held(
        self, priority: int, waited_seconds: float, *, inherits: bool = False, patient: bool = False
    ) -> AsyncIterator[Place | None]:
        """Hold a place for the block, or until it is left; None when there is none in what patience is left.

        `waited_seconds` is how long those who want this fill have waited already. Who `inherits` waits for
        nothing, who is `patient` for as long as it takes: neither is refused.
        """
        taken = self._inherit(priority) if inherits else None
        if taken is None:
            left = math.inf if inherits or patient else self._patience_seconds() - waited_seconds
            taken = await self._take(priority, left)
        if taken is None:
            yield None
            return
        slots, number = taken
        began = time.monotonic()

        def leave() -> None:
            slots.give_back(number)
            self._backlog.held(_class(priority), time.monotonic() - began)

        place = Place(leave)
        try:
            yield place
        finally:
            place.leave()

    def _inherit(self, priority: int) -> "_Taken | None":
        """A dead leader's place, or what stands for it."""
        taken = self._try(priority)
        if taken is None and (number := self._inherited.try_take()) is not None:
            taken = self._inherited, number
        return taken

    async def _take(self, priority: int, patience_seconds: float) -> "_Taken | None":
        if not self._waiting and self._turns.free() and (place := self._try(priority)) is not None:
            return place
        if patience_seconds < math.inf and self.hopeless(priority):
            return None
        self._numbers += 1
        me = _Waiter(priority, self._numbers)
        insort(self._waiting, me)
        self._backlog.enter(priority)
        self._first_changed()
        try:
            return await self._wait(me, time.monotonic() + patience_seconds)
        finally:
            self._waiting.remove(me)
            self._backlog.leave(priority)
            self._first_changed()

    def _first_changed(self) -> None:
        first = self._waiting[0] if self._waiting else None
        self._turns.ask(rank(first.priority, first.since_ns) if first is not None else None)
        if first is not None:
            first.first.set()

    async def _wait(self, me: _Waiter, deadline: float) -> "_Taken | None":
        while (left := deadline - time.monotonic()) > 0:
            if self._waiting[0] is me:
                if self._turns.mine() and (place := self._try(me.priority)) is not None:
                    return place
                await asyncio.sleep(min(_POLL_SECONDS, left))
                continue
            ahead = self._waiting.index(me) / len(self._waiting)
            if self.expected_seconds(me.priority, ahead=ahead) > _DOUBT * left:
                return None
            me.first.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(me.first.wait(), min(left, _THINK_AGAIN_SECONDS))
        return None

    # --- places

    def _try(self, priority: int) -> "_Taken | None":
        urgent, bulk = self._classes
        if _class(priority) == 0:
            number = urgent.try_take()
            return None if number is None else (urgent, number)
        number = bulk.try_take(bulk.count() - urgent.taken() - self._inherited.taken())
        return None if number is None else (bulk, number)

    def _room(self, priority: int) -> bool:
        """Whether a place is free, as far as one can tell without taking it."""
        urgent, bulk = self._classes
        taken = urgent.taken()
        if _class(priority):
            taken += bulk.taken() + self._inherited.taken()
        return taken < urgent.count()


_Taken = tuple[Slots, int]
"""A place: of which slots, and its number."""


def _class(priority: int) -> int:
    """0: urgent, 1: bulk."""
    return 0 if priority < _BULK_PRIORITY else 1
