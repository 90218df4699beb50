"""What a fill owes the others when nobody waits for it: it takes nobody's place and gives way to all.

Decides not what is fetched ahead, nor when. As soon as a client asks for such a body, in any process, its
fill becomes one like any other (`hurry`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from gup.cache.flight import PRIORITIES, Flight, Landing, Means
from gup.cache.locks import want_offset
from gup.cache.queue import Place
from gup.errors import Problem

_LOOK_SECONDS = 0.02
"""Between two looks at what others do: a client that asks waits no longer for its fill to be hurried."""


def hurry(means: Means, flight: Flight) -> None:
    """Somebody waits for it from now on."""
    if flight.ahead:
        flight.ahead = False
        flight.share.priority = PRIORITIES[flight.route.kind]
        means.pool.wan.sort_anew(flight.share)


async def outcome(flight: Flight) -> bool:
    """Wait for its end; whether this process fetched it. Problem when it is not stored now."""
    await flight.ended.wait()
    if flight.problem is not None:
        raise flight.problem.again()
    if flight.landing is Landing.UNSTORABLE:
        raise Problem("overloaded", "it can't be stored: it is too large, or the disk refuses it")
    return flight.fetched


class Courtesy:
    """One leader's. The WAN's order alone would not do: without a rate, or with one that is higher than what
    the link carries, there is none.
    """

    def __init__(self, means: Means, flight: Flight) -> None:
        self._means = means
        self._flight = flight
        self._next_look = 0.0
        self._place: Place | None = None
        self._had_place = False
        """Whether it has had one already: then it is not the queue that its clients have waited for."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[bool]:
        """Hold a place to fill for the block, or until it is left; False when there is none in time.

        A fill ahead needs none: it streams only while nobody else does, and its caller begins few at once.
        """
        means, flight = self._means, self._flight
        if flight.ahead:
            watching = asyncio.get_running_loop().create_task(self._watch())
            try:
                yield True
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
            return
        waited_seconds = 0.0 if self._had_place else means.clock() - flight.since
        async with means.queue.held(
            PRIORITIES[flight.route.kind], waited_seconds, inherits=flight.inherits, patient=flight.patient
        ) as held:
            self._place = held
            self._had_place = held is not None
            yield self._had_place

    def leave_place(self) -> None:
        """The fill needs nothing more of the link."""
        if self._place is not None:
            self._place.leave()

    async def _watch(self) -> None:
        """Until another process's client wants the body: that process holds the lock beside the claim."""
        offset = want_offset(self._flight.key.id)
        while self._flight.ahead:
            if self._means.claims.taken(offset):
                hurry(self._means, self._flight)
            await asyncio.sleep(_LOOK_SECONDS)

    async def give_way(self) -> None:
        """Return when no other fill streams or waits; at once when somebody waits for this one."""
        while self._flight.ahead and self._means.clock() >= self._next_look:
            if self._means.queue.idle():
                self._next_look = self._means.clock() + _LOOK_SECONDS
                return
            await asyncio.sleep(_LOOK_SECONDS)


class Want:
    """Tells the leader in another process that somebody waits here. Held until `drop`."""

    def __init__(self, means: Means, flight: Flight) -> None:
        self._means = means
        self._flight = flight
        self._offset = want_offset(flight.key.id)
        self._held = False

    def tell(self) -> None:
        """Take the lock when somebody waits; another process's does as well. Cheap (one system call)."""
        if not self._held and self._flight.wanted:
            with contextlib.suppress(OSError):  # the kernel has no lock left: the fill is only not hurried
                self._held = self._means.claims.try_claim(self._offset)

    def drop(self) -> None:
        if self._held:
            self._held = False
            self._means.claims.release(self._offset)
