"""How sizes, rates, durations and HTTP dates are written: text to bytes and seconds, and back."""

import re
import time
from calendar import timegm
from datetime import date
from email.utils import formatdate
from functools import lru_cache

_SIZE_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")
_SHARE = re.compile(r"\s*([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*%\s*")
_MOST_SHARE = 10.0

MAX_SIZE_BYTES = 2**60
"""Larger sizes are mistakes, and would not fit the 64-bit words of counters and limits."""

MAX_DURATION_SECONDS = 100 * 365 * 86400.0


def _checked_size(size_bytes: int) -> int:
    if not 0 <= size_bytes <= MAX_SIZE_BYTES:
        raise ValueError(f"a size lies between 0 and {MAX_SIZE_BYTES >> 40} TiB")
    return size_bytes


def parse_size(value: object) -> int:
    """Bytes in a size such as "20GB", "512 KiB", "4096" or 4096; ValueError says what would be right."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _checked_size(value)
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    unit = match[2] or "B" if match else ""
    if match is None or unit not in _SIZE_UNITS:
        raise ValueError('a size is a number with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as "20GB"')
    return _checked_size(round(float(match[1]) * _SIZE_UNITS[unit]))


def parse_rate(value: object) -> int:
    """Bytes per second in a rate such as "8MB/s"; 0 is unlimited. ValueError says what would be right."""
    text = value.strip() if isinstance(value, str) else ""
    if text in ("0", "unlimited"):
        return 0
    if text.endswith("/s"):
        return parse_size(text.removesuffix("/s"))
    if isinstance(value, int) and not isinstance(value, bool):
        return _checked_size(value)
    raise ValueError('a rate is a size for each second, such as "8MB/s" or "500kB/s"; "0" is unlimited')


def parse_duration(value: object) -> float:
    """Seconds in a duration such as "30d", "10s" or 10, to a millisecond; ValueError says what is right."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    seconds: float
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value  # as it is: not every whole number is a float
    elif match is not None and (match[2] or "s") in _DURATION_UNITS:
        seconds = float(match[1]) * _DURATION_UNITS[match[2] or "s"]
    else:
        raise ValueError('a duration is a number with ms, s, m, h or d, such as "30d" or "10s"')
    if not 0 <= seconds <= MAX_DURATION_SECONDS:
        raise ValueError("a duration lies between 0 and 100 years")
    return round(float(seconds), 3)  # as `format_duration` writes it


def parse_share(value: object) -> float:
    """A share of one in a percentage such as "70%"; ValueError says what would be right."""
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    share = float(match[1]) / 100 if match else value
    if not isinstance(share, float) or not 0 <= share <= _MOST_SHARE:
        raise ValueError('a share is a percentage from 0% to 1000%, such as "70%"')
    return share


def format_size(size_bytes: int) -> str:
    """The shortest exact spelling, such as "20GB" or "64KiB"; parse_size reads it back."""
    exact = [(size_bytes // unit, name) for name, unit in _SIZE_UNITS.items() if size_bytes % unit == 0]
    count, name = min((pair for pair in exact if pair[0] > 0), default=(0, "B"))
    return f"{count}{name}"


def format_share(share: float) -> str:
    """Such as "70%"; parse_share reads it back."""
    return f"{round(100 * share, 3):g}%"


def format_rate(bytes_per_second: int) -> str:
    """Such as "8MB/s", "0" for unlimited; parse_rate reads it back."""
    return f"{format_size(bytes_per_second)}/s" if bytes_per_second else "0"


def format_duration(seconds: float) -> str:
    """Such as "30d" or "60s": in the largest unit of which there are two; parse_duration reads it back."""
    milliseconds = round(seconds * 1000)
    for name, unit_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds % unit_ms == 0 and (milliseconds >= 2 * unit_ms or name == "s"):
            return f"{milliseconds // unit_ms}{name}"
    return f"{milliseconds}ms"


def bytes_in_words(count_bytes: float) -> str:
    """Approximate, such as "1.2 GB"; powers of 1000."""
    amount, unit = float(count_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(amount) < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 100 else f"{amount:.1f} {unit}"


def time_in_words(seconds: float) -> str:
    """Approximate, such as "3 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count][:2]
    return " ".join(shown) or "0 s"


# --- dates as HTTP writes them (RFC 9110 section 5.6.7)

_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_DAY = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_CLOCK = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"

_DATE_FORMS = (
    re.compile(rf"{_DAY}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_CLOCK} GMT"),
    re.compile(rf"{_LONG_DAY}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_CLOCK} GMT"),
    re.compile(rf"{_DAY} {_MONTH} (?P<day>[0-9]{{2}}| [0-9]) {_CLOCK} (?P<year>[0-9]{{4}})"),
)
"""IMF-fixdate, the form of RFC 850, the form of asctime. Whether the name of the day fits is not checked."""


_FIXDATE_LETTERS = 29


def parse_http_date(text: str, *, now: float | None = None) -> int | None:
    """Unix seconds of a date in any of the three forms; None when it is malformed or no such day exists.

    `now` (Unix seconds, the system's clock when None) decides the century of a two-digit year.
    """
    if len(text) == _FIXDATE_LETTERS:  # its year has four digits
        return _seconds_of(text, 0)
    return _seconds_of(text, time.gmtime(time.time() if now is None else now).tm_year)


@lru_cache(256)
def _seconds_of(text: str, this_year: int) -> int | None:
    found = next((found for form in _DATE_FORMS if (found := form.fullmatch(text))), None)
    if found is None:
        return None
    year, month = int(found["year"]), _MONTHS.index(found["month"]) + 1
    hour, minute, second = int(found["hour"]), int(found["minute"]), int(found["second"])
    if len(found["year"]) == 2:
        # A year more than 50 years ahead is taken as the most recent past one with these digits.
        year += this_year - this_year % 100
        year -= 100 if year > this_year + 50 else 0
    if hour > 23 or minute > 59 or second > 60:  # 60 is a leap second
        return None
    try:
        day = date(year, month, int(found["day"]))
    except ValueError:
        return None
    return timegm((day.year, day.month, day.day, hour, minute, second))


def format_http_date(seconds: float) -> str:
    """`seconds` (Unix time, cut to whole ones) as an IMF-fixdate."""
    return _formatted(int(seconds // 1))


@lru_cache(16)
def _formatted(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
