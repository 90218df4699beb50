"""The description of the API (OpenAPI 3.1), made from what stands beside the handlers; adds nothing to it."""

import asyncio
import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import gup
from gup.control.api.answers import answer
from gup.control.api.described import JSON, Answer, Operation, describe, operation_of

_PROBLEM_JSON = "application/problem+json"
_REF = "#/components/schemas/"
_SAFE = ("GET", "HEAD")
_SAFE_NAME = r"^[^./\\\u0000-\u001f\u007f-\u009f\u2028\u2029][^/\\\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"
_PATH_PART = {"type": "string", "minLength": 1, "maxLength": 240, "pattern": _SAFE_NAME}
_PATH_WORDS = {
    "version": "Version of the content, or any.",
    "language": "Language of the content, or any.",
    "stream": "The moniker.",
    "revision": "The revision's folder.",
    "file": "The file's name.",
}
_ALWAYS = (401, 403, 503)
"""Problems that any request can get: no token, one that does not do or a foreign page, something broken."""
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "From listen.admin_token_file, or from listen.admin_read_token_file to read only; on the "
    "service's own machine also from run/admin-token in its cache directory.",
}


class Problem(Answer):
    """What was wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class Document(Answer):
    """An OpenAPI document."""

    openapi: str
    info: dict[str, Any]
    servers: list[dict[str, Any]]
    paths: dict[str, Any]
    components: dict[str, Any]


@describe(Document)
async def openapi(request: web.Request) -> web.Response:
    """The description of the API."""
    found = list(request.app.router.routes())
    return answer(await asyncio.to_thread(document, found))


routes = [web.get("/api/v1/openapi.json", openapi)]


def document(found: Iterable[web.AbstractRoute]) -> dict[str, Any]:
    """The description of those routes whose handlers are described."""
    operations: list[tuple[str, str, Operation]] = []
    for route in found:
        operation = operation_of(route.handler)
        if operation is not None and route.method != "HEAD" and route.resource is not None:
            operations.append((route.resource.canonical, route.method, operation))
    schemas = _Schemas(operation for _, _, operation in operations)
    paths: dict[str, dict[str, Any]] = {}
    for path, method, operation in operations:
        paths.setdefault(path, {})[method.lower()] = _operation(path, method, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gup: the control plane",
            "version": gup.__version__,
            "description": "Sizes are bytes, times Unix seconds, durations seconds.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas.shown, "securitySchemes": {"token": _TOKEN}},
    }


class _Schemas:
    """The schemas of all models: `shown` are those that answers and bodies need, by name."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        models: dict[type[BaseModel], None] = {Problem: None}
        queries: dict[type[BaseModel], None] = {}
        for operation in operations:
            models |= dict.fromkeys(model for model in (operation.answer, operation.body) if model)
            queries[operation.query] = None
        refs, found = models_json_schema(
            [(model, "serialization") for model in (*models, *queries)], ref_template=_REF + "{model}"
        )
        self._names = {model: str(ref["$ref"]).removeprefix(_REF) for (model, _), ref in refs.items()}
        definitions: dict[str, Any] = _plain(found["$defs"])
        self._queries = {model: definitions.pop(self._names[model]) for model in queries}
        self.shown = definitions

    def ref(self, model: type[BaseModel]) -> dict[str, str]:
        return {"$ref": _REF + self._names[model]}

    def parameters(self, query: type[BaseModel]) -> Iterator[dict[str, Any]]:
        schema = self._queries[query]
        for name, field in schema.get("properties", {}).items():
            choices = [choice for choice in field.get("anyOf", [field]) if choice != {"type": "null"}]
            yield {
                "name": name,
                "in": "query",
                "required": name in schema.get("required", ()),
                "schema": {word: value for word, value in choices[0].items() if word not in _WORDS},
                "description": field.get("description", ""),
            }


_WORDS = ("description", "title")


def _plain(schema: Any) -> Any:
    """The schema with bounds under the names that JSON Schema has for them."""
    if isinstance(schema, dict):
        return {_BOUNDS.get(word, word): _plain(value) for word, value in schema.items()}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


def _operation(path: str, method: str, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _PATH_PART, "description": _PATH_WORDS[name]}
        for name in re.findall(r"{(\w+)}", path)
    ]
    parameters += schemas.parameters(operation.query)
    problems = {400, *_ALWAYS, *operation.problems, *([415] if operation.body else [])}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path.lower()).strip('_')}",
        "tags": [path.removeprefix("/api/v1").split("/")[1]],
        "parameters": parameters,
        "security": [{}, {"token": []}] if method in _SAFE else [{"token": []}],
        "responses": {str(operation.status): _good(operation, schemas)}
        | {str(status): _problem(status, schemas) for status in sorted(problems)},
    }
    if operation.body is not None:
        content = {JSON: {"schema": schemas.ref(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.takes:
        content = {operation.takes: {"schema": {"type": "string", "format": "binary"}}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _good(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    model = schemas.ref(operation.answer) if operation.answer is not None else {"type": "string"}
    content = {media: {"schema": model if media == JSON else {"type": "string"}} for media in operation.media}
    return {"description": HTTPStatus(operation.status).phrase, "content": content}


def _problem(status: int, schemas: _Schemas) -> dict[str, Any]:
    return {
        "description": HTTPStatus(status).phrase,
        "content": {_PROBLEM_JSON: {"schema": schemas.ref(Problem)}},
    }
