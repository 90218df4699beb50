"""What is stored: listed, shown, purged, pinned."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cached_property
from heapq import nlargest, nsmallest
from typing import Annotated, Literal

from aiohttp import web
from pydantic import Field, model_validator

from gup.content.catalog import Label
from gup.content.key import ContentKey, Kind, delta_step
from gup.content.languages import parse_language
from gup.control.api import schemas
from gup.control.api.endpoint import Count, Endpoint, Request, Text
from gup.control.index import ORDERS, Index, Place, Row, row_of
from gup.control.state import ControlState

_SAFE_NAME = r"^[^./\\\u0000-\u001f\u007f-\u009f\u2028\u2029][^/\\\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"
_Part = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": 240, "pattern": _SAFE_NAME})]
_Order = Literal["key", "-key", "used", "-used", "stored", "-stored", "length", "-length", "hits", "-hits"]

Labels = Callable[[Row], Label]
"""What the catalogue calls a row's stream; the moniker, and the type "", where it is not listed."""


class Key(Request):
    """The key in a request's path."""

    version: _Part = Field(description="Version of the content, or any.")
    language: _Part = Field(description="Language of the content, or any.")
    stream: _Part = Field(description="The moniker.")
    revision: _Part = Field(description="The revision's folder.")
    file: _Part = Field(description="The file's name.")

    @cached_property
    def key(self) -> ContentKey:
        return ContentKey(self.version, self.language, self.stream, self.revision, self.file)

    @model_validator(mode="after")
    def _is_safe(self) -> "Key":
        _ = self.key  # BadKeyError
        return self


class Filter(Request):
    """Which entries. Text is compared without regard to capitals."""

    product: Text | None = Field(None, description="Only of this product, as rows show it.")
    version: Text | None = Field(None, description="Only of this version: the key's or the product's.")
    language: Text | None = Field(None, description="Only of this language: the key's or the product's.")
    stream: Text | None = Field(None, description="Only of this moniker.")
    revision: Text | None = Field(None, description="Only of this revision: the folder's or the content's.")
    kind: Kind | None = Field(None, description="Only files of this kind.")


class Listing(Filter):
    """What to list."""

    order: _Order = Field("key", description="Order of the rows; a - before it reverses it.")
    limit: Count = Field(100, description="Rows of a page, at most.")
    cursor: schemas.EntryCursor | None = Field(None, description=schemas.CURSOR)


async def listing(state: ControlState, query: Listing) -> schemas.Entries:
    """A page of entries."""
    return await page_of(state.index, query, labels_of(state))


async def entry(state: ControlState, path: Key) -> schemas.EntryWithRecord:
    """One entry, with what its record says."""
    row = state.index.rows.get(path.key.text)
    stored = await asyncio.to_thread(state.dependencies.store.stored, path.key)
    record = stored.record if stored is not None else None
    if row is None and stored is not None and record is not None:
        row = row_of(stored)
    if row is None:
        raise _not_found(path.key)
    return schemas.EntryWithRecord(
        **shown(row, labels_of(state)(row)).model_dump(),
        record=None if record is None else schemas.EntryRecord.model_validate(record.to_json()),
    )


async def purge(state: ControlState, path: Key) -> schemas.Purged:
    """Remove an entry, pinned or not, and what lies unfinished of it; whoever reads it reads on."""
    known = path.key.text in state.index.rows
    freed = await state.evictor.purge(path.key)
    if not freed and not known:
        raise _not_found(path.key)
    return schemas.Purged(key=path.key.text, freed_bytes=freed)


async def pin(state: ControlState, path: Key) -> schemas.Pinned:
    """Keep an entry whatever the limits say."""
    return await _pinned(state, path.key, True)


async def unpin(state: ControlState, path: Key) -> schemas.Pinned:
    """Let the limits apply to an entry again."""
    return await _pinned(state, path.key, False)


async def _pinned(state: ControlState, key: ContentKey, pinned: bool) -> schemas.Pinned:
    if not await state.set_pinned(key, pinned=pinned):
        raise _not_found(key)
    return schemas.Pinned(key=key.text, pinned=pinned)


def _not_found(key: ContentKey) -> web.HTTPNotFound:
    return web.HTTPNotFound(text=f"There is no entry {key.text}")


_KEY = "/api/v1/content/{version}/{language}/{stream}/{revision}/{file}"
ENDPOINTS = (
    Endpoint("GET", "/api/v1/content", listing),
    Endpoint("GET", _KEY, entry, problems=(404,)),
    Endpoint("DELETE", _KEY, purge, problems=(404, 409)),
    Endpoint("PUT", f"{_KEY}/pin", pin, problems=(404, 409)),
    Endpoint("DELETE", f"{_KEY}/pin", unpin, problems=(404, 409)),
)


def labels_of(state: ControlState) -> Labels:
    """What the catalogue calls the rows' streams at this moment."""
    label_of = state.dependencies.label_of
    return lambda row: label_of(row.stream_id, row.file) or Label(state.label(row.stream_id)[0], "", "", "")


async def page_of(index: Index, query: Listing, label: Labels) -> schemas.Entries:
    """The page that is asked for. Without a filter, the cost does not depend on how much is stored."""
    order, descending, after = query.order.removeprefix("-"), query.order[0] == "-", query.cursor
    value, most = ORDERS[order], query.limit + 1

    def place(row: Row) -> Place:
        return value(row), row.key

    def filtered(rows: list[Row]) -> tuple[int, list[Row]]:
        found = matching(rows, query, label)
        rest = [r for r in found if after is None or (place(r) < after if descending else place(r) > after)]
        return len(found), (nlargest if descending else nsmallest)(most, rest, key=place)

    if query.model_fields_set & Filter.model_fields.keys():
        candidates = index.of_moniker(query.stream) if query.stream is not None else list(index.rows.values())
        count, rows = await asyncio.to_thread(filtered, candidates)
    else:
        rows = index.page(order, most, descending=descending, after=after)
        count = len(index.rows)
    page = rows[: query.limit]
    return schemas.Entries(
        entries=[shown(row, label(row)) for row in page],
        matching=count,
        cursor=place(page[-1]) if len(rows) > len(page) else None,
        complete=index.complete,
    )


def matching(rows: Iterable[Row], query: Filter, label: Labels) -> list[Row]:
    """All rows that the filter lets through."""
    language = parse_language(query.language) if query.language is not None else None

    def same(wanted: str, *found: str) -> bool:
        return wanted.casefold() in map(str.casefold, found)

    def fits(row: Row) -> bool:
        if not (
            (query.kind is None or row.kind is query.kind)
            and (query.stream is None or same(query.stream, row.stream))
            and (query.revision is None or query.revision in (row.revision, row.content_revision))
        ):
            return False
        if query.product is None and query.version is None and query.language is None:
            return True
        called = label(row)
        languages = (row.language, called.language)  # each may be written in other ways: French, fr, fr-CA
        return (
            (query.product is None or same(query.product, called.product))
            and (query.version is None or same(query.version, row.version, called.version))
            and (
                query.language is None
                or same(query.language, *languages)
                or (language is not None and language in map(parse_language, languages))
            )
        )

    return [row for row in rows if fits(row)]


def shown(row: Row, label: Label) -> schemas.Entry:
    """A row of the index with the names that the catalogue has for it."""
    step = delta_step(row.file) if row.kind is Kind.DELTA else None
    return schemas.Entry(
        **asdict(row),
        product=label.product,
        product_version=label.version or None,
        product_language=label.language or None,
        type=label.type or None,
        content_revision=row.content_revision,
        from_revision=step.from_revision if step else None,
        to_revision=step.to_revision if step else None,
    )
