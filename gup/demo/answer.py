"""How the simulated management server answers conditions and ranges (RFC 9110 sections 13, 14). Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from typing import Literal

_SINGLE_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Validators:
    """What a stored file is known by: a strong entity tag (with its quotes) and a date in whole seconds."""

    etag: str
    modified: datetime

    @property
    def last_modified(self) -> str:
        return format_datetime(self.modified.astimezone(UTC), usegmt=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and the half-open span of the body to send; empty for 304 and 416."""

    status: Literal[200, 206, 304, 416]
    start: int
    stop: int


def decide(headers: Mapping[str, str], known: Validators, length: int) -> Answer:
    """The answer to a GET or HEAD with `headers` (looked up without case) for a file of `length` bytes."""
    if _unchanged(headers, known):
        return Answer(304, 0, 0)
    if "Range" not in headers or not _range_holds(headers, known):
        return Answer(200, 0, length)
    return _ranged(headers["Range"], length)


def _unchanged(headers: Mapping[str, str], known: Validators) -> bool:
    """RFC 9110 section 13.2.2: If-Modified-Since counts only without If-None-Match."""
    if "If-None-Match" in headers:
        tags = [tag.strip().removeprefix("W/") for tag in headers["If-None-Match"].split(",")]
        return "*" in tags or known.etag in tags
    since = _date(headers.get("If-Modified-Since"))
    return since is not None and known.modified <= since


def _range_holds(headers: Mapping[str, str], known: Validators) -> bool:
    """RFC 9110 section 13.1.5: a strong tag or the exact date, else the range is ignored."""
    condition = headers.get("If-Range")
    if condition is None or condition == known.etag:
        return True
    return _date(condition) == known.modified


def _date(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text) if text else None
    except ValueError:
        return None


def _ranged(text: str, length: int) -> Answer:
    """RFC 9110 section 14.2: what is no single byte range is ignored; a range past the end is refused."""
    match = _SINGLE_RANGE.fullmatch(text.strip())
    if match is None or not (match[1] or match[2]):
        return Answer(200, 0, length)
    if not match[1]:
        start, stop = max(0, length - int(match[2])), length
    else:
        start, stop = int(match[1]), min(length, int(match[2]) + 1) if match[2] else length
        if match[2] and int(match[2]) < int(match[1]):
            return Answer(200, 0, length)
    if start >= stop:
        return Answer(416, 0, 0)
    return Answer(206, start, stop)
