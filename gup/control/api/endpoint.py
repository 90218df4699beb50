"""Endpoints: functions that take a checked request model and return a response model, as aiohttp routes.

Routes and the OpenAPI document are made from the same rows.
"""

import asyncio
import csv
import io
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from inspect import signature
from typing import Annotated, Any, NamedTuple

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError
from pydantic.json_schema import models_json_schema

import gup
from gup.config.loading import complaints
from gup.control.api.schemas import Problem, Response
from gup.control.state import ControlState

STATE: web.AppKey[ControlState] = web.AppKey("state", ControlState)
_BODY_SECONDS = 15.0
JSON, CSV, TEXT = "application/json", "text/csv", "text/plain"


class Request(BaseModel):
    """A request's parameters: parts of its path, query parameters, members of its body. Base: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _digits(value: object) -> object:
    """Without signs, spaces and underscores, which pydantic accepts."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit() and len(value) < 19):
        raise ValueError("must be a whole number")
    return value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_digits)]
Days = Annotated[int, Field(ge=1, le=3660), BeforeValidator(_digits)]
Seconds = Annotated[int, Field(ge=0, le=10**10), BeforeValidator(_digits)]


class Table(NamedTuple):
    """A response as CSV (RFC 4180): the columns, and the rows of a response."""

    columns: tuple[str, ...]
    rows: Callable[[dict[str, Any]], Iterable[dict[str, Any]]]

    def csv(self, response: dict[str, Any]) -> str:
        """Times are UTC. Text like a formula is quoted: clients may state any text."""
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(self.columns)
        for row in self.rows(response):
            table.writerow(_cell(name, row.get(name)) for name in self.columns)
        return text.getvalue()


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _cell(name: str, value: Any) -> object:
    if name.endswith("_at") and value:
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One request and the function that answers it.

    The function gets what the types of its parameters name: the ControlState, the web.Request, a Request
    model, whose fields come from the path and the query or, with `takes` JSON, from the body. It returns a
    model, which is sent as JSON or, where the request states so, as lines of `csv`; or a response of one of
    the types in `media`. Its docstring is the summary. `problems` are further statuses.
    """

    method: str
    path: str
    function: Callable[..., Awaitable[BaseModel | web.StreamResponse]]
    status: int = 200
    problems: tuple[int, ...] = ()
    media: tuple[str, ...] = (JSON,)
    takes: str = ""
    csv: Table | None = None

    @property
    def parameters(self) -> dict[str, type]:
        return {name: one.annotation for name, one in signature(self.function).parameters.items()}

    @property
    def request_model(self) -> type[Request]:
        return next((kind for kind in self.parameters.values() if issubclass(kind, Request)), Request)

    @property
    def returns(self) -> type[Any]:
        kind: type[Any] = signature(self.function).return_annotation
        return kind

    def route(self) -> web.RouteDef:
        """For aiohttp, which accepts braces in a part of a path, as monikers have, only with a pattern."""
        path = re.sub(r"{(\w+)}", r"{\1:[^/]+}", self.path)
        head = {"allow_head": self.returns is not web.StreamResponse} if self.method == "GET" else {}
        return web.RouteDef(self.method, path, self._handle, head)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        checked = await self._checked(request)
        values = {ControlState: request.app[STATE], web.Request: request, type(checked): checked}
        answer = await self.function(**{name: values[kind] for name, kind in self.parameters.items()})
        if isinstance(answer, web.StreamResponse):
            return answer
        if self.csv is not None and getattr(checked, "format", "") == "csv":
            return web.Response(text=self.csv.csv(answer.model_dump()), content_type=CSV, charset="utf-8")
        text = answer.model_dump_json(by_alias=True, exclude_unset=isinstance(answer, Response))
        return web.json_response(text=text, status=self.status)

    async def _checked(self, request: web.Request) -> Request:
        """The checked parameters; 400 with an explanation when one is wrong."""
        model, in_path = self.request_model, dict(request.match_info)
        given, what = dict[str, Any](request.query), "parameter"
        for name in given:
            if name in in_path or len(request.query.getall(name)) > 1:
                raise web.HTTPBadRequest(text=f"the parameter {name} is given twice")
        takes_any = model.model_fields.keys() > in_path.keys() and self.takes != JSON
        if self.takes == JSON and not given:
            given, what, takes_any = await _members(request), "member", True
        if given and not takes_any:
            names = ", ".join(map(repr, given))
            raise web.HTTPBadRequest(text=f"this request takes no {what}, and {names} was given")
        try:
            return model.model_validate(given | in_path)
        except ValidationError as error:
            text = "; ".join(complaints(error, model, lambda _: ""))
            raise web.HTTPBadRequest(text=text.replace("unknown key", f"unknown {what}")) from error


async def _members(request: web.Request) -> dict[str, Any]:
    if request.content_type != JSON:
        raise web.HTTPUnsupportedMediaType(text=f"the body must be {JSON}")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            values = await request.json()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text="the body took too long to arrive") from error
    except (ValueError, LookupError, RecursionError) as error:  # LookupError: an unknown charset
        raise web.HTTPBadRequest(text=f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise web.HTTPBadRequest(text="the body must be a JSON object")
    return values


def problem(status: int, detail: str, **more: object) -> web.Response:
    """A problem document (RFC 9457); its type is the status code's meaning."""
    fields = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return web.json_response(fields | more, status=status, content_type="application/problem+json")


# --- the OpenAPI document

_ALWAYS = (400, 401, 403, 503)
"""Problems of every request: a wrong parameter, no token, a wrong token or foreign page, an internal failure.
"""
_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "From listen.admin_token_file, or from listen.admin_read_token_file to read only; on the "
    "service's own machine also from run/admin-token in its cache directory.",
}
_REF = "#/components/schemas/{model}"
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


class Document(RootModel[dict[str, Any]]):
    """An OpenAPI document."""


ENDPOINTS: web.AppKey[Sequence[Endpoint]] = web.AppKey("endpoints", Sequence)


async def openapi(request: web.Request) -> Document:
    """The description of the API."""
    return await asyncio.to_thread(document, request.app[ENDPOINTS])


def document(endpoints: Sequence[Endpoint]) -> Document:
    returned = [each.returns for each in endpoints if issubclass(each.returns, BaseModel)]
    taken = [each.request_model for each in endpoints if each.takes == JSON]
    models: list[type[BaseModel]] = [Problem, *returned, *taken]
    refs, found = models_json_schema(
        [(model, "serialization") for model in dict.fromkeys(models)], ref_template=_REF
    )
    contents = {model: {"schema": ref} for (model, _), ref in refs.items()}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, contents)
    about = "Sizes are bytes, times Unix seconds, durations seconds."
    return Document(
        {
            "openapi": "3.1.0",
            "info": {"title": "gup: the control plane", "version": gup.__version__, "description": about},
            "servers": [{"url": "/"}],
            "paths": paths,
            "components": {"schemas": _plain(found["$defs"]), "securitySchemes": {"token": _TOKEN}},
        }
    )


def _plain(schema: Any) -> Any:
    """The schema with bounds under their names in JSON Schema."""
    if isinstance(schema, dict):
        return {_BOUNDS.get(word, word): _plain(value) for word, value in schema.items()}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


def _operation(endpoint: Endpoint, contents: dict[type, dict[str, Any]]) -> dict[str, Any]:
    method, path, text = endpoint.method, endpoint.path, {"schema": {"type": "string"}}
    content = dict.fromkeys(endpoint.media, text) | ({CSV: text} if endpoint.csv else {})
    if endpoint.returns in contents:
        content[JSON] = contents[endpoint.returns]
    problems = sorted({*_ALWAYS, *endpoint.problems, *([415] if endpoint.takes == JSON else [])})
    refused = {"application/problem+json": contents[Problem]}
    described: dict[str, Any] = {
        "summary": (endpoint.function.__doc__ or "").splitlines()[0].strip(),
        "operationId": f"{method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path.lower()).strip('_')}",
        "tags": [path.removeprefix("/api/v1").split("/")[1]],
        "parameters": [] if endpoint.takes == JSON else list(_parameters(endpoint)),
        "security": [*([{}] if method == "GET" else []), {"token": []}],
        "responses": {
            str(status): {"description": HTTPStatus(status).phrase, "content": sent}
            for status, sent in [(endpoint.status, content), *((status, refused) for status in problems)]
        },
    }
    if endpoint.takes:
        body = contents.get(endpoint.request_model, {"schema": {"type": "string", "format": "binary"}})
        described["requestBody"] = {"required": True, "content": {endpoint.takes: body}}
    return described


def _parameters(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    schema = _plain(endpoint.request_model.model_json_schema(ref_template=_REF))
    for name, field in schema.get("properties", {}).items():
        in_path = f"{{{name}}}" in endpoint.path
        choice = next(one for one in field.get("anyOf", [field]) if one != {"type": "null"})
        yield {
            "name": name,
            "in": "path" if in_path else "query",
            "required": in_path or name in schema.get("required", ()),
            "schema": {word: value for word, value in choice.items() if word not in ("description", "title")},
            "description": field.get("description", ""),
        }
