"""Conditional requests (RFC 9110 section 13)."""

import re

from gup.server.request import Request
from gup.units import parse_http_date

_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_TAGS = re.compile(rf"[ \t,]*{_ETAG.pattern}(?:[ \t]*,[ \t,]*{_ETAG.pattern})*(?:[ \t]*,[ \t,]*)?")


def evaluate(request: Request, etag: str | None, last_modified: str | None) -> int | None:
    """The status that a GET or HEAD gets by its conditions, in the order of section 13.2.2: 304, 412 or None.

    The body exists; a validator that it lacks is None. A malformed date is ignored, a malformed list of tags
    matches nothing.
    """
    changed = _date(last_modified)
    tags = request.header("if-match")
    if tags is not None:
        holds = _any_match(tags, etag, weak=False)
    else:
        since = _date(request.header("if-unmodified-since"))
        holds = since is None or changed is None or changed <= since
    if not holds:
        return 412
    tags = request.header("if-none-match")
    if tags is not None:
        unmodified = _any_match(tags, etag, weak=True)
    else:
        since = _date(request.header("if-modified-since"))
        unmodified = since is not None and changed is not None and changed <= since
    return 304 if unmodified else None


def range_allowed(request: Request, etag: str | None, last_modified: str | None) -> bool:
    """Whether If-Range (section 13.1.5) permits a range: it is absent, or has the same strong tag or date."""
    validator = request.header("if-range")
    if validator is None:
        return True
    if _ETAG.fullmatch(validator):
        return validator == etag and not validator.startswith("W/")
    date = parse_http_date(validator)
    return date is not None and date == _date(last_modified)


def _any_match(tags: str, etag: str | None, *, weak: bool) -> bool:
    """By the weak or the strong comparison (section 8.8.3.2)."""
    if tags.strip(" \t") == "*":
        return True
    if etag is None or not _TAGS.fullmatch(tags):
        return False
    if weak:
        return etag.removeprefix("W/") in {tag.removeprefix("W/") for tag in _ETAG.findall(tags)}
    return not etag.startswith("W/") and etag in _ETAG.findall(tags)


def _date(text: str | None) -> int | None:
    return None if text is None else parse_http_date(text)
