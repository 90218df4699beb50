"""Reports as CSV tables (RFC 4180)."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from gup.metrics import WASTED

Row = Mapping[str, Any]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for a formula: clients may state any text."""


class Table(NamedTuple):
    """The columns of a table, and its rows from a report."""

    columns: tuple[str, ...]
    rows: Callable[[Row], Iterable[Row]]

    def csv(self, report: Row) -> str:
        """The table as text; texts that look like formulas are quoted, times are UTC."""
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(self.columns)
        table.writerows([_cell(name, row.get(name)) for name in self.columns] for row in self.rows(report))
        return text.getvalue()


def _cell(name: str, value: Any) -> object:
    if name.endswith("_at") and value:
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


_STREAM = ("product", "version", "language", "type", "moniker")


def _content(report: Row) -> Iterator[Row]:
    """One line for each revision of a stream, then one for each lagging client."""
    for stream in report["content"]:
        named = {name: stream[name] for name in _STREAM}
        yield from ({**row, **named, "line": "revision"} for row in stream["revisions"])
        for row in stream["lagging"]:
            yield {**row, **named, "line": "client", "last_taken_at": row["taken_at"]}


_TRAFFIC = ("sent_bytes", "received_bytes", "saved_bytes", "wasted_bytes")
_WASTED = tuple(f"wasted_{reason}_bytes" for reason in WASTED)


def _savings(report: Row) -> Iterator[Row]:
    """One line for each day and stream, and one for each day's waste: columns add up to the counters."""
    nothing = dict.fromkeys((*_TRAFFIC, *_WASTED), 0)
    for day in report["days"]:
        on = {"day": day["day"] or "earlier", **nothing}
        yield from ({**on, **row} for row in day["streams"])
        yield {**on, "kind": "wasted", **{f"wasted_{why}_bytes": day["wasted"][why] for why in WASTED}}


CONTENT = Table(
    (
        *("line", *_STREAM, "revision", "clients", "took", "first_taken_at", "last_taken_at"),
        *("address", "lag_revisions", "lag_seconds", "seen_at"),
    ),
    _content,
)
RESTARTS = Table(
    (
        *("address", "state", "version", "language", "version_then", "product", "moniker", "revision"),
        *("taken_at", "seen_at"),
    ),
    lambda report: report["restart_pending"],
)
SAVINGS = Table(("day", "product", "language", "kind", *_TRAFFIC, *_WASTED), _savings)
