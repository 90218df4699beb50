"""The queue for fill slots: which fill streams next, and which is refused at once.

There are two classes of slots, `fill.max` of each. Deltas and index files (*urgent*) take slots of their own,
so that fulls never delay them; everything else (*bulk*) takes one only while fewer than `fill.max` fills of
both classes stream. In each class the more urgent priority goes first, then first come, first served, over
all processes.

A fill that will not get its slot within its patience is refused at once, judged by the fills before it and by
how long recent fills held their slots.

A takeover *inherits* its dead leader's slot. The kernel has freed it by then, and another fill may have it
already: so there are extra slots for takeovers, and while one is taken, one bulk slot less is given.
"""

import asyncio
import contextlib
import math
import random
import time
from bisect import insort
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from gup.cache.locks import Slots
from gup.errors import Problem
from gup.upstream.bandwidth import Turns, rank

_FIELD_BITS = 16
_FIELD_MASK = (1 << _FIELD_BITS) - 1
_SMOOTHING = 4
"""A new sample counts for a quarter of the mean."""
PRIORITIES = 4
CLASSES = 2
"""Deltas and index files are one class, all else the other."""


class Backlog:
    """How many fills wait, and how long they hold their slots, over all processes.

    Each process has one word with four counts of waiting fills by priority. It is written by its process
    alone, and skipped when that is not `alive`. Each class has one word, the mean microseconds that recent
    fills held their slots, written at the end of a fill: a lost update costs one sample.
    """

    def __init__(
        self, waiting: "memoryview[int]", held: "memoryview[int]", mine: int, alive: Callable[[int], bool]
    ) -> None:
        self._waiting = waiting
        self._held = held
        self._mine = mine
        self._alive = alive
        waiting[mine] = 0

    @classmethod
    def alone(cls) -> "Backlog":
        words = memoryview(bytearray(8 * (1 + CLASSES))).cast("Q")
        return cls(words[:1], words[1:], 0, lambda _block: True)

    def change(self, priority: int, count: int) -> None:
        self._waiting[self._mine] += count << (_FIELD_BITS * priority)

    def waiting(self, priority: int) -> int:
        shift = _FIELD_BITS * priority
        words = [(block, word >> shift & _FIELD_MASK) for block, word in enumerate(self._waiting) if word]
        return sum(count for block, count in words if count and self._alive(block))

    def held(self, class_: int, seconds: float) -> None:
        sample = max(1, int(seconds * 1_000_000))
        before = self._held[class_] or sample
        self._held[class_] = before + (sample - before) // _SMOOTHING

    def mean_held_seconds(self, class_: int) -> float:
        """0.0 while it is unknown."""
        return self._held[class_] / 1_000_000


_BULK_PRIORITY = 2
"""From this priority on a fill is bulk."""
_POLL_SECONDS = 0.01
"""Polling interval for slots that other processes hold: the kernel does not report a freed lock."""
_THINK_AGAIN_SECONDS = 1.0
"""A waiting fill checks this often whether to give up."""
_DOUBT = 2.0
"""A waiting fill gives up only when its turn is expected this many times later than its patience ends."""
_MOST_WAITING = 1000
"""In one process. Each holds a claim, and a task."""
_LONGEST_RETRY_SECONDS = 300.0


@dataclass(slots=True, order=True)
class _Waiting:
    priority: int
    number: int
    since_ns: int = field(compare=False, default_factory=time.monotonic_ns)
    look: asyncio.Event = field(compare=False, default_factory=asyncio.Event)
    """Set when it has become the first, or a slot of this process is free again."""


class FillSlot:
    """A held slot. A fill that no longer needs the link may leave it early."""

    __slots__ = ("_leave",)

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def leave(self) -> None:
        """Give the slot back; further calls do nothing."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


_Taken = tuple[Slots, int]


class FillQueue:
    """The waiting fills of one process, in order; `turns` and `backlog` are shared with the others."""

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
        self._waiting: list[_Waiting] = []
        self._numbers = 0

    # --- whether to wait

    def expected_seconds(self, priority: int, *, ahead: float = 1.0) -> float:
        """How long a fill of this priority will wait; `ahead` is the share of its equals that are before it.

        0.0 when a slot is free or nothing is known yet.
        """
        class_ = _class(priority)
        before: list[float] = [self._backlog.waiting(other) for other in range(priority + 1)]
        if not any(before) and self._has_free(class_):
            return 0.0
        before[-1] *= ahead
        rivals = sum(count for other, count in enumerate(before) if _class(other) == class_)
        seconds = (rivals + 1) * self._backlog.mean_held_seconds(class_)  # one: until the next slot is free
        return seconds / max(1, self._classes[class_].count())

    def hopeless(self, priority: int) -> bool:
        """Whether a new fill should be refused at once."""
        if len(self._waiting) >= _MOST_WAITING:
            return True
        return self.expected_seconds(priority) > self._patience_seconds()

    def refusal(self, priority: int) -> Problem:
        """For the clients of a fill that would not get its slot in time.

        The queue is never much longer than the patience, so it has room again within that time. Retries are
        spread, so that not all come at once.
        """
        patience = max(1.0, self._patience_seconds())
        expected = self.expected_seconds(priority) or patience
        spread = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        return Problem(
            "overloaded",
            "the fill queue is full; try again later",
            retry_after_seconds=min(max(1.0, min(expected, patience) * spread), _LONGEST_RETRY_SECONDS),
        )

    def idle(self) -> bool:
        """Whether no process has a fill that streams or waits."""
        return not self.waiting() and not any(slots.taken() for slots in (*self._classes, self._inherited))

    def waiting(self) -> int:
        return sum(self._backlog.waiting(priority) for priority in range(PRIORITIES))

    # --- waiting

    @contextlib.asynccontextmanager
    async def held(
        self, priority: int, waited_seconds: float, *, inherits: bool = False, patient: bool = False
    ) -> AsyncIterator[FillSlot | None]:
        """Hold a slot for the block, or until it is left; None when there is none within the remaining
        patience.

        `waited_seconds` is how long this fill's clients have waited already. A fill that `inherits` does not
        wait, a `patient` one waits without limit: neither is refused.
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
            self._wake_first()

        slot = FillSlot(leave)
        try:
            yield slot
        finally:
            slot.leave()

    def _inherit(self, priority: int) -> _Taken | None:
        """A dead leader's slot, or its replacement."""
        taken = self._try(priority)
        if taken is None and (number := self._inherited.try_take()) is not None:
            taken = self._inherited, number
        return taken

    async def _take(self, priority: int, patience_seconds: float) -> _Taken | None:
        if not self._waiting and self._turns.free() and (taken := self._try(priority)) is not None:
            return taken
        if patience_seconds < math.inf and self.hopeless(priority):
            return None
        self._numbers += 1
        me = _Waiting(priority, self._numbers)
        insort(self._waiting, me)
        self._backlog.change(priority, 1)
        self._first_changed()
        try:
            return await self._wait(me, time.monotonic() + patience_seconds)
        finally:
            self._waiting.remove(me)
            self._backlog.change(priority, -1)
            self._first_changed()

    def _first_changed(self) -> None:
        first = self._waiting[0] if self._waiting else None
        self._turns.ask(rank(first.priority, first.since_ns) if first is not None else None)
        self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].look.set()

    async def _wait(self, me: _Waiting, deadline: float) -> _Taken | None:
        while (left := deadline - time.monotonic()) > 0:
            first = self._waiting[0] is me
            if first and self._turns.mine() and (taken := self._try(me.priority)) is not None:
                return taken
            ahead = self._waiting.index(me) / len(self._waiting)
            if not first and self.expected_seconds(me.priority, ahead=ahead) > _DOUBT * left:
                return None
            me.look.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, _POLL_SECONDS if first else _THINK_AGAIN_SECONDS)):
                    await me.look.wait()
        return None

    # --- slots

    def _try(self, priority: int) -> _Taken | None:
        urgent, bulk = self._classes
        if _class(priority) == 0:
            number = urgent.try_take()
            return None if number is None else (urgent, number)
        number = bulk.try_take(bulk.count() - urgent.taken() - self._inherited.taken())
        return None if number is None else (bulk, number)

    def _has_free(self, class_: int) -> bool:
        """Whether a slot is free, judged without taking it."""
        urgent, bulk = self._classes
        taken = urgent.taken()
        if class_:
            taken += bulk.taken() + self._inherited.taken()
        return taken < urgent.count()


def _class(priority: int) -> int:
    return 0 if priority < _BULK_PRIORITY else 1
