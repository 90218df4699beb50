"""Managers' catalogues: read through the store, kept for the workers, asked how a moniker is spelled."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gup.cache.body import Body, read_whole
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog, respelled
from gup.content.key import Variant
from gup.content.routes import Route, Routes
from gup.errors import Problem
from gup.fsutil import replace_file
from gup.upstream.download import Fetched

FILE = "catalogs.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """One upstream's catalogue. `rows` is None when none was ever read from `source`, a URL or a path.

    `problem` is why the last try failed, None when it did not. Times are Unix seconds. The validators are
    upstream's own.
    """

    source: str
    rows: Mapping[str, Listed] | None = field(default=None, repr=False)
    read_at: float | None = None
    problem: str | None = None
    etag: str | None = None
    last_modified: str | None = None

    def to_json(self) -> dict[str, Any]:
        rows = None
        if self.rows is not None:
            rows = [[row.moniker, row.product, row.language, row.version] for row in self.rows.values()]
        return {name: getattr(self, name) for name in self.__slots__} | {"rows": rows}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Kept":
        """KeyError, TypeError or ValueError when `fields` are none."""
        rows = None
        if fields["rows"] is not None:
            listed = [Listed(*(str(text) for text in row)) for row in fields["rows"]]
            rows = {row.moniker.upper(): row for row in listed}
        read_at = fields["read_at"]
        texts = {name: fields[name] for name in ("problem", "etag", "last_modified")}
        return cls(
            source=str(fields["source"]),
            rows=rows,
            read_at=None if read_at is None else float(read_at),
            **{name: None if text is None else str(text) for name, text in texts.items()},
        )


def read_kept(run: Path) -> dict[str, Kept]:
    """What is kept, by the upstream's name; empty when there is nothing, or it can't be read. Blocks."""
    try:
        document = json.loads((run / FILE).read_bytes())
        if document["format"] != _FORMAT:
            return {}
        return {str(name): Kept.from_json(fields) for name, fields in document["upstreams"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_kept(run: Path, kept: Mapping[str, Kept]) -> None:
    """Replace the file, durably. OSError when the disk refuses: the old one stays. Blocks."""
    document = {"format": _FORMAT, "upstreams": {name: one.to_json() for name, one in kept.items()}}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    replace_file(run / FILE, text.encode())


_CATALOG = Routes().route(CATALOG_PATH)


class _Opened(Protocol):
    @property
    def body(self) -> Body: ...


Open = Callable[[Route, Variant], Awaitable[_Opened]]
"""Cache.open."""


async def read_catalogue(open_: Open, variant: Variant) -> Fetched:
    """The catalogue of the variant's manager, with upstream's validators. Problem when it can't be had."""
    opened = await open_(_CATALOG, variant)
    try:
        text = await read_whole(opened.body, MAX_CATALOG_BYTES)
        if len(text) < MAX_CATALOG_BYTES and len(text) != opened.body.end():
            raise Problem("upstream-bad-body", f"{CATALOG_PATH} broke off")  # the rest may be what matters
        head = opened.body.head
        return Fetched(text, head.upstream_etag, head.last_modified)
    finally:
        opened.body.leave()


async def spell(open_: Open, route: Route, variant: Variant) -> str | None:
    """The path with the moniker as the manager's catalogue spells it, or in upper case without one.

    An upstream's file system may tell upper from lower case; clients' spellings differ (FIELD).
    """
    if not route.stream.startswith("{"):
        return None
    listed = await _catalog(open_, variant)
    if listed is None:
        return respelled(route.upstream_path, route.stream)
    row = listed.get(route.stream)
    return respelled(route.upstream_path, row.moniker) if row is not None else None


async def _catalog(open_: Open, variant: Variant) -> Mapping[str, Listed] | None:
    """The catalogue of the variant's manager; None when it has none or can't be asked."""
    try:
        fetched = await read_catalogue(open_, variant)
    except Problem:
        return None
    assert fetched.text is not None
    return parse_catalog(fetched.text)
