"""What the page shows of the plane at one moment, as plain values for the templates. Renders nothing."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from datetime import tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from gup.control.history.figures import RECEIVED, SENT
from gup.control.history.record import HOUR, MINUTE, Point, added
from gup.control.page.held import Holdings, holdings
from gup.control.page.savings import savings
from gup.control.plane import Plane
from gup.control.rows import Stream

_HELD_SECONDS = 5.0
"""So long a view of all rows stands: with 1e5 of them it takes some 0.3 s of a thread."""
_FAILURES_SHOWN = 10
_CHARTS = {"hour": 5 * MINUTE, "day": HOUR}
"""Spans that are drawn, and the length of the rows of the tables behind the charts."""


class Viewer:
    """Looks at the plane, and keeps for some seconds what is dear to find out."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._held: Holdings | None = None
        self._held_at = 0.0
        self._holding = asyncio.Lock()

    async def view(self) -> dict[str, Any]:
        """All that is shown, by the names that the templates use."""
        plane = self._plane
        await plane.meter()
        status = await plane.status()
        held = await self._holdings()
        now = plane.clock()
        zone = _zone(plane)
        totals = status["totals"]["since_install"]
        history = plane.history.history
        return {
            "now": now,
            "zone": zone,
            "status": status,
            "not_ready": plane.not_ready(),
            "saved": savings(history, totals, now, zone),
            "rates": {
                "clients": plane.history.clients.bytes_per_second(),
                "wan": plane.history.wan.bytes_per_second(),
                "wan_limit": status["wan_rate_bytes_per_second"],
            },
            "charts": {span: _chart(history.series(span, now), step) for span, step in _CHARTS.items()},
            "held": held,
            "failures": status["failures"][:_FAILURES_SHOWN],
        }

    async def _holdings(self) -> Holdings:
        async with self._holding:
            if self._held is None or time.monotonic() - self._held_at > _HELD_SECONDS:
                rows = list(self._plane.index.rows.values())
                self._held = await asyncio.to_thread(holdings, rows, self._label)
                self._held_at = time.monotonic()
            return self._held

    def _label(self, stream: Stream) -> tuple[str, str, str]:
        """Product, version and language: the catalogue's words where it has any, else those of the key."""
        product, language = self._plane.label(stream)
        label = self._plane.around.label_of(stream, "")
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
        "saved_today_bytes": saved.today.saved_bytes,
        "saved_last_30_days_bytes": saved.last_30_days.saved_bytes,
        "saved_since_install_bytes": saved.since_install.saved_bytes,
    }


def _zone(plane: Plane) -> tzinfo | None:
    """The site's; None is the machine's own."""
    name = plane.settings.site.time_zone
    return ZoneInfo(name) if name else None


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
