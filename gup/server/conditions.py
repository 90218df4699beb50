"""Conditional requests (RFC 9110 section 13)."""

import re
from collections.abc import Callable
from enum import StrEnum

from gup.server.request import Request
from gup.units import parse_http_date


class Verdict(StrEnum):
    """What a request's conditions leave to be done."""

    SERVE = "serve"
    NOT_MODIFIED = "not_modified"
    FAILED = "failed"


_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_SEPARATOR = re.compile(r"[ \t]*(?:,[ \t]*)+")


def evaluate(request: Request, etag: str | None, last_modified: str | None) -> Verdict:
    """The conditions of a GET or HEAD against the validators of the body, in the order of section 13.2.2.

    The body exists; a validator that it does not have is None. A malformed date is no condition, a malformed
    list of tags matches nothing.
    """
    if not _holds(request, etag, last_modified):
        return Verdict.FAILED
    return Verdict.NOT_MODIFIED if _unmodified(request, etag, last_modified) else Verdict.SERVE


def range_allowed(request: Request, etag: str | None, last_modified: str | None) -> bool:
    """Whether If-Range (section 13.1.5) lets a range be answered: absent, same strong tag or same date."""
    validator = request.header("if-range")
    if validator is None:
        return True
    if _ETAG.fullmatch(validator):
        return etag is not None and _strongly_equal(validator, etag)
    date = parse_http_date(validator)
    return date is not None and date == _date(last_modified)


def _holds(request: Request, etag: str | None, last_modified: str | None) -> bool:
    """If-Match, or else If-Unmodified-Since: is it still the body that the client means?"""
    tags = request.header("if-match")
    if tags is not None:
        return _any_match(tags, etag, _strongly_equal)
    since = _date(request.header("if-unmodified-since"))
    changed = _date(last_modified)
    return since is None or changed is None or changed <= since


def _unmodified(request: Request, etag: str | None, last_modified: str | None) -> bool:
    """If-None-Match, or else If-Modified-Since: does the client have this body already?"""
    tags = request.header("if-none-match")
    if tags is not None:
        return _any_match(tags, etag, _weakly_equal)
    since = _date(request.header("if-modified-since"))
    changed = _date(last_modified)
    return since is not None and changed is not None and changed <= since


def _any_match(tags: str, etag: str | None, equal: Callable[[str, str], bool]) -> bool:
    if tags.strip(" \t") == "*":
        return True
    return etag is not None and any(equal(tag, etag) for tag in _tags(tags))


def _tags(text: str) -> list[str]:
    """The tags of a list; none when it is malformed."""
    tags: list[str] = []
    separator = _SEPARATOR.match(text)
    place = separator.end() if separator else 0
    while place < len(text):
        tag = _ETAG.match(text, place)
        if not tag:
            return []
        tags.append(tag[0])
        separator = _SEPARATOR.match(text, tag.end())
        place = separator.end() if separator else tag.end()
        if not separator and place < len(text):
            return []
    return tags


def _strongly_equal(one: str, other: str) -> bool:
    return one == other and not one.startswith("W/")


def _weakly_equal(one: str, other: str) -> bool:
    return one.removeprefix("W/") == other.removeprefix("W/")


def _date(text: str | None) -> int | None:
    return None if text is None else parse_http_date(text)
