"""Clients as JSON: how many were seen, and who they are, page by page. Keeps none of them."""

import base64
import json
import math

from aiohttp import web
from pydantic import Field

from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, Number, Parameters, asked, describe
from gup.control.api.shapes import Seen
from gup.control.stats.clients import WINDOWS, Wanted

_NO_CURSOR = "cursor: it is not the cursor of a page before"


class Listing(Parameters):
    """Which clients to list. Text is compared without regard to capitals."""

    version: str | None = Field(None, min_length=1, description="Only those that state this version.")
    language: str | None = Field(None, min_length=1, description="Only those that state this language.")
    seen: str | None = Field(
        None, pattern="^(1h|1d|7d)$", description="Only those seen within an hour, a day, seven days."
    )
    limit: Number = Field(100, ge=1, le=1000, description="Rows of a page, at most.")
    cursor: str | None = Field(
        None, min_length=1, description="Of the page before, asked for with the same other parameters."
    )


class Client(Answer):
    """A client, called as `reports.addresses` says."""

    address: str
    first_seen_at: float
    seen_at: float
    version: str | None = Field(description="As it stated last; null when it never did.")
    language: str | None


class Clients(Answer):
    """The clients seen."""

    seen: Seen
    known: int = Field(description="Clients remembered.")
    matching: int = Field(description="How many match, on all pages.")
    clients: list[Client] = Field(description="Those seen last first.")
    cursor: str | None = Field(description="What the next page is asked for with; null on the last.")


@describe(Clients, query=Listing)
async def clients(request: web.Request) -> web.Response:
    """How many clients were seen, and who they are."""
    plane, listing = request.app[PLANE], asked(request, Listing)
    now = plane.clock()
    wanted = Wanted(
        listing.version,
        listing.language,
        now - WINDOWS[listing.seen] if listing.seen else 0.0,
        _place(listing.cursor) if listing.cursor else None,
        listing.limit + 1,
    )
    known, matching, rows = await plane.reports.clients(wanted)
    page = rows[: listing.limit]
    more = len(rows) > len(page)
    return answer(
        {
            "seen": plane.clients.counts(now),
            "known": known if plane.reports.keeps_clients else len(plane.clients),
            "matching": matching,
            "clients": [
                {
                    "address": row.name,
                    "first_seen_at": row.first_at,
                    "seen_at": row.seen_at,
                    "version": row.version or None,
                    "language": row.language or None,
                }
                for row in page
            ],
            "cursor": _cursor(page[-1].seen_at, page[-1].number) if more else None,
        }
    )


def _cursor(seen_at: float, number: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([seen_at, number]).encode()).decode()


def _place(cursor: str) -> tuple[float, int]:
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=_NO_CURSOR) from error
    match place:
        case [int() | float() as seen_at, int() as number] if math.isfinite(seen_at) and 0 <= number < 2**63:
            return float(seen_at), int(number)
    raise web.HTTPBadRequest(text=_NO_CURSOR)


routes = [web.get("/api/v1/clients", clients)]
