"""The state of the service as JSON: everything at a glance, and parts of it alone. Changes nothing."""

from typing import Any

from aiohttp import web

from gup.config import Settings
from gup.config.loading import SECRET_KEYS, mask_password
from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, describe
from gup.control.api.shapes import Fill, Status, Upstream


class Fills(Answer):
    """What is being fetched, and how many requests wait for it."""

    fills: list[Fill]
    waiters: int


class Upstreams(Answer):
    """All upstreams."""

    upstreams: list[Upstream]


@describe(Status)
async def status(request: web.Request) -> web.Response:
    """Everything at a glance."""
    return answer(await request.app[PLANE].status())


@describe(Fills)
async def fills(request: web.Request) -> web.Response:
    """What is being fetched now."""
    return answer(await request.app[PLANE].fills())


@describe(Upstreams)
async def upstreams(request: web.Request) -> web.Response:
    """Upstreams and their health."""
    return answer({"upstreams": request.app[PLANE].upstreams()})


@describe(Settings)
async def config(request: web.Request) -> web.Response:
    """The settings in force; secrets are masked."""
    return answer(masked(request.app[PLANE].settings))


def masked(settings: Settings) -> dict[str, Any]:
    """All settings as they are named in the file, without what is secret in them."""
    fields = settings.model_dump(mode="json", by_alias=True)
    for upstream in fields["upstream"]:
        for key in SECRET_KEYS & set(upstream):
            upstream[key] = dict.fromkeys(upstream[key], "***")
        if upstream["proxy"]:
            upstream["proxy"] = mask_password(upstream["proxy"])
    return fields


routes = [
    web.get("/api/v1/status", status),
    web.get("/api/v1/fills", fills),
    web.get("/api/v1/upstreams", upstreams),
    web.get("/api/v1/config", config),
]
