"""The control state: applies events, and provides what pages and metrics show."""

import contextlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from gup.cache.purges import Selection
from gup.cache.store import Part
from gup.cluster.orders import Order
from gup.config import Settings
from gup.content.key import ContentKey
from gup.control.api.schemas import Alarm, FailedFill, KeyNote, WriteRefusal
from gup.control.budget_keeper import BudgetKeeper
from gup.control.dependencies import PATIENCE_SECONDS, BusyError, ControlDependencies, change
from gup.control.entry_table import Stream, make_row
from gup.control.events import (
    MAX_DATAGRAM_BYTES,
    Ask,
    Begun,
    Committed,
    Ended,
    Event,
    Failed,
    Need,
    NewRevision,
    Ordered,
    Rejected,
    Slow,
    Taken,
    UnderWay,
    Unlisted,
    Unstorable,
    UpstreamTrouble,
    Usage,
    parse_event,
)
from gup.control.eviction import JUMP_SECONDS, AgeClock, Evictor
from gup.control.hold_keeper import HoldKeeper
from gup.control.index import Index
from gup.control.integrity_jobs import Scrubber, Verification
from gup.control.notifications import Notifications
from gup.control.outbreak import OutbreakKeeper
from gup.control.prefetch import Prefetcher
from gup.control.size_curve import Sizing
from gup.control.stats.client_records import ClientWindows, Reports
from gup.control.stats.database import StatsDatabase
from gup.control.stats.demand import DemandRecord
from gup.control.stats.doctor import Doctor
from gup.control.stats.history import RateWindow, Recorder
from gup.control.stats.incidents import Incidents
from gup.control.stats.timings import Timings
from gup.control.traffic import Traffic
from gup.jsonmodel import InvalidError
from gup.metrics import MAX_STREAMS

_log = logging.getLogger("gup.control.state")


Label = tuple[str, str]
OTHER: Label = ("other", "other")


class Rejection(NamedTuple):
    """A body from an upstream that can't be the requested content."""

    key: str
    upstream: str
    detail: str
    at: float


class Refusals:
    """Present disk errors; each is logged once when it begins and when it ends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.rows: dict[str, WriteRefusal] = {}

    def note(self, what: str, refusal: str | None) -> None:
        """The result of a write: the error, None for success."""
        if refusal is None and what not in self.rows:
            return
        known, now = self.rows.pop(what, None), self._clock()
        if refusal is not None:
            since = now if known is None else known.since
            self.rows[what] = WriteRefusal(what=what, detail=refusal, since=since, last=now)
            if known is None:
                _log.warning("not written: %s: %s", what, refusal)
        elif known is not None:
            _log.warning("written again: %s", what)


def numbers(settings: Settings) -> dict[str, int]:
    every = {
        "connections": settings.listen.max_connections,
        "connections_per_address": settings.clients.max_connections_per_address,
        "downloads": settings.clients.max_downloads,
        "fills": settings.fill.max,
    }
    found = {name: limit for name, limit in every.items() if limit}
    # without a limit on downloads nothing is queued; with one, a queue of 0 is a limit too
    return found | ({"queue": settings.clients.queue} if settings.clients.max_downloads else {})


_RATE_SECONDS = 5.0
"""The window of a fill's rate."""


class FillRates:
    """The rates of the present fills, by part and generation."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._rates: dict[tuple[str, int], RateWindow] = {}

    def of(self, parts: Iterable[Part], now: float) -> list[float | None]:
        """Over the last seconds, since the beginning when seen once only; None when it just began."""
        known, self._rates = self._rates, {}
        found = []
        for part in parts:
            at = part.id, part.generation
            window = self._rates[at] = known.get(at) or RateWindow(_RATE_SECONDS)
            window.see(part.size_bytes, self._monotonic())
            rate, age_seconds = window.per_second(), now - began_at(part)
            found.append(part.size_bytes / age_seconds if rate is None and age_seconds > 0 else rate)
        return found


def began_at(part: Part) -> float:
    """A generation is the time at which its fill began, in nanoseconds."""
    return part.generation / 1e9


_MOST_NOTES = 5000


class KeyNotes:
    """What is known of single keys since the start, by key and kind of note; the longest unchanged go."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, dict[str, Mapping[str, object]]] = OrderedDict()

    def note(
        self, key: str, what: Literal["fetched", "failed", "unstored", "removed"], **note: object
    ) -> None:
        """`note` has the members of a KeyNote."""
        row = self._rows[key] = self._rows.pop(key, {}) | {what: note}
        if what == "fetched":
            row.pop("removed", None)
            row.pop("unstored", None)
        if len(self._rows) > _MOST_NOTES:
            self._rows.popitem(last=False)

    def of(self, key: str) -> Mapping[str, KeyNote]:
        return {what: KeyNote.model_validate(note) for what, note in self._rows.get(key, {}).items()}


_FAILURES = 50
_PREFETCH_WITHIN_SECONDS = 86400.0
"""A node that was off for longer does not fetch what was to be prefetched then."""
_MALFORMED_LOGGED = 20
_EVENTS_AT_ONCE = 256
_MOST_REJECTIONS = 1000
REJECTED_SECONDS = 1800.0
"""Twice the longest back-off of a rejected body: by then clients no longer request it."""


class ControlState:
    """The controller's state. Only `take` and the API change it, on the event loop."""

    def __init__(
        self, dependencies: ControlDependencies, clock: Callable[[], float], ages: AgeClock | None = None
    ) -> None:
        self.dependencies = dependencies
        self.clock = clock
        self._ages = ages
        self._age_clock = ages or clock
        """A use in the future would make all else look old."""
        self.refusals = Refusals(clock)
        damaged = partial(dependencies.counters.add, "gup_integrity_failures_total", where="index")
        self.index = Index(dependencies.store.index, damaged, partial(self.refusals.note, "index"))
        self.notes = KeyNotes()
        self.evictor = Evictor(dependencies, self.index, self._age_now, self._removed)
        self.verification = Verification(dependencies, self.index)
        self.scrubber = Scrubber(dependencies, self.index, clock)
        self.clients = ClientWindows()
        self.prefetcher = Prefetcher(dependencies, self.index, clock)
        refused = partial(self.refusals.note, "holds")
        self.holds = HoldKeeper(dependencies, self.index.rows, self.prefetcher.route, clock, refused)
        self.budget = BudgetKeeper(dependencies, clock, partial(self.refusals.note, "budget"))
        if dependencies.cluster is not None:
            dependencies.cluster.budget = self.budget
        self.outbreak = OutbreakKeeper(dependencies, clock, partial(self.refusals.note, "outbreak"))
        self.outbreak.on_change = self.budget.on_change = self.prefetcher.look_soon
        self.traffic = Traffic(self.index.rows, clock)
        self.alarms: list[Alarm] = []
        """As last found by the alarm collector."""
        self.notifications = Notifications(dependencies, clock, partial(self.refusals.note, "alarms"))
        self.database = StatsDatabase(dependencies.store.root, self.refusals.note)
        held = self.index.rows.newest_held
        self.reports = Reports(dependencies, self.database, clock, self._age_clock, held)
        self.incidents = Incidents(self.database, clock)
        self.history = Recorder(dependencies, self.database, clock)
        self.doctor = Doctor(
            self.database,
            clock,
            lambda: self.reports.mode,
            self.reports.write_clients,
            self.label,
            lambda: self.holds.kept_back,
        )
        self.timings = Timings(
            self.database,
            self.reports,
            dependencies.counters,
            clock,
            lambda: self.settings.reports.slow,
        )
        self.demand = DemandRecord(dependencies, self.index.rows, self._age_clock, self.refusals.note)
        self.sizing = Sizing(dependencies, self.demand, self.evictor.measure, self._age_clock)
        self.fill_rates = FillRates()
        self.failures: deque[FailedFill] = deque(maxlen=_FAILURES)
        self._rejections: OrderedDict[tuple[str, str], Rejection] = OrderedDict()
        """The latest ones by key and upstream."""
        self.upstream_errors: dict[str, tuple[float, str]] = {}
        """Time and text of each configured upstream's last error."""
        self.unstored: tuple[float, str] | None = None
        """When a limit of the settings last kept a body from being stored, and which."""
        self.malformed_events = 0
        self._has_grown = False
        """A body was committed since the evictor was told so."""
        self.touches: dict[str, float] = {}
        self.repin: set[str] = set()

    @property
    def settings(self) -> Settings:
        return self.dependencies.settings()

    def _age_now(self) -> float:
        if self._ages is not None:
            self._ages.begin(self.index.rows.last_use_before)
        return self._age_clock()

    # --- events

    def take_events(self) -> bool:
        """Apply waiting events, a limited number before the loop gets its turn; whether more may wait."""
        datagrams: list[bytes] = []
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while len(datagrams) < _EVENTS_AT_ONCE:
                datagrams.append(self.dependencies.events.recv(MAX_DATAGRAM_BYTES))
        self.take(datagrams)
        return len(datagrams) == _EVENTS_AT_ONCE and datagrams[-1] != b""  # else the supervisor is gone

    def take(self, datagrams: Iterable[bytes]) -> None:
        """Apply events, then what follows from all of them. A malformed one is counted and ignored."""
        for datagram in datagrams:
            try:
                self._take(parse_event(datagram))
            except InvalidError as error:
                self.malformed_events += 1
                if self.malformed_events <= _MALFORMED_LOGGED:
                    _log.warning("malformed event: %s", error)
        self.prefetcher.look_at_news()
        if self._has_grown:
            self._has_grown = False
            self.evictor.look_soon()

    def _take(self, event: Event) -> None:  # noqa: C901, PLR0912 - a case for each event
        now = self.clock()
        match event:
            case Committed():
                self._committed(event, now)
                self.timings.fill_ended(event)
            case Ended():
                self.timings.fill_ended(event)
            case Slow():
                self.timings.requests_ended(event)
            case UnderWay():
                self.timings.is_under_way(event)
            case Usage():
                self._used(event, now)
            case Taken():
                self.clients.see({take.client for take in event.rows}, now)
                self.reports.take(event)
                self.demand.taken(event.rows)
            case Begun():
                self.prefetcher.asked(event.key, event.path)
            case Need():
                self.evictor.need(event.bytes, refused=event.refused)
            case Unstorable(disk=True):
                self.refusals.note("content", event.detail)
                self.demand.unstorable(event.key, event.length)
            case Unstorable():
                self.demand.unstorable(event.key, event.length)
                self.notes.note(event.key.text, "unstored", at=now, detail=event.detail)
                self.unstored = now, f"{event.key.text}: {event.detail}"
            case Failed(key=key, problem=problem, detail=detail):
                self.failures.appendleft(FailedFill(at=now, key=key.text, problem=problem, detail=detail))
                self.notes.note(key.text, "failed", at=now, detail=f"{problem}: {detail}")
                self.traffic.missed(key)
                self.prefetcher.refused(key)
                self.timings.fill_ended(event)
                self.demand.failed(key)
            case Ordered():
                if self.dependencies.cluster is not None:
                    self.dependencies.cluster.hear_of_orders(event.member)
            case Unlisted():
                self.dependencies.unlisted(event.moniker)
            case NewRevision():
                self.holds.asked_for_new(event.key, event.path)
            case UpstreamTrouble():
                if any(upstream.name == event.name for upstream in self.settings.upstream):
                    self.upstream_errors[event.name] = now, event.detail
            case Rejected(key=key, upstream=upstream, detail=detail):
                self._rejections[key.text, upstream] = Rejection(key.text, upstream, detail, now)
                self._rejections.move_to_end((key.text, upstream))
                if len(self._rejections) > _MOST_REJECTIONS:
                    self._rejections.popitem(last=False)

    def _committed(self, event: Committed, now: float) -> None:
        self.refusals.note("content", None)
        fetched = {"upstream": event.upstream, "resumes": event.resumes, "seconds": event.seconds}
        self.notes.note(event.key.text, "fetched", at=now, detail="", **fetched)
        if event.path:
            self.prefetcher.asked(event.key, event.path)
        for at in [at for at in self._rejections if at[0] == event.key.text]:
            del self._rejections[at]
        more: dict[str, Any] = {"received_bytes": event.length if event.received is None else event.received}
        known = self.index.rows.get(event.key.text)
        self.demand.committed(event, known)
        if known is not None:
            more["received_bytes"] += known.received_bytes
            more |= {"hits": known.hits, "pinned": known.pinned, "sent_bytes": known.sent_bytes}
            if known.pinned and event.replaced:
                self.repin.add(known.key)  # the new generation's record has no pin
        times = {"stored_at": now, "used_at": self._age_clock()}
        self.index.put(make_row(event.key, event.kind, event.length, **times, **more))
        self._has_grown = True
        self.holds.saw(event.key)
        self.evictor.note_committed(event.key)
        book = self.dependencies.book
        if book is not None and book.log.is_pinned(event.key.text):
            self.repin.add(event.key.text)

    def _used(self, event: Usage, now: float) -> None:
        """Uses of unknown keys are ignored: the event of their commit was lost."""
        at = min(event.at, self._age_clock())  # a clock that ran ahead must not keep an entry for ever
        asked = deque(event.asked)
        for number, use in enumerate(event.uses):
            while asked and asked[0].after <= number:
                self._asked(asked.popleft())
            row = self.index.rows.get(use.key.text)
            self.demand.used(use.key, use.times, row)
            if row is not None:
                if row.used_at > at + JUMP_SECONDS and at >= self.dependencies.installed_at:
                    row = replace(row, used_at=at)  # noted by a clock that was ahead and has been put back
                self.index.put(row.used(use.times, use.sent_bytes, at))
                self.touches[row.key] = max(at, self.touches.get(row.key, 0.0))
                self._sent(use.key, use.times)
        for ask in asked:
            self._asked(ask)
        for full in event.fulls:
            self.traffic.note_client(full.key, full.client, full.times)
        self.demand.fulls(max(Counter(full.client for full in event.fulls).values(), default=0))
        self.demand.refused(event.refused)
        self.demand.grouped(event.groups)
        if event.clients:
            self.clients.see(event.clients, now)
        if event.clients or event.refused:
            self.reports.note(event)

    def _asked(self, ask: Ask) -> None:
        self.demand.asked(ask.key, ask.times)
        self._sent(ask.key, ask.times)

    def _sent(self, key: ContentKey, times: int) -> None:
        self.traffic.sent(key, times)
        self.prefetcher.asked(key)

    def _removed(self, key: str, reason: str) -> None:
        self.notes.note(key, "removed", at=self.clock(), detail=reason)
        if not reason.startswith("evicted"):
            self.demand.removed(key)

    async def set_pinned(
        self, key: ContentKey, *, pinned: bool, patience_seconds: float = PATIENCE_SECONDS
    ) -> bool:
        """False when there is none. BusyError while its claim is held."""
        claims, store = self.dependencies.claims, self.dependencies.store
        if not pinned:
            self.repin.discard(key.text)
        if not await change(claims, key, lambda: store.set_pinned(key, pinned), patience_seconds):
            return False
        row = self.index.rows.get(key.text)  # looked up after the wait: it may have changed meanwhile
        if row is not None:
            self.index.put(replace(row, pinned=pinned))
            self.demand.pinned(key.text, pinned=pinned)
        return True

    async def carry_out(self, order: Order) -> None:
        """What another member has ordered. Pins that can't be changed now are when their claim is free."""
        if order.action == "purge":
            await self.evictor.apply(Selection.of(order.what))
        if order.action == "prefetch" and self.clock() - order.at < _PREFETCH_WITHIN_SECONDS:
            self.prefetcher.take_order(order.what.get("wanted"))
        if order.action in ("outbreak", "outbreak-end"):
            await self.outbreak.keep()
        if order.action not in ("pin", "unpin"):
            return
        key, pinned = ContentKey.parse(str(order.what.get("key"))), order.action == "pin"
        try:
            await self.set_pinned(key, pinned=pinned)
        except BusyError:
            if pinned:
                self.repin.add(key.text)

    async def meter(self) -> None:
        """To be called once a second."""
        self.history.look(self.index.rows.total_bytes)
        totals = self.dependencies.totals()
        names = "gup_client_downloads_in_progress", "gup_client_downloads_queued"
        self.demand.meter(*(totals.get(name, 0) for name in names))

    # --- display

    def rejections(self) -> list[Rejection]:
        """The latest first: until the file is stored or not requested any more."""
        now = self.clock()
        return [row for row in reversed(self._rejections.values()) if abs(now - row.at) < REJECTED_SECONDS]

    def label(self, stream: Stream) -> Label:
        """From the catalogue, else moniker and variant."""
        listed = self.dependencies.label_of(stream, "")
        return (stream[2], stream[1]) if listed is None else (listed.product, listed.language)

    def slot_labels(self) -> list[Label]:
        """Product and language of each slot of the counters of streams; OTHER for those without a name."""
        named = [self.label(stream) for stream in self.dependencies.stream_names()[:MAX_STREAMS]]
        return named + [OTHER] * (MAX_STREAMS + 1 - len(named))

    def not_ready(self) -> list[str]:
        ready = any(worker.get("ready") for worker in self.dependencies.workers())
        reasons = {"the index is being opened": self.index.opened, "no worker is ready": ready}
        return [reason for reason, is_so in reasons.items() if not is_so]
