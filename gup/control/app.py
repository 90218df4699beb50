"""The control plane's web application: routes, guard, problems, security headers. Never any figures."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from gup.control.api import alarms, content, front, health, openapi, prefetch, status, upkeep
from gup.control.api.answers import PLANE, problem
from gup.control.guard import Asked, refusal
from gup.control.plane import Plane
from gup.errors import GupError

_log = logging.getLogger("gup.control.app")
_MAX_REQUEST_BYTES = 64 * 1024
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RESOURCES = (
    front.routes,
    health.routes,
    status.routes,
    content.routes,
    upkeep.routes,
    alarms.routes,
    prefetch.routes,
    openapi.routes,
)
"""A line a resource."""


def make_app(plane: Plane) -> web.Application:
    """The application over `plane`."""
    app = web.Application(
        middlewares=[_security_headers, _problems, _guard], client_max_size=_MAX_REQUEST_BYTES
    )
    app[PLANE] = plane
    for resource in RESOURCES:
        app.add_routes(resource)
    return app


def _address(request: web.Request, end: str) -> str | None:
    name = request.transport.get_extra_info(end) if request.transport else None
    return str(name[0]) if isinstance(name, tuple) else None


@web.middleware
async def _guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
    asked = Asked(
        method=request.method,
        path=request.path,
        host=request.headers.get("Host", ""),
        origin=request.headers.get("Origin"),
        fetch_site=request.headers.get("Sec-Fetch-Site"),
        peer=_address(request, "peername"),
        local=_address(request, "sockname"),
    )
    why = refusal(asked, request.app[PLANE].settings.listen.admin_address)
    if why is not None:
        return problem(403, why)
    return await handler(request)


@web.middleware
async def _problems(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """The one place where what went wrong becomes a problem document (RFC 9457)."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        response = problem(error.status, error.text or "")
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except (GupError, OSError) as error:
        _log.warning("%s %s: %s", request.method, request.path, error)
        return problem(503, str(error))
    except Exception:  # noqa: BLE001 - our own mistake becomes a 500, logged
        _log.exception("%s %s failed", request.method, request.path)
        return problem(500, HTTPStatus(500).description)


@web.middleware
async def _security_headers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    response = await handler(request)
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["Cache-Control"] = "no-store"
    return response
