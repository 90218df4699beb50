"""Types of settings' values: they check text and numbers, and say what would be right."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit
from zoneinfo import available_timezones

from pydantic import AfterValidator, BeforeValidator, Field

from gup.units import parse_duration, parse_rate, parse_size

MIN_RATE_BYTES_PER_SECOND = 10**3
MIN_CACHE_BYTES = 10**6
"""In a smaller rate or size the unit was forgotten."""

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 section 5.6.2
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/@:\[\]?#\"\\]+)(?::[0-9]{1,5})?"
_URL = re.compile(rf"https?://{_HOST}(?:/[^\s?#]*)?")
_PROXY = re.compile(rf"https?://(?:[^\s/@]+@)?{_HOST}/?")
_GUP_SETS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "host", "if-match", "if-modified-since"),
        *("if-none-match", "if-range", "if-unmodified-since", "range", "te", "trailer"),
        *("transfer-encoding", "upgrade", "via"),
    }
)
"""Request headers that change the meaning of the answer: a setting can't give them."""


def is_token(text: str) -> bool:
    """Whether `text` can stand in a header as a name (RFC 9110 section 5.6.2)."""
    return bool(_TOKEN.fullmatch(text))


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


def _split(value: object) -> object:
    """A list in the environment is written with commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _at_least(least: int, right: str, *besides: int) -> AfterValidator:
    def check(value: int) -> int:
        if value < least and value not in besides:
            raise ValueError(f"must be at least {right}")
        return value

    return AfterValidator(check)


def _matching(form: str, right: str) -> AfterValidator:
    pattern = re.compile(form)

    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(right)
        return value

    return AfterValidator(check)


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_address("127.0.0.1" if value == "localhost" else value.strip("[]")))
    except ValueError as error:
        raise ValueError("must be an IP address, such as 0.0.0.0, 127.0.0.1 or ::") from error


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"must be a network, such as 10.0.0.0/8 ({error})") from error


def _port_fits(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _url(value: str) -> str:
    if not _URL.fullmatch(value) or not _port_fits(value):
        raise ValueError("must be http://host:port or https://host:port, without user or query")
    return value.rstrip("/")


def _proxy(value: str) -> str:
    if not _PROXY.fullmatch(value) or not _port_fits(value):
        raise ValueError("must be http://host:port, perhaps with user:password@ before the host")
    return value


def _variant(value: str) -> str:
    value = value.strip()
    if not 0 < len(value) <= 64 or value[0] == "." or re.search(r"[/\\]", value) or not value.isprintable():
        raise ValueError("must be 1 to 64 printable characters without / or \\, not beginning with a dot")
    return value


def _label(value: str) -> str:
    if not 0 < len(value) <= 64 or re.search(r'["\\]', value) or not value.isprintable():
        raise ValueError('must be 1 to 64 printable characters without " or \\')
    return value


def _log_destination(value: str) -> str:
    name, colon, path = value.partition(":")
    named = name == "journald" and (path.startswith("/") or not colon)
    if not (named or value in ("stderr", "stdout") or value.startswith("/")) or "\0" in value:
        raise ValueError('must be "stderr", "stdout", "journald" or the absolute path of a file')
    return value


def _time_zone(value: str) -> str:
    if value and value not in available_timezones():
        raise ValueError('must be a time zone that this machine knows, such as "Europe/Paris"')
    return value


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not is_token(name):
            raise ValueError(f"{name!r} can't be the name of a header")
        if name.lower() in _GUP_SETS:
            raise ValueError(f"{name} is set by gup itself")
        if not text.isprintable():
            raise ValueError(f"the value of {name} must be printable")
    return value


Size = Annotated[int, BeforeValidator(parse_size)]
CacheSize = Annotated[Size, _at_least(MIN_CACHE_BYTES, '"1MB"')]
Rate = Annotated[
    int, BeforeValidator(parse_rate), _at_least(MIN_RATE_BYTES_PER_SECOND, '"1kB/s", or "0" for unlimited', 0)
]
LeastRate = Annotated[int, BeforeValidator(parse_rate)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Timeout = Annotated[Duration, Field(gt=0)]
Port = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, le=65535)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, le=2**31)]
Positive = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=2**31)]
Weight = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=1000)]
Address = Annotated[str, AfterValidator(_address)]
Network = Annotated[str, AfterValidator(_network)]
Minute = Annotated[
    str,
    _matching(
        r"(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00",
        'must be a time from "00:00" to "24:00", such as "07:30"',
    ),
]
Absolute = Annotated[Path, AfterValidator(Path.absolute)]
Url = Annotated[str, AfterValidator(_url)]
UrlPath = Annotated[
    str,
    _matching(r"/[!-\"$->@-~]*", "must be a URL's path that begins with /, without query; spaces as %20"),
]
Proxy = Annotated[str, AfterValidator(_proxy)]
Variant = Annotated[str, AfterValidator(_variant)]
Label = Annotated[str, AfterValidator(_label)]
SiteName = Annotated[
    str,
    _matching(
        rf"{_TOKEN.pattern[:-1]}{{1,64}}",
        "must be 1 to 64 letters, digits, dots, dashes or underscores (it stands in Via)",
    ),
]
LogDestination = Annotated[str, AfterValidator(_log_destination)]
TimeZone = Annotated[str, AfterValidator(_time_zone)]
Headers = Annotated[dict[str, str], AfterValidator(_headers)]
Networks = Annotated[list[Network], BeforeValidator(_split)]
Words = Annotated[list[str], BeforeValidator(_split)]
