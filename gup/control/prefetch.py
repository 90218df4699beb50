"""Prefetching: what to fetch before a client asks for it, the queue, and the fetching.

A client that asks for a delta names two revisions: the one it has and the one it will have; one that asks for
a full names the latter. So the revisions named lately are those of this site's clients: when a new one is
named, the deltas from the others to it are queued. Operators queue what they want. Client patches are not
prefetched unless a client asked for them, and background fills yield to clients' fills. At most two run at
once: one delta or index file, and one of all else.
"""

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
"""In the queue, ended ones included; the oldest ended ones are forgotten."""
MAX_PENDING = 900
_MAX_TEXT = 9000

By = Literal["traffic", "operator"]


class Outcome(StrEnum):
    """What became of a queued fetch."""

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
    """One body to prefetch. Only the prefetcher changes it; times are Unix seconds."""

    key: ContentKey
    path: str
    """The path that upstream is asked for."""
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
        """All members; `from_json` reads them back."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"key": self.key.text, "kind": str(self.kind), "outcome": str(self.outcome)}

    @classmethod
    def from_json(cls, fields: object) -> "QueuedFetch":
        """Read what `to_json` gave; InvalidError. What was being fetched is queued again."""
        members = Members(fields, "prefetch")
        key, path = ContentKey.parse(members["key"]), members.text("path", _MAX_TEXT)
        if not leads_to(path, key):
            raise InvalidError(f"prefetch: 'path' does not lead to {key.text}: {shown(path)}")
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
    """Queued fetches by key, the latest at the end. `changed` is reset by whoever saves the queue."""

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
        return sum(item.pending for item in self)

    def add(self, item: QueuedFetch) -> bool:
        """Append, in place of an earlier one of the same key; False when too many are pending."""
        if self.pending >= MAX_PENDING:
            return False
        self._rows[item.key] = item
        self._rows.move_to_end(item.key)
        self._forget()
        self.changed = True
        return True

    def move(self, item: QueuedFetch, outcome: Outcome, now: float, detail: str = "") -> None:
        item.move(outcome, now, detail)
        self.changed = True

    def due(self, kinds: frozenset[Kind], now: float) -> QueuedFetch | None:
        """The next one of these kinds: operators' first, then in the order of the queue."""
        found = [
            item
            for item in self
            if item.outcome is Outcome.QUEUED and item.kind in kinds and item.due_at <= now
        ]
        return min(found, key=lambda item: item.by != "operator", default=None)

    def supersede(self, stream: Stream, newest: str, now: float) -> None:
        """Drop queued deltas to older revisions, unless an operator wants them."""
        for item in self:
            if item.outcome is Outcome.QUEUED and item.by == "traffic" and stream_of(item.key) == stream:
                names = named(item.key)
                if names is not None and names.revision < newest:
                    self.move(item, Outcome.SUPERSEDED, now, f"{newest} is asked for by now")

    def _forget(self) -> None:
        if len(self._rows) > MAX_QUEUED:
            oldest = next(item for item in self if not item.pending)
            del self._rows[oldest.key]

    def to_json(self) -> list[dict[str, Any]]:
        return [item.to_json() for item in self]

    def restore(self, rows: Any) -> None:
        """Put what `to_json` gave before what has come since; malformed rows are left out."""
        newer, self._rows = self._rows, OrderedDict()
        for row in rows if isinstance(rows, list) else ():
            try:
                item = QueuedFetch.from_json(row)
            except ValueError:
                continue
            self._rows[item.key] = item
        self._rows |= newer
        for key in newer:
            self._rows.move_to_end(key)
        while len(self._rows) > MAX_QUEUED:
            self._rows.popitem(last=False)


MAX_REVISIONS = 64
"""Revisions remembered of each stream; those named longest ago are forgotten."""


@dataclass(slots=True)
class _Known:
    """What is known of one stream. `seen` has when each revision was named last, the latest at the end.

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
    """A stream's newest revision, and the revisions that other clients of the site are at."""

    stream: Stream
    revision: str
    at: float
    from_revisions: tuple[str, ...]
    """The latest named first."""
    paths: tuple[str, ...]
    """Paths of the deltas from these."""

    @property
    def variant(self) -> Variant:
        return Variant(self.stream[0], self.stream[1])


class Revisions:
    """Revisions by stream, the longest idle streams forgotten beyond MAX_STREAMS.

    `changed`: whether anything new was learned since it was last set to False (by whoever writes it down);
    `touched`: whether anything was named again.
    """

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Known] = OrderedDict()
        self.changed = self.touched = False

    def learn(self, stream: Stream, named: Named, now: float, moniker: str = "") -> bool:
        """Note what a client was sent, or is being sent. True when the deltas have to be looked at again: the
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
        """Upstream does not have what was asked for: that tells where a client is, and announces nothing."""
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
        """The stream's newest revision, and the `most` others named last within `within_seconds`.

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
        """The folder layout of other streams of the same upstream; else that of the public log (FIELD)."""
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
        """Take back what `to_json` gave. Malformed rows are left out; what has come since stays."""
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
"""Kinds that are fetched one after the other: a full that takes hours delays no delta."""
_TRIES = 4
_FIRST_RETRY_SECONDS = 30.0
_IDLE_LOOK_SECONDS = 0.1
_LOOK_SECONDS = 5.0
"""Between two looks for a retry that is due."""
_REVISIONS_NOTE = "revisions"
_QUEUE_NOTE = "wishes"

FetchAhead = Callable[[Route, Variant], Awaitable[bool]]
"""Cache.fetch_ahead."""


class NotThereError(ValueError):
    """What an operator ordered is no content, or no upstream can have it."""


class Busy(GupError):  # noqa: N818 - what is told, not our error
    """The prefetch queue is full."""


class Prefetcher:
    """Told what clients ask for; one `run` for each lane is a job. Everything is on the event loop."""

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
        """Why nothing of a stream is prefetched, by stream."""

    # --- what the traffic tells

    def asked(self, key: ContentKey, upstream_path: str = "") -> None:
        """A client was sent this, or it has begun to arrive for one."""
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
        """Look at every stream again: what was unknown, or not allowed, may not be so now."""
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
                _log.info("nothing of %s is prefetched: %s", "/".join(stream), why_not)
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
                "clients ask for %s of %s: %d deltas to it are prefetched",
                announced.revision,
                "/".join(announced.stream),
                fresh,
            )

    # --- what an operator wants

    def order(self, path: str, version: str | None, language: str | None) -> list[QueuedFetch]:
        """Queue `path` for all matching variants. ValueError tells what is wrong with the order.

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
            item = self.queue.get(key)
            if item is not None and item.pending:
                item.by = "operator"
            elif not self._add(route, key, "operator"):
                raise Busy(f"{MAX_PENDING} are waiting already: try again later")
        return [item for key in keys if (item := self.queue.get(key)) is not None]

    def _variants(self, stream: str, version: str | None, language: str | None) -> list[Variant]:
        """The variants under which content of upstreams of this version and language is stored."""
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
        item = QueuedFetch(key=key, path=route.upstream_path, kind=route.kind, by=by, asked_at=self._clock())
        if not self.queue.add(item):
            return False
        self._news[_lane(route.kind)].set()
        return True

    # --- fetching

    async def run(self, lane: int) -> None:
        """Fetch what is queued for this lane, one after the other; never returns."""
        while True:
            self._news[lane].clear()
            item = self.queue.due(LANES[lane], self._clock())
            if item is None:
                try:
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._news[lane].wait()
                except TimeoutError:
                    pass
                continue
            if not self._idle() and not self._holds(item.key.text):
                await asyncio.sleep(_IDLE_LOOK_SECONDS)
                continue
            await self._one(item)

    async def _one(self, item: QueuedFetch) -> None:
        settings = self._settings().prefetch
        now = self._clock()
        if item.by == "traffic" and not (settings.enabled and settings.max):
            self.queue.move(item, Outcome.SUPERSEDED, now, "prefetch.enabled was set to false")
            return
        self.queue.move(item, Outcome.FETCHING, now)
        item.tries += 1
        try:
            route = self._routes().route(parse_target(item.path.encode()).path)
            fetched = await self._fetch(route, item.key.variant)
        except Problem as problem:
            self._failed(item, problem)
        else:
            self.queue.move(item, Outcome.STORED if fetched else Outcome.PRESENT, self._clock())

    def _failed(self, item: QueuedFetch, problem: Problem) -> None:
        now = self._clock()
        if problem.status in (404, 410):
            self.queue.move(item, Outcome.ABSENT, now, problem.detail)
        elif item.tries >= _TRIES:
            self.queue.move(item, Outcome.FAILED, now, problem.detail)
            _log.warning("%s could not be prefetched: %s", item.key.text, problem.detail)
        else:
            self.queue.move(item, Outcome.QUEUED, now, problem.detail)
            item.due_at = now + _FIRST_RETRY_SECONDS * 2 ** (item.tries - 1)

    # --- kept and shown

    def save(self, set_note: Callable[[str, Any], None], *, all_: bool = False) -> None:
        """Save what is new since the last time; `all_`: also when known revisions were named again."""
        if self.revisions.changed or (all_ and self.revisions.touched):
            self.revisions.changed = self.revisions.touched = False
            set_note(_REVISIONS_NOTE, self.revisions.to_json())
        if self.queue.changed:
            self.queue.changed = False
            set_note(_QUEUE_NOTE, self.queue.to_json())

    def restore(self, note: Callable[[str], Any]) -> None:
        """Take back what was saved, whatever it holds."""
        self.revisions.restore(note(_REVISIONS_NOTE))
        self.queue.restore(note(_QUEUE_NOTE))
        for news in self._news:
            news.set()


def _lane(kind: Kind) -> int:
    return next(number for number, kinds in enumerate(LANES) if kind in kinds)
