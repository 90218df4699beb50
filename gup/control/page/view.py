"""What the page shows of the plane at one moment, as plain values for the templates. Renders nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import tzinfo
from typing import Any, Generic, TypeVar
from zoneinfo import ZoneInfo

from gup.control.api.reports import ledger
from gup.control.index import Stream
from gup.control.page.held import Holdings, holdings
from gup.control.page.words import clock
from gup.control.state import ControlState
from gup.control.stats.history import HOUR, MINUTE, RECEIVED, SENT, Point, added
from gup.control.stats.savings import within

_T = TypeVar("_T")

_HELD_SECONDS = 5.0
"""So long a view of all rows stands at least: with 1e5 of them it takes some 0.3 s of a thread."""
_REST_FACTOR = 10
_CHARTS_SECONDS = 5.0
_LEDGER_SECONDS = 2.0
_CLIENTS_SECONDS = 10.0
_DAYS = 30
_FAILURES_SHOWN = 10
_CHARTS = {"hour": 5 * MINUTE, "day": HOUR}
"""Spans that are drawn, and the length of the rows of the tables behind the charts."""


class Kept(Generic[_T]):
    """What `find` found, for so many seconds, more if it is dear; who asks meanwhile waits for the same."""

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
    """Looks at the plane, and keeps for some seconds what is dear to find out."""

    def __init__(self, plane: ControlState) -> None:
        self._state = plane
        self._held = Kept(_HELD_SECONDS, self._holdings)
        self._charts = Kept(_CHARTS_SECONDS, self._drawn)
        self._ledger = Kept(_LEDGER_SECONDS, lambda: ledger(plane, _DAYS))
        self._content = Kept(_CLIENTS_SECONDS, plane.reports.content)
        self._restarts = Kept(_CLIENTS_SECONDS, plane.reports.restarts)

    async def view(self) -> dict[str, Any]:
        """All that is shown, by the names that the templates use."""
        plane = self._state
        await plane.meter()
        status = await plane.status()
        now, zone = plane.clock(), _zone(plane)
        return {
            "now": now,
            "zone": zone,
            "status": status,
            "not_ready": plane.not_ready(),
            "saved": _within_a_month(await self._ledger.value(), clock(now, zone, "%Y-%m-%d")),
            "rates": {
                "clients": plane.history.clients.bytes_per_second(),
                "wan": plane.history.wan.bytes_per_second(),
                "wan_limit": status["wan_rate_bytes_per_second"],
            },
            "charts": await self._charts.value(),
            "held": await self._held.value(),
            "taken": await self._content.value(),
            "restarts": await self._restarts.value(),
            "failures": status["failures"][:_FAILURES_SHOWN],
        }

    async def _drawn(self) -> dict[str, Any]:
        history, now = self._state.history.history, self._state.clock()
        return {span: _chart(history.series(span, now), step) for span, step in _CHARTS.items()}

    async def _holdings(self) -> Holdings:
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
    status, saved = view["status"], view["saved"]
    return {
        "at": view["now"],
        "ready": status["ready"],
        "client_bytes_per_second": view["rates"]["clients"],
        "wan_bytes_per_second": view["rates"]["wan"],
        "wan_limit_bytes_per_second": view["rates"]["wan_limit"],
        "client_connections": status["clients"]["connections"],
        "fills": len(status["fills"]),
        "fill_waiters": status["fill_waiters"],
        "cache_size_bytes": status["cache"]["size_bytes"],
        "saved_today_bytes": saved["today"]["saved_bytes"],
        "saved_last_30_days_bytes": saved["last_30_days"]["saved_bytes"],
        "saved_since_install_bytes": saved["since_install"]["saved_bytes"],
    }


def _zone(plane: ControlState) -> tzinfo | None:
    """The site's; None is the machine's own."""
    name = plane.settings.site.time_zone
    return ZoneInfo(name) if name else None


def _within_a_month(saved: dict[str, Any], today: str) -> dict[str, Any]:
    """The savings with the days of the last thirty only, those on which anything was counted."""
    days = [day for day in saved["days"] if day["day"] is not None and within(day["day"], today, _DAYS)]
    return saved | {"days": days}


def _chart(points: Iterable[Point], step: int) -> dict[str, Any]:
    """What a chart tells in words: its sums, its highest rates, and a row for each `step` seconds."""
    points = list(points)
    buckets: dict[int, list[Point]] = {}
    for point in points:
        buckets.setdefault(point.at // step * step, []).append(point)
    total = added(points)
    return {
        "sent_bytes": total[SENT],
        "received_bytes": total[RECEIVED],
        "client_peak": max((point.client_peak for point in points), default=0),
        "wan_peak": max((point.wan_peak for point in points), default=0),
        "rows": [{"at": at, **_row(bucket)} for at, bucket in sorted(buckets.items(), reverse=True)],
    }


def _row(points: Iterable[Point]) -> dict[str, Any]:
    points = list(points)
    total, seconds = added(points), max(1.0, sum(point.covered_seconds for point in points))
    return {
        "sent_bytes": total[SENT],
        "received_bytes": total[RECEIVED],
        "client_rate": total[SENT] / seconds,
        "wan_rate": total[RECEIVED] / seconds,
    }
