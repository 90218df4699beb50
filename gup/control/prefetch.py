"""Prefetching: which deltas a new revision calls for, the queue, and fetching them."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from gup import config
from gup.content.catalog import CLIENT_PATCHES, OTHER
from gup.content.deltas import Folder, Named, delta_path, named, spelled_moniker
from gup.content.key import ContentKey, Kind, Variant
from gup.content.routes import Route, Routes, leads_to, parse_target
from gup.control.index import Stream, stream_of
from gup.errors import GupError, Problem
from gup.jsonmodel import InvalidError, Members, plain_text, shown
from gup.metrics import MAX_STREAMS

MAX_QUEUED = 1000
"""All rows; the oldest that have ended are forgotten."""
MAX_PENDING = 900
_MAX_TEXT = 9000

By = Literal["traffic", "operator"]


class Outcome(StrEnum):
    """Of a wish."""

    QUEUED = "queued"
    FETCHING = "fetching"
    STORED = "stored"
    PRESENT = "present"
    """It was in the store already, or somebody else's fill brought it."""
    ABSENT = "absent"
    """No upstream has it."""
    FAILED = "failed"
    SUPERSEDED = "superseded"
    """A newer revision was asked for before its turn came."""


TRANSITIONS: dict[Outcome, frozenset[Outcome]] = {
    Outcome.QUEUED: frozenset({Outcome.FETCHING, Outcome.PRESENT, Outcome.SUPERSEDED}),
    Outcome.FETCHING: frozenset(
        {Outcome.STORED, Outcome.PRESENT, Outcome.ABSENT, Outcome.FAILED, Outcome.QUEUED}
    ),
    Outcome.STORED: frozenset(),
    Outcome.PRESENT: frozenset(),
    Outcome.ABSENT: frozenset(),
    Outcome.FAILED: frozenset(),
    Outcome.SUPERSEDED: frozenset(),
}
"""FETCHING to QUEUED: it failed in a way that may pass, or the controller ended meanwhile."""

PENDING = frozenset({Outcome.QUEUED, Outcome.FETCHING})


@dataclass(slots=True, kw_only=True)
class QueuedFetch:
    """One body to fetch ahead. The prefetcher alone changes it; times are Unix seconds."""

    key: ContentKey
    path: str
    """As upstream is asked for it."""
    kind: Kind
    by: By
    asked_at: float
    outcome: Outcome = Outcome.QUEUED
    detail: str = ""
    ended_at: float | None = None
    due_at: float = 0.0
    tries: int = 0

    @property
    def pending(self) -> bool:
        return self.outcome in PENDING

    def move(self, outcome: Outcome, now: float, detail: str = "") -> None:
        assert outcome in TRANSITIONS[self.outcome], (self.outcome, outcome)
        self.outcome, self.detail = outcome, plain_text(detail, _MAX_TEXT)
        self.ended_at = None if self.pending else now

    def to_json(self) -> dict[str, Any]:
        """All of it; `from_json` reads it back."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"key": self.key.text, "kind": str(self.kind), "outcome": str(self.outcome)}

    @classmethod
    def from_json(cls, fields: object) -> "QueuedFetch":
        """InvalidError when `fields` are no wish. What was being fetched is queued again."""
        members = Members(fields, "wish")
        key, path = ContentKey.parse(members["key"]), members.text("path", _MAX_TEXT)
        if not leads_to(path, key):
            raise InvalidError(f"wish: 'path' does not lead to {key.text}: {shown(path)}")
        outcome = members.one_of("outcome", Outcome)
        by: By = "operator" if members["by"] == "operator" else "traffic"
        return cls(
            key=key,
            path=path,
            kind=members.one_of("kind", Kind),
            by=by,
            asked_at=members.time("asked_at"),
            outcome=Outcome.QUEUED if outcome is Outcome.FETCHING else outcome,
            detail=members.text("detail", _MAX_TEXT),
            ended_at=members.time("ended_at") if "ended_at" in members else None,
            tries=members.whole("tries"),
        )


class PrefetchQueue:
    """By key, the latest at the end. `changed` is set False by whoever writes them down."""

    def __init__(self) -> None:
        self._rows: OrderedDict[ContentKey, QueuedFetch] = OrderedDict()
        self.changed = False

    def __iter__(self) -> Iterator[QueuedFetch]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: ContentKey) -> QueuedFetch | None:
        return self._rows.get(key)

    @property
    def pending(self) -> int:
        return sum(wish.pending for wish in self)

    def add(self, wish: QueuedFetch) -> bool:
        """Put it at the end, in place of an earlier one of its key; False when too many are pending."""
        if self.pending >= MAX_PENDING:
            return False
        self._rows[wish.key] = wish
        self._rows.move_to_end(wish.key)
        self._forget()
        self.changed = True
        return True

    def move(self, wish: QueuedFetch, outcome: Outcome, now: float, detail: str = "") -> None:
        wish.move(outcome, now, detail)
        self.changed = True

    def due(self, kinds: frozenset[Kind], now: float) -> QueuedFetch | None:
        """The next to fetch of these kinds: an operator's first, then in their order."""
        found = [
            wish
            for wish in self
            if wish.outcome is Outcome.QUEUED and wish.kind in kinds and wish.due_at <= now
        ]
        return min(found, key=lambda wish: wish.by != "operator", default=None)

    def supersede(self, stream: Stream, newest: str, now: float) -> None:
        """Nobody needs what leads to an older revision, and was not asked for by an operator."""
        for wish in self:
            if wish.outcome is Outcome.QUEUED and wish.by == "traffic" and stream_of(wish.key) == stream:
                names = named(wish.key)
                if names is not None and names.revision < newest:
                    self.move(wish, Outcome.SUPERSEDED, now, f"{newest} is asked for by now")

    def _forget(self) -> None:
        if len(self._rows) > MAX_QUEUED:
            oldest = next(wish for wish in self if not wish.pending)
            del self._rows[oldest.key]

    def to_json(self) -> list[dict[str, Any]]:
        return [wish.to_json() for wish in self]

    def restore(self, rows: Any) -> None:
        """Take back what `to_json` gave, before those that have come since; what is no wish is left out."""
        newer, self._rows = self._rows, OrderedDict()
        for row in rows if isinstance(rows, list) else ():
            try:
                wish = QueuedFetch.from_json(row)
            except ValueError:
                continue
            self._rows[wish.key] = wish
        self._rows |= newer
        for key in newer:
            self._rows.move_to_end(key)
        while len(self._rows) > MAX_QUEUED:
            self._rows.popitem(last=False)


MAX_REVISIONS = 64
"""Remembered of each stream; those named longest ago are forgotten."""


@dataclass(slots=True)
class _Known:
    """One stream. `seen` has the time of the last naming of each revision, the latest at the end.

    `asked` are those from which a client has asked for the delta to the newest one: nothing is left to be
    done for them.
    """

    newest: str = ""
    announced_at: float = 0.0
    moniker: str = ""
    folder: Folder | None = None
    seen: OrderedDict[str, float] = field(default_factory=OrderedDict)
    asked: set[str] = field(default_factory=set)

    def name(self, named: Named, now: float) -> None:
        if named.from_revision is not None:
            self.see(named.from_revision, now)
            if named.revision == self.newest:
                self.asked.add(named.from_revision)

    def see(self, revision: str, now: float) -> None:
        self.seen[revision] = now
        self.seen.move_to_end(revision)
        while len(self.seen) > MAX_REVISIONS:
            forgotten, _ = self.seen.popitem(last=False)
            self.asked.discard(forgotten)


@dataclass(frozen=True, slots=True)
class Announced:
    """A revision that clients have begun to ask for, and where the others of the site are."""

    stream: Stream
    revision: str
    at: float
    from_revisions: tuple[str, ...]
    """The latest named first."""
    paths: tuple[str, ...]
    """Of the deltas from these."""

    @property
    def variant(self) -> Variant:
        return Variant(self.stream[0], self.stream[1])


class Revisions:
    """By stream; as many streams as are counted apart, the longest idle forgotten.

    `changed`: whether anything new was learned since it was last set to False (by whoever writes it down);
    `touched`: whether anything was named again.
    """

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Known] = OrderedDict()
        self.changed = self.touched = False

    def learn(self, stream: Stream, named: Named, now: float, moniker: str = "") -> bool:
        """What a client was sent, or began to be sent. Whether that makes another look worth while: the
        revision is newer than any before, or one that no client of the site was known to be at.
        """
        known = self._known(stream)
        self.touched = True
        known.moniker = moniker or known.moniker
        known.folder = named.folder or known.folder
        news = named.revision not in known.seen
        news = news or (named.from_revision is not None and named.from_revision not in known.seen)
        if named.revision > known.newest:
            known.newest, known.announced_at = named.revision, now
            known.asked.clear()
        known.name(named, now)
        known.see(named.revision, now)  # last: that is where the client will be
        self.changed = self.changed or news
        return news

    def refused(self, stream: Stream, named: Named, now: float) -> None:
        """Upstream does not have what was asked for: that announces nothing, but tells where a client is."""
        if named.from_revision is not None and stream in self._streams:
            self.touched = True
            self._known(stream).name(named, now)

    def _known(self, stream: Stream) -> _Known:
        known = self._streams.setdefault(stream, _Known())
        self._streams.move_to_end(stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return known

    def announced(self, stream: Stream, now: float, *, within_seconds: float, most: int) -> Announced:
        """The stream's newest revision and, of the others named so lately, the `most` named last.

        Those are left out whose delta a client has asked for already.
        """
        known = self._streams[stream]
        lately = [
            revision
            for revision, at in reversed(known.seen.items())
            if revision < known.newest and revision not in known.asked and now - at <= within_seconds
        ][:most]
        folder = known.folder or self._folder_of_others(stream)
        paths = [delta_path(known.moniker or stream[2], old, known.newest, folder) for old in lately]
        return Announced(stream, known.newest, known.announced_at, tuple(lately), tuple(paths))

    def _folder_of_others(self, stream: Stream) -> Folder:
        """As the same upstream has it for other streams; else as the public log shows it (FIELD)."""
        others = (known.folder for other, known in self._streams.items() if other[:2] == stream[:2])
        return next((folder for folder in others if folder is not None), Folder.FROM)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def to_json(self) -> list[dict[str, Any]]:
        """All of it; `restore` takes it back."""
        return [
            {
                "stream": list(stream),
                "newest": known.newest,
                "announced_at": known.announced_at,
                "moniker": known.moniker,
                "folder": known.folder,
                "seen": list(known.seen.items()),
            }
            for stream, known in self._streams.items()
        ]

    def restore(self, rows: Any) -> None:
        """Take back what `to_json` gave. What is not of that form is left out, what is newer stays."""
        for row in rows if isinstance(rows, list) else ():
            match row:
                case {
                    "stream": [str(version), str(language), str(moniker)],
                    "newest": str(newest),
                    "announced_at": int() | float() as at,
                    "moniker": str(spelled),
                    "folder": "from" | "to" | None as folder,
                    "seen": list(seen),
                }:
                    old = _Known(newest, float(at), spelled, Folder(folder) if folder else None)
                    self._restore((version, language, moniker), old, seen)

    def _restore(self, stream: Stream, old: _Known, seen: list[Any]) -> None:
        for pair in seen:
            match pair:
                case [str(revision), int() | float() as at]:
                    old.see(revision, float(at))
        newer = self._streams.get(stream)
        if newer is not None:
            for revision, at in newer.seen.items():
                old.see(revision, at)
            old.moniker, old.folder = newer.moniker or old.moniker, newer.folder or old.folder
            if newer.newest > old.newest:
                old.newest, old.announced_at = newer.newest, newer.announced_at
        self._streams[stream] = old
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)


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
        self.queue = PrefetchQueue()
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
        self.queue.supersede(stream, announced.revision, now)
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
            if self.queue.get(key) is None and not self._holds(key.text):
                fresh += self._add(route, key, "traffic")
        if fresh:
            _log.info(
                "%s of %s is asked for: %d deltas to it are fetched ahead",
                announced.revision,
                "/".join(announced.stream),
                fresh,
            )

    # --- what an operator wants

    def order(self, path: str, version: str | None, language: str | None) -> list[QueuedFetch]:
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
            wish = self.queue.get(key)
            if wish is not None and wish.pending:
                wish.by = "operator"
            elif not self._add(route, key, "operator"):
                raise Busy(f"{MAX_PENDING} are waiting already: try again later")
        return [wish for key in keys if (wish := self.queue.get(key)) is not None]

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
        wish = QueuedFetch(key=key, path=route.upstream_path, kind=route.kind, by=by, asked_at=self._clock())
        if not self.queue.add(wish):
            return False
        self._news[_lane(route.kind)].set()
        return True

    # --- fetching

    async def run(self, lane: int) -> None:
        """Fetch what is wished for in this lane, one after the other; for a job that never ends."""
        while True:
            self._news[lane].clear()
            wish = self.queue.due(LANES[lane], self._clock())
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

    async def _one(self, wish: QueuedFetch) -> None:
        settings = self._settings().prefetch
        now = self._clock()
        if wish.by == "traffic" and not (settings.enabled and settings.max):
            self.queue.move(wish, Outcome.SUPERSEDED, now, "prefetch.enabled was set to false")
            return
        self.queue.move(wish, Outcome.FETCHING, now)
        wish.tries += 1
        try:
            route = self._routes().route(parse_target(wish.path.encode()).path)
            fetched = await self._fetch(route, wish.key.variant)
        except Problem as problem:
            self._failed(wish, problem)
        else:
            self.queue.move(wish, Outcome.STORED if fetched else Outcome.PRESENT, self._clock())

    def _failed(self, wish: QueuedFetch, problem: Problem) -> None:
        now = self._clock()
        if problem.status in (404, 410):
            self.queue.move(wish, Outcome.ABSENT, now, problem.detail)
        elif wish.tries >= _TRIES:
            self.queue.move(wish, Outcome.FAILED, now, problem.detail)
            _log.warning("%s could not be fetched ahead: %s", wish.key.text, problem.detail)
        else:
            self.queue.move(wish, Outcome.QUEUED, now, problem.detail)
            wish.due_at = now + _FIRST_RETRY_SECONDS * 2 ** (wish.tries - 1)

    # --- kept and shown

    def save(self, set_note: Callable[[str, Any], None], *, all_: bool = False) -> None:
        """Keep what is new since the last time; `all_`: also that what was known was named again."""
        if self.revisions.changed or (all_ and self.revisions.touched):
            self.revisions.changed = self.revisions.touched = False
            set_note(_REVISIONS_NOTE, self.revisions.to_json())
        if self.queue.changed:
            self.queue.changed = False
            set_note(_WISHES_NOTE, self.queue.to_json())

    def restore(self, note: Callable[[str], Any]) -> None:
        """Take back what was kept, in whatever state it is."""
        self.revisions.restore(note(_REVISIONS_NOTE))
        self.queue.restore(note(_WISHES_NOTE))
        for news in self._news:
            news.set()


def _lane(kind: Kind) -> int:
    return next(number for number, kinds in enumerate(LANES) if kind in kinds)
