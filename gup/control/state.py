"""The control state: takes events in, and gathers what pages and metrics show."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from gup.cache.store import Part
from gup.config import Settings
from gup.content.key import ContentKey
from gup.control.alarms import AlarmBoard, Rejections
from gup.control.api.schemas import FailedFill, WriteRefusal
from gup.control.dependencies import ControlDependencies
from gup.control.events import (
    Begun,
    Committed,
    Event,
    Failed,
    Need,
    Rejected,
    Taken,
    Unlisted,
    Unstorable,
    UpstreamTrouble,
    Usage,
    parse_event,
    receive,
)
from gup.control.eviction import AgeClock, Evictor
from gup.control.exposition import Figures
from gup.control.index import Index, Stream, make_row, stream_of
from gup.control.integrity_jobs import Scrubber, Verification
from gup.control.prefetch import Prefetcher
from gup.control.rate_window import RateWindow
from gup.control.reconcile import change
from gup.control.stats.client_records import ClientWindows
from gup.control.stats.database import StatsDatabase
from gup.control.stats.history import Recorder
from gup.control.stats.usage_reports import Reports
from gup.control.traffic import Traffic, newest_times

_log = logging.getLogger("gup.control.state")


class Refusals:
    """What the disk refuses to store at present; each is logged once when it begins and when it ends."""

    def __init__(self) -> None:
        self.rows: dict[str, WriteRefusal] = {}

    def note(self, what: str, refusal: str | None, now: float) -> None:
        """The result of a write: why it was refused, None for success."""
        if refusal is None:
            self.clear(what)
        else:
            self.tell(what, refusal, now)

    def tell(self, what: str, detail: str, now: float) -> None:
        """A write was refused."""
        known = self.rows.get(what)
        if known is None:
            _log.warning("not written: %s: %s", what, detail)
        since = now if known is None else known.since
        self.rows[what] = WriteRefusal(what=what, detail=detail, since=since, last=now)

    def clear(self, what: str) -> None:
        """A write succeeded."""
        if self.rows.pop(what, None) is not None:
            _log.warning("written again: %s", what)


def sum_of(totals: Mapping[str, int], metric: str) -> int:
    """The sum of all series of a metric."""
    return sum(count for name, count in totals.items() if name.partition("{")[0] == metric)


def numbers(settings: Settings) -> dict[str, int]:
    """The limits on numbers of things; those that are off are absent."""
    every = {
        "connections": settings.listen.max_connections,
        "connections_per_address": settings.clients.max_connections_per_address,
        "downloads": settings.clients.max_downloads,
        "fills": settings.fill.max,
    }
    found = {name: limit for name, limit in every.items() if limit}
    # without a limit on downloads nobody ever waits; with one, a queue of 0 is a limit too
    return found | ({"queue": settings.clients.queue} if settings.clients.max_downloads else {})


_RATE_SECONDS = 5.0
"""The window of a fill's rate."""


class FillRates:
    """The rates of the present fills, by part and generation."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._rates: dict[tuple[str, int], RateWindow] = {}

    def see(self, parts: Iterable[Part]) -> None:
        """Take in the sizes of the present fills' parts."""
        known, self._rates = self._rates, {}
        for part in parts:
            rate = known.get((part.id, part.generation)) or RateWindow(_RATE_SECONDS)
            rate.see(part.size_bytes, self._monotonic())
            self._rates[part.id, part.generation] = rate

    def rate(self, part: Part, age_seconds: float) -> float | None:
        """Over the last seconds, or since the beginning when seen once only; None when it just began."""
        rate = self._rates[part.id, part.generation].per_second()
        return part.size_bytes / age_seconds if rate is None and age_seconds > 0 else rate


_FAILURES = 50
_MALFORMED_LOGGED = 20


class ControlState:
    """Everything the controller knows. Only `take_events` and the API change it, on the event loop."""

    def __init__(
        self, dependencies: ControlDependencies, clock: Callable[[], float], ages: AgeClock | None = None
    ) -> None:
        self.dependencies = dependencies
        self.settings: Settings = dependencies.settings  # replaced by a reload only
        self.clock = clock
        self._ages = ages
        self.refusals = Refusals()
        self.index = Index(dependencies.store.index, self._index_damaged, self._index_written)
        self.evictor = Evictor(
            dependencies.store,
            dependencies.claims,
            dependencies.counters,
            self.index,
            dependencies.settings.cache,
            raise_store_epoch=dependencies.raise_store_epoch,
            set_store_bytes=dependencies.set_store_bytes,
            promised_bytes=dependencies.promised_bytes,
            now=self._age_now,
            drop_memory=dependencies.drop_memory,
        )
        self.verification = Verification(dependencies, self.index)
        self.scrubber = Scrubber(dependencies, self.index, lambda: self.settings.cache, clock)
        self.clients = ClientWindows()
        self.prefetcher = Prefetcher(
            settings=lambda: self.settings,
            fetch=dependencies.fetch_ahead,
            idle=dependencies.link_idle,
            type_of=self.type_of,
            places=dependencies.places,
            holds=self.index.rows.__contains__,
            clock=clock,
        )
        self.traffic = Traffic(self.prefetcher, self.index, clock)
        self.alarms = AlarmBoard()
        self.database = StatsDatabase(dependencies.store.root)
        self.reports = Reports(
            dependencies,
            self.database,
            settings=lambda: self.settings,
            clock=clock,
            age_clock=self._believed,
            held=self.index.newest_held,
            on_written=lambda refusal: self.refusals.note("reports", refusal, self.clock()),
        )
        self.history = Recorder(
            dependencies,
            self.database,
            lambda: self.settings,
            clock,
            lambda refusal: self.refusals.note("savings", refusal, self.clock()),
        )
        self.fill_rates = FillRates()
        self.failures: deque[FailedFill] = deque(maxlen=_FAILURES)
        self.rejections = Rejections()
        self.upstream_errors: dict[str, tuple[float, str]] = {}
        """Time and text of each configured upstream's last error."""
        self.unstored: tuple[float, str] | None = None
        """When a limit of the settings last kept a body from being stored, and which."""
        self.malformed_events = 0
        self.touches: dict[str, float] = {}
        self.repin: set[str] = set()

    def _believed(self) -> float:
        """The time that ages are measured from: a use in the future would make all else look old."""
        return self._ages() if self._ages is not None else self.clock()

    def _age_now(self, uses: Iterable[float]) -> float:
        if self._ages is not None:
            self._ages.begin(uses)
        return self._believed()

    def _index_damaged(self) -> None:
        self.dependencies.counters.add("gup_integrity_failures_total", where="index")

    def _index_written(self, refusal: str | None) -> None:
        self.refusals.note("index", refusal, self.clock())

    # --- events

    def take_events(self) -> None:
        """Apply the events that are waiting; malformed ones are counted and ignored."""
        for datagram in receive(self.dependencies.events):
            self.take_event(datagram)

    def take_event(self, datagram: bytes) -> None:
        try:
            event = parse_event(datagram)
        except ValueError as error:
            self.malformed_events += 1
            if self.malformed_events <= _MALFORMED_LOGGED:
                _log.warning("malformed event: %s", error)
        else:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Committed():
                self._committed(event)
            case Usage():
                self._used(event)
            case Taken():
                self.clients.see({take.client for take in event.rows}, self.clock())
                self.reports.take(event)
            case Begun():
                self.prefetcher.asked(event.key, event.path)
            case Need():
                self.evictor.need(event.bytes, refused=event.refused)
            case Unstorable():
                self._not_stored(event)
            case Failed():
                self.failures.appendleft(
                    FailedFill(
                        at=self.clock(), key=event.key.text, problem=event.problem, detail=event.detail
                    )
                )
                self.traffic.missed(event.key)
            case Unlisted():
                self.dependencies.unlisted(event.moniker)
            case UpstreamTrouble() | Rejected():
                self._troubled(event)

    def _not_stored(self, event: Unstorable) -> None:
        if event.disk:
            self.refusals.tell("content", event.detail, self.clock())
        else:
            self.unstored = self.clock(), f"{event.key.text}: {event.detail}"

    def _troubled(self, event: UpstreamTrouble | Rejected) -> None:
        if isinstance(event, Rejected):
            self.rejections.note(event, self.clock())
        elif any(upstream.name == event.name for upstream in self.settings.upstream):
            self.upstream_errors[event.name] = (self.clock(), event.detail)

    def _committed(self, event: Committed) -> None:
        self.refusals.clear("content")
        self.rejections.clear(event.key.text)
        known = self.index.rows.get(event.key.text)
        if known is not None and known.pinned and event.replaced:
            self.repin.add(event.key.text)  # the new generation's record knows of no pin
        self.index.put(
            make_row(
                event.key,
                event.kind,
                event.length,
                stored_at=self.clock(),
                used_at=self._believed(),
                hits=known.hits if known else 0,
                pinned=known.pinned if known else False,
                sent_bytes=known.sent_bytes if known else 0,
                received_bytes=event.length + (known.received_bytes if known else 0),
            )
        )
        self.evictor.look_soon()

    def _used(self, event: Usage) -> None:
        """Uses of unknown keys are ignored: the event of their commit was lost."""
        at = min(event.at, self._believed())  # a clock that ran ahead must not keep an entry for ever
        for use in event.uses:
            row = self.index.rows.get(use.key.text)
            if row is None:
                continue
            self.index.put(row.used(use.times, use.sent_bytes, at))
            self.touches[row.key] = max(at, self.touches.get(row.key, 0.0))
            self.traffic.sent(use.key, use.times)
        for use in event.asked:
            self.traffic.sent(use.key, use.times)
        for full in event.fulls:
            self.traffic.storms.note_client(stream_of(full.key), full.client, full.times, self.clock())
        if event.clients:
            self.clients.see(event.clients, self.clock())
            self.reports.see(event.clients)

    async def set_pinned(self, key: ContentKey, *, pinned: bool) -> bool:
        """Pin or unpin an entry; False when there is none. BusyError while its claim is held."""
        store = self.dependencies.store
        if not await change(self.dependencies.claims, key, lambda: store.set_pinned(key, pinned)):
            return False
        row = self.index.rows.get(key.text)  # looked up after the wait: it may have changed meanwhile
        if row is not None:
            self.index.put(replace(row, pinned=pinned))
        return True

    async def meter(self) -> None:
        """Take in the counters for rates; to be called once a second."""
        self.history.look(self.index.total_bytes)

    # --- what is shown

    def label(self, stream: Stream) -> tuple[str, str]:
        """Product and language of a stream: from the catalogue, else moniker and variant."""
        return self.dependencies.product_of(stream) or (stream[2], stream[1])

    def type_of(self, stream: Stream) -> str | None:
        """The type of a stream's content; None while no catalogue lists it."""
        label = self.dependencies.label_of(stream, "")
        return None if label is None else label.type

    def not_ready(self) -> list[str]:
        """Why content can't be served yet; empty when it can."""
        reasons = []
        if not self.index.opened:
            reasons.append("the index is being opened")
        if not any(worker.get("ready") for worker in self.dependencies.workers()):
            reasons.append("no worker is ready")
        return reasons

    async def figures(self) -> Figures:
        """Everything for `/metrics`."""
        disk = await self.evictor.measure()
        now = self.clock()
        storms: dict[tuple[str, str], bool] = {}
        self.traffic.look()
        for stream, storm in self.traffic.storms.flags().items():
            storms[self.label(stream)] = storm or storms.get(self.label(stream), False)
        return Figures(
            totals=self.dependencies.totals(),
            upstreams=[upstream.name for upstream in self.settings.upstream],
            stream_names=self.dependencies.stream_names(),
            product_of=self.dependencies.product_of,
            entries=len(self.index.rows),
            size_bytes=disk.size_bytes,
            limit_bytes=self.settings.cache.max_size,
            free_bytes=disk.free_bytes,
            clients_seen=self.clients.counts(now),
            upstreams_up=self.dependencies.upstreams_up(),
            wan_bytes_per_second=self.dependencies.wan_rate(),
            client_bytes_per_second=self.settings.clients.rate,
            limits=numbers(self.settings),
            newest=newest_times(self.index.newest_held(), self.traffic.demand.newest(), self.label),
            storms=storms,
            config_ok=self.dependencies.config_ok(),
            site=self.settings.site.name,
            started_at=self.dependencies.started_at,
        )
