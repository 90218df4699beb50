"""Work that an operator asks for: limits applied, everything verified, settings read. Does none itself."""

from typing import Literal

from aiohttp import web
from pydantic import Field

from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, Parameters, asked, describe


class OneEvicted(Answer):
    """What went, and why."""

    key: str
    reason: str
    size_bytes: int


class Evicted(Answer):
    """All that went."""

    evicted: list[OneEvicted]
    freed_bytes: int


class Found(Answer):
    """What was wrong."""

    where: str = Field(description="body, record, part, state, stray or index.")
    path: str
    key: str | None
    detail: str
    mended: bool | None = Field(description="Null when that was not asked for.")
    why_not: str | None


class Verification(Answer):
    """How far a verification has come, and what it found."""

    running: bool
    repair: bool
    began_at: float | None
    ended_at: float | None
    failed: str | None = Field(description="Why it ended early.")
    checked: int
    total: int
    busy: int = Field(description="Left out: somebody worked on them.")
    damaged: int
    mended: int
    found: list[Found]


class Verify(Parameters):
    """What to do with what is damaged."""

    repair: Literal["0", "1"] = Field("0", description="1 mends what is damaged.")


class Reloaded(Answer):
    """Whether the settings took; if not, those before them stay in force."""

    reloaded: bool
    problems: list[str] = Field(description="What is wrong with the settings, each with its key.")


@describe(Evicted)
async def evict(request: web.Request) -> web.Response:
    """Apply the limits now."""
    done = await request.app[PLANE].evictor.evict()
    return answer(
        {
            "evicted": [{"key": one.key, "reason": one.reason, "size_bytes": one.size_bytes} for one in done],
            "freed_bytes": sum(one.size_bytes for one in done),
        }
    )


@describe(Verification)
async def verification(request: web.Request) -> web.Response:
    """How far the last verification has come, and what it found."""
    return answer(request.app[PLANE].verification.progress())


@describe(Verification, status=202, query=Verify, problems=(409,))
async def verify(request: web.Request) -> web.Response:
    """Begin to look at everything in the cache directory."""
    verification = request.app[PLANE].verification
    if not verification.start(repair=asked(request, Verify).repair == "1"):
        raise web.HTTPConflict(text="a verification is under way")
    return answer(verification.progress(), status=202)


@describe(Reloaded)
async def reload(request: web.Request) -> web.Response:
    """Have the settings read again."""
    problems = await request.app[PLANE].dependencies.reload()
    return answer({"reloaded": not problems, "problems": list(problems)})


routes = [
    web.post("/api/v1/evict", evict),
    web.get("/api/v1/verify", verification),
    web.post("/api/v1/verify", verify),
    web.post("/api/v1/reload", reload),
]
