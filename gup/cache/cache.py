"""The cache: returns a key's body, from the store or from its one fill. No HTTP here."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from dataclasses import replace

from gup.cache.body import GrowingBody
from gup.cache.catalog_cache import spell
from gup.cache.disk import DiskError, disk_errors, on_disk, refusal
from gup.cache.follower import Follower
from gup.cache.inflight import Fill, FillDependencies, FillEnd
from gup.cache.leader import Leader
from gup.cache.locks import Slots
from gup.cache.open_entries import Entries, Entry, Opened, Result
from gup.cache.passthrough import PassThrough, too_many_misses
from gup.cache.records import Failure, Head, Phase, Record, route_of
from gup.cache.recovery import Leftover, examine, is_fresh
from gup.cache.store import OpenFile
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.errors import Problem, exhausted, is_exhausted
from gup.phases import ELSEWHERE, FillClock, RequestClock
from gup.upstream.exchange import UpstreamFailure

__all__ = ["Cache", "Opened", "Result"]

log = logging.getLogger("gup.cache")

_PATIENCE_FOR_FRESH_SECONDS = 1.0
"""A request for a stale index file waits this long for upstream before it is served the stale one."""
_CIRCLE_SECONDS = 0.5
"""A waiting gup is checked this often for being the upstream of the fill it waits for."""
_FIRST_LOOK_SECONDS = 0.5
"""What another process has of a body is seen within this time, also on a busy machine."""
_SLOW_SECONDS, _MOST_TOLD = 1.0, 50
_MOST_FILLS = 3
"""Fills per request, when the entry is removed as soon as it is stored."""
_Found = tuple[Record, OpenFile, bool]
"""An entry on disk: its record, its body, and whether its chunks are trusted without comparing them."""
_LookedUp = _Found | Leftover | FillEnd | Failure | None
"""An entry; what a claimed fill begins with; how it ends at once; None when another process has the claim."""


class Cache:
    """All entries that this process has open, and every fill it leads or follows.

    `_fills` is the in-flight table: it holds a key from the first request that does not find it open to the
    end of its fill. It changes in this class alone, on the loop.
    """

    def __init__(
        self, dependencies: FillDependencies, *, max_open: int, bypass: Slots, range_bypass: Slots
    ) -> None:
        self._deps = dependencies
        self._fills: dict[ContentKey, Fill] = {}
        self._waiters_at = dependencies.counters.position("gup_fill_waiters")
        self._tasks: dict[asyncio.Task[None], Fill | None] = {}
        """Tasks, each with its fill if any."""
        self.pass_through = PassThrough(dependencies, bypass, range_bypass)
        self._entries = Entries(dependencies, max_open)
        self._entries.on_damage = self._damaged

    # --- opening

    async def open(
        self,
        route: Route,
        variant: Variant,
        passed: tuple[str, ...] = (),
        client: str = "",
        *,
        background: bool = False,
        waits: RequestClock | None = None,
    ) -> Opened:
        """The body of `route` for clients of `variant`. Problem when it can't be had.

        `passed` are the gups that the request came through: a fill begun for it passes them upstream.
        `client` is its address. `background`: no client waits for it, but another member's background fill.
        `waits` is the request's clock.
        """
        for key in route.keys(variant):
            fill = self._current(key)
            if fill is not None and fill.suspect and fill.body is not None:  # the entry was demoted
                return await self._filled(key, route, variant, passed, client, waits=waits)
            entry = self._entries.known(key)
            if entry is None and not route.immutable and fill is None:
                entry = await self._entries.get(key)  # even if it is stale; fills look up the others
            if entry is None:
                continue
            self._entries.used(entry)
            if entry.damaged:
                self._damaged(entry)
            if route.immutable or is_fresh(self._deps, entry.record):
                return self._opened(entry, route, Result.HIT)
            return await self._revalidated(entry, route, variant, passed, client, waits)
        key = route.key(variant)
        try:
            return await self._filled(key, route, variant, passed, client, background=background, waits=waits)
        except Problem:
            entry = await self._entries.get_damaged(key)
            if entry is None:
                raise
            return self._opened(entry, route, Result.HIT)

    def open_now(self, route: Route, variant: Variant) -> Opened | None:
        """As `open`, but only for an entry that is open, verified and fresh: no disk, no upstream."""
        entry = next(filter(None, map(self._entries.known, route.keys(variant))), None)
        if entry is None or (not route.immutable and not is_fresh(self._deps, entry.record)):
            return None
        opened = self._opened(entry, route, Result.HIT)
        if not entry.all_verified:
            return None
        self._entries.used(entry)
        return opened

    async def held(self, key: ContentKey, route: Route, *, background: bool = False) -> Opened | None:
        """The body if it is stored, or arrives here from the WAN at this moment; nothing is fetched.

        A background fill that it comes from is promoted, unless it is wanted for another one's `background`.
        """
        if (stored := await self._stored(key, route)) is not None:
            return stored
        fill = self._current(key)
        if fill is None and await self._arrives_elsewhere(key):
            joining = Fill(key, route, key.variant, joins=True, background=background)
            fill = self._current(key) or self._begin(joining)
            with contextlib.suppress(Problem, TimeoutError):
                async with asyncio.timeout(_FIRST_LOOK_SECONDS):
                    if isinstance(body := await fill.join(), GrowingBody):
                        body.leave()
        if fill is not None and not background:
            fill.promote(self._deps.pool.wan)
        if fill is not None and fill.body is not None and fill.from_wan():
            return Opened(fill.body.reader(), Result.COLLAPSED, key, route.kind)
        return await self._stored(key, route)  # its fill may have ended since the first look

    async def _stored(self, key: ContentKey, route: Route) -> Opened | None:
        entry = await self._entries.get(key)
        if entry is None or not (route.immutable or is_fresh(self._deps, entry.record)):
            return None
        self._entries.used(entry)
        return self._opened(entry, route, Result.HIT)

    async def _arrives_elsewhere(self, key: ContentKey) -> bool:
        """Whether another process of this node has a part of the body and goes on with it."""
        if not self._deps.claims.taken(key.claim_offset):
            return False
        try:
            state = await on_disk(self._deps.executor, self._deps.store.load_state, key.id)
        except (DiskError, ValueError):
            return False
        return state is not None and state.phase is Phase.STREAMING

    async def has_part(self, key: ContentKey) -> bool:
        """Whether its body arrives at this node, from wherever, or will go on soon."""
        fill = self._current(key)
        here = fill is not None and fill.body is not None and not fill.body.ended
        return here or await self._arrives_elsewhere(key)

    async def span_alone(
        self,
        opened: Opened,
        route: Route,
        variant: Variant,
        start: int,
        stop: int,
        passed: tuple[str, ...] = (),
    ) -> Opened:
        """Fetch a range of a growing body separately if the fill will not reach it soon; else as opened."""
        try:
            body = await self.pass_through.range(opened, route, variant, start, stop, passed)
        except BaseException:
            opened.body.leave()  # the client has gone
            raise
        if body is None:
            return opened
        opened.body.leave()
        return replace(opened, body=body, result=Result.BYPASS)

    def _opened(self, entry: Entry, route: Route, result: Result) -> Opened:
        age = max(0, int(self._deps.wall_clock() - entry.record.validated_at))
        return Opened(entry, result, entry.key, route.kind, age, entry=entry)

    async def head(
        self, route: Route, variant: Variant, passed: tuple[str, ...] = (), client: str = ""
    ) -> tuple[Head, Result, int]:
        """The head, result and age that GET would have, without starting a fill: for HEAD."""
        key = route.key(variant)
        entry = None
        for candidate in route.keys(variant):
            entry = entry or await self._entries.get(candidate)
        if entry is not None and (route.immutable or is_fresh(self._deps, entry.record)):
            return entry.head, Result.HIT, self._opened(entry, route, Result.HIT).age_seconds
        fill = self._current(key)
        if fill is not None and fill.body is not None:
            return fill.body.head, Result.COLLAPSED, 0
        if (kept := self._in_memory(key, route)) is not None:
            return kept.head, Result.BYPASS, 0
        try:
            return await self.pass_through.head(route, variant, passed, client), Result.MISS, 0
        except Problem as problem:
            if entry is None or problem.status in (404, 410):
                raise
            return entry.head, Result.STALE, self._opened(entry, route, Result.STALE).age_seconds

    async def _revalidated(
        self,
        entry: Entry,
        route: Route,
        variant: Variant,
        passed: tuple[str, ...],
        client: str,
        waits: RequestClock | None,
    ) -> Opened:
        """A stale index file: ask upstream once for the whole machine; serve it stale without an answer."""
        try:
            async with asyncio.timeout(_PATIENCE_FOR_FRESH_SECONDS):
                return await self._filled(entry.key, route, variant, passed, client, waits=waits)
        except (Problem, TimeoutError) as error:
            if isinstance(error, Problem) and error.status in (404, 410):
                raise
            age = self._deps.wall_clock() - entry.record.validated_at
            if age > self._deps.settings.cache.max_stale:
                if isinstance(error, Problem):
                    raise
                return await self._filled(entry.key, route, variant, passed, client, waits=waits)
            return self._opened(entry, route, Result.STALE)

    async def _filled(
        self,
        key: ContentKey,
        route: Route,
        variant: Variant,
        passed: tuple[str, ...],
        client: str,
        *,
        background: bool = False,
        waits: RequestClock | None = None,
    ) -> Opened:
        """Join the current fill or begin one; begin another when the entry was purged or damaged at once."""
        deps = self._deps
        for number in range(1, _MOST_FILLS + 1):
            if (failure := deps.failures.get(key, route.upstream_path)) is not None:
                raise failure
            kept = self._in_memory(key, route)
            if kept is not None:
                return self._kept_in_memory(kept, key, route, variant)
            if passed:
                await self._refuse_circle(key, variant, passed)
            fill = self._current(key)
            first, late = fill is None, fill is not None and fill.body is not None and fill.body.ended
            fill = fill or self._begin_for(Fill(key, route, variant, passed, client, background=background))
            fill.request(deps.pool.wan, background=background)
            try:
                joined = await self._joined(fill, passed, waits)
            except Problem as problem:
                # A client has joined just when its background fill was held back: the client's own may begin.
                other_class = not background and problem.extensions.get("held") == "background"
                another = other_class or fill.allows_another(route.upstream_path, passed)
                if number == _MOST_FILLS or not another:
                    raise
                await fill.ended.wait()
                continue
            result = Result.HIT if late else Result.MISS if first and fill.fetched else Result.COLLAPSED
            if isinstance(joined, GrowingBody):
                return Opened(joined, Result.BYPASS if joined.in_memory else result, key, route.kind)
            if joined is FillEnd.UNSTORABLE:
                return await self.pass_through.whole(route, variant, passed, client, waits)
            entry = next(filter(None, map(self._entries.known, (key, *route.keys(variant)))), None)
            entry = entry or await self._entries.get(key)
            if entry is not None:
                result = Result.REVALIDATED if joined is FillEnd.VALIDATED else result
                return self._opened(entry, route, result if fill.fetched else Result.HIT)
        raise Problem(
            "overloaded", "the entry was removed while it was opened; try again", retry_after_seconds=1.0
        )

    def _begin_for(self, fill: Fill) -> Fill:
        """Begin a fill; Problem when the client asks for too much that is not open here."""
        if not fill.background and not self._deps.count_miss(fill.client):
            raise too_many_misses(self._deps)
        return self._begin(fill)

    def _in_memory(self, key: ContentKey, route: Route) -> GrowingBody | None:
        """A complete body that could not be stored; one that a purge names is removed."""
        body = self._deps.memory.finished(key)
        if body is not None and self._deps.purges.name_head(key, route.kind, body.head):
            self._deps.memory.drop(key)
            return None
        return body

    def _kept_in_memory(self, body: GrowingBody, key: ContentKey, route: Route, variant: Variant) -> Opened:
        """A body that could not be stored; storing it is retried from time to time."""
        deps = self._deps
        if key not in self._fills and deps.memory.store_is_due(key, deps.settings.cache.error_ttl):
            self._begin(Fill(key, route, variant, from_memory=True))
        age = max(0, int(deps.wall_clock() - os.fstat(body.fd).st_mtime))
        return Opened(body.reader(), Result.BYPASS, key, route.kind, age)

    async def _joined(
        self, fill: Fill, passed: tuple[str, ...] = (), waits: RequestClock | None = None
    ) -> GrowingBody | FillEnd:
        """What there is to read. The Via names of waiting gups are checked repeatedly: they may be learned
        late.
        """
        if fill.background:
            return await fill.join()
        self._count_waiters(1)
        if waits is not None:
            waits.wait_for(fill.times)
        try:
            async with asyncio.timeout(self._deps.longest_wait_seconds):
                while passed:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_CIRCLE_SECONDS):
                            return await fill.join()
                    await self._refuse_circle(fill.key, fill.variant, passed)
                return await fill.join()
        except TimeoutError as error:
            raise Problem(
                "upstream-timeout", "no upstream has begun to answer yet", retry_after_seconds=5.0
            ) from error
        finally:
            self._count_waiters(-1)
            if waits is not None:
                waits.enter("disk")
                waits.close_wait()

    def _count_waiters(self, change: int) -> None:
        self._deps.counters.words[self._waiters_at] += change

    async def _refuse_circle(self, key: ContentKey, variant: Variant, passed: tuple[str, ...]) -> None:
        """A request of the gup that the fill waits for must not wait for the fill.

        That gup may not have answered anything yet, since it waits itself.
        """
        pool = self._deps.pool
        await pool.learn_names(variant, key.text)
        try:
            pool.candidates(variant, key.text, passed)
        except UpstreamFailure as failure:
            raise Problem(failure.slug, failure.detail) from failure

    # --- background fills

    async def prefetch(self, route: Route, variant: Variant, *, urgent: bool = False) -> bool:
        """Store a body before a client asks for it; whether it had to be fetched.

        Returns when its fill has ended. Problem when it can't be had, or can't be stored. An `urgent` one
        takes its turn among clients' fills instead of yielding to them.
        """
        key = route.key(variant)
        entry = await self._entries.get(key)
        if entry is not None and (route.immutable or is_fresh(self._deps, entry.record)):
            return False
        if (failure := self._deps.failures.get(key, route.upstream_path)) is not None:
            raise failure
        fill = self._current(key)
        fill = fill or self._begin(Fill(key, route, variant, background=not urgent, patient=urgent))
        if urgent:
            fill.promote(self._deps.pool.wan)
        return await fill.outcome()

    def take_over(self, route: Route, variant: Variant, *, inherits: bool) -> asyncio.Event | None:
        """Take over a fill without a leader: it waits for its slot without limit.

        `inherits`: its leader died while it streamed. The event is set at the fill's end; None when this
        process has such a fill already.
        """
        key = route.key(variant)
        if self._current(key) is not None:
            return None
        return self._begin(Fill(key, route, variant, patient=not inherits, inherits=inherits)).ended

    # --- fills

    def _current(self, key: ContentKey) -> Fill | None:
        """The key's fill that a new request may join. One that a purge names goes on aside, to its end."""
        fill = self._fills.get(key)
        if fill is None or not fill.is_purged(self._deps.purges):
            return fill
        del self._fills[key]
        if fill.step_aside is not None:
            self._spawn(fill.step_aside())
        return None

    def set_purged_aside(self) -> None:
        """Set all fills aside that a purge names; to be called once a second."""
        for key in list(self._fills):
            self._current(key)

    def _begin(self, fill: Fill) -> Fill:
        fill.since = self._deps.clock()
        fill.times = FillClock(self._deps.clock, fill.since)
        fill.count_readers = self._count_waiters
        self._fills[fill.key] = fill
        self._spawn(self._run(fill), fill)
        return fill

    async def _run(self, fill: Fill) -> None:
        """Look the key up; else lead its fill, or follow its leader, to the end."""
        follower = Follower(self._deps, fill)
        try:
            while not fill.over:
                found: _LookedUp = self._claim_new(fill)
                if found is None:
                    found = await on_disk(self._deps.executor, self._look_up, fill)
                if found is None:
                    fill.times.enter(ELSEWHERE)
                    await follower.run()
                    fill.times.enter("disk")
                elif isinstance(found, Leftover):
                    try:
                        await self._lead(fill, found, follower)
                    finally:
                        self._release(fill)
                elif isinstance(found, Failure):
                    fill.fail(found.problem(self._deps.clock()))
                elif isinstance(found, FillEnd):
                    fill.finish(found)
                else:
                    self._adopt_entry(fill, *found)
        except OSError as error:
            if not is_exhausted(error):
                raise
            fill.fail(exhausted(error))
        finally:
            self._forget(fill)
            if not fill.over:  # cancelled when the service stops, or a programming error
                fill.fail(Problem("internal-error", "the fill ended with an internal error"))
            self._keep_entry(fill)
            fill.times.stop()
            fill.ended.set()

    def _release(self, fill: Fill) -> None:
        if not fill.freed:  # else it may be the next fill's
            self._deps.claims.release(fill.key.claim_offset)

    def _forget(self, fill: Fill) -> None:
        if self._fills.get(fill.key) is fill:  # else it was set aside
            del self._fills[fill.key]

    def _claim_new(self, fill: Fill) -> Leftover | None:
        """Claim a key that has no files yet: a miss without a look at the disk. None: look the key up."""
        deps, offset = self._deps, fill.key.claim_offset
        maybe = deps.store.occupied.maybe
        if fill.suspect or fill.from_memory:
            return None
        if any(maybe(key.claim_offset) for key in fill.route.keys(fill.variant)):
            return None
        if not deps.claims.try_claim(offset):
            return None
        if maybe(offset):  # another process has just stored it
            deps.claims.release(offset)
            return None
        return Leftover(nothing=True)

    def _look_up(self, fill: Fill) -> _LookedUp:
        """The entry; or what a fill can begin with, and the key is claimed then; None when another process
        has the claim. Blocks.

        One thread job for both, so that an entry that is not open and a miss cost one switch each.
        """
        deps, key = self._deps, fill.key
        claims, claimed = deps.claims, deps.claims.try_claim(key.claim_offset)
        try:
            keys = fill.route.keys(fill.variant) if key == fill.route.key(fill.variant) else (key,)
            for candidate in () if fill.suspect or fill.from_memory else keys:
                found = self._entries.load(candidate)
                if found is not None and (fill.route.immutable or is_fresh(deps, found[0])):
                    return found
            if not claimed:
                return FillEnd.UNSTORABLE if fill.from_memory else None
            try:
                with disk_errors():
                    leftover = examine(deps, fill)
            except DiskError as error:
                leftover = Leftover(unstorable=refusal(error))
            if isinstance(leftover, Leftover):
                claimed = False  # the claim stays the caller's
            elif leftover is FillEnd.COMMITTED:
                return self._entries.load(key) or leftover
            return leftover
        finally:
            if claimed:
                claims.release(key.claim_offset)

    async def _lead(self, fill: Fill, leftover: Leftover, follower: Follower) -> None:
        """Lead a claimed fill; if upstream does not have this spelling of the moniker, try another."""
        if fill.joins:
            fill.fail(Problem("upstream-error", "the process that fetched it has ended"))
            return
        if not fill.suspect and not fill.from_memory and follower.ended_in_memory():
            return
        if (
            not leftover.finished
            and (failure := self._deps.failures.get(fill.key, fill.route.upstream_path)) is not None
        ):
            fill.fail(failure)
            return
        leader = Leader(self._deps, fill, leftover)
        fill.led = True
        absent = await leader.run(fill.route.upstream_path)
        # No slot is held meanwhile: the catalogue may have to be fetched itself.
        if absent is not None and (other := await self._spelled_otherwise(fill)) is not None:
            absent = await leader.run(other)
        if absent is not None:
            await leader.fail(absent)
        leader.note_times()

    async def _spelled_otherwise(self, fill: Fill) -> str | None:
        candidates = self._deps.pool.candidates(fill.variant, fill.key.text)
        return await spell(self.open, fill.route, candidates[0].variant if candidates else fill.variant)

    def _adopt_entry(self, fill: Fill, record: Record, file: OpenFile, trusting: bool) -> None:
        """The entry exists: a body that was followed is complete if it became the entry."""
        body = fill.body
        if body is not None and not body.ended:
            own = os.fstat(file.fd)
            if body.file is not None and os.fstat(body.fd).st_ino == own.st_ino:
                body.complete(own.st_size)
            else:
                body.fail()
        self._entries.put(record, file, trusting)
        fill.finish(FillEnd.COMMITTED)

    def _keep_entry(self, fill: Fill) -> None:
        if fill.record is not None and fill.file is not None:
            self._entries.put(fill.record, fill.file, trusting=False)
        elif fill.record is not None and (entry := self._entries.known(fill.key)) is not None:
            self._entries.adopt(entry, fill.record)
        if fill.end in (FillEnd.COMMITTED, FillEnd.VALIDATED) and not fill.aside:
            self._deps.memory.drop(fill.key)

    # --- damage

    def close_removed(self) -> None:
        """Call when the store's epoch was raised."""
        self._entries.close_removed()

    def look_over(self) -> None:
        """Verify every open entry whose file was changed by something else; to be called once a second."""
        for entry in self._entries.changed():
            self._compare_all(entry)

    def _damaged(self, entry: Entry) -> None:
        """A chunk of an entry is damaged: have the entry demoted and its rest fetched again.

        It is counted under the claim, once for all processes that find the damage at the same time.
        """
        self._compare_all(entry)
        entry.counted = True

    def _compare_all(self, entry: Entry) -> None:
        """Begin a fill that compares the whole entry, unless one is running, or failed a moment ago."""
        fill = self._current(entry.key)
        if fill is not None:
            if not fill.suspect:  # its commit is under way
                self._spawn(self._compare_after(fill, entry))
        elif self._deps.failures.get(entry.key, entry.record.asked_path) is None:
            self._suspect(entry.record, counted=entry.counted, seen=entry.record.generation)

    async def _compare_after(self, fill: Fill, entry: Entry) -> None:
        await fill.ended.wait()
        self._compare_all(entry)

    def _suspect(self, record: Record, *, counted: bool, seen: int | None = None) -> Fill:
        key, route = record.key, route_of(record)
        return self._begin(Fill(key, route, key.variant, suspect=True, seen=seen, noted=counted))

    async def is_sound_at(self, opened: Opened, offset: int) -> bool:
        """Compare the chunk that a response begins with, before its head is sent.

        False when it is damaged: open again, for the fill that restores it. Problem when the damaged chunk
        can't be had.
        """
        entry = opened.entry
        if entry is None or await entry.is_sound_at(offset):
            return True
        opened.body.leave()
        self._entries.drop(entry)
        fill = self._current(entry.key)
        if fill is not None:
            joined = await self._joined(fill)
            if isinstance(joined, GrowingBody):
                joined.leave()
        elif (failure := self._deps.failures.get(entry.key, entry.record.asked_path)) is not None:
            raise failure
        return False

    async def repair(self, key: ContentKey, *, counted: bool) -> Problem | None:
        """Compare all of a stored body and fetch again what is damaged; the problem if that failed.

        For the controller: it has no client's request to know the route from. `counted`: the damage is
        counted already.
        """
        while (fill := self._current(key)) is not None and not fill.suspect:
            await fill.ended.wait()
        if fill is None:
            record = await on_disk(self._deps.executor, self._deps.store.load_or_none, key)
            if record is None:
                return Problem("upstream-not-found", "it has no record")
            fill = self._current(key) or self._suspect(record, counted=counted)
        await fill.ended.wait()
        if fill.problem is None and fill.end is FillEnd.UNSTORABLE:
            return Problem("overloaded", "it is damaged, and can't be stored", retry_after_seconds=10.0)
        return fill.problem

    # --- tasks

    def _spawn(self, work: Coroutine[None, None, None], fill: Fill | None = None) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = fill
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the cache failed", exc_info=error)

    @property
    def fills(self) -> int:
        return len(self._tasks)

    def slow_fills(self) -> list[dict[str, object]]:
        """What this process fetches for a second or longer, the oldest first: rows of an UnderWay."""
        now, least = self._deps.clock(), min(_SLOW_SECONDS, self._deps.settings.reports.slow)
        return [
            {"key": fill.key.text, "phase": fill.times.phase, **fill.times.told(marks=False)}
            for fill in self._tasks.values()
            if fill is not None and fill.led and not fill.over and now - fill.since >= least
        ][:_MOST_TOLD]

    async def end_fills(self) -> None:
        """Wait until all fills that this process leads or follows have ended."""
        while tasks := [task for task, fill in self._tasks.items() if fill is not None]:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """End all fills; their parts stay for resuming. Complete bodies are committed first."""
        tasks = list(self._tasks)
        for task in tasks:
            fill = self._tasks[task]
            if fill is None or not fill.finishing:
                task.cancel()
        await asyncio.gather(*tasks, self.pass_through.stop(), return_exceptions=True)
        self._deps.memory.close()
        self._entries.clear()
