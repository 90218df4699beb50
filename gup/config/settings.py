"""The table of every setting: name, type, default, help.

Sizes are bytes, rates bytes per second (0 = unlimited), durations seconds once they are read.
"""

import base64
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit
from zoneinfo import available_timezones

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gup.units import format_share, parse_duration, parse_rate, parse_share, parse_size

T = TypeVar("T")

# --- types of values: they check text and numbers, and say what would be right

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 section 5.6.2
_SITE_NAME = _TOKEN.pattern[:-1] + "{1,64}"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/@:\[\]?#\"\\]+)(?::[0-9]{1,5})?"
_URL_PATH = r"/[!-\"$->@-~]*"
_MINUTE = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00"
_GUP_SETS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "host", "if-match", "if-modified-since"),
        *("if-none-match", "if-range", "if-unmodified-since", "range", "te", "trailer"),
        *("transfer-encoding", "upgrade", "via"),
    }
)
"""Request headers that change the meaning of the answer: no setting may add them."""


def is_token(text: str) -> bool:
    return bool(_TOKEN.fullmatch(text))


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


def _split(value: object) -> object:
    """In the environment a list is written with commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _good(is_good: Callable[[Any], object], right: str) -> AfterValidator:
    """A check; `right` is what its error says would be right."""

    def check(value: T) -> T:
        if not is_good(value):
            raise ValueError(right)
        return value

    return AfterValidator(check)


def _printable(form: str, right: str) -> AfterValidator:
    pattern = re.compile(form)
    return _good(lambda text: text.isprintable() and pattern.fullmatch(text), right)


def _url(form: str, right: str, schemes: str = "https?") -> AfterValidator:
    """A URL of this form, without a "/" at its end."""
    pattern = re.compile(f"{schemes}://{form}")

    def is_good(text: str) -> bool:
        try:
            return bool(pattern.fullmatch(text)) and urlsplit(text).port != 0
        except ValueError:  # a port above 65535
            return False

    return _good(is_good, right)


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_address("127.0.0.1" if value == "localhost" else value.strip("[]")))
    except ValueError as error:
        raise ValueError("must be an IP address, such as 0.0.0.0, 127.0.0.1 or ::") from error


def _endpoint(value: str) -> str:
    host, _, port = value.rpartition(":")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        port = ""
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("must be an IP address and a port, such as 0.0.0.0:2969 or [::]:2969")
    return f"[{address}]:{int(port)}" if address.version == 6 else f"{address}:{int(port)}"


def _is_sentinel(value: str) -> bool:
    return bool(re.fullmatch(_HOST, value)) and bool(urlsplit(f"//{value}").port)


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"must be a network, such as 10.0.0.0/8 ({error})") from error


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not is_token(name):
            raise ValueError(f"{name!r} can't be the name of a header")
        if name.lower() in _GUP_SETS:
            raise ValueError(f"{name} is set by gup itself")
        if not text.isprintable():
            raise ValueError(f"the value of {name} must be printable")
    return value


KEY_IS = "must be whsec_ and 24 to 64 random bytes in base64: echo whsec_$(openssl rand -base64 32)"


def signing_keys(text: str) -> list[bytes]:
    """The keys of a webhook's secret, one or several with spaces; ValueError says what would be right."""
    try:
        keys = [base64.b64decode(word.removeprefix("whsec_"), validate=True) for word in text.split()]
    except ValueError as error:
        raise ValueError(KEY_IS) from error
    if not keys or not all(24 <= len(key) <= 64 for key in keys):
        raise ValueError(KEY_IS)
    return keys


Size = Annotated[int, BeforeValidator(parse_size)]
# A smaller size or rate lacks its unit.
CacheSize = Annotated[Size, _good(lambda size: size >= 10**6, 'must be at least "1MB"')]
LeastRate = Annotated[int, BeforeValidator(parse_rate)]
Rate = Annotated[
    LeastRate, _good(lambda rate: rate >= 1000 or not rate, 'must be at least "1kB/s", or "0" for unlimited')
]
Share = Annotated[float, BeforeValidator(parse_share)]
BudgetSize = Annotated[
    Size, _good(lambda size: size >= 1000 or not size, 'must be at least "1kB", or "0" for no budget')
]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Timeout = Annotated[Duration, Field(gt=0)]
Integer = Annotated[int, BeforeValidator(_not_bool)]
Port = Annotated[Integer, Field(ge=0, le=65535)]
Count = Annotated[Integer, Field(ge=0, le=2**31)]
Positive = Annotated[Integer, Field(ge=1, le=2**31)]
Weight = Annotated[Integer, Field(ge=1, le=1000)]
Address = Annotated[str, AfterValidator(_address)]
Networks = Annotated[list[Annotated[str, AfterValidator(_network)]], BeforeValidator(_split)]
Subnets = Annotated[
    Networks,
    _good(
        lambda networks: all(ipaddress.ip_network(one).prefixlen <= 64 for one in networks if ":" in one),
        "IPv6 networks must be a /64 or larger: its clients count as one",
    ),
]
Minute = Annotated[str, _printable(_MINUTE, 'must be a time from "00:00" to "24:00", such as "07:30"')]
# A NUL would raise ValueError in every call that names the file.
Absolute = Annotated[
    Path,
    _good(lambda path: str(path).isprintable(), "must be a path of printable characters"),
    AfterValidator(Path.absolute),
]
Url = Annotated[
    str,
    _url(_HOST + r"(?:/[^\s?#]*)?", "must be http://host:port or https://host:port, without user or query"),
    AfterValidator(lambda url: url.rstrip("/")),
]
_PROXY_IS = "must be http://host:port, perhaps with user:password@ before the host"
Proxy = Annotated[str, _url(rf"(?:[^\s/@]+@)?{_HOST}/?", _PROXY_IS)]
_PATH_IS = "must be a URL's path that begins with /, without query; spaces as %20"
UrlPath = Annotated[str, _printable(_URL_PATH, _PATH_IS)]
_VARIANT_IS = "must be 1 to 64 printable characters without / or \\, not beginning with a dot"
Variant = Annotated[str, AfterValidator(str.strip), _printable(r"(?!\.)[^/\\]{1,64}", _VARIANT_IS)]
Label = Annotated[str, _printable(r'[^"\\]{1,64}', 'must be 1 to 64 printable characters without " or \\')]
_NAME_IS = "must be 1 to 64 letters, digits, dots, dashes or underscores (it is sent in Via)"
SiteName = Annotated[str, _printable(_SITE_NAME, _NAME_IS)]
_DESTINATION_IS = 'must be "stderr", "stdout", "journald" or the absolute path of a file'
LogDestination = Annotated[str, _printable("stderr|stdout|journald(:/.*)?|/.*", _DESTINATION_IS)]
_ZONE_IS = 'must be a time zone that this machine knows, such as "Europe/Paris"'
TimeZone = Annotated[str, _good(lambda zone: not zone or zone in available_timezones(), _ZONE_IS)]
_HOOK_IS = "must be http://host:port/path or https://host:port/path, without user and fragment"
HookUrl = Annotated[str, _url(_HOST + r"(?:/[!-\"$-~]*)?", _HOOK_IS)]
SigningKeys = Annotated[str, _good(signing_keys, KEY_IS)]
_PROGRAM_IS = "must begin with the absolute path of a program"
Headers = Annotated[dict[str, str], AfterValidator(_headers)]
NodeName = Annotated[
    str, _printable(r"[A-Za-z0-9._-]{1,64}", "must be 1 to 64 letters, digits, dots, dashes or underscores")
]
_ENGINE_IS = "must be redis://host:port or rediss://host:port, perhaps with user@ before and /number after it"
EngineUrl = Annotated[str, _url(rf"(?:[^\s/@:]+@)?{_HOST}(?:/[0-9]{{0,4}})?", _ENGINE_IS, schemes="rediss?")]
_MEMBER_IS = 'must be http://host:port, such as "http://10.0.0.5:2969"'
MemberUrl = Annotated[
    str, _url(rf"{_HOST}/?", _MEMBER_IS, schemes="http"), AfterValidator(lambda url: url.rstrip("/"))
]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
_SENTINEL_IS = "must be host:port"
Sentinels = Annotated[list[Annotated[str, _good(_is_sentinel, _SENTINEL_IS)]], BeforeValidator(_split)]
Words = Annotated[list[str], BeforeValidator(_split)]
CommandLine = Annotated[Words, _good(lambda words: not words or words[0].startswith("/"), _PROGRAM_IS)]

# --- the table

GB = parse_size("1GB")
DAY = parse_duration("1d")
WEEK = 7 * DAY
Serve = Literal["serve", "refuse"]


def row(default: T, description: str, *, repr: bool = True) -> T:  # noqa: A002 - pydantic's name
    """`repr` is false for a secret."""
    return Field(default=default, description=description, repr=repr)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(Section):
    """Where clients and administrators connect."""

    address: Address = row("0.0.0.0", "Address of the data plane.")  # noqa: S104 - it serves a site
    port: Port = row(2967, "Port of the data plane; 0 takes a free one.")
    admin_address: Address = row("127.0.0.1", "Address of the control plane.")
    admin_port: Port = row(2968, "Port of the control plane; 0 takes a free one.")
    admin_token_file: Absolute | None = row(
        None,
        "File with the token for reading and changing; required beyond loopback; read again on reload.",
    )
    admin_read_token_file: Absolute | None = row(
        None, "File with another token, for reading only, as Prometheus does; read again on reload."
    )
    admin_cert_file: Absolute | None = row(
        None, "Certificate of the control plane with its chain (PEM); read again on reload."
    )
    admin_key_file: Absolute | None = row(None, "The certificate's key (PEM, without a password).")
    backlog: Positive = row(4096, "Connections that the kernel queues for each worker.")
    max_connections: Positive = row(20000, "Client connections of all workers; more are closed at once.")
    header_timeout: Timeout = row(15.0, "Time for a request's head to arrive whole.")
    idle_timeout: Timeout = row(75.0, "Time for the next request on a connection to begin.")
    write_timeout: Timeout = row(60.0, "Time in which a client must accept a byte of its response.")
    drain_timeout: Duration = row(30.0, "Time for responses under way when the service stops.")
    proxy_protocol: Networks = row(
        [],
        "Proxies in front of gup: each connection from them must begin with a PROXY header (version 2), and "
        "the address in it is the client's. From other addresses such a header is refused.",
    )


class Cache(Section):
    """The store on disk, its limits, and how long entries and failures are kept."""

    directory: Absolute = row(Path("/var/lib/gup"), "The cache directory.")
    max_size: CacheSize = row(20 * GB, "Limit of all bodies and parts together.")
    min_free: Size = row(GB, "Space to leave free on the file system.")
    max_unused: Duration = row(30 * DAY, "An entry not used for this time is evicted.")
    keep_revisions: Count = row(10, "Newest revisions kept of each stream; 0 keeps all.")
    max_part_age: Duration = row(WEEK, "An unfinished part that has not grown for this time is removed.")
    negative_ttl: Duration = row(10.0, "How long an upstream's 404 or 410 is remembered and answered.")
    error_ttl: Duration = row(2.0, "How long an upstream's failure is remembered and answered.")
    index_ttl: Duration = row(60.0, "How long an index file is fresh.")
    max_stale: Duration = row(WEEK, "How long an index file is served stale while no upstream answers.")
    verify: Literal["first_use", "scrub"] = row(
        "first_use",
        "When stored bytes are compared with their sums; docs/reliability.md explains each value.",
    )
    sync_interval: Duration = row(
        10.0, "Time between syncs; a power cut costs at most what was stored since the last one."
    )
    scrub_rate: Rate = row(20_000_000, 'Rate of reading stored bodies to find damage; "0" reads none.')
    scrub_interval: Duration = row(WEEK, "Time between the beginnings of two passes over all bodies.")


class Upstream(Section):
    """One management server, LiveUpdate server or other gup; the table may be repeated."""

    name: Label = row("", "Its name in logs and metrics; default: the URL's host and port.")
    url: Url = Field(
        description="http:// or https://, host, port; a path in it is prefixed to every request's."
    )
    kind: Literal["manager", "liveupdate", "gup"] = row("manager", "What kind of server it is.")
    priority: Count = row(0, "The lowest is asked first.")
    weight: Weight = row(1, "Share of the content among upstreams of one priority.")
    version: Variant = row("any", "The manager's release or build, such as 14.3 RU2.")
    language: Variant = row("any", "The manager's language, such as French or fr.")
    ca_file: Absolute | None = row(None, "Certificates (PEM) to trust in place of the system's.")
    verify_tls: bool = row(True, "Whether its certificate is verified.")
    proxy: Proxy | None = row(None, "URL of a web proxy on the way; its password is kept secret.", repr=False)
    headers: Headers = Field(
        default_factory=dict, repr=False, description="Sent with every request; the values are kept secret."
    )
    max_connections: Positive = row(16, "Connections of each worker at a time.")
    connect_timeout: Timeout = row(5.0, "Time to establish a connection, TLS included.")
    first_byte_timeout: Timeout = row(60.0, "Time for a response's head, once connected.")
    read_timeout: Timeout = row(15.0, "Longest pause within a body while gup is ready to read.")
    min_rate: LeastRate = row(
        100,
        "Least rate of a body over four times read_timeout; a slower one gives up its fill slot, and is "
        'broken off when requests wait for a connection; "0" sets none.',
    )
    give_up: Timeout = row(60.0, "Time without a new byte, over all tries and upstreams, until a fill fails.")
    health_interval: Duration = row(30.0, "Time between health checks; 0 turns them off.")
    health_path: UrlPath | None = row(
        None, "Path of health checks (HEAD); default: ContentInfo.txt, minitri.flg or / by its kind."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("url"), str):
            return {**value, "name": value["url"].split("://")[-1].split("/")[0]}
        return value


class Fill(Section):
    """Fetching from upstream."""

    max: Positive = row(
        8, "Fill slots: so many full packages stream at once, and as many deltas and index files."
    )
    queue_timeout: Duration = row(30.0, "Longest wait for a fill slot; 503 at once if it would take longer.")
    range_wait: Duration = row(
        10.0, "Longest wait for a fill to reach a range; one further ahead is fetched separately."
    )
    memory: Size = row(
        256_000_000, "Memory of all processes for bodies that can't be stored; 0 turns it off."
    )


class Prefetch(Section):
    """Content that is fetched before a client asks for it, while no client's fill needs the link."""

    enabled: bool = row(
        True, "Whether to prefetch deltas to a new revision from those that clients have; not client patches."
    )
    max: Annotated[Count, Field(le=16)] = row(
        8, "Deltas prefetched for each new revision of a stream; 0 turns it off."
    )
    seen_within: Duration = row(WEEK, "Revisions that no client has named for this time are left out.")
    unlisted: Literal["skip", "fetch"] = row("skip", "Whether to prefetch streams that no catalogue lists.")


class WanHours(Section):
    """Certain hours of the site."""

    days: Annotated[list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]], Field(min_length=1)] = (
        Field(description="Weekdays, of mon, tue, wed, thu, fri, sat, sun.")
    )
    from_: Minute = Field(
        alias="from", description="Begin, HH:MM; if later than `to`, the period spans midnight."
    )
    to: Minute = Field(description="End, HH:MM, up to 24:00.")

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.from_ == self.to:
            raise ValueError(f'"from" and "to" are both {self.to}; a whole day is from 00:00 to 24:00')
        return self


class WanSchedule(WanHours):
    """Another WAN rate at certain hours of the site; the first matching table applies."""

    rate: Rate = Field(description="Rate during the period.")


class CheapHours(WanHours):
    """Hours of the site whose bytes do not count, and in which nothing is held back."""


class WanBudget(Section):
    """How many bytes the payer of the link allows a month or a day; docs/budget.md explains it."""

    bytes: BudgetSize = row(0, 'Bytes from upstream in each period; "0" sets no budget.')
    per: Literal["month", "day"] = row("month", "The period; it begins at midnight of site.time_zone.")
    begins: Annotated[Integer, Field(ge=1, le=31)] = row(
        1, "Day of the month on which the provider's month begins; its last day where it is shorter."
    )
    background: Share = row(0.7, 'Share from which prefetching waits; "0%": it waits for cheap hours.')
    fulls: Share = row(
        0.9, "Share from which full packages, client patches and unknown names are refused (503)."
    )
    deltas: Share = row(1.0, "Share from which deltas are refused too; index files never are.")
    cheap: list[CheapHours] = Field(default_factory=list, description="Hours whose bytes do not count.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        shares = {name: getattr(self, name) for name in ("background", "fulls", "deltas")}
        if sorted(shares.values()) != list(shares.values()):
            found = ", ".join(f"{name} = {format_share(share)}" for name, share in shares.items())
            raise ValueError(
                f"background, then fulls, then deltas are held back, so none may be less: {found}"
            )
        return self


class Wan(Section):
    """The rate of all fills together."""

    rate: Rate = row(8_000_000, 'Rate from upstream, over all workers; "0" is unlimited.')
    schedule: list[WanSchedule] = Field(default_factory=list, description="Other rates at certain hours.")
    budget: WanBudget = Field(default_factory=WanBudget)


PRIVATE_NETWORKS = (
    *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
    *("::1/128", "fc00::/7", "fe80::/10"),
)
"""Loopback, private and link-local ranges (RFC 1918, RFC 3927, RFC 4193, RFC 4291)."""


class Clients(Section):
    """Which clients are served, and how much at once."""

    allow: Networks = row(list(PRIVATE_NETWORKS), "Networks whose clients may connect.")
    max_downloads: Count = row(0, "Bodies over 256 KiB sent at once; more wait; 0 is unlimited.")
    queue: Count = row(1000, "Requests that may wait for a download; more get 503.")
    rate: Rate = row(0, 'Rate to each connection; "0" is unlimited.')
    max_connections_per_address: Count = row(
        4096, "Connections of one address, such as a branch behind NAT; more are closed; 0 is unlimited."
    )
    rate_per_address: Rate = row(0, 'Rate to all connections of one address; "0" is unlimited.')
    max_downloads_per_address: Count = row(
        0, "Bodies over 256 KiB sent to one address at once; more wait; 0 is unlimited."
    )
    max_misses_per_address: Count = row(
        0, "Requests a second of one address that need the upstream; more get 503; 0 is unlimited."
    )
    shared: Networks = row(
        [],
        "Addresses that stand for many clients, such as a branch behind NAT or another gup: their requests "
        "take turns by connection, and the limits for one address hold for each connection.",
    )


CONTENT_TYPES: dict[str, list[str]] = {
    "client_patches": ["*client patch*", "*clientpatch*"],
    "virus_definitions": ["*virus definitions*"],
    "ips_signatures": ["*cids signatures*", "*ips signatures*", "*intrusion prevention*", "*network threat*"],
    "behavior_analysis": [
        *("*behavior and security heuristics*", "*behavior analysis*", "*behaviour analysis*"),
        *("*sonar*", "*truscan*"),
    ],
    "submission_control": ["*submission control*"],
}
"""The built-in types of content; what fits none is of type "other"."""


def _with_known_types(types: dict[str, list[str]]) -> dict[str, list[str]]:
    """The settings' own types are tried first; one of a built-in name replaces it."""
    return types | {name: patterns for name, patterns in CONTENT_TYPES.items() if name not in types}


class Catalog(Section):
    """Names of streams, and the type of content of each."""

    file: Absolute | None = row(None, "A ContentInfo.txt to read in place of the managers' own.")
    refresh: Duration = row(3600.0, "Time between readings of the managers' catalogues; 0 reads none.")
    types: Annotated[dict[str, list[str]], AfterValidator(_with_known_types)] = row(
        CONTENT_TYPES,
        "Types of content by patterns (* and ?) of product names in the catalogue; the first match counts. "
        "Types set here are added to the defaults; an empty list removes one.",
    )


class Canary(Section):
    """Clients that get each new revision first; all others get it after the wait."""

    subnets: Subnets = row([], "Subnets whose clients go first, IPv6 of /64 or larger; empty: nobody does.")
    wait: Timeout = row(4 * 3600.0, "Time from when this site first has a revision until all get it.")
    types: Words = row([], 'Types that wait, of those in catalog.types and "other"; empty is all content.')


class Rules(Section):
    """Delivery rules for client patches."""

    mode: Literal["enforce", "report", "off"] = row(
        "enforce", "Whether to refuse requests, only report them, or turn the rules off."
    )
    version_match: Literal["release", "build"] = row("release", "Whether releases or builds are compared.")
    undeclared: Serve = row("serve", "Whether to serve a client that does not state what a rule compares.")
    unlisted: Serve = row("serve", "Whether to serve content that no catalogue lists.")
    download_client_patches: bool = row(True, "Whether client patches are served at all.")
    content_types: Words = row([], 'Types served, of those in catalog.types and "other"; empty is all.')
    english_after_autoupgrade: bool = row(
        False, "Whether a manager of another language may give English patches to English clients."
    )
    supported_languages: Words = row(
        [],
        "Languages of installation packages; a client in another one is referred to AutoUpgrade.",
    )
    version_sources: Words = row(
        ["GUP-Client-Version", "User-Agent: SEP"],
        "Headers in which clients state their version; the first that is present counts: HEADER, or "
        '"HEADER: PRODUCT" for PRODUCT/VERSION in it.',
    )
    language_sources: Words = row(
        ["GUP-Client-Language"],
        "Likewise for their language; Accept-Language may be added, but has the language of Windows.",
    )
    liveupdate: Url | None = row(None, "LiveUpdate server shown to refused clients; default: an upstream's.")
    releases: dict[str, str] = row(
        {}, 'More releases, each with its first build, such as "14.3 RU3" = "14.3.5413.3000".'
    )
    canary: Canary = Field(default_factory=Canary)


class Log(Section):
    """What is logged, and where to."""

    level: Literal["debug", "info", "warning", "error"] = row(
        "info", "Lowest level logged; request lines depend on access only."
    )
    format: Literal["text", "json"] = row("text", "A line of text, or a JSON object.")
    destination: LogDestination = row(
        "stderr", '"stderr", "stdout", "journald", or the absolute path of a file (logrotate may rename it).'
    )
    access: Literal["off", "sampled", "all"] = row(
        "sampled", "Which requests are logged: none; a sample of hits and all others; all."
    )
    access_sample: Positive = row(100, "With sampled access each worker logs one hit in so many.")


def _price(value: object) -> object:
    """Numbers as they are written: 0.1 in TOML is a tenth, not the nearest binary fraction."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{Decimal(repr(value)):f}"
    return value


_PRICE_IS = 'must be an amount such as "0.08": at most 9 digits, and 6 after the point'
Price = Annotated[str, BeforeValidator(_price), _printable(r"[0-9]{1,9}(\.[0-9]{1,6})?", _PRICE_IS)]
Currency = Annotated[
    str, _printable(r"[^\s]{0,12}", "must be at most 12 printable characters without spaces")
]


class Reports(Section):
    """Records of clients and of the bytes saved, for `gup report`."""

    addresses: Literal["full", "hashed", "off"] = row(
        "full", "How clients appear in reports and log: address, keyed hash, or not at all."
    )
    retention: Timeout = row(90 * DAY, "Time after which client records are removed.")
    max_clients: Positive = row(100_000, "Client records kept; more remove those not seen for longest.")
    slow: Timeout = row(
        1.0, "A request that takes longer than this is kept with where its seconds went, for `gup why`."
    )
    demand: Duration = row(
        35 * DAY, "How long it is recorded what was asked for, for `gup report sizing`; 0 records nothing."
    )
    ledger: Timeout = row(400 * DAY, "How long the savings of single days are kept; older ones are added up.")
    price_per_gb: Price | None = row(
        None,
        "What a gigabyte (10^9 bytes) over the WAN costs, for the statement; without it no money is shown.",
    )
    currency: Currency = row("", 'Of that price, such as "EUR".')
    timeline: Timeout = row(
        400 * DAY, "How long it is kept which client had which revision when; also of clients not seen since."
    )


class Alarms(Section):
    """Where alarms are sent when they begin and end: to a webhook, to a command, or to both."""

    webhook: HookUrl | None = row(
        None, "URL that messages are POSTed to, as JSON; its query is kept secret.", repr=False
    )
    webhook_secret: SigningKeys | None = row(
        None,
        "Key of the signatures (Standard Webhooks): whsec_ and 24 to 64 bytes in base64; several, with "
        "spaces, sign while one replaces another.",
        repr=False,
    )
    webhook_secret_file: Absolute | None = row(
        None, "File that has the key; it replaces webhook_secret; read again on reload."
    )
    webhook_timeout: Timeout = row(15.0, "Time for the receiver to answer.")
    webhook_proxy: Proxy | None = row(
        None, "URL of a web proxy on the way; its password is kept secret.", repr=False
    )
    webhook_ca_file: Absolute | None = row(
        None, "Certificates (PEM) to trust in place of the system's; read again on reload."
    )
    command: CommandLine = row(
        [],
        "Program and arguments, run for each message without a shell: JSON on standard input, ALARM_* set.",
    )
    command_timeout: Timeout = row(30.0, "Time for the command to end; it is killed then.")
    sick_share: Count = row(
        5,
        "An alarm begins when `gup report clients --sick` finds something with so many percent of them.",
    )


class Workers(Section):
    """Data plane processes."""

    count: Annotated[Count, Field(le=1024)] = row(0, "Worker processes; 0 is one a core.")


def _host_name() -> str:
    return "".join(letter if is_token(letter) else "-" for letter in socket.gethostname())[:64] or "gup"


class Site(Section):
    """The site itself."""

    name: SiteName = Field(
        default_factory=_host_name, description="Its name in metrics, Via and pages; default: the host's."
    )
    time_zone: TimeZone = row("", 'IANA time zone of its hours, such as "Europe/Paris"; "" is the host\'s.')


class Cluster(Section):
    """Several gups as one cache; docs/cluster.md shows how. Without `url` this one is alone."""

    url: EngineUrl | None = row(
        None,
        "Valkey or Redis, through which the members know each other; rediss:// is with TLS. With sentinels "
        "its host and port do not count.",
    )
    password_file: Absolute | None = row(
        None, "File with the engine's password; only the controller reads it."
    )
    ca_file: Absolute | None = row(None, "Certificates (PEM) to trust at rediss:// in place of the system's.")
    sentinels: Sentinels = row([], "Sentinels that know where the engine's primary is, as host:port.")
    sentinel_name: Label | None = row(None, "What the sentinels call the primary.")
    site: NodeName | None = row(None, "The site: gups of one site, at one engine, are one cache.")
    node: NodeName = Field(
        default_factory=_host_name,
        description="This gup's name among the members, no two alike; default: the host's.",
    )
    address: MemberUrl | None = row(None, "How the other members reach this one: http://host:port.")
    listen: Endpoint = row("0.0.0.0:2969", "Address and port where members are answered.")
    secret_file: Absolute | None = row(
        None,
        "File with the secret that all members share. Two may stand in it, one a line, while one is changed: "
        "the first signs, both are accepted.",
    )
    member_timeout: Annotated[Duration, _good(lambda seconds: seconds >= 2.0, 'must be at least "2s"')] = row(
        5.0, "A member that is silent for this time is taken off the list."
    )

    @property
    def listen_address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def _one_upstream(value: object) -> object:
    """URLs with commas, as in the environment, or a single table stand for a list of tables."""
    if isinstance(value, str) and value.lstrip()[:1] not in ("[", "{"):
        return [{"url": url.strip()} for url in value.split(",") if url.strip()]
    return [value] if isinstance(value, dict) else value


class Settings(Section):
    """All settings of a service, checked."""

    listen: Listen = Field(default_factory=Listen)
    cache: Cache = Field(default_factory=Cache)
    upstream: Annotated[list[Upstream], BeforeValidator(_one_upstream)] = Field(default_factory=list)
    fill: Fill = Field(default_factory=Fill)
    prefetch: Prefetch = Field(default_factory=Prefetch)
    wan: Wan = Field(default_factory=Wan)
    clients: Clients = Field(default_factory=Clients)
    catalog: Catalog = Field(default_factory=Catalog)
    rules: Rules = Field(default_factory=Rules)
    log: Log = Field(default_factory=Log)
    reports: Reports = Field(default_factory=Reports)
    alarms: Alarms = Field(default_factory=Alarms)
    workers: Workers = Field(default_factory=Workers)
    site: Site = Field(default_factory=Site)
    cluster: Cluster = Field(default_factory=Cluster)

    @property
    def worker_count(self) -> int:
        return self.workers.count or len(os.sched_getaffinity(0))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names, listen = [upstream.name for upstream in self.upstream], self.listen
        addresses = {listen.address, listen.admin_address}
        problems = [
            f"upstream: the name {name!r} is used {names.count(name)} times; each upstream must have its own"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if listen.port == listen.admin_port != 0 and (len(addresses) == 1 or addresses & {"0.0.0.0", "::"}):  # noqa: S104
            problems.append(f"listen.admin_port: {listen.admin_port} is listen.port too; they must differ")
        if listen.admin_token_file is None and not ipaddress.ip_address(listen.admin_address).is_loopback:
            problems.append(
                f"listen.admin_address: {listen.admin_address} can be reached by others, so every request "
                "needs a token: listen.admin_token_file must name a file with one, such as made by "
                "openssl rand -hex 32; or set it to 127.0.0.1"
            )
        if (listen.admin_cert_file is None) != (listen.admin_key_file is None):
            missing = "admin_cert_file" if listen.admin_cert_file is None else "admin_key_file"
            problems.append(f"listen.{missing}: missing; certificate and key go together")
        problems += _lacking_for_cluster(self.cluster, {listen.port, listen.admin_port})
        alarms = self.alarms
        secrets = [alarms.webhook_secret, alarms.webhook_secret_file]
        if alarms.webhook is not None and secrets == [None, None]:
            problems.append(f"alarms.webhook_secret: missing; it or alarms.webhook_secret_file {KEY_IS}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _lacking_for_cluster(cluster: Cluster, ports: set[int]) -> Iterator[str]:
    """What does not fit together in `[cluster]`; `ports` are those that are taken."""
    if cluster.url is None:
        given = ("address", "password_file", "secret_file", "sentinel_name", "site")
        for key in [key for key in given if getattr(cluster, key) is not None]:
            yield f"cluster.{key}: it needs cluster.url, the engine's, such as redis://valkey:6379"
        return
    needed = {
        "site": "the site's name, the same at all members",
        "address": "how the other members reach this one, such as http://10.0.0.5:2969",
        "secret_file": "a file with the secret that all members share, such as made by openssl rand -hex 32",
    }
    for key, right in needed.items():
        if getattr(cluster, key) is None:
            yield f"cluster.{key}: missing; with cluster.url it must be {right}"
    if bool(cluster.sentinels) != (cluster.sentinel_name is not None):
        missing = "sentinel_name" if cluster.sentinels else "sentinels"
        yield f"cluster.{missing}: missing; sentinels and sentinel_name go together"
    port = cluster.listen_address[1]
    if port and port in ports:
        yield f"cluster.listen: port {port} is in [listen] too; they must differ"
