"""The way from a key to its body: the store's entry, or the one fill there is; never speaks HTTP."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from typing import TypeVar

from gup.cache.catalog_cache import spell
from gup.cache.disk import DiskError, on_disk
from gup.cache.follower import Follower
from gup.cache.growing_body import GrowingBody
from gup.cache.inflight import PRIORITIES, Flight, Landing, Means, hurry, outcome
from gup.cache.leader import Leader
from gup.cache.locks import Slots
from gup.cache.negative_cache import Failures
from gup.cache.open_entries import Entries, Entry, Opened, Result
from gup.cache.passthrough import Alone
from gup.cache.records import Head, Record, route_of
from gup.cache.recovery import is_fresh, load_sound
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.upstream.exchange import UpstreamFailure, gup_names

__all__ = ["Cache", "Opened", "Result"]

log = logging.getLogger("gup.cache")

_PATIENCE_FOR_FRESH_SECONDS = 1.0
"""A request for a stale index file waits this long for upstream before it is served what there is."""
_CIRCLE_SECONDS = 0.5
"""Between two looks at whether a gup that waits here is the one that the fill waits for."""
_MOST_FILLS = 3
"""For one request, when the entry is gone as soon as it is stored."""
_Result = TypeVar("_Result")


class Cache:
    """Everything this process has open, and every fill it leads or follows.

    `_flights` holds a key from the first request that misses it to the end of its fill. It changes in this
    class alone, on the loop.
    """

    def __init__(self, means: Means, *, max_open: int, bypass: Slots, range_bypass: Slots) -> None:
        self._means = means
        self._flights: dict[ContentKey, Flight] = {}
        self._tasks: dict[asyncio.Task[None], Flight | None] = {}
        """With the flight that a task brings to its end."""
        self._failures = Failures(means.clock)
        self.alone = Alone(means, self._failures, bypass, range_bypass)
        self._entries = Entries(means, max_open)
        self._entries.on_damage = self._damaged

    # --- opening

    async def open(self, route: Route, variant: Variant, via: str | None = None, client: str = "") -> Opened:
        """The body of `route` for clients of `variant`. Problem when there is none to be had.

        `via` is the request's: a fill that it begins hands it on. `client` is whose request it is.
        """
        key = route.key(variant)
        for candidate in route.keys(variant):
            flight = self._flights.get(candidate)
            if flight is not None and flight.suspect and flight.body is not None:
                return await self._filled(candidate, route, variant, via, client)  # it was demoted
            entry = await self._entries.get(candidate)
            if entry is None:
                continue
            if entry.damaged:
                self._damaged(entry)
            if route.immutable or is_fresh(self._means, entry.record):
                return self._opened(entry, route, Result.HIT)
            return await self._revalidated(entry, route, variant, via, client)
        try:
            return await self._filled(key, route, variant, via, client)
        except Problem:
            entry = await self._entries.get_damaged(key)
            if entry is None:
                raise
            return self._opened(entry, route, Result.HIT)

    def open_now(self, route: Route, variant: Variant) -> Opened | None:
        """As `open`, if that needs neither disk nor upstream: an entry that is open, verified and fresh."""
        entry = next(filter(None, map(self._entries.known, route.keys(variant))), None)
        if entry is None or (not route.immutable and not is_fresh(self._means, entry.record)):
            return None
        opened = self._opened(entry, route, Result.HIT)
        if not entry.all_verified:
            return None
        self._entries.used(entry)
        return opened

    def _opened(self, entry: Entry, route: Route, result: Result) -> Opened:
        age = max(0, int(self._means.wall_clock() - entry.record.validated_at))
        return Opened(entry, result, entry.key, route.kind, age, entry=entry)

    async def look(
        self, route: Route, variant: Variant, via: str | None = None, client: str = ""
    ) -> tuple[Head, Result, int]:
        """What GET would tell of a body, its result and age, without starting a fill: for HEAD."""
        key = route.key(variant)
        entry = None
        for candidate in route.keys(variant):
            entry = entry or await self._entries.get(candidate)
        if entry is not None and (route.immutable or is_fresh(self._means, entry.record)):
            opened = self._opened(entry, route, Result.HIT)
            return entry.head, opened.result, opened.age_seconds
        flight = self._flights.get(key)
        if flight is not None and flight.body is not None:
            return flight.body.head, Result.COLLAPSED, 0
        if (kept := self._means.memory.finished(key)) is not None:
            return kept.head, Result.BYPASS, 0
        try:
            return await self.alone.head(route, variant, via, client), Result.MISS, 0
        except Problem as problem:
            if entry is None or problem.status in (404, 410):
                raise
            opened = self._opened(entry, route, Result.STALE)
            return entry.head, opened.result, opened.age_seconds

    # --- entries

    async def _present_entry(self, key: ContentKey) -> Entry | None:
        """The entry as it is on disk now: the one that is open here may be of an older generation."""
        entry = self._entries.known(key)
        if entry is not None:
            record = await self._in_thread(load_sound, self._means, key)
            if record is not None:
                self._entries.adopt(entry, record)
        return await self._entries.get(key)

    def close_removed(self) -> None:
        """Close every entry whose file has no link left; call when the store's epoch was raised."""
        self._entries.close_removed()

    def look_over(self) -> None:
        """Doubt every open entry whose file somebody else has changed; to be called once a second."""
        for entry in self._entries.changed():
            self._compare_all(entry)

    # --- damage

    def _damaged(self, entry: Entry) -> None:
        """A chunk of an entry is not what was stored: have the entry demoted and its rest fetched again.

        It is counted under the claim, once for all processes that come to the damage at the same time.
        """
        self._compare_all(entry)
        entry.counted = True

    def _compare_all(self, entry: Entry) -> None:
        """Begin a fill that compares the whole entry, unless there is one, or one failed a moment ago."""
        flight = self._flights.get(entry.key)
        if flight is not None:
            if not flight.suspect:  # its commit is under way
                self._spawn(self._compare_after(flight, entry))
        elif self._failures.get(entry.key) is None:
            self._suspect(entry.record, counted=entry.counted, seen=entry.record.generation)

    async def _compare_after(self, flight: Flight, entry: Entry) -> None:
        await flight.ended.wait()
        self._compare_all(entry)

    def _suspect(self, record: Record, *, counted: bool, seen: int | None = None) -> Flight:
        key, since = record.key, self._means.clock()
        flight = Flight(
            key, route_of(record), key.variant, since=since, suspect=True, seen=seen, noted=counted
        )
        self._flights[key] = flight
        self._spawn(self._fly(flight), flight)
        return flight

    async def is_sound_at(self, opened: Opened, offset: int) -> bool:
        """Compare the chunk that an answer begins with, before its head is sent.

        False when it is damaged: open again, for the body of which it has become a part. Problem when the
        damaged chunk can't be had.
        """
        entry = opened.entry
        if entry is None or await entry.is_sound_at(offset):
            return True
        opened.body.leave()
        self._entries.drop(entry)
        flight = self._flights.get(entry.key)
        if flight is not None:
            await self._joined(flight, None)
            self._waiter_left()
        elif (failure := self._failures.get(entry.key)) is not None:
            raise failure
        return False

    async def mend(self, key: ContentKey, *, counted: bool) -> Problem | None:
        """Compare all of a stored body and fetch again what is damaged; why that failed, None if it is well.

        For the controller: it has no client's request to know the route from. `counted`: the damage that
        made it ask is.
        """
        while (flight := self._flights.get(key)) is not None and not flight.suspect:
            await flight.ended.wait()
        if flight is None:
            record = await self._in_thread(self._entries.load_record, key)
            if record is None:
                return Problem("upstream-not-found", "there is no record of it")
            flight = self._flights.get(key) or self._suspect(record, counted=counted)
        await flight.ended.wait()
        if flight.problem is None and flight.landing is Landing.UNSTORABLE:
            return Problem("overloaded", "it is damaged, and can't be stored", retry_after_seconds=10.0)
        return flight.problem

    # --- revalidation

    async def _revalidated(
        self, entry: Entry, route: Route, variant: Variant, via: str | None, client: str
    ) -> Opened:
        """A stale index file: ask upstream once for the whole machine; serve it stale if nobody answers."""
        fresher = await self._in_thread(load_sound, self._means, entry.key)
        if fresher is not None and self._entries.adopt(entry, fresher) and is_fresh(self._means, fresher):
            return self._opened(entry, route, Result.HIT)
        try:
            async with asyncio.timeout(_PATIENCE_FOR_FRESH_SECONDS):
                return await self._filled(entry.key, route, variant, via, client)
        except (Problem, TimeoutError) as error:
            if isinstance(error, Problem) and error.status in (404, 410):
                raise
            age = self._means.wall_clock() - entry.record.validated_at
            if age > self._means.settings.cache.max_stale:
                if isinstance(error, Problem):
                    raise
                return await self._filled(entry.key, route, variant, via, client)
            return self._opened(entry, route, Result.STALE)

    # --- fills

    async def _filled(
        self, key: ContentKey, route: Route, variant: Variant, via: str | None, client: str
    ) -> Opened:
        """By the fill there is, or a new one; by another one when the entry was purged or damaged at once."""
        for _ in range(_MOST_FILLS):
            opened = await self._filled_once(key, route, variant, via, client)
            if opened is not None:
                return opened
        raise Problem(
            "overloaded", "the entry was removed while it was opened; try again", retry_after_seconds=1.0
        )

    async def _filled_once(
        self, key: ContentKey, route: Route, variant: Variant, via: str | None, client: str
    ) -> Opened | None:
        if (failure := self._failures.get(key)) is not None:
            raise failure
        kept = self._means.memory.finished(key)
        if kept is not None:
            self._store_when_due(key, route, variant)
            age = max(0, int(self._means.wall_clock() - os.fstat(kept.fd).st_mtime))
            return Opened(kept.reader(), Result.BYPASS, key, route.kind, age)
        await self._refuse_circle(key, variant, via)
        flight = self._flights.get(key)
        first = flight is None
        late = flight is not None and flight.complete
        if flight is None:
            self._refuse_hopeless(key, route)
            flight = self._flights[key] = Flight(key, route, variant, via, client, since=self._means.clock())
            self._spawn(self._fly(flight), flight)
        hurry(self._means, flight)
        joined = await self._joined(flight, via)
        result = Result.MISS if first and flight.fetched else Result.COLLAPSED
        if isinstance(joined, GrowingBody):
            result = Result.BYPASS if joined.in_memory else Result.HIT if late else result
            late = late and not joined.in_memory
            return Opened(joined.reader(self._waiter_left, late=late), result, key, route.kind)
        self._waiter_left()
        if joined is Landing.UNSTORABLE:
            return await self.alone.whole(route, variant, via, client)
        entry = await self._present_entry(key)
        if entry is None:
            return None
        if joined is Landing.VALIDATED:
            return self._opened(entry, route, Result.REVALIDATED)
        return self._opened(entry, route, result if flight.fetched else Result.HIT)

    def _store_when_due(self, key: ContentKey, route: Route, variant: Variant) -> None:
        """Have a body that is in memory stored, unless that was tried within `cache.error_ttl`."""
        error_ttl = self._means.settings.cache.error_ttl
        if key not in self._flights and self._means.memory.store_is_due(key, error_ttl):
            flight = Flight(key, route, variant, since=self._means.clock(), from_memory=True)
            self._flights[key] = flight
            self._spawn(self._fly(flight), flight)

    async def fetch_ahead(self, route: Route, variant: Variant) -> bool:
        """Have a body in the store before anybody asks for it; whether it had to be fetched.

        Returns when its fill has ended. Problem when it can't be had, or can't be stored.
        """
        key = route.key(variant)
        entry = await self._entries.get(key)
        if entry is not None and (route.immutable or is_fresh(self._means, entry.record)):
            return False
        if (failure := self._failures.get(key)) is not None:
            raise failure
        flight = self._flights.get(key)
        if flight is None:
            flight = Flight(key, route, variant, since=self._means.clock(), ahead=True)
            self._flights[key] = flight
            self._spawn(self._fly(flight), flight)
        return await outcome(flight)

    def take_over(self, route: Route, variant: Variant, *, inherits: bool) -> asyncio.Event | None:
        """Go on with a fill that nobody leads or follows: it waits for its place as long as that takes.

        `inherits`: its leader died while it streamed. The event is set at the fill's end; None when this
        process has such a fill already.
        """
        key = route.key(variant)
        if key in self._flights:
            return None
        flight = Flight(
            key, route, variant, since=self._means.clock(), patient=not inherits, inherits=inherits
        )
        self._flights[key] = flight
        self._spawn(self._fly(flight), flight)
        return flight.ended

    async def _joined(self, flight: Flight, via: str | None = None) -> GrowingBody | Landing:
        """What the flight has to read. Its waiter is counted until `_waiter_left`, or the Problem.

        A gup that waits is looked at again and again: its name may be learned only now.
        """
        look_seconds = _CIRCLE_SECONDS if gup_names(via) else None
        self._means.counters.add("gup_fill_waiters", 1)
        try:
            async with asyncio.timeout(self._means.longest_wait_seconds):
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(look_seconds):
                            return await flight.join()
                    await self._refuse_circle(flight.key, flight.variant, via)
        except TimeoutError as error:
            self._waiter_left()
            raise Problem(
                "upstream-timeout", "no upstream has begun to answer yet", retry_after_seconds=5.0
            ) from error
        except BaseException:
            self._waiter_left()
            raise

    def _refuse_hopeless(self, key: ContentKey, route: Route) -> None:
        """What would wait too long for its place is refused before it costs a task or a look at the disk."""
        queue, priority = self._means.queue, PRIORITIES[route.kind]
        if queue.hopeless(priority) and not self._means.claims.taken(key.claim_offset):
            raise queue.refusal(priority)

    async def _refuse_circle(self, key: ContentKey, variant: Variant, via: str | None) -> None:
        """A request of the very gup that the fill waits for must not wait for the fill.

        That gup may be one that has not answered anything yet, since it waits itself.
        """
        if gup_names(via):
            await self._means.pool.learn_names(variant, key.text)
        try:
            self._means.pool.off_the_way(self._means.pool.candidates(variant, key.text), via)
        except UpstreamFailure as failure:
            raise Problem(failure.slug, failure.detail) from failure

    def _waiter_left(self) -> None:
        self._means.counters.add("gup_fill_waiters", -1)

    async def _fly(self, flight: Flight) -> None:
        """Lead the fill or follow its leader, whichever falls to this process, to the end."""
        try:
            while not flight.over:
                if await Follower(self._means, flight).run():
                    try:
                        await Leader(self._means, flight).run()
                    finally:
                        self._means.claims.release(flight.key.claim_offset)
        finally:
            del self._flights[flight.key]
            try:
                await self._landed(flight)
            finally:
                flight.ended.set()

    async def _landed(self, flight: Flight) -> None:
        if not flight.over:  # cancelled at the service's end, or a mistake of ours
            flight.fail(Problem("internal-error", "the fill ended in a way that was not foreseen"), 0.0)
        elif flight.problem is not None:
            self._failures.put(flight.key, flight.problem, flight.stands_seconds)
        elif flight.landing in (Landing.COMMITTED, Landing.VALIDATED):
            self._means.memory.drop(flight.key)
            with contextlib.suppress(DiskError):  # the next request tells
                await self._present_entry(flight.key)

    async def spell(self, route: Route, variant: Variant) -> str | None:
        """See gup.cache.catalog_cache."""
        candidates = self._means.pool.candidates(variant, route.key(variant).text)
        return await spell(self.open, route, candidates[0].variant if candidates else variant)

    # --- tasks

    def _spawn(self, work: Coroutine[None, None, None], flight: Flight | None = None) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = flight
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the cache failed", exc_info=error)

    @property
    def fills(self) -> int:
        """Fills that this process leads or follows, their last steps included."""
        return len(self._tasks)

    async def stop(self) -> None:
        """End all fills; their parts stay for resuming. Whole bodies are committed first."""
        tasks = list(self._tasks)
        for task in tasks:
            flight = self._tasks[task]
            if flight is None or not flight.settling:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._means.memory.close()
        self._entries.clear()

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        return await on_disk(self._means.executor, work, *arguments)
