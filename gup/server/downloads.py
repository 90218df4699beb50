"""Who may be sent a large body now, and who waits: the machine's download slots, their queue. Sends nothing.

First come, first served over all workers. Each worker shows since when its first client waits; a free place
is for whoever has waited longest, and the others leave it alone for a moment. Should a place stay free beyond
that (the worker that is due was killed, or hangs), the next best takes it: nobody waits for the dead.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gup.cache.slots import Slots
from gup.config import Clients
from gup.errors import Problem
from gup.server.tally import Tally

_POLL_SECONDS = 0.01
_COURTESY_SECONDS = 0.25
"""How long a place that others are due for is left to them: they look every 10 ms, but cores may be busy."""
_RATE_SECONDS = 30
_LONGEST_RETRY_SECONDS = 300.0
NO_PLACE = -1


def stopping() -> Problem:
    """What a download is told whose turn will not come."""
    return Problem("draining", "the service stops before this download's turn", retry_after_seconds=5)


@dataclass(slots=True, eq=False)
class Turn:
    """One request's turn. `place` is the slot held, NO_PLACE when there is no limit; None while it waits.

    `go` is called once when the turn comes; whoever asked sets it before the event loop turns again.
    """

    since_ns: int
    place: int | None = None
    go: Callable[[], None] | None = None

    @property
    def come(self) -> bool:
        return self.place is not None


@dataclass(frozen=True, slots=True)
class Machine:
    """What all workers see of each other: sums over their words, and since when each one's first waits.

    `waiting_since_ns` has a word for each worker (monotonic, 0: nobody waits); `own` is this worker's.
    """

    in_progress: Callable[[], int]
    queued: Callable[[], int]
    ended: Callable[[], int]
    waiting_since_ns: "memoryview[int] | Sequence[int]"
    own: int
    show: Callable[[int], None]


class Downloads:
    """The downloads of one worker. `limits` is read at each decision, so a reload takes effect at once."""

    def __init__(
        self,
        slots: Slots,
        limits: Callable[[], Clients],
        tally: Tally,
        machine: Machine,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._slots = slots
        self._limits = limits
        self._tally = tally
        self._machine = machine
        self._loop = loop
        self._waiting: OrderedDict[Turn, None] = OrderedDict()
        self._timer: asyncio.Handle | None = None
        self._free_since: float | None = None
        self._stopping = False
        self._ended: deque[int] = deque(maxlen=_RATE_SECONDS + 1)
        machine.show(0)

    def ask(self) -> Turn:
        """A turn for one large body: it has come, or it waits. Problem when too many wait already."""
        turn = Turn(time.monotonic_ns())
        limits = self._limits()
        if not limits.max_downloads:
            self._begin(turn, NO_PLACE)
            return turn
        if not self._waiting and not self._others_since() and (place := self._free_place()) is not None:
            self._begin(turn, place)
            return turn
        if self._stopping:
            raise stopping()
        words = self._tally.words
        words[self._tally.queued] += 1
        # counted first, then compared: two workers can't both take the last place of the queue
        if (queued := self._machine.queued()) > limits.queue:
            words[self._tally.queued] -= 1
            raise self._overloaded(queued - 1)
        self._waiting[turn] = None
        self._show()
        self._look_later(_POLL_SECONDS)
        return turn

    def leave(self, turn: Turn) -> None:
        """The answer has been sent or will not be: give back what the turn has, be it a slot or a place."""
        words = self._tally.words
        if turn.place is None:
            del self._waiting[turn]
            words[self._tally.queued] -= 1
            self._show()
            return
        words[self._tally.downloads] -= 1
        words[self._tally.downloads_ended] += 1
        if turn.place != NO_PLACE:
            self._slots.give_back(turn.place)
        if self._waiting:  # not here and now: the caller is in the midst of ending another answer
            self._look_later(0.0)

    def each_second(self) -> None:
        """Note how many downloads have ended, for the rate."""
        self._ended.append(self._machine.ended())

    def stop(self) -> None:
        """From now on nobody is let in to wait."""
        self._stopping = True

    def close(self) -> None:
        """Nobody waits here any more."""
        assert not self._waiting
        if self._timer is not None:
            self._timer.cancel()

    # --- whose turn it is

    def _look_later(self, seconds: float) -> None:
        if self._timer is not None:
            if seconds:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Let everybody go whose turn has come."""
        self._timer = None
        while self._waiting:
            place = self._next_place()
            if place is None:
                self._look_later(_POLL_SECONDS)
                break
            turn, _ = self._waiting.popitem(last=False)
            self._tally.words[self._tally.queued] -= 1
            self._show()
            self._begin(turn, place)
            assert turn.go is not None
            turn.go()

    def _next_place(self) -> int | None:
        """A place for the first in this worker, if it is due."""
        if not self._limits().max_downloads:
            return NO_PLACE
        if not self._room():
            self._free_since = None
            return None
        others = self._others_since()
        if others and others < next(iter(self._waiting)).since_ns:
            now = self._loop.time()
            self._free_since = now if self._free_since is None else self._free_since
            if now - self._free_since < _COURTESY_SECONDS:
                return None
        self._free_since = None
        return self._free_place()

    def _room(self) -> bool:
        """Whether fewer are under way than may be: also those count that began before there was a limit."""
        return self._machine.in_progress() < self._limits().max_downloads

    def _free_place(self) -> int | None:
        # The sum costs no system call, a look at every slot one each; but only the slots' locks decide.
        return self._slots.try_take() if self._room() else None

    def _others_since(self) -> int:
        """Since when the client of other workers waits that has waited longest; 0: none does."""
        machine = self._machine
        return min(
            (at for number, at in enumerate(machine.waiting_since_ns) if at and number != machine.own),
            default=0,
        )

    def _begin(self, turn: Turn, place: int) -> None:
        turn.place = place
        self._tally.words[self._tally.downloads] += 1

    def _show(self) -> None:
        first = next(iter(self._waiting), None)
        self._machine.show(first.since_ns if first is not None else 0)

    # --- too many

    def _overloaded(self, queued: int) -> Problem:
        return Problem(
            "overloaded",
            f"{queued} downloads wait already; that is as many as may",
            retry_after_seconds=self._served_within(queued + 1),
        )

    def _served_within(self, downloads: int) -> float:
        """How long so many downloads take at the rate of the last half minute: then the queue has room."""
        ended = max(0, self._ended[-1] - self._ended[0]) if self._ended else 0
        if not ended:
            return float(_RATE_SECONDS)
        per_second = ended / max(1, len(self._ended) - 1)
        return min(max(1.0, downloads / per_second), _LONGEST_RETRY_SECONDS)
