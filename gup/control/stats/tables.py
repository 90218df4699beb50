"""Reports as CSV tables (RFC 4180)."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from gup.metrics import WASTED

Line = tuple[object, ...]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for a formula: clients may state any text."""


def csv_text(lines: Iterable[Line]) -> str:
    """The lines as CSV; texts that look like formulas are quoted."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in line] for line in lines)
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return "" if value is None else value


def _time(at: float | None) -> str | None:
    return None if not at else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


_STREAM = ("product", "version", "language", "type", "moniker")


def of_content(report: Mapping[str, Any]) -> Iterator[Line]:
    """One line for each revision of a stream, then one for each lagging client."""
    yield (
        *("line", *_STREAM),
        *("revision", "clients", "took", "first_taken_at", "last_taken_at"),
        *("address", "lag_revisions", "lag_seconds", "seen_at"),
    )
    for stream in report["content"]:
        of_stream = tuple(stream[name] for name in _STREAM)
        for row in stream["revisions"]:
            times = _time(row["first_taken_at"]), _time(row["last_taken_at"])
            yield (
                "revision",
                *of_stream,
                row["revision"],
                row["clients"],
                row["took"],
                *times,
                None,
                None,
                None,
                None,
            )
        for row in stream["lagging"]:
            lag = row["lag_revisions"], row["lag_seconds"]
            taken = _time(row["taken_at"])
            counts = (None, None, None, taken)
            yield (
                "client",
                *of_stream,
                row["revision"],
                *counts,
                row["address"],
                *lag,
                _time(row["seen_at"]),
            )


_RESTART = ("address", "state", "version", "language", "version_then", "product", "moniker", "revision")


def of_restarts(report: Mapping[str, Any]) -> Iterator[Line]:
    """One line for each client that may wait for a restart."""
    yield (*_RESTART, "taken_at", "seen_at")
    for row in report["restart_pending"]:
        yield (*(row[name] for name in _RESTART), _time(row["taken_at"]), _time(row["seen_at"]))


def of_savings(report: Mapping[str, Any]) -> Iterator[Line]:
    """One line for each day and stream, and one for each day's waste: columns add up to the counters."""
    yield (
        *("day", "product", "language", "kind"),
        *("sent_bytes", "received_bytes", "saved_bytes", "wasted_bytes"),
        *(f"wasted_{reason}_bytes" for reason in WASTED),
    )
    nothing = tuple(0 for _ in WASTED)
    for day in report["days"]:
        on = day["day"] or "earlier"
        for row in day["streams"]:
            figures = row["sent_bytes"], row["received_bytes"], row["saved_bytes"], row["wasted_bytes"]
            yield (on, row["product"], row["language"], row["kind"], *figures, *nothing)
        yield (on, "", "", "wasted", 0, 0, 0, 0, *(day["wasted"][reason] for reason in WASTED))
