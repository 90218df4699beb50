"""Sizing: what stores of other sizes would have saved."""

from pydantic import Field

from gup.control.api import schemas
from gup.control.api.endpoint import Days, Endpoint, Table, Text
from gup.control.api.statistics import Form
from gup.control.size_curve import DAYS
from gup.control.state import ControlState
from gup.units import parse_size

_MOST_SIZES = 12
_SIZE = r"([0-9]{1,15}|[0-9]{1,6}(\.[0-9]{1,3})?(kB|MB|GB|TB|KiB|MiB|GiB|TiB))"


class Sizes(Form):
    """Which sizes, and which time."""

    days: Days = Field(DAYS, description="The last so many days, as far as they are recorded.")
    sizes: Text | None = Field(
        None,
        description="Sizes of the store with commas, such as 20GB,40GB; default: a curve from a quarter of "
        "the present size to all that was asked for.",
        pattern=rf"^{_SIZE}(,{_SIZE}){{0,{_MOST_SIZES - 1}}}$",
    )


async def sizing(state: ControlState, query: Sizes) -> schemas.Sizing:
    """What stores of other sizes would have saved, by a replay of the recorded demand."""
    sizes = [parse_size(text) for text in query.sizes.split(",")] if query.sizes else []
    return await state.sizing.curve(sizes, query.days)


_TABLE = Table(
    ("size_bytes", "factor", "wan_bytes", "fetches", "saved_more_bytes"), lambda report: report["points"]
)
ENDPOINTS = (
    Endpoint("GET", "/api/v1/sizing", sizing, csv=_TABLE),
    Endpoint("GET", "/api/v1/report/sizing", sizing, csv=_TABLE),
)
