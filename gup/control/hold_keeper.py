"""The holds of this gup: ordered, released, and kept for the workers in run/holds.

With a cluster they are orders, which the order book keeps and tells the others.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from gup.cache.revision_holds import RevisionHold, keep_holds, read_holds, with_newest
from gup.content.key import ContentKey
from gup.content.routes import Route, path_of
from gup.control.dependencies import ControlDependencies
from gup.control.entry_table import EntryTable
from gup.control.threads import to_its_end


class HoldKeeper:
    """What is on hold now. Only `_keep` changes it, one change at a time."""

    def __init__(
        self, dependencies: ControlDependencies, rows: EntryTable, route: Callable[[str], Route]
    ) -> None:
        self._dependencies, self._rows, self._route = dependencies, rows, route
        self._changing = asyncio.Lock()
        self.holds = read_holds(dependencies.store.run)
        if dependencies.book is not None:
            dependencies.book.keep_holds = lambda holds: self._keep(lambda _: holds)

    async def hold(self, holds: Iterable[RevisionHold]) -> tuple[str, ...]:
        """Put these on hold, or change who may have them. The members that have not confirmed it in time.

        OSError when it can't be noted.
        """
        book, missing = self._dependencies.book, tuple[str, ...]()
        for hold in holds:
            if book is not None:
                missing = await book.issue("hold", hold.given())
            else:
                await self._keep(partial(_with, hold))
        return missing

    async def release(self, holds: Iterable[RevisionHold]) -> tuple[str, ...]:
        book, missing = self._dependencies.book, tuple[str, ...]()
        for hold in holds:
            if book is not None:
                missing = await book.issue("release", {"stream": hold.stream, "revision": hold.revision})
            else:
                await self._keep(partial(_without, hold))
        return missing

    def on(self, key: ContentKey) -> RevisionHold | None:
        """The hold that names a key."""
        holds = [hold for hold in self.holds if hold.stream == key.stream]
        route = self._route(path_of(key)) if holds else None
        return next((hold for hold in holds if route is not None and hold.names(route)), None)

    async def look(self) -> None:
        """To be called every few seconds: what is stored has changed, and with it what may be had instead."""
        if self.holds:
            await self._keep(lambda holds: holds)

    async def _keep(self, change: Callable[[list[RevisionHold]], list[RevisionHold]]) -> None:
        """Note them, then have the workers read them; nothing when they are as before. OSError."""
        async with self._changing:
            holds = change(self.holds)
            holds = with_newest(holds, {hold.stream: self._newest(hold.stream, holds) for hold in holds})
            if holds != self.holds:
                await to_its_end(keep_holds, self._dependencies.store.run, holds)
                self.holds = holds
                self._dependencies.raise_policy_epoch()

    def _newest(self, moniker: str, holds: Iterable[RevisionHold]) -> str:
        """The newest revision stored here of a stream, of any version and language, that is not on hold."""
        table, on_hold = self._rows, {hold.revision for hold in holds if hold.stream == moniker}
        rows = (row for stream in table.streams() if stream[2] == moniker for row in table.of_stream(stream))
        return max({row.content_revision or "" for row in rows} - on_hold, default="")


def _with(hold: RevisionHold, holds: Iterable[RevisionHold]) -> list[RevisionHold]:
    return [*_without(hold, holds), hold]


def _without(hold: RevisionHold, holds: Iterable[RevisionHold]) -> list[RevisionHold]:
    return [one for one in holds if (one.stream, one.revision) != (hold.stream, hold.revision)]
