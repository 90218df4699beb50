"""The Range field (RFC 9110 section 14)."""

import re
from itertools import pairwise
from typing import NamedTuple

MAX_RANGES = 50  # more get the whole body (RFC 9110 section 14.2 allows it)
_MAX_OVERLAPPING = 2
_MAX_UNORDERED_SMALL = 8
_SMALL_BYTES = 128  # about what a part of a multipart body costs besides its bytes
_HUGE = 1 << 62
_SPEC = re.compile(r"([0-9]*)-([0-9]*)")


class Span(NamedTuple):
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


def parse_ranges(header: str, length: int) -> list[Span] | None:
    """The spans of a body of `length` bytes that a Range field requests, in its order.

    None: treat the field as absent, since it is malformed, of another unit or abusive. Empty: no range can be
    satisfied. Spans that overlap or touch are merged, at the position of the first.
    """
    unit, _, rest = header.partition("=")
    if unit.lower() != "bytes" or rest.count(",") >= 2 * MAX_RANGES:
        return None
    # RFC 9110 section 5.6.1: empty list elements are skipped, up to a limit.
    specs = [text for text in (part.strip(" \t") for part in rest.split(",")) if text]
    if not specs or len(specs) > MAX_RANGES:
        return None
    spans = []
    for text in specs:
        found = _SPEC.fullmatch(text)
        if not found or text == "-":
            return None
        first, last = _position(found[1]), _position(found[2])
        if not found[1]:  # the length of a suffix
            span = Span(max(0, length - last), length)
        elif not found[2]:
            span = Span(first, length)
        elif last < first:
            return None
        else:
            span = Span(first, min(last + 1, length))
        if span.start < span.stop:  # else it is outside the body
            spans.append(span)
    return None if _abusive(spans) else _merged(spans)


def _position(digits: str) -> int:
    # Beyond every body; also keeps int() away from numbers of thousands of digits.
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 18 else _HUGE


def _abusive(spans: list[Span]) -> bool:
    # RFC 9110 section 14.2 names both: more than two that overlap, and many small ones out of order.
    overlapping = sum(
        any(span.start < other.stop and other.start < span.stop for other in spans if other is not span)
        for span in spans
    )
    small = sum(span.stop - span.start < _SMALL_BYTES for span in spans)
    unordered = any(span.start > after.start for span, after in pairwise(spans))
    return overlapping > _MAX_OVERLAPPING or (small > _MAX_UNORDERED_SMALL and unordered)


def _merged(spans: list[Span]) -> list[Span]:
    groups: list[tuple[int, Span]] = []  # position in the field where a group was first named, and its span
    for place, span in sorted(enumerate(spans), key=lambda item: item[1].start):
        if groups and span.start <= groups[-1][1].stop:
            first_place, group = groups[-1]
            groups[-1] = (min(first_place, place), Span(group.start, max(group.stop, span.stop)))
        else:
            groups.append((place, span))
    return [span for _, span in sorted(groups, key=lambda group: group[0])]
