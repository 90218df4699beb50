"""The page over HTTP: the document, its files, and a stream of events with what changes.

One view a second is shared by all listeners, MAX_LISTENERS at most. A slow listener gets the newest of each
fragment, not all of them one after another.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from gup.control.api.endpoint import STATE, Endpoint
from gup.control.page.render import CONTENT_SECURITY_POLICY, QUICK, SLOW, SLOW_SECONDS, Assets, Renderer
from gup.control.page.view import Viewer, figures

_log = logging.getLogger("gup.control.page")
MAX_LISTENERS = 32
_SECONDS = 1.0
_REST_FACTOR = 10
"""The pause between two views, as a multiple of the time that one takes of the loop."""
_QUIET_SECONDS = 15.0
"""When nothing changes for so long, a comment is sent: the connection is alive."""
_WRITE_SECONDS = 30.0
_RETRY_SECONDS = "10"


class Page:
    """What the handlers share, from the start of the application to its end."""

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


PAGE: web.AppKey[Page] = web.AppKey("page", Page)


def set_up(app: web.Application) -> None:
    """Add the page to `app`. Listeners are ended before the server waits for handlers."""
    app.add_routes([web.get("/", page), web.get("/assets/{name}", asset)])
    app.on_startup.append(_begin)
    app.on_shutdown.append(_end)


async def _begin(app: web.Application) -> None:
    assets, renderer = await asyncio.to_thread(lambda: (Assets(), Renderer()))
    app[PAGE] = Page(Viewer(app[STATE]), assets, renderer)
    if assets.missing:
        missing = ", ".join(assets.missing)
        _log.warning("the page draws no charts: %s not installed; install gup again", missing)


async def _end(app: web.Application) -> None:
    await app[PAGE].broadcast.stop()


async def page(request: web.Request) -> web.Response:
    """The page for people."""
    parts = request.app[PAGE]
    return web.Response(
        text=parts.renderer.page(await parts.viewer.view(), parts.assets),
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY},
    )


async def asset(request: web.Request) -> web.Response:
    """One of the page's files; its URL changes with its bytes, so it may be kept."""
    found = request.app[PAGE].assets.files.get(request.match_info["name"])
    if found is None:
        raise web.HTTPNotFound(text="The page has no such file")
    current = request.query_string == found.tag
    headers = {
        "ETag": f'"{found.tag}"',
        "Cache-Control": "max-age=31536000, immutable" if current else "no-cache",
    }
    return web.Response(body=found.body, content_type=found.content_type, charset="utf-8", headers=headers)


async def events(request: web.Request) -> web.StreamResponse:
    """Server-sent events: `hello`, then `figures` each second and each `fragment` that changes."""
    parts = request.app[PAGE]
    async with parts.broadcast.listening() as listener:
        if listener is None:
            told = f"{MAX_LISTENERS} listen already; the page itself can be loaded again"
            raise web.HTTPServiceUnavailable(text=told, headers={"Retry-After": _RETRY_SECONDS})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        hello = f'retry: 2000\nevent: hello\ndata: {{"edition":"{parts.assets.edition}"}}\n\n'
        message: bytes | None = hello.encode()
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client is gone, or takes nothing
            while message is not None:
                async with asyncio.timeout(_WRITE_SECONDS):
                    await response.write(message)
                message = await listener.message()
        return response


ENDPOINTS = (Endpoint("GET", "/api/v1/events", events, media=("text/event-stream",)),)


# --- listeners


class Listener:
    """A client of the events. `pending` is what it was not sent yet, bounded by the number of event names."""

    def __init__(self) -> None:
        self.pending: dict[str, str] = {}
        self.awake = asyncio.Event()
        self.ended = False

    def tell(self, events: Mapping[str, str]) -> None:
        if events:
            self.pending |= events
            self.awake.set()

    def end(self) -> None:
        self.ended = True
        self.awake.set()

    async def message(self) -> bytes | None:
        """The next server-sent events (WHATWG HTML, 9.2); None after `end`."""
        try:
            async with asyncio.timeout(_QUIET_SECONDS):
                await self.awake.wait()
        except TimeoutError:
            return b":\n\n"
        self.awake.clear()
        events, self.pending = self.pending, {}
        lines = (f"event: {name.split()[0]}\ndata: {text}\n\n" for name, text in events.items())
        return None if self.ended else "".join(lines).encode()


Look = Callable[[], Awaitable[tuple[dict[str, Any], dict[str, str]]]]
"""The figures as they are now, and the fragments that were rendered anew."""


class Broadcast:
    """Makes a view a second while anybody listens, and sends all of them what changed."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._listeners: set[Listener] = set()
        self._fragments: dict[str, str] = {}
        self._figures = ""
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Listener | None]:
        """A listener for as long as the block lasts; None when there are too many already."""
        if self._stopped or len(self._listeners) >= MAX_LISTENERS:
            yield None
            return
        listener = Listener()
        listener.tell(self._events(self._fragments))
        self._listeners.add(listener)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="control page")
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    async def stop(self) -> None:
        """End all listeners and the task; later ones are refused."""
        self._stopped = True
        for listener in self._listeners:
            listener.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Ends by itself when nobody listens."""
        while self._listeners:
            began = time.thread_time()
            try:
                figures, fragments = await self._look()
            except Exception:  # noqa: BLE001 - a mistake of ours must not end the page for good
                _log.exception("the page's figures could not be gathered")
            else:
                self._tell(figures, fragments)
            await asyncio.sleep(max(_SECONDS, _REST_FACTOR * (time.thread_time() - began)))
        self._fragments, self._figures = {}, ""

    def _tell(self, figures: Mapping[str, Any], fragments: dict[str, str]) -> None:
        self._figures = _text(figures)
        changed = {name: html for name, html in fragments.items() if self._fragments.get(name) != html}
        self._fragments |= changed
        events = self._events(changed)
        for listener in self._listeners:
            listener.tell(events)

    def _events(self, fragments: Mapping[str, str]) -> dict[str, str]:
        """Their data by name; a fragment's name has its id behind `fragment`."""
        events = {"figures": self._figures} if self._figures else {}
        return events | {
            f"fragment {name}": _text({"id": name, "html": html}) for name, html in fragments.items()
        }


def _text(fields: Mapping[str, Any]) -> str:
    """JSON on one line: an event's data ends at the line's end."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
