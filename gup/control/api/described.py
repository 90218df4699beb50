"""What a request takes and what answers it, beside its handler; checks what comes. Answers nothing itself.

The description at `/api/v1/openapi.json` is made from the same values, so it can't say other than what holds.
"""

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from gup.config.loading import complaints

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
JSON = "application/json"


_OPERATION = "operation"


class Answer(BaseModel):
    """What a handler answers, described; handlers give plain values, and tests hold them against this."""


class Parameters(BaseModel):
    """The parameters of a request, or the members of its body; by itself, a request that takes none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_ASKED: web.RequestKey[Parameters] = web.RequestKey("asked", Parameters)
_GIVEN: web.RequestKey[Parameters] = web.RequestKey("given", Parameters)


@dataclass(frozen=True, slots=True)
class Operation:
    """One request. `answer` None: not JSON. `problems` are statuses besides those of every request."""

    summary: str
    status: int
    answer: type[BaseModel] | None
    query: type[Parameters]
    body: type[Parameters] | None
    media: tuple[str, ...]
    takes: str
    problems: tuple[int, ...]


def describe(
    answer: type[BaseModel] | None,
    *,
    status: int = 200,
    query: type[Parameters] = Parameters,
    body: type[Parameters] | None = None,
    media: tuple[str, ...] = (JSON,),
    takes: str = "",
    problems: tuple[int, ...] = (),
) -> Callable[[Handler], Handler]:
    """Around a handler, whose docstring's first line is the summary.

    Parameters other than those of `query`, and values that it does not allow, get 400 before the handler is
    called; it reads them by `asked`. Likewise for `body`, read by `given`. `takes` is the type of a body that
    the handler reads itself.
    """

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def checked(request: web.Request) -> web.StreamResponse:
            request[_ASKED] = _parameters(request, query)
            if body is not None:
                request[_GIVEN] = await _members(request, body)
            return await handler(request)

        summary = (handler.__doc__ or "").splitlines()[0].strip()
        operation = Operation(summary, status, answer, query, body, media, takes, problems)
        checked.__dict__[_OPERATION] = operation
        return checked

    return decorate


def operation_of(handler: object) -> Operation | None:
    """The description of a handler, None when it has none."""
    found = getattr(handler, "__dict__", {}).get(_OPERATION)
    return found if isinstance(found, Operation) else None


_A = TypeVar("_A", bound=Parameters)


def asked(request: web.Request, kind: type[_A]) -> _A:
    """The request's parameters, checked."""
    found = request[_ASKED]
    assert isinstance(found, kind)
    return found


def given(request: web.Request, kind: type[_A]) -> _A:
    """The members of the request's body, checked."""
    found = request[_GIVEN]
    assert isinstance(found, kind)
    return found


def _parameters(request: web.Request, kind: type[Parameters]) -> Parameters:
    values: dict[str, str] = {}
    for name, value in request.query.items():
        if name in values:
            raise web.HTTPBadRequest(text=f"the parameter {name} stands twice")
        values[name] = value
    return _checked(values, kind, "parameter")


async def _members(request: web.Request, kind: type[Parameters]) -> Parameters:
    if request.content_type != JSON:
        raise web.HTTPUnsupportedMediaType(text=f"the body must be {JSON}")
    try:
        values = await request.json()
    except (ValueError, LookupError, RecursionError) as error:  # LookupError: an unknown charset
        raise web.HTTPBadRequest(text=f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise web.HTTPBadRequest(text="the body must be a JSON object")
    return _checked(values, kind, "member")


def _checked(values: Mapping[str, Any], kind: type[Parameters], what: str) -> Parameters:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told = "; ".join(complaints(error, kind, lambda _: "")).replace("unknown key", f"unknown {what}")
        if not kind.model_fields:
            told = f"this request takes no {what}, and {', '.join(map(repr, values))} was given"
        raise web.HTTPBadRequest(text=told) from error


def _digits(value: object) -> object:
    """Only plain digits are a number: no sign, space or underscore, which pydantic would take."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit() and len(value) < 19):
        raise ValueError("must be a whole number")
    return value


Number = Annotated[int, BeforeValidator(_digits)]
"""A whole number in a query."""
