"""For machines that watch: liveness, readiness, metrics. Never an opinion of its own."""

from aiohttp import web

from gup.control.api.answers import PLANE, problem
from gup.control.api.described import describe
from gup.control.exposition import expose


@describe(None, media=("text/plain",))
async def healthz(_request: web.Request) -> web.Response:
    """The process lives and its loop turns."""
    return web.Response(text="ok\n")


@describe(None, media=("text/plain",))
async def readyz(request: web.Request) -> web.Response:
    """Content can be served; 503 says why not."""
    reasons = request.app[PLANE].not_ready()
    if reasons:
        return problem(503, "; ".join(reasons), reasons=reasons)
    return web.Response(text="ready\n")


@describe(None, media=("text/plain", "application/openmetrics-text"))
async def metrics(request: web.Request) -> web.Response:
    """The exposition, as text or OpenMetrics."""
    figures = await request.app[PLANE].figures()
    body, content_type = expose(figures, request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


routes = [
    web.get("/healthz", healthz),
    web.get("/readyz", readyz),
    web.get("/metrics", metrics),
]
