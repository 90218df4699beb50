"""Clients, reports, savings and history, from the statistics database."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from gup.control.api import schemas
from gup.control.api.endpoint import Count, Days, Endpoint, Request, Table, Text
from gup.control.state import ControlState
from gup.control.stats.client_records import WINDOWS
from gup.control.stats.doctor import FINDINGS
from gup.control.stats.history import (
    EARLIER,
    SPANS,
    added_up,
    shown,
    traffic,
    traffic_by_stream,
    within,
)
from gup.metrics import WASTED

_MONTH = 30


class Listing(Request):
    """Which clients to list. Text is compared without case."""

    version: Text | None = Field(None, description="Only those that state this version.")
    language: Text | None = Field(None, description="Only those that state this language.")
    seen: Literal["1h", "1d", "7d"] | None = Field(None, description="Only those seen within this time.")
    limit: Count = Field(100, description="Rows of a page, at most.")
    cursor: schemas.ClientCursor | None = Field(None, description=schemas.CURSOR)


class Form(Request):
    """A report's format."""

    format: Literal["json", "csv"] = Field("json", description="json, or csv: a table without the rest.")


class Ledger(Form):
    """Which days to list."""

    days: Days = Field(_MONTH, description="The last so many days that something was counted.")


class Span(Request):
    """How far back to look."""

    span: Literal["hour", "day", "week", "quarter"] = Field("hour", description="A quarter is ninety days.")


async def clients(state: ControlState, query: Listing) -> schemas.Clients:
    """How many clients were seen, and which."""
    now, (seen_at, id_) = state.clock(), query.cursor or (None, None)
    since = now - WINDOWS[query.seen] if query.seen else 0.0
    wanted = {"since": since, "version": query.version, "language": query.language}
    page = await state.reports.clients(query.limit, **wanted, seen_at=seen_at, id=id_)
    if state.reports.mode == "off":
        page["known"] = len(state.clients)
    return schemas.Clients(seen=state.clients.counts(now), **page)


async def content(state: ControlState, _query: Form) -> schemas.ContentReport:
    """Content taken here: clients by revision, and lagging ones."""
    return await state.reports.content()


async def restarts(state: ControlState, _query: Form) -> schemas.RestartReport:
    """Clients that took a client patch and may need a restart."""
    return await state.reports.restarts()


async def sick(state: ControlState, _query: Form) -> schemas.SickReport:
    """Clients that something seems to be wrong with: what was seen, the likely cause, what to do."""
    found = await state.doctor.look()
    rows = [
        schemas.SickClient(
            address=row.client,
            finding=row.finding,
            product=None if row.stream is None else " ".join(state.label(row.stream)),
            moniker=None if row.stream is None else row.stream[2],
            **{name: getattr(row, name) for name in ("what", "times", "first_at", "last_at", "seen")},
            **FINDINGS[row.finding]._asdict(),
        )
        for row in found.rows
    ]
    return schemas.SickReport(
        **state.reports.head(),
        clients=found.clients,
        left_out=found.left_out,
        sick=found.sick,
        findings=dict(found.counts),
        examined_at=found.at,
        examined_seconds=round(found.seconds, 3),
        rows=rows,
    )


async def saved(state: ControlState, query: Ledger) -> schemas.Savings:
    """What was sent, fetched, saved and wasted, by day and stream."""
    today, days = await state.history.savings()
    labels = state.slot_labels()
    dates = sorted(days.keys() - {EARLIER}, reverse=True)
    month = [counts for day, counts in days.items() if within(day, today, _MONTH)]
    listed = [*dates[: query.days], *([EARLIER] if EARLIER in days and query.days > len(dates) else [])]
    return schemas.Savings(
        counted_since=state.dependencies.installed_at,
        time_zone=state.settings.site.time_zone,
        today=traffic(days.get(today, {})),
        last_30_days=traffic(added_up(month)),
        since_install=traffic(added_up(days.values())),
        days=[
            schemas.DayTraffic(
                **dict(traffic(days[day])), day=day or None, streams=traffic_by_stream(days[day], labels)
            )
            for day in listed
        ],
    )


async def history(state: ControlState, query: Span) -> schemas.History:
    """Bytes moved over a span that ends now."""
    step, length = SPANS[query.span]
    now = state.clock()
    points = [
        schemas.HistoryPoint(
            at=point.at,
            covered_seconds=round(point.covered_seconds, 3),
            **shown(point.sums),
            client_peak_bytes_per_second=point.client_peak,
            wan_peak_bytes_per_second=point.wan_peak,
            wan_limit_bytes_per_second=point.wan_limit or None,
            cache_entries_bytes=point.entries_bytes,
        )
        for point in await state.history.series(query.span)
    ]
    return schemas.History(span=query.span, step_seconds=step, since=now - length, until=now, points=points)


# --- as tables

_STREAM = ("product", "version", "language", "type", "moniker")


def _content_rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One line for each revision of a stream, then one for each lagging client."""
    for stream in report["content"]:
        named = {name: stream[name] for name in _STREAM}
        yield from (row | named | {"line": "revision"} for row in stream["revisions"])
        for row in stream["lagging"]:
            yield row | named | {"line": "client", "last_taken_at": row["taken_at"]}


_BYTES = ("sent_bytes", "received_bytes", "saved_bytes", "wasted_bytes")
_WASTED = {why: f"wasted_{why}_bytes" for why in WASTED}


def _savings_rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One line for each day and stream, and one for each day's waste: columns add up to the counters."""
    nothing = dict.fromkeys((*_BYTES, *_WASTED.values()), 0)
    for day in report["days"]:
        on = nothing | {"day": day["day"] or "earlier"}
        yield from (on | row for row in day["streams"])
        yield on | {"kind": "wasted"} | {_WASTED[why]: day["wasted"][why] for why in WASTED}


_CONTENT = Table(
    (
        *("line", *_STREAM, "revision", "clients", "took", "first_taken_at", "last_taken_at"),
        *("address", "lag_revisions", "lag_seconds", "seen_at"),
    ),
    _content_rows,
)
_RESTARTS = Table(
    (
        *("address", "state", "version", "language", "version_then", "product", "moniker", "revision"),
        *("taken_at", "seen_at"),
    ),
    lambda report: report["restart_pending"],
)
_SICK = Table(
    (
        *("address", "finding", "product", "moniker", "what", "times", "first_at", "last_at"),
        *("seen", "cause", "what_to_do"),
    ),
    lambda report: report["rows"],
)
_SAVINGS = Table(("day", "product", "language", "kind", *_BYTES, *_WASTED.values()), _savings_rows)
ENDPOINTS = (
    Endpoint("GET", "/api/v1/clients", clients),
    Endpoint("GET", "/api/v1/report/content", content, csv=_CONTENT),
    Endpoint("GET", "/api/v1/report/clients", restarts, csv=_RESTARTS),
    Endpoint("GET", "/api/v1/report/sick", sick, csv=_SICK),
    Endpoint("GET", "/api/v1/report/savings", saved, csv=_SAVINGS),
    Endpoint("GET", "/api/v1/savings", saved, csv=_SAVINGS),
    Endpoint("GET", "/api/v1/history", history),
)
