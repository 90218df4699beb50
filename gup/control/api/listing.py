"""Lists entries: filters, orders, pages. Pure; never looks at the disk."""

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from gup.content.catalog import Label
from gup.content.key import Kind, delta_step
from gup.content.languages import parse_language
from gup.control.api.described import Answer, Number, Parameters
from gup.control.index import Row

MAX_LIMIT = 1000
_NO_CURSOR = "cursor: it is not the cursor of a page before"
_ORDERS: Mapping[str, Callable[[Row], float]] = {
    "used": lambda row: row.used_at,
    "stored": lambda row: row.stored_at,
    "length": lambda row: row.length_bytes,
    "hits": lambda row: row.hits,
    "key": lambda _: 0,
}
_Order = Literal[
    "key", "-key", "used", "-used", "stored", "-stored", "length", "-length", "hits", "-hits"
]  # fmt: skip


Labelling = Callable[[Row], Label]
"""What the catalogue calls a row's stream; the moniker, and the type "", where it is not listed."""


class Listing(Parameters):
    """What to list. Text is compared without regard to capitals."""

    product: str | None = Field(None, min_length=1, description="Only of this product, as rows show it.")
    version: str | None = Field(
        None, min_length=1, description="Only of this version: the key's or the product's."
    )
    language: str | None = Field(
        None,
        min_length=1,
        description="Only of this language, however it is written: the key's or the product's.",
    )
    stream: str | None = Field(None, min_length=1, description="Only of this moniker.")
    revision: str | None = Field(
        None,
        min_length=1,
        description="Only of this revision: the folder's or the content's.",
    )
    kind: Kind | None = Field(None, description="Only files of this kind.")
    order: _Order = Field("key", description="What rows are in order of; a - turns it round.")
    limit: Number = Field(100, ge=1, le=MAX_LIMIT, description="Rows of a page, at most.")
    cursor: str | None = Field(
        None, min_length=1, description="Of the page before, asked for with the same other parameters."
    )

    @property
    def place(self) -> tuple[float, str] | None:
        """Order value and key of the last row of the page before; ValueError when the cursor is none."""
        return _place(self.cursor) if self.cursor is not None else None


class Entry(Answer):
    """A stored body."""

    key: str
    version: str
    language: str
    stream: str
    revision: str = Field(description="The folder's.")
    file: str
    product: str = Field(description="From the catalogue; the moniker when it is not listed.")
    product_version: str | None = Field(description="From the catalogue: what the product is made for.")
    product_language: str | None = Field(description="From the catalogue.")
    type: str | None = Field(description="Type of content, from the catalogue.")
    kind: Kind
    content_revision: str | None = Field(description="What it brings a client to, if the names tell.")
    from_revision: str | None = Field(description="Of a delta.")
    to_revision: str | None = Field(description="Of a delta.")
    length_bytes: int
    stored_at: float
    used_at: float
    hits: int
    pinned: bool
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class Page:
    """The rows of one page, how many match in all, and the cursor of the next page."""

    rows: tuple[Row, ...]
    matching: int
    cursor: str | None


def select(rows: Iterable[Row], query: Listing, label: Labelling) -> Page:
    """The page that `query` asks for. Ties are broken by key, so no row is left out between pages.

    ValueError when its cursor is none of a listing's.
    """
    value, descending, after = _ORDERS[query.order.removeprefix("-")], query.order[0] == "-", query.place
    found = matching(rows, query, label)
    ordered = sorted(found, key=lambda row: (value(row), row.key), reverse=descending)

    def is_after(row: Row) -> bool:
        place = (value(row), row.key)
        return after is None or (place < after if descending else place > after)

    rest = [row for row in ordered if is_after(row)]
    page = rest[: query.limit]
    cursor = _cursor((value(page[-1]), page[-1].key)) if len(rest) > len(page) else None
    return Page(tuple(page), len(found), cursor)


def matching(rows: Iterable[Row], query: Listing, label: Labelling) -> list[Row]:
    """All rows that the query's filters let through."""
    return [row for row in rows if _fits(row, query, label)]


def _fits(row: Row, query: Listing, label: Labelling) -> bool:
    if query.kind is not None and row.kind is not query.kind:
        return False
    if query.stream is not None and not _same(query.stream, row.stream):
        return False
    if query.revision is not None and query.revision not in (row.revision, row.content_revision):
        return False
    if query.product is None and query.version is None and query.language is None:
        return True
    called = label(row)
    return (
        (query.product is None or _same(query.product, called.product))
        and (query.version is None or _same(query.version, row.version, called.version))
        and (query.language is None or _speaks(query.language, row.language, called.language))
    )


def _same(wanted: str, *found: str) -> bool:
    return wanted.casefold() in map(str.casefold, found)


def _speaks(wanted: str, *found: str) -> bool:
    """Whether one of them is the language, which may be written in other ways: French, fr, fr-CA."""
    if _same(wanted, *found):
        return True
    language = parse_language(wanted)
    return language is not None and language in map(parse_language, found)


def shown(row: Row, label: Label) -> dict[str, Any]:
    """A row as the API shows it."""
    step = delta_step(row.file) if row.kind is Kind.DELTA else None
    return row.to_json() | {
        "product": label.product,
        "product_version": label.version or None,
        "product_language": label.language or None,
        "type": label.type or None,
        "content_revision": row.content_revision,
        "from_revision": step.from_revision if step else None,
        "to_revision": step.to_revision if step else None,
    }


def _cursor(place: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _place(cursor: str) -> tuple[float, str]:
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, RecursionError) as error:
        raise ValueError(_NO_CURSOR) from error
    match place:
        case [int() | float() as value, str() as key] if math.isfinite(value):
            return float(value), key
    raise ValueError(_NO_CURSOR)
