"""Sizing: what stores of other sizes would have saved."""

from aiohttp import web
from pydantic import Field

from gup.control.api import schemas
from gup.control.api.endpoint import Days, Endpoint, Table, Text
from gup.control.api.statistics import Form
from gup.control.sizing import DAYS
from gup.control.state import ControlState
from gup.units import parse_size

_MOST_SIZES = 12
_LEAST_BYTES = 10**6


class Sizes(Form):
    """Which sizes, and which time."""

    days: Days = Field(DAYS, description="The last so many days, as far as they are recorded.")
    sizes: Text | None = Field(
        None,
        description="Sizes of the store with commas, such as 20GB,40GB; default: a curve from a quarter of "
        "the present size to all that was asked for.",
        max_length=400,
    )


async def sizing(state: ControlState, query: Sizes) -> schemas.Sizing:
    """What stores of other sizes would have saved, by a replay of the recorded demand."""
    sizes = []
    for text in query.sizes.split(",") if query.sizes else ():
        try:
            size = parse_size(text.strip())
        except ValueError as error:
            raise web.HTTPBadRequest(text=f"sizes: {text.strip()!r:.60} is not right: {error}") from error
        if size < _LEAST_BYTES:
            raise web.HTTPBadRequest(text=f'sizes: {text.strip()!r:.60} is not right: must be at least "1MB"')
        sizes.append(size)
    if len(sizes) > _MOST_SIZES:
        raise web.HTTPBadRequest(text=f"sizes: {len(sizes)} were given; at most {_MOST_SIZES} are compared")
    return await state.sizing.curve(sizes, query.days)


_TABLE = Table(
    ("size_bytes", "factor", "wan_bytes", "fetches", "saved_more_bytes"), lambda report: report["points"]
)
ENDPOINTS = (
    Endpoint("GET", "/api/v1/sizing", sizing, csv=_TABLE),
    Endpoint("GET", "/api/v1/report/sizing", sizing, csv=_TABLE),
)
