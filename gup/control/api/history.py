"""The history as JSON. Reads, changes nothing."""

from typing import Any, Literal

from aiohttp import web
from pydantic import Field

from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, Parameters, asked, describe
from gup.control.stats.history import SPANS, Point, shown


class Span(Parameters):
    """How far back to look."""

    span: Literal["hour", "day", "week", "quarter"] = Field(
        "hour", description="An hour or a day by the minute, a week or ninety days by the hour."
    )


class OnePoint(Answer):
    """What was moved in one minute or hour, the highest rates in it, and what held at its end."""

    at: int = Field(description="When it began.")
    covered_seconds: float = Field(description="How much of it was seen; rates are bytes through this.")
    client_sent_bytes: int
    upstream_received_bytes: int
    saved_bytes: int = Field(description="Sent minus received; may be below zero.")
    upstream_wasted_bytes: int
    evicted_bytes: int
    integrity_failures: int
    requests: dict[str, int] = Field(description="By result.")
    fills: dict[str, int] = Field(description="By outcome.")
    client_peak_bytes_per_second: int
    wan_peak_bytes_per_second: int
    wan_limit_bytes_per_second: int | None = Field(description="Null when unlimited.")
    cache_entries_bytes: int


class Series(Answer):
    """The points of a span, the oldest first; where gup did not run there are none."""

    span: str
    step_seconds: int
    since: float
    until: float
    points: list[OnePoint]


@describe(Series, query=Span)
async def history(request: web.Request) -> web.Response:
    """What was moved over a span that ends now."""
    plane = request.app[PLANE]
    span = asked(request, Span).span
    step, length = SPANS[span]
    await plane.meter()
    now = plane.clock()
    points = [point_shown(point) for point in plane.history.history.series(span, now)]
    return answer({"span": span, "step_seconds": step, "since": now - length, "until": now, "points": points})


def point_shown(point: Point) -> dict[str, Any]:
    """A point as the API shows it."""
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
