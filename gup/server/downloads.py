"""Download slots: how many large bodies the machine sends at once, and the queue for them.

A free slot goes to the client with the fewest slots, then first come, first served, over all workers. A
download that is very slow gives its slot to those that wait, and continues without one.
"""

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from gup.cache.fair_shares import ClientCounts
from gup.cache.locks import Slots
from gup.config import Clients
from gup.content.key import Kind
from gup.errors import Problem
from gup.metrics import Counters
from gup.upstream.bandwidth import Turns

LARGE_BODY_BYTES = 256 * 1024  # bodies over this size take a download slot, except index files
_POLL_SECONDS = 0.01
_RATE_SECONDS = 30
_MOST_HOLDERS = 5
_LONGEST_RETRY_SECONDS = 300.0
NO_SLOT = -1


def is_download(kind: Kind, length: int | None) -> bool:
    """A body of unknown length may become large, so it takes one."""
    return kind is not Kind.INDEX and (length is None or length > LARGE_BODY_BYTES)


_LEAST_BYTES_PER_SECOND = 16 * 1024
_LEAST_SECONDS = 5
"""A download that has sent less than that for so long gives its slot to those who wait."""
_HELD_SHIFT = 54
_MOST_HELD = 63


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's claim to a download slot. `slot` is None while it waits, NO_SLOT when there is no limit.

    `on_admitted` is called once when a waiting ticket gets a slot; set it before the event loop runs.
    """

    since_ns: int
    client: str
    slot: int | None = None
    on_admitted: Callable[[], None] | None = None
    sent_bytes: Callable[[], int] | None = None
    """How much of the body has left, if it did not leave at once."""
    given_back: bool = False
    """Whether others have its slot already, since it is too slow."""
    looked_at: float = 0.0
    """When its rate was found high enough, on the monotonic clock, and how much had left by then."""
    sent_then: int = 0


class Downloads:
    """The downloads of one worker. `limits` is read at each decision, so a reload takes effect at once.

    `sum_of` makes a function that sums a series over all workers; `turns` has the first waiter of each, and
    `clients` how many each client has.
    """

    def __init__(
        self,
        slots: Slots,
        limits: Callable[[], Clients],
        counters: Counters,
        sum_of: Callable[[str], Callable[[], int]],
        turns: Turns,
        clients: ClientCounts,
    ) -> None:
        self._slots, self._limits, self._words, self._turns = slots, limits, counters.words, turns
        in_progress, queued = "gup_client_downloads_in_progress", "gup_client_downloads_queued"
        ended = "gup_client_downloads_total"
        self._in_progress, self._all_in_progress = counters.position(in_progress), sum_of(in_progress)
        self._queued, self._all_queued = counters.position(queued), sum_of(queued)
        self._ended, self._all_ended = counters.position(ended), sum_of(ended)
        self._clients = clients
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()
        self._limited: set[Ticket] = set()
        """Those under way that are counted for their client: there was a limit when they began."""
        self._timer: asyncio.Handle | None = None
        self._stopping = False
        self._ends: deque[int] = deque(maxlen=_RATE_SECONDS + 1)

    def take_ticket(self, client: str) -> Ticket:
        """A ticket for one large body, with a slot or waiting for one. Problem when the queue is full."""
        ticket = Ticket(time.monotonic_ns(), client)
        if self._turns.free() and self._may(client) and (slot := self._free_slot()) is not None:
            self._admit(ticket, slot)
            return ticket
        if self._stopping:
            raise stopping()
        self._words[self._queued] += 1
        # counted first, then compared: two workers can't both take the last place in the queue
        queued, most = self._all_queued(), self._limits().queue
        if queued > most or (2 * queued > most and self._has_most_of_queue(client)):
            self._words[self._queued] -= 1
            detail = f"{queued - 1} downloads are queued already, the limit set by clients.queue"
            raise Problem("overloaded", detail, retry_after_seconds=self._served_within(queued))
        self._waiting[ticket] = None
        self._ask()
        self._poll_in(_POLL_SECONDS)
        return ticket

    def _has_most_of_queue(self, client: str) -> bool:
        """Whether more than half of those who wait here are one client's, who must not take all places."""
        own = sum(ticket.client == client for ticket in self._waiting)
        return bool(client) and own > len(self._waiting) / 2

    def give_back(self, ticket: Ticket) -> None:
        """The body has been sent, or will not be: free the ticket's slot or its place in the queue."""
        if ticket.slot is None:
            self._leave_queue(ticket)
            return
        self._words[self._ended] += 1
        self._leave_slot(ticket)

    def _leave_slot(self, ticket: Ticket) -> None:
        if ticket.given_back:
            return
        ticket.given_back = True
        self._words[self._in_progress] -= 1
        if ticket in self._limited:
            self._limited.remove(ticket)
            self._clients.remove(ticket.client)
        if ticket.slot is not None and ticket.slot != NO_SLOT:
            self._slots.give_back(ticket.slot)
        if self._waiting:  # deferred: the caller is still ending another response
            self._poll_in(0.0)

    def holders(self) -> tuple[str, ...]:
        """Some of the clients that have slots here, those with the most first."""
        held = Counter(ticket.client for ticket in self._limited if not ticket.given_back)
        return tuple(client for client, _ in held.most_common(_MOST_HOLDERS))

    def each_second(self) -> None:
        self._ends.append(self._all_ended())
        if self._limited and self._all_queued():
            now = time.monotonic()
            for ticket in [ticket for ticket in self._limited if self._is_slow(ticket, now)]:
                self._leave_slot(ticket)

    def _is_slow(self, ticket: Ticket, now: float) -> bool:
        """Whether it has taken less than the least rate for some time: nobody else is to wait for it."""
        if now - ticket.looked_at < _LEAST_SECONDS:
            return False
        sent = ticket.sent_bytes() if ticket.sent_bytes is not None else 0
        slow = sent - ticket.sent_then < _LEAST_BYTES_PER_SECOND * (now - ticket.looked_at)
        ticket.looked_at, ticket.sent_then = now, sent
        return slow

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
            ticket = self._ask()
            if ticket is None or not self._turns.mine() or (slot := self._free_slot()) is None:
                self._poll_in(_POLL_SECONDS)
                break
            self._leave_queue(ticket)
            self._admit(ticket, slot)
            assert ticket.on_admitted is not None
            ticket.on_admitted()

    def _may(self, client: str) -> bool:
        most = self._limits().max_downloads_per_address
        return not most or self._clients.of(client) < most

    def _free_slot(self) -> int | None:
        # The sum needs no system call, looking at every slot one each; but only the slots' locks decide. The
        # sum includes downloads that began while there was no limit.
        most = self._limits().max_downloads
        if not most:
            return NO_SLOT
        return self._slots.try_take() if self._all_in_progress() < most else None

    def _admit(self, ticket: Ticket, slot: int) -> None:
        ticket.slot, ticket.looked_at = slot, time.monotonic()
        self._words[self._in_progress] += 1
        limits = self._limits()
        if limits.max_downloads or limits.max_downloads_per_address:
            self._limited.add(ticket)
            self._clients.add(ticket.client)

    def _leave_queue(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        self._words[self._queued] -= 1
        self._ask()

    def _ask(self) -> Ticket | None:
        """Who goes first of those who wait here and may, as the other workers are told."""
        most = self._limits().max_downloads_per_address or math.inf
        held = {client: self._clients.of(client) for client in {ticket.client for ticket in self._waiting}}
        ranks = [
            (min(held[ticket.client], _MOST_HELD) << _HELD_SHIFT | ticket.since_ns // 1000, ticket)
            for ticket in self._waiting
            if held[ticket.client] < most
        ]
        rank, first = min(ranks, key=itemgetter(0), default=(None, None))
        self._turns.ask(rank)
        return first

    def _served_within(self, downloads: int) -> float:
        """The time for this many downloads at the rate of the last half minute: then the queue has room."""
        ended = self._ends[-1] - self._ends[0] if self._ends else 0
        if ended <= 0:
            return float(_RATE_SECONDS)
        return min(max(1.0, downloads * (len(self._ends) - 1) / ended), _LONGEST_RETRY_SECONDS)


def stopping() -> Problem:
    return Problem("draining", "the service stops before this download has begun", retry_after_seconds=5)
