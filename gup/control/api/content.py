"""What is stored, as JSON: listed, shown, purged, pinned. Never looks at bodies."""

import asyncio
from typing import Any, NoReturn

from aiohttp import web

from gup.control.api.answers import KEY, PLANE, answer, key_of
from gup.control.api.listing import parse_query, select, shown


def _not_found(key: str) -> NoReturn:
    raise web.HTTPNotFound(text=f"There is no entry {key}")


async def listing(request: web.Request) -> web.Response:
    """A page of entries."""
    try:
        query = parse_query(request.query)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    rows = list(request.app[PLANE].index.rows.values())
    found = await asyncio.to_thread(select, rows, query)
    return answer(
        {
            "entries": [shown(row) for row in found.rows],
            "matching": found.matching,
            "cursor": found.cursor,
            "complete": request.app[PLANE].index.complete,
        }
    )


async def entry(request: web.Request) -> web.Response:
    """One entry, with what its record says."""
    plane, key = request.app[PLANE], key_of(request)
    row = plane.index.rows.get(key.text)
    try:
        record = await asyncio.to_thread(plane.around.store.load, key)
    except ValueError:
        record = None  # damaged: shown as missing
    if row is None and record is None:
        _not_found(key.text)
    fields: dict[str, Any] = shown(row) if row else {"key": key.text}
    if record is not None:
        told = record.to_json()
        fields["record"] = {name: told[name] for name in told if name != "sums"}
    return answer(fields)


async def purge(request: web.Request) -> web.Response:
    """Remove an entry; whoever reads it reads on."""
    plane, key = request.app[PLANE], key_of(request)
    known = key.text in plane.index.rows
    freed = await plane.space.purge(key)
    if not freed and not known:
        _not_found(key.text)
    return answer({"key": key.text, "freed_bytes": freed})


async def pin(request: web.Request) -> web.Response:
    """Keep an entry whatever the limits say."""
    return await _set_pinned(request, pinned=True)


async def unpin(request: web.Request) -> web.Response:
    """Let the limits apply to an entry again."""
    return await _set_pinned(request, pinned=False)


async def _set_pinned(request: web.Request, *, pinned: bool) -> web.Response:
    plane, key = request.app[PLANE], key_of(request)
    if not await plane.set_pinned(key, pinned=pinned):
        _not_found(key.text)
    return answer({"key": key.text, "pinned": pinned})


_ENTRY = f"/api/v1/content/{KEY}"
routes = [
    web.get("/api/v1/content", listing),
    web.put(f"{_ENTRY}/pin", pin),
    web.delete(f"{_ENTRY}/pin", unpin),
    web.get(_ENTRY, entry),
    web.delete(_ENTRY, purge),
]
