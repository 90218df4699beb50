"""The leader of a fill: from the claim to the commit, or to a failure.

CLAIMED → REQUESTED → STREAMING → COMMITTED | FAILED | UNSTORABLE (gup.cache.records holds the table). The
caller holds the key's claim. What the disk refuses continues in a memory file.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from gup.cache import budget_gate
from gup.cache.body import GrowingBody
from gup.cache.disk import STEP_BYTES, DiskError, Room, Unstorable, on_disk, refusal
from gup.cache.inflight import Fill, FillDependencies, FillEnd, committed, is_shared, nowhere
from gup.cache.locks import aside_offset, waiters_offset
from gup.cache.memory_files import STEP_BYTES as MEMORY_STEP_BYTES
from gup.cache.memory_files import MemoryFile, MemoryFull
from gup.cache.negative_cache import Holds, remembered_problem
from gup.cache.part_file import ZIP_TAIL_BYTES, PartWriter, Salvage, WriteBehind, zip_end_is_right
from gup.cache.records import (
    CHUNK_BYTES,
    TRANSITIONS,
    Failure,
    FillState,
    Head,
    Phase,
    Record,
    absent,
    head_of,
    remote_of,
)
from gup.cache.recovery import Leftover, give_up, note_damage, renew, save_failure, validated_at
from gup.cache.scheduler import FillSlot, class_of
from gup.cache.store import BadDiskError, OpenFile, Store
from gup.content.key import Kind
from gup.errors import Problem, exhausted, is_exhausted
from gup.phases import FILL_PHASES, rounded
from gup.upstream.download import Begun, BodyChanged, Choice, Download
from gup.upstream.exchange import RemoteHead, UpstreamFailure, unconfirmed
from gup.upstream.session import Ask

log = logging.getLogger("gup.fill")

_SMALL_BYTES = CHUNK_BYTES
_SMALL_SECONDS, _SMALL_SECONDS_FROM_MEMBER = 0.05, 0.01
"""A body that is complete within these limits is written in one step. A larger or slower one opens a part.
A member that is slower waits for the WAN, and has waited for its own limit already.
"""
_LOOK_SECONDS = 0.02
"""A background fill checks this often for other fills, and for its own waiters."""
_MOST_CHANGES = 2
"""A fill is given up when upstream's body changes more often than this while it is fetched."""
_COMMIT_TRIES = 50
_COMMIT_PAUSE_SECONDS = 0.2
_COUNTED_SECONDS = 0.001
"""A shorter phase is not counted: most fills are small ones."""
_TOLD_SECONDS = 0.1
"""The times of shorter fills that are neither stored nor fail are only counted."""
_EXPECTED = frozenset({"upstream-not-found", "upstream-gone"})
"""Upstream need not have what clients ask for: not worth a warning."""
_Result = TypeVar("_Result")


class Leader:
    """One fill, led by this process. Errors become the fill's result and are visible to followers; none is
    raised.
    """

    def __init__(self, dependencies: FillDependencies, fill: Fill, leftover: Leftover) -> None:
        self._deps = dependencies
        self._fill = fill
        self._key = fill.key
        self._leftover = leftover
        self._record = leftover.record
        """The older body under this key, which is still served if this fill fails."""
        self._state = FillState(fill.key, fill.route.kind, 0, Phase.CLAIMED, path=fill.route.upstream_path)
        """As followers see it; its head is there while the part is worth resuming."""
        self._has_state = leftover.state is not None
        if leftover.state is not None:
            self._take_over(leftover.state)
        self._writer: PartWriter | None = None
        self._body: GrowingBody | None = None
        """The body being written, shown to readers or not."""
        self._whole = False
        """All of the body was received and verified."""
        self._memory: MemoryFile | None = None
        """The writer's file since the disk refused."""
        self._download: Download | None = None
        self._resumes, self._from_members = 0, 0  # of the downloads before
        self._bytes_changed = False
        """Upstream has other bytes than were known: their ETag must differ, too."""
        self._came_at: float | None = None
        """When the last byte of a complete part came; Unix seconds."""
        self._room = Room(dependencies.space, dependencies.executor, dependencies.short)
        self._slot: FillSlot | None = None
        """Kept after it is left: it shows that the fill's clients no longer wait for the queue."""
        self._has_slot, self._in_progress = False, 0
        self._may_spend = False
        """The WAN's budget lets it begin; it is not cut later."""
        self._next_look = 0.0
        self._began_at = dependencies.clock()
        self._times, self._has_told = fill.times, False
        self._length: int | None = None
        """The body's, once upstream has said it."""
        error_ttl = dependencies.settings.cache.error_ttl
        tell, key = dependencies.tell, fill.key.text  # not a method: that would be a cycle that holds files

        def tell_rejected(upstream: str, detail: str) -> None:
            tell({"type": "rejected", "key": key, "upstream": upstream, "detail": detail})

        self._files = asyncio.Lock()
        """Around each change of the key's files, and around the moment at which the claim is freed."""
        self._aside_at: int | None = None
        """The lock that tells followers that it goes on without the claim."""
        fill.pinned = leftover.record is not None and leftover.record.pinned
        self._holds = Holds(leftover.holds, error_ttl, dependencies.clock, tell_rejected)

    async def run(self, path: str) -> Problem | None:
        """Lead the fill to its end, or return the problem that no upstream has anything under `path`.

        Cancelled: the part stays for the next process that claims the key.
        """
        self._fill.step_aside = self._step_aside
        try:
            if self._fill.from_memory:
                await self._store_memory()
            elif self._leftover.finished:
                await self._finish_part()
            else:
                return await self._fetch(path)
        except UpstreamFailure as failure:
            ttl_seconds = self._ttl_seconds(failure)
            retry = failure.retry_after_seconds if not ttl_seconds else None
            await self.fail(Problem(failure.slug, failure.detail, retry_after_seconds=retry), ttl_seconds)
        except BodyChanged as error:
            await self.fail(Problem("upstream-bad-body", str(error)), drop=True)
        except Problem as problem:
            await self.fail(problem)
        except OSError as error:
            if not is_exhausted(error):
                raise
            await self.fail(exhausted(error))
        finally:
            self._fill.step_aside, self._fill.from_wan = None, nowhere  # no cycle that holds files
            self._end_aside()
            self._writer = None  # its descriptors close when no thread writes any more
            if self._memory is not None and not self._memory.finished:
                self._memory.drop()
        return None

    # --- fetching

    async def _fetch(self, path: str) -> Problem | None:
        """Fetch it, or the rest of it: from a member of the cluster, or over the WAN when a slot is free."""
        fill, leftover = self._fill, self._leftover
        if leftover.state is not None and fill.body is not None:
            fill.inherits = True
        watching = self._watch_for_waiters() if fill.background else None
        try:
            self._times.enter("head")
            await self._deps.members.settle()
            self._state.path, self._state.phase = path, Phase.REQUESTED
            fill.fetched = True
            nothing = await self._fetch_or_bypass_disk()
        finally:
            self._leave_upstream()
            self._leave_slot()
            self._has_slot = False
            self._count_in_progress(0)
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        if nothing is None or (isinstance(nothing, Problem) and nothing.slug == "upstream-not-found"):
            return nothing
        raise nothing

    async def _fetch_or_bypass_disk(self) -> Problem | UpstreamFailure | None:
        if self._leftover.unstorable is not None:
            refused = Unstorable(self._leftover.unstorable, disk=True)
            return await self._go_on_in_memory(refused, reported=self._leftover.reported)
        try:
            return await self._fetch_to_disk()
        except (Unstorable, DiskError) as error:
            return await self._go_on_in_memory(error)

    async def _fetch_to_disk(self) -> Problem | UpstreamFailure | None:
        body: GrowingBody | None = None
        leftover = self._leftover
        if not leftover.nothing:
            self._times.enter("disk")
        if leftover.damaged is not None and leftover.salvage is not None:
            body = await self._demote(leftover.damaged, leftover.salvage)
        elif leftover.state is not None and leftover.salvage is not None:
            body = await self._resume(leftover.state, leftover.salvage)
        for changes_left in range(_MOST_CHANGES, -1, -1):
            if body is None:
                remote = await self._ask_upstream(None, self._record).begin()
                if remote.status != 200:
                    return await self._end_without_body(remote)
                self._count_in_progress(1)
                self._times.enter("disk")
                self._length = remote.length
                await self._room.reserve(remote.length if remote.length is not None else STEP_BYTES)
                head = self._head_of(remote)
                body = self._begin_generation(head)
            try:
                await self._receive(body)
                break
            except BodyChanged as error:
                if not changes_left:
                    raise
                log.warning("%s is fetched again: %s", self._key.text, str(error))
                await self._give_up_generation()
                body = None
        return None

    async def _end_without_body(self, remote: RemoteHead) -> Problem | UpstreamFailure | None:
        """Upstream answers that the stored index file is current, or that it has nothing."""
        deps, record = self._deps, self._record
        if remote.status != 304 or record is None:
            return absent(remote)
        at = validated_at(deps, remote, self._fill.route.immutable)
        self._times.enter("disk")
        try:
            async with self._files:
                if not self._fill.freed:
                    await self._room.on_disk(renew, deps, record, at)
        except DiskError as error:  # asked again at the next request: the stored body is still right
            log.warning("could not store that %s is still fresh: %s", self._key.text, error)
        else:
            self._fill.record = replace(record, validated_at=at)
        self._fill.finish(FillEnd.VALIDATED)
        self._log_end("validated")
        return None

    def _ask_upstream(self, begun: Begun | None, record: Record | None) -> Download:
        """A new download, not begun; with `record`, conditional on a change of the body."""
        self._leave_upstream()
        deps, fill = self._deps, self._fill
        resuming = begun is not None and fill.is_read
        ask = Ask(
            path=self._state.path,
            purpose=self._purpose(),
            stream=self._stream(),
            stream_of_body=lambda: (deps.streams.add(self._key), str(fill.route.kind)),
            if_none_match=record.upstream_etag if record else None,
            if_modified_since=record.last_modified if record else None,
            own_etag=record.etag if record else None,
            share=fill.share,
            passed=fill.passed,
            client=fill.client,
            key=self._key.text,
            times=self._times,
        )
        self._download = Download(
            deps.pool,
            deps.members,
            lambda: self._open_wan(resuming=resuming, anew=begun is None),
            ask,
            deps.counters,
            immutable=fill.route.immutable,
            reread=self._reread,
            begun=begun,
            is_read=lambda: fill.is_read,
            holds=self._holds,
            clock=deps.clock,
        )
        download = self._download
        fill.from_wan = lambda: download.is_on_wan
        return self._download

    async def _open_wan(self, *, resuming: bool, anew: bool) -> Choice:
        """Take a fill slot and choose the upstreams to ask. `anew`: for the whole body.

        UpstreamFailure when no upstream is up, or all are on hold.
        """
        deps, fill, holds = self._deps, self._fill, self._holds
        await self._save_source(self._source)
        counts = deps.settings.wan.budget.bytes and not self._may_spend and not self._is_under_way
        if counts:
            await deps.budget.refuse(fill.route, background=fill.background)
        await self._take_slot()
        if counts:  # again: others may have used it up while this one was queued
            await deps.budget.refuse(fill.route, background=fill.background)
        self._may_spend = True
        self._count_in_progress(1)
        if anew:
            fill.order = deps.purges.stamp
        fill.asks_gups = bool(fill.passed) and deps.pool.asks_gups(fill.variant, self._key.text)
        candidates = deps.pool.candidates(fill.variant, self._key.text, fill.passed)
        chosen = (
            candidates if resuming else deps.pool.admitted(candidates)
        )  # a resumed body waits for no trial
        if not chosen:
            raise Problem("no-upstream", f"no upstream is configured for {fill.variant}")
        upstreams = [upstream for upstream in chosen if not holds.seconds_left(upstream.name)]
        if not upstreams:
            names = ", ".join(upstream.name for upstream in chosen)
            detail = (
                f"{names}: not asked again yet, because of its Retry-After or because its last body was wrong"
            )
            retry = min(holds.seconds_left(upstream.name) for upstream in chosen)
            raise UpstreamFailure("error", "upstream-error", detail, again=False, retry_after_seconds=retry)
        return upstreams, [u for u in candidates if u not in chosen and not holds.seconds_left(u.name)]

    @property
    def _is_under_way(self) -> bool:
        """Whether it goes on with what was begun, or restores what is stored."""
        fill, state = self._fill, self._leftover.state
        streamed = state is not None and state.phase is Phase.STREAMING
        return streamed or fill.inherits or fill.patient or fill.is_read or fill.repairs

    def _leave_upstream(self) -> None:
        if self._download is not None:
            self._resumes += self._download.resumes
            self._from_members += self._download.from_members
            self._download.close()
            self._download = None
            self._fill.from_wan = nowhere  # no cycle, which would hold the files

    def _on_wan(self, amount: int) -> int:
        """How many of so many bytes of the body crossed the WAN."""
        now = self._download.from_members if self._download is not None else 0
        return max(0, amount - self._from_members - now)

    def _purpose(self) -> str:
        """The label that its bytes are counted under; a background fill keeps its own when it is promoted."""
        if self._fill.repairs:
            return "repair"
        if self._fill.background:
            return "prefetch"
        return "index" if self._fill.route.kind is Kind.INDEX else "fill"

    def _stream(self) -> tuple[int, str]:
        return self._deps.streams.number(self._key), str(self._fill.route.kind)

    async def _reread(self, offset: int, length: int) -> bytes:
        """For Download, which compares. A read error must not be taken for a refused write."""
        try:
            if self._writer is not None:
                return await self._writer.reread(offset, length)
            assert self._leftover.file is not None
            return await self._in_thread(os.pread, self._leftover.file.fd, length, offset)
        except DiskError as error:
            detail = f"the part can't be read for comparison: {error.strerror or error}"
            raise UpstreamFailure("error", "upstream-bad-body", detail, again=False) from error

    # --- the fill slot

    async def _take_slot(self) -> None:
        """Take a slot, to be left when it is no longer needed; Problem when there is none in time.

        While no upstream can be reached it fails instead of waiting, unless a part of the body is stored. A
        background fill needs none: it streams only while no other fill does, and few are begun at once.
        (The WAN's order is not enough: without a rate, or with one above the link's, it has no effect.)
        """
        deps, fill, leftover = self._deps, self._fill, self._leftover
        if self._has_slot:
            return
        self._has_slot = True
        if leftover.damaged is None and not leftover.is_whole and not fill.is_read:
            deps.pool.refuse_while_away(fill.variant, self._key.text)
        if fill.background:  # for a member's, nobody has looked yet whether the link is idle here
            await self._yield_to_others()
        if fill.background:
            return
        waited_seconds = 0.0 if self._slot is not None else deps.clock() - fill.since
        class_ = class_of(fill.route)
        self._times.wait_for_slot()
        slot = await deps.queue.take(
            class_, waited_seconds, fill.client, inherits=fill.inherits, patient=fill.patient
        )
        self._times.end_wait(given=slot is not None)
        if slot is None:
            raise deps.queue.refusal(class_, fill.client)
        self._slot = slot

    def _watch_for_waiters(self) -> asyncio.Task[None]:
        """Until another process's client wants the body: that process holds the lock beside the claim. A
        member of the cluster that sends it is told so.
        """

        async def watch() -> None:
            while self._fill.background:
                if self._deps.claims.taken(waiters_offset(self._key.id)):
                    self._fill.promote(self._deps.pool.wan)
                await asyncio.sleep(_LOOK_SECONDS)
            if self._download is not None:
                await self._download.promote()

        return asyncio.get_running_loop().create_task(watch())

    async def _yield_to_others(self) -> None:
        """A background fill waits here while others stream or wait, unless a client waits for it."""
        before = self._times.phase
        while self._fill.background and self._deps.clock() >= self._next_look:
            if self._deps.queue.idle():
                self._next_look = self._deps.clock() + _LOOK_SECONDS
                break
            self._times.wait_for_slot()
            await asyncio.sleep(_LOOK_SECONDS)
        if self._times.phase != before:
            self._times.end_wait(given=False)
            self._times.enter(before)

    def _leave_slot(self) -> None:
        if self._slot is not None:
            self._slot.leave()
            self._times.leave_slot()

    def _count_in_progress(self, now: int) -> None:
        """Once it has a slot, or a member sends it."""
        self._deps.counters.add("gup_fills_in_progress", now - self._in_progress)
        self._in_progress = now

    # --- generations

    def _new_writer(self, length: int | None) -> PartWriter:
        self._deps.store.occupied.note(self._key.claim_offset)
        path = self._deps.store.part_name(self._key.id, self._state.generation)
        self._writer = PartWriter(path, self._room, length, self._deps.store.demotions.disk_is_bad)
        return self._writer

    def _begin_generation(self, head: Head) -> GrowingBody:
        generation = int(self._deps.wall_clock() * 1_000_000_000)
        told = self._download.source_validators if self._download is not None else self._state.told
        self._state.generation, self._state.head, self._state.told = generation, None, told
        self._fill.order = head.order
        self._new_writer(head.length)
        self._body = GrowingBody(head, generation, None, self._deps.clock())
        return self._body

    async def _reopen(self, state: FillState, salvage: Salvage) -> GrowingBody:
        head = state.head
        assert head is not None
        self._take_over(state)
        writer = self._new_writer(head.length)
        await self._room.on_disk(writer.reopen, salvage)
        body = self._fill.body
        if body is None or body.generation != state.generation:
            body = GrowingBody(head, state.generation, writer.file, self._deps.clock())
        self._body = body
        return body

    def _take_over(self, state: FillState) -> None:
        own = self._state
        if state.head is not None:
            self._fill.order, self._fill.pinned = state.head.order, state.pinned
        self._state = replace(state, phase=own.phase, path=own.path, failure=None, passed_through=False)

    async def _give_up_generation(self) -> None:
        """Upstream has another body now: readers are cut, here and elsewhere, and the part is removed."""
        self._leave_upstream()
        self._fill.detach()
        self._fill.finishing = self._whole = False
        self._bytes_changed = True
        self._writer = self._body = None
        self._state.phase, self._state.head, self._state.told = Phase.REQUESTED, None, {}
        async with self._files:
            self._require_claim()
            await self._in_thread(self._deps.store.drop_parts, self._key.id)
        await self._save_state()  # followers see it
        self._room.release(committed=False)

    async def _resume(self, state: FillState, salvage: Salvage) -> GrowingBody | None:
        """Continue a dead leader's part; None when it was worthless and is removed.

        Undamaged, the same generation continues and its readers notice nothing. Where a chunk or the tail is
        bad, the good chunks go to a new generation and readers of the old one are cut.
        """
        assert state.head is not None
        await self._room.reserve(state.head.length or salvage.size + STEP_BYTES)
        differs_at = salvage.size
        if salvage.whole:
            try:
                return await self._ask_for_rest(await self._reopen(state, salvage), salvage)
            except BodyChanged as error:
                differs_at = error.offset
                log.warning("the part of %s differs from the upstream's body: %s", self._key.text, str(error))
        if differs_at >= salvage.verified:
            detail = f"right up to byte {salvage.verified} of {salvage.size}"
            note_damage(self._deps, "part", self._key, detail)
        if 0 < salvage.verified <= differs_at:
            body = await self._keep_good_chunks(state, salvage)
            try:
                return await self._ask_for_rest(body, replace(salvage, size=salvage.verified))
            except BodyChanged:
                log.warning("the upstream now has other bytes for %s: it is fetched again", self._key.text)
        await self._give_up_generation()
        return None

    async def _keep_good_chunks(self, state: FillState, salvage: Salvage) -> GrowingBody:
        assert state.head is not None
        store, id_ = self._deps.store, self._key.id
        self._leave_upstream()
        old = await self._in_thread(OpenFile, store.part_path(id_, state.generation))
        body = self._begin_generation(state.head)
        await self._room.on_disk(self._part.copy_from, old, salvage)
        self._state.phase, self._state.head = Phase.REQUESTED, state.head
        await self._save_state()
        await self._in_thread(store.drop_part, id_, state.generation)
        return body

    async def _ask_for_rest(self, body: GrowingBody, salvage: Salvage) -> GrowingBody:
        """The body is shown when upstream has confirmed its unverified bytes."""
        begun = Begun(remote_of(body.head), salvage.size, salvage.verified, self._state.told)
        download = self._ask_upstream(begun, None)
        await download.begin()
        self._state.told = download.source_validators
        await self._show(body)
        return body

    async def _demote(self, record: Record, salvage: Salvage) -> GrowingBody | None:
        """Make a damaged entry a part again, once an upstream has answered for its rest; None when it has
        another body.

        Until then the entry's sound chunks are served. Its readers are cut where the damage begins.
        """
        deps, sound_bytes = self._deps, salvage.verified
        self._fill.order, self._fill.pinned = record.order, record.pinned
        self._state.path = record.path or self._state.path
        self._fill.repairs = True
        download = self._ask_upstream(Begun(remote_of(record.head), sound_bytes, sound_bytes), None)
        try:
            await download.begin()
        except BodyChanged as error:
            self._leave_upstream()
            self._bytes_changed = True
            log.warning("%s is damaged and is fetched again: %s", self._key.text, str(error))
            return None
        try:
            await self._in_thread(deps.store.demotions.note, self._key.id)
            await self._room.reserve(record.length)
            self._move(Phase.STREAMING)
            self._state = replace(
                self._current_state(),
                generation=int(deps.wall_clock() * 1_000_000_000),
                head=record.head,
                told=download.source_validators,
                pinned=record.pinned,
                stored_at=record.stored_at,
            )
            async with self._files:
                self._require_claim()
                await self._room.on_disk(
                    deps.store.demote, record, self._leftover.file, sound_bytes, self._state
                )
        except (BadDiskError, Unstorable, DiskError) as error:
            self._leave_upstream()  # it sends the rest only
            if isinstance(error, BadDiskError):
                raise Unstorable(str(error), disk=True) from error
            raise
        self._has_state = True
        deps.raise_store_epoch()
        log.info("%s is damaged from byte %d on; the rest is fetched again", self._key.text, sound_bytes)
        body = await self._reopen(self._state, salvage)
        self._fill.attach(body)
        body.publish(sound_bytes)
        return body

    # --- the body

    async def _receive(self, body: GrowingBody) -> RemoteHead:
        known_large = (body.head.length or 0) > _SMALL_BYTES
        shown = self._fill.body is body or self._memory is not None
        self._times.enter("receiving")
        if shown or known_large or not await self._receive_small():
            await self._receive_large(body)
        self._fill.finishing = True  # from here on it ends soon without waiting for others
        self._times.enter("disk")
        await self._check_structure()
        remote = self._source_head
        if not self._source.confirmed:
            await self._pass_on_unconfirmed(body, remote)
        self._whole = True
        self._leave_upstream()
        await self._finish(body, remote)
        return remote

    async def _receive_small(self) -> bool:
        writer, download = self._part, self._source
        seconds = _SMALL_SECONDS if download.is_on_wan else _SMALL_SECONDS_FROM_MEMBER
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await download.gather(_SMALL_BYTES)
                while writer.received <= _SMALL_BYTES:
                    piece = await download.read()
                    if not piece:
                        return True
                    writer.take(piece)
        return False

    async def _receive_large(self, body: GrowingBody) -> None:
        writer, download = self._part, self._source
        async with WriteBehind(writer, lambda: self._write_sure(body)) as behind:
            more = True
            while more:
                self._times.enter("disk")
                if writer.unwritten and self._fill.body is body:
                    await behind.begin()
                elif writer.unwritten:
                    if self._memory is not None:
                        await behind.begin(wait=True)
                    await self._show(body)
                if writer.received:
                    await self._yield_to_others()  # what has come is shown meanwhile
                self._times.enter("receiving")
                piece = await behind.meanwhile(download.read)
                self._times.enter("disk")
                more = bool(piece)
                await self._save_source(download)
                if more:
                    writer.take(piece)
                if self._memory is None:
                    await self._room.keep(writer.received)
                else:
                    self._memory.keep(writer.received)
                if download.slow:
                    self._leave_slot()

    async def _write_sure(self, body: GrowingBody) -> None:
        await self._part.write_sure()
        if self._fill.body is body:
            body.publish(self._part.written)

    async def _show(self, body: GrowingBody) -> None:
        """STREAMING: the state for other processes, the body for this one; both after what was received.

        Not before the first bytes: until then a failure can be answered with an error response.
        """
        if self._memory is None:
            self._move(Phase.STREAMING)
            state = self._noted_state(body.head)
            async with self._files:
                if self._fill.freed:
                    await self._part.write_sure()
                else:
                    await self._part.write_sure(lambda: self._deps.store.save_state(state))
        self._attach(body)
        body.publish(self._part.written)

    def _attach(self, body: GrowingBody) -> None:
        fill = self._fill
        if self._memory is None:
            body.file = self._part.file
        elif not body.in_memory:
            self._memory.announce(replace(self._current_state(), head=body.head, phase=Phase.STREAMING))
            body.go_on_in(self._memory.file)
        if fill.body is not body:
            fill.attach(body)
            if not fill.background and not (self._whole and self._memory is None):  # else `committed` says so
                event = {"type": "begun", "key": self._key.text, "kind": str(fill.route.kind)}
                self._deps.tell({**event, "path": self._state.path})

    async def _save_source(self, download: Download) -> None:
        """Another upstream, or one with other validators, continues: save that in the state first.

        Also whether the body arrives over the WAN: by that, other processes answer the cluster's members.
        """
        told, state = download.source_validators, self._state
        if told is state.told and download.is_on_wan == state.from_wan:
            return
        state.told = told
        if self._state.phase is Phase.STREAMING and self._memory is None:
            with contextlib.suppress(OSError):  # the next write will fail too, and report it
                await self._save_state()

    async def _check_structure(self) -> None:
        """UpstreamFailure when the complete body can't be what its name says."""
        file, received = self._key.file, self._part.received
        if not file.lower().endswith(".zip"):
            return
        start = max(0, received - ZIP_TAIL_BYTES)
        if zip_end_is_right(await self._reread(start, received - start)):
            return
        self._deps.counters.waste("rejected", self._stream(), self._on_wan(received))
        detail = f"{file} does not end like a ZIP file, so it is incomplete or not one"
        failure = UpstreamFailure("rejected", "upstream-bad-body", detail, again=False)
        self._holds.note(self._source_head.upstream, failure, self._source_head)
        raise failure

    async def _pass_on_unconfirmed(self, body: GrowingBody, remote: RemoteHead) -> None:
        """Give waiting clients all that came, without its unconfirmed end; then UpstreamFailure.

        A stored index file that is stale is better than one that may lack its end.
        """
        if self._fill.body is body or self._record is None:
            await self._part.write_all(lambda _sums: None)
            await self._show(body)
            await asyncio.sleep(0)  # waiters become readers before the failure is raised
        raise unconfirmed(remote.upstream, self._part.received)

    async def _finish(self, body: GrowingBody, remote: RemoteHead) -> None:
        """Commit the complete body, then show its end.

        In this order a crash can't take back a body that a reader has completely. A body that replaces
        another shows its end first: the disk has to sync it, and either may be served.
        """
        deps, writer = self._deps, self._part
        self._leave_slot()
        head = body.head
        if head.length is None:
            remote = replace(remote, length=writer.received)
            head = self._head_of(remote)
            writer.length = writer.received
            if self._fill.body is not body:
                body.head = head
        if self._memory is not None or self._record is not None:
            await self._part.write_all(lambda _sums: None)
            self._show_end(body)
            if self._memory is not None:
                return
        now, kind, state = deps.wall_clock(), self._fill.route.kind, self._state
        valid_at = validated_at(deps, remote, self._fill.route.immutable)
        if self._came_at is not None:
            valid_at = min(valid_at, self._came_at)
        new, clear = self._leftover.nothing, self._has_state or not self._leftover.nothing

        def commit(sums: tuple[int, ...]) -> tuple[Record, bool]:
            record = Record.of(
                self._key,
                kind,
                head,
                sums,
                state.stored_at or now,
                state.generation,
                state.path,
                validated_at=valid_at,
                pinned=state.pinned,
            )
            return record, _commit(deps.store, record, new=new, clear=clear)

        async with self._files:
            if not self._fill.is_purged(deps.purges):
                record, replaced = await writer.write_all(commit, short=new and not clear)
            else:
                await self._end_purged(body)
                return
        self._fill.record, self._fill.file = record, writer.file
        if not body.ended:
            self._show_end(body)
            await asyncio.sleep(0)  # its readers first
        self._room.release(committed=True)
        if replaced:
            deps.raise_store_epoch()
        deps.failures.forget(self._key, self._fill.route.upstream_path)
        deps.counters.add("gup_fills_total", outcome="committed")
        deps.counters.observe("gup_fill_duration_seconds", deps.clock() - self._began_at)
        path = "" if self._fill.background else state.path
        self._times.stop()
        self._has_told = True
        resumes = self._resumes + (self._download.resumes if self._download is not None else 0)
        told = {"resumes": resumes, "received": self._on_wan(record.length)} | self._times.told()
        deps.tell(committed(record, replaced=replaced, path=path, **told))
        self._log_end("stored", bytes=record.length, upstream=head.upstream)
        self._fill.finish(FillEnd.COMMITTED)

    async def _end_purged(self, body: GrowingBody) -> None:
        """Its readers get it to the end; nobody else does. The caller holds `_files`."""
        await self._part.write_all(lambda _sums: None)
        if not body.ended:
            self._show_end(body)
        await self._in_thread(self._drop_files)
        self._room.release(committed=False)
        self._deps.counters.add("gup_fills_total", outcome="unstorable")
        self._log_end("purged", bytes=self._part.received)
        self._fill.finish(FillEnd.UNSTORABLE)

    def _drop_files(self) -> None:
        """Remove what this fill has made, and with the claim all that others left. Blocks."""
        store, id_ = self._deps.store, self._key.id
        if self._fill.freed:
            store.drop_part(id_, self._state.generation)
        else:
            store.drop_parts(id_)
            store.drop_state(id_)

    def _show_end(self, body: GrowingBody) -> None:
        self._attach(body)
        body.complete(self._part.received)

    async def _finish_part(self) -> None:
        state, salvage = self._leftover.state, self._leftover.salvage
        assert state is not None
        assert state.head is not None
        assert salvage is not None
        self._fill.finishing = self._whole = True
        try:
            self._state.path = state.path
            body = await self._reopen(state, salvage)
            self._came_at = os.fstat(body.fd).st_mtime
            self._fill.attach(body)
            await self._finish(body, remote_of(state.head))
        except DiskError as error:
            log.warning("%s is complete but can't be stored: %s", self._key.text, refusal(error))
            self._fill.finish(FillEnd.UNSTORABLE)

    # --- continuing without the disk

    async def _go_on_in_memory(
        self, refused: Unstorable | DiskError, *, reported: bool = False
    ) -> Problem | UpstreamFailure | None:
        """UNSTORABLE: what upstream still sends goes to the readers from a memory file.

        By the fill's state: 1. The body is complete, and only the commit was refused. 2. A body is arriving:
        its readers continue. 3. Nothing has arrived: it begins in memory. The readers of a body that is too
        large, or finds no room in memory, are cut: each client is passed through. `reported`: see `Leftover`.
        """
        why, fill = refusal(refused), self._fill
        self._require_claim()
        disk = isinstance(refused, DiskError) or refused.disk
        passed_through = isinstance(refused, Unstorable) and refused.too_large
        self._state.phase = Phase.UNSTORABLE
        self._room.release(committed=False)
        self._deps.counters.add("gup_fills_total", outcome="unstorable")
        try:
            if not passed_through and self._is_worth_memory():
                if self._download is None and not self._whole:
                    self._writer = self._body = None
                    remote = await self._ask_upstream(None, self._record).begin()
                    if remote.status != 200:
                        return await self._end_without_body(remote)
                body = await self._enter_memory()
                await self._tell_unstorable(why, disk=disk, reported=reported)
                reported = True
                await self._finish_in_memory(body)
        except MemoryFull as error:
            log.info("%s is passed through: %s", self._key.text, error)
            passed_through = True
        if self._memory is None or not self._memory.finished:
            await self._tell_unstorable(why, disk=disk, reported=reported, passed_through=passed_through)
            fill.detach()
        fill.finish(FillEnd.UNSTORABLE)
        return None

    def _is_worth_memory(self) -> bool:
        """Whether a client waits for it, here or elsewhere; a complete one is kept for later clients."""
        return self._whole or self._fill.wanted or self._deps.claims.taken(waiters_offset(self._key.id))

    async def _enter_memory(self) -> GrowingBody:
        """Continue in a memory file with what has arrived, after comparing it with its sums. MemoryFull."""
        deps, body = self._deps, self._body
        if body is None:
            head = self._head_of(self._source_head)
            body = self._begin_generation(head)
        writer = self._part
        length = writer.received if self._whole else body.head.length
        amount = length if length is not None else writer.received + MEMORY_STEP_BYTES
        memory = deps.memory.begin(self._key, self._state.generation, amount)
        self._memory = memory
        deps.memory.hold(self._key, body)
        if not writer.exists:
            writer.begin_in_memory(memory.file)
            return body
        body.hold_back()
        try:
            await self._in_thread(writer.move, memory.file)
        except DiskError as error:
            raise Problem("overloaded", f"the part can't be read back: {error.strerror}") from error
        if self._fill.body is body:
            await self._show(body)
        return body

    async def _finish_in_memory(self, body: GrowingBody) -> None:
        deps, memory = self._deps, self._memory
        assert memory is not None
        remote = remote_of(body.head)
        try:
            if self._whole:
                await self._finish(body, remote)
            else:
                remote = await self._receive(body)
        except DiskError as error:
            raise Problem("overloaded", f"no memory for it: {error.strerror}") from error
        if self._fill.is_purged(deps.purges):
            return
        expires = None
        if not self._fill.route.immutable:
            fresh_until = validated_at(deps, remote, immutable=False) + deps.settings.cache.index_ttl
            expires = max(fresh_until - deps.wall_clock(), 0.001)
        error_ttl = deps.settings.cache.error_ttl
        memory.finish(body.published, expires_seconds=expires, store_seconds=error_ttl)

    async def _tell_unstorable(
        self, why: str, *, disk: bool, reported: bool, passed_through: bool = False
    ) -> None:
        """Remember for `cache.error_ttl` that it can't be stored; tell the controller unless `reported`."""
        deps = self._deps
        if reported and not passed_through:
            return
        failure = Failure.of(Problem("overloaded", why), deps.settings.cache.error_ttl, deps.clock())
        state = replace(self._current_state(), head=None, failure=failure, passed_through=passed_through)
        async with self._files:
            if not self._fill.freed:
                await self._in_thread(give_up, deps.store, state)
        if not reported:
            self._log_end("unstorable", detail=why)
            event = {"type": "unstorable", "key": self._key.text, "detail": why, "disk": disk}
            deps.tell({**event, "length": self._length})

    async def _store_memory(self) -> None:
        """Retry storing a body that is complete in memory, without asking an upstream."""
        deps, row = self._deps, self._deps.memory.find(self._key)
        if self._leftover.unstorable is not None or row is None:
            self._fill.finish(FillEnd.UNSTORABLE)
            return
        try:
            file, state = deps.memory.open(row)
            assert state.head is not None
            stat = os.fstat(file.fd)
            await self._room.reserve(stat.st_size)
            body = self._begin_generation(state.head)
            self._state.path = state.path
            self._came_at = stat.st_mtime
            await self._room.on_disk(self._part.copy_memory, file, stat.st_size)
            await self._finish(body, remote_of(state.head))
        except (Unstorable, DiskError) as error:
            self._state.phase = Phase.UNSTORABLE
            self._room.release(committed=False)
            disk = isinstance(error, DiskError) or error.disk
            await self._tell_unstorable(refusal(error), disk=disk, reported=False)
            self._fill.finish(FillEnd.UNSTORABLE)
        except (OSError, ValueError) as error:
            log.info("%s was removed from memory: %s", self._key.text, error)
            self._fill.finish(FillEnd.UNSTORABLE)

    # --- ends other than a commit

    async def fail(self, problem: Problem, ttl_seconds: float = 0.0, *, drop: bool = False) -> None:
        """FAILED: reported to the clients, and remembered so that no upstream is asked until it has expired.

        A part is kept for resuming, except one whose bytes were wrong; its state is kept with it.
        """
        deps, fill, held_back = self._deps, self._fill, problem.slug == budget_gate.SLUG
        if held_back:
            problem.extensions = problem.extensions or deps.budget.stated()  # a member has said so
        if problem.slug in _EXPECTED:
            stands = problem.stands_seconds
            ttl_seconds = deps.settings.cache.negative_ttl if stands is None else stands
        drop = drop or problem.slug in ("upstream-bad-body", "upstream-unsure-end")
        if fill.aside or not is_shared(problem, fill.passed, asks_gups=fill.asks_gups):
            ttl_seconds = 0.0
        deps.failures.put(self._key, fill.route.upstream_path, problem, ttl_seconds)
        if self._has_state or self._holds.rows or (self._writer is not None and self._writer.exists):
            failure = Failure.of(problem, ttl_seconds, deps.clock())
            state = replace(self._current_state(), phase=Phase.FAILED, failure=failure)
            state = replace(state, head=None) if drop else state
            try:
                async with self._files:
                    if not fill.freed:
                        await self._in_thread(save_failure, deps.store, state, drop)
            except DiskError as error:
                log.warning("could not store the failure of %s: %s", self._key.text, error)
        self._room.release(committed=False)
        if problem.retry_after_seconds is None:
            problem = remembered_problem(problem.slug, problem.detail, ttl_seconds)
        fill.fail(problem)
        if not held_back:  # that is no failure: it has not begun
            self._tell_failed(problem)

    def _tell_failed(self, problem: Problem) -> None:
        deps = self._deps
        if problem.slug not in _EXPECTED:
            deps.counters.add("gup_fills_total", outcome="failed")
        self._log_end("failed", problem=problem.slug, detail=problem.detail)
        if not self._fill.background:  # the controller knows about its own fetches
            self._times.stop()
            self._has_told = True
            event = {"type": "failed", "key": self._key.text, "problem": problem.slug}
            deps.tell({**event, "detail": problem.detail} | self._times.told())

    def note_times(self) -> None:
        """The fill is over: count its phases, and tell them if no other event has."""
        times = self._times
        times.stop()
        for phase, seconds in times.spent.items():
            if seconds >= _COUNTED_SECONDS and phase in FILL_PHASES:
                self._deps.counters.observe("gup_fill_phase_seconds", seconds, phase=phase)
        if not self._has_told and times.seconds >= _TOLD_SECONDS:
            self._deps.tell({"type": "ended", "key": self._key.text} | times.told())

    def _ttl_seconds(self, failure: UpstreamFailure) -> float:
        """How long no upstream is to be asked for this key after this failure.

        A failure of all upstreams is remembered by the pool, not for each key.
        """
        if failure.slug == "overloaded":
            return 0.0
        candidates = self._deps.pool.candidates(self._fill.variant, self._key.text)
        waits = [self._holds.seconds_left(upstream.name) for upstream in candidates]
        if waits and all(waits):
            return min(waits)
        return 0.0 if failure.outcome == "unreachable" else self._deps.settings.cache.error_ttl

    # --- a purge that names the body

    async def _step_aside(self) -> None:
        """Free the key's claim, so that the next fill can begin; this one goes on for those that read it.

        1. The files are removed: readers have them open. 2. A lock tells followers that this one goes on. 3.
        The claim is freed. What is in memory keeps it: its readers find the body by the key.
        """
        fill, deps = self._fill, self._deps
        async with self._files:
            if self._memory is not None or fill.over or fill.step_aside is None:
                return
            await self._in_thread(self._drop_files)
            beside = aside_offset(self._key.id, self._state.generation)
            self._aside_at = beside if deps.claims.try_claim(beside) else None
            fill.freed = True
            deps.claims.release(self._key.claim_offset)

    def _end_aside(self) -> None:
        if self._aside_at is not None:
            self._deps.claims.release(self._aside_at)
            self._aside_at = None
        if self._fill.freed and self._writer is not None and self._writer.exists:
            self._deps.executor.submit(self._drop_files)

    def _require_claim(self) -> None:
        """Problem when it was freed: then nothing can be begun anew."""
        if self._fill.freed:
            raise Problem("overloaded", "it was purged while it was fetched", retry_after_seconds=1.0)

    def _head_of(self, remote: RemoteHead) -> Head:
        return head_of(self._key, remote, self._fill.order or "", changed=self._bytes_changed)

    # --- bookkeeping

    @property
    def _part(self) -> PartWriter:
        assert self._writer is not None
        return self._writer

    @property
    def _source(self) -> Download:
        assert self._download is not None
        return self._download

    @property
    def _source_head(self) -> RemoteHead:
        head = self._source.head
        assert head is not None
        return head

    def _move(self, phase: Phase) -> None:
        assert phase is self._state.phase or phase in TRANSITIONS[self._state.phase], (
            self._state.phase,
            phase,
        )
        self._state.phase = phase

    def _current_state(self) -> FillState:
        return replace(
            self._state,
            background=self._fill.background,
            holds=self._holds.rows,
            service_start=self._deps.store.service_start,
            from_wan=self._fill.from_wan(),
        )

    def _noted_state(self, head: Head | None = None) -> FillState:
        self._state = self._current_state()
        self._state.head = head or self._state.head
        self._has_state = True
        return self._state

    async def _save_state(self) -> None:
        async with self._files:
            if not self._fill.freed:
                await self._room.on_disk(self._deps.store.save_state, self._noted_state())

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        return await on_disk(self._deps.executor, work, *arguments)

    def _log_end(self, outcome: str, **fields: object) -> None:
        good = outcome in ("stored", "validated") or fields.get("problem") in _EXPECTED
        seconds = round(self._times.seconds, 6)
        extra = {"outcome": outcome, "key": self._key.text, **fields, "seconds": seconds}
        if seconds >= self._deps.settings.reports.slow:
            extra |= {f"{phase}_seconds": spent for phase, spent in rounded(self._times.spent).items()}
        log.log(logging.INFO if good else logging.WARNING, "fill", extra=extra)


def _commit(store: Store, record: Record, *, new: bool, clear: bool) -> bool:
    """Whether the body replaced another. OSError when the disk refuses. Blocks, for 10 s at most.

    `new`: see `Store.commit`. `clear`: the fill's state may be on the disk. Waiting for a free descriptor is
    better than fetching the body again. Each attempt continues the last one.
    """
    for tries_left in range(_COMMIT_TRIES, -1, -1):
        try:
            replaced = store.commit(record, new=new)
            break
        except OSError as error:
            if not tries_left or not is_exhausted(error):
                raise
        time.sleep(_COMMIT_PAUSE_SECONDS)
    if record.length >= CHUNK_BYTES:
        store.drop_journal(record.key.id, record.generation)
    elif clear:  # it has no sums file
        store.drop_state(record.key.id)
    return replaced
