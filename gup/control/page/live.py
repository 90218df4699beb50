"""Fresh fragments for everybody who looks: one view a second, shared by all. Never more than MAX_LISTENERS.

Nobody is waited for: who reads slowly gets the newest of each fragment, not all of them one after another.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

_log = logging.getLogger("gup.control.page")
MAX_LISTENERS = 32
_SECONDS = 1.0
_REST_FACTOR = 10
"""After a look so many times what it took of the loop passes."""
_QUIET_SECONDS = 15.0
"""So long nothing changes before a comment tells that the connection stands."""


class Listener:
    """One who looks. `pending` is what it was not yet sent; bounded by the number of event names."""

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
        return None if self.ended else _lines(events)


Look = Callable[[], Awaitable[tuple[dict[str, Any], dict[str, str]]]]
"""The figures as they are now, and the fragments that were rendered anew."""


class Broadcast:
    """Looks once a second while somebody listens, and tells all what changed. `stop` ends everybody."""

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
        """End all listeners and the task."""
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
        for name, html in fragments.items():
            events[f"fragment {name}"] = _text({"id": name, "html": html})
        return events


def _lines(events: Mapping[str, str]) -> bytes:
    return "".join(f"event: {name.split()[0]}\ndata: {data}\n\n" for name, data in events.items()).encode()


def _text(fields: Mapping[str, Any]) -> str:
    """JSON on one line: an event's data ends at the line's end."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
