"""The WAN's budget, and outbreaks, which open it for definitions."""

from typing import Annotated

from aiohttp import web
from pydantic import BeforeValidator, Field

from gup.cache.revision_holds import Words
from gup.control.api import schemas
from gup.control.api.endpoint import JSON, Endpoint, Request
from gup.control.api.status import outbreak_of
from gup.control.outbreak import LEAST_SECONDS, MOST_SECONDS
from gup.control.state import ControlState
from gup.units import parse_duration


class Order(Request):
    """For how long, who orders it and why."""

    duration: Annotated[float, BeforeValidator(parse_duration), Field(ge=LEAST_SECONDS, le=MOST_SECONDS)] = (
        Field(description='Such as "4h", or seconds; at most 7 days.')
    )
    reason: Words = Field("", description="Shown wherever the outbreak is.")
    by: Words = Field("", description="Who orders it.")


class End(Request):
    """Who ends it."""

    by: Words = Field("", description="Who ends it.")


async def budget(state: ControlState) -> schemas.Budget:
    """The WAN's budget: what is used of it, what is held back, and when it runs out."""
    return state.budget.standing()


async def outbreak(state: ControlState) -> schemas.OutbreakState:
    """Whether there is an outbreak."""
    return schemas.OutbreakState(outbreak=outbreak_of(state))


async def begin(state: ControlState, query: Order) -> schemas.OutbreakChanged:
    """Open everything for definitions for some hours; one that stands is replaced."""
    missing = await state.outbreak.begin(query.duration, query.by, query.reason)
    return schemas.OutbreakChanged(outbreak=outbreak_of(state), unconfirmed=list(missing))


async def end(state: ControlState, query: End) -> schemas.OutbreakChanged:
    """End the outbreak before its time."""
    if state.outbreak.now is None:
        raise web.HTTPNotFound(text="there is no outbreak")
    missing = await state.outbreak.end(query.by)
    return schemas.OutbreakChanged(outbreak=outbreak_of(state), unconfirmed=list(missing))


ENDPOINTS = (
    Endpoint("GET", "/api/v1/budget", budget),
    Endpoint("GET", "/api/v1/outbreak", outbreak),
    Endpoint("POST", "/api/v1/outbreak", begin, takes=JSON),
    Endpoint("DELETE", "/api/v1/outbreak", end, problems=(404,)),
)
