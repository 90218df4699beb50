"""Holds: revisions that clients do not get until they are released."""

from typing import Annotated

from aiohttp import web
from pydantic import Field

from gup.cache.revision_holds import REVISION, SUBNET, Revision, RevisionHold, Subnet, Words
from gup.content.catalog import normal_moniker
from gup.control.api import schemas
from gup.control.api.endpoint import JSON, Endpoint, Request, Text
from gup.control.api.entries import labels_of, same
from gup.control.api.status import new_revisions, on_hold
from gup.control.state import ControlState

_Stream = Annotated[Text, Field(max_length=200)]
_Subnet = Annotated[Subnet, Field(json_schema_extra={"pattern": SUBNET})]
_Revision = Annotated[Revision, Field(json_schema_extra={"pattern": REVISION})]
_OF_STREAM = "The moniker, or a product as lists show it: all its streams then."


class Order(Request):
    """What to put on hold, who does it and why, and which clients may have it all the same."""

    stream: _Stream = Field(description=_OF_STREAM)
    revision: _Revision = Field(description="The revision that clients do not get.")
    except_subnets: list[_Subnet] = Field([], max_length=1000, description="Clients in these may have it.")
    reason: Words = Field("", description="Told to the clients.")
    by: Words = Field("", description="Who orders it; told to the clients.")


class Which(Request):
    """What to release."""

    stream: _Stream = Field(description=_OF_STREAM)
    revision: _Revision = Field(description="The revision that clients get again.")


async def listing(state: ControlState) -> schemas.RevisionsOnHold:
    """What is on hold, and what is new and waits."""
    new = new_revisions(state, state.holds.waiting())
    return schemas.RevisionsOnHold(holds=on_hold(state, state.holds.holds), canary=new)


async def hold(state: ControlState, query: Order) -> schemas.HoldsChanged:
    """Put a revision on hold: from now on no client gets it but those excepted."""
    given = query.model_dump(exclude={"stream"}) | {"except_subnets": tuple(query.except_subnets)}
    holds = [RevisionHold(moniker, at=state.clock(), **given) for moniker in _monikers(state, query.stream)]
    missing = await state.holds.hold(holds)
    return schemas.HoldsChanged(holds=on_hold(state, holds), canary=[], unconfirmed=list(missing))


async def release(state: ControlState, query: Which) -> schemas.HoldsChanged:
    """Release what is on hold, or is new and waits: all clients get it."""
    monikers, revision = _monikers(state, query.stream), query.revision
    found = [one for one in state.holds.holds if one.stream in monikers and one.revision == revision]
    new = [one for one in state.holds.waiting() if one[0] in monikers and one[1].revision == revision]
    if not found and not new:
        raise web.HTTPNotFound(text=f"stream, revision: {revision} of {query.stream} is not on hold")
    missing = {*(await state.holds.release(found))}
    for stream, _ in new:
        missing |= {*(await state.holds.open(stream, revision))}
    opened = new_revisions(state, new)
    return schemas.HoldsChanged(holds=on_hold(state, found), canary=opened, unconfirmed=sorted(missing))


def _monikers(state: ControlState, stream: str) -> list[str]:
    """The monikers that a text names; 404 for a product that is unknown."""
    if (moniker := normal_moniker(stream)) is not None:
        return [moniker]
    every = {*state.index.rows.streams(), *state.dependencies.catalogue_rows().streams()}
    label = labels_of(state)
    found = {one[2] for one in every if normal_moniker(one[2]) and same(stream, label(one, "").product)}
    if not found:
        raise web.HTTPNotFound(
            text=f"stream: {stream!r} is neither a moniker nor a product that is listed or stored"
        )
    return sorted(found)


ENDPOINTS = (
    Endpoint("GET", "/api/v1/holds", listing),
    Endpoint("POST", "/api/v1/holds", hold, takes=JSON, problems=(404,)),
    Endpoint("DELETE", "/api/v1/holds", release, problems=(404,)),
)
