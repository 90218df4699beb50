"""Entries: listed, shown, purged, pinned."""

import asyncio
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from heapq import nlargest, nsmallest
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field, model_validator

from gup.cache.purges import Selection, is_language, is_same
from gup.content.catalog import Label, Stream
from gup.content.key import ContentKey, Kind, content_revision, delta_step
from gup.content.languages import parse_language
from gup.control.api import schemas
from gup.control.api.endpoint import Count, Endpoint, Request, Seconds, Text
from gup.control.entry_table import (
    ORDERS,
    EntryTable,
    Place,
    Row,
    row_of,
    stream_of,
)
from gup.control.state import ControlState

_SAFE_NAME = r"^[^./\\\u0000-\u001f\u007f-\u009f\u2028\u2029][^/\\\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"
_Part = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": 240, "pattern": _SAFE_NAME})]
_Up = Literal["key", "name", "used", "stored", "length", "hits"]
_Down = Literal["-key", "-name", "-used", "-stored", "-length", "-hits"]
_Order = Literal[_Up, _Down]
_Flag = Literal["0", "1"]

Labels = Callable[[Stream, str], Label]
"""The catalogue's label of a stream, or of a file of it; the moniker, and the type "", if not listed."""


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
    """Which entries. Text is compared without case."""

    product: Text | None = Field(None, description="Only of this product, as rows show it.")
    version: Text | None = Field(None, description="Only of this version: the key's or the product's.")
    language: Text | None = Field(None, description="Only of this language: the key's or the product's.")
    stream: Text | None = Field(None, description="Only of this moniker.")
    revision: Text | None = Field(None, description="Only of this revision: the folder's or the content's.")
    kind: Kind | None = Field(None, description="Only files of this kind.")
    pattern: Text | None = Field(
        None, description="Only keys that match: * is any text, ? any character, [ab] one of these."
    )
    older_than: Seconds | None = Field(None, description="Only what was stored at least so many seconds ago.")
    unused_for: Seconds | None = Field(None, description="Only what was used at least so many seconds ago.")

    @property
    def is_given(self) -> bool:
        return any(getattr(self, name) is not None for name in Filter.model_fields)


class Listing(Filter):
    """What to list."""

    order: _Order = Field(
        "key",
        description="Order of the rows (name: product, version, language); a - before it reverses it.",
    )
    limit: Count = Field(100, description="Rows of a page, at most.")
    cursor: schemas.EntryCursor | None = Field(None, description=schemas.CURSOR)

    @model_validator(mode="after")
    def _is_a_place(self) -> "Listing":
        if self.cursor is not None and self.order.endswith("name"):
            ContentKey.parse(self.cursor[1])  # BadKeyError
        return self


class Purge(Filter):
    """What to purge. Without a filter nothing is."""

    dry_run: _Flag = Field("0", description="1 counts and removes nothing.")
    pinned: _Flag = Field("0", description="1 purges pinned entries too.")


async def listing(state: ControlState, query: Listing) -> schemas.Entries:
    """A page of entries."""
    index = state.index
    return await page_of(index.rows, query, labels_of(state), state.clock(), complete=index.complete)


async def entry(state: ControlState, path: Key) -> schemas.EntryWithRecord:
    """One entry, with its record."""
    row = state.index.rows.get(path.key.text)
    stored = await asyncio.to_thread(state.dependencies.store.stored, path.key)
    record = stored.record if stored is not None else None
    if row is None and stored is not None and record is not None:
        row = row_of(stored)
    if row is None:
        raise _not_found(path.key)
    return schemas.EntryWithRecord(
        **shown(row, labels_of(state)(row.stream_id, row.file)).model_dump(),
        record=None if record is None else schemas.EntryRecord.model_validate(record.to_json()),
    )


async def purge(state: ControlState, path: Key) -> schemas.Purged:
    """Remove an entry, pinned or not, and its parts; open readers continue.

    Nothing that was fetched before is served from now on: a fill under way goes on for those that read it.
    """
    known = path.key.text in state.index.rows or state.dependencies.claims.taken(path.key.claim_offset)
    freed = await state.evictor.purge(path.key)
    if not freed and not known and state.dependencies.cluster is None:
        raise _not_found(path.key)
    missing = list(state.evictor.unconfirmed)
    return schemas.Purged(key=path.key.text, freed_bytes=freed, unconfirmed=missing)


async def purge_all(state: ControlState, query: Purge) -> schemas.PurgedEntries:
    """Remove all entries that a filter selects, and their parts; open readers continue.

    Fills under way that it selects go on for those that read them, and are not stored. A filter by times
    selects what is stored now alone; in a cluster one by age selects what was fetched before, wherever it is.
    """
    if not query.is_given:
        raise web.HTTPBadRequest(text="give a filter: pattern=* matches everything that is not pinned")
    found = await chosen(state.index.rows, query, labels_of(state), state.clock())
    due = [row for row in found if query.pinned == "1" or not row.pinned]
    entries, freed_bytes = len(due), sum(row.length_bytes for row in due)
    if query.dry_run == "0":
        keys = [ContentKey.parse(row.key) for row in due]
        entries, freed_bytes = await state.evictor.purge_all(keys, await selection_of(state, query))
    return schemas.PurgedEntries(
        dry_run=query.dry_run == "1",
        entries=entries,
        freed_bytes=freed_bytes,
        pinned=len(found) - len(due),
        busy=len(due) - entries,
        unconfirmed=list(state.evictor.unconfirmed) if query.dry_run == "0" else [],
    )


async def selection_of(state: ControlState, query: Purge) -> Selection | None:
    """What a purge selects, stored here or not; None when that depends on times and this gup is alone.

    For the nodes of a cluster times are moments, since each has its own age of a copy.
    """
    moments: dict[str, Any] = {}
    if query.older_than is not None or query.unused_for is not None:
        if (book := state.dependencies.book) is None:
            return None
        ages = {"fetched_before": query.older_than, "unused_since": query.unused_for}
        moments = {name: book.now - age for name, age in ages.items() if age is not None}
    labelled, streams = (query.product, query.version, query.language), list[Stream]()
    if any(part is not None for part in labelled):
        every = {*state.index.rows.streams(), *state.dependencies.catalogue_rows().streams()}
        label = labels_of(state)
        for stream in every:
            found = label(stream, "")
            version, language, _ = stream
            if (
                is_same(query.product, found.product)
                and is_same(query.version, version, found.version)
                and is_language(query.language, language, found.language)
            ):
                streams.append(stream)
    given = query.model_dump(
        include={"kind", "stream", "revision", "pattern", "product", "version", "language"}
    )
    pinned = query.pinned == "1"
    return Selection(**given, **moments, streams=tuple(sorted(streams)), pinned=pinned)


async def pin(state: ControlState, path: Key) -> schemas.Pinned:
    """Keep an entry whatever the limits say."""
    return await _pinned(state, path.key, True)


async def unpin(state: ControlState, path: Key) -> schemas.Pinned:
    """Let the limits apply to an entry again."""
    return await _pinned(state, path.key, False)


async def _pinned(state: ControlState, key: ContentKey, pinned: bool) -> schemas.Pinned:
    found = await state.set_pinned(key, pinned=pinned)
    if (book := state.dependencies.book) is not None:
        await book.issue("pin" if pinned else "unpin", {"key": key.text})
    elif not found:
        raise _not_found(key)
    return schemas.Pinned(key=key.text, pinned=pinned)


def _not_found(key: ContentKey) -> web.HTTPNotFound:
    return web.HTTPNotFound(text=f"There is no entry {key.text}")


_KEY = "/api/v1/content/{version}/{language}/{stream}/{revision}/{file}"
ENDPOINTS = (
    Endpoint("GET", "/api/v1/content", listing),
    Endpoint("DELETE", "/api/v1/content", purge_all),
    Endpoint("GET", _KEY, entry, problems=(404,)),
    Endpoint("DELETE", _KEY, purge, problems=(404, 409)),
    Endpoint("PUT", f"{_KEY}/pin", pin, problems=(404, 409)),
    Endpoint("DELETE", f"{_KEY}/pin", unpin, problems=(404, 409)),
)


def labels_of(state: ControlState) -> Labels:
    """The catalogue's present labels."""
    label_of = state.dependencies.label_of
    return lambda stream, file: label_of(stream, file) or Label(state.label(stream)[0], "", "", "")


async def page_of(
    table: EntryTable, query: Listing, label: Labels, now: float, *, complete: bool = True
) -> schemas.Entries:
    """Without a filter, the cost does not depend on how much is stored."""
    order, descending, after = query.order.removeprefix("-"), query.order[0] == "-", query.cursor
    value, found = ORDERS.get(order, ORDERS["key"]), None
    most, first = query.limit + 1, nlargest if descending else nsmallest

    def place(row: Row) -> Place:
        return value(row), row.key

    if query.is_given:
        found = await chosen(table, query, label, now)
    if order == "name":
        rows = named_page(table, found, query, label)
    elif found is None:
        rows = table.page(order, most, descending=descending, after=after)
    else:
        rest = [r for r in found if after is None or (place(r) < after if descending else place(r) > after)]
        rows = first(most, rest, key=place)
    page = rows[: query.limit]
    return schemas.Entries(
        entries=[shown(row, label(row.stream_id, row.file)) for row in page],
        matching=len(table if found is None else found),
        cursor=place(page[-1]) if len(rows) > len(page) else None,
        complete=complete,
    )


def named_page(table: EntryTable, found: list[Row] | None, query: Listing, label: Labels) -> list[Row]:
    """One row more than a page has, of those `found` (None: all), in the order of their labels.

    Streams are sorted first, then the rows of those on the page: sorting all rows would take too long.
    """
    by_stream: dict[Stream, list[Row]] = defaultdict(list)
    for row in found or ():
        by_stream[row.stream_id].append(row)
    descending = query.order[0] == "-"

    def stream_place(stream: Stream) -> tuple[str | bool, ...]:
        product = label(stream, "").product
        return (product == stream[2], product.casefold(), *stream)  # unlisted ones last

    def place(stream: Stream, revision: str, file: str) -> tuple[str | bool, ...]:
        return *stream_place(stream), content_revision(Kind.DELTA, revision, file) or revision, file

    def is_before(one: tuple[str | bool, ...], other: tuple[str | bool, ...]) -> bool:
        return one > other if descending else one < other

    last, rows = None, list[Row]()
    if query.cursor is not None:
        key = ContentKey.parse(query.cursor[1])
        last = place(stream_of(key), key.revision, key.file)
    for stream in sorted(
        table.streams() if found is None else by_stream, key=stream_place, reverse=descending
    ):
        if last is not None and is_before(stream_place(stream), last[:5]):
            continue
        of_it = table.of_stream(stream) if found is None else by_stream[stream]
        places = {row.key: place(stream, row.revision, row.file) for row in of_it}
        due = (row for row in of_it if last is None or is_before(last, places[row.key]))
        rows += sorted(due, key=lambda row: places[row.key], reverse=descending)
        if len(rows) > query.limit:
            break
    return rows[: query.limit + 1]


async def chosen(table: EntryTable, query: Filter, label: Labels, now: float) -> list[Row]:
    """All rows that a filter selects."""
    return [row async for rows in table.every(query.stream) for row in matching(rows, query, label, now)]


def same(wanted: str | None, *found: str) -> bool:
    return wanted is not None and wanted.casefold() in map(str.casefold, found)


def matching(rows: Iterable[Row], query: Filter, label: Labels, now: float) -> list[Row]:
    language = parse_language(query.language) if query.language is not None else None
    fits = re.compile(fnmatch.translate((query.pattern or "*").casefold())).match

    def in_language(row: Row) -> bool:
        names = (row.language, called(row).language)  # each may be written in other ways: French, fr, fr-CA
        return same(query.language, *names) or (
            language is not None and language in map(parse_language, names)
        )

    def called(row: Row) -> Label:
        return label(row.stream_id, row.file)

    conditions: list[tuple[object, Callable[[Row], bool]]] = [
        (query.kind, lambda row: row.kind is query.kind),
        (query.stream, lambda row: same(query.stream, row.stream)),
        (query.revision, lambda row: query.revision in (row.revision, row.content_revision)),
        (query.pattern, lambda row: fits(row.key.casefold()) is not None),
        (query.older_than, lambda row: now - row.stored_at >= (query.older_than or 0)),
        (query.unused_for, lambda row: now - row.used_at >= (query.unused_for or 0)),
        (query.product, lambda row: same(query.product, called(row).product)),
        (query.version, lambda row: same(query.version, row.version, called(row).version)),
        (query.language, in_language),
    ]
    due = [condition for given, condition in conditions if given is not None]
    return [row for row in rows if all(condition(row) for condition in due)]


_OF_A_ROW = [name for name in schemas.Entry.model_fields if hasattr(Row, name)]


def shown(row: Row, label: Label) -> schemas.Entry:
    step = delta_step(row.file) if row.kind is Kind.DELTA else None
    return schemas.Entry(
        **{name: getattr(row, name) for name in _OF_A_ROW},
        product=label.product,
        product_version=label.version or None,
        product_language=label.language or None,
        type=label.type or None,
        from_revision=step.from_revision if step else None,
        to_revision=step.to_revision if step else None,
    )
