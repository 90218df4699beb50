"""What earlier fills left for a key, looked at by a new leader before it fetches; blocks on the disk."""

import logging
from dataclasses import dataclass

from gup.cache.commit import committed
from gup.cache.flight import Landing, Means
from gup.cache.part import Salvage, survey
from gup.cache.record import Record
from gup.cache.state import Failure, FillState, Phase
from gup.cache.store import Store
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


def examine(means: Means, key: ContentKey, immutable: bool) -> Prior | Landing | Failure:
    """Look the key up again now that it is claimed.

    1. A commit that was interrupted is finished. 2. An entry that is there, and fresh, ends the flight.
    3. So does a failure that still stands. 4. Otherwise the part worth going on with is kept, others go.
    """
    state = _load_state(means, key)
    if state is not None and state.phase is Phase.COMMITTED:
        means.store.finish_commit(state)
        if state.record is not None:
            means.tell(committed(state.record, replaced=False))  # its leader died before it could
        state = None
    record = load_sound(means, key)
    if record is not None and (immutable or is_fresh(means, record)):
        return Landing.COMMITTED
    if state is not None and state.failure is not None and state.failure.stands(means.clock()):
        if state.phase is Phase.UNSTORABLE:
            return Landing.UNSTORABLE
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
    try:
        record = means.store.load(key)
    except ValueError as error:
        note_damage(means, "record", key, str(error))
        return None
    return record if record is not None and means.store.open_body(record) is not None else None


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
