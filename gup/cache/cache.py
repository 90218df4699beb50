"""The way from a key to its body: the store's entry, or the one fill there is; never speaks HTTP."""

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar

from gup.cache.body import Body, Entry, GrowingBody, read_whole
from gup.cache.bypass import BypassBody
from gup.cache.fill import Leader
from gup.cache.flight import Flight, Landing, Means
from gup.cache.follow import Follower
from gup.cache.heads import head_of
from gup.cache.prior import is_fresh, load_sound, note_damage
from gup.cache.record import Head, Record
from gup.cache.slots import Slots
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog, respelled
from gup.content.key import ANY, ContentKey, Kind, Variant
from gup.content.routes import Route, Routes
from gup.errors import Problem
from gup.upstream.connection import Answer, Ask
from gup.upstream.exchange import RemoteHead, UpstreamFailure

log = logging.getLogger("gup.cache")

_PATIENCE_FOR_FRESH_SECONDS = 1.0
"""A request for a stale index file waits this long for upstream before it is served what there is."""
_RATE_KNOWN_SECONDS = 0.5
"""A fill's rate means nothing before it has gone on for so long."""
_DIFFICULT_FLIGHT = Problem("internal-error", "the fill ended in a way that was not foreseen")
_CATALOG = Routes().route(CATALOG_PATH)
_Result = TypeVar("_Result")


class Result(StrEnum):
    """How a request came to its body: label `result` of the metrics."""

    HIT = "hit"
    MISS = "miss"
    COLLAPSED = "collapsed"
    REVALIDATED = "revalidated"
    STALE = "stale"
    BYPASS = "bypass"


@dataclass(slots=True)
class Opened:
    """A body to read, and how the request came to it. `ranges`: whether spans of it may be served."""

    body: Body
    result: Result
    key: ContentKey
    kind: Kind
    age_seconds: int = 0
    ranges: bool = True
    entry: Entry | None = None


@dataclass(slots=True)
class _Failures:
    """Failures that still stand, remembered in this process so that they cost no look at the disk."""

    clock: Callable[[], float]
    rows: OrderedDict[ContentKey, tuple[float, Problem]] = field(default_factory=OrderedDict)

    def get(self, key: ContentKey) -> Problem | None:
        row = self.rows.get(key)
        if row is None:
            return None
        left = row[0] - self.clock()
        if left <= 0:
            del self.rows[key]
            return None
        problem = row[1].again()
        if problem.retry_after_seconds is not None:
            problem.retry_after_seconds = max(left, 1.0)
        return problem

    def put(self, key: ContentKey, problem: Problem, ttl_seconds: float) -> None:
        self.rows[key] = (self.clock() + ttl_seconds, problem)
        self.rows.move_to_end(key)
        while len(self.rows) > 10_000:
            self.rows.popitem(last=False)


class Cache:
    """Everything this process has open, and every fill it leads or follows.

    `_entries` is in order of use; `_flights` holds a key from the first request that misses it to the end of
    its fill. Both change in this class alone, on the loop.
    """

    def __init__(self, means: Means, *, max_open: int, bypass: Slots, range_bypass: Slots) -> None:
        self._means = means
        self._max_open = max_open
        self._entries: OrderedDict[ContentKey, Entry] = OrderedDict()
        self._flights: dict[ContentKey, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = _Failures(means.clock)
        self._epoch = means.store_epoch()
        self._bypass = bypass
        self._range_bypass = range_bypass

    # --- opening

    async def open(self, route: Route, variant: Variant, via: str | None = None) -> Opened:
        """The body of `route` for clients of `variant`. Problem when there is none to be had.

        `via` is the request's: a fill that it begins hands it on.
        """
        key = route.key(variant)
        for candidate in dict.fromkeys((key, route.key(Variant(ANY, ANY)))):
            entry = await self._entry(candidate)
            if entry is None:
                continue
            if route.immutable or is_fresh(self._means, entry.record):
                return self._opened(entry, route, Result.HIT)
            return await self._revalidated(entry, route, variant, via)
        return await self._filled(key, route, variant, via)

    def open_now(self, route: Route, variant: Variant) -> Opened | None:
        """As `open`, if that needs neither disk nor upstream: an entry that is open, verified and fresh."""
        self._heed_epoch()
        entry = self._entries.get(route.key(variant)) or self._entries.get(route.key(Variant(ANY, ANY)))
        if entry is None or not entry.all_verified:
            return None
        if not route.immutable and not is_fresh(self._means, entry.record):
            return None
        self._entries.move_to_end(entry.key)
        return self._opened(entry, route, Result.HIT)

    def _opened(self, entry: Entry, route: Route, result: Result) -> Opened:
        age = max(0, int(self._means.wall_clock() - entry.record.validated_at))
        return Opened(entry, result, entry.key, route.kind, age, entry=entry)

    async def look(self, route: Route, variant: Variant, via: str | None = None) -> tuple[Head, Result, int]:
        """What GET would tell of a body, its result and age, without starting a fill: for HEAD."""
        key = route.key(variant)
        entry = None
        for candidate in dict.fromkeys((key, route.key(Variant(ANY, ANY)))):
            entry = entry or await self._entry(candidate)
        if entry is not None and (route.immutable or is_fresh(self._means, entry.record)):
            opened = self._opened(entry, route, Result.HIT)
            return entry.head, opened.result, opened.age_seconds
        flight = self._flights.get(key)
        if flight is not None and flight.body is not None:
            return flight.body.head, Result.COLLAPSED, 0
        try:
            return await self._look_upstream(key, route, variant, via)
        except Problem as problem:
            if entry is None or problem.status in (404, 410):
                raise
            opened = self._opened(entry, route, Result.STALE)
            return entry.head, opened.result, opened.age_seconds

    async def _look_upstream(
        self, key: ContentKey, route: Route, variant: Variant, via: str | None
    ) -> tuple[Head, Result, int]:
        failure = self._failures.get(key)
        if failure is not None:
            raise failure
        remote = await self._ask(route, variant, "HEAD", via, {})
        assert isinstance(remote, RemoteHead)
        head = head_of(key, remote)
        if remote.etag is None and remote.last_modified is None:
            head = replace(head, etag=None)  # it would be one of chance, and GET's another
        return head, Result.MISS, 0

    # --- entries

    async def _entry(self, key: ContentKey) -> Entry | None:
        self._heed_epoch()
        entry = self._entries.get(key)
        if entry is None:
            entry = await self._in_thread(self._load, key)
            if entry is None:
                return None
            entry = self._entries.setdefault(key, entry)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_open:
            self._entries.popitem(last=False)
        if not await entry.verify_first():
            return None
        return entry

    async def _present_entry(self, key: ContentKey) -> Entry | None:
        """The entry as it is on disk now: the one that is open here may be of an older generation."""
        entry = self._entries.get(key)
        if entry is not None:
            record = await self._in_thread(load_sound, self._means, key)
            if record is not None:
                self._adopt(entry, record)
        return await self._entry(key)

    def _load(self, key: ContentKey) -> Entry | None:
        record = load_sound(self._means, key)
        file = self._means.store.open_body(record) if record is not None else None
        if record is None or file is None:
            return None
        return Entry(record, file, self._means.executor, self._damaged)

    def _damaged(self, entry: Entry) -> None:
        """A chunk is not what was stored: the entry goes, the next request fetches the body anew."""
        note_damage(self._means, "body", entry.key, "a chunk does not agree with its sum")
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        self._spawn(self._remove(entry))

    async def _remove(self, entry: Entry) -> None:
        removed = await self._in_thread(self._means.store.remove_body, entry.record)
        if removed:
            self._means.raise_store_epoch()

    def _heed_epoch(self) -> None:
        epoch = self._means.store_epoch()
        if epoch != self._epoch:
            self._epoch = epoch
            self.close_removed()

    def close_removed(self) -> list[Entry]:
        """Close every entry whose file has no link left; call when the store's epoch was raised."""
        gone = [entry for entry in self._entries.values() if os.fstat(entry.fd).st_nlink == 0]
        for entry in gone:
            del self._entries[entry.key]
        return gone

    # --- revalidation

    async def _revalidated(self, entry: Entry, route: Route, variant: Variant, via: str | None) -> Opened:
        """A stale index file: ask upstream once for the whole machine; serve it stale if nobody answers."""
        fresher = await self._in_thread(load_sound, self._means, entry.key)
        if fresher is not None and self._adopt(entry, fresher) and is_fresh(self._means, fresher):
            return self._opened(entry, route, Result.HIT)
        try:
            async with asyncio.timeout(_PATIENCE_FOR_FRESH_SECONDS):
                return await self._filled(entry.key, route, variant, via)
        except (Problem, TimeoutError) as error:
            if isinstance(error, Problem) and error.status in (404, 410):
                raise
            age = self._means.wall_clock() - entry.record.validated_at
            if age > self._means.settings.cache.max_stale:
                if isinstance(error, Problem):
                    raise
                return await self._filled(entry.key, route, variant, via)
            return self._opened(entry, route, Result.STALE)

    def _adopt(self, entry: Entry, record: Record) -> bool:
        """Take over what another process learned of the same body."""
        if record.etag != entry.record.etag or record.body_mtime_ns != entry.record.body_mtime_ns:
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
            return False
        entry.record = record
        return True

    # --- fills

    async def _filled(self, key: ContentKey, route: Route, variant: Variant, via: str | None) -> Opened:
        failure = self._failures.get(key)
        if failure is not None:
            raise failure
        self._refuse_circle(variant, via)
        flight = self._flights.get(key)
        first = flight is None
        if flight is None:
            flight = self._flights[key] = Flight(key, route, variant, via)
            self._spawn(self._fly(flight))
        self._means.counters.add("gup_fill_waiters", 1)
        try:
            async with asyncio.timeout(self._longest_wait()):
                joined = await flight.join()
        except TimeoutError as error:
            self._waiter_left()
            raise Problem(
                "upstream-timeout", "no upstream has begun to answer yet", retry_after_seconds=5.0
            ) from error
        except BaseException:
            self._waiter_left()
            raise
        result = Result.MISS if first and flight.fetched else Result.COLLAPSED
        if isinstance(joined, GrowingBody):
            joined.readers += 1
            joined.on_leave = self._waiter_left
            return Opened(joined, result, key, route.kind)
        self._waiter_left()
        if joined is Landing.UNSTORABLE:
            return await self._passed_through(key, route, variant, via)
        entry = await self._present_entry(key)
        if entry is None:
            raise Problem("internal-error", "the entry was gone at once", retry_after_seconds=1.0)
        if joined is Landing.VALIDATED:
            return self._opened(entry, route, Result.REVALIDATED)
        return self._opened(entry, route, result if flight.fetched else Result.HIT)

    def _refuse_circle(self, variant: Variant, via: str | None) -> None:
        """A request of the very gup that the fill waits for must not wait for the fill."""
        pool = self._means.pool
        try:
            pool.off_the_way(pool.candidates(variant), via)
        except UpstreamFailure as failure:
            raise Problem(failure.slug, failure.detail) from failure

    def _waiter_left(self) -> None:
        self._means.counters.add("gup_fill_waiters", -1)

    def _longest_wait(self) -> float:
        settings = self._means.settings
        slowest = max((u.connect_timeout + u.read_timeout for u in settings.upstream), default=1.0)
        return settings.fill.queue_timeout + 2 * slowest

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
            await self._landed(flight)

    async def _landed(self, flight: Flight) -> None:
        if not flight.over:  # cancelled at the service's end, or a mistake of ours
            flight.fail(_DIFFICULT_FLIGHT, 0.0)
        elif flight.problem is not None:
            self._failures.put(flight.key, flight.problem, flight.stands_seconds)
        elif flight.landing in (Landing.COMMITTED, Landing.VALIDATED):
            with contextlib.suppress(OSError):  # the next request tells
                await self._present_entry(flight.key)

    async def spell(self, route: Route, variant: Variant) -> str | None:
        """The path with the moniker as the manager's catalogue spells it, or in upper case without one.

        An upstream's file system may tell upper from lower case; clients' spellings differ (FIELD).
        """
        if not route.stream.startswith("{"):
            return None
        listed = await self._catalog(variant)
        if listed is None:
            return respelled(route.upstream_path, route.stream)
        row = listed.get(route.stream)
        return respelled(route.upstream_path, row.moniker) if row is not None else None

    async def _catalog(self, variant: Variant) -> Mapping[str, Listed] | None:
        """The catalogue of the variant's manager; None when it has none or can't be asked."""
        try:
            opened = await self.open(_CATALOG, variant)
        except Problem:
            return None
        try:
            return parse_catalog(await read_whole(opened.body, MAX_CATALOG_BYTES))
        finally:
            opened.body.leave()

    # --- bypass

    async def fetch_span(
        self,
        opened: Opened,
        route: Route,
        variant: Variant,
        start: int,
        stop: int,
        via: str | None = None,
    ) -> BypassBody | None:
        """A span far ahead of the fill, fetched alone; None when waiting for the fill is as good.

        Decided as DESIGN says: further ahead than `fill.range_wait` at the present rate, at most two at once.
        """
        body = opened.body
        if not isinstance(body, GrowingBody) or body.end() is None:
            return None
        if not await self._is_far(body, start):
            return None
        place = self._range_bypass.try_take()
        if place is None:
            return None
        try:
            answer = await self._ask(
                route,
                variant,
                "GET",
                via,
                {"start": start, "stop": stop, "if_range": body.head.upstream_etag},
            )
            assert isinstance(answer, Answer)
            if answer.head.start != start or answer.head.length != body.head.length:
                answer.close()
                self._range_bypass.give_back(place)
                return None
        except Problem:
            self._range_bypass.give_back(place)
            return None
        except BaseException:
            self._range_bypass.give_back(place)
            raise
        return BypassBody(body.head, answer, stop, lambda: self._range_bypass.give_back(place))

    async def _is_far(self, body: GrowingBody, offset: int) -> bool:
        """Whether the fill will take longer than `fill.range_wait`; a young fill's rate is waited for."""
        clock = self._means.clock
        left = _RATE_KNOWN_SECONDS - body.age_seconds(clock())
        if left > 0 and offset >= body.published:
            reached = asyncio.Event()
            body.wait(offset, reached.set)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await reached.wait()
            body.forget(reached.set)
        return body.seconds_to(offset, clock()) > self._means.settings.fill.range_wait

    async def _passed_through(
        self, key: ContentKey, route: Route, variant: Variant, via: str | None
    ) -> Opened:
        """What can't be stored, passed on singly."""
        place = self._bypass.try_take()
        if place is None:
            raise Problem(
                "overloaded",
                "this content can't be stored here, and as many clients as may be are being passed through",
                retry_after_seconds=10.0,
            )
        try:
            answer = await self._ask(route, variant, "GET", via, {})
        except BaseException:
            self._bypass.give_back(place)
            raise
        assert isinstance(answer, Answer)
        body = BypassBody(head_of(key, answer.head), answer, None, lambda: self._bypass.give_back(place))
        return Opened(body, Result.BYPASS, key, route.kind, ranges=False)

    async def _ask(
        self, route: Route, variant: Variant, method: str, via: str | None, span: dict[str, object]
    ) -> Answer | RemoteHead:
        """One request for one client, at each upstream in turn until one answers."""
        pool = self._means.pool
        problem, key = Problem("no-upstream", f"no upstream has {variant}"), route.key(variant)
        try:
            admitted = pool.admitted(variant, key.text, via)
        except UpstreamFailure as failure:
            raise Problem(failure.slug, failure.detail, retry_after_seconds=2.0) from failure
        for upstream in admitted:
            stream = (self._means.streams.number(key), str(route.kind))
            ask = Ask(
                path=route.upstream_path,
                purpose="bypass",
                stream=stream,
                method=method,
                via=via,
                **span,  # type: ignore[arg-type]
            )
            try:
                answer = await pool.ask(upstream, ask)
            except UpstreamFailure as failure:
                problem = Problem(failure.slug, failure.detail, retry_after_seconds=2.0)
                continue
            if isinstance(answer, RemoteHead) and answer.status != 200:
                slug = "upstream-gone" if answer.status == 410 else "upstream-not-found"
                problem = Problem(slug, f"{answer.upstream} answered {answer.status}")
                self._failures.put(route.key(variant), problem, self._means.settings.cache.negative_ttl)
                break
            return answer
        raise problem

    # --- tasks

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the cache failed", exc_info=error)

    @property
    def fills(self) -> int:
        """Fills that this process leads or follows."""
        return len(self._flights)

    async def stop(self) -> None:
        """End all fills; their parts stay for resuming."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        self._entries.clear()

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._means.executor, work, *arguments)
