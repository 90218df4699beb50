"""What earlier fills left for a key, looked at by a new leader before it fetches; blocks on the disk."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from gup.cache.flight import Landing, Means
from gup.cache.part import Salvage, survey
from gup.cache.record import Record
from gup.cache.state import Failure, FillState, Phase
from gup.cache.store import OpenFile, Store
from gup.content.key import ContentKey
from gup.upstream.exchange import RemoteHead

_MOST_AGE = 0.9
log = logging.getLogger("gup.fill")


@dataclass(frozen=True, slots=True)
class Prior:
    """What there is to go on with: a record to revalidate, a part to append to, or nothing."""

    record: Record | None = None
    state: FillState | None = None
    salvage: Salvage | None = None
    unstorable: str | None = None
    """Why it is not to be stored."""
    told: bool = False
    """Whether that stands in the state already, and is not to be told anew: it must come to an end."""


def examine(means: Means, key: ContentKey, immutable: bool) -> Prior | Landing | Failure:
    """Look the key up again now that it is claimed.

    1. A commit that was interrupted is finished. 2. An entry that is there, and fresh, ends the flight.
    3. So does a failure that still stands; what can't be stored is not tried to be stored for as long.
    4. Otherwise the part worth going on with is kept, others go.
    """
    state = _load_state(means, key)
    if state is not None and state.phase is Phase.COMMITTED:
        means.store.finish_commit(state)
        state = None
    record = load_sound(means, key)
    if record is not None and (immutable or is_fresh(means, record)):
        return Landing.COMMITTED
    if state is not None and state.failure is not None and state.failure.stands(means.clock()):
        if state.phase is Phase.UNSTORABLE:
            return Prior(record, unstorable=state.failure.detail, told=True)
        return state.failure
    return Prior(record, *_salvage(means.store, key, state))


def _salvage(
    store: Store, key: ContentKey, state: FillState | None
) -> tuple[FillState | None, Salvage | None]:
    kept = None
    for generation in store.generations(key.id):
        if state is not None and state.head is not None and generation == state.generation:
            salvage = survey(store.part_path(key.id, generation), store.sums_path(key.id, generation))
            if salvage.size:
                kept = salvage
                continue
        store.drop_part(key.id, generation)
    return (state, kept) if kept is not None else (None, None)


def drop_parts(store: Store, key: ContentKey) -> None:
    """Remove every part of `key`. The caller holds the claim."""
    for generation in store.generations(key.id):
        store.drop_part(key.id, generation)


def give_up(store: Store, state: FillState) -> list[OSError]:
    """Remove what can't be finished and leave `state` instead; what the disk refused of that.

    A commit's journal stays with all it needs: whoever asks next finishes it when there is room again.
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
        before = store.load_state(state.key.id)
        if before is not None and before.phase is Phase.COMMITTED:
            return []
    try_to(lambda: drop_parts(store, state.key))
    if not try_to(lambda: store.save_state(state)):
        try_to(lambda: store.drop_state(state.key.id))
    return refused


def is_fresh(means: Means, record: Record) -> bool:
    """Whether an index file needs no question upstream yet; a clock set back makes it stale."""
    age = means.wall_clock() - record.validated_at
    return 0 <= age < means.settings.cache.index_ttl


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
    """The record, if it is undamaged and its body is there. Damage is counted and is a miss."""
    opened = open_sound(means, key)
    return opened[0] if opened is not None else None


def open_sound(means: Means, key: ContentKey) -> tuple[Record, OpenFile] | None:
    """The same with the body's file. What the disk can't read is damage too."""
    where = "record"
    try:
        record = means.store.load(key)
        where = "body"
        file = means.store.open_body(record) if record is not None else None
    except (ValueError, OSError) as error:
        note_damage(means, where, key, str(error))
        return None
    return (record, file) if record is not None and file is not None else None


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
