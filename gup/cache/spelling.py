"""How upstream spells a moniker that it does not have under the client's spelling; asks by opening a body."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from gup.cache.body import Body, read_whole
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog, respelled
from gup.content.key import Variant
from gup.content.routes import Route, Routes
from gup.errors import Problem

_CATALOG = Routes().route(CATALOG_PATH)


class _Opened(Protocol):
    @property
    def body(self) -> Body: ...


Open = Callable[[Route, Variant], Awaitable[_Opened]]
"""Cache.open."""


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
        opened = await open_(_CATALOG, variant)
    except Problem:
        return None
    try:
        text = await read_whole(opened.body, MAX_CATALOG_BYTES)
        if len(text) < min(opened.body.end() or 0, MAX_CATALOG_BYTES):
            return None  # it broke off: what is missing may be what is asked for
        return parse_catalog(text)
    finally:
        opened.body.leave()
