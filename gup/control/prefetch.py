"""Fetches ahead: the deltas to a new revision, as the site's traffic tells them, and what an operator wants.

Never client patches that nobody asked for; never while clients' fills stream or wait (gup.cache.ahead), and
never the same twice. Two at once at most: one delta or index file, and one of all else.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from gup import config
from gup.content.catalog import CLIENT_PATCHES, OTHER
from gup.content.deltas import named, spelled_moniker
from gup.content.key import ContentKey, Kind, Variant
from gup.content.routes import Route, Routes, parse_target
from gup.control.revisions import Announced, Revisions
from gup.control.rows import Stream, stream_of
from gup.control.wishes import MAX_PENDING, Outcome, Wish, Wishes
from gup.errors import GupError, Problem

_log = logging.getLogger("gup.control.prefetch")
LANES = (frozenset({Kind.DELTA, Kind.INDEX}), frozenset({Kind.FULL, Kind.OTHER}))
"""What is fetched one after the other: a full of hours holds up no delta."""
_TRIES = 4
_FIRST_RETRY_SECONDS = 30.0
_IDLE_LOOK_SECONDS = 0.1
_LOOK_SECONDS = 5.0
"""Between two looks at whether a failed one is due again."""
_REVISIONS_NOTE = "revisions"
_WISHES_NOTE = "wishes"

FetchAhead = Callable[[Route, Variant], Awaitable[bool]]
"""Cache.fetch_ahead."""


class NotThereError(ValueError):
    """What is ordered is no content, or no upstream can have it."""


class Busy(GupError):  # noqa: N818 - what is told, not our error
    """Too much is to be fetched ahead already."""


class Prefetcher:
    """Told by the plane what clients ask for; `run` of each lane is a job. All on the event loop."""

    def __init__(
        self,
        *,
        settings: Callable[[], config.Settings],
        fetch: FetchAhead,
        idle: Callable[[], bool],
        type_of: Callable[[Stream], str | None],
        places: Callable[[str], Sequence[tuple[Variant, Variant]]],
        holds: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        """`type_of` a stream is None while no catalogue lists it; `holds` tells whether a key is stored.

        `places` are whose a stream may be: the variant of their upstreams, and that of what is stored.
        """
        self._settings = settings
        self._fetch = fetch
        self._idle = idle
        self._type_of = type_of
        self._places = places
        self._holds = holds
        self._clock = clock
        self._news = [asyncio.Event() for _ in LANES]
        self.revisions = Revisions()
        self.wishes = Wishes()
        self.left_out: dict[Stream, str] = {}
        """Why nothing of a stream is fetched ahead."""

    # --- what the traffic tells

    def asked(self, key: ContentKey, upstream_path: str = "") -> None:
        """A client is sent this, or begins to be."""
        names = named(key)
        if names is None:
            return
        stream = stream_of(key)
        if self.revisions.learn(stream, names, self._clock(), spelled_moniker(upstream_path)):
            self._look_at(stream)

    def refused(self, key: ContentKey) -> None:
        """Upstream does not have what a client asked for."""
        names = named(key)
        if names is not None:
            self.revisions.refused(stream_of(key), names, self._clock())

    def look_over(self) -> None:
        """Look at every stream anew: what was not known, or not allowed, may be by now."""
        for stream in list(self.revisions):
            self._look_at(stream)

    def _look_at(self, stream: Stream) -> None:
        settings = self._settings().prefetch
        if not (settings.enabled and settings.max):
            return
        now = self._clock()
        announced = self.revisions.announced(
            stream, now, within_seconds=settings.seen_within, most=settings.max
        )
        self.wishes.supersede(stream, announced.revision, now)
        if now - announced.at > settings.seen_within or not announced.paths:
            return
        why_not = self._why_not(stream)
        if why_not is not None:
            if self.left_out.get(stream) != why_not:
                self.left_out[stream] = why_not
                _log.info("nothing of %s is fetched ahead: %s", "/".join(stream), why_not)
            return
        self.left_out.pop(stream, None)
        self._wish(announced)

    def _why_not(self, stream: Stream) -> str | None:
        settings = self._settings()
        type_ = self._type_of(stream)
        if type_ == CLIENT_PATCHES:
            return "client patches are fetched when a client asks for them"
        if type_ is None and settings.prefetch.unlisted == "skip":
            return 'no catalogue lists it, so it may be client patches; prefetch.unlisted = "fetch" allows it'
        if settings.rules.content_types and (type_ or OTHER) not in settings.rules.content_types:
            return f"rules.content_types has no {type_ or OTHER}"
        return None

    def _wish(self, announced: Announced) -> None:
        fresh = 0
        for path in announced.paths:
            route = self._routes().route(parse_target(path.encode()).path)
            key = route.key(announced.variant)
            if self.wishes.get(key) is None and not self._holds(key.text):
                fresh += self._add(route, key, "traffic")
        if fresh:
            _log.info(
                "%s of %s is asked for: %d deltas to it are fetched ahead",
                announced.revision,
                "/".join(announced.stream),
                fresh,
            )

    # --- what an operator wants

    def order(self, path: str, version: str | None, language: str | None) -> list[Wish]:
        """Fetch `path` ahead, for all variants that fit. ValueError says what is wrong with the order.

        Busy when the list is full.
        """
        try:
            target = parse_target(path.encode())
            if target.authority is not None:
                raise ValueError("path: begin it with /content/, without the server")
            route = self._routes().route(target.path)
        except Problem as problem:
            kind = NotThereError if problem.status == 404 else ValueError
            raise kind(f"path: {path!r:.200} can't be fetched: {problem.detail}") from problem
        variants = self._variants(route.stream, version, language)
        keys = list(dict.fromkeys(route.key(variant) for variant in variants))
        for key in keys:
            wish = self.wishes.get(key)
            if wish is not None and wish.pending:
                wish.by = "operator"
            elif not self._add(route, key, "operator"):
                raise Busy(f"{MAX_PENDING} are waiting already: try again later")
        return [wish for key in keys if (wish := self.wishes.get(key)) is not None]

    def _variants(self, stream: str, version: str | None, language: str | None) -> list[Variant]:
        """Under which a stream's content of the upstreams of this version and language is stored."""
        every = self._places(stream)
        found = [
            stored
            for own, stored in every
            if (version is None or version.casefold() == own.version.casefold())
            and (language is None or language.casefold() == own.language.casefold())
        ]
        if not found:
            there_is = "; ".join(f"{own.version!r} and {own.language!r}" for own, _ in every) or "none"
            wanted = " and ".join(repr(part) for part in (version, language) if part is not None)
            raise NotThereError(f"version, language: no upstream has {wanted}; there is {there_is}")
        return found

    def _routes(self) -> Routes:
        return Routes(liveupdate=any(u.kind == "liveupdate" for u in self._settings().upstream))

    def _add(self, route: Route, key: ContentKey, by: Any) -> bool:
        wish = Wish(key=key, path=route.upstream_path, kind=route.kind, by=by, asked_at=self._clock())
        if not self.wishes.add(wish):
            return False
        self._news[_lane(route.kind)].set()
        return True

    # --- fetching

    async def run(self, lane: int) -> None:
        """Fetch what is wished for in this lane, one after the other; for a job that never ends."""
        while True:
            self._news[lane].clear()
            wish = self.wishes.due(LANES[lane], self._clock())
            if wish is None:
                try:
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._news[lane].wait()
                except TimeoutError:
                    pass
                continue
            if not self._idle() and not self._holds(wish.key.text):
                await asyncio.sleep(_IDLE_LOOK_SECONDS)
                continue
            await self._one(wish)

    async def _one(self, wish: Wish) -> None:
        settings = self._settings().prefetch
        now = self._clock()
        if wish.by == "traffic" and not (settings.enabled and settings.max):
            self.wishes.move(wish, Outcome.SUPERSEDED, now, "prefetch.enabled was set to false")
            return
        self.wishes.move(wish, Outcome.FETCHING, now)
        wish.tries += 1
        try:
            route = self._routes().route(parse_target(wish.path.encode()).path)
            fetched = await self._fetch(route, wish.key.variant)
        except Problem as problem:
            self._failed(wish, problem)
        else:
            self.wishes.move(wish, Outcome.STORED if fetched else Outcome.PRESENT, self._clock())

    def _failed(self, wish: Wish, problem: Problem) -> None:
        now = self._clock()
        if problem.status in (404, 410):
            self.wishes.move(wish, Outcome.ABSENT, now, problem.detail)
        elif wish.tries >= _TRIES:
            self.wishes.move(wish, Outcome.FAILED, now, problem.detail)
            _log.warning("%s could not be fetched ahead: %s", wish.key.text, problem.detail)
        else:
            self.wishes.move(wish, Outcome.QUEUED, now, problem.detail)
            wish.due_at = now + _FIRST_RETRY_SECONDS * 2 ** (wish.tries - 1)

    # --- kept and shown

    def save(self, set_note: Callable[[str, Any], None], *, all_: bool = False) -> None:
        """Keep what is new since the last time; `all_`: also that what was known was named again."""
        if self.revisions.changed or (all_ and self.revisions.touched):
            self.revisions.changed = self.revisions.touched = False
            set_note(_REVISIONS_NOTE, self.revisions.to_json())
        if self.wishes.changed:
            self.wishes.changed = False
            set_note(_WISHES_NOTE, self.wishes.to_json())

    def restore(self, note: Callable[[str], Any]) -> None:
        """Take back what was kept, in whatever state it is."""
        self.revisions.restore(note(_REVISIONS_NOTE))
        self.wishes.restore(note(_WISHES_NOTE))
        for news in self._news:
            news.set()


def _lane(kind: Kind) -> int:
    return next(number for number, kinds in enumerate(LANES) if kind in kinds)
