"""What clients do not get, or not yet: the holds of operators, and new revisions that others get first.

Kept for the workers in run/holds and run/revisions. With a cluster holds are orders, which the order book
keeps and tells the others; since when a revision is known is told to them too.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial

from gup.cache.canary import (
    MAX_STREAMS,
    Canary,
    FirstSeen,
    KnownRevisions,
    Waiting,
    age,
    keep_known,
    read_known,
)
from gup.cache.revision_holds import RevisionHold, keep_holds, read_holds, revision_of, with_newest
from gup.content.key import ContentKey, named
from gup.content.routes import Route, path_of
from gup.control.dependencies import ControlDependencies
from gup.control.entry_table import EntryTable
from gup.control.threads import to_its_end
from gup.errors import Problem

_log = logging.getLogger("gup.control.holds")
_NEWEST_SECONDS = 5.0
_AHEAD_SECONDS = 5.0
"""A time that is further ahead is from a clock that has been put back since."""
_MOST_ASKED = 100
_ASKED_AT_ONCE = 8
_HEAD_SECONDS = 10.0


class HoldKeeper:
    """What is on hold now, and what is new. Only `_keep` changes it, one change at a time."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        rows: EntryTable,
        route: Callable[[str], Route],
        clock: Callable[[], float],
        refused: Callable[[str | None], None],
    ) -> None:
        """`clock` is in Unix seconds. `refused` gets why the disk did not take it, or None."""
        self._dependencies, self._rows, self._route, self._clock = dependencies, rows, route, clock
        self._refused = refused
        self._changing = asyncio.Lock()
        self._newest_at = 0.0
        self._asked = OrderedDict[tuple[str, str], tuple[ContentKey, Route]]()
        """New ones that upstream has to confirm, by stream and revision."""
        self._seen: dict[tuple[str, str], float] = {}
        """Revisions that are in the store, since when, and not noted yet."""
        self.holds = read_holds(dependencies.store.run)
        self.known = {one.stream: one for one in read_known(dependencies.store.run)}
        if dependencies.book is not None:
            dependencies.book.keep_holds = self._take_orders

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
        """To be called about once a second: what is stored has changed, and what may be had instead."""
        try:
            await self._note_new()
            if (self.holds or self.canary) and time.monotonic() - self._newest_at >= _NEWEST_SECONDS:
                await self._keep(lambda holds: holds)
        except OSError as error:  # found again at the next look
            self._refused(error.strerror or str(error))
        else:
            self._refused(None)

    async def _take_orders(self, holds: list[RevisionHold], news: list[FirstSeen]) -> None:
        """All that the members of the cluster have ordered."""
        await self._keep(lambda _: holds, news)

    # --- new revisions

    # The known ones are noted without a canary too: it knows what is new as soon as it is set.

    @property
    def canary(self) -> Canary:
        return Canary(self._dependencies.settings().rules, self.known.values())

    def waiting(self) -> list[tuple[str, Waiting]]:
        """The new revisions that only some clients get, by stream."""
        canary = self.canary
        return canary.waiting(self._types(canary), self._clock())

    @property
    def kept_back(self) -> set[str]:
        """The monikers of which a revision is on hold or waits."""
        return {hold.stream for hold in self.holds} | {stream for stream, _ in self.waiting()}

    def waits(self, key: ContentKey) -> Waiting | None:
        """Whether the revision of a key is new."""
        canary = self.canary
        revision = revision_of(self._route(path_of(key))) if canary else None
        if not revision:
            return None
        return canary.of(key.stream, revision, self._types(canary).get(key.stream, ""), self._clock())

    def saw(self, key: ContentKey) -> None:
        """A body has come into the store."""
        if (names := named(key)) is not None:
            self._seen.setdefault((key.stream, names.revision), self._clock())

    def asked_for_new(self, key: ContentKey, path: str) -> None:
        """A client asks for a new revision. Whether there is one is asked upstream: any name may be asked."""
        try:
            route = self._route(path)
        except Problem:  # there is no such upstream any more
            return
        if (revision := revision_of(route)) and len(self._asked) < _MOST_ASKED:
            self._asked.setdefault((route.stream, revision), (key, route))

    async def open(self, stream: str, revision: str) -> tuple[str, ...]:
        """Let all clients have a new revision. The members that have not confirmed it in time; OSError."""
        return await self._note(stream, revision, 0.0)

    async def _note_new(self) -> None:
        for stream, newest in self._rows.newest_held().items():  # their events may have been lost
            if not self._known(stream[2]).knows(newest):
                at = (row.stored_at for row in self._rows.of_stream(stream) if row.content_revision == newest)
                self._seen.setdefault((stream[2], newest), min(at, default=self._clock()))
        asked = [self._asked.popitem(last=False) for _ in range(min(_ASKED_AT_ONCE, len(self._asked)))]
        there = await asyncio.gather(*(self._is_there(key, route) for _, (key, route) in asked))
        for (name, of), found in zip(asked, there, strict=True):
            if found is None and len(self._asked) < _MOST_ASKED:
                self._asked[name] = of  # again later
            elif found:
                self._seen.setdefault(name, self._clock())
        seen, self._seen = self._seen, {}
        for (moniker, revision), since in seen.items():
            if not self._known(moniker).knows(revision):
                if self.canary:
                    _log.info("revision %s of %s is new: rules.canary.subnets go first", revision, moniker)
                await self._note(moniker, revision, since)

    async def _is_there(self, key: ContentKey, route: Route) -> bool | None:
        """Whether upstream has it; None: it can't be asked now."""
        variant = next(
            (own for own, stored in self._dependencies.places(route.stream) if stored == key.variant),
            key.variant,
        )
        try:
            async with asyncio.timeout(_HEAD_SECONDS):
                await self._dependencies.head(route, variant)
        except Problem as problem:
            return False if problem.status in (404, 410) else None
        except TimeoutError:
            return None
        return True

    async def _note(self, stream: str, revision: str, since: float) -> tuple[str, ...]:
        await self._keep(lambda holds: holds, [(stream, revision, since)])
        book = self._dependencies.book
        told = {"stream": stream, "revision": revision, "since": since}
        return await book.issue("new", told) if book is not None and self.canary else ()

    def _known(self, stream: str) -> KnownRevisions:
        return self.known.get(stream, KnownRevisions(stream))

    def _types(self, canary: Canary) -> dict[str, str]:
        """The type of content of each stream that is in the store, where the canary looks at it."""
        label, streams = self._dependencies.label_of, self._rows.streams() if canary.by_type else ()
        labels = {stream[2]: label(stream, "") for stream in streams}
        return {moniker: found.type for moniker, found in labels.items() if found is not None}

    # --- on disk

    async def _keep(
        self,
        change: Callable[[list[RevisionHold]], list[RevisionHold]],
        news: Iterable[FirstSeen] = (),
    ) -> None:
        """Note it, then have the workers read it; nothing when all is as before. OSError."""
        async with self._changing:
            self._newest_at = time.monotonic()
            holds, known = change(self.holds), dict(self.known)
            for stream, revision, since in news:
                known[stream] = known.get(stream, KnownRevisions(stream)).with_one(revision, since)
            while len(known) > MAX_STREAMS:
                del known[next(iter(known))]
            now = self._clock()
            known = {stream: one.by_the_clock(now, _AHEAD_SECONDS) for stream, one in known.items()}
            canary = Canary(self._dependencies.settings().rules, known.values())
            not_for_all = {(hold.stream, hold.revision) for hold in holds}
            if canary:
                waiting = canary.waiting(self._types(canary), now)
                not_for_all |= {(stream, new.revision) for stream, new in waiting}
            newest = self._newest({*(hold.stream for hold in holds), *(known if canary else ())}, not_for_all)
            holds = with_newest(holds, newest)
            known = {stream: replace(one, newest=newest.get(stream, "")) for stream, one in known.items()}
            run = self._dependencies.store.run
            if holds != self.holds:
                await to_its_end(keep_holds, run, holds)
            if known != self.known:
                await to_its_end(keep_known, run, known.values())
            changed = holds != self.holds or (bool(canary) and known != self.known)
            self.holds, self.known = holds, known
            if changed:
                self._dependencies.raise_policy_epoch()

    def _newest(self, monikers: Collection[str], not_for_all: Collection[tuple[str, str]]) -> dict[str, str]:
        """Of each stream the newest revision stored here, of any version and language, that all may have."""
        table, found = self._rows, dict.fromkeys(monikers, "")
        for stream, newest in table.newest_held().items():
            if (moniker := stream[2]) in found:
                revisions: Iterable[str] = (newest,)
                if (moniker, newest) in not_for_all:
                    revisions = {row.content_revision or "" for row in table.of_stream(stream)}
                may = (one for one in revisions if (moniker, one) not in not_for_all)
                found[moniker] = max([found[moniker], *may], key=age)
        return found


def _with(hold: RevisionHold, holds: Iterable[RevisionHold]) -> list[RevisionHold]:
    return [*_without(hold, holds), hold]


def _without(hold: RevisionHold, holds: Iterable[RevisionHold]) -> list[RevisionHold]:
    return [one for one in holds if (one.stream, one.revision) != (hold.stream, hold.revision)]
