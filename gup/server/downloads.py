"""Download slots: how many large bodies the machine sends at once, and the queue of those that wait.

First come, first served over all workers. Each worker shows since when the first in its queue waits; a free
slot is for the one that has waited longest, and other workers leave it alone for a moment. If it stays free
beyond that (the worker was killed, or hangs), the next in line takes it.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gup.cache.locks import Slots
from gup.config import Clients
from gup.content.key import Kind
from gup.errors import Problem
from gup.metrics import Counters

LARGE_BODY_BYTES = 256 * 1024
"""Bodies over this size take a download slot, except index files."""
_POLL_SECONDS = 0.01
_COURTESY_SECONDS = 0.25
"""How long a free slot is left to a longer waiting worker: it polls every 10 ms, but cores may be busy."""
_RATE_SECONDS = 30
_LONGEST_RETRY_SECONDS = 300.0
NO_SLOT = -1


def is_download(kind: Kind, length: int | None) -> bool:
    """Whether a body takes a download slot. One of unknown length may become large, so it does."""
    return kind is not Kind.INDEX and (length is None or length > LARGE_BODY_BYTES)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's claim to a download slot. `slot` is None while it waits, NO_SLOT when there is no limit.

    `on_admitted` is called once when a slot is given to a waiting ticket; set it before the event loop runs.
    """

    since_ns: int
    slot: int | None = None
    on_admitted: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class MachineView:
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
        counters: Counters,
        machine: MachineView,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._slots = slots
        self._limits = limits
        self._words = counters.words
        self._in_progress = counters.position("gup_client_downloads_in_progress")
        self._queued = counters.position("gup_client_downloads_queued")
        self._total = counters.position("gup_client_downloads_total")
        self._machine = machine
        self._loop = loop
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()
        self._timer: asyncio.Handle | None = None
        self._free_since: float | None = None
        self._stopping = False
        self._ended: deque[int] = deque(maxlen=_RATE_SECONDS + 1)
        machine.show(0)

    def take_ticket(self) -> Ticket:
        """A ticket for one large body, with a slot or waiting for one. Problem when the queue is full."""
        ticket = Ticket(time.monotonic_ns())
        limits = self._limits()
        if not limits.max_downloads:
            self._admit(ticket, NO_SLOT)
            return ticket
        if not self._waiting and not self._others_since() and (slot := self._free_slot()) is not None:
            self._admit(ticket, slot)
            return ticket
        if self._stopping:
            raise stopping()
        words = self._words
        words[self._queued] += 1
        # counted first, then compared: two workers can't both take the last place of the queue
        if (queued := self._machine.queued()) > limits.queue:
            words[self._queued] -= 1
            raise self._overloaded(queued - 1)
        self._waiting[ticket] = None
        self._show()
        self._poll_in(_POLL_SECONDS)
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """The body has been sent, or will not be: free the ticket's slot or its place in the queue."""
        words = self._words
        if ticket.slot is None:
            del self._waiting[ticket]
            words[self._queued] -= 1
            self._show()
            return
        words[self._in_progress] -= 1
        words[self._total] += 1
        if ticket.slot != NO_SLOT:
            self._slots.give_back(ticket.slot)
        if self._waiting:  # not at once: the caller is still ending another response
            self._poll_in(0.0)

    def each_second(self) -> None:
        """Note how many downloads have ended, for the rate."""
        self._ended.append(self._machine.ended())

    def stop(self) -> None:
        """Let nobody into the queue from now on."""
        self._stopping = True

    def close(self) -> None:
        assert not self._waiting
        if self._timer is not None:
            self._timer.cancel()

    # --- the queue

    def _poll_in(self, seconds: float) -> None:
        if self._timer is not None:
            if seconds:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._poll)

    def _poll(self) -> None:
        """Admit waiting tickets as far as there are slots for them."""
        self._timer = None
        while self._waiting:
            slot = self._next_slot()
            if slot is None:
                self._poll_in(_POLL_SECONDS)
                break
            ticket, _ = self._waiting.popitem(last=False)
            self._words[self._queued] -= 1
            self._show()
            self._admit(ticket, slot)
            assert ticket.on_admitted is not None
            ticket.on_admitted()

    def _next_slot(self) -> int | None:
        """A slot for the first ticket in this worker, unless another worker's has waited longer."""
        if not self._limits().max_downloads:
            return NO_SLOT
        if not self._below_limit():
            self._free_since = None
            return None
        others = self._others_since()
        if others and others < next(iter(self._waiting)).since_ns:
            now = self._loop.time()
            self._free_since = now if self._free_since is None else self._free_since
            if now - self._free_since < _COURTESY_SECONDS:
                return None
        self._free_since = None
        return self._free_slot()

    def _below_limit(self) -> bool:
        """Whether fewer downloads run than may. Those that began before there was a limit count as well."""
        return self._machine.in_progress() < self._limits().max_downloads

    def _free_slot(self) -> int | None:
        # The sum costs no system call, a look at every slot one each; but only the slots' locks decide.
        return self._slots.try_take() if self._below_limit() else None

    def _others_since(self) -> int:
        """Since when the longest waiting client of other workers waits; 0: none does."""
        machine = self._machine
        return min(
            (at for number, at in enumerate(machine.waiting_since_ns) if at and number != machine.own),
            default=0,
        )

    def _admit(self, ticket: Ticket, slot: int) -> None:
        ticket.slot = slot
        self._words[self._in_progress] += 1

    def _show(self) -> None:
        first = next(iter(self._waiting), None)
        self._machine.show(first.since_ns if first is not None else 0)

    # --- a full queue

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


def stopping() -> Problem:
    """The answer to a queued download when the service stops."""
    return Problem("draining", "the service stops before this download has begun", retry_after_seconds=5)
