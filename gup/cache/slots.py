"""Places for work that may be done only so many times at once on the whole machine; never does the work."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from gup.cache.claim import Claims
from gup.upstream.turns import Turns, rank

_POLL_SECONDS = 0.01
"""Between two looks at places that other processes hold: the kernel tells nobody when a lock is freed."""


@dataclass(slots=True, order=True)
class _Waiter:
    priority: int
    number: int
    since_ns: int = field(compare=False, default_factory=time.monotonic_ns)
    first: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


class Slots:
    """`count()` byte locks from `first` on: each is one place, freed by the kernel if its holder dies.

    The lowest priority number goes first, then who came first, over all processes that share `turns`.
    """

    def __init__(
        self, claims: Claims, first: int, count: Callable[[], int], turns: Turns | None = None
    ) -> None:
        self._turns = turns or Turns.alone()
        self._claims = claims
        self._first = first
        self._count = count
        self._waiting: list[_Waiter] = []
        self._numbers = 0

    def others(self, first: int, count: int) -> "Slots":
        """Places of another kind, in the same file."""
        return Slots(self._claims, first, lambda: count)

    def try_take(self) -> int | None:
        """A place, if one is free this instant."""
        for place in range(self._first, self._first + self._count()):
            if self._claims.try_claim(place):
                return place
        return None

    def give_back(self, place: int) -> None:
        self._claims.release(place)

    async def take(self, priority: int, timeout_seconds: float) -> int | None:
        """A place, as soon as it is this caller's turn; None when that takes too long."""
        if not self._waiting and self._turns.free() and (place := self.try_take()) is not None:
            return place
        self._numbers += 1
        me = _Waiter(priority, self._numbers)
        self._waiting.append(me)
        self._waiting.sort()
        self._first_changed()
        deadline = time.monotonic() + timeout_seconds
        try:
            return await self._wait(me, deadline)
        finally:
            self._waiting.remove(me)
            self._first_changed()

    def _first_changed(self) -> None:
        first = self._waiting[0] if self._waiting else None
        self._turns.ask(rank(first.priority, first.since_ns) if first is not None else None)
        if first is not None:
            first.first.set()

    async def _wait(self, me: _Waiter, deadline: float) -> int | None:
        while (left := deadline - time.monotonic()) > 0:
            if self._waiting[0] is not me:
                me.first.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(me.first.wait(), left)
                continue
            if self._turns.mine() and (place := self.try_take()) is not None:
                return place
            await asyncio.sleep(min(_POLL_SECONDS, left))
        return None

    @contextlib.asynccontextmanager
    async def held(self, priority: int, timeout_seconds: float) -> AsyncIterator[bool]:
        """Hold a place for the block; False when none became free in time."""
        place = await self.take(priority, timeout_seconds)
        try:
            yield place is not None
        finally:
            if place is not None:
                self.give_back(place)
