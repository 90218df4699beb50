"""Managers' catalogues: read through the store, kept for the workers, used to spell monikers."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, PlainSerializer

from gup.cache.body import read_whole
from gup.cache.open_entries import Opened
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog, respelled
from gup.content.key import Variant
from gup.content.routes import Route, Routes
from gup.errors import Problem
from gup.files import replace_file
from gup.upstream.download import Fetched

FILE = "catalogs.json"


_COLUMNS = [column.name for column in fields(Listed)]


def _by_moniker(rows: object) -> object:
    """Members to be checked; what is no list of rows stays, and is refused."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        return rows
    return {str(row[0]).upper(): dict(zip(_COLUMNS, row, strict=False)) for row in rows}


def _as_rows(rows: Mapping[str, Listed] | None) -> list[tuple[str, ...]] | None:
    return None if rows is None else [astuple(row) for row in rows.values()]


@dataclass(frozen=True, slots=True)
class Kept:
    """One upstream's catalogue. `rows` is None when none was ever read from `source`, a URL or a path.

    `problem` is why the last attempt failed, if it did. Times are Unix seconds. The validators are upstream's
    own.
    """

    source: str
    rows: Annotated[Mapping[str, Listed] | None, BeforeValidator(_by_moniker), PlainSerializer(_as_rows)] = (
        field(default=None, repr=False)
    )
    read_at: float | None = None
    problem: str | None = None
    etag: str | None = None
    last_modified: str | None = None


class _Document(BaseModel):
    upstreams: dict[str, Kept]
    format: Literal[1] = 1


def read_kept(run: Path) -> dict[str, Kept]:
    """By the upstream's name; empty when there is no file, or it can't be read. Blocks."""
    try:
        return _Document.model_validate_json((run / FILE).read_bytes()).upstreams
    except (OSError, ValueError):
        return {}


def write_kept(run: Path, kept: dict[str, Kept]) -> None:
    """Replace the file, durably. OSError when the disk refuses: the old one stays. Blocks."""
    replace_file(run / FILE, _Document(upstreams=kept).model_dump_json().encode())


_CATALOG = Routes().route(CATALOG_PATH)
Open = Callable[[Route, Variant], Awaitable[Opened]]


async def read_catalogue(open_: Open, variant: Variant) -> Fetched:
    """The catalogue of the variant's manager, with upstream's validators. Problem when it can't be had."""
    opened = await open_(_CATALOG, variant)
    try:
        text = await read_whole(opened.body, MAX_CATALOG_BYTES)
        if len(text) < MAX_CATALOG_BYTES and len(text) != opened.body.end():
            raise Problem("upstream-bad-body", f"{CATALOG_PATH} broke off")  # the missing rest may matter
        head = opened.body.head
        return Fetched(text, head.upstream_etag, head.last_modified)
    finally:
        opened.body.leave()


async def spell(open_: Open, route: Route, variant: Variant) -> str | None:
    """The path with the moniker as the manager's catalogue spells it, or in upper case without one.

    An upstream's file system may be case-sensitive; clients' spellings differ (FIELD).
    """
    if not route.stream.startswith("{"):
        return None
    try:
        fetched = await read_catalogue(open_, variant)
    except Problem:
        return respelled(route.upstream_path, route.stream)
    assert fetched.text is not None
    row = parse_catalog(fetched.text).get(route.stream)
    return respelled(route.upstream_path, row.moniker) if row is not None else None
