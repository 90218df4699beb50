"""Publishes a whole part, and is patient where descriptors are short; decides no outcome."""

import time

from gup.cache.ends import log_end
from gup.cache.flight import Flight, Means
from gup.cache.records import Record
from gup.cache.store import Store
from gup.content.key import ContentKey, Kind
from gup.errors import Problem, is_exhausted

_TRIES = 50
_PAUSE_SECONDS = 0.2


def committed(record: Record, *, replaced: bool) -> dict[str, object]:
    """The event that tells the controller of a new body."""
    return {
        "type": "committed",
        "key": record.key.text,
        "length": record.length,
        "replaced": replaced,
        "kind": str(record.kind),
    }


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
