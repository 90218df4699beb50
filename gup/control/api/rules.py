"""What the delivery rules decide for a client that states this, and why; changes nothing."""

import asyncio
from typing import Any

from aiohttp import web
from pydantic import Field

from gup.content.catalog import normal_moniker
from gup.content.rules import Rulebook
from gup.content.variant_choice import explain
from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, Parameters, asked, describe
from gup.control.state import ControlState


class Question(Parameters):
    """Which stream, and what a client states."""

    moniker: str = Field(min_length=1, description="The stream: a GUID, with braces or without.")
    client_version: str | None = Field(None, description="What the client states, such as 14.3 RU2.")
    client_language: str | None = Field(None, description="What the client states, such as French or fr.")
    upstream: str | None = Field(None, min_length=1, description="Only at the upstream of this name.")


class Side(Answer):
    """A client, or whom a stream is for; null is not stated, or any."""

    version: str | None
    language: str | None


class Remedy(Answer):
    """A way out."""

    action: str = Field(description="A word for programs.")
    text: str
    url: str = Field("", description="The LiveUpdate server's, where that is the way.")


class Decided(Answer):
    """What is decided at one upstream."""

    upstream: str
    catalogue: str = Field(description="Where its catalogue was read, or why not.")
    product: str | None
    product_language: str | None
    refused: bool = Field(description="Whether that is enforced.")
    allowed: bool
    rule: str | None = Field(description="Which rule refuses.")
    because: str
    type: str | None = Field(description="Type of content.")
    client: Side
    fits: Side
    remedies: list[Remedy]
    notes: list[str]


class Explanation(Answer):
    """The decisions at all upstreams."""

    moniker: str
    mode: str = Field(description="enforce, report or off.")
    allowed: bool = Field(description="At any of them that has content under /content/.")
    served_from: str | None = Field(description="The upstream that the client would be served from.")
    decisions: list[Decided]
    client_notes: list[str] = Field(description="What is stated and can't be read.")


@describe(Explanation, query=Question)
async def explained(request: web.Request) -> web.Response:
    """What the delivery rules decide, and why."""
    plane, question = request.app[PLANE], asked(request, Question)
    moniker = normal_moniker(question.moniker)
    if moniker is None:
        raise web.HTTPBadRequest(text=f"moniker: {question.moniker!r} is no GUID, with braces or without")
    names = [upstream.name for upstream in plane.settings.upstream]
    if question.upstream is not None and question.upstream not in names:
        raise web.HTTPBadRequest(text=f"upstream: {question.upstream!r} is none of {', '.join(names)}")
    return answer(await asyncio.to_thread(_explain, plane, moniker, question))


def _explain(plane: ControlState, moniker: str, question: Question) -> dict[str, Any]:
    """In a thread: what languages are called is read from tables when it is first asked for."""
    settings = plane.settings
    book = Rulebook(settings)
    client = book.identities.stated(question.client_version, question.client_language)
    chosen = [u for u in settings.upstream if question.upstream in (None, u.name)]
    return explain(book, plane.dependencies.catalogue_rows(), chosen, _sources(plane), moniker, client)


def _sources(plane: ControlState) -> dict[str, str]:
    """Where each upstream's catalogue comes from, as for the command."""
    kinds = {upstream.name: upstream.kind for upstream in plane.settings.upstream}
    sources = {name: "LiveUpdate has no catalogue" for name, kind in kinds.items() if kind == "liveupdate"}
    for name, kept in plane.dependencies.catalogues().items():
        read, source = kept["streams"] is not None, str(kept["source"])
        sources[name] = source if read else f"{source} can't be read ({kept['problem']})"
    return sources


routes = [web.get("/api/v1/rules/explain", explained)]
