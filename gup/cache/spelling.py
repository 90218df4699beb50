"""How upstream spells a moniker that it does not have under the client's spelling; asks by opening a body."""

from collections.abc import Mapping

from gup.cache.catalogue_body import Open, read_catalogue
from gup.content.catalog import Listed, parse_catalog, respelled
from gup.content.key import Variant
from gup.content.routes import Route
from gup.errors import Problem


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
