"""Lists entries: filters, orders, pages. Pure; never looks at the disk."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gup.content.key import Kind
from gup.control.rows import Row

MAX_LIMIT = 1000
_FILTERS = ("version", "language", "stream", "kind")
_ORDERS: Mapping[str, Callable[[Row], float]] = {
    "used": lambda row: row.used_at,
    "stored": lambda row: row.stored_at,
    "length": lambda row: row.length_bytes,
    "hits": lambda row: row.hits,
    "key": lambda _: 0,
}


@dataclass(frozen=True, slots=True)
class Query:
    """What to list. `after` is the place (order value, key) of the last row of the page before."""

    filters: tuple[tuple[str, str], ...] = ()
    order: str = "key"
    descending: bool = False
    limit: int = 100
    after: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """The rows of one page, how many match in all, and the cursor of the next page."""

    rows: tuple[Row, ...]
    matching: int
    cursor: str | None


def parse_query(parameters: Mapping[str, str]) -> Query:
    """The query that URL parameters ask for; ValueError says which one is wrong and what would be right."""
    unknown = sorted(set(parameters) - {*_FILTERS, "order", "limit", "cursor"})
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0]!r}")
    order = parameters.get("order", "key")
    if order.removeprefix("-") not in _ORDERS:
        raise ValueError(f"order is one of {', '.join(_ORDERS)}, with - before it for the other way round")
    limit = parameters.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_LIMIT):
        raise ValueError(f"limit is a number from 1 to {MAX_LIMIT}")
    kind = parameters.get("kind")
    if kind is not None and kind not in list(Kind):
        raise ValueError(f"kind is one of {', '.join(Kind)}")
    cursor = parameters.get("cursor")
    return Query(
        filters=tuple((name, parameters[name]) for name in _FILTERS if name in parameters),
        order=order.removeprefix("-"),
        descending=order.startswith("-"),
        limit=int(limit),
        after=_place(cursor) if cursor else None,
    )


def select(rows: Iterable[Row], query: Query) -> Page:
    """The page that `query` asks for. Ties are broken by key, so no row is left out between pages."""
    value = _ORDERS[query.order]
    matching = [row for row in rows if all(getattr(row, name) == wanted for name, wanted in query.filters)]
    ordered = sorted(matching, key=lambda row: (value(row), row.key), reverse=query.descending)
    rest = [row for row in ordered if _is_after((value(row), row.key), query)]
    page = rest[: query.limit]
    cursor = _cursor((value(page[-1]), page[-1].key)) if len(rest) > len(page) else None
    return Page(tuple(page), len(matching), cursor)


def shown(row: Row) -> dict[str, Any]:
    """A row as the API shows it."""
    return row.to_json() | {"content_revision": row.content_revision}


def _is_after(place: tuple[float, str], query: Query) -> bool:
    if query.after is None:
        return True
    return place < query.after if query.descending else place > query.after


def _cursor(place: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _place(cursor: str) -> tuple[float, str]:
    try:
        value, key = json.loads(base64.urlsafe_b64decode(cursor))
        return float(value), str(key)
    except (ValueError, TypeError) as error:
        raise ValueError("that is not a cursor of this listing") from error
