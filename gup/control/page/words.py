"""Figures as people read them: sizes, rates, spans of time. Pure."""

from datetime import UTC, datetime, tzinfo

from gup.units import bytes_in_words


def size(count: float) -> str:
    """Bytes in steps of a thousand: `1.5 GB`."""
    return bytes_in_words(count).replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")


def rate(bytes_per_second: float) -> str:
    """`1.5 MB/s`."""
    return f"{size(bytes_per_second)}/s"


def span(seconds: float) -> str:
    """A span of time in its largest unit: `3 h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}\N{NO-BREAK SPACE}{unit}"
    return f"{max(seconds, 0):.0f}\N{NO-BREAK SPACE}s"


def number(count: float) -> str:
    """`12,345`."""
    return f"{count:,.0f}"


def percent(part: float) -> str:
    """A share of one as `93 %`; next to all and next to nothing keep a decimal."""
    hundredth = 100 * part
    decimals = 1 if 0 < abs(hundredth) < 10 or 99 < hundredth < 100 else 0
    shown = min(hundredth, 99.9) if hundredth < 100 else hundredth
    return f"{shown:.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def iso(at: float) -> str:
    """A moment for `<time datetime>`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(at: float, zone: tzinfo | None, form: str = "%Y-%m-%d %H:%M") -> str:
    """A moment on the site's clocks."""
    return datetime.fromtimestamp(at, zone).strftime(form)
