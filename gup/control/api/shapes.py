"""The shape of `/api/v1/status` and its parts, for the description. Holds no figures."""

from typing import Literal

from pydantic import Field

from gup.control.api.described import Answer


class Totals(Answer):
    """What was sent, fetched and saved."""

    client_sent_bytes: int
    upstream_received_bytes: int
    saved_bytes: int = Field(description="Sent minus received; may be below zero.")
    requests: dict[str, int] = Field(description="By result.")
    requests_total: int
    hit_ratio: float | None = Field(description="Of the requests for content; null before the first.")
    fills: int
    evictions: int
    evicted_bytes: int
    integrity_failures: int


class BothTotals(Answer):
    """Totals of two spans."""

    since_start: Totals
    since_install: Totals


class CacheState(Answer):
    """The store against its limit."""

    entries: int
    entries_bytes: int
    parts: int
    parts_bytes: int
    size_bytes: int
    limit_bytes: int
    free_bytes: int
    complete: bool = Field(description="Whether the index stands for the whole store yet.")


class Refused(Answer):
    """What can't be written at present."""

    what: str
    detail: str
    since: float
    last: float


class DiskState(Answer):
    """What the disk refuses."""

    refusals: list[Refused]


class Fill(Answer):
    """A fill under way."""

    key: str | None
    id: str
    phase: str | None
    received_bytes: int
    length_bytes: int | None
    upstream: str | None
    product: str | None
    language: str | None
    kind: str | None
    began_at: float
    bytes_per_second: float | None = Field(description="Over the last seconds; null when it has just begun.")
    remaining_seconds: float | None = Field(description="At that rate; null when that can't be told.")


class Seen(Answer):
    """Addresses seen, by window."""

    hour: int = Field(alias="1h")
    day: int = Field(alias="1d")
    week: int = Field(alias="7d")


class ClientsState(Answer):
    """The clients at a glance."""

    connections: int
    seen: Seen


class Worker(Answer):
    """A process of the data plane."""

    slot: int
    pid: int
    up_since: float
    ready: bool


class CatalogueState(Answer):
    """What was read of an upstream's catalogue."""

    source: str | None
    streams: int | None
    read_at: float | None
    problem: str | None


class Upstream(Answer):
    """An upstream and its health."""

    name: str
    url: str
    kind: str
    priority: int
    weight: int
    version: str
    language: str
    up: bool
    state: str
    since: float
    last_error: str | None
    last_error_at: float | None
    catalogue: CatalogueState | None


class Limit(Answer):
    """A limit, null when there is none, and what is used of it."""

    limit: int | None
    used: int


class OneLimit(Answer):
    """A limit of each client or connection."""

    limit: int | None


class Limits(Answer):
    """All limits."""

    downloads: Limit
    queue: Limit
    connections: Limit
    connections_per_address: OneLimit
    client_rate_bytes_per_second: OneLimit
    wan_rate_bytes_per_second: Limit
    cache_size_bytes: Limit
    fills: Limit


class Scrub(Answer):
    """The present or last pass of the scrubber."""

    running: bool
    rate_bytes_per_second: int | None
    began_at: float | None
    ended_at: float | None
    next_at: float | None
    checked: int
    checked_bytes: int
    entries: int
    entries_bytes: int
    damaged: int
    mended: int


class ReloadState(Answer):
    """Whether the last reload took."""

    successful: bool


class Alarm(Answer):
    """Something that an operator should look at."""

    name: str
    severity: Literal["warning", "critical"]
    since: float
    subject: str = Field(description="What it is about; empty for the service itself.")
    text: str
    what_to_do: str


class PastFailure(Answer):
    """A fill that failed."""

    at: float
    key: str
    problem: str
    detail: str


class Status(Answer):
    """Everything at a glance."""

    site: str
    version: str
    started_at: float
    installed_at: float
    uptime_seconds: float
    ready: bool
    totals: BothTotals
    cache: CacheState
    disk: DiskState
    fills: list[Fill]
    fill_waiters: int
    clients: ClientsState
    workers: list[Worker]
    upstreams: list[Upstream]
    wan_rate_bytes_per_second: int | None
    limits: Limits
    scrub: Scrub
    reload: ReloadState
    alarms: list[Alarm]
    failures: list[PastFailure]
    malformed_events: int
