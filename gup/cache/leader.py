"""The leader of a fill: from the claim to the commit, or to the reason why not.

CLAIMED → REQUESTED → STREAMING → COMMITTED | FAILED | UNSTORABLE (gup.cache.records holds the table). The
caller holds the key's claim while `Leader.run` runs. What the disk refuses goes on in a memory file.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from gup.cache.demotions import BadDiskError
from gup.cache.disk import DiskError, on_disk
from gup.cache.disk_space import STEP_BYTES, Room, Unstorable, refusal
from gup.cache.growing_body import GrowingBody
from gup.cache.inflight import PRIORITIES, Flight, Landing, Means, committed, hurry
from gup.cache.locks import want_offset
from gup.cache.memory_files import STEP_BYTES as MEMORY_STEP_BYTES
from gup.cache.memory_files import MemoryFile, MemoryFull
from gup.cache.negative_cache import Holds
from gup.cache.part_file import ZIP_TAIL_BYTES, PartWriter, Salvage, WriteBehind, zip_end_is_right
from gup.cache.records import (
    CHUNK_BYTES,
    Failure,
    FillState,
    Head,
    Hold,
    Phase,
    Record,
    absent,
    head_of,
    may_move,
    remote_of,
)
from gup.cache.recovery import (
    Damage,
    Prior,
    drop_parts,
    examine,
    give_up,
    is_the_entry,
    note_damage,
    renew,
    save_failure,
    validated_at,
)
from gup.cache.scheduler import Place
from gup.cache.store import OpenFile, Store
from gup.content.key import ContentKey, Kind
from gup.errors import Problem, exhausted, is_exhausted
from gup.upstream.download import Begun, BodyChanged, Download
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators, unconfirmed
from gup.upstream.session import Ask, Upstream

log = logging.getLogger("gup.fill")

_LOOK_SECONDS = 0.02
"""Between two looks at what others do: a client that asks waits no longer for its fill to be hurried."""


_MOST_CHANGES = 2
"""So often upstream may have another body while one is being fetched, before the fill is given up."""
_Result = TypeVar("_Result")


Reread = Callable[[int, int], Awaitable[bytes]]
"""Gives back so many bytes from an offset on that were received before."""


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
        self._download: Download | None = None
        self._holds = holds_of(means, flight, ())
        self._memory: MemoryFile | None = None
        """What `_writer` writes to since the disk refused."""
        self._body: GrowingBody | None = None
        """What `_writer` writes, be it shown already or not."""
        self._room = Room(means.space)
        self._courtesy = Courtesy(means, flight)
        self._told: Mapping[str, Validators] = {}
        """What upstreams told of the part under way, as its state has it."""
        self._damage: Damage | None = None
        """Of an entry that is not a part yet: what of it is compared with the upstream's bytes."""
        self._pinned = False
        self._stored_at: float | None = None
        """Of a demoted entry, which the body is again when it is whole."""
        self._is_stored = False
        """Whether there is an older body under this key, which is served on if this fill fails."""
        self._bytes_changed = False
        """Whether upstream has other bytes than were stored: their ETag must be another, too."""
        self._came_at: float | None = None
        """When a part's last byte came, if it was found whole; Unix seconds."""
        self._began_at = means.clock()

    async def run(self) -> None:
        """Bring the flight to its end. Cancelled: the part stays for whoever claims the key next."""
        try:
            await self._run()
        except UpstreamFailure as failure:
            stands = stand_seconds(self._means, self._flight, self._holds, failure)
            told = failure.retry_after_seconds if not stands else None
            await self._fail(Problem(failure.slug, failure.detail, retry_after_seconds=told), stands)
        except BodyChanged as error:
            await self._fail(Problem("upstream-bad-body", str(error)), 0.0, drop=True)
        except Problem as problem:
            await self._fail(problem, 0.0)
        except OSError as error:
            if not is_exhausted(error):
                raise
            await self._fail(exhausted(error), 0.0)
        finally:
            self._writer = None  # its descriptors close when no thread writes any more
            if self._memory is not None and not self._memory.finished:
                self._memory.drop()

    async def _run(self) -> None:
        prior: Prior | Landing | Failure
        try:
            prior = await self._on_disk(examine, self._means, self._flight)
        except DiskError as error:
            prior = Prior(unstorable=refusal(error))
        if isinstance(prior, Landing):
            await self._end_body()
            self._flight.land(prior)
            return
        if isinstance(prior, Failure):
            now = self._means.clock()
            self._flight.fail(prior.problem(now), prior.until - now)
        elif self._flight.from_memory:
            await self._store_memory(prior)
        elif prior.finished:
            await self._finish_part(prior)
        else:
            await self._fetch_whatever(prior)

    async def _fetch_whatever(self, prior: Prior) -> None:
        """Fetch it, or the rest of it; under another spelling if upstream does not have this one."""
        if prior.salvage is not None and self._flight.body is not None:
            self._flight.inherits = True
        self._holds = holds_of(self._means, self._flight, prior.holds)
        if prior.state is not None:
            self._head, self._generation = prior.state.head, prior.state.generation
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
        """Fetch when a slot is free. What is returned tells that upstream does not have it.

        Nobody waits for a slot while no upstream can be reached.
        """
        if prior.damage is None and not prior.is_whole and not self._flight.is_read:
            self._means.pool.refuse_while_away(self._flight.variant, self._key.text)
        async with self._courtesy.place() as held:
            if not held:
                raise self._means.queue.refusal(self._flight.share.priority)
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
        """Fetch and store, or, as soon as that can't be, fetch into memory."""
        self._move(Phase.REQUESTED)
        self._flight.fetched = True
        self._is_stored = prior.record is not None
        try:
            if prior.unstorable is not None:
                return await self._without_disk(
                    prior.record, Unstorable(prior.unstorable, disk=True), told=prior.told
                )
            try:
                return await self._store(prior)
            except (Unstorable, DiskError) as error:
                return await self._without_disk(prior.record, error)
        finally:
            self._leave_upstream()

    async def _store(self, prior: Prior) -> Problem | UpstreamFailure | None:
        body: GrowingBody | None = None
        if prior.damage is not None:
            body = await self._demote(prior.damage)
        elif prior.state is not None and prior.salvage is not None:
            body = await self._resume(prior.state, prior.salvage)
        for changes_left in range(_MOST_CHANGES, -1, -1):
            if body is None:
                remote = await self._ask_upstream(None, prior.record).begin()
                if remote.status != 200:
                    return await self._without_body(prior.record, remote)
                body = await self._open_part(remote)
            try:
                await self._stream(body)
                break
            except BodyChanged as error:
                if not changes_left:
                    raise
                log.warning("%s is fetched anew: %s", self._key.text, str(error))
                await self._give_up_generation()
                body = None
        return None

    async def _without_body(
        self, record: Record | None, remote: RemoteHead
    ) -> Problem | UpstreamFailure | None:
        if remote.status == 304 and record is not None:
            await self._validated(record, remote)
            return None
        return absent(remote)

    def _ask_upstream(self, begun: Begun | None, record: Record | None) -> Download:
        """A new download, to be begun; one that was under way is given up."""
        self._leave_upstream()
        self._download = download_of(
            self._means, self._flight, self._path, self._reread, begun, record, self._holds
        )
        return self._download

    def _leave_upstream(self) -> None:
        if self._download is not None:
            self._download.close()
            self._download = None

    async def _reread(self, offset: int, length: int) -> bytes:
        """For Download, which compares. What can't be read must not pass for the disk refusing a write."""
        writer = self._writer
        try:
            if writer is None:
                assert self._damage is not None
                assert self._damage.file is not None
                return await self._in_thread(os.pread, self._damage.file.fd, length, offset)
            return await writer.reread(offset, length)
        except DiskError as error:
            detail = f"what is here can't be compared: {error.strerror or error}"
            raise UpstreamFailure("error", "upstream-bad-body", detail, again=False) from error

    async def _open_part(self, remote: RemoteHead) -> GrowingBody:
        """Make room and a new part for the body that `remote` announces."""
        await self._room.reserve(remote.length if remote.length is not None else STEP_BYTES)
        assert self._download is not None
        self._told = self._download.told
        return await self._new_generation(head_of(self._key, remote, changed=self._bytes_changed))

    async def _new_generation(
        self, head: Head, old: OpenFile | None = None, salvage: Salvage | None = None
    ) -> GrowingBody:
        """A part of a new generation, begun with the good chunks of `old` if there are any."""
        means = self._means
        self._generation = self._next_generation()
        paths = means.store.part_paths(self._key.id, self._generation)
        writer = PartWriter(*paths, means.executor, head.length, self._published)
        if old is not None and salvage is not None:
            await self._on_disk(writer.copy_from, old, salvage.verified, salvage.sums)
        self._writer = writer
        self._body = GrowingBody(head, self._generation, None, means.clock())
        return self._body

    async def _show(self, body: GrowingBody, *, whole: bool = False) -> None:
        """STREAMING: the state for other processes, the body for this one.

        Not before there is something to read: until then whatever fails can be told in a clean answer. Of a
        body that is whole already the readers here wait for no state: it ends in a commit, come what may.
        """
        if self._memory is not None:
            self._show_memory(body, self._memory)
            if whole:
                body.complete(body.published)
            return
        self._move(Phase.STREAMING)
        self._head = body.head
        if not whole:
            await self._on_disk(self._means.store.save_state, self._state(head=body.head))
        writer = self._writer
        assert writer is not None
        body.file = writer.file
        self._flight.attach(body)
        body.publish(max(writer.written, body.published))
        if whole:
            body.complete(writer.written)
            await asyncio.sleep(0)  # its readers first
            await self._on_disk(self._means.store.save_state, self._state(head=body.head))
        if not self._flight.ahead:
            self._means.tell(begun(self._key, self._flight.route.kind, self._path))

    def _published(self, size: int) -> None:
        body = self._flight.body
        if body is not None and body.generation == self._generation:
            body.publish(max(size, body.published))

    # --- a damaged entry

    async def _demote(self, damage: Damage) -> GrowingBody | None:
        """Make the entry a part again, now that an upstream has answered for its rest; None: it has another.

        Until then the entry's sound chunks are served. Its readers are cut where the damage begins.
        """
        means, record = self._means, damage.record
        sound_bytes = min(damage.sound * CHUNK_BYTES, record.length)
        self._path = record.path or self._path
        self._damage, self._flight.repairs = damage, True
        download = self._ask_upstream(Begun(remote_of(record.head), sound_bytes, sound_bytes), None)
        try:
            await download.begin()
        except BodyChanged as error:
            self._leave_upstream()
            self._bytes_changed = True
            log.warning("%s is damaged and fetched anew: %s", self._key.text, str(error))
            return None
        finally:
            self._damage = None
        try:
            await self._in_thread(means.store.demotions.note, self._key.id)
        except BadDiskError as error:
            raise Unstorable(str(error), disk=True) from error
        await self._room.reserve(record.length)
        self._move(Phase.STREAMING)
        self._head, self._told = record.head, download.told
        self._pinned, self._stored_at = record.pinned, record.stored_at
        self._generation = self._next_generation()
        state = self._state(head=record.head)
        await self._on_disk(means.store.demote, record, damage.file, damage.sound, state)
        means.raise_store_epoch()
        log.info("%s is damaged from byte %d on: the rest is fetched again", self._key.text, sound_bytes)
        body = await self._reopen(state, Salvage(sound_bytes, sound_bytes, list(record.sums[: damage.sound])))
        self._flight.attach(body)
        body.publish(max(sound_bytes, body.published))
        return body

    # --- going on with a dead leader's part

    async def _resume(self, state: FillState, salvage: Salvage) -> GrowingBody | None:
        """Go on with a part; None when it turned out to be worth nothing (and is gone).

        Undamaged, the same generation goes on and its readers notice nothing. Where a chunk or the tail is
        bad, the good chunks go to a new generation and readers of the old one are cut.
        """
        assert state.head is not None
        await self._room.reserve(state.head.length or salvage.size + STEP_BYTES)
        self._take_over_state(state)
        differs_at = salvage.size
        if salvage.whole:
            try:
                return await self._begin_again(state.head, await self._reopen(state, salvage), salvage)
            except BodyChanged as error:
                self._leave_upstream()
                differs_at = error.offset
                log.warning("the part of %s is not what upstream has: %s", self._key.text, str(error))
        if differs_at >= salvage.verified:
            detail = f"good up to byte {salvage.verified} of {salvage.size}"
            note_damage(self._means, "part", self._key, detail)
        if 0 < salvage.verified <= differs_at:
            body = await self._keep_good_chunks(state, salvage)
            try:
                return await self._begin_again(state.head, body, replace(salvage, size=salvage.verified))
            except BodyChanged:
                self._leave_upstream()
                log.warning("upstream now has other bytes for %s: fetched anew", self._key.text)
        await self._give_up_generation()
        return None

    def _take_over_state(self, state: FillState) -> None:
        self._head, self._generation, self._told = state.head, state.generation, state.told
        self._pinned, self._stored_at = state.pinned, state.stored_at

    async def _give_up_generation(self) -> None:
        """Upstream has another body by now: readers are cut, here and elsewhere, and the part goes."""
        self._leave_upstream()
        self._flight.detach()
        self._flight.settling = False
        self._head, self._told, self._bytes_changed = None, {}, True
        self._writer = self._body = None
        self._start_over()
        await self._in_thread(drop_parts, self._means.store, self._key)
        await self._on_disk(self._means.store.save_state, self._state())  # followers see it
        self._room.release(committed=False)

    async def _finish_part(self, prior: Prior) -> None:
        """Commit a part that holds every byte: nobody has to be asked for anything."""
        state, salvage = prior.state, prior.salvage
        assert state is not None
        assert state.head is not None
        assert salvage is not None
        self._take_over_state(state)
        self._flight.settling = True
        try:
            body = await self._reopen(state, salvage)
            assert self._writer is not None
            if not body.ended:
                body.publish(max(salvage.size, body.published))
                body.complete(salvage.size)
            self._flight.attach(body)
            self._came_at = os.fstat(self._writer.file.fd).st_mtime
            await self._commit(self._writer, remote_of(state.head), state.head)
        except DiskError as error:
            log.warning("%s is whole and can't be stored: %s", self._key.text, refusal(error))
            self._flight.land(Landing.UNSTORABLE)

    async def _reopen(self, state: FillState, salvage: Salvage) -> GrowingBody:
        assert state.head is not None
        means, head = self._means, state.head
        paths = means.store.part_paths(self._key.id, self._generation)
        self._writer = await self._on_disk(
            PartWriter.reopen, *paths, means.executor, head.length, self._published, salvage
        )
        body = self._flight.body
        if body is None or body.generation != self._generation:
            body = GrowingBody(head, self._generation, self._writer.file, means.clock())
        self._body = body
        return body

    async def _begin_again(self, head: Head, body: GrowingBody, salvage: Salvage) -> GrowingBody:
        """Ask for the rest; the body is shown when upstream has confirmed what of it was unsure."""
        begun = Begun(remote_of(head), salvage.size, salvage.verified, self._told)
        download = self._ask_upstream(begun, None)
        await download.begin()
        self._told = download.told
        await self._show(body)
        return body

    async def _keep_good_chunks(self, state: FillState, salvage: Salvage) -> GrowingBody:
        assert state.head is not None
        old = await self._in_thread(OpenFile, self._means.store.part_path(self._key.id, state.generation))
        self._start_over()
        body = await self._new_generation(state.head, old, salvage)
        await self._in_thread(self._means.store.save_state, self._state(head=state.head))
        await self._in_thread(self._means.store.drop_part, self._key.id, state.generation)
        return body

    # --- the body

    async def _stream(self, body: GrowingBody) -> None:
        writer, download = self._writer, self._download
        assert writer is not None
        assert download is not None
        async with WriteBehind(writer, lambda: self._write(writer.write_sure)) as behind:
            while piece := await behind.beside(download.read):
                if download.told is not self._told:
                    await self._note_told(download)
                writer.take(piece)
                if self._memory is None:
                    await self._room.keep(writer.received)
                else:
                    self._memory.keep(writer.received)
                if writer.all_held:
                    continue
                shown = self._flight.body is body
                await behind.begin(wait=not shown)
                if writer.written and not shown:
                    await self._show(body)
                if download.slow:
                    self._courtesy.leave_place()
                await self._courtesy.give_way()
        self._flight.settling = True  # from here on it ends by itself, and soon
        await self._check_structure(writer.received, writer.reread)
        await self._write(writer.write_withheld)
        assert download.head is not None
        self._leave_upstream()
        if not download.confirmed:
            await self._pass_on_unconfirmed(body, writer, download.head)
        if self._flight.body is not body:
            await self._show(body, whole=True)
        else:
            body.complete(writer.written)
        if self._memory is None:
            await self._commit(writer, download.head, body.head)

    async def _write(self, work: Callable[[], Awaitable[None]]) -> None:
        """On the disk once more when it was full and something could be evicted."""
        await (self._room.twice(work) if self._memory is None else work())

    async def _note_told(self, download: Download) -> None:
        """Another upstream, or one that tells other validators, goes on: the state is to have them first."""
        self._told = download.told
        if self._phase is Phase.STREAMING:
            with contextlib.suppress(OSError):  # the next write will tell
                await self._in_thread(self._means.store.save_state, self._state(head=self._head))

    async def _check_structure(self, received: int, reread: Reread) -> None:
        try:
            await check_structure(self._means, self._flight, received, reread)
        except UpstreamFailure as failure:
            assert self._download is not None
            head = self._download.head
            assert head is not None
            self._holds.note(head.upstream, failure, head)
            raise

    async def _pass_on_unconfirmed(self, body: GrowingBody, writer: PartWriter, remote: RemoteHead) -> None:
        """All that came is for those who wait, without an end that nobody knows; then UpstreamFailure.

        A stored index file that is stale is better than one that may lack its end.
        """
        if self._flight.body is not body and not self._is_stored:
            await self._show(body)
            await asyncio.sleep(0)  # who waits becomes a reader before the failure is told
        raise unconfirmed(remote.upstream, writer.received)

    async def _commit(self, writer: PartWriter, remote: RemoteHead, head: Head) -> None:
        """Publish the part as the key's body: its readers have it whole by now, and the link is another's."""
        means = self._means
        self._courtesy.leave_place()
        sums = writer.finish()
        if head.length is None:
            remote = replace(remote, length=writer.written)
            head = head_of(self._key, remote, changed=self._bytes_changed)
        now = means.wall_clock()
        route = self._flight.route
        record = Record.of(self._key, route.kind, head, sums, now, self._generation, self._path)
        record = replace(record, pinned=self._pinned, stored_at=self._stored_at or now)
        valid_at = validated_at(means, remote, route.immutable)
        record = record.validated(valid_at if self._came_at is None else min(valid_at, self._came_at))
        replaced = await self._on_disk(commit, means.store, record)
        self._move(Phase.COMMITTED)
        self._room.release(committed=True)
        seconds = means.clock() - self._began_at
        tell_commit(means, record, replaced=replaced, seconds=seconds, upstream=head.upstream)
        self._flight.land(Landing.COMMITTED)

    async def _validated(self, record: Record, remote: RemoteHead) -> None:
        """Upstream says that the stored index file is still right."""
        means = self._means
        at = validated_at(means, remote, self._flight.route.immutable)
        try:
            await self._on_disk(renew, means, record, at)
        except DiskError as error:  # asked again at the next request: what is stored is right all the same
            log.warning("that %s is still right could not be kept: %s", self._key.text, error)
        self._flight.land(Landing.VALIDATED)
        log_end("validated", self._key, means.clock() - self._began_at)

    # --- going on without the disk

    async def _without_disk(
        self, record: Record | None, refused: Unstorable | DiskError, *, told: bool = False
    ) -> Problem | UpstreamFailure | None:
        """UNSTORABLE: what upstream still sends goes to the readers from a memory file.

        Wherever the fill stood: 1. All is here, and only the commit was refused. 2. A body is arriving: its
        readers go on. 3. Nothing has arrived: it begins in memory. What is too large, or finds no room in
        memory, has its readers cut: each client is passed through alone.
        """
        why, flight = refusal(refused), self._flight
        disk = isinstance(refused, DiskError) or refused.disk
        self._move(Phase.UNSTORABLE)
        self._room.release(committed=False)
        self._means.counters.add("gup_fills_total", outcome="unstorable")
        alone = isinstance(refused, Unstorable) and refused.too_large
        try:
            if not alone and self._is_worth_memory():
                if self._download is None and not self._is_whole:
                    self._writer = self._body = None
                    remote = await self._ask_upstream(None, record).begin()
                    if remote.status != 200:
                        return await self._without_body(record, remote)
                body = await self._enter_memory()
                await self._tell_unstorable(why, disk=disk, told=told)
                told = True
                await self._stream_to_memory(body)
        except MemoryFull as error:
            log.info("%s is passed through: %s", self._key.text, error)
            alone = True
        if self._memory is None or not self._memory.finished:
            await self._tell_unstorable(why, disk=disk, told=told, passed_through=alone)
            if not await self._is_readable():
                flight.detach()
        flight.land(Landing.UNSTORABLE)
        return None

    @property
    def _is_whole(self) -> bool:
        return self._body is not None and self._body.ended

    def _is_worth_memory(self) -> bool:
        """Whether anybody waits for it, here or elsewhere; what is whole is kept for who comes late."""
        if self._is_whole:
            return True
        return self._flight.wanted or self._means.claims.taken(want_offset(self._key.id))

    async def _enter_memory(self) -> GrowingBody:
        """Go on in a memory file with what has arrived, after comparing it with its sums. MemoryFull."""
        means, body, writer = self._means, self._body, self._writer
        if body is None:
            assert self._download is not None
            assert self._download.head is not None
            head = head_of(self._key, self._download.head, changed=self._bytes_changed)
            self._generation = self._next_generation()
            body = self._body = GrowingBody(head, self._generation, None, means.clock())
        arrived = writer.received if writer is not None else 0
        length = arrived if body.ended else body.head.length
        amount = length if length is not None else arrived + MEMORY_STEP_BYTES
        memory = means.memory.begin(self._key, self._generation, amount)
        self._memory = memory
        means.memory.hold(self._key, body)
        if writer is None:
            self._writer = PartWriter.in_memory(
                memory.file, means.executor, body.head.length, self._published
            )
            return body
        body.hold_back()
        try:
            await self._in_thread(writer.move, memory.file)
        except DiskError as error:
            raise Problem("overloaded", f"what was written can't be read back: {error.strerror}") from error
        if self._flight.body is body:
            self._show_memory(body, memory)
        return body

    def _show_memory(self, body: GrowingBody, memory: MemoryFile) -> None:
        memory.announce(replace(self._state(head=body.head), phase=Phase.STREAMING))
        body.go_on_in(memory.file)
        self._flight.attach(body)
        assert self._writer is not None
        body.publish(max(self._writer.written, body.published))

    async def _stream_to_memory(self, body: GrowingBody) -> None:
        means, memory = self._means, self._memory
        assert memory is not None
        remote = remote_of(body.head)
        if not body.ended:
            assert self._download is not None
            try:
                await self._stream(body)
            except DiskError as error:
                raise Problem("overloaded", f"memory refuses it: {error.strerror}") from error
            if self._download is not None and self._download.head is not None:
                remote = self._download.head
        expires = None
        if not self._flight.route.immutable:
            fresh_until = validated_at(means, remote, immutable=False) + means.settings.cache.index_ttl
            expires = max(fresh_until - means.wall_clock(), 0.001)
        error_ttl = means.settings.cache.error_ttl
        memory.finish(body.published, expires_seconds=expires, store_seconds=error_ttl)

    async def _is_readable(self) -> bool:
        """Whether readers may go on with the part: it is whole, and as it was when it arrived."""
        if not self._is_whole or self._writer is None or self._memory is not None:
            return False
        try:
            await self._in_thread(self._writer.move, None)
        except DiskError:
            return False
        return True

    async def _tell_unstorable(
        self, why: str, *, disk: bool, told: bool, passed_through: bool = False
    ) -> None:
        """Keep for `cache.error_ttl` that it is not to be stored; tell the controller unless it is `told`."""
        means, key = self._means, self._key
        if told and not passed_through:
            return
        failure = Failure.of(Problem("overloaded", why), means.settings.cache.error_ttl, means.clock())
        state = replace(self._state(failure=failure), passed_through=passed_through)
        for error in await self._in_thread(give_up, means.store, state):
            log.warning("of %s something stays on the disk: %s", key.text, error)
        if not told:
            log_end("unstorable", key, means.clock() - self._began_at, detail=why)
            means.tell({"type": "unstorable", "key": key.text, "detail": why, "disk": disk})

    async def _store_memory(self, prior: Prior) -> None:
        """Try again to store a body that is whole in memory: nobody is asked for it again."""
        means, row = self._means, self._means.memory.find(self._key)
        if prior.unstorable is not None or row is None:
            self._flight.land(Landing.UNSTORABLE)
            return
        try:
            file, state = means.memory.open(row)
            assert state.head is not None
            stat = os.fstat(file.fd)
            await self._room.reserve(stat.st_size)
            self._generation = self._next_generation()
            paths = means.store.part_paths(self._key.id, self._generation)
            writer = self._writer = PartWriter(*paths, means.executor, stat.st_size, self._published)
            await self._on_disk(writer.copy_memory, file, stat.st_size)
            self._came_at, self._path = stat.st_mtime, state.path
            await self._commit(writer, remote_of(state.head), state.head)
        except (Unstorable, DiskError) as error:
            self._move(Phase.UNSTORABLE)
            self._room.release(committed=False)
            disk = isinstance(error, DiskError) or error.disk
            await self._tell_unstorable(refusal(error), disk=disk, told=False)
            self._flight.land(Landing.UNSTORABLE)
        except (OSError, ValueError) as error:
            log.info("%s is not in memory any more: %s", self._key.text, error)
            self._flight.land(Landing.UNSTORABLE)

    # --- ends other than a commit

    async def _fail(self, problem: Problem, ttl_seconds: float, *, drop: bool = False) -> None:
        """FAILED: told to the clients, and kept so that nobody asks upstream before it has passed.

        A part is kept for resuming, but not one whose bytes were found wrong.
        """
        means = self._means
        absent = problem.slug in ("upstream-not-found", "upstream-gone")
        if absent:
            ttl_seconds = means.settings.cache.negative_ttl
        drop = drop or problem.slug in ("upstream-bad-body", "upstream-unsure-end")
        failure = Failure.of(problem, ttl_seconds, means.clock())
        self._move(Phase.FAILED)
        head = None if drop else self._head
        state = self._state(head, failure)
        try:
            await self._in_thread(save_failure, means.store, state, drop)
        except DiskError as error:
            log.warning("the failure of %s could not be kept: %s", self._key.text, error)
        self._room.release(committed=False)
        if problem.retry_after_seconds is None:
            problem = failure.problem(means.clock())
        self._flight.fail(problem, ttl_seconds)
        if not absent:
            means.counters.add("gup_fills_total", outcome="failed")
        tell_failure(means, self._flight, problem, means.clock() - self._began_at)

    # --- bookkeeping

    def _move(self, phase: Phase) -> None:
        assert phase is self._phase or may_move(self._phase, phase), (self._phase, phase)
        self._phase = phase

    def _state(self, head: Head | None = None, failure: Failure | None = None) -> FillState:
        phase, path = self._phase, self._path
        kind, ahead = self._flight.route.kind, self._flight.ahead
        holds, told = self._holds.rows, self._told
        return FillState(
            self._key,
            kind,
            self._generation,
            phase,
            head,
            failure,
            path=path,
            ahead=ahead,
            pinned=self._pinned,
            stored_at=self._stored_at,
            service_start=self._means.store.service_start,
            holds=holds,
            told=told,
        )

    def _next_generation(self) -> int:
        return int(self._means.wall_clock() * 1_000_000_000)

    def _start_over(self) -> None:
        """What was streaming is given up: another generation begins where a first one would."""
        self._phase = Phase.REQUESTED

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        return await on_disk(self._means.executor, work, *arguments)

    async def _on_disk(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """In a thread, and once more when the disk was full and something could be evicted."""
        return await self._room.twice(lambda: self._in_thread(work, *arguments))


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


def holds_of(means: Means, flight: Flight, rows: Iterable[Hold]) -> Holds:
    """The upstreams that a flight's key is not asked for; what is found wrong is told to the controller."""

    def tell(upstream: str, detail: str) -> None:
        means.tell({"type": "rejected", "key": flight.key.text, "upstream": upstream, "detail": detail})

    return Holds(rows, means.settings.cache.error_ttl, means.clock, tell)


def stand_seconds(means: Means, flight: Flight, holds: Holds, failure: UpstreamFailure) -> float:
    """How long no upstream is to be asked for a flight's body again after it has failed so.

    What took all upstreams down needs no memory of each key: the pool knows.
    """
    if failure.slug == "overloaded":
        return 0.0
    candidates = means.pool.candidates(flight.variant, flight.key.text)
    waits = [holds.seconds_left(upstream.name) for upstream in candidates]
    if waits and all(waits):
        return min(waits)
    return 0.0 if failure.outcome == "unreachable" else means.settings.cache.error_ttl


def download_of(
    means: Means,
    flight: Flight,
    path: str,
    reread: Reread,
    begun: Begun | None,
    record: Record | None,
    holds: Holds,
) -> Download:
    """The download of a flight's body, or of its rest; with `record`, only if upstream has another by now.

    UpstreamFailure when none is up, or all are on hold.
    """
    route, variant, via = flight.route, flight.variant, flight.via
    resuming = begun is not None and flight.is_read
    chosen, reserve = means.pool.chosen(variant, flight.key.text, via, resuming=resuming)
    if not chosen:
        raise Problem("no-upstream", f"no upstream has {variant}")
    upstreams = [upstream for upstream in chosen if not holds.seconds_left(upstream.name)]
    if not upstreams:
        raise _on_hold(chosen, holds)
    conditional = record is not None and begun is None
    ask = Ask(
        path=path,
        purpose=_purpose(flight),
        stream=counted_as(means, flight),
        if_none_match=record.upstream_etag if conditional and record else None,
        if_modified_since=record.last_modified if conditional and record else None,
        share=flight.share,
        via=via,
        client=flight.client,
    )
    return Download(
        means.pool,
        upstreams,
        ask,
        means.counters,
        immutable=route.immutable,
        reread=reread,
        begun=begun,
        reserve=[upstream for upstream in reserve if not holds.seconds_left(upstream.name)],
        is_read=lambda: flight.is_read,
        holds=holds,
        clock=means.clock,
    )


def _on_hold(upstreams: Sequence[Upstream], holds: Holds) -> UpstreamFailure:
    names = ", ".join(upstream.name for upstream in upstreams)
    return UpstreamFailure(
        "error",
        "upstream-error",
        f"{names}: not asked for this again yet, as it said or since what it sent was wrong",
        again=False,
        retry_after_seconds=min(holds.seconds_left(upstream.name) for upstream in upstreams),
    )


def _purpose(flight: Flight) -> str:
    """What the bytes are counted under: what began ahead stays so when somebody asks for it meanwhile."""
    if flight.repairs:
        return "repair"
    if flight.ahead:
        return "prefetch"
    return "index" if flight.route.kind is Kind.INDEX else "fill"


def counted_as(means: Means, flight: Flight) -> tuple[int, str]:
    """Number of the stream and kind that a flight's bytes are counted under."""
    return means.streams.number(flight.key), str(flight.route.kind)


async def check_structure(means: Means, flight: Flight, received: int, reread: Reread) -> None:
    """UpstreamFailure when a whole body of `received` bytes can't be what its name says."""
    file = flight.key.file
    if not file.lower().endswith(".zip"):
        return
    start = max(0, received - ZIP_TAIL_BYTES)
    if not zip_end_is_right(await reread(start, received - start)):
        means.counters.waste("rejected", counted_as(means, flight), received)
        raise UpstreamFailure(
            "rejected",
            "upstream-bad-body",
            f"what came as {file} does not end as a ZIP file does",
            again=False,
        )


_TRIES = 50
_PAUSE_SECONDS = 0.2


def begun(key: ContentKey, kind: Kind, path: str) -> dict[str, object]:
    """The event that tells the controller of a body that clients asked for and that has begun to arrive."""
    return {"type": "begun", "key": key.text, "kind": str(kind), "path": path}


def tell_failure(means: Means, flight: Flight, problem: Problem, seconds: float) -> None:
    """Tell the log, and the controller of what clients asked for: it knows what it fetches ahead."""
    log_end("failed", flight.key, seconds, problem=problem.slug, detail=problem.detail)
    if not flight.ahead:
        means.tell(
            {"type": "failed", "key": flight.key.text, "problem": problem.slug, "detail": problem.detail}
        )


def commit(store: Store, record: Record) -> bool:
    """Whether the body replaced another. OSError when the disk refuses. Blocks, for 10 s at most.

    The body's readers have it by now and wait for nothing: rather than to fetch it again it is worth waiting
    until there is a descriptor. Each try goes on where the last one ended.
    """
    for tries_left in range(_TRIES, -1, -1):
        try:
            replaced = store.commit(record)
            break
        except OSError as error:
            if not tries_left or not is_exhausted(error):
                raise
        time.sleep(_PAUSE_SECONDS)
    store.drop_journal(record.key.id, record.generation)
    return replaced


def tell_commit(means: Means, record: Record, *, replaced: bool, seconds: float, upstream: str) -> None:
    """Tell everybody of a new body: other processes, the controller, metrics and the log."""
    if replaced:
        means.raise_store_epoch()
    means.counters.add("gup_fills_total", outcome="committed")
    means.counters.observe("gup_fill_duration_seconds", seconds)
    means.tell(committed(record, replaced=replaced))
    log_end("stored", record.key, seconds, bytes=record.length, upstream=upstream)


_USUAL = frozenset({"upstream-not-found", "upstream-gone"})
"""Upstream need not have what clients ask for: no reason to be warned."""


def log_end(outcome: str, key: ContentKey, seconds: float, **told: object) -> None:
    """`seconds` since the claim; `told` is what else there is to say of such an end."""
    good = outcome in ("stored", "validated") or told.get("problem") in _USUAL
    level = logging.INFO if good else logging.WARNING
    given = {"outcome": outcome, "key": key.text, **told, "seconds": round(seconds, 6)}
    log.log(level, "fill", extra=given)
