"""Dates as HTTP writes them: read and written."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.units import format_http_date, parse_http_date

EXAMPLE = 784111777  # the moment of RFC 9110's own examples
IN_2025 = 1750000000.0


@pytest.mark.parametrize(
    "text",
    [
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
    ],
)
def test_the_three_forms_are_one_moment(text):
    assert parse_http_date(text) == EXAMPLE


def test_an_asctime_day_may_have_two_digits():
    assert parse_http_date("Wed Nov 16 08:49:37 1994") == EXAMPLE + 10 * 86400


@pytest.mark.parametrize(
    ("text", "year"),
    [
        ("Sunday, 06-Nov-75 08:49:37 GMT", 2075),
        ("Sunday, 06-Nov-76 08:49:37 GMT", 1976),
        ("Sunday, 06-Nov-00 08:49:37 GMT", 2000),
        ("Sunday, 06-Nov-24 08:49:37 GMT", 2024),
    ],
)
def test_two_digits_of_a_year_mean_at_most_fifty_years_ahead(text, year):
    seconds = parse_http_date(text, now=IN_2025)
    assert seconds is not None
    assert time.gmtime(seconds).tm_year == year


def test_a_leap_second_is_a_date():
    assert parse_http_date("Sat, 31 Dec 2016 23:59:60 GMT") == 1483228800


def test_dates_before_1970_are_negative():
    assert parse_http_date("Wed, 31 Dec 1969 23:59:59 GMT") == -1


@pytest.mark.parametrize(
    "text",
    [
        *("", "Sun, 06 Nov 1994 08:49:37", "Sun, 06 Nov 1994 08:49:37 UTC"),
        *("Sun, 06 Nov 1994 08:49:37 +0000", "Sun, 6 Nov 1994 08:49:37 GMT"),
        *("sun, 06 nov 1994 08:49:37 gmt", "Sun, 06 Nov 1994 24:00:00 GMT"),
        *("Sun, 06 Nov 1994 08:60:37 GMT", "Sun, 06 Nov 1994 08:49:61 GMT"),
        *("Sun, 31 Nov 1994 08:49:37 GMT", "Sun, 00 Nov 1994 08:49:37 GMT"),
        *("Sun, 06 Nov 0000 08:49:37 GMT", "Sun, 29 Feb 1900 08:49:37 GMT"),
        *("Sun, 06 Nov 1994 08:49:37 GMT ", "Sun, 06 Nov 1994 08:49:37 GMT\n"),
        "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
        *("Sunday, 06-Nov-1994 08:49:37 GMT", "Sun, \u0660\u0666 Nov 1994 08:49:37 GMT", "784111777"),
    ],
)
def test_malformed_dates_are_none(text):
    assert parse_http_date(text) is None


def test_fractions_are_cut():
    assert format_http_date(EXAMPLE + 0.999) == "Sun, 06 Nov 1994 08:49:37 GMT"


@given(st.integers(min_value=-2_000_000_000, max_value=250_000_000_000))
def test_a_date_is_read_as_it_was_written(seconds):
    assert parse_http_date(format_http_date(seconds)) == seconds


@given(st.text())
def test_any_text_is_answered(text):
    assert parse_http_date(text) is None
