"""A manager's catalogue by way of the store, as clients get it: one fetch for all; understands nothing."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from gup.cache.body import Body, read_whole
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES
from gup.content.key import Variant
from gup.content.routes import Route, Routes
from gup.errors import Problem
from gup.upstream.download import Fetched

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
