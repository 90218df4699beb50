"""One request to one upstream and its answer; translates whatever goes wrong, never tries twice."""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from gup.complaints import mask_password
from gup.errors import GupError, exhausted, is_exhausted, quoted
from gup.upstream.validators import Validators

if TYPE_CHECKING:
    import aiohttp

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_GUP_MEMBER = re.compile(r"(?:^|,)\s*\S+\s+([^\s,]+)\s+\(gup\)")
_DIGITS = re.compile(r"[0-9]{1,12}")
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
        detail = quoted(detail)  # parts of it are what the upstream wrote
        super().__init__(detail)
        self.outcome = outcome
        self.status = status
        self.slug = slug
        self.detail = detail
        self.again = again
        self.retry_after_seconds = retry_after_seconds


def rejected(detail: str) -> UpstreamFailure:
    """An answer that can't be the content asked for."""
    return UpstreamFailure("rejected", "upstream-bad-body", detail, again=False)


@dataclass(frozen=True, slots=True)
class RemoteHead:
    """What an upstream says of a body. `length` is the whole body's, `start` the first byte that comes.

    `etag` is kept when strong only (RFC 9110 section 8.8.3), with its quotes. `age_seconds` is how long
    another gup has held it.
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


def read_age(text: str | None) -> int:
    """The Age field (RFC 9111 section 5.1); 0 when it is missing or no number."""
    return min(int(text), 1 << 31) if text is not None and _DIGITS.fullmatch(text) else 0


def node_names(via: str | None) -> list[str]:
    """The names of those that a message has passed through, by its Via (RFC 9110 section 7.6.3)."""
    members = (member.split() for member in (via or "").split(","))
    return [words[1] for words in members if len(words) > 1]


def gup_names(via: str | None) -> list[str]:
    """Those of them that are gups: a proxy's name says nothing, any number of gups may use the same one."""
    return _GUP_MEMBER.findall(via or "")


async def translated(step: Awaitable[_Result], name: str, proxy: str | None = None) -> _Result:
    """Await one step of aiohttp's; UpstreamFailure for everything that the network can do to it.

    `proxy` is the URL of the web proxy on the way: what it did is told as its doing.

    Where we have no socket left to ask with, nothing is known of the upstream, and the failure says so.
    """
    try:
        return await _translated(step, name, proxy)
    except UpstreamFailure as failure:
        cause = failure.__cause__
        if isinstance(cause, OSError) and is_exhausted(cause):
            raise UpstreamFailure("unreachable", "overloaded", exhausted(cause).detail, again=True) from cause
        raise


async def _translated(step: Awaitable[_Result], name: str, proxy: str | None) -> _Result:
    import aiohttp  # noqa: PLC0415 - its import takes longer than a worker may take to its first hit

    try:
        return await step
    except aiohttp.ConnectionTimeoutError as error:
        raise UpstreamFailure(
            "unreachable", "upstream-unreachable", f"{name} takes no connection in time", again=False
        ) from error
    except (aiohttp.ServerTimeoutError, TimeoutError) as error:
        raise UpstreamFailure(
            "timeout", "upstream-timeout", f"{name} did not answer in time", again=False
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
    headers = response.headers
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise rejected(f"{name} sent Content-Encoding {encoding!r} though identity was asked for")
    content_type = headers.get("Content-Type", "application/octet-stream")
    if content_type.split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
        raise rejected(f"{name} sent a web page ({content_type})")
    start, length = _extent(response, name)
    if length == 0:
        raise rejected(f"{name} sent an empty body")
    etag, last_modified = headers.get("ETag"), headers.get("Last-Modified")
    return RemoteHead(
        response.status,
        start,
        length,
        etag if etag and etag.startswith('"') else None,
        last_modified,
        content_type,
        name,
        validators=Validators.of(etag, last_modified, headers.get("Date")),
    )


def _extent(response: "aiohttp.ClientResponse", name: str) -> tuple[int, int | None]:
    if response.status == 200:
        chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
        return 0, None if chunked else response.content_length
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        raise rejected(f"{name} sent 206 without a usable Content-Range")
    start, last, total = int(match[1]), int(match[2]), match[3]
    if last < start or (total != "*" and last >= int(total)):
        raise rejected(f"{name} sent a Content-Range that contradicts itself: {match[0]}")
    return start, None if total == "*" else int(total)
