"""The control plane's requests: each handler reads, asks the plane, shows the answer. No policy."""

import asyncio
import json
import secrets
from http import HTTPStatus
from typing import Any, NoReturn

from aiohttp import web

from gup.content.key import ContentKey
from gup.control.entries import parse_query, select, shown
from gup.control.exposition import expose
from gup.control.page import content_security_policy, render
from gup.control.plane import Plane

PLANE: web.AppKey[Plane] = web.AppKey("plane", Plane)
_NEWEST_ON_PAGE = 20
_CLIENTS_SHOWN = 1000


def problem(status: int, detail: str, **more: object) -> web.Response:
    """A problem document (RFC 9457); its type is the status code's meaning."""
    fields = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return web.json_response(fields | more, status=status, content_type="application/problem+json")


def _not_found(key: str) -> NoReturn:
    raise web.HTTPNotFound(text=f"There is no entry {key}")


def _json(fields: Any, status: int = 200) -> web.Response:
    return web.json_response(fields, status=status, dumps=lambda value: json.dumps(value, ensure_ascii=False))


def _key(request: web.Request) -> ContentKey:
    try:
        return ContentKey.parse(request.match_info["key"])
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


# --- for machines


async def healthz(_request: web.Request) -> web.Response:
    """The process lives and its loop turns."""
    return web.Response(text="ok\n")


async def readyz(request: web.Request) -> web.Response:
    """Content can be served; 503 says why not."""
    reasons = request.app[PLANE].not_ready()
    if reasons:
        return problem(503, "; ".join(reasons), reasons=reasons)
    return web.Response(text="ready\n")


async def metrics(request: web.Request) -> web.Response:
    """The exposition, as text or OpenMetrics."""
    figures = await request.app[PLANE].figures()
    body, content_type = expose(figures, request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


# --- looking


async def page(request: web.Request) -> web.Response:
    """The page for people."""
    plane = request.app[PLANE]
    status_now = await plane.status()
    newest = [shown(row) for row in plane.newest_entries(_NEWEST_ON_PAGE)]
    nonce = secrets.token_urlsafe(16)
    return web.Response(
        text=render(status_now, newest, plane.clock(), nonce),
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": content_security_policy(nonce)},
    )


async def status(request: web.Request) -> web.Response:
    """Everything at a glance."""
    return _json(await request.app[PLANE].status())


async def clients(request: web.Request) -> web.Response:
    """How many clients were seen, and the last of them."""
    plane = request.app[PLANE]
    newest = plane.clients.newest(_CLIENTS_SHOWN)
    return _json(
        {
            "seen": plane.clients.counts(plane.clock()),
            "known": len(plane.clients),
            "clients": [{"address": address, "seen_at": at} for address, at in newest],
        }
    )


async def entries(request: web.Request) -> web.Response:
    """A page of entries."""
    try:
        query = parse_query(request.query)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    rows = list(request.app[PLANE].index.rows.values())
    found = await asyncio.to_thread(select, rows, query)
    return _json(
        {
            "entries": [shown(row) for row in found.rows],
            "matching": found.matching,
            "cursor": found.cursor,
            "complete": request.app[PLANE].index.complete,
        }
    )


async def entry(request: web.Request) -> web.Response:
    """One entry, with what its record says."""
    plane, key = request.app[PLANE], _key(request)
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
    return _json(fields)


# --- changing


async def purge(request: web.Request) -> web.Response:
    """Remove an entry; whoever reads it reads on."""
    plane, key = request.app[PLANE], _key(request)
    known = key.text in plane.index.rows
    freed = await plane.space.purge(key)
    if not freed and not known:
        _not_found(key.text)
    return _json({"key": key.text, "freed_bytes": freed})


async def pin(request: web.Request) -> web.Response:
    """Keep an entry whatever the limits say."""
    return await _set_pinned(request, pinned=True)


async def unpin(request: web.Request) -> web.Response:
    """Let the limits apply to an entry again."""
    return await _set_pinned(request, pinned=False)


async def _set_pinned(request: web.Request, *, pinned: bool) -> web.Response:
    plane, key = request.app[PLANE], _key(request)
    if not await plane.set_pinned(key, pinned=pinned):
        _not_found(key.text)
    return _json({"key": key.text, "pinned": pinned})


async def evict(request: web.Request) -> web.Response:
    """Apply the limits now."""
    done = await request.app[PLANE].space.evict()
    return _json(
        {
            "evicted": [{"key": one.key, "reason": one.reason, "size_bytes": one.size_bytes} for one in done],
            "freed_bytes": sum(one.size_bytes for one in done),
        }
    )


async def verification(request: web.Request) -> web.Response:
    """How far the last verification has come, and what it found."""
    return _json(request.app[PLANE].verification.progress())


async def verify(request: web.Request) -> web.Response:
    """Begin to look at everything in the cache directory; `repair=1` mends what is damaged."""
    verification = request.app[PLANE].verification
    repair = request.query.get("repair", "0")
    if repair not in ("0", "1"):
        raise web.HTTPBadRequest(text="repair is 0 or 1")
    if not verification.start(repair=repair == "1"):
        raise web.HTTPConflict(text="a verification is under way")
    return _json(verification.progress(), status=202)


async def reload(request: web.Request) -> web.Response:
    """Ask for the settings to be read again; whether they took is in the status."""
    request.app[PLANE].around.request_reload()
    return _json({"requested": True}, status=202)
