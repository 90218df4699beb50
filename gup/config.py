"""Every setting, once: names, units, defaults, help. Reads file, environment and flags; nothing else does.

Sizes are bytes, rates bytes per second (0 = unlimited), durations seconds once they are read.
"""

import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from gup.errors import SettingsError

_SIZE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: object) -> int:
    """Bytes in a size such as "20GB", "512 KiB", "4096" or 4096; ValueError says what would be right."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    unit = match[2] or "B" if match else ""
    if match is None or unit not in _SIZE_UNITS:
        raise ValueError('a size is a number with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as "20GB"')
    return round(float(match[1]) * _SIZE_UNITS[unit])


def parse_rate(value: object) -> int:
    """Bytes per second in a rate such as "8MB/s"; 0 is unlimited. ValueError says what would be right."""
    if value in (0, "0", "unlimited"):
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and value.strip().endswith("/s"):
        return parse_size(value.strip().removesuffix("/s"))
    raise ValueError('a rate is a size for each second, such as "8MB/s" or "500kB/s"; "0" is unlimited')


def parse_duration(value: object) -> float:
    """Seconds in a duration such as "30d", "10s" or 10; ValueError says what would be right."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    unit = match[2] or "s" if match else ""
    if match is None or unit not in _DURATION_UNITS:
        raise ValueError('a duration is a number with ms, s, m, h or d, such as "30d" or "10s"')
    return float(match[1]) * _DURATION_UNITS[unit]


Size = Annotated[int, BeforeValidator(parse_size)]
Rate = Annotated[int, BeforeValidator(parse_rate)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A table of the file; frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Listen(Section):
    """Where clients and administrators connect."""

    address: str = Field("0.0.0.0", description="address of the data plane")  # noqa: S104 - a site's service
    port: Port = Field(2967, description="port of the data plane")
    admin_address: str = Field("127.0.0.1", description="address of the control plane")
    admin_port: Port = Field(2968, description="port of the control plane")
    backlog: Count = Field(4096, description="connections the kernel queues per worker")
    max_connections: Count = Field(
        20000, description="client connections per machine; more are closed at once"
    )
    header_timeout: Duration = Field("15s", description="for a request head to arrive whole")
    idle_timeout: Duration = Field("75s", description="for the next request on a connection")
    write_timeout: Duration = Field("60s", description="for a client to take any byte while one is offered")
    drain_timeout: Duration = Field("30s", description="for responses under way when the service stops")


class Cache(Section):
    """The store on disk, its limits and how long things stand."""

    directory: Path = Field(Path("/var/lib/gup"), description="the cache directory")
    max_size: Size = Field("20GB", description="of all bodies and parts together")
    min_free: Size = Field("1GB", description="to be left free on the file system")
    max_unused: Duration = Field("30d", description="after which an entry that nobody asked for is evicted")
    keep_revisions: Count = Field(10, description="newest revisions kept of a stream; 0 keeps all")
    max_part_age: Duration = Field("7d", description="after which an unfinished part is removed")
    negative_ttl: Duration = Field("10s", description="for which an upstream's 404 or 410 stands")
    error_ttl: Duration = Field("2s", description="for which an upstream's failure stands")
    index_ttl: Duration = Field("60s", description="for which an index file is fresh")
    max_stale: Duration = Field(
        "7d", description="for which an index file is served while no upstream answers"
    )
    verify: Literal["first_use", "always", "scrub"] = Field(
        "first_use", description="when stored bytes are compared with their sums"
    )


class Upstream(Section):
    """One management server, LiveUpdate server or other gup."""

    name: str = Field("", description="in logs and metrics; default: the URL's host and port")
    url: str = Field(description="http:// or https://, host, port; a path is put before every request")
    kind: Literal["manager", "liveupdate", "gup"] = Field("manager", description="what it is")
    priority: Count = Field(0, description="lower is asked first")
    version: str = Field("any", description="release or build of the manager, such as 14.3 RU2")
    language: str = Field("any", description="language of the manager, such as French or fr")
    ca_file: Path | None = Field(None, description="certificates (PEM) to trust instead of the system's")
    verify_tls: bool = Field(True, description="whether its certificate must be right")
    proxy: str | None = Field(None, description="URL of a web proxy on the way")
    headers: dict[str, str] = Field(default_factory=dict, description="sent with every request (secret)")
    max_connections: Annotated[int, Field(ge=1)] = Field(16, description="at once, per worker")
    connect_timeout: Duration = Field("5s", description="for a connection, TLS included")
    read_timeout: Duration = Field("15s", description="for any byte of an answer")
    give_up: Duration = Field("60s", description="without a new byte, over all tries and upstreams")
    health_interval: Duration = Field("30s", description="between health checks; 0 makes none")

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        if not re.fullmatch(
            r"https?://(?:\[[0-9A-Fa-f:.]+\]|[^\s/@:\[\]?#]+)(?::\d{1,5})?(?:/[^\s?#]*)?", value
        ):
            raise ValueError("an upstream's URL is http://host:port or https://host:port, without query")
        return value.rstrip("/")

    @field_validator("version", "language")
    @classmethod
    def _variant(cls, value: str) -> str:
        value = value.strip()
        if not value or value.startswith(".") or len(value) > 64 or re.search(r"[/\\\x00-\x1f]", value):
            raise ValueError("must be 1 to 64 printable characters without / or \\, not beginning with a dot")
        return value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("url"), str):
            return {**value, "name": value["url"].split("://")[-1].split("/")[0]}
        return value


class Fill(Section):
    """Fetching from upstream."""

    max: Annotated[int, Field(ge=1)] = Field(8, description="fills that stream at once, over all workers")
    queue_timeout: Duration = Field("30s", description="for a request to wait for a fill to begin")
    range_wait: Duration = Field(
        "10s", description="for a range to be reached by the fill before it is fetched alone"
    )


class WanSchedule(Section):
    """Another WAN rate at certain hours."""

    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = Field(description="weekdays")
    from_: str = Field(alias="from", pattern=r"^([01]\d|2[0-3]):[0-5]\d$", description="first minute, HH:MM")
    to: str = Field(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$", description="minute after the last, HH:MM")
    rate: Rate = Field(description="while it holds")


class Wan(Section):
    """What all fills together may take of the WAN."""

    rate: Rate = Field("8MB/s", description='bytes from upstream, over all workers; "0" is unlimited')
    schedule: list[WanSchedule] = Field(default_factory=list, description="other rates at certain hours")


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"a network is an address with its prefix, such as 10.0.0.0/8 ({error})") from error
    return value


Network = Annotated[str, AfterValidator(_network)]

PRIVATE_NETWORKS = (
    "127.0.0.0/8",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
)
"""Loopback, private and link-local ranges (RFC 1918, RFC 3927, RFC 4193, RFC 4291)."""


class Clients(Section):
    """Who may ask, and how much at once."""

    allow: list[Network] = Field(list(PRIVATE_NETWORKS), description="networks of the site's clients")
    max_downloads: Count = Field(0, description="bodies sent at once; more wait; 0 is unlimited")
    queue: Count = Field(1000, description="requests that may wait for a download; more get 503")
    rate: Rate = Field("0", description="bytes to each connection")


class Rules(Section):
    """Delivery rules for client patches."""

    mode: Literal["enforce", "report", "off"] = Field("enforce", description="refuse, only count, or neither")
    version_match: Literal["release", "build"] = Field("release", description="what equal versions means")
    undeclared: Literal["serve", "refuse"] = Field("serve", description="a client that states no version")
    unlisted: Literal["serve", "refuse"] = Field(
        "serve", description="a moniker that the catalogue does not list"
    )
    download_client_patches: bool = Field(True, description="whether client patches are served at all")
    content_types: list[str] = Field(default_factory=list, description="content types served; empty is all")
    english_after_autoupgrade: bool = Field(
        False, description="English patches from a manager of another language"
    )


class Log(Section):
    """Where the log goes."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level written")
    format: Literal["text", "json"] = Field("text", description="one line of text, or one JSON object")
    access: Literal["off", "sampled", "all"] = Field(
        "sampled", description="requests: none, misses and few hits, all"
    )


class Workers(Section):
    """Data plane processes."""

    count: Count = Field(0, description="worker processes; 0 is one a core")


class Site(Section):
    """The site itself."""

    name: str = Field(default_factory=socket.gethostname, description="in metrics, Via and pages")


class Settings(Section):
    """All settings of a service, checked."""

    listen: Listen = Field(default_factory=lambda: Listen())  # noqa: PLW0108 - mypy plugin-free defaults
    cache: Cache = Field(default_factory=lambda: Cache())  # noqa: PLW0108
    upstream: list[Upstream] = Field(default_factory=list)
    fill: Fill = Field(default_factory=lambda: Fill())  # noqa: PLW0108
    wan: Wan = Field(default_factory=lambda: Wan())  # noqa: PLW0108
    clients: Clients = Field(default_factory=lambda: Clients())  # noqa: PLW0108
    rules: Rules = Field(default_factory=lambda: Rules())  # noqa: PLW0108
    log: Log = Field(default_factory=lambda: Log())  # noqa: PLW0108
    workers: Workers = Field(default_factory=lambda: Workers())  # noqa: PLW0108
    site: Site = Field(default_factory=lambda: Site())  # noqa: PLW0108

    @property
    def worker_count(self) -> int:
        return self.workers.count or len(os.sched_getaffinity(0))


def load(
    file: Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from `file` (TOML), `GUP_<SECTION>__<KEY>` and flags, the later winning.

    `flags` is nested like the file. SettingsError names every key that is wrong.
    """
    raise NotImplementedError
