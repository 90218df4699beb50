"""What the page shows of the control state at one moment, as plain values for the templates."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import nlargest
from typing import Any, Generic, TypeVar
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from gup.content.key import ABSENT, Kind
from gup.control.api import statistics
from gup.control.api.schemas import Savings
from gup.control.api.status import status
from gup.control.index import Row, Stream
from gup.control.page.render import clock
from gup.control.state import ControlState
from gup.control.stats.history import HOUR, MINUTE, RECEIVED, SENT, Point, added
from gup.control.stats.savings import within

_T = TypeVar("_T")

_HELD_SECONDS = 5.0
"""How long a view of all rows is kept: with 1e5 of them it takes some 0.3 s of a thread."""
_REST_FACTOR = 10
_CHARTS_SECONDS = 5.0
_LEDGER_SECONDS = 2.0
_CLIENTS_SECONDS = 10.0
_DAYS = 30
_FAILURES_SHOWN = 10
_CHARTS = {"hour": (5 * MINUTE, "%H:%M"), "day": (HOUR, "%a %H:%M")}
"""Spans that are drawn: the length of the rows in the tables behind the charts, the form of their times."""
MAX_STREAMS = 40
MAX_REVISIONS = 10


class Kept(Generic[_T]):
    """The result of `find`, kept for some seconds, longer if it took long; concurrent callers share one."""

    def __init__(self, seconds: float, find: Callable[[], Awaitable[_T]]) -> None:
        self._seconds = seconds
        self._find = find
        self._found: tuple[float, _T] | None = None
        self._finding = asyncio.Lock()

    async def value(self) -> _T:
        async with self._finding:
            began = time.monotonic()
            if self._found is None or began > self._found[0]:
                found = await self._find()
                now = time.monotonic()
                self._found = now + max(self._seconds, _REST_FACTOR * (now - began)), found
            return self._found[1]


class Viewer:
    """Makes views of the control state; keeps parts that are expensive for some seconds."""

    def __init__(self, state: ControlState) -> None:
        self._state = state
        self._held = Kept(_HELD_SECONDS, self._holdings)
        self._charts = Kept(_CHARTS_SECONDS, self._drawn)
        self._ledger = Kept(
            _LEDGER_SECONDS, lambda: statistics.saved(state, statistics.Ledger.model_validate({}))
        )
        self._content = Kept(_CLIENTS_SECONDS, state.reports.content)
        self._restarts = Kept(_CLIENTS_SECONDS, state.reports.restarts)

    async def view(self) -> dict[str, Any]:
        """All that is shown, by the names that the templates use."""
        state = self._state
        await state.meter()
        now, name = state.clock(), state.settings.site.time_zone
        zone = ZoneInfo(name) if name else None  # the machine's own
        shown = await status(state)
        return {
            "now": now,
            "zone": zone,
            "status": shown,
            "not_ready": state.not_ready(),
            "saved": _within_a_month(await self._ledger.value(), clock(now, zone, "%Y-%m-%d")),
            "rates": {
                "clients": state.history.clients.bytes_per_second(),
                "wan": state.history.wan.bytes_per_second(),
                "wan_limit": shown.wan_rate_bytes_per_second,
            },
            "charts": await self._charts.value(),
            "held": await self._held.value(),
            "taken": await self._content.value(),
            "restarts": await self._restarts.value(),
            "failures": shown.failures[:_FAILURES_SHOWN],
        }

    async def _drawn(self) -> dict[str, Any]:
        history, now = self._state.history.history, self._state.clock()
        return {span: _chart(list(history.series(span, now)), *form) for span, form in _CHARTS.items()}

    async def _holdings(self) -> "Holdings":
        rows = list(self._state.index.rows.values())
        return await asyncio.to_thread(holdings, rows, self._label)

    def _label(self, stream: Stream) -> tuple[str, str, str]:
        """Product, version and language: the catalogue's words where it has any, else those of the key."""
        product, language = self._state.label(stream)
        label = self._state.dependencies.label_of(stream, "")
        version = label.version if label and stream[0] == "any" else stream[0]
        return product, version, "all languages" if language == "SymAllLanguages" else language


def figures(view: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures of a view that scripts take live, as `/api/v1/events` sends them."""
    status, saved, rates = view["status"], view["saved"], view["rates"]
    return {
        "at": view["now"],
        "ready": status.ready,
        "client_bytes_per_second": rates["clients"],
        "wan_bytes_per_second": rates["wan"],
        "wan_limit_bytes_per_second": rates["wan_limit"],
        "client_connections": status.clients.connections,
        "fills": len(status.fills),
        "fill_waiters": status.fill_waiters,
        "cache_size_bytes": status.cache.size_bytes,
        "saved_today_bytes": saved.today.saved_bytes,
        "saved_last_30_days_bytes": saved.last_30_days.saved_bytes,
        "saved_since_install_bytes": saved.since_install.saved_bytes,
    }


def _within_a_month(saved: Savings, today: str) -> Savings:
    """The savings with the days of the last thirty only, those on which anything was counted."""
    days = [day for day in saved.days if day.day is not None and within(day.day, today, _DAYS)]
    return saved.model_copy(update={"days": days})


# --- charts


def _chart(points: list[Point], step: int, form: str) -> dict[str, Any]:
    """What a chart tells in words: its sums, its highest rates, and a row for each `step` seconds."""
    buckets: dict[int, list[Point]] = {}
    for point in points:
        buckets.setdefault(point.at // step * step, []).append(point)
    return {
        **_row(points),
        "client_peak": max((point.client_peak for point in points), default=0),
        "wan_peak": max((point.wan_peak for point in points), default=0),
        "rows": [{"at": at, **_row(bucket)} for at, bucket in sorted(buckets.items(), reverse=True)],
        "form": form,
    }


def _row(points: list[Point]) -> dict[str, Any]:
    total, seconds = added(points), max(1.0, sum(point.covered_seconds for point in points))
    return {
        "sent_bytes": total[SENT],
        "received_bytes": total[RECEIVED],
        "client_rate": total[SENT] / seconds,
        "wan_rate": total[RECEIVED] / seconds,
    }


# --- what is held


@dataclass(frozen=True, slots=True)
class Revision:
    """The bodies of one revision together; `wholes` are not deltas. Times are Unix seconds."""

    name: str
    wholes: int
    deltas: int
    size_bytes: int
    hits: int
    stored_at: float
    used_at: float
    pinned: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A stream: the newest of its revisions, how many more there are, and sums over all of them."""

    product: str
    version: str
    language: str
    revisions: tuple[Revision, ...]
    more: int
    size_bytes: int
    hits: int

    @property
    def stored_at(self) -> float:
        """When the newest revision's last body came."""
        return self.revisions[0].stored_at


@dataclass(frozen=True, slots=True)
class Holdings:
    """The largest streams, and how many were left out."""

    streams: tuple[Held, ...]
    more: int


def holdings(rows: Iterable[Row], label: Callable[[Stream], tuple[str, str, str]]) -> Holdings:
    """The view of all rows; `label` gives a stream's product, version and language."""
    streams: dict[Stream, list[Row]] = {}
    for row in rows:
        streams.setdefault(row.stream_id, []).append(row)
    largest = nlargest(MAX_STREAMS, streams.items(), key=lambda item: _size(item[1]))
    held = [_held(*label(stream), rows_of) for stream, rows_of in largest]
    held.sort(key=lambda one: (one.product.casefold(), one.version, one.language))
    return Holdings(tuple(held), len(streams) - len(held))


def _size(rows: Iterable[Row]) -> int:
    return sum(row.length_bytes for row in rows)


def _held(product: str, version: str, language: str, rows: list[Row]) -> Held:
    by_revision: dict[str, list[Row]] = {}
    for row in rows:
        name = row.revision if row.revision != ABSENT else unquote(row.file)
        by_revision.setdefault(row.content_revision or name, []).append(row)
    newest = sorted(by_revision, reverse=True)
    return Held(
        product,
        version,
        language,
        tuple(_revision(name, by_revision[name]) for name in newest[:MAX_REVISIONS]),
        max(0, len(newest) - MAX_REVISIONS),
        _size(rows),
        sum(row.hits for row in rows),
    )


def _revision(name: str, rows: list[Row]) -> Revision:
    return Revision(
        name,
        sum(row.kind is not Kind.DELTA for row in rows),
        sum(row.kind is Kind.DELTA for row in rows),
        _size(rows),
        sum(row.hits for row in rows),
        max(row.stored_at for row in rows),
        max(row.used_at for row in rows),
        any(row.pinned for row in rows),
    )
