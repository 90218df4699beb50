"""Dates as HTTP writes them (RFC 9110 section 5.6.7); knows no header and no time zone but GMT."""

import re
import time
from calendar import timegm
from datetime import date

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_LONG_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_DAY = "|".join(_DAYS)
_LONG_DAY = "|".join(_LONG_DAYS)
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_CLOCK = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"

_FORMS = (
    re.compile(rf"(?:{_DAY}), (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_CLOCK} GMT"),
    re.compile(rf"(?:{_LONG_DAY}), (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_CLOCK} GMT"),
    re.compile(rf"(?:{_DAY}) {_MONTH} (?P<day>[0-9]{{2}}| [0-9]) {_CLOCK} (?P<year>[0-9]{{4}})"),
)
"""IMF-fixdate, the form of RFC 850, the form of asctime. Whether the name of the day fits is not checked."""


def parse_http_date(text: str, *, now: float | None = None) -> int | None:
    """Unix seconds of a date in any of the three forms; None when it is malformed or no such day exists.

    `now` (Unix seconds, the system's clock when None) decides the century of a two-digit year.
    """
    for form in _FORMS:
        found = form.fullmatch(text)
        if found:
            return _seconds(found, time.time() if now is None else now)
    return None


def format_http_date(seconds: float) -> str:
    """`seconds` (Unix time, cut to whole ones) as an IMF-fixdate, whatever the locale."""
    moment = time.gmtime(seconds // 1)
    return (
        f"{_DAYS[moment.tm_wday]}, {moment.tm_mday:02} {_MONTHS[moment.tm_mon - 1]} {moment.tm_year:04} "
        f"{moment.tm_hour:02}:{moment.tm_min:02}:{moment.tm_sec:02} GMT"
    )


def _seconds(found: re.Match[str], now: float) -> int | None:
    year, month = int(found["year"]), _MONTHS.index(found["month"]) + 1
    hour, minute, second = int(found["hour"]), int(found["minute"]), int(found["second"])
    if len(found["year"]) == 2:
        year = _full_year(year, time.gmtime(now).tm_year)
    if hour > 23 or minute > 59 or second > 60:  # 60 is a leap second (RFC 9110 section 5.6.7)
        return None
    try:
        day = date(year, month, int(found["day"]))
    except ValueError:
        return None
    return timegm((day.year, day.month, day.day, hour, minute, second))


def _full_year(two_digits: int, this_year: int) -> int:
    # RFC 9110 section 5.6.7: what seems more than 50 years ahead is the last year before with these digits.
    year = this_year - this_year % 100 + two_digits
    return year - 100 if year > this_year + 50 else year
