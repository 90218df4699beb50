"""What earlier fills left for a key, looked at by a new leader before it fetches; blocks on the disk."""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from gup.cache.chunks import CHUNK_BYTES, sound_chunks
from gup.cache.commit import committed
from gup.cache.flight import Flight, Landing, Means
from gup.cache.part_file import Salvage, ends_as_named, survey
from gup.cache.records import Failure, FillState, Hold, Phase, Record, is_same_body
from gup.cache.store import OpenFile, Store
from gup.content.key import ContentKey, Kind
from gup.content.routes import Route, path_of
from gup.upstream.exchange import RemoteHead

_MOST_AGE = 0.9
log = logging.getLogger("gup.fill")


@dataclass(frozen=True, slots=True)
class Damage:
    """A body that is not what its record tells; its first `sound` chunks are. `file`: None if it is gone."""

    record: Record
    file: OpenFile | None
    sound: int


@dataclass(frozen=True, slots=True)
class Prior:
    """What there is to go on with: a record to revalidate, a part to append to, or nothing.

    A damaged entry (`damage`) is demoted to such a part as soon as an upstream has answered.
    """

    record: Record | None = None
    state: FillState | None = None
    salvage: Salvage | None = None
    finished: bool = False
    """Whether the part is known to hold every byte of the body: it is committed, and nobody asked."""
    damage: Damage | None = None
    unstorable: str | None = None
    """Why it is not to be stored."""
    holds: tuple[Hold, ...] = ()
    """Upstreams not to be asked for it."""
    told: bool = False
    """Whether that stands in the state already, and is not to be told anew: it must come to an end."""

    @property
    def is_whole(self) -> bool:
        """Whether all bytes of the body may be here."""
        if self.state is None or self.state.head is None or self.salvage is None:
            return False
        return self.salvage.size == self.state.head.length


def examine(  # noqa: C901, PLR0911 - one look after the other, in this order
    means: Means, flight: Flight
) -> Prior | Landing | Failure:
    """Look the key up again now that it is claimed.

    1. A commit that was interrupted is finished. 2. An entry that is there, and fresh, ends the flight. 3. A
    part that holds every byte is to be committed. 4. A failure that still stands ends the flight; what can't
    be stored is not tried to be stored for as long. 5. Of a body that is suspect, or not as recorded, every
    chunk is looked at: right after all, it ends the flight. 6. Otherwise the part worth going on with is
    kept, others go.
    """
    key, immutable = flight.key, flight.route.immutable
    state = _load_state(means, key)
    if state is not None and means.store.finish_journal(state):
        state = None
    record = _load_claimed(means, key)
    if record is not None and means.store.open_body(record) is None and means.store.finish_commit(record):
        means.store.drop_journal(key.id, record.generation)
        means.tell(committed(record, replaced=True))  # its leader died before it could
        means.raise_store_epoch()
    suspect = record is not None and flight.suspects(record)
    sound = record is not None and not suspect and means.store.open_body(record) is not None
    if record is not None and sound and (immutable or is_fresh(means, record)):
        return Landing.COMMITTED
    finished = _whole_part(means, key, state) if state is not None and not suspect else None
    if finished is not None:
        return Prior(record, state, finished, finished=True)
    if (why := means.store.demotions.disk_is_bad()) is not None:
        return Prior(record if sound else None, unstorable=why)
    standing = _standing(means, state, record if sound else None)
    if standing is not None:
        return standing
    damage = None
    if record is not None and not sound:
        damage = _compare(means, record, noted=flight.noted)
        if damage is not None:
            record = None
        elif immutable or suspect or is_fresh(means, record):
            return Landing.COMMITTED
    if damage is not None and damage.sound == len(damage.record.sums):
        return _without_surplus(means, damage)
    if damage is not None:
        return Prior(damage=damage, holds=state.holds if state is not None else ())
    return Prior(record, *_salvage(means.store, key, state), holds=state.holds if state is not None else ())


def _without_surplus(means: Means, damage: Damage) -> Prior:
    """The part that an entry becomes whose file is too long: it holds every byte, and nobody is asked."""
    record = damage.record
    state = demoted(record, int(means.wall_clock() * 1_000_000_000))
    means.store.demote(record, damage.file, damage.sound, state)
    means.raise_store_epoch()
    sums = list(record.sums[: record.length // CHUNK_BYTES])
    salvage = Salvage(record.length, len(sums) * CHUNK_BYTES, sums, sealed=True)
    return Prior(state=state, salvage=salvage, finished=True)


def _standing(
    means: Means, state: FillState | None, record: Record | None
) -> Prior | Landing | Failure | None:
    """What an earlier fill's end still says of this one."""
    if state is None or state.failure is None or not state.failure.stands(means.clock()):
        return None
    if state.phase is not Phase.UNSTORABLE:
        return state.failure
    if state.passed_through:
        return Landing.UNSTORABLE
    return Prior(record, unstorable=state.failure.detail, told=True)


def _load_claimed(means: Means, key: ContentKey) -> Record | None:
    """The record. A damaged one is counted, and removed: nothing can be done with it, nor with its body."""
    try:
        return means.store.load(key)
    except ValueError as error:
        note_damage(means, "record", key, str(error))
        means.store.drop_record(key)
        return None


def _compare(means: Means, record: Record, *, noted: bool) -> Damage | None:
    """What is wrong with a body, None when all of it is right after all.

    Another time alone is no damage: a backup that was restored looks so. `noted`: whoever found it has
    counted it.
    """
    store, key, chunks = means.store, record.key, len(record.sums)
    file = store.open_whatever(key)
    sound = sound_chunks(file.fd, record) if file is not None else 0
    if file is not None and sound == chunks and os.fstat(file.fd).st_size == record.length:
        store.set_time(store.body_path(key), record)
        return None
    if not noted:
        note_damage(means, "body", key, f"it is right for {sound} of {chunks} chunks of 1 MiB")
    return Damage(record, file, sound)


def _salvage(
    store: Store, key: ContentKey, state: FillState | None
) -> tuple[FillState | None, Salvage | None]:
    kept = None
    for generation in store.generations(key.id):
        if state is not None and state.head is not None and generation == state.generation:
            salvage = _survey(store, key, generation)
            if salvage is not None:
                kept = salvage
                continue
        store.drop_part(key.id, generation)
    return (state, kept) if kept is not None else (None, None)


def _whole_part(means: Means, key: ContentKey, state: FillState) -> Salvage | None:
    """The part, if it holds every byte of its body; one that does and can't be what its name says goes."""
    store, head = means.store, state.head
    if head is None:
        return None
    path = store.part_path(key.id, state.generation)
    try:
        if head.length is not None and path.stat().st_size != head.length:
            return None
        salvage = _survey(store, key, state.generation)
        if salvage is None or not salvage.holds(head.length):
            return None
        if ends_as_named(path, key.file):
            return salvage
    except OSError:
        return None
    note_damage(means, "part", key, f"it does not end as {key.file} should")
    store.drop_part(key.id, state.generation)
    return None


def _survey(store: Store, key: ContentKey, generation: int) -> Salvage | None:
    try:
        return survey(store.part_path(key.id, generation), store.sums_path(key.id, generation))
    except OSError as error:
        log.warning("the part of %s can't be read: %s", key.text, error)
        return None


def drop_parts(store: Store, key: ContentKey) -> None:
    """Remove every part of `key`. The caller holds the claim."""
    for generation in store.generations(key.id):
        store.drop_part(key.id, generation)


def give_up(store: Store, state: FillState) -> list[OSError]:
    """Remove what can't be finished and leave `state` instead; what the disk refused of that.

    A part whose record is written stays: whoever asks next finishes its commit when there is room again.
    """
    refused: list[OSError] = []

    def try_to(work: Callable[[], None]) -> bool:
        try:
            work()
        except OSError as error:
            refused.append(error)
            return False
        return True

    with contextlib.suppress(ValueError, OSError):
        record = store.load(state.key)
        if record is not None and store.part_path(record.key.id, record.generation).exists():
            return []
    try_to(lambda: drop_parts(store, state.key))
    if not try_to(lambda: store.save_state(state)):
        try_to(lambda: store.drop_state(state.key.id))
    return refused


def save_failure(store: Store, state: FillState, drop: bool) -> None:
    """Keep a failure as long as it stands, and the part for resuming unless it is to be dropped."""
    if drop:
        drop_parts(store, state.key)
    if state.holds or (state.failure is not None and state.failure.ttl > 0):
        store.save_state(state)
    elif drop:
        store.drop_state(state.key.id)
    elif state.head is not None:
        store.save_state(state)


def is_fresh(means: Means, record: Record) -> bool:
    """Whether an index file needs no question upstream yet; a clock set back makes it stale."""
    age = means.wall_clock() - record.validated_at
    return 0 <= age < means.settings.cache.index_ttl


def route_of_record(record: Record) -> Route:
    """The route that led to a committed body."""
    key = record.key
    return Route(
        kind=record.kind,
        immutable=record.kind is not Kind.INDEX,
        stream=key.stream,
        revision=key.revision,
        file=key.file,
        upstream_path=path_of_record(record),
        variant=key.variant,
    )


def demoted(record: Record, generation: int) -> FillState:
    """The state of the part that a damaged entry becomes."""
    return FillState(
        record.key,
        record.kind,
        generation,
        Phase.STREAMING,
        record.head,
        path=path_of_record(record),
        pinned=record.pinned,
        stored_at=record.stored_at,
    )


def path_of_record(record: Record) -> str:
    """What upstream is asked for."""
    return record.path or path_of(record.key)


def validated_at(means: Means, remote: RemoteHead, immutable: bool) -> float:
    """Since when what just came is known to be right: another gup may have held it for a while.

    Its Age counts (RFC 9111 section 4.2.3), so that ages and waiting add up over a chain. But a tenth of
    `index_ttl` is left, or an old index file would be asked for at every request.
    """
    age: float = remote.age_seconds
    if not immutable:
        age = min(age, _MOST_AGE * means.settings.cache.index_ttl)
    return means.wall_clock() - age


def load_sound(means: Means, key: ContentKey) -> Record | None:
    """The record, if it is undamaged and its body is there. Anything else is a miss.

    What is wrong is found out, and counted, under the key's claim: here a commit may be under way.
    """
    try:
        record = means.store.load(key)
    except ValueError:
        return None
    return record if record is not None and means.store.open_body(record) is not None else None


def renew(means: Means, record: Record, validated_at: float) -> None:
    """Note that an upstream finds `record`'s body right still. The caller holds the claim.

    The record is read again: it is not put back in the place of another body's, nor of one that is gone.
    """
    present = load_sound(means, record.key)
    if present is not None and is_same_body(present, record):
        means.store.save(present.validated(validated_at))
    means.store.drop_state(record.key.id)


def is_the_entry(store: Store, key: ContentKey, fd: int) -> bool:
    """Whether the file that was followed as a part has become the body."""
    try:
        return store.body_path(key).stat().st_ino == os.fstat(fd).st_ino
    except OSError:
        return False


def _load_state(means: Means, key: ContentKey) -> FillState | None:
    try:
        return means.store.load_state(key.id)
    except ValueError as error:
        note_damage(means, "state", key, str(error))
        return None


def note_damage(means: Means, where: str, key: ContentKey, detail: str) -> None:
    """Count and log damage found in the store."""
    log.warning("damaged %s of %s: %s", where, key.text, detail)
    means.counters.add("gup_integrity_failures_total", where=where)
