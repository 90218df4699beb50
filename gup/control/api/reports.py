"""Reports as JSON and as CSV: content taken here, restarts pending, savings. Works nothing out itself."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from aiohttp import web
from pydantic import Field

from gup.control.api.answers import PLANE, answer
from gup.control.api.described import JSON, Answer, Number, Parameters, asked, describe
from gup.control.state import ControlState
from gup.control.stats import savings
from gup.control.stats import tables as table
from gup.control.stats.savings import EARLIER

_CSV = "text/csv"
_MOST_DAYS = 3660
_MONTH = 30


class Form(Parameters):
    """How the report is written."""

    format: Literal["json", "csv"] = Field("json", description="json, or csv: a table without the rest.")


class Span(Form):
    """Which days to list."""

    days: Number = Field(
        30, ge=1, le=_MOST_DAYS, description="The last so many days that something was counted."
    )


class Head(Answer):
    """What holds for the whole report."""

    at: float
    addresses: str = Field(description="reports.addresses: full, hashed or off.")
    retention_seconds: float = Field(description="A client not seen for so long is forgotten.")
    note: str | None = Field(description="Why the report is empty, where that is by the settings.")


class Variant(Answer):
    """Whose bytes they are: of an upstream of this version and language."""

    version: str
    language: str


class RevisionCount(Answer):
    """A revision and its clients."""

    revision: str
    clients: int = Field(description="Clients that stand at it now.")
    took: int = Field(description="Clients that ever took it here.")
    first_taken_at: float | None
    last_taken_at: float | None


class Lagging(Answer):
    """A client that stands before the newest revision."""

    address: str
    version: str | None
    language: str | None
    revision: str | None = Field(description="Where it stands; null when that is not known.")
    lag_revisions: int
    lag_seconds: float | None = Field(description="By the dates in the revisions: whole days.")
    taken_at: float | None
    asked: str | None = Field(description="The newest revision that it asked for.")
    asked_at: float | None
    seen_at: float


class StreamContent(Answer):
    """One stream of content."""

    product: str
    version: str
    language: str
    type: str | None
    moniker: str
    variant: Variant
    clients: int = Field(description="Clients that asked for any of it.")
    current: int = Field(description="Of them, those at the newest revision.")
    behind: int = Field(description="Of them, the others.")
    newest_held: str | None = Field(description="The newest revision in the store.")
    newest_taken: str | None
    newest_asked: str | None
    lag_revisions: int = Field(description="Known revisions newer than the newest held.")
    lag_seconds: float | None
    revisions: list[RevisionCount]
    lagging: list[Lagging] = Field(
        description="Those furthest behind first; 1000 at most, and 10,000 of all streams."
    )


class Content(Head):
    """Content taken here."""

    content: list[StreamContent]


class Group(Answer):
    """Clients that state the same."""

    version: str | None
    language: str | None
    clients: int


class Restart(Answer):
    """A client that took a client patch."""

    address: str
    state: Literal["pending", "unknown"] = Field(description="unknown: it states no build.")
    version: str | None = Field(description="As it stated last.")
    language: str | None
    version_then: str | None = Field(description="As it stated when it took the patch.")
    product: str
    moniker: str
    revision: str
    taken_at: float
    seen_at: float


class Restarts(Head):
    """Clients by what they state, and those that may wait for a restart."""

    clients: list[Group]
    catalogue_known: bool = Field(description="Without a catalogue nobody knows which streams are patches.")
    pending: int
    unknown: int
    saying: str
    restart_pending: list[Restart]


class Figures(Answer):
    """Bytes of a span of days. Saved is sent minus received, and may be below zero."""

    sent_bytes: int
    received_bytes: int
    saved_bytes: int
    wasted_bytes: int = Field(description="Of those received, what was of no use.")
    sent: dict[str, int] = Field(description="By source.")
    received: dict[str, int] = Field(description="By purpose.")
    wasted: dict[str, int] = Field(description="By reason.")


class StreamSavings(Answer):
    """Bytes of one product, language and kind."""

    product: str
    language: str
    kind: str
    sent_bytes: int
    received_bytes: int
    saved_bytes: int
    wasted_bytes: int


class Day(Figures):
    """One day of the site; null is all that was before single days were kept."""

    day: str | None
    streams: list[StreamSavings]


class Savings(Answer):
    """The savings ledger. All days together are the counters."""

    counted_since: float
    time_zone: str = Field(description='Of the days; "" is the machine\'s.')
    today: Figures
    last_30_days: Figures
    since_install: Figures
    days: list[Day] = Field(description="The newest first.")


@describe(Content, query=Form, media=(JSON, _CSV))
async def content(request: web.Request) -> web.Response:
    """Content taken here: who stands where, what lags, and who."""
    return _written(request, await request.app[PLANE].reports.content(), table.of_content)


@describe(Restarts, query=Form, media=(JSON, _CSV))
async def clients(request: web.Request) -> web.Response:
    """Clients that took a client patch and may wait for a restart."""
    return _written(request, await request.app[PLANE].reports.restarts(), table.of_restarts)


@describe(Savings, query=Span, media=(JSON, _CSV))
async def savings_of_days(request: web.Request) -> web.Response:
    """What was sent, fetched, saved and wasted, by day and stream."""
    return _written(request, await ledger(request.app[PLANE], asked(request, Span).days), table.of_savings)


def _written(
    request: web.Request, report: dict[str, Any], rows: Callable[[dict[str, Any]], Iterable[table.Line]]
) -> web.Response:
    if asked(request, Form).format == "csv":
        return web.Response(text=table.csv_text(rows(report)), content_type=_CSV, charset="utf-8")
    return answer(report)


async def ledger(plane: ControlState, count: int) -> dict[str, Any]:
    """The savings with the last `count` days."""
    today, days = await plane.reports.savings()
    dates = [day for day in sorted(days, reverse=True) if day != EARLIER]
    month = [counts for day, counts in days.items() if savings.within(day, today, _MONTH)]
    label = plane.reports.stream_labels
    listed = [*dates[:count], *([EARLIER] if EARLIER in days and count > len(dates) else [])]
    return {
        "counted_since": plane.dependencies.installed_at,
        "time_zone": plane.settings.site.time_zone,
        "today": savings.figures(days.get(today, {})),
        "last_30_days": savings.figures(savings.added_up(month)),
        "since_install": savings.figures(savings.added_up(days.values())),
        "days": [
            {
                "day": day or None,
                **savings.figures(days[day]),
                "streams": savings.streams(days[day], label),
            }
            for day in listed
        ],
    }


routes = [
    web.get("/api/v1/report/content", content),
    web.get("/api/v1/report/clients", clients),
    web.get("/api/v1/report/savings", savings_of_days),
    web.get("/api/v1/savings", savings_of_days),
]
