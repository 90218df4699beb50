"""The control plane's web application: its endpoints and page, tokens, problems, security headers."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from gup.cache.archive import ArchiveError
from gup.control.api import archives, entries, maintenance, statistics, status
from gup.control.api.endpoint import ENDPOINTS, STATE, Endpoint, openapi, problem
from gup.control.auth import Access, AccessRequest, is_near, refusal
from gup.control.page import live
from gup.control.reconcile import BusyError
from gup.control.state import ControlState
from gup.control.tokens import presented
from gup.errors import GupError

_log = logging.getLogger("gup.control.application")
_MAX_REQUEST_BYTES = 64 * 1024
ACCESS: web.AppKey[Access] = web.AppKey("access", Access)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(state: ControlState, access: Access | None = None) -> web.Application:
    """The application over `state`; without `access` nobody may change anything."""
    app = web.Application(middlewares=[_problems, _guard], client_max_size=_MAX_REQUEST_BYTES)
    app[STATE] = state
    app[ACCESS] = access or Access()
    app[ENDPOINTS] = (
        *status.ENDPOINTS,
        *entries.ENDPOINTS,
        *archives.Archives().endpoints,
        *statistics.ENDPOINTS,
        *maintenance.ENDPOINTS,
        *live.ENDPOINTS,
        Endpoint("GET", "/api/v1/openapi.json", openapi),
    )
    app.add_routes(endpoint.route() for endpoint in app[ENDPOINTS])
    live.set_up(app)
    app.on_response_prepare.append(_security_headers)
    return app


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
    refused = refusal(asked, access.listener)
    if refused is not None:
        response = problem(refused.status, refused.detail)
        for challenge in refused.challenges:
            response.headers.add("WWW-Authenticate", challenge)
        if asked.right is None:
            access.note_wrong_token(peer)
        return response
    answer = await handler(request)
    if asked.changes:
        _log.info("%s %s for %s: %d", asked.method, asked.path, peer or "this machine", answer.status)
    return answer


def _address(request: web.Request, end: str) -> str | None:
    name = request.transport.get_extra_info(end) if request.transport else None
    if isinstance(name, tuple):
        return str(name[0])
    return "" if isinstance(name, str | bytes) else None  # the path of a socket in the file system


@web.middleware
async def _problems(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """The one place where what went wrong becomes a problem document (RFC 9457)."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        response = problem(error.status, error.text or "")
        for name in ("Allow", "Retry-After"):
            if name in error.headers:
                response.headers[name] = error.headers[name]
        return response
    except BusyError as error:
        return problem(409, str(error))
    except ArchiveError as error:
        return problem(400, str(error))
    except (GupError, OSError) as error:
        _log.warning("%s %s: %s", request.method, request.path, error)
        return problem(503, str(error))
    except Exception:  # noqa: BLE001 - our own mistake becomes a 500, logged
        _log.exception("%s %s failed", request.method, request.path)
        return problem(500, HTTPStatus(500).description)


async def _security_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """On every response, just before its head is sent; on streams too."""
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
