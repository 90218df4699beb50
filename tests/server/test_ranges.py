import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.server.ranges import MAX_RANGES, Span, parse_ranges

RFC_LENGTH = 10_000  # the body of RFC 9110 section 14.1.2's examples


@pytest.mark.parametrize(
    ("header", "spans"),
    [
        ("bytes=0-499", [Span(0, 500)]),
        ("bytes=500-999", [Span(500, 1000)]),
        ("bytes=-500", [Span(9500, 10000)]),
        ("bytes=9500-", [Span(9500, 10000)]),
        ("bytes=0-0,-1", [Span(0, 1), Span(9999, 10000)]),
        ("bytes= 0-999, 4500-5499, -1000", [Span(0, 1000), Span(4500, 5500), Span(9000, 10000)]),
        ("bytes=500-600,601-999", [Span(500, 1000)]),
        ("bytes=500-700,601-999", [Span(500, 1000)]),
    ],
)
def test_the_rfcs_own_examples(header, spans):
    assert parse_ranges(header, RFC_LENGTH) == spans


@pytest.mark.parametrize(
    ("header", "spans"),
    [
        ("bytes=0-", [Span(0, 10)]),
        ("bytes=0-99", [Span(0, 10)]),
        ("bytes=9-9", [Span(9, 10)]),
        ("bytes=-99", [Span(0, 10)]),
        ("BYTES=1-2", [Span(1, 3)]),
        ("bytes=,\t1-2 ,, ", [Span(1, 3)]),
        ("bytes=0000000000000000000000000000001-2", [Span(1, 3)]),
        ("bytes=1-" + "9" * 5000, [Span(1, 10)]),
        ("bytes=-" + "9" * 5000, [Span(0, 10)]),
        ("bytes=5-6,1-2", [Span(5, 7), Span(1, 3)]),
        ("bytes=8-9,0-1,2-3", [Span(8, 10), Span(0, 4)]),
        ("bytes=5-6,0-1,2-4", [Span(0, 7)]),
        ("bytes=20-30,1-2", [Span(1, 3)]),
        ("bytes=-0,1-2", [Span(1, 3)]),
        ("bytes=10-", []),
        ("bytes=10-20,30-", []),
        ("bytes=-0", []),
        ("bytes=" + "9" * 5000 + "-", []),
    ],
)
def test_what_lies_in_a_body_of_ten_bytes(header, spans):
    assert parse_ranges(header, 10) == spans


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_nothing_lies_in_an_empty_body(header):
    assert parse_ranges(header, 0) == []


MALFORMED = ["", "bytes", "bytes=,", "bytes=-", "bytes=1", "bytes=2-1", "bytes=1-2,4-3", "bytes=a-b"]
MALFORMED += ["bytes=1-2-3", "bytes=1 -2", "bytes=+1-2", "bytes=0x1-2", "bytes=1-2\n", "bytes=\u0661-"]
MALFORMED += ["bytes =1-2", "bytes=1-2, bytes=3-4", "items=1-2", "b\u017dtes=1-2"]


@pytest.mark.parametrize("header", MALFORMED)
def test_a_malformed_field_or_another_unit_is_ignored(header):
    assert parse_ranges(header, 10) is None


def header_of(spans):
    return "bytes=" + ",".join(f"{span.start}-{span.stop - 1}" for span in spans)


def test_as_many_ranges_as_the_limit_are_answered():
    spans = [Span(start, start + 1) for start in range(0, 2 * MAX_RANGES, 2)]
    assert parse_ranges(header_of(spans), 1000) == spans
    assert parse_ranges(header_of([*spans, Span(200, 201)]), 1000) is None


def test_two_ranges_may_overlap_but_not_three():
    assert parse_ranges("bytes=0-10,5-15,20-30,40-50", 100) == [Span(0, 16), Span(20, 31), Span(40, 51)]
    assert parse_ranges("bytes=0-10,5-15,12-20", 100) is None
    assert parse_ranges("bytes=0-,0-,0-", 100) is None
    assert parse_ranges("bytes=0-99,1-1,50-50", 100) is None
    assert parse_ranges("bytes=0-9,10-19,20-29", 100) == [Span(0, 30)]


def test_many_small_ranges_must_be_in_order():
    small = [Span(start, start + 1) for start in range(0, 100, 10)]
    assert parse_ranges(header_of(small), 100) == small
    assert parse_ranges(header_of(reversed(small)), 100) is None
    assert parse_ranges(header_of(reversed(small[:8])), 100) == small[7::-1]
    large = [Span(start, start + 128) for start in range(0, 10_000, 1000)]
    assert parse_ranges(header_of(reversed(large)), 10_000) == large[::-1]


@pytest.mark.parametrize(
    "header",
    [
        "bytes=" + "0-0," * 100_000,
        "bytes=" + "," * 400_000,
        "bytes=" + "0-," * 49 + "0-",
        "bytes=" + "-" * 400_000,
        "bytes=0" + "0" * 400_000,
        "bytes=" + " " * 400_000,
    ],
)
def test_abuse_costs_little(header):
    began = time.process_time()
    assert parse_ranges(header, 10**9) is None
    assert time.process_time() - began < 0.2


LENGTHS = st.integers(1, 60)
SPECS = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 80)).map(lambda pair: (min(pair), max(pair)))
    | st.tuples(st.integers(0, 80), st.none())
    | st.tuples(st.none(), st.integers(0, 80)),
    min_size=1,
    max_size=9,
)


def text(number):
    return "" if number is None else str(number)


def bytes_asked(specs, length):
    asked = set()
    for first, last in specs:
        if first is None:
            asked |= set(range(max(0, length - last), length))
        else:
            asked |= set(range(first, length if last is None else min(last + 1, length)))
    return asked


@given(SPECS, LENGTHS)
def test_the_spans_are_exactly_the_bytes_asked_for(specs, length):
    spans = parse_ranges("bytes=" + ", ".join(f"{text(a)}-{text(b)}" for a, b in specs), length)
    if spans is None:
        assert len(specs) > 2
        return
    answered = [position for span in spans for position in range(span.start, span.stop)]
    assert len(answered) == len(set(answered))
    assert set(answered) == bytes_asked(specs, length)
    assert all(0 <= span.start < span.stop <= length for span in spans)
    assert not {span.stop for span in spans} & {span.start for span in spans}


@given(st.text() | st.text("0123456789-, b").map("bytes=".__add__), st.integers(0, 100))
def test_any_field_is_answered(header, length):
    spans = parse_ranges(header, length)
    assert spans is None or all(0 <= span.start < span.stop <= length for span in spans)
