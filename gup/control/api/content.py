"""What is stored, as JSON: listed, shown, purged, pinned. Never looks at bodies."""

import asyncio
from typing import Any, NoReturn

from aiohttp import web
from pydantic import Field

from gup.content.catalog import Label
from gup.content.key import Kind
from gup.control.api.answers import KEY, PLANE, answer, key_of
from gup.control.api.described import Answer, asked, describe
from gup.control.api.listing import Entry, Labelling, Listing, select, shown
from gup.control.index import Row, row_of
from gup.control.reconcile import BusyError
from gup.control.state import ControlState


class Listed(Answer):
    """A page of entries."""

    entries: list[Entry]
    matching: int = Field(description="How many match, on all pages.")
    cursor: str | None = Field(description="What the next page is asked for with; null on the last.")
    complete: bool = Field(description="Whether the index stands for the whole store yet.")


class Recorded(Answer):
    """What the entry's record says; the sums of its chunks are left out."""

    format: int
    key: str
    kind: Kind
    length: int
    etag: str
    content_type: str
    last_modified: str | None
    upstream: str
    upstream_etag: str | None
    stored_at: float
    validated_at: float
    pinned: bool
    body_mtime_ns: int
    path: str


class OneEntry(Entry):
    """An entry with its record; null when that is damaged or just gone."""

    record: Recorded | None


class Purged(Answer):
    """What went."""

    key: str
    freed_bytes: int


class Pinned(Answer):
    """How it stands now."""

    key: str
    pinned: bool


def labelling(plane: ControlState) -> Labelling:
    """What the catalogue calls the rows' streams at this moment."""

    def label(row: Row) -> Label:
        found = plane.dependencies.label_of(row.stream_id, row.file)
        return found if found is not None else Label(plane.label(row.stream_id)[0], "", "", "")

    return label


@describe(Listed, query=Listing)
async def listing(request: web.Request) -> web.Response:
    """A page of entries."""
    plane, label = request.app[PLANE], labelling(request.app[PLANE])
    rows = list(plane.index.rows.values())
    try:
        found = await asyncio.to_thread(select, rows, asked(request, Listing), label)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    return answer(
        {
            "entries": [shown(row, label(row)) for row in found.rows],
            "matching": found.matching,
            "cursor": found.cursor,
            "complete": plane.index.complete,
        }
    )


@describe(OneEntry, problems=(404,))
async def entry(request: web.Request) -> web.Response:
    """One entry, with what its record says."""
    plane, key = request.app[PLANE], key_of(request)
    row = plane.index.rows.get(key.text)
    stored = await asyncio.to_thread(plane.dependencies.store.stored, key)
    record = stored.record if stored is not None else None
    if row is None and stored is not None and record is not None:
        row = row_of(stored)
    if row is None:
        _not_found(key.text)
    told: dict[str, Any] | None = record.to_json() if record is not None else None
    if told is not None:
        del told["sums"]
    return answer(shown(row, labelling(plane)(row)) | {"record": told})


@describe(Purged, problems=(404, 409))
async def purge(request: web.Request) -> web.Response:
    """Remove an entry, pinned or not, and what lies unfinished of it; whoever reads it reads on."""
    plane, key = request.app[PLANE], key_of(request)
    known = key.text in plane.index.rows
    try:
        freed = await plane.evictor.purge(key)
    except BusyError as error:
        raise web.HTTPConflict(text=str(error)) from error
    if not freed and not known:
        _not_found(key.text)
    return answer({"key": key.text, "freed_bytes": freed})


@describe(Pinned, problems=(404, 409))
async def pin(request: web.Request) -> web.Response:
    """Keep an entry whatever the limits say."""
    return await _set_pinned(request, pinned=True)


@describe(Pinned, problems=(404, 409))
async def unpin(request: web.Request) -> web.Response:
    """Let the limits apply to an entry again."""
    return await _set_pinned(request, pinned=False)


async def _set_pinned(request: web.Request, *, pinned: bool) -> web.Response:
    plane, key = request.app[PLANE], key_of(request)
    try:
        found = await plane.set_pinned(key, pinned=pinned)
    except BusyError as error:
        raise web.HTTPConflict(text=str(error)) from error
    if not found:
        _not_found(key.text)
    return answer({"key": key.text, "pinned": pinned})


def _not_found(key: str) -> NoReturn:
    raise web.HTTPNotFound(text=f"There is no entry {key}")


_ENTRY = f"/api/v1/content/{KEY}"
routes = [
    web.get("/api/v1/content", listing),
    web.put(f"{_ENTRY}/pin", pin),
    web.delete(f"{_ENTRY}/pin", unpin),
    web.get(_ENTRY, entry),
    web.delete(_ENTRY, purge),
]
