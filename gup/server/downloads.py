"""Download slots: how many large bodies the machine sends at once, and the queue for them.

First come, first served over all workers: a free slot is for the worker whose first waiter came first.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from gup.cache.locks import Slots
from gup.config import Clients
from gup.content.key import Kind
from gup.errors import Problem
from gup.metrics import Counters
from gup.upstream.bandwidth import Turns

LARGE_BODY_BYTES = 256 * 1024  # bodies over this size take a download slot, except index files
_POLL_SECONDS = 0.01
_RATE_SECONDS = 30
_LONGEST_RETRY_SECONDS = 300.0
NO_SLOT = -1


def is_download(kind: Kind, length: int | None) -> bool:
    """A body of unknown length may become large, so it takes one."""
    return kind is not Kind.INDEX and (length is None or length > LARGE_BODY_BYTES)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's claim to a download slot. `slot` is None while it waits, NO_SLOT when there is no limit.

    `on_admitted` is called once when a waiting ticket gets a slot; set it before the event loop runs.
    """

    since_ns: int
    slot: int | None = None
    on_admitted: Callable[[], None] | None = None


class Downloads:
    """The downloads of one worker. `limits` is read at each decision, so a reload takes effect at once.

    `sum_of` makes a function that sums a series over all workers; `turns` has the first waiter of each.
    """

    def __init__(
        self,
        slots: Slots,
        limits: Callable[[], Clients],
        counters: Counters,
        sum_of: Callable[[str], Callable[[], int]],
        turns: Turns,
    ) -> None:
        self._slots, self._limits, self._words, self._turns = slots, limits, counters.words, turns
        in_progress, queued = "gup_client_downloads_in_progress", "gup_client_downloads_queued"
        ended = "gup_client_downloads_total"
        self._in_progress, self._all_in_progress = counters.position(in_progress), sum_of(in_progress)
        self._queued, self._all_queued = counters.position(queued), sum_of(queued)
        self._ended, self._all_ended = counters.position(ended), sum_of(ended)
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()
        self._timer: asyncio.Handle | None = None
        self._stopping = False
        self._ends: deque[int] = deque(maxlen=_RATE_SECONDS + 1)

    def take_ticket(self) -> Ticket:
        """A ticket for one large body, with a slot or waiting for one. Problem when the queue is full."""
        ticket = Ticket(time.monotonic_ns())
        if self._turns.free() and (slot := self._free_slot()) is not None:
            self._admit(ticket, slot)
            return ticket
        if self._stopping:
            raise stopping()
        self._words[self._queued] += 1
        # counted first, then compared: two workers can't both take the last place in the queue
        if (queued := self._all_queued()) > self._limits().queue:
            self._words[self._queued] -= 1
            detail = f"{queued - 1} downloads are queued already, the limit set by clients.queue"
            raise Problem("overloaded", detail, retry_after_seconds=self._served_within(queued))
        self._waiting[ticket] = None
        self._ask()
        self._poll_in(_POLL_SECONDS)
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """The body has been sent, or will not be: free the ticket's slot or its place in the queue."""
        if ticket.slot is None:
            self._leave_queue(ticket)
            return
        self._words[self._in_progress] -= 1
        self._words[self._ended] += 1
        if ticket.slot != NO_SLOT:
            self._slots.give_back(ticket.slot)
        if self._waiting:  # deferred: the caller is still ending another response
            self._poll_in(0.0)

    def each_second(self) -> None:
        self._ends.append(self._all_ended())

    def stop(self) -> None:
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
        self._timer = asyncio.get_running_loop().call_later(seconds, self._poll)

    def _poll(self) -> None:
        self._timer = None
        while self._waiting:
            if not self._turns.mine() or (slot := self._free_slot()) is None:
                self._poll_in(_POLL_SECONDS)
                break
            ticket = next(iter(self._waiting))
            self._leave_queue(ticket)
            self._admit(ticket, slot)
            assert ticket.on_admitted is not None
            ticket.on_admitted()

    def _free_slot(self) -> int | None:
        # The sum needs no system call, looking at every slot one each; but only the slots' locks decide. The
        # sum includes downloads that began while there was no limit.
        most = self._limits().max_downloads
        if not most:
            return NO_SLOT
        return self._slots.try_take() if self._all_in_progress() < most else None

    def _admit(self, ticket: Ticket, slot: int) -> None:
        ticket.slot = slot
        self._words[self._in_progress] += 1

    def _leave_queue(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        self._words[self._queued] -= 1
        self._ask()

    def _ask(self) -> None:
        self._turns.ask(next((ticket.since_ns for ticket in self._waiting), None))

    def _served_within(self, downloads: int) -> float:
        """The time for this many downloads at the rate of the last half minute: then the queue has room."""
        ended = self._ends[-1] - self._ends[0] if self._ends else 0
        if ended <= 0:
            return float(_RATE_SECONDS)
        return min(max(1.0, downloads * (len(self._ends) - 1) / ended), _LONGEST_RETRY_SECONDS)


def stopping() -> Problem:
    return Problem("draining", "the service stops before this download has begun", retry_after_seconds=5)
