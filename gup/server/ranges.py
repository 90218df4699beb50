"""The Range field (RFC 9110 section 14): which spans of a body are asked for."""

import re
from typing import NamedTuple

MAX_RANGES = 50
"""More ranges than this are ignored, and the whole body is sent (RFC 9110 section 14.2 allows it)."""

_MAX_OVERLAPPING = 2
_MAX_UNORDERED_SMALL = 8
_SMALL_BYTES = 128  # about what a part of a multipart body costs besides its bytes

_HUGE = 1 << 62
_UNIT = re.compile(r"bytes=(.*)", re.IGNORECASE | re.ASCII)
_SPEC = re.compile(r"([0-9]*)-([0-9]*)")


class Span(NamedTuple):
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


def parse_ranges(header: str, length: int) -> list[Span] | None:
    """The spans of a body of `length` bytes that a Range field asks for, in its order.

    None: answer as if the field were absent, for it is malformed, of another unit or abusive. Empty: no range
    can be satisfied. Spans that overlap or touch are merged, at the place of the first one named.
    """
    specs = _specs(header)
    if specs is None:
        return None
    spans = [span for span in (_span(first, last, length) for first, last in specs) if span]
    return None if _abusive(spans) else _merged(spans)


def _specs(header: str) -> list[tuple[int | None, int | None]] | None:
    """First and last positions as written, one may be absent; None when the set of ranges is malformed."""
    found = _UNIT.fullmatch(header)
    if not found or found[1].count(",") >= 2 * MAX_RANGES:
        return None
    # RFC 9110 section 5.6.1: empty elements of a list are skipped, a few of them at least.
    texts = [text for text in (part.strip(" \t") for part in found[1].split(",")) if text]
    specs = [_spec(text) for text in texts[: MAX_RANGES + 1]]
    if not specs or len(specs) > MAX_RANGES:
        return None
    valid = [spec for spec in specs if spec]
    return valid if len(valid) == len(specs) else None


def _spec(text: str) -> tuple[int | None, int | None] | None:
    found = _SPEC.fullmatch(text)
    if not found:
        return None
    first, last = _position(found[1]), _position(found[2])
    if first is None:
        return None if last is None else (first, last)
    return None if last is not None and last < first else (first, last)


def _position(digits: str) -> int | None:
    if not digits:
        return None
    # Beyond every body; also keeps int() away from numbers of thousands of digits.
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 18 else _HUGE


def _span(first: int | None, last: int | None, length: int) -> Span | None:
    """The part of a range that lies in the body; None when there is none (it can't be satisfied)."""
    if first is None:
        assert last is not None  # the length of a suffix
        span = Span(max(0, length - last), length)
    else:
        span = Span(first, length if last is None else min(last + 1, length))
    return span if span.start < span.stop else None


def _abusive(spans: list[Span]) -> bool:
    # RFC 9110 section 14.2 names both: more than two that overlap, and many small ones out of order.
    ordered = sorted(spans, key=_start)
    small = sum(span.stop - span.start < _SMALL_BYTES for span in spans)
    return _overlapping(ordered) > _MAX_OVERLAPPING or (small > _MAX_UNORDERED_SMALL and spans != ordered)


def _overlapping(ordered: list[Span]) -> int:
    """How many spans share a byte with another."""
    return sum(
        any(span.start < other.stop and other.start < span.stop for other in ordered if other is not span)
        for span in ordered
    )


def _merged(spans: list[Span]) -> list[Span]:
    groups: list[tuple[int, Span]] = []  # where in the field a group was first named, and its span
    for place, span in sorted(enumerate(spans), key=lambda item: item[1].start):
        if groups and span.start <= groups[-1][1].stop:
            first_place, group = groups[-1]
            groups[-1] = (min(first_place, place), Span(group.start, max(group.stop, span.stop)))
        else:
            groups.append((place, span))
    return [span for _, span in sorted(groups, key=lambda group: group[0])]


def _start(span: Span) -> int:
    return span.start
