"""What is fetched ahead: the list of it, and what an operator adds. Fetches nothing itself."""

import re
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import AfterValidator, Field

from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, Number, Parameters, asked, describe, given
from gup.control.prefetch import MAX_QUEUED, Busy, NotThereError, QueuedFetch
from gup.control.state import ControlState

_SHOWN = 100
_LETTER = r"[A-Za-z0-9_{}$!&'()*+,;=:@~-]|%7[BbDd]|%2[0-46-9A-Da-d]"
_NAME = rf"(?:{_LETTER})(?:{_LETTER}|\.){{0,230}}"
_PATH = f"^(?:/{_NAME}){{1,8}}$"


def _path(text: str) -> str:
    if not re.fullmatch(_PATH, text):
        raise ValueError("must be a path such as /content/{MONIKER}/260101001/full.zip")
    return text


class Wanted(Answer):
    """One body to fetch ahead, and what became of it."""

    key: str
    path: str = Field(description="As upstream is asked for it.")
    product: str
    language: str
    kind: Literal["full", "delta", "index", "other"]
    by: Literal["traffic", "operator"]
    outcome: Literal["queued", "fetching", "stored", "present", "absent", "failed", "superseded"]
    detail: str = Field(description="Why it is absent, failed, superseded, or tried again.")
    asked_at: float
    ended_at: float | None
    tries: int


class LeftOut(Answer):
    """A stream of which nothing is fetched ahead, and why."""

    stream: str
    product: str
    why: str


class Ordered(Answer):
    """What was put on the list, for each variant that fits."""

    wanted: list[Wanted]


class Prefetched(Answer):
    """The list, the latest first."""

    enabled: bool
    pending: int
    wanted: list[Wanted]
    left_out: list[LeftOut]


class Order(Parameters):
    """What to fetch. Without version and language: for each that an upstream has."""

    path: Annotated[str, AfterValidator(_path)] = Field(
        description="Such as /content/{MONIKER}/260101001/full.zip.", json_schema_extra={"pattern": _PATH}
    )
    version: str | None = Field(None, max_length=64, description="As an upstream's setting has it.")
    language: str | None = Field(None, max_length=64, description="As an upstream's setting has it.")


class Shown(Parameters):
    """How much of the list."""

    limit: Annotated[Number, Field(ge=1, le=MAX_QUEUED)] = Field(_SHOWN, description="How many at most.")


@describe(Ordered, status=202, body=Order, problems=(404,))
async def order(request: web.Request) -> web.Response:
    """Fetch something before anybody asks for it, while no client's fill needs the link."""
    plane, what = request.app[PLANE], given(request, Order)
    try:
        wishes = plane.prefetcher.order(what.path, what.version, what.language)
    except NotThereError as error:
        raise web.HTTPNotFound(text=str(error)) from error
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    except Busy as error:
        raise web.HTTPServiceUnavailable(text=str(error)) from error
    return answer({"wanted": [_wanted(plane, wish) for wish in wishes]}, status=202)


@describe(Prefetched, query=Shown)
async def listing(request: web.Request) -> web.Response:
    """What is being fetched ahead, what will be, and what became of the rest."""
    plane = request.app[PLANE]
    wishes = list(plane.prefetcher.queue)[::-1][: asked(request, Shown).limit]
    return answer(
        {
            "enabled": plane.settings.prefetch.enabled,
            "pending": plane.prefetcher.queue.pending,
            "wanted": [_wanted(plane, wish) for wish in wishes],
            "left_out": [
                {"stream": "/".join(stream), "product": plane.label(stream)[0], "why": why}
                for stream, why in plane.prefetcher.left_out.items()
            ],
        }
    )


def _wanted(plane: ControlState, wish: QueuedFetch) -> dict[str, Any]:
    product, language = plane.label((wish.key.version, wish.key.language, wish.key.stream))
    return {
        "key": wish.key.text,
        "path": wish.path,
        "product": product,
        "language": language,
        "kind": str(wish.kind),
        "by": wish.by,
        "outcome": str(wish.outcome),
        "detail": wish.detail,
        "asked_at": wish.asked_at,
        "ended_at": wish.ended_at,
        "tries": wish.tries,
    }


routes = [web.get("/api/v1/prefetch", listing), web.post("/api/v1/prefetch", order)]
