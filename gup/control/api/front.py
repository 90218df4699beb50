"""The page for people, as an answer. Renders nothing itself."""

import secrets

from aiohttp import web

from gup.control.api.answers import PLANE
from gup.control.api.content import labelling
from gup.control.api.listing import shown
from gup.control.page import content_security_policy, render

_NEWEST_ON_PAGE = 20


async def page(request: web.Request) -> web.Response:
    """The page for people."""
    plane = request.app[PLANE]
    label = labelling(plane)
    status = await plane.status()
    newest = [shown(row, label(row)) for row in plane.newest_entries(_NEWEST_ON_PAGE)]
    nonce = secrets.token_urlsafe(16)
    return web.Response(
        text=render(status, newest, plane.clock(), nonce),
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": content_security_policy(nonce)},
    )


routes = [web.get("/", page)]
