"""The page over HTTP: the document, its files, and a stream of events with the changes.

One view a second is shared by all listeners, MAX_LISTENERS at most. Each is sent the differences from what it
was sent before: a slow one gets only the newest of each fragment.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from aiohttp import web

from gup.control.api.endpoint import STATE, Endpoint
from gup.control.page.view import QUICK, SLOW, SLOW_SECONDS, Renderer, Viewer, figures

_log = logging.getLogger("gup.control.page")
MAX_LISTENERS = 32
_SECONDS = 1.0
_REST_FACTOR = 10
"""The pause between two views, as a multiple of a view's time on the loop."""
_QUIET_SECONDS = 15.0
"""After this long without changes a comment is sent, to keep the connection alive."""
_WRITE_SECONDS = 30.0
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page may use its own files, and send requests to its own server."""


class Page:
    """Makes a view a second while there are listeners, and sends them what changed."""

    def __init__(self, viewer: Viewer, renderer: Renderer) -> None:
        self.viewer = viewer
        self.renderer = renderer
        self._slow_due = 0.0
        self._events: dict[str, str] = {}
        """The newest data of each event; a fragment's name has its id behind `fragment`."""
        self._changed = asyncio.Event()
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def look(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The present figures, and the fragments that changed."""
        view = await self.viewer.view()
        names: tuple[str, ...] = QUICK
        if time.monotonic() >= self._slow_due:
            self._slow_due = time.monotonic() + SLOW_SECONDS
            names += SLOW
        return figures(view), self.renderer.fragments(view, names)

    @contextlib.contextmanager
    def listening(self) -> Iterator[bool]:
        """Registers a listener for the block; False when there are too many."""
        if self._stopped or self._listeners >= MAX_LISTENERS:
            yield False
            return
        self._listeners += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="control page")
        try:
            yield True
        finally:
            self._listeners -= 1

    async def messages(self) -> AsyncIterator[bytes]:
        """Server-sent events (WHATWG HTML, 9.2) for one listener; they end with `stop`."""
        sent: dict[str, str] = {}
        while not self._stopped:
            changed = self._changed
            news = {name: data for name, data in self._events.items() if sent.get(name) != data}
            sent |= news
            if news:
                events = (f"event: {name.split()[0]}\ndata: {data}\n\n" for name, data in news.items())
                yield "".join(events).encode()
            try:
                async with asyncio.timeout(_QUIET_SECONDS):
                    await changed.wait()
            except TimeoutError:
                yield b":\n\n"

    async def stop(self) -> None:
        """End all listeners and the task; later ones are refused."""
        self._stopped = True
        self._changed.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Ends when there are no listeners."""
        while self._listeners:
            began = time.thread_time()
            try:
                at_present, fragments = await self.look()
            except Exception:  # noqa: BLE001 - a mistake of ours must not end the page for good
                _log.exception("the page's figures could not be gathered")
            else:
                self._events["figures"] = _text(at_present)
                for name, html in fragments.items():
                    self._events[f"fragment {name}"] = _text({"id": name, "html": html})
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(max(_SECONDS, _REST_FACTOR * (time.thread_time() - began)))
        self._events = {}


def _text(fields: Mapping[str, Any]) -> str:
    """JSON on one line: an event's data ends at the line's end."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


PAGE: web.AppKey[Page] = web.AppKey("page", Page)


def set_up(app: web.Application) -> None:
    """Add the page to `app`. Listeners are ended before the server waits for handlers."""
    app.add_routes([web.get("/", page), web.get("/assets/{name}", asset)])
    app.on_startup.append(_begin)
    app.on_shutdown.append(_end)


async def _begin(app: web.Application) -> None:
    app[PAGE] = Page(Viewer(app[STATE]), await asyncio.to_thread(Renderer))
    if missing := ", ".join(app[PAGE].renderer.missing):
        _log.warning("the page draws no charts: %s not installed; install gup again", missing)


async def _end(app: web.Application) -> None:
    await app[PAGE].stop()


async def page(request: web.Request) -> web.Response:
    """The page for people."""
    parts = request.app[PAGE]
    text = parts.renderer.page(await parts.viewer.view())
    headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY}
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


async def asset(request: web.Request) -> web.Response:
    """One of the page's files; its URL changes with its bytes, so it may be cached."""
    found = request.app[PAGE].renderer.assets.get(request.match_info["name"])
    if found is None:
        raise web.HTTPNotFound(text="The page has no such file")
    kept = "max-age=31536000, immutable" if request.query_string == found.tag else "no-cache"
    headers = {"Cache-Control": kept}
    return web.Response(body=found.body, content_type=found.content_type, charset="utf-8", headers=headers)


async def events(request: web.Request) -> web.StreamResponse:
    """Server-sent events: `hello`, then `figures` each second and each `fragment` that changes."""
    parts = request.app[PAGE]
    with parts.listening() as admitted:
        if not admitted:
            detail = f"{MAX_LISTENERS} clients receive events already; reload the page instead"
            raise web.HTTPServiceUnavailable(text=detail, headers={"Retry-After": "10"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        hello = f'retry: 2000\nevent: hello\ndata: {{"edition":"{parts.renderer.edition}"}}\n\n'
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client has gone, or does not read
            await response.write(hello.encode())
            async for message in parts.messages():
                async with asyncio.timeout(_WRITE_SECONDS):
                    await response.write(message)
        return response


ENDPOINTS = (Endpoint("GET", "/api/v1/events", events, media=("text/event-stream",)),)
