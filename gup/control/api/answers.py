"""What handlers share: the plane they ask, JSON and problem documents, keys in URLs. Handles no request."""

import json
from http import HTTPStatus
from typing import Any

from aiohttp import web

from gup.content.key import ContentKey
from gup.control.state import ControlState

PLANE: web.AppKey[ControlState] = web.AppKey("plane", ControlState)
_PARTS = ("version", "language", "stream", "revision", "file")
KEY = "/".join(f"{{{part}:[^/]+}}" for part in _PARTS)
"""A content key in a route's path."""


def problem(status: int, detail: str, **more: object) -> web.Response:
    """A problem document (RFC 9457); its type is the status code's meaning."""
    fields = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return web.json_response(fields | more, status=status, content_type="application/problem+json")


def answer(fields: Any, status: int = 200) -> web.Response:
    """`fields` as JSON."""
    return web.json_response(fields, status=status, dumps=lambda value: json.dumps(value, ensure_ascii=False))


def key_of(request: web.Request) -> ContentKey:
    """The key in the request's path; 400 when it is none."""
    try:
        return ContentKey.parse("/".join(request.match_info[part] for part in _PARTS))
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
