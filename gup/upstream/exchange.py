"""What comes of a request to an upstream: the head of the response with its validators, or a failure."""

import json
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Annotated, NamedTuple

import xxhash
from pydantic import Field, Strict, TypeAdapter

from gup.cluster.orders import KnownText
from gup.config.loading import mask_password
from gup.errors import SHOWN_BYTES, GupError, Problem, quoted
from gup.jsonmodel import parse, read
from gup.units import parse_http_date

LONGEST_RETRY_AFTER_SECONDS = 3600.0
MOST_FIELD_BYTES = 512
MOST_HOPS = 16
"""Gups that a request may have passed through."""
_GUP_NAME = re.compile(r"[0-9A-Za-z._:\[\]-]{1,128}")
_NO_CONNECTION = re.compile(
    r"error=(?:dns_|destination_|connection_(?:refused|timeout)|tls_|proxy_)"
    r"|ERR_(?:DNS_FAIL|CONNECT_FAIL|SECURE_CONNECT_FAIL|CANNOT_FORWARD)"
)
"""Of RFC 9209 section 2.3, and Squid's."""
_AGE = re.compile(r"[0-9]{1,12}")
_Sendable = Annotated[str, Field(max_length=MOST_FIELD_BYTES, pattern="^[ -~]*$")]


@dataclass(eq=False)
class UpstreamFailure(GupError):  # noqa: N818 - one failed try, not an error of ours
    """One failed try. `outcome` is the label of its counter, `slug` the type of the problem for a client.

    `again`: whether the same upstream may succeed at once. `status`: the response's, None without one.
    `retry_after_seconds`: how long the upstream wants not to be asked for the same, None if it did not say.
    """

    outcome: str
    slug: str
    detail: str
    _: KW_ONLY
    again: bool = False
    status: int | None = None
    retry_after_seconds: float | None = None

    def __post_init__(self) -> None:
        self.detail = quoted(self.detail)  # it may contain text from the upstream
        super().__init__(self.detail)


def rejected(detail: str) -> UpstreamFailure:
    return UpstreamFailure("rejected", "upstream-bad-body", detail)


def misframed(detail: str) -> UpstreamFailure:
    return UpstreamFailure("rejected", "upstream-error", detail)


def unconfirmed(name: str, received: int) -> UpstreamFailure:
    """The body ended with its connection, so it may be incomplete."""
    cause = (
        "without a Content-Length or a last chunk to confirm the end: the body is passed on and not stored"
    )
    detail = f"{name} sent {received} bytes and closed the connection, {cause}"
    return UpstreamFailure("rejected", "upstream-unsure-end", detail)


def unreachable(detail: str, *, again: bool = False) -> UpstreamFailure:
    """No connection was made, so no request can be the cause."""
    return UpstreamFailure("unreachable", "upstream-unreachable", detail, again=again)


def refusal(name: str, status: int, headers: Mapping[str, str], now: float) -> UpstreamFailure:
    """`now` is in Unix seconds."""
    slug, later = "upstream-error" if status >= 500 else "upstream-refused", None
    detail = f"{name} answered {status}"
    if 300 <= status < 400:
        where = mask_password(headers.get("Location", "none"))
        detail += f": redirects are not followed; set upstream.url to the final address (Location: {where})"
    if status == 508:
        slug, detail = "loop", f"{detail}: the request would go round in a circle"
    if status in (429, 503):
        later = retry_after_seconds(headers.get("Retry-After"), headers.get("Date"), now)
    return UpstreamFailure("error", slug, detail, status=status, retry_after_seconds=later)


def retry_after_seconds(text: str | None, date: str | None, now: float) -> float | None:
    """Retry-After (RFC 9110 section 10.2.3), an hour at most; None when it is missing, invalid or past.

    A date is compared with the response's own `date` if there is one, because clocks differ.
    """
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        seconds = float(text)
    else:
        at = parse_http_date(text, now=now)
        if at is None:
            return None
        sent = parse_http_date(date.strip(), now=now) if date else None
        seconds = at - (now if sent is None else sent)
    return min(seconds, LONGEST_RETRY_AFTER_SECONDS) if seconds > 0 else None


# --- a web proxy on the way


def proxy_in_words(proxy: str | None) -> str:
    """Names the setting; without the password."""
    return f"the web proxy {mask_password(proxy or '')} (upstream.proxy)"


def answered_by_proxy(status: int, fields: Mapping[str, str]) -> bool:
    """Whether the web proxy itself produced the response.

    It is recognised by 407 (RFC 9110 section 15.5.8), Proxy-Status (RFC 9209) or Squid's X-Squid-Error.
    """
    marks = ("Proxy-Authenticate", "Proxy-Status", "X-Squid-Error")
    return status == 407 or (status >= 400 and any(field in fields for field in marks))


def failed_for_all(status: int, fields: Mapping[str, str]) -> bool:
    """Whether the web proxy fails every request: it wants a password, or gets no connection.

    Other failures may be due to the requested name, which the upstream resets or the proxy forbids.
    """
    said = f"{fields.get('Proxy-Status', '')} {fields.get('X-Squid-Error', '')}"
    return status in (401, 407) or _NO_CONNECTION.search(said) is not None


def proxy_refused(
    name: str, proxy: str | None, status: int, reason: str = "", *, for_all: bool = True
) -> UpstreamFailure:
    said = f"{status} {reason}" if reason else str(status)
    if status in (401, 407):
        said += "; it requires a user and a password: http://user:password@host:port"
    detail = f"{name}: {proxy_in_words(proxy)} answered {said}"
    return unreachable(detail) if for_all else UpstreamFailure("error", "upstream-error", detail)


# --- validators


class Validators(NamedTuple):
    """Validators of one response (RFC 9110 section 8.8); comparable only within one upstream.

    `etag` may be weak. `strong_date`: the response's `Date` is at least a second later than its
    `Last-Modified`, which makes that a strong validator (section 8.8.2.2).
    """

    etag: _Sendable | None = None
    last_modified: _Sendable | None = None
    strong_date: Annotated[bool, Strict()] = False

    @classmethod
    def of(cls, etag: str | None, last_modified: str | None, date: str | None) -> "Validators":
        """From header fields. A value that can't be sent back is replaced by a hash, for comparison only."""
        modified_at, sent_at = (parse_http_date(text) if text else None for text in (last_modified, date))
        strong_date = modified_at is not None and sent_at is not None and sent_at > modified_at
        etag, last_modified = (bounded(text) if text else None for text in (etag, last_modified))
        return cls(etag, last_modified, strong_date)

    @property
    def if_range(self) -> str | None:
        """Value for `If-Range`: a strong tag, else a strong date (section 13.1.5).

        A strong date is sent even if there is a weak tag, which section 13.1.5 does not provide for: servers
        with weak tags compare the date, and one that does not sends the whole body.
        """
        if self.etag is not None and self.etag.startswith('"'):
            return self.etag
        return self.last_modified if self.strong_date else None

    def same_as(self, now: "Validators", *, vouched: bool = False) -> bool:
        """Whether a later response of the same upstream may be for the same body.

        `vouched`: the later response is a 206 to a request with `If-Range`, which may omit validators
        (section 15.3.7). If the earlier response had validators and the later one has none of them, the
        bodies count as different.
        """
        tagged = self.etag is not None and now.etag is not None
        if self.etag is not None and now.etag is not None:
            if self.etag.removeprefix("W/") != now.etag.removeprefix("W/"):
                return False
            if self.etag.startswith('"') and now.etag.startswith('"'):
                return True
        if self.last_modified is not None and now.last_modified is not None:
            return self.last_modified == now.last_modified
        silent_before = self.etag is None and self.last_modified is None
        silent_now = now.etag is None and now.last_modified is None
        return tagged or (silent_now and (vouched or silent_before))


def bounded(text: str) -> str:
    """Text that is long or not printable ASCII becomes a weak tag made from its hash."""
    if len(text) <= MOST_FIELD_BYTES and text.isascii() and text.isprintable():
        return text
    return f'W/"{xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))}"'


# --- the head of a response


@dataclass(frozen=True, slots=True)
class GivenHead:
    """What another member of the cluster has as the head of a body, beside what HTTP says of it.

    `etag` is that of every member. `validators` are those of `upstream`, where the body comes from.
    `age_seconds` is how long ago that one was last asked, `order` what was known of purges when its WAN fetch
    began.
    """

    etag: _Sendable | None
    upstream: Annotated[str, Field(min_length=1, max_length=MOST_FIELD_BYTES)]
    upstream_etag: _Sendable | None
    last_modified: _Sendable | None
    validators: Validators
    age_seconds: Annotated[int, Strict(), Field(ge=0, le=1 << 31)]
    order: KnownText

    @classmethod
    def parse(cls, text: str) -> "GivenHead":
        """InvalidError when it is not one."""
        value = parse(text.encode("latin-1"), "GUP-Head", 4 * MOST_FIELD_BYTES)
        return read(_given_model(), value, "GUP-Head")

    def text(self) -> str:
        return json.dumps(_given_model().dump_python(self), separators=(",", ":"))


@cache
def _given_model() -> TypeAdapter[GivenHead]:
    return TypeAdapter(GivenHead)


PASSED_ON = frozenset({"upstream-not-found", "upstream-gone", "queue-full", "wan-budget"})
"""The problems of a member that are the asking node's too; of others it may be free."""


@dataclass(frozen=True, slots=True)
class GivenProblem:
    """A problem that another member of the cluster passes on, and remembers for `stands_seconds`."""

    slug: Annotated[str, Field(pattern=f"^({'|'.join(sorted(PASSED_ON))})$")]
    detail: Annotated[str, Field(max_length=SHOWN_BYTES)]
    retry_after_seconds: Annotated[float, Field(ge=0, le=LONGEST_RETRY_AFTER_SECONDS)] | None
    stands_seconds: Annotated[float, Field(ge=0, le=LONGEST_RETRY_AFTER_SECONDS)]

    @classmethod
    def parse(cls, text: str) -> "GivenProblem":
        """InvalidError when it is not one."""
        return read(
            _problem_model(), parse(text.encode("latin-1"), "GUP-Problem", 8 * SHOWN_BYTES), "GUP-Problem"
        )

    def text(self) -> str:
        return json.dumps(_problem_model().dump_python(self), separators=(",", ":"))

    def problem(self) -> Problem:
        retry = self.retry_after_seconds
        return Problem(
            self.slug, quoted(self.detail), retry_after_seconds=retry, stands_seconds=self.stands_seconds
        )


@cache
def _problem_model() -> TypeAdapter[GivenProblem]:
    return TypeAdapter(GivenProblem)


@dataclass(frozen=True, slots=True)
class RemoteHead:
    """The head of a response. `length` is that of the whole body, `start` the offset of the first byte sent.

    `etag` is the tag with its quotes, None for a weak one (RFC 9110 section 8.8.3). `age_seconds` is how long
    another gup has stored it. `stop` is the offset after the last byte sent, None when unknown. `validators`
    are as received. `delimited`: a length or a last chunk will confirm the end; else the connection closes.
    `given`: it comes from a member of the cluster.
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
    stop: int | None = None
    delimited: bool = True
    given: GivenHead | None = None


def read_age(text: str | None) -> int:
    """Age (RFC 9111 section 5.1); 0 when it is missing or invalid."""
    return min(int(text), 1 << 31) if text is not None and _AGE.fullmatch(text) else 0


def gup_names(via: str | None) -> tuple[str, ...]:
    """The gups in Via (RFC 9110 section 7.6.3): all that it is read for, to find loops.

    Other proxies' names need not be unique; what no gup is called is ignored.
    """
    if not via:
        return ()
    members = (member.split() for member in via.split(","))
    names = (words[1] for words in members if len(words) == 3 and words[2] == "(gup)")
    return tuple(filter(_GUP_NAME.fullmatch, names))
