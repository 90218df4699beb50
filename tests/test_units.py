"""Quantities as settings spell them, and dates as HTTP writes them: read and written."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup import units
from gup.units import (
    MAX_SIZE_BYTES,
    bytes_in_words,
    format_http_date,
    parse_duration,
    parse_http_date,
    parse_rate,
    parse_size,
    time_in_words,
)

EXAMPLE = 784111777  # the moment of RFC 9110's own examples
RIGHT = {
    parse_size: {
        "20GB": 20 * 10**9, "512 KiB": 524_288, "1.5MB": 1_500_000, "4096": 4096, 96: 96, 0: 0, "1TiB": 2**40,
    },
    parse_rate: {"8MB/s": 8 * 10**6, "500 kB/s": 500_000, "0": 0, 0: 0, "unlimited": 0, 125_000: 125_000},
    parse_duration: {
        "30d": 2_592_000, "10s": 10, "250ms": 0.25, "1.5h": 5400, "2m": 120, 7: 7, "3": 3,
        "0.4ms": 0, 1.6666: 1.667,
    },
}  # fmt: skip
WRONG = {
    parse_size: [
        *("20 apples", "", "GB", "-1", "\u0661GB", "1e3", "2^4"),
        *(-1, 2.5, True, None, MAX_SIZE_BYTES + 1),
    ],
    parse_rate: ["8MB", "8Mbit/s", "fast", "8", True, -5, None],
    parse_duration: ["10 years", "", -1, True, float("inf"), float("nan"), "99999999999d", None],
}


@pytest.mark.parametrize("parse", RIGHT)
def test_quantities_are_read_and_others_are_refused(parse):
    assert {text: parse(text) for text in RIGHT[parse]} == pytest.approx(RIGHT[parse])
    for text in WRONG[parse]:
        with pytest.raises(ValueError, match="a duration" if parse is parse_duration else "size"):
            parse(text)


WORDS = {
    bytes_in_words: {
        0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_499: "999 kB", 999_500: "1.0 MB", 123_456_789: "123 MB",
        -1_500_000: "-1.5 MB", 5 * 10**18: "5000 PB",
    },
    time_in_words: {
        0.2: "0 s", 59: "59 s", 61: "1 min 1 s", 3600: "1 h", 90_000: "1 d 1 h", 90_061: "1 d 1 h"
    },
}  # fmt: skip


@pytest.mark.parametrize("in_words", WORDS)
def test_figures_for_people(in_words):
    assert {figure: in_words(figure) for figure in WORDS[in_words]} == WORDS[in_words]


@given(st.sampled_from(["size", "rate", "duration"]), st.integers(0, 10**11))
def test_a_formatted_quantity_reads_back_the_same(kind, amount):
    value = amount / 1000 if kind == "duration" else amount
    text = getattr(units, f"format_{kind}")(value)
    assert getattr(units, f"parse_{kind}")(text) == pytest.approx(value)


def test_quantities_are_spelled_shortly():
    sizes = [units.format_size(size) for size in (0, 20 * 10**9, 65536, 1_000_001)]
    assert sizes == ["0B", "20GB", "64KiB", "1000001B"]
    assert [units.format_rate(rate) for rate in (0, 8_000_000)] == ["0", "8MB/s"]
    durations = [units.format_duration(d) for d in (0, 0.25, 60, 3600, 86400, 604800)]
    assert durations == ["0s", "250ms", "60s", "60m", "24h", "7d"]


DATES = {
    "Sun, 06 Nov 1994 08:49:37 GMT": EXAMPLE,
    "Sunday, 06-Nov-94 08:49:37 GMT": EXAMPLE,
    "Sun Nov  6 08:49:37 1994": EXAMPLE,
    "Wed Nov 16 08:49:37 1994": EXAMPLE + 10 * 86400,
    "Sat, 31 Dec 2016 23:59:60 GMT": 1483228800,  # a leap second is a date
    "Wed, 31 Dec 1969 23:59:59 GMT": -1,
}
NO_DATES = [
    "",
    "Sun, 06 Nov 1994 08:49:37",
    "Sun, 06 Nov 1994 08:49:37 UTC",
    "Sun, 06 Nov 1994 08:49:37 +0000",
    "Sun, 6 Nov 1994 08:49:37 GMT",
    "sun, 06 nov 1994 08:49:37 gmt",
    "Sun, 06 Nov 1994 24:00:00 GMT",
    "Sun, 06 Nov 1994 08:60:37 GMT",
    "Sun, 06 Nov 1994 08:49:61 GMT",
    "Sun, 31 Nov 1994 08:49:37 GMT",
    "Sun, 00 Nov 1994 08:49:37 GMT",
    "Sun, 06 Nov 0000 08:49:37 GMT",
    "Sun, 29 Feb 1900 08:49:37 GMT",
    "Sun, 06 Nov 1994 08:49:37 GMT ",
    "Sun, 06 Nov 1994 08:49:37 GMT\n",
    "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
    "Sunday, 06-Nov-1994 08:49:37 GMT",
    "Sun, \u0660\u0666 Nov 1994 08:49:37 GMT",
    "784111777",
]


def test_dates_in_all_three_forms_are_read_and_others_are_none():
    assert {text: parse_http_date(text) for text in DATES} == DATES
    assert [text for text in NO_DATES if parse_http_date(text) is not None] == []
    assert format_http_date(EXAMPLE + 0.999) == "Sun, 06 Nov 1994 08:49:37 GMT"


def test_two_digits_of_a_year_mean_at_most_fifty_years_ahead():
    for text, year in (("75", 2075), ("76", 1976), ("00", 2000), ("24", 2024)):
        seconds = parse_http_date(f"Sunday, 06-Nov-{text} 08:49:37 GMT", now=1750000000.0)  # in 2025
        assert time.gmtime(seconds).tm_year == year


@given(st.integers(min_value=-2_000_000_000, max_value=250_000_000_000))
def test_a_date_is_read_as_it_was_written(seconds):
    assert parse_http_date(format_http_date(seconds)) == seconds


@given(st.text())
def test_any_text_is_answered(text):
    assert parse_http_date(text) is None
