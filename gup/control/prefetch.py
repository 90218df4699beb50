"""Prefetching: what to fetch before a client asks for it, the queue, and the fetching.

A client that asks for a delta names two revisions: the one it has and the one it will have; one that asks for
a full names the latter. So recently named revisions are those of this site's clients: when a new one is
named, the deltas from the others to it are queued. Operators queue what they want. Client patches are not
prefetched unless a client asked for them, and background fills yield to clients' fills. At most two run at
once: one delta or index file, and one of all else.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, Field

from gup.cache.budget_gate import SLUG as BUDGET
from gup.content.catalog import CLIENT_PATCHES, OTHER
from gup.content.key import ContentKey, Folder, Kind, Named, Variant, named
from gup.content.routes import Route, Routes, delta_path, parse_target, spelled_moniker
from gup.control.dependencies import ControlDependencies
from gup.control.entry_table import Stream, stream_of
from gup.control.events import Key, Path
from gup.control.index import Index
from gup.control.traffic import LatestStreams
from gup.errors import GupError, Problem
from gup.jsonmodel import Count, InvalidError, Time, plain_text

_log = logging.getLogger("gup.control.prefetch")
MAX_QUEUED = 1000
"""In the queue, ended ones included; the oldest ended ones are forgotten."""
MAX_PENDING = 900
_TRIES = 4
_FIRST_RETRY_SECONDS = 30.0
HELD_BACK = "held back by the WAN's budget"
_LAST_RETRY = _FIRST_RETRY_SECONDS * 2 ** (_TRIES - 2)
_MAX_TEXT = 9000
Text = Annotated[str, Field(max_length=_MAX_TEXT)]
_M = TypeVar("_M", bound=BaseModel)


class Outcome(StrEnum):
    """The result of a queued fetch."""

    QUEUED = "queued"
    FETCHING = "fetching"
    STORED = "stored"
    PRESENT = "present"
    """It was in the store already, or another fill stored it."""
    ABSENT = "absent"
    """No upstream has it."""
    FAILED = "failed"
    SUPERSEDED = "superseded"
    """A newer revision was requested before it was fetched."""


TRANSITIONS: dict[Outcome, frozenset[Outcome]] = {
    Outcome.QUEUED: frozenset({Outcome.FETCHING, Outcome.SUPERSEDED}),
    Outcome.FETCHING: frozenset(set(Outcome) - {Outcome.FETCHING, Outcome.SUPERSEDED}),
}


class QueuedFetch(BaseModel):
    """One body to prefetch. Only the prefetcher changes it; times are Unix seconds."""

    key: Key
    path: Path
    kind: Kind
    by: Literal["traffic", "operator"]
    asked_at: Time
    outcome: Outcome = Outcome.QUEUED
    detail: Text = ""
    ended_at: Time | None = None
    due_at: float = Field(default=0.0, exclude=True)
    tries: Count = 0

    @property
    def pending(self) -> bool:
        return self.outcome in TRANSITIONS


class PrefetchQueue:
    """Queued fetches by key, the latest at the end. `changed` is reset when the queue is saved."""

    def __init__(self) -> None:
        self.rows: OrderedDict[ContentKey, QueuedFetch] = OrderedDict()
        self.changed = False

    @property
    def pending(self) -> int:
        return sum(item.pending for item in self.rows.values())

    def add(self, item: QueuedFetch) -> bool:
        """Append, replacing an earlier one of the same key; False when too many are pending."""
        if self.pending >= MAX_PENDING:
            return False
        self.rows[item.key] = item
        self.rows.move_to_end(item.key)
        if len(self.rows) > MAX_QUEUED:
            del self.rows[next(key for key, item in self.rows.items() if not item.pending)]
        self.changed = True
        return True

    def move(self, item: QueuedFetch, outcome: Outcome, now: float, detail: str = "") -> None:
        assert outcome in TRANSITIONS.get(item.outcome, ()), (item.outcome, outcome)
        item.outcome, item.detail = outcome, plain_text(detail, _MAX_TEXT)
        item.ended_at = None if item.pending else now
        self.changed = True

    def due(
        self, kinds: frozenset[Kind], now: float, may_begin: "Callable[[QueuedFetch], bool]" = lambda _: True
    ) -> QueuedFetch | None:
        """The next one of these kinds that may begin: operators' first, then in the order of the queue."""
        queued = (item for item in self.rows.values() if item.outcome is Outcome.QUEUED)
        # One that is due later than any retry was put off by a clock that has been put back since.
        due = [item for item in queued if item.kind in kinds and not 0 < item.due_at - now <= _LAST_RETRY]
        found = list(filter(may_begin, due))
        return min(found, key=lambda item: item.by != "operator", default=None)

    def supersede(self, stream: Stream, newest: str, now: float) -> None:
        for item in self.rows.values():
            if item.outcome is not Outcome.QUEUED or item.by == "operator" or stream_of(item.key) != stream:
                continue
            if (names := named(item.key)) is not None and names.revision < newest:
                self.move(item, Outcome.SUPERSEDED, now, f"clients request {newest} by now")

    def to_json(self) -> list[Any]:
        return [item.model_dump(mode="json") for item in self.rows.values()]

    def restore(self, rows: Any) -> None:
        """Put the output of `to_json` before newer rows; fetches in progress are queued again."""
        newer, self.rows = self.rows, OrderedDict()
        for item in _readable(QueuedFetch, rows):
            if item.outcome is Outcome.FETCHING:
                item.outcome = Outcome.QUEUED
            if item.key not in newer:
                self.rows[item.key] = item
        self.rows.update(newer)
        while len(self.rows) > MAX_QUEUED:
            self.rows.popitem(last=False)


def _readable(model: type[_M], rows: Any) -> Iterator[_M]:
    """The stored rows without malformed ones."""
    for row in rows if isinstance(rows, list) else ():
        with contextlib.suppress(ValueError, TypeError):
            yield model.model_validate(row)


MAX_REVISIONS = 64
"""Revisions remembered of each stream; those named longest ago are forgotten."""


class _Known(BaseModel):
    """One stream's revisions. `seen` has when each was named last, the latest at the end.

    `asked` are those from which a client has requested the delta to the newest one: they need no prefetch.
    """

    stream: Stream
    newest: str = ""
    announced_at: Time = 0.0
    moniker: str = ""
    folder: Folder | None = None
    seen: Annotated[dict[str, Time], BeforeValidator(dict)] = Field(default_factory=dict)
    asked: set[str] = Field(default_factory=set, exclude=True)

    def name(self, named: Named, now: float) -> None:
        if named.from_revision is not None:
            self.see(named.from_revision, now)
            if named.revision == self.newest:
                self.asked.add(named.from_revision)

    def see(self, revision: str, now: float) -> None:
        self.seen.pop(revision, None)
        self.seen[revision] = now
        if len(self.seen) > MAX_REVISIONS:
            forgotten = next(iter(self.seen))
            del self.seen[forgotten]
            self.asked.discard(forgotten)


class Announced(NamedTuple):
    """A stream's newest revision, since when, and the paths of the deltas to it from the revisions that other
    clients of the site have, the latest named first.
    """

    revision: str
    at: float
    paths: tuple[str, ...]


class Revisions:
    """Revisions by stream. `changed`: something was learned since it was last saved."""

    def __init__(self) -> None:
        self.streams = LatestStreams(lambda stream: _Known(stream=stream))
        self.changed = False

    def learn(self, stream: Stream, named: Named, now: float, moniker: str = "") -> bool:
        """Note what a client was sent, or is being sent. True when the deltas must be checked again: the
        revision is newer than any before, or one that no client of the site was known to have.
        """
        known = self.streams.met(stream)
        if moniker and moniker != known.moniker:
            known.moniker = moniker
        if named.folder and named.folder is not known.folder:
            known.folder = named.folder
        news = any(name and name not in known.seen for name in (named.revision, named.from_revision))
        if named.revision > known.newest:
            known.newest, known.announced_at = named.revision, now
            known.asked.clear()
        known.name(named, now)
        known.see(named.revision, now)  # last: the client will have it
        self.changed = self.changed or news
        return news

    def refused(self, stream: Stream, named: Named, now: float) -> None:
        """Upstream does not have the requested file: that shows which revision a client has, and announces
        nothing.
        """
        if stream in self.streams:
            self.streams.met(stream).name(named, now)

    def announced(self, stream: Stream, now: float, *, within_seconds: float, most: int) -> Announced:
        """The newest revision, and others named recently, except those whose delta a client has requested."""
        known = self.streams[stream]
        recent = [
            revision
            for revision, at in reversed(known.seen.items())
            if revision < known.newest and revision not in known.asked and abs(now - at) <= within_seconds
        ][:most]
        # else that of other streams of the same upstream, or of the public log (FIELD)
        others = (other.folder for name, other in self.streams.items() if name[:2] == stream[:2])
        folder = known.folder or next(filter(None, others), Folder.FROM)
        paths = (delta_path(known.moniker or stream[2], old, known.newest, folder) for old in recent)
        return Announced(known.newest, known.announced_at, tuple(paths))

    def to_json(self) -> list[Any]:
        return [known.model_dump() for known in self.streams.values()]

    def restore(self, rows: Any) -> None:
        """Restore the output of `to_json`. Malformed rows are skipped; newer ones stay."""
        newer = dict(self.streams)
        for stored in _readable(_Known, rows):
            self.streams[stored.stream] = stored
        for stream, new in newer.items():
            if (old := self.streams.met(stream)) is new:
                continue
            for revision, at in new.seen.items():
                old.see(revision, at)
            old.moniker, old.folder = new.moniker or old.moniker, new.folder or old.folder
            if new.newest > old.newest:
                old.newest, old.announced_at = new.newest, new.announced_at


LANES = (frozenset({Kind.DELTA, Kind.INDEX}), frozenset({Kind.FULL, Kind.OTHER}))
"""Kinds of each prefetch queue, fetched one after the other: a full that takes hours delays no delta."""
_IDLE_LOOK_SECONDS = 0.1
_LOOK_SECONDS = 5.0
"""Between two checks for a retry that is due."""
_REVISIONS_NOTE = "revisions"
_QUEUE_NOTE = "wishes"


class NotThereError(ValueError):
    """An operator ordered a path that is not content, or that no upstream can have."""


class Busy(GupError):  # noqa: N818 - what is told, not our error
    """The prefetch queue is full."""


class Prefetcher:
    """Called with clients' requests; one `run` for each lane is a job. Everything is on the event loop."""

    def __init__(self, dependencies: ControlDependencies, index: Index, clock: Callable[[], float]) -> None:
        self._dependencies = dependencies
        self._index = index
        self._settings = dependencies.settings
        self._clock = clock
        self._news = [asyncio.Event() for _ in LANES]
        self.revisions = Revisions()
        self.queue = PrefetchQueue()
        self.left_out: dict[Stream, str] = {}
        self._with_news: set[Stream] = set()

    # --- requests of clients

    def asked(self, key: ContentKey, upstream_path: str = "") -> None:
        """A client was sent this, or it has begun to arrive for one; `look_at_news` is to follow."""
        names = named(key)
        if names is None:
            return
        if self.revisions.learn(stream_of(key), names, self._clock(), spelled_moniker(upstream_path)):
            self._with_news.add(stream_of(key))

    def look_at_news(self) -> None:
        """Queue the deltas of streams that `asked` learned something new about."""
        for stream in self._with_news:
            if stream in self.revisions.streams:  # else others that came at the same time have displaced it
                self._look_at(stream)
        self._with_news.clear()

    def refused(self, key: ContentKey) -> None:
        if (names := named(key)) is not None:
            self.revisions.refused(stream_of(key), names, self._clock())

    async def look_over(self) -> None:
        """Check every stream again: what was unknown, or not allowed, may have changed."""
        for stream in list(self.revisions.streams):
            self._look_at(stream)

    def _look_at(self, stream: Stream) -> None:
        settings, now = self._settings().prefetch, self._clock()
        if not (settings.enabled and settings.max):
            return
        newest = self.revisions.announced(stream, now, within_seconds=settings.seen_within, most=settings.max)
        self.queue.supersede(stream, newest.revision, now)
        if now - newest.at > settings.seen_within or not newest.paths:
            return
        why_not, name = self._why_not(stream), "/".join(stream)
        if why_not is not None:
            if self.left_out.get(stream) != why_not:
                self.left_out[stream] = why_not
                _log.info("nothing of %s is prefetched: %s", name, why_not)
            return
        self.left_out.pop(stream, None)
        fresh = 0
        for path in newest.paths:
            route = self.route(path)
            key = route.key(Variant(*stream[:2]))
            if self.queue.rows.get(key) is None and key.text not in self._index.rows:
                fresh += self._add(route, key, "traffic")
        if fresh:
            _log.info(
                "clients ask for %s of %s: %d deltas to it are prefetched", newest.revision, name, fresh
            )

    def _why_not(self, stream: Stream) -> str | None:
        settings = self._settings()
        label = self._dependencies.label_of(stream, "")
        if label is None and settings.prefetch.unlisted == "skip":
            return 'no catalogue lists it, so it may be client patches; prefetch.unlisted = "fetch" allows it'
        type_ = OTHER if label is None else label.type
        if type_ == CLIENT_PATCHES:
            return "client patches are fetched when a client asks for them"
        if settings.rules.content_types and type_ not in settings.rules.content_types:
            return f"rules.content_types has no {type_}"
        return None

    # --- orders of operators

    def order(self, path: str, version: str | None, language: str | None) -> list[QueuedFetch]:
        """Queue `path` for all matching variants; ValueError when it is wrong, Busy for a full queue."""
        try:
            if parse_target(path.encode()).authority is not None:
                raise ValueError("path: it must begin with /content/, without the server")
            route = self.route(path)
        except Problem as problem:
            kind = NotThereError if problem.status == 404 else ValueError
            raise kind(f"path: {path!r:.200} can't be fetched: {problem.detail}") from problem
        variants = self._variants(route.stream, version, language)
        keys = list(dict.fromkeys(route.key(variant) for variant in variants))
        return [self._queue_for_operator(route, key) for key in keys]

    def order_newest(self, revisions: Mapping[Stream, str]) -> list[QueuedFetch]:
        """Queue the full package of these revisions."""
        queued = []
        for stream, revision in revisions.items():
            known = self.revisions.streams.get(stream)
            moniker = known.moniker if known is not None and known.moniker else stream[2]
            route = self.route(f"/content/{moniker}/{revision}/full.zip")
            queued.append(self._queue_for_operator(route, route.key(Variant(*stream[:2]))))
        return queued

    def take_order(self, wanted: object) -> None:
        """Queue what an operator has ordered at another node; GupError for what can't be fetched here."""
        for row in wanted if isinstance(wanted, list) else ():
            route, key = self.route(str(row["path"])), ContentKey.parse(row["key"])
            if key not in route.keys(key.variant):
                raise InvalidError(f"{route.upstream_path} does not lead to {key.text}")
            self._queue_for_operator(route, key)

    def _queue_for_operator(self, route: Route, key: ContentKey) -> QueuedFetch:
        item = self.queue.rows.get(key)
        if item is not None and item.pending:
            item.by = "operator"
        elif not self._add(route, key, "operator"):
            raise Busy(f"{MAX_PENDING} fetches are queued already; try again later")
        return self.queue.rows[key]

    def _variants(self, stream: str, version: str | None, language: str | None) -> list[Variant]:
        """The variants under which content of upstreams of this version and language is stored."""
        every = self._dependencies.places(stream)
        found = [
            stored
            for own, stored in every
            if (version or own.version).casefold() == own.version.casefold()
            and (language or own.language).casefold() == own.language.casefold()
        ]
        if not found:
            there_is = "; ".join(f"{own.version!r} and {own.language!r}" for own, _ in every) or "none"
            wanted = " and ".join(repr(part) for part in (version, language) if part is not None)
            raise NotThereError(f"version, language: no upstream has {wanted}; there is {there_is}")
        return found

    def route(self, path: str) -> Route:
        routes = Routes.of(self._settings().upstream)
        return routes.route(parse_target(path.encode()).path)

    def _add(self, route: Route, key: ContentKey, by: Literal["traffic", "operator"]) -> bool:
        item = QueuedFetch(key=key, path=route.upstream_path, kind=route.kind, by=by, asked_at=self._clock())
        if not self.queue.add(item):
            return False
        for kinds, news in zip(LANES, self._news, strict=True):
            if route.kind in kinds:
                news.set()
        return True

    # --- fetching

    async def run(self, lane: int) -> None:
        while True:
            self._news[lane].clear()
            item = self.queue.due(LANES[lane], self._clock(), self._may_begin)
            if item is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._news[lane].wait()
            elif self._dependencies.link_idle() or item.key.text in self._index.rows or self._is_urgent(item):
                await self._one(item)
            else:
                await asyncio.sleep(_IDLE_LOOK_SECONDS)

    def look_soon(self) -> None:
        """What may begin has changed."""
        for news in self._news:
            news.set()

    def _may_begin(self, item: QueuedFetch) -> bool:
        """Whether the WAN's budget lets it begin; that it does not is noted and counted once."""
        gate = self._dependencies.gate
        held = gate.holds("background") and gate.is_held(self.route(item.path), background=True)
        if held and item.detail != HELD_BACK:
            item.detail, self.queue.changed = HELD_BACK, True
            gate.count_held("background")
        return not held

    def _is_urgent(self, item: QueuedFetch) -> bool:
        """Definitions in an outbreak do not wait until the link is idle."""
        gate = self._dependencies.gate
        return gate.outbreak and gate.frees(self.route(item.path))

    async def _one(self, item: QueuedFetch) -> None:
        settings = self._settings().prefetch
        if item.by == "traffic" and not (settings.enabled and settings.max):
            self.queue.move(item, Outcome.SUPERSEDED, self._clock(), "prefetch.enabled was set to false")
            return
        self.queue.move(item, Outcome.FETCHING, self._clock())
        item.tries += 1
        try:
            urgent = {"urgent": True} if self._is_urgent(item) else {}
            route = self.route(item.path)
            fetched = await self._dependencies.fetch_ahead(route, item.key.variant, **urgent)
            outcome, detail = Outcome.STORED if fetched else Outcome.PRESENT, ""
        except Problem as problem:
            detail = problem.detail
            if problem.slug == BUDGET:
                outcome, detail, item.tries = Outcome.QUEUED, HELD_BACK, item.tries - 1
                item.due_at = self._clock() + _LOOK_SECONDS  # another node may know of a larger use
            elif problem.status in (404, 410):
                outcome = Outcome.ABSENT
            elif item.tries < _TRIES:
                outcome = Outcome.QUEUED
                item.due_at = self._clock() + _FIRST_RETRY_SECONDS * 2 ** (item.tries - 1)
            else:
                outcome = Outcome.FAILED
                _log.warning("%s could not be prefetched: %s", item.key.text, detail)
        self.queue.move(item, outcome, self._clock(), detail)

    # --- saved over a restart

    def save(self, *, all_: bool = False) -> None:
        """Save what is new since the last time; `all_`: also when known revisions were named again."""
        if self.revisions.changed or all_:
            self.revisions.changed = False
            self._index.notes[_REVISIONS_NOTE] = self.revisions.to_json()
        if self.queue.changed:
            self.queue.changed = False
            self._index.notes[_QUEUE_NOTE] = self.queue.to_json()

    def restore(self) -> None:
        """Restore what was saved, whatever it is; after the index was opened."""
        self.revisions.restore(self._index.notes.get(_REVISIONS_NOTE))
        self.queue.restore(self._index.notes.get(_QUEUE_NOTE))
        for news in self._news:
            news.set()
