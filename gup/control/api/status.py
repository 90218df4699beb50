"""The state of the service as JSON: everything at a glance, and the clients seen. Changes nothing."""

from aiohttp import web

from gup.control.api.answers import PLANE, answer

_CLIENTS_SHOWN = 1000


async def status(request: web.Request) -> web.Response:
    """Everything at a glance."""
    return answer(await request.app[PLANE].status())


async def clients(request: web.Request) -> web.Response:
    """How many clients were seen, and the last of them."""
    plane = request.app[PLANE]
    newest = plane.clients.newest(_CLIENTS_SHOWN)
    return answer(
        {
            "seen": plane.clients.counts(plane.clock()),
            "known": len(plane.clients),
            "clients": [{"address": address, "seen_at": at} for address, at in newest],
        }
    )


routes = [
    web.get("/api/v1/status", status),
    web.get("/api/v1/clients", clients),
]
