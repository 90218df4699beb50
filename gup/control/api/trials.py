"""A dry run of settings: the recorded demand of some days under them, beside the present ones."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from gup.cache.catalog_cache import read_kept
from gup.config import Settings, parse
from gup.content.catalog import Catalogues
from gup.content.key import ABSENT
from gup.content.routes import LIVEUPDATE_STREAM
from gup.content.rules import Rulebook
from gup.content.variant_choice import Choices
from gup.control.api import schemas
from gup.control.api.endpoint import JSON, Endpoint, Request
from gup.control.dry_run import known_part
from gup.control.state import ControlState
from gup.control.stats.demand_files import read_groups
from gup.errors import SettingsError
from gup.units import bytes_in_words, time_in_words
from gup.upstream.bandwidth import site_time

_DAY_SECONDS = 86400.0
_STREAMS_SHOWN = 20
_LITTLE = 0.01
_UNKNOWN = (
    "The record can't know what clients would have done otherwise: who is refused or waits for long asks "
    "again, and what another rule sends to LiveUpdate is still in these bytes."
)


class Wanted(Request):
    """Settings, and over which time."""

    settings: dict[str, Any] | str = Field(
        description="The text of a settings file (TOML), or its tables as JSON; what it does not have is as "
        "by default."
    )
    days: int = Field(7, ge=1, le=3660, description="The last so many days, as far as they are recorded.")


async def trial(state: ControlState, given: Wanted) -> schemas.Trial:
    """Try settings: the recorded demand of some days under them, beside the present ones."""
    now = state.clock()
    tried, problems = await asyncio.to_thread(parse, given.settings)
    if tried is not None:
        try:
            await asyncio.to_thread(Rulebook, tried)
        except SettingsError as error:
            problems = error.problems
    if tried is None or problems:
        return _nothing(now, problems)
    since = now - given.days * _DAY_SECONDS
    present, wanted = known_part(state.settings), known_part(tried)
    found = await state.sizing.replay(
        {"settings": {"present": present, "tried": wanted}, "since": since}, "dry_run"
    )
    refusals, newly, no_longer = await _refusals(state, tried, since)
    answer = schemas.Trial(
        problems=[],
        changed=sorted(_differences(present, wanted)),
        at=now,
        since=found["first_at"] or now,
        until=found["until"] or now,
        **{name: found[name] for name in ("requests", "requested_bytes", "sent_bytes", "received_bytes")},
        **{name: found[name] for name in ("peak_minute_bytes_per_second", "most_downloads", "most_queued")},
        present=schemas.Outcome(**found["settings"]["present"]),
        tried=schemas.Outcome(**found["settings"]["tried"]),
        refusals=refusals,
        newly_refused_clients=newly,
        no_longer_refused_clients=no_longer,
        saying=[],
    )
    return answer.model_copy(update={"saying": list(_saying(answer, tried))})


def _nothing(now: float, problems: list[str]) -> schemas.Trial:
    numbers = (
        *("requests", "requested_bytes", "sent_bytes", "received_bytes", "peak_minute_bytes_per_second"),
        *("most_downloads", "most_queued", "newly_refused_clients", "no_longer_refused_clients"),
    )
    return schemas.Trial(
        problems=problems,
        changed=[],
        at=now,
        since=now,
        until=now,
        present=None,
        tried=None,
        refusals=[],
        saying=[],
        **dict.fromkeys(numbers, 0),
    )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name in one.keys() | other.keys():
        before, after = one.get(name), other.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{above}{name}.")
        elif before != after:
            yield f"{above}{name}"


# --- rules

_Asked = tuple[str, str, str]
"""Version and language as clients state them, and the stream."""


@dataclass(slots=True)
class _Refused:
    """What one rule refuses: groups, requests, and whether that is enforced."""

    groups: list[_Asked] = field(default_factory=list)
    requests: int = 0
    enforced: bool = False


async def _refusals(
    state: ControlState, tried: Settings, since: float
) -> tuple[list[schemas.RuleOutcome], int, int]:
    """By rule; and how many clients only the one, or only the other settings refuse something."""
    clients = await state.reports.askers(since)
    store = state.dependencies.store

    def decide() -> list[dict[str, _Refused]]:
        """In a thread: the language tables are read from a file when they are first used."""
        requests = dict.fromkeys(((v, language, stream) for v, language, stream, _ in clients), 0)
        for group in read_groups(state.demand.folder, since):
            requests[group.version, group.language, group.stream] = group.requests + group.refused
        rows = {name: one.rows for name, one in read_kept(store.run).items() if one.rows is not None}
        return [_decided(requests, settings, rows) for settings in (tried, state.settings)]

    new, old = await asyncio.to_thread(decide)
    found = []
    for rule in sorted(new.keys() | old.keys()):
        after, before = new.get(rule, _Refused()), old.get(rule, _Refused())
        count, some = await state.reports.asking(after.groups, since)
        before_count, _ = await state.reports.asking(before.groups, since)
        streams = dict.fromkeys(_product(state, group) for group in after.groups)
        found.append(
            schemas.RuleOutcome(
                rule=rule,
                enforced=after.enforced,
                clients=count,
                requests=after.requests,
                present_clients=before_count,
                present_requests=before.requests,
                streams=list(streams)[:_STREAMS_SHOWN],
                some_clients=some,
            )
        )
    refused_then, refused_now = _enforced(new), _enforced(old)
    newly, _ = await state.reports.asking(refused_then - refused_now, since)
    no_longer, _ = await state.reports.asking(refused_now - refused_then, since)
    return found, newly, no_longer


def _enforced(found: Mapping[str, _Refused]) -> set[_Asked]:
    return {group for refused in found.values() if refused.enforced for group in refused.groups}


def _decided(
    requests: Mapping[_Asked, int], settings: Settings, rows: Mapping[str, Any]
) -> dict[str, _Refused]:
    """By rule, with the same decisions as the service's."""
    book = Rulebook(settings)
    choices = Choices(book, Catalogues(dict(rows), settings.upstream, book.types), settings.upstream)
    found: defaultdict[str, _Refused] = defaultdict(_Refused)
    for asked, count in requests.items() if choices.any_source else ():
        version, language, stream = asked
        if stream in (ABSENT, LIVEUPDATE_STREAM):
            continue
        choice = choices.choose_for(stream, book.identities.stated(version or None, language or None))
        if choice.decision.rule is not None:
            refused = found[str(choice.decision.rule)]
            refused.groups.append(asked)
            refused.requests += count
            refused.enforced = choice.refused
    return dict(found)


def _product(state: ControlState, asked: _Asked) -> str:
    label = state.dependencies.catalogue_rows().somewhere(asked[2])
    return asked[2] if label is None else label.product


# --- words


def _saying(found: schemas.Trial, tried: Settings) -> Iterator[str]:
    present, then = found.present, found.tried
    assert present is not None
    assert then is not None
    if not found.requests:
        yield "Nothing is recorded of this time."
        return
    size, covered = bytes_in_words, time_in_words(found.until - found.since)
    more = then.wan_bytes - present.wan_bytes
    if abs(more) <= _LITTLE * present.wan_bytes:
        yield f"About as much would have crossed the WAN in the last {covered}: {size(then.wan_bytes)}."
    else:
        much = f"{size(abs(more))} {'more' if more > 0 else 'less'}"
        yield f"{much} would have crossed the WAN in the last {covered}: {size(then.wan_bytes)}."
    yield from _of_waits(then, tried)
    if then.held_back_at is not None:
        at = site_time(tried, then.held_back_at)
        held = ", ".join(f"{class_} {count:,}" for class_, count in then.held_back.items())
        yield f"The budget of the WAN would hold back, first at {at:%Y-%m-%d %H:%M}: {held}."
    yield from _of_refusals(found)
    yield from _of_limits(found, tried)
    yield _UNKNOWN
    if tried.prefetch != Settings().prefetch:
        yield "Prefetches are taken as they were recorded, whatever [prefetch] says."


def _of_waits(then: schemas.Outcome, tried: Settings) -> Iterator[str]:
    if then.longest_wait_seconds:
        longest = time_in_words(then.longest_wait_seconds)
        yield f"A client would have waited {longest} at most until its fetch has ended."
    if then.late_fetches:
        limit = time_in_words(tried.fill.queue_timeout)
        yield (
            f"{then.late_fetches:,} fetches would have waited longer than fill.queue_timeout ({limit}), "
            "which clients are told by 503."
        )


def _of_refusals(found: schemas.Trial) -> Iterator[str]:
    for row in found.refusals:
        verb = "would refuse" if row.enforced else "would report"
        if row.clients or row.requests:
            yield (
                f"The rule {row.rule} {verb} {row.clients:,} clients ({row.requests:,} requests); with the "
                f"present settings {row.present_clients:,} ({row.present_requests:,})."
            )


def _of_limits(found: schemas.Trial, tried: Settings) -> Iterator[str]:
    then, limits = found.tried, tried.clients
    assert then is not None
    if then.queued_seconds:
        beyond = time_in_words(then.refused_seconds)
        yield (
            f"Clients wanted more than clients.max_downloads ({limits.max_downloads}) at once for "
            f"{time_in_words(then.queued_seconds)}: they would have waited"
            + (f", and for {beyond} been refused (clients.queue)." if then.refused_seconds else ".")
        )
    if then.address_exceeded:
        most = limits.max_downloads_per_address
        yield (
            f"{then.address_exceeded:,} times one address began more full packages in a second than "
            f"clients.max_downloads_per_address ({most}) allows at once: it would have waited."
        )


ENDPOINTS = (Endpoint("POST", "/api/v1/try", trial, takes=JSON),)
