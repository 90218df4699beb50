"""One request to one upstream and its answer; translates whatever goes wrong, never tries twice."""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from gup.config.loading import mask_password
from gup.errors import GupError, exhausted, is_exhausted, quoted
from gup.units import parse_http_date
from gup.upstream.validators import Validators

if TYPE_CHECKING:
    import aiohttp

_GUP_MEMBER = re.compile(r"(?:^|,)\s*\S+\s+([^\s,]+)\s+\(gup\)")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_AGE = re.compile(r"[0-9]{1,12}")
_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_TEXT = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_UNKNOWN_TYPE = "application/octet-stream"
_MOST_FIELD_BYTES = 512
_Result = TypeVar("_Result")


class UpstreamFailure(GupError):  # noqa: N818 - one failed try, not an error of ours
    """One try that failed. `outcome` is the label it is counted under, `slug` what a client would be told.

    `again`: whether the same upstream may do better at once. `status`: of its answer, None without one.
    `retry_after_seconds`: so long it is not to be asked for the same again, where it said so.
    """

    def __init__(
        self,
        outcome: str,
        slug: str,
        detail: str,
        *,
        again: bool,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.detail = quoted(detail)  # parts of it are what the upstream wrote
        super().__init__(self.detail)
        self.outcome = outcome
        self.status = status
        self.slug = slug
        self.again = again
        self.retry_after_seconds = retry_after_seconds


def rejected(detail: str) -> UpstreamFailure:
    """An answer that can't be the content asked for."""
    return UpstreamFailure("rejected", "upstream-bad-body", detail, again=False)


def unconfirmed(name: str, received: int) -> UpstreamFailure:
    """A body after which the connection just ended, so that nobody knows whether that was all."""
    detail = (
        f"{name} sent {received} bytes and closed the connection, without a Content-Length or a last chunk "
        "to tell that this is all: it is passed on and not stored"
    )
    return UpstreamFailure("rejected", "upstream-unsure-end", detail, again=False)


@dataclass(frozen=True, slots=True)
class RemoteHead:
    """What an upstream says of a body. `length` is the whole body's, `start` the first byte that comes.

    `etag` is kept when strong only (RFC 9110 section 8.8.3), with its quotes. `age_seconds` is how long
    another gup has held it. `stop` is the offset after the last byte that comes, None when it is not known.
    """

    status: int
    start: int
    length: int | None
    etag: str | None
    last_modified: str | None
    content_type: str
    upstream: str
    age_seconds: int = 0
    validators: Validators = field(default_factory=Validators)
    """As the answer had them, a weak tag too."""
    stop: int | None = None
    delimited: bool = True
    """Whether a length or a last chunk will confirm the end, and not the connection's end alone."""


def read_age(text: str | None) -> int:
    """The Age field (RFC 9111 section 5.1); 0 when it is missing or no number."""
    return min(int(text), 1 << 31) if text is not None and _AGE.fullmatch(text) else 0


def node_names(via: str | None) -> list[str]:
    """The names of those that a message has passed through, by its Via (RFC 9110 section 7.6.3)."""
    members = (member.split() for member in (via or "").split(","))
    return [words[1] for words in members if len(words) > 1]


def gup_names(via: str | None) -> list[str]:
    """Those of them that are gups: a proxy's name says nothing, any number of gups may use the same one."""
    return _GUP_MEMBER.findall(via or "")


async def translated(
    step: Awaitable[_Result], name: str, limit: str = "", proxy: str | None = None
) -> _Result:
    """Await one step of aiohttp's; UpstreamFailure for everything that the network can do to it.

    `limit` is the setting that ends it when nothing comes. `proxy` is the URL of the web proxy on the way:
    what it did is told as its doing. Where we have no socket left to ask with, nothing is known of the
    upstream, and the failure says so.
    """
    try:
        return await _translated(step, name, limit, proxy)
    except UpstreamFailure as failure:
        cause = failure.__cause__
        if isinstance(cause, OSError) and is_exhausted(cause):
            raise UpstreamFailure("unreachable", "overloaded", exhausted(cause).detail, again=True) from cause
        raise


async def _translated(  # noqa: C901 - a table
    step: Awaitable[_Result], name: str, limit: str, proxy: str | None
) -> _Result:
    import aiohttp  # noqa: PLC0415 - its import takes longer than a worker may take to its first hit

    from gup.upstream.connector import BrokeOff  # noqa: PLC0415 - imports aiohttp

    try:
        return await step
    except aiohttp.ConnectionTimeoutError as error:
        raise UpstreamFailure(
            "unreachable", "upstream-unreachable", f"{name} takes no connection in time", again=False
        ) from error
    except BrokeOff as error:
        cause = error.__cause__ or error
        raise UpstreamFailure(
            "error", "upstream-error", f"{name} broke off: {cause or type(cause).__name__}", again=True
        ) from cause
    except (aiohttp.ServerTimeoutError, TimeoutError) as error:
        told = f" ({limit})" if limit else ""
        raise UpstreamFailure(
            "timeout", "upstream-timeout", f"{name} did not answer in time{told}", again=False
        ) from error
    except aiohttp.ClientSSLError as error:
        raise UpstreamFailure(
            "unreachable", "upstream-unreachable", f"{name}: TLS: {_tls_reason(error)}", again=False
        ) from error
    except aiohttp.ClientProxyConnectionError as error:
        raise UpstreamFailure(
            "unreachable",
            "upstream-unreachable",
            f"{name}: {proxy_in_words(proxy)} can't be reached: {error.strerror}",
            again=True,
        ) from error
    except aiohttp.ClientHttpProxyError as error:
        raise UpstreamFailure(
            "unreachable",
            "upstream-unreachable",
            f"{name}: {proxy_in_words(proxy)} answered {error.status} {error.message}{_remedy(error.status)}",
            again=False,
        ) from error
    except aiohttp.ClientConnectorError as error:
        raise UpstreamFailure(
            "unreachable",
            "upstream-unreachable",
            f"{_unreached(error, name, proxy)} can't be reached: {error.strerror or error}",
            again=True,
        ) from error
    except aiohttp.InvalidURL as error:
        raise UpstreamFailure("error", "upstream-refused", f"{name}: bad URL {error}", again=False) from error
    except (aiohttp.ClientResponseError, aiohttp.http.HttpProcessingError) as error:
        raise UpstreamFailure(
            "error", "upstream-error", f"{name} broke HTTP: {error.message}", again=True
        ) from error
    except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError, RuntimeError) as error:
        # RuntimeError is what aiohttp raises when its connection has gone and nobody has told the reader.
        raise UpstreamFailure(
            "error", "upstream-error", f"{name} broke off: {error or type(error).__name__}", again=True
        ) from error


def is_no_http(error: BaseException | None) -> bool:
    """Whether aiohttp could not read what came as HTTP."""
    import aiohttp  # noqa: PLC0415 - see _translated

    return isinstance(error, aiohttp.http.HttpProcessingError)


def proxy_in_words(proxy: str | None) -> str:
    """The web proxy with the setting that names it, without its password."""
    return f"the web proxy {mask_password(proxy or '')} (upstream.proxy)"


def _remedy(status: int) -> str:
    wanted = "; it wants a user and a password: http://user:password@host:port"
    return wanted if status in (401, 407) else ""


def _unreached(error: "aiohttp.ClientConnectorError", name: str, proxy: str | None) -> str:
    """Whoever it was that no connection came about with: a proxy's name is looked up first."""
    if proxy is not None and error.host == urlsplit(proxy).hostname:
        return f"{name}: {proxy_in_words(proxy)}"
    return name


def answered_by_proxy(status: int, fields: Mapping[str, str]) -> bool:
    """Whether an answer that came by way of a web proxy is the proxy's own: it says so (RFC 9110 section
    15.5.8, RFC 9209 Proxy-Status; X-Squid-Error is Squid's).
    """
    tells = ("Proxy-Authenticate", "Proxy-Status", "X-Squid-Error")
    return status == 407 or (status >= 400 and any(field in fields for field in tells))


def proxy_refused(name: str, proxy: str, status: int) -> UpstreamFailure:
    """The proxy's own refusal of a request that it was to send on: nothing is known of the upstream."""
    detail = f"{name}: {proxy_in_words(proxy)} answered {status}{_remedy(status)}"
    return UpstreamFailure("unreachable", "upstream-unreachable", detail, again=False)


def _tls_reason(error: "aiohttp.ClientSSLError") -> str:
    """What is wrong with the certificate, or with TLS."""
    cause: BaseException = getattr(error, "certificate_error", None) or error.os_error
    told = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or str(cause)
    wrong = "certificate refused: " if isinstance(cause, ssl.SSLCertVerificationError) else ""
    return f"{wrong}{told}"


def read_head(response: "aiohttp.ClientResponse", name: str) -> RemoteHead:
    """The head of a 200 or 206; UpstreamFailure when it can't be content."""
    encoding = ", ".join(_values(response, b"content-encoding")).lower()
    if encoding not in ("", "identity"):
        raise rejected(f"{name} sent Content-Encoding {encoding!r} though identity was asked for")
    types = _values(response, b"content-type")
    for content_type in types:
        if content_type.split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
            raise rejected(f"{name} sent a web page ({content_type})")
    start, stop, length, delimited = _extent(response, name)
    if length == 0:
        raise rejected(f"{name} sent an empty body")
    headers = response.headers
    return RemoteHead(
        response.status,
        start,
        length,
        _one(response, b"etag", _ETAG),
        _date(response),
        _one(response, b"content-type", _TEXT) or _UNKNOWN_TYPE,
        name,
        validators=Validators.of(headers.get("ETag"), headers.get("Last-Modified"), headers.get("Date")),
        stop=stop,
        delimited=delimited,
    )


def _values(response: "aiohttp.ClientResponse", name: bytes) -> list[str]:
    """Each line of a field, byte for byte (RFC 9110 section 5.5): what is over 127 has no meaning here."""
    found = (value for field, value in response.raw_headers if field.lower() == name)
    return [value.strip(b" \t").decode("latin-1") for value in found]


def _one(response: "aiohttp.ClientResponse", name: bytes, form: re.Pattern[str]) -> str | None:
    """A field's value; None when it is not of this form, too long to be kept, or told in different ways."""
    values = set(_values(response, name))
    value = values.pop() if len(values) == 1 else ""
    return value if len(value) <= _MOST_FIELD_BYTES and form.fullmatch(value) else None


def _date(response: "aiohttp.ClientResponse") -> str | None:
    value = _one(response, b"last-modified", _TEXT)
    return value if value is not None and parse_http_date(value) is not None else None


def read_framing(response: "aiohttp.ClientResponse", name: str) -> tuple[int | None, bool]:
    """The Content-Length, and whether the body is chunked (RFC 9112 section 6).

    UpstreamFailure for what could be read in more than one way: only a length or a last chunk tells a body's
    end, and a body that one recipient ends elsewhere than another is nothing to be stored.
    """
    codings = _values(response, b"transfer-encoding")
    lengths = _values(response, b"content-length")
    if codings:
        if [coding.lower() for coding in codings] != ["chunked"] or response.version != (1, 1):
            raise _misframed(
                f"{name} sent Transfer-Encoding {', '.join(codings)!r}, which is not just chunked"
            )
        if lengths:
            raise _misframed(f"{name} sent Content-Length beside Transfer-Encoding")
        return None, True
    if not lengths:
        return None, False
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _misframed(f"{name} sent Content-Length {', '.join(lengths)!r}, which is not one number")
    return int(lengths[0]), False


def _misframed(detail: str) -> UpstreamFailure:
    """An answer whose body can't be told from what comes after it."""
    return UpstreamFailure("rejected", "upstream-error", detail, again=False)


def _extent(response: "aiohttp.ClientResponse", name: str) -> tuple[int, int | None, int | None, bool]:
    """First byte, the one after the last, the whole body's length, and whether the end is confirmed."""
    own_length, chunked = read_framing(response, name)
    if response.status == 200:
        return 0, own_length, own_length, chunked or own_length is not None
    told = _values(response, b"content-range")
    match = _CONTENT_RANGE.fullmatch(told[0]) if len(told) == 1 else None
    if match is None:
        raise rejected(f"{name} sent 206 without a usable Content-Range")
    start, stop, total = int(match[1]), int(match[2]) + 1, match[3]
    if stop <= start or (total != "*" and stop > int(total)):
        raise rejected(f"{name} sent a Content-Range that contradicts itself: {match[0]}")
    if own_length not in (None, stop - start):
        raise rejected(f"{name} sent Content-Length {own_length} for {match[0]}")
    return start, stop, None if total == "*" else int(total), True
