"""The page, its files and its events over HTTP. Decides nothing."""

import asyncio
import contextlib
import logging
import time
from typing import Any

from aiohttp import web

from gup.control.api.answers import PLANE, problem
from gup.control.api.described import describe
from gup.control.page.assets import Assets
from gup.control.page.live import MAX_LISTENERS, Broadcast, Listener
from gup.control.page.render import CONTENT_SECURITY_POLICY, QUICK, SLOW, SLOW_SECONDS, Renderer
from gup.control.page.view import Viewer, figures

_log = logging.getLogger("gup.control.page")
_WRITE_SECONDS = 30.0
_RETRY_SECONDS = 10


class PageParts:
    """What the handlers share; made when the application starts, ended with it."""

    def __init__(self, viewer: Viewer, assets: Assets, renderer: Renderer) -> None:
        self.viewer = viewer
        self.assets = assets
        self.renderer = renderer
        self.broadcast = Broadcast(self._look)
        self._slow_due = 0.0

    async def _look(self) -> tuple[dict[str, Any], dict[str, str]]:
        view = await self.viewer.view()
        names: tuple[str, ...] = QUICK
        if time.monotonic() >= self._slow_due:
            self._slow_due = time.monotonic() + SLOW_SECONDS
            names += SLOW
        return figures(view), self.renderer.fragments(view, names)


PARTS: web.AppKey[PageParts] = web.AppKey("page", PageParts)


def set_up(app: web.Application) -> None:
    """Give `app` the page's parts. Listeners are ended before the server waits for handlers."""
    app.on_startup.append(_begin)
    app.on_shutdown.append(_end)


async def _begin(app: web.Application) -> None:
    assets, renderer = await asyncio.to_thread(lambda: (Assets(), Renderer()))
    app[PARTS] = PageParts(Viewer(app[PLANE]), assets, renderer)
    if assets.missing:
        missing = ", ".join(assets.missing)
        _log.warning("the page draws no charts: %s not installed; install gup again", missing)


async def _end(app: web.Application) -> None:
    await app[PARTS].broadcast.stop()


async def page(request: web.Request) -> web.Response:
    """The page for people."""
    parts = request.app[PARTS]
    view = await parts.viewer.view()
    return web.Response(
        text=parts.renderer.page(view, assets=parts.assets.urls, edition=parts.assets.edition),
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY},
    )


async def asset(request: web.Request) -> web.Response:
    """One of the page's files; its URL changes with its bytes, so it may be kept."""
    found = request.app[PARTS].assets.files.get(request.match_info["name"])
    if found is None:
        raise web.HTTPNotFound(text="The page has no such file")
    headers = {"ETag": f'"{found.tag}"', "Cache-Control": "max-age=31536000, immutable"}
    if request.query_string != found.tag:
        headers["Cache-Control"] = "no-cache"
    return web.Response(body=found.body, content_type=found.content_type, charset="utf-8", headers=headers)


@describe(None, media=("text/event-stream",))
async def events(request: web.Request) -> web.StreamResponse:
    """Server-sent events: `hello`, then `figures` each second and each `fragment` that changes."""
    parts = request.app[PARTS]
    async with parts.broadcast.listening() as listener:
        if listener is None:
            full = problem(503, f"{MAX_LISTENERS} listen already; the page itself can be loaded again")
            full.headers["Retry-After"] = str(_RETRY_SECONDS)
            return full
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        hello = f'retry: 2000\nevent: hello\ndata: {{"edition":"{parts.assets.edition}"}}\n\n'
        await _send(response, hello.encode(), listener)
        return response


async def _send(response: web.StreamResponse, first: bytes, listener: Listener) -> None:
    """Until the listener is ended, or the client is gone or takes nothing."""
    message: bytes | None = first
    with contextlib.suppress(ConnectionError, TimeoutError):
        while message is not None:
            async with asyncio.timeout(_WRITE_SECONDS):
                await response.write(message)
            message = await listener.message()


routes = [
    web.get("/", page),
    web.get("/assets/{name}", asset),
    web.get("/api/v1/events", events),
]
