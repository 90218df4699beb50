"""Work that an operator asks for: limits applied, everything verified, settings read. Does none itself."""

from aiohttp import web

from gup.control.api.answers import PLANE, answer


async def evict(request: web.Request) -> web.Response:
    """Apply the limits now."""
    done = await request.app[PLANE].space.evict()
    return answer(
        {
            "evicted": [{"key": one.key, "reason": one.reason, "size_bytes": one.size_bytes} for one in done],
            "freed_bytes": sum(one.size_bytes for one in done),
        }
    )


async def verification(request: web.Request) -> web.Response:
    """How far the last verification has come, and what it found."""
    return answer(request.app[PLANE].verification.progress())


async def verify(request: web.Request) -> web.Response:
    """Begin to look at everything in the cache directory; `repair=1` mends what is damaged."""
    verification = request.app[PLANE].verification
    repair = request.query.get("repair", "0")
    if repair not in ("0", "1"):
        raise web.HTTPBadRequest(text="repair is 0 or 1")
    if not verification.start(repair=repair == "1"):
        raise web.HTTPConflict(text="a verification is under way")
    return answer(verification.progress(), status=202)


async def reload(request: web.Request) -> web.Response:
    """Ask for the settings to be read again; whether they took is in the status."""
    request.app[PLANE].around.request_reload()
    return answer({"requested": True}, status=202)


routes = [
    web.post("/api/v1/evict", evict),
    web.get("/api/v1/verify", verification),
    web.post("/api/v1/verify", verify),
    web.post("/api/v1/reload", reload),
]
