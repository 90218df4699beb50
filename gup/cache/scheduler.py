"""The queue for fill slots: which fill streams next, and which is refused at once.

There are two groups of slots, `fill.max` of each. Deltas and index files (*urgent*) take slots of their own,
so that fulls never delay them. Fulls and unknown names (*bulk*) take one only while fewer than `fill.max`
fills of both groups stream; after half a second they may also take a few that urgent fills can't take.

The order is the same over all processes: the more urgent class first, then the client with the fewest slots,
then first come, first served. A fill that has waited long counts as of a more urgent class of its group, so
that no fill waits for ever.

A fill that will not get its slot within its patience is refused at once, judged by the fills before it and by
how long recent fills held their slots.

A takeover *inherits* its dead leader's slot. The kernel has freed it by then, and another fill may have it
already: so there are extra slots for takeovers, and while one is taken, one bulk slot less is given.
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from operator import itemgetter

from gup.cache.fair_shares import ClientCounts
from gup.cache.locks import Slots
from gup.content.key import Kind
from gup.content.routes import Route
from gup.errors import Problem
from gup.upstream.bandwidth import Turns, rank


class Class(IntEnum):
    """What a fill is, the most urgent first: the order of fill slots, and of bytes of the WAN."""

    DELTA = 0
    INDEX = 1
    FULL = 2
    UNKNOWN = 3
    """Any other name: clients can make up as many as they like."""
    BACKGROUND = 4
    """It takes no slot."""


def share_class(class_: int) -> int:
    """For shares of a site's WAN rate: 0 deltas and index files, 1 fulls and unknown names, 2 background."""
    return min(class_ // 2, 2)


_CLASSES = {Kind.DELTA: Class.DELTA, Kind.FULL: Class.FULL, Kind.OTHER: Class.FULL}


def class_of(route: Route) -> Class:
    return _CLASSES.get(route.kind, Class.INDEX if route.known_index else Class.UNKNOWN)


_FIELD_BITS = 16
_FIELD_MASK = (1 << _FIELD_BITS) - 1
_SMOOTHING = 4
"""A new sample counts for a quarter of the mean."""
CLASSES = 4
"""That take slots."""
GROUPS = 2


class Backlog:
    """How many fills wait, and how long they hold their slots, over all processes.

    Each process has one word with four counts of waiting fills by class. It is written by its process alone,
    and skipped when that is not `alive`. Each group has one word, the mean microseconds that recent fills
    held their slots, written at the end of a fill: a lost update costs one sample.
    """

    def __init__(
        self, waiting: "memoryview[int]", held: "memoryview[int]", mine: int, alive: Callable[[int], bool]
    ) -> None:
        self._waiting = waiting
        self._held = held
        self._mine = mine
        self._alive = alive
        waiting[mine] = 0

    def change(self, class_: Class, count: int) -> None:
        self._waiting[self._mine] += count << (_FIELD_BITS * class_)

    def waiting(self, class_: Class) -> int:
        shift = _FIELD_BITS * class_
        words = [(block, word >> shift & _FIELD_MASK) for block, word in enumerate(self._waiting) if word]
        return sum(count for block, count in words if count and self._alive(block))

    def held(self, group: int, seconds: float) -> None:
        sample = max(1, int(seconds * 1_000_000))
        before = self._held[group] or sample
        self._held[group] = before + (sample - before) // _SMOOTHING

    def mean_held_seconds(self, group: int) -> float:
        """0.0 while it is unknown."""
        return self._held[group] / 1_000_000


_POLL_SECONDS = 0.01
"""Polling interval for slots that other processes hold: the kernel does not report a freed lock."""
_TURN_SECONDS = 0.002
"""The same for the process whose fill comes first: a slot that is free waits for it alone."""
_THINK_AGAIN_SECONDS = 1.0
"""Waiting fills are checked this often whether to give up."""
_ORDER_SECONDS = 0.05
"""The order is computed again this often, since other processes change what clients hold."""
_AGEING_SECONDS = 10.0
"""After each such time a fill counts as of the next class in its group."""
_RESERVE_SECONDS = 0.5
"""After this a bulk fill may take one of a quarter of the slots, whatever urgent fills stream."""
_DOUBT = 2.0
"""A waiting fill gives up only when its turn is expected this many times later than its patience ends."""
_MOST_WAITING = 1000
"""In one process. Each holds a claim, and a task."""
_MOST_OF_CLIENT = 100
"""Of one client, so that it can't take all places."""
_LONGEST_RETRY_SECONDS = 300.0
_MOST_HELD = 63
_HELD_SHIFT = 54
"""A rank's tag: how many slots the client has, then when the fill came, in microseconds."""


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


@dataclass(slots=True, eq=False)
class _Waiting:
    class_: Class
    client: str
    give_up_at: float
    since: float
    given: "asyncio.Future[_Taken | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """None: it is refused."""


@dataclass(slots=True, eq=False)
class _Group:
    """The slots of one group, and the fills of this process that wait for one."""

    number: int
    slots: Slots
    turns: Turns
    waiting: list[_Waiting] = field(default_factory=list)
    first: _Waiting | None = None
    """As of the last ordering."""
    ordered_at: float = -math.inf
    think_at: float = math.inf
    """When waiting fills are checked next."""
    timer: asyncio.TimerHandle | None = None
    of_client: "Counter[str]" = field(default_factory=Counter)
    """How many fills of each client wait here."""


class FillQueue:
    """The waiting fills of one process; `turns` (a pair) and `backlog` are shared with the others.

    So is `clients`, the number of slots that each client has; the worker sets it.
    """

    def __init__(
        self,
        urgent: Slots,
        bulk: Slots,
        inherited: Slots,
        patience_seconds: Callable[[], float],
        turns: tuple[Turns, Turns],
        backlog: Backlog,
    ) -> None:
        self._groups = (_Group(0, urgent, turns[0]), _Group(1, bulk, turns[1]))
        self._inherited = inherited
        self._patience_seconds = patience_seconds
        self._backlog = backlog
        self.clients = ClientCounts.alone()
        self._nobodies = count()

    # --- whether to wait

    def expected_seconds(self, class_: Class, client: str = "") -> float:
        """How long a new fill will wait; 0.0 when a slot is free or nothing is known yet.

        Clients take turns, so of each other client only one fill more than its own waiting ones goes before
        it. Fills in other processes are assumed to belong to as many clients as those here.
        """
        group, before = self._group_of(class_), self._before(class_)
        if not before and self._has_free(group):
            return 0.0
        own = group.of_client[client] + 1
        here = sum(min(waiting, own) for waiting in group.of_client.values())
        return self._seconds(group, before * here / max(1, len(group.waiting)))

    def _before(self, class_: Class) -> int:
        """Fills that wait in all processes and are of this class, or a more urgent one of its group."""
        first = Class.DELTA if class_ < Class.FULL else Class.FULL
        return sum(self._backlog.waiting(Class(other)) for other in range(first, class_ + 1))

    def _seconds(self, group: _Group, before: float) -> float:
        # one more: until the next slot is free
        return (before + 1) * self._backlog.mean_held_seconds(group.number) / max(1, group.slots.count())

    def hopeless(self, class_: Class, client: str = "") -> bool:
        """Whether a new fill should be refused at once."""
        if sum(len(group.waiting) for group in self._groups) >= _MOST_WAITING:
            return True
        if self._group_of(class_).of_client[client] >= _MOST_OF_CLIENT:
            return True
        return self.expected_seconds(class_, client) > self._patience_seconds()

    def refusal(self, class_: Class, client: str = "") -> Problem:
        """For the clients of a fill that would not get its slot in time.

        The queue is never much longer than the patience, so it has room again within that time. Retries are
        spread, so that not all come at once.
        """
        patience = max(1.0, self._patience_seconds())
        expected = self.expected_seconds(class_, client) or patience
        spread = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        return Problem(
            "queue-full",
            "the fill queue is full; try again later",
            retry_after_seconds=min(max(1.0, min(expected, patience) * spread), _LONGEST_RETRY_SECONDS),
        )

    def idle(self) -> bool:
        taken = (self._inherited, *(group.slots for group in self._groups))
        return not self.waiting() and not any(slots.taken() for slots in taken)

    def waiting(self) -> int:
        return self._before(Class.INDEX) + self._before(Class.UNKNOWN)

    # --- waiting

    async def take(
        self,
        class_: Class,
        waited_seconds: float,
        client: str = "",
        *,
        inherits: bool = False,
        patient: bool = False,
    ) -> FillSlot | None:
        """A slot, to hold until it is left; None when there is none within the remaining patience.

        `waited_seconds` is how long this fill's clients have waited already; `client` is who made them ask,
        "": nobody, who is another one each time. One that `inherits` waits for nothing, a `patient` one for
        as long as it takes: neither is refused.
        """
        group, client = self._group_of(class_), client or f"nobody {next(self._nobodies)}"
        taken = self._inherit(group) if inherits else None
        if taken is None:
            left = math.inf if inherits or patient else self._patience_seconds() - waited_seconds
            taken = await self._take(group, class_, client, time.monotonic() - waited_seconds, left)
        if taken is None:
            return None
        slots, number = taken
        began = time.monotonic()
        self.clients.add(client)

        def leave() -> None:
            slots.give_back(number)
            self.clients.remove(client)
            self._backlog.held(group.number, time.monotonic() - began)
            for other in self._groups:
                self._poll_in(other, 0.0)

        return FillSlot(leave)

    def _inherit(self, group: _Group) -> _Taken | None:
        """A dead leader's slot, or its replacement."""
        taken = self._try(group)
        if taken is None and (number := self._inherited.try_take()) is not None:
            taken = self._inherited, number
        return taken

    async def _take(
        self, group: _Group, class_: Class, client: str, since: float, patience_seconds: float
    ) -> _Taken | None:
        if not group.waiting and group.turns.free() and (taken := self._try(group)) is not None:
            return taken
        if patience_seconds < math.inf and self.hopeless(class_, client):
            return None
        me = _Waiting(class_, client, time.monotonic() + patience_seconds, since)
        group.waiting.append(me)
        group.first = None
        group.of_client[client] += 1
        group.think_at = min(group.think_at, me.give_up_at, time.monotonic() + _THINK_AGAIN_SECONDS)
        self._backlog.change(class_, 1)
        self._poll(group)
        try:
            return await me.given
        except asyncio.CancelledError:
            if not me.given.cancelled() and (taken := me.given.result()) is not None:
                taken[0].give_back(taken[1])
            raise
        finally:
            if me in group.waiting:
                self._settle(group, me, None)

    def _settle(self, group: _Group, waiting: _Waiting, taken: _Taken | None) -> None:
        """End somebody's waiting: with a slot, or without."""
        group.waiting.remove(waiting)
        group.first = None
        group.of_client -= Counter([waiting.client])
        self._backlog.change(waiting.class_, -1)
        if not waiting.given.done():
            waiting.given.set_result(taken)
        if not group.waiting:
            group.turns.ask(None)

    def _poll_in(self, group: _Group, seconds: float) -> None:
        if group.timer is not None:
            group.timer.cancel()
            group.timer = None
        if group.waiting:
            group.timer = asyncio.get_running_loop().call_later(seconds, self._poll, group)

    def _poll(self, group: _Group) -> None:
        """Give slots that are free to whoever comes first here, if that one is the first of all."""
        now = time.monotonic()
        if now >= group.think_at:
            self._think_again(group, now)
        while group.waiting:
            first = self._first(group, now)
            aged = now - first.since >= _RESERVE_SECONDS
            if not group.turns.mine() or (taken := self._try(group, aged=aged)) is None:
                break
            self._settle(group, first, taken)
        self._poll_in(group, _TURN_SECONDS if group.turns.mine() else _POLL_SECONDS)

    def _first(self, group: _Group, now: float) -> _Waiting:
        if group.first is None or now >= group.ordered_at + _ORDER_SECONDS:
            held = {client: self.clients.of(client) for client in group.of_client}
            ranks = [(self._rank(group, each, held[each.client], now), each) for each in group.waiting]
            first_rank, group.first = min(ranks, key=itemgetter(0))
            group.turns.ask(first_rank)
            group.ordered_at = now
        return group.first

    def _rank(self, group: _Group, each: _Waiting, turn: int, now: float) -> int:
        class_ = max(2 * group.number, each.class_ - int((now - each.since) / _AGEING_SECONDS))
        return rank(class_, min(turn, _MOST_HELD) << _HELD_SHIFT | max(0, int(each.since * 1e6)))

    def _think_again(self, group: _Group, now: float) -> None:
        """Refuse whose patience is at its end, and whose turn is expected far later than that."""
        turns = Counter({client: self.clients.of(client) for client in group.of_client})
        ranks = []
        for each in sorted(group.waiting, key=lambda each: each.since):
            ranks.append((self._rank(group, each, turns[each.client], now), each))
            turns[each.client] += 1
        ranks.sort(key=itemgetter(0))
        before = {class_: self._before(class_) / len(ranks) for class_ in {each.class_ for _, each in ranks}}
        for place, (_, each) in enumerate(ranks):
            left = each.give_up_at - now
            in_vain = place and self._seconds(group, before[each.class_] * place) > _DOUBT * left
            if left <= 0 or in_vain:
                self._settle(group, each, None)
        soonest = min((each.give_up_at for each in group.waiting), default=math.inf)
        group.think_at = min(soonest, now + _THINK_AGAIN_SECONDS) if group.waiting else math.inf

    # --- slots

    def _group_of(self, class_: Class) -> _Group:
        return self._groups[class_ >= Class.FULL]

    def _try(self, group: _Group, *, aged: bool = False) -> _Taken | None:
        """A slot of the group that is free; `aged`: one of the few that urgent fills can't take from bulk."""
        urgent, most = self._groups[0], None
        if group is not urgent:
            left = group.slots.count() - urgent.slots.taken() - self._inherited.taken()
            most = left if urgent.turns.free() else 0
            if aged:
                most = max(most, group.slots.count() // 4, 1)
        number = group.slots.try_take(most)
        return None if number is None else (group.slots, number)

    def _has_free(self, group: _Group) -> bool:
        """Whether a slot is free, judged without taking it."""
        taken = self._groups[0].slots.taken()
        if group.number:
            taken += group.slots.taken() + self._inherited.taken()
        return taken < group.slots.count()
