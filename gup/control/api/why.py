"""What is known of one file: whether it is stored and why not, where it came from, who took it, who may."""

import asyncio
import ipaddress
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import Field

from gup.client_names import is_name
from gup.content.key import ABSENT, ContentKey, Kind, Variant, content_revision
from gup.content.routes import path_of
from gup.content.rules import Rulebook
from gup.content.variant_choice import Choices
from gup.control.api import schemas
from gup.control.api.endpoint import Endpoint, Request, Text
from gup.control.api.entries import labels_of, shown
from gup.control.api.maintenance import prefetch_row
from gup.control.api.status import fills_under_way
from gup.control.entry_table import row_of, stream_of
from gup.control.state import ControlState
from gup.errors import Problem
from gup.units import bytes_in_words, time_in_words

_SLOW_SAID = 5


class Question(Request):
    """Which file."""

    of: Text = Field(
        description="A key as lists show it, a path or URL such as /content/{MONIKER}/260101001/full.zip, or "
        "a client's address.",
        max_length=9000,
    )


async def why(state: ControlState, query: Question) -> schemas.Why:
    """What is known of one file, or which requests of a client were slow."""
    if is_name(query.of) or _is_address(query.of):
        return await _of_client(state, query.of)
    asked = urlsplit(query.of).path if "://" in query.of else query.of
    if asked.startswith("/"):
        try:
            route = state.prefetcher.route(asked)
        except Problem as problem:
            raise web.HTTPNotFound(
                text=f"of: {asked!r:.300} is not content that clients can get: {problem.detail}"
            ) from problem
        keys = [route.key(stored) for _, stored in state.dependencies.places(route.stream)]
        held = (Variant(*stream[:2]) for stream in state.index.rows.streams() if stream[2] == route.stream)
        keys += (key for key in map(route.key, held) if key.text in state.index.rows)
        found = dict.fromkeys(keys, route.upstream_path)
    else:
        try:
            key = ContentKey.parse(asked)
        except ValueError as error:
            raise web.HTTPBadRequest(
                text=f"of: {asked!r:.300} is neither a key nor a path nor an address: {error}"
            ) from error
        found = {key: path_of(key)}
    if not found:
        raise web.HTTPNotFound(text="of: no upstream is configured for such content")
    disk = await state.evictor.measure()
    fills = {fill.id: fill for fill in fills_under_way(state, disk.parts)}
    return schemas.Why(
        files=[await _known(state, key, path, fills.get(key.id)) for key, path in found.items()],
        client=None,
        slow=[],
    )


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


async def _of_client(state: ControlState, of: str) -> schemas.Why:
    name = await state.reports.name_for(of)
    if name is None:
        raise web.HTTPNotFound(
            text=f"of: clients are not known by such a name, since reports.addresses is {state.reports.mode}"
        )
    return schemas.Why(files=[], client=name, slow=await state.timings.of_client(name))


async def slowest(state: ControlState) -> schemas.Slowest:
    """Where the seconds of the slowest fills and requests went."""
    return await state.timings.slowest()


async def _known(
    state: ControlState, key: ContentKey, path: str, fill: schemas.Fill | None
) -> schemas.KnownFile:
    stored = await asyncio.to_thread(state.dependencies.store.stored, key)
    record, row = stored.record if stored is not None else None, state.index.rows.get(key.text)
    if row is None and stored is not None and record is not None:
        row = row_of(stored)
    queued, notes = state.prefetcher.queue.rows.get(key), state.notes.of(key.text)
    waiting: Literal["fill", "prefetch"] | None = None
    if fill is None and state.dependencies.claims.taken(key.claim_offset):
        waiting = "fill"
    elif fill is None and queued is not None and queued.pending:
        waiting = "prefetch"
    kind = Kind.DELTA if key.file.lower().endswith(".dax") else Kind.OTHER
    revision = content_revision(kind, key.revision, key.file)
    taken, clients = await state.reports.takers(stream_of(key), revision) if revision else (0, [])
    times, slow = await state.timings.of_key(key.text)
    known = schemas.KnownFile(
        key=key.text,
        path=path,
        said=[],
        stored=record is not None,
        entry=None if row is None else shown(row, labels_of(state)(row.stream_id, row.file)),
        upstream=None if record is None else record.upstream,
        **{name: notes.get(name) for name in ("fetched", "failed", "unstored", "removed")},
        fill=fill,
        waiting=waiting,
        prefetch=None if queued is None else prefetch_row(state, queued),
        refusals=await _refusals(state, key),
        taken=taken,
        clients=clients,
        times=times,
        slow=slow,
    )
    for about in (_said_of_the_store, _said_of_fills, _said_of_the_budget, _said_of_clients):
        known.said += about(state, known)
    return known


async def _refusals(state: ControlState, key: ContentKey) -> list[schemas.RuleRefusal]:
    if key.stream == ABSENT:
        return []
    nobody = schemas.ClientGroup(version=None, language=None, clients=0)
    groups = await state.reports.groups() or [nobody]

    def decide() -> list[schemas.RuleRefusal]:
        """In a thread: the language tables are read from a file when they are first used."""
        book = Rulebook(state.settings)
        choices = Choices(book, state.dependencies.catalogue_rows(), state.settings.upstream)
        found = []
        for group in groups if choices.any_source else ():
            client = book.identities.stated(group.version, group.language)
            choice = choices.choose_for(key.stream, client)
            if choice.decision.rule is not None:
                refusal = schemas.RuleRefusal(
                    **dict(group),
                    rule=str(choice.decision.rule),
                    because=choice.decision.because,
                    enforced=choice.refused,
                )
                found.append(refusal)
        return found

    return await asyncio.to_thread(decide)


def _said_of_the_store(state: ControlState, known: schemas.KnownFile) -> Iterator[str]:
    if known.stored and (entry := known.entry) is not None:
        pinned, size = ", pinned" if entry.pinned else "", bytes_in_words(entry.length_bytes)
        yield f"Stored {_ago(state, entry.stored_at)}, {size}, from {known.upstream}{pinned}."
        yield f"Requested {entry.hits} times, last used {_ago(state, entry.used_at)}."
        return
    yield "Not stored."
    if known.removed is not None:
        yield f"It was stored, and {known.removed.detail} {_ago(state, known.removed.at)}."
    if known.unstored is not None:
        yield f"Passed through and not stored, {_ago(state, known.unstored.at)}: {known.unstored.detail}."
    if (refusal := state.refusals.rows.get("content")) is not None:
        yield f"The disk refuses writes at present: {refusal.detail}."
    told = (
        known.fetched,
        known.fill,
        known.waiting,
        known.prefetch,
        known.removed,
        known.unstored,
        known.failed,
    )
    if not any(told):
        yield "No request for it is known since the service started."
    if not state.index.complete:
        yield "The index does not cover the whole store yet."


def _said_of_fills(state: ControlState, known: schemas.KnownFile) -> Iterator[str]:
    if (fetched := known.fetched) is not None and fetched.seconds:
        resumed = f", resumed {fetched.resumes} times" if fetched.resumes else ""
        yield f"The last fill took {time_in_words(fetched.seconds)}{resumed}."
    if known.times is not None:
        yield known.times.said
    if (fill := known.fill) is not None:
        of = "" if fill.length_bytes is None else f" of {bytes_in_words(fill.length_bytes)}"
        yield f"It is being fetched from {fill.upstream}; {bytes_in_words(fill.received_bytes)}{of} received."
    elif known.waiting == "fill":
        queued_fills = f"{state.dependencies.fills_waiting()} fills wait for a slot"
        yield f"A worker waits for a fill slot or for the upstream's response ({queued_fills})."
    if (queued := known.prefetch) is not None:
        detail = f": {queued.detail}" if queued.detail else ""
        yield f"Prefetch, by {queued.by}, {_ago(state, queued.asked_at)}: {queued.outcome}{detail}."
    if known.failed is not None:
        yield f"A fill failed {_ago(state, known.failed.at)}: {known.failed.detail}."
    for row in state.rejections():
        if row.key == known.key:
            yield f"{row.upstream} sent a body that can't be this file, {_ago(state, row.at)}: {row.detail}."


def _said_of_the_budget(state: ControlState, known: schemas.KnownFile) -> Iterator[str]:
    if known.stored or not state.settings.wan.budget.bytes:
        return
    with suppress(Problem):  # a key that no path leads to any more
        route, gate = state.prefetcher.route(known.path), state.dependencies.gate
        if gate.is_held(route, background=False):
            yield f"The WAN's budget holds it back: {state.budget.standing().saying}."
        elif gate.is_held(route, background=True):
            yield f"The WAN's budget holds its prefetch back: {state.budget.standing().saying}."


def _said_of_clients(state: ControlState, known: schemas.KnownFile) -> Iterator[str]:
    if (hold := state.holds.on(ContentKey.parse(known.key))) is not None:
        besides = f" but those in {', '.join(hold.except_subnets)}" if hold.except_subnets else ""
        who, why = hold.by or "an operator", hold.reason or "no reason was given"
        yield f"On hold for all clients{besides}, {_ago(state, hold.at)}, by {who}: {why}."
    if (new := state.holds.waits(ContentKey.parse(known.key))) is not None:
        first = ", ".join(state.settings.rules.canary.subnets)
        left = "" if new.opens_at is None else f" for {time_in_words(new.opens_at - state.clock())} more"
        yield f"Revision {new.revision} is new: clients in {first} get it first{left} (rules.canary)."
    for refused in known.refusals:
        states = " and ".join(filter(None, (refused.version, refused.language))) or "nothing"
        verb = "may not have it" if refused.enforced else 'would be refused if rules.mode were "enforce"'
        why = f"by the rule {refused.rule}: {refused.because}"
        yield f"{refused.clients} clients that state {states} {verb}, {why}."
    if known.taken:
        names = ", ".join(f"{one.address} ({_ago(state, one.seen_at)})" for one in known.clients[:5])
        yield f"{known.taken} clients took this revision, the last of them: {names}."
    yield from (spell.said for spell in known.slow[:_SLOW_SAID])


def _ago(state: ControlState, at: float) -> str:
    return f"{time_in_words(max(0.0, state.clock() - at))} ago"


ENDPOINTS = (
    Endpoint("GET", "/api/v1/why", why, problems=(404,)),
    Endpoint("GET", "/api/v1/slow", slowest),
)
