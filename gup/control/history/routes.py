"""The history as JSON. Reads, changes nothing."""

from typing import Any

from aiohttp import web

from gup.control.api.answers import PLANE, answer
from gup.control.history.figures import shown
from gup.control.history.record import SPANS, Point


async def history(request: web.Request) -> web.Response:
    """What was moved over a span that ends now."""
    plane = request.app[PLANE]
    unknown = sorted(set(request.query) - {"span"})
    if unknown:
        raise web.HTTPBadRequest(text=f"unknown parameter {unknown[0]!r}; there is only span")
    span = request.query.get("span", "hour")
    if span not in SPANS:
        raise web.HTTPBadRequest(text=f"span is one of {', '.join(SPANS)}")
    await plane.meter()
    now = plane.clock()
    points = plane.history.history.series(span, now)
    return answer(
        {
            "span": span,
            "step_seconds": SPANS[span][0],
            "since": now - SPANS[span][1],
            "until": now,
            "points": [point_shown(point) for point in points],
        }
    )


def point_shown(point: Point) -> dict[str, Any]:
    """A point: what was moved in it, the highest rates, and what was true at its end."""
    return {
        "at": point.at,
        "covered_seconds": round(point.covered_seconds, 3),
        **shown(point.sums),
        "client_peak_bytes_per_second": point.client_peak,
        "wan_peak_bytes_per_second": point.wan_peak,
        "wan_limit_bytes_per_second": point.wan_limit or None,
        "cache_entries_bytes": point.entries_bytes,
    }


routes = [web.get("/api/v1/history", history)]
