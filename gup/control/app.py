"""The control plane's web application: routes, guard, problems, security headers. Never any figures."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from gup.control.api import (
    alarms,
    archives,
    clients,
    content,
    health,
    history,
    openapi,
    prefetch,
    reports,
    rules,
    status,
    upkeep,
)
from gup.control.api.answers import PLANE, problem
from gup.control.auth import Access, AccessRequest, is_near, refusal
from gup.control.page import routes as page
from gup.control.state import ControlState
from gup.control.tokens import presented
from gup.errors import GupError

_log = logging.getLogger("gup.control.app")
_MAX_REQUEST_BYTES = 64 * 1024
ACCESS: web.AppKey[Access] = web.AppKey("access", Access)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RESOURCES = (
    health.routes,
    status.routes,
    content.routes,
    archives.routes,
    clients.routes,
    reports.routes,
    upkeep.routes,
    alarms.routes,
    prefetch.routes,
    rules.routes,
    history.routes,
    page.routes,
    openapi.routes,
)
"""A line a resource."""


def make_app(plane: ControlState, access: Access | None = None) -> web.Application:
    """The application over `plane`; without `access` nobody may change anything."""
    app = web.Application(middlewares=[_problems, _guard], client_max_size=_MAX_REQUEST_BYTES)
    app[PLANE] = plane
    app[ACCESS] = access or Access()
    for resource in RESOURCES:
        app.add_routes(resource)
    archives.set_up(app)
    page.set_up(app)
    app.on_response_prepare.append(_security_headers)
    return app


def _address(request: web.Request, end: str) -> str | None:
    name = request.transport.get_extra_info(end) if request.transport else None
    if isinstance(name, tuple):
        return str(name[0])
    return "" if isinstance(name, str | bytes) else None  # the path of a socket in the file system


@web.middleware
async def _guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
    access = request.app[ACCESS]
    shown, peer = presented(request.headers.get("Authorization")), _address(request, "peername")
    asked = AccessRequest(
        method=request.method,
        path=request.path,
        host=request.headers.get("Host", ""),
        origin=request.headers.get("Origin"),
        fetch_site=request.headers.get("Sec-Fetch-Site"),
        peer=peer,
        local=_address(request, "sockname"),
        right=access.tokens.right(shown, near=is_near(peer)),
        bearer=shown is not None and not shown.by_browser,
    )
    refused = refusal(asked, access.door)
    if refused is not None:
        response = problem(refused.status, refused.detail)
        for challenge in refused.challenges:
            response.headers.add("WWW-Authenticate", challenge)
        if asked.right is None:
            access.note_wrong_token(peer)
        return response
    answered = await handler(request)
    if asked.changes:
        _log.info("%s %s for %s: %d", asked.method, asked.path, peer or "this machine", answered.status)
    return answered


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


async def _security_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """On every answer, just before its head leaves; those that stream too."""
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
