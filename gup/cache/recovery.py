"""What earlier fills left: examined by a new leader, finished, taken over or cleared by the controller."""

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gup.cache.inflight import Fill, FillDependencies, FillEnd, committed
from gup.cache.part_file import Salvage, ends_as_named, survey
from gup.cache.records import CHUNK_BYTES, Failure, FillState, Hold, Phase, Record, route_of
from gup.cache.store import OpenFile, Part, Store, sound_chunks, unlink
from gup.content.key import ContentKey
from gup.content.routes import Route
from gup.metrics import Counters
from gup.upstream.exchange import RemoteHead
from gup.upstream.members import is_member

log = logging.getLogger("gup.recovery")

# --- what a new leader finds


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a fill can begin with: a record to revalidate, a part to continue, or nothing."""

    record: Record | None = None
    state: FillState | None = None
    salvage: Salvage | None = None
    finished: bool = False
    """The part has every byte of the body: it is committed without asking upstream."""
    damaged: Record | None = None
    """Of an entry that is demoted to a part, worth `salvage`, as soon as an upstream has answered."""
    file: OpenFile | None = None
    """The damaged entry's body, if it exists."""
    unstorable: str | None = None
    holds: tuple[Hold, ...] = ()
    nothing: bool = False
    """The key has no files at all."""
    reported: bool = False
    """The state says so already, and must not repeat it: it must expire."""

    @property
    def is_whole(self) -> bool:
        if self.state is None or self.state.head is None or self.salvage is None:
            return False
        return self.salvage.size == self.state.head.length


def examine(  # noqa: C901, PLR0911, PLR0912 - one look after the other, in this order
    dependencies: FillDependencies, fill: Fill
) -> Leftover | FillEnd | Failure:
    """Look the key up again now that it is claimed.

    1. An interrupted commit is finished. 2. An entry that is fresh ends the fill. 3. A part that holds every
    byte is to be committed. 4. A failure that has not expired ends the fill; an unstorable body is not stored
    for as long. 5. Of a body that is suspect, or not as recorded, every chunk is compared: sound after all,
    it ends the fill. 6. Otherwise the part worth resuming is kept, others are removed.
    """
    store, key, immutable = dependencies.store, fill.key, fill.route.immutable
    state, record = _load_claimed(dependencies, key)
    holds = state.holds if state is not None else ()
    if record is not None and store.open_body(record) is None and store.finish_commit(record):
        dependencies.tell(committed(record, replaced=True))  # its leader died before it could
        dependencies.raise_store_epoch()
        state, holds = None, ()
    suspect = record is not None and fill.suspect and fill.seen in (None, record.generation)
    sound = record is not None and not suspect and store.open_body(record) is not None
    if record is not None and sound and (immutable or is_fresh(dependencies, record)):
        return FillEnd.COMMITTED
    if state is not None and not suspect and (finished := _whole_part(dependencies, state)) is not None:
        return Leftover(record, state, finished, finished=True)
    revalidated = record if sound else None
    if (why := store.demotions.disk_is_bad()) is not None:
        return Leftover(revalidated, unstorable=why)
    if state is not None and state.failure is not None and state.failure.is_current(dependencies.clock()):
        if state.passed_through:
            return FillEnd.UNSTORABLE
        if state.phase is Phase.UNSTORABLE:
            return Leftover(revalidated, unstorable=state.failure.detail, reported=True)
        if state.path == fill.route.upstream_path:
            return state.failure
    if record is not None and not sound:
        damage = _compare(dependencies, record, holds, noted=fill.noted)
        if damage is not None:
            return damage
        if immutable or suspect or is_fresh(dependencies, record):
            return FillEnd.COMMITTED
    salvage = None
    for generation in store.generations(key.id):
        if state is not None and state.head is not None and generation == state.generation:
            salvage = _survey(store, key, generation)
            if salvage is not None:
                continue
        store.drop_part(key.id, generation)
    return Leftover(record, state if salvage is not None else None, salvage, holds=holds)


def _load_claimed(dependencies: FillDependencies, key: ContentKey) -> tuple[FillState | None, Record | None]:
    """State and record. Damaged ones are counted; a damaged record is removed, and what a purge names."""
    state = record = None
    try:
        state = dependencies.store.load_state(key.id)
    except ValueError as error:
        note_damage(dependencies, "state", key, str(error))
    try:
        record = dependencies.store.load(key)
    except ValueError as error:
        note_damage(dependencies, "record", key, str(error))
        unlink(dependencies.store.record_path(key))
    name_head, store = dependencies.purges.name_head, dependencies.store
    head = state.head if state is not None else None
    if state is not None and head is not None and name_head(key, state.kind, head, pinned=state.pinned):
        store.drop_parts(key.id)
        store.drop_state(key.id)
        state = None
    if record is not None and name_head(key, record.kind, record, pinned=record.pinned):
        store.remove(key)
        dependencies.raise_store_epoch()
        record = None
    return state, record


def _compare(
    dependencies: FillDependencies, record: Record, holds: tuple[Hold, ...], *, noted: bool
) -> Leftover | None:
    """The sound chunks of a body, None when all of it is sound.

    A different time alone is no damage: a restored backup has it. `noted`: the damage is counted already.
    """
    store, key, chunks = dependencies.store, record.key, len(record.sums)
    file = store.open_whatever(key)
    sound = sound_chunks(file.fd, record) if file is not None else 0
    if file is not None and sound == chunks and os.fstat(file.fd).st_size == record.length:
        store.set_time(store.body_path(key), record)
        return None
    if not noted:
        note_damage(dependencies, "body", key, f"it is right for {sound} of {chunks} chunks of 1 MiB")
    sums = list(record.sums[: min(sound, chunks - 1)])
    salvage = Salvage(len(sums) * CHUNK_BYTES, len(sums) * CHUNK_BYTES, sums)
    return Leftover(salvage=salvage, damaged=record, file=file, holds=holds)


def _whole_part(dependencies: FillDependencies, state: FillState) -> Salvage | None:
    """The part, if it has every byte of its body; one whose content does not fit its name is removed."""
    store, key, head = dependencies.store, state.key, state.head
    path = store.part_path(key.id, state.generation)
    if head is None or not path.is_file() or head.length not in (None, path.stat().st_size):
        return None
    salvage = _survey(store, key, state.generation)
    if salvage is None or not salvage.holds(head.length):
        return None
    if ends_as_named(path, key.file):
        return salvage
    note_damage(dependencies, "part", key, f"it does not end as {key.file} should")
    store.drop_part(key.id, state.generation)
    return None


def _survey(store: Store, key: ContentKey, generation: int) -> Salvage | None:
    try:
        return survey(store.part_path(key.id, generation))
    except OSError as error:
        log.warning("the part of %s can't be read: %s", key.text, error)
        return None


def note_damage(dependencies: FillDependencies, where: str, key: ContentKey, detail: str) -> None:
    log.warning("damaged %s of %s: %s", where, key.text, detail)
    dependencies.counters.add("gup_integrity_failures_total", where=where)


# --- what a leader leaves, and what other processes look up


def give_up(store: Store, state: FillState) -> None:
    """Leave `state` instead of a part that can't be finished, as far as the disk permits.

    A part whose record is written stays: the next fill finishes its commit when there is room again.
    """
    key = state.key
    with contextlib.suppress(OSError):
        record = store.load_or_none(key)
        if record is not None and store.part_path(key.id, record.generation).exists():
            return
    try:
        store.drop_parts(key.id)
    except OSError as error:
        log.warning("a part of %s can't be removed: %s", key.text, error)
    try:
        store.save_state(state)
    except OSError as error:
        log.warning("could not note that %s can't be stored: %s", key.text, error)
        with contextlib.suppress(OSError):
            store.drop_state(key.id)


def save_failure(store: Store, state: FillState, drop: bool) -> None:
    """Keep a failure until it expires, and the part for resuming unless it is to be dropped."""
    if drop:
        store.drop_parts(state.key.id)
    is_current = bool(state.holds) or (state.failure is not None and state.failure.ttl > 0)
    if is_current or (state.head is not None and not drop):
        store.save_state(state)
    elif drop:
        store.drop_state(state.key.id)


def is_fresh(dependencies: FillDependencies, record: Record) -> bool:
    """Whether an index file needs no revalidation yet; a clock set back makes it stale."""
    age = dependencies.wall_clock() - record.validated_at
    return 0 <= age < dependencies.settings.cache.index_ttl


def validated_at(dependencies: FillDependencies, remote: RemoteHead, immutable: bool) -> float:
    """Since when this response is known to be current: another gup may have stored it for a while.

    Its Age counts (RFC 9111 section 4.2.3), so that ages and waiting add up over a chain. But a tenth of
    `index_ttl` is left, or an old index file would be revalidated at every request. Not so for a member of
    the cluster: its copy and this one are to end at the same time, and a stale one renews nothing.
    """
    most = math.inf if is_member(remote.upstream) else 0.9 * dependencies.settings.cache.index_ttl
    return dependencies.wall_clock() - (remote.age_seconds if immutable else min(remote.age_seconds, most))


def renew(dependencies: FillDependencies, record: Record, validated_at: float) -> None:
    """Note that an upstream finds `record`'s body still current. The caller holds the claim.

    The record is read again, so that it does not replace another body's, nor restore a removed one.
    """
    store = dependencies.store
    present = store.load_or_none(record.key)
    if present is not None and store.open_body(present) is not None and present.is_same_body(record):
        store.save(replace(present, validated_at=validated_at))
    store.drop_state(record.key.id)


# --- unclaimed parts

_ORPHANED_SECONDS = 2.0
"""A fill without a leader for this long is taken over even if no client waits for it."""
_LONGEST_ORPHANED_SECONDS = 300.0
_MOST_AT_ONCE = 4
"""Fills resumed at a time, except complete bodies: each holds its key's claim while it waits."""
_STATELESS_SECONDS = 600.0
"""By then all records have been read after a start, and every complete part is committed."""
_TEMPORARY_SECONDS = 3600.0
"""Age limit of temporary files whose names do not show that their writer is dead."""


@dataclass(slots=True)
class _Seen:
    due_at: float | None = None
    """When it is to be taken over, if it has no leader."""
    led: bool = False
    """It had a leader."""
    tries: int = 0
    stateless_at: float = 0.0
    """When it was first seen without a state."""
    refused: bool = False


@dataclass(slots=True)
class Recovery:
    """One pass at a time, in the controller."""

    store: Store
    counters: Counters
    take_over: Callable[[Route, bool], asyncio.Event | None]
    """Takes over a fill; the flag says that its leader was seen alive, and then it gets that leader's slot.
    The event is set when the fill has ended; None when it is under way already.
    """
    tell: Callable[[Mapping[str, object]], None]
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _going_on: list[asyncio.Event] = field(default_factory=list)

    async def run(self) -> None:
        parts = await asyncio.to_thread(self.store.parts)
        self._seen = {part.id: self._seen.get(part.id) or _Seen() for part in parts}
        self._going_on = [ended for ended in self._going_on if not ended.is_set()]
        for part in parts:
            state, seen = part.state, self._seen[part.id]
            if part.claimed:
                seen.due_at, seen.led = None, seen.led or bool(part.generation)
            elif state is None or not part.generation or not state.path:
                await self._tidy_or_tell(part, seen)
            elif state.head and (part.generation, part.size_bytes) == (state.generation, state.head.length):
                self._watch(state, seen, first_seconds=0.0)  # needs no upstream, if its bytes are right
            elif state.phase is not Phase.STREAMING:
                await self._tidy_or_tell(part, seen)
            elif not state.background and len(self._going_on) < _MOST_AT_ONCE:
                self._watch(state, seen, first_seconds=_ORPHANED_SECONDS)
        await asyncio.to_thread(self._drop_leftovers)

    def _watch(self, state: FillState, seen: _Seen, *, first_seconds: float) -> None:
        """Take it over when no other process does; after fruitless attempts at growing intervals."""
        patience = min(first_seconds + _ORPHANED_SECONDS * (2**seen.tries - 1), _LONGEST_ORPHANED_SECONDS)
        now = self.clock()
        if seen.due_at is None:
            seen.due_at = now + patience
        if now >= seen.due_at:
            log.info("taking over the fill of %s, which has no leader", state.key.text)
            ended = self.take_over(route_of(state), seen.led)
            seen.due_at, seen.led, seen.tries = None, False, min(seen.tries + 1, 16)
            if ended is not None:
                self._going_on.append(ended)

    async def _tidy_or_tell(self, part: Part, seen: _Seen) -> None:
        """Finish or clear what needs no upstream. Under the claim: a new leader may come at any moment."""
        try:
            await asyncio.to_thread(self._tidy, part, seen)
            seen.refused = False
        except OSError as error:
            if not seen.refused:
                log.warning("files left by a fill can't be removed: %s: %s", part.id, error)
            seen.refused = True

    def _tidy(self, part: Part, seen: _Seen) -> None:
        with self.store.claimed(part.id) as claimed:
            if claimed:
                self._tidy_claimed(part, seen)

    def _tidy_claimed(self, part: Part, seen: _Seen) -> None:
        store = self.store
        try:
            state = store.load_state(part.id)
        except ValueError as error:
            log.warning("damaged state of %s: %s", part.id, error)
            self.counters.add("gup_integrity_failures_total", where="state")
            store.drop_state(part.id)
            state = None
        record = store.load_or_none(state.key) if state is not None else None
        if record and state and record.generation == state.generation and store.finish_commit(record):
            self.tell(committed(record, replaced=True))
            log.info("finished the commit of %s", record.key.text)
            return
        generation = state.generation if state is not None and state.head is not None else 0
        if part.generation and part.generation != generation:
            seen.stateless_at = seen.stateless_at or self.clock()
            if state is None and self.clock() - seen.stateless_at < _STATELESS_SECONDS:
                return  # a small body's, whose record may be written: the next fill finishes it
            log.info("removed a part that can't be resumed: %s.%d", part.id, part.generation)
            store.drop_part(part.id, part.generation)
        resumable = generation and store.part_path(part.id, generation).exists()
        if not resumable and (state is None or not state.is_current(self.clock())):
            store.drop_state(part.id)

    def _drop_leftovers(self) -> None:
        """Temporary files of writers that died, and sums without a part."""
        now = time.time()
        sums = [p for p in self.store.partial.glob("*.sums") if not p.with_suffix(".part").exists()]
        for path in (*self.store.partial.glob("*.tmp"), *sums):
            with contextlib.suppress(OSError):  # its writer has renamed it, or the disk refuses
                if writer_is_dead(path) or now - path.stat().st_mtime > _TEMPORARY_SECONDS:
                    path.unlink()


def writer_is_dead(path: Path) -> bool:
    pid, _, rest = path.name.partition(".")
    return rest.endswith(".tmp") and pid.isdecimal() and int(pid) > 0 and not Path("/proc", pid).exists()
