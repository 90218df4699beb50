"""The leader's way of a fill: from the claim to the commit, or to the reason why not; serves nobody itself.

CLAIMED → REQUESTED → STREAMING → COMMITTED | FAILED | UNSTORABLE (gup.cache.state holds the table). The
caller holds the key's claim for as long as `Leader.run` runs.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from gup.cache.body import GrowingBody
from gup.cache.commit import commit, committed
from gup.cache.flight import Flight, Landing, Means
from gup.cache.heads import absent, head_of, remote_of
from gup.cache.part import ZIP_TAIL_BYTES, PartWriter, Salvage, zip_end_is_right
from gup.cache.prior import Damage, Prior, drop_parts, examine, is_the_entry, note_damage, validated_at
from gup.cache.queue import too_many_fills
from gup.cache.record import Head, Record
from gup.cache.repair import NotTheSame, Repair
from gup.cache.state import Failure, FillState, Phase, may_move
from gup.cache.store import OpenFile
from gup.content.key import Kind
from gup.errors import GupError, Problem, exhausted, is_exhausted
from gup.upstream.bandwidth import Share
from gup.upstream.connection import Ask
from gup.upstream.download import Begun, BodyChanged, Download
from gup.upstream.exchange import RemoteHead, UpstreamFailure

log = logging.getLogger("gup.fill")

PRIORITIES = {Kind.DELTA: 0, Kind.INDEX: 1, Kind.FULL: 2, Kind.OTHER: 2}
"""Order in which fills get a slot: what is small and urgent before what is large."""
_UNKNOWN_STEP_BYTES = 16 << 20
"""Room is promised in steps of this size while a body's length is unknown."""
_Result = TypeVar("_Result")


class Unstorable(GupError):  # noqa: N818 - an outcome, not our error
    """The body can't be kept: too large, or the disk refuses."""


class Leader:
    """One fill, led by this process. Everything that can go wrong ends in a state file and in the flight."""

    def __init__(self, means: Means, flight: Flight) -> None:
        self._means = means
        self._flight = flight
        self._key = flight.key
        self._phase = Phase.CLAIMED
        self._generation = 0
        self._path = flight.route.upstream_path
        self._head: Head | None = None
        """Of the part under way: what makes it worth going on with."""
        self._writer: PartWriter | None = None
        self._promised = 0
        self._bytes_changed = False
        """Whether upstream has other bytes than were stored: their ETag must be another, too."""
        self._began_at = means.clock()

    async def run(self) -> None:
        """Bring the flight to its end. Cancelled: the part stays for whoever claims the key next."""
        try:
            await self._run()
        except UpstreamFailure as failure:
            stands = 0.0 if failure.slug == "overloaded" else self._means.settings.cache.error_ttl
            await self._fail(Problem(failure.slug, failure.detail), stands)
        except BodyChanged as error:
            await self._fail(Problem("upstream-bad-body", str(error)), 0.0, drop=True)
        except Problem as problem:
            await self._fail(problem, 0.0)
        except Unstorable as error:
            await self._give_up_storing(str(error))
        except OSError as error:
            if is_exhausted(error):
                await self._fail(exhausted(error), 0.0)
                return
            await self._give_up_storing(f"the cache directory refuses: {error.strerror or error}")
        finally:
            self._writer = None  # its descriptors close when no thread writes any more

    async def _run(self) -> None:
        prior = await self._in_thread(examine, self._means, self._flight)
        if isinstance(prior, Landing):
            await self._end_body()
            self._flight.land(prior)
            return
        if isinstance(prior, Failure):
            now = self._means.clock()
            self._flight.fail(prior.problem(now), prior.until - now)
            return
        absent = await self._in_a_slot(prior)
        if isinstance(absent, Problem) and absent.slug == "upstream-not-found":
            # No slot is held meanwhile: the catalogue may have to be fetched itself.
            other = await self._means.spell(self._flight.route, self._flight.variant)
            if other is not None:
                self._path = other
                self._start_over()
                absent = await self._in_a_slot(prior)
        if absent is not None:
            raise absent

    async def _in_a_slot(self, prior: Prior) -> Problem | UpstreamFailure | None:
        """Fetch when a slot is free. What is returned tells that upstream does not have it."""
        priority = PRIORITIES[self._flight.route.kind]
        queue = self._means.queue
        async with queue.held(priority, self._means.clock() - self._flight.since) as held:
            if not held:
                raise too_many_fills(queue, priority)
            self._means.counters.add("gup_fills_in_progress", 1)
            try:
                return await self._fetch(prior)
            finally:
                self._means.counters.add("gup_fills_in_progress", -1)

    async def _end_body(self) -> None:
        """Another leader has committed meanwhile: what was followed is whole if it became the entry."""
        body = self._flight.body
        if body is None or body.ended:
            return
        if await self._in_thread(is_the_entry, self._means.store, self._key, body.fd):
            length = os.fstat(body.fd).st_size
            body.publish(length)
            body.complete(length)
        else:
            body.fail()

    # --- fetching

    async def _fetch(self, prior: Prior) -> Problem | UpstreamFailure | None:
        self._move(Phase.REQUESTED)
        self._flight.fetched = True
        if prior.damage is not None and await self._mend(prior.damage):
            return None
        if prior.state is not None and prior.salvage is not None:
            resumed = await self._resume(prior.state, prior.salvage)
            if resumed is not None:
                await self._stream(*resumed)
                return None
        download = self._download(None, prior.record)
        try:
            remote = await download.begin()
            if remote.status == 200:
                body = await self._open_part(remote)
        except BaseException:
            download.close()
            raise
        if remote.status == 200:
            await self._stream(download, body)
        elif remote.status == 304 and prior.record is not None:
            await self._validated(prior.record, remote)
        else:
            return absent(remote)
        return None

    async def _mend(self, damage: Damage) -> bool:
        """Whether the damaged body could be mended; it is left as it is when nobody can be asked."""
        await self._reserve(damage.record.length)
        share = Share(PRIORITIES[self._flight.route.kind])
        try:
            await Repair(self._means, self._flight, damage.record.path or self._path, share, damage).run()
        except NotTheSame as error:
            log.warning("%s can't be mended and is fetched anew: %s", self._key.text, str(error))
            self._bytes_changed = True
            return False
        finally:
            self._release(committed=False)
        self._flight.land(Landing.COMMITTED)
        self._means.counters.add("gup_fills_total", outcome="committed")
        return True

    def _download(self, begun: Begun | None, record: Record | None) -> Download:
        means, route = self._means, self._flight.route
        variant, via = self._flight.variant, self._flight.via
        upstreams, reserve = means.pool.chosen(variant, self._key.text, via, resuming=begun is not None)
        if not upstreams:
            raise Problem("no-upstream", f"no upstream has {variant}")
        conditional = record is not None and begun is None
        ask = Ask(
            path=self._path,
            purpose="index" if route.kind is Kind.INDEX else "fill",
            stream=(means.streams.number(self._key), str(route.kind)),
            if_none_match=record.upstream_etag if conditional and record else None,
            if_modified_since=record.last_modified if conditional and record else None,
            share=Share(PRIORITIES[route.kind]),
            via=via,
        )
        return Download(
            means.pool,
            upstreams,
            ask,
            means.counters,
            immutable=route.immutable,
            reread=self._reread,
            begun=begun,
            reserve=reserve,
            clock=means.clock,
        )

    async def _reread(self, offset: int, length: int) -> bytes:
        assert self._writer is not None
        return await self._writer.reread(offset, length)

    async def _open_part(self, remote: RemoteHead) -> GrowingBody:
        """Make room and a new part for the body that `remote` announces."""
        await self._reserve(remote.length if remote.length is not None else _UNKNOWN_STEP_BYTES)
        return await self._new_generation(head_of(self._key, remote, changed=self._bytes_changed))

    async def _new_generation(
        self, head: Head, old: OpenFile | None = None, salvage: Salvage | None = None
    ) -> GrowingBody:
        """A part of a new generation, begun with the good chunks of `old` if there are any."""
        means = self._means
        self._generation = int(means.wall_clock() * 1_000_000)

        def prepare() -> tuple[PartWriter, OpenFile]:
            writer = PartWriter.create(
                means.store, self._key.id, self._generation, means.executor, head.length, self._published
            )
            if old is not None and salvage is not None:
                writer.copy_from(old, salvage.verified, salvage.sums)
            return writer, OpenFile(means.store.part_path(self._key.id, self._generation))

        self._writer, file = await self._in_thread(prepare)
        return GrowingBody(head, self._generation, file, means.clock())

    async def _show(self, body: GrowingBody) -> None:
        """STREAMING: the state for other processes, the body for this one.

        Not before there is something to read: until then whatever fails can be told in a clean answer.
        """
        self._move(Phase.STREAMING)
        self._head = body.head
        await self._in_thread(self._means.store.save_state, self._state(head=body.head))
        assert self._writer is not None
        self._flight.attach(body)
        body.publish(max(self._writer.written, body.published))

    def _published(self, size: int) -> None:
        body = self._flight.body
        if body is not None and body.generation == self._generation:
            body.publish(max(size, body.published))

    # --- going on with a dead leader's part

    async def _resume(self, state: FillState, salvage: Salvage) -> tuple[Download, GrowingBody] | None:
        """Go on with a part; None when it turned out to be worth nothing (and is gone).

        Undamaged, the same generation goes on and its readers notice nothing. Where a chunk or the tail is
        bad, the good chunks go to a new generation and readers of the old one are cut.
        """
        assert state.head is not None
        if state.head.length is not None:
            await self._reserve(state.head.length)
        else:
            await self._reserve(salvage.size + _UNKNOWN_STEP_BYTES)
        self._head, self._generation = state.head, state.generation
        if salvage.whole:
            try:
                return await self._begin_again(state.head, await self._reopen(state, salvage), salvage)
            except BodyChanged:
                log.warning("the end of the part of %s is not what upstream has", self._key.text)
        note_damage(self._means, "part", self._key, f"good up to byte {salvage.verified} of {salvage.size}")
        if salvage.verified:
            body = await self._keep_good_chunks(state, salvage)
            try:
                return await self._begin_again(state.head, body, replace(salvage, size=salvage.verified))
            except BodyChanged:
                log.warning("upstream now has other bytes for %s: fetched anew", self._key.text)
        self._flight.detach()
        self._head = None
        await self._in_thread(drop_parts, self._means.store, self._key)
        self._release(committed=False)
        self._start_over()
        return None

    async def _reopen(self, state: FillState, salvage: Salvage) -> GrowingBody:
        assert state.head is not None
        means, head = self._means, state.head

        def reopen() -> tuple[PartWriter, OpenFile]:
            writer = PartWriter.reopen(
                means.store,
                self._key.id,
                self._generation,
                means.executor,
                head.length,
                self._published,
                salvage,
            )
            return writer, OpenFile(means.store.part_path(self._key.id, self._generation))

        self._writer, file = await self._in_thread(reopen)
        body = self._flight.body
        if body is not None and body.generation == self._generation:
            return body
        return GrowingBody(head, self._generation, file, means.clock())

    async def _begin_again(
        self, head: Head, body: GrowingBody, salvage: Salvage
    ) -> tuple[Download, GrowingBody]:
        """Ask for the rest; the body is shown when upstream has confirmed what of it was unsure."""
        download = self._download(Begun(remote_of(head), salvage.size, salvage.verified), None)
        try:
            await download.begin()
            await self._show(body)
        except BaseException:
            download.close()
            raise
        return download, body

    async def _keep_good_chunks(self, state: FillState, salvage: Salvage) -> GrowingBody:
        assert state.head is not None
        old = OpenFile(self._means.store.part_path(self._key.id, state.generation))
        self._start_over()
        body = await self._new_generation(state.head, old, salvage)
        await self._in_thread(self._means.store.save_state, self._state(head=state.head))
        await self._in_thread(self._means.store.drop_part, self._key.id, state.generation)
        return body

    # --- the body

    async def _stream(self, download: Download, body: GrowingBody) -> None:
        writer = self._writer
        assert writer is not None
        try:
            while piece := await download.read():
                await self._keep_room(writer, len(piece))
                await writer.add(piece)
                if writer.written and self._flight.body is not body:
                    await self._show(body)
            await self._check_structure(writer)
            await writer.write_withheld()
            if self._flight.body is not body:
                await self._show(body)
        finally:
            download.close()
        body.complete(writer.written)
        assert download.head is not None
        await self._commit(writer, download.head, body.head)

    async def _keep_room(self, writer: PartWriter, amount: int) -> None:
        if writer.received + amount > self._promised:
            await self._reserve(_UNKNOWN_STEP_BYTES)

    async def _check_structure(self, writer: PartWriter) -> None:
        if not self._key.file.lower().endswith(".zip"):
            return
        start = max(0, writer.received - ZIP_TAIL_BYTES)
        tail = await writer.reread(start, writer.received - start)
        if not zip_end_is_right(tail):
            self._means.counters.add("gup_upstream_wasted_bytes_total", writer.received, reason="rejected")
            raise UpstreamFailure(
                "rejected",
                "upstream-bad-body",
                f"what came as {self._key.file} does not end as a ZIP file does",
                again=False,
            )

    async def _commit(self, writer: PartWriter, remote: RemoteHead, head: Head) -> None:
        """Make the body durable: its readers have it whole by now and do not wait for that."""
        means = self._means
        sums, mtime_ns = await writer.settle()
        if head.length is None:
            remote = replace(remote, length=writer.written)
            head = head_of(self._key, remote, changed=self._bytes_changed)
        now = means.wall_clock()
        route = self._flight.route
        record = Record.of(self._key, route.kind, head, sums, now, mtime_ns, self._path)
        record = record.validated(validated_at(means, remote, route.immutable))
        state = FillState(self._key, record.kind, self._generation, Phase.COMMITTED, head=head, record=record)
        replaced = await self._in_thread(commit, means.store, state)
        self._move(Phase.COMMITTED)
        self._release(committed=True)
        if replaced:
            means.raise_store_epoch()
        self._flight.land(Landing.COMMITTED)
        means.counters.add("gup_fills_total", outcome="committed")
        means.counters.observe("gup_fill_duration_seconds", means.clock() - self._began_at)
        means.tell(committed(record, replaced=replaced))
        log.info(
            "stored %s, %d bytes in %.2f s from %s",
            self._key.text,
            record.length,
            means.clock() - self._began_at,
            head.upstream,
        )

    async def _validated(self, record: Record, remote: RemoteHead) -> None:
        """Upstream says that the stored index file is still right."""
        means = self._means
        at = validated_at(means, remote, self._flight.route.immutable)

        def save() -> None:
            means.store.save(record.validated(at))
            means.store.drop_state(self._key.id)

        await self._in_thread(save)
        self._flight.land(Landing.VALIDATED)

    # --- ends other than a commit

    async def _fail(self, problem: Problem, ttl_seconds: float, *, drop: bool = False) -> None:
        """FAILED: told to the clients, and kept so that nobody asks upstream before it has passed.

        A part is kept for resuming, but not one whose bytes were found wrong.
        """
        means = self._means
        absent = problem.slug in ("upstream-not-found", "upstream-gone")
        if absent:
            ttl_seconds = means.settings.cache.negative_ttl
        drop = drop or problem.slug == "upstream-bad-body"
        failure = Failure.of(problem, ttl_seconds, means.clock())
        self._move(Phase.FAILED)
        head = None if drop else self._head
        state = FillState(self._key, self._flight.route.kind, self._generation, Phase.FAILED, head, failure)
        try:
            await self._in_thread(self._save_end, state, drop)
        except OSError as error:
            log.warning("the failure of %s could not be kept: %s", self._key.text, error)
        self._release(committed=False)
        if problem.retry_after_seconds is None:
            problem = failure.problem(means.clock())
        self._flight.fail(problem, ttl_seconds)
        if not absent:
            means.counters.add("gup_fills_total", outcome="failed")
            log.warning("fetching %s failed: %s", self._key.text, problem.detail)
        means.tell(
            {"type": "failed", "key": self._key.text, "problem": problem.slug, "detail": problem.detail}
        )

    async def _give_up_storing(self, detail: str) -> None:
        """UNSTORABLE: it is passed through without being kept, for as long as an error stands."""
        means = self._means
        log.warning("%s is not stored: %s", self._key.text, detail)
        self._move(Phase.UNSTORABLE)
        failure = Failure("overloaded", detail, 30.0, means.clock() + 30.0)
        state = self._state(failure=failure)
        try:
            await self._in_thread(self._save_end, state, True)
        except OSError as error:
            log.warning("the state of %s could not be kept: %s", self._key.text, error)
        self._release(committed=False)
        self._flight.detach()
        self._flight.land(Landing.UNSTORABLE)
        means.counters.add("gup_fills_total", outcome="unstorable")

    def _save_end(self, state: FillState, drop: bool) -> None:
        if drop:
            drop_parts(self._means.store, self._key)
        if state.failure is not None and state.failure.ttl > 0:
            self._means.store.save_state(state)
        elif drop:
            self._means.store.drop_state(self._key.id)
        elif state.head is not None:
            self._means.store.save_state(state)

    # --- bookkeeping

    def _move(self, phase: Phase) -> None:
        assert phase is self._phase or may_move(self._phase, phase), (self._phase, phase)
        self._phase = phase

    def _state(self, head: Head | None = None, failure: Failure | None = None) -> FillState:
        route = self._flight.route
        return FillState(self._key, route.kind, self._generation, self._phase, head, failure, path=self._path)

    def _start_over(self) -> None:
        """What was streaming is given up: another generation begins where a first one would."""
        self._phase = Phase.REQUESTED

    async def _reserve(self, amount: int) -> None:
        space = self._means.space
        if space.too_large(self._promised + amount):
            raise Unstorable(f"it takes more than cache.max_size ({self._promised + amount} bytes)")
        if not await space.reserve(amount):
            raise Unstorable("no room could be made in the cache directory")
        self._promised += amount

    def _release(self, *, committed: bool) -> None:
        if self._promised:
            self._means.space.release(self._promised, committed=committed)
            self._promised = 0

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._means.executor, work, *arguments)
