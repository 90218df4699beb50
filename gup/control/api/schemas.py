"""The bodies of the API's responses, as they are sent and as the OpenAPI document describes them.

Sizes are bytes, times Unix seconds, durations seconds. A member that is null is unknown or does not apply.
"""

import base64
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, RootModel, WithJsonSchema, WrapValidator

from gup.cache.archive import Imported
from gup.content.key import Kind

_UNCONFIRMED = "Members of the cluster that have not confirmed it within a second: they follow."


class Response(BaseModel):
    """Made by name, or from another object's attributes. Members with a default are left out unless set.

    Clients must accept further members.
    """

    model_config = ConfigDict(
        extra="forbid",
        from_attributes=True,
        json_schema_extra=lambda schema: schema.pop("additionalProperties", 0),
    )


class Problem(Response):
    type: str
    title: str
    status: int
    detail: str


class Variant(Response):
    """A version and a language: of a client as it stated them last, of content, or of an upstream."""

    version: str | None
    language: str | None


class Moved(Response):
    """In one time span; saved is sent minus received and may be below zero."""

    client_sent_bytes: int
    upstream_received_bytes: int
    saved_bytes: int
    requests: dict[str, int] = Field(description="By result.")
    evicted_bytes: int
    integrity_failures: int


class Totals(Moved):
    requests_total: int
    hit_ratio: float | None = Field(description="Of the requests for content; null before the first.")
    fills: int
    evictions: int


class Cache(Response):
    entries: int
    entries_bytes: int
    parts: int
    parts_bytes: int
    size_bytes: int
    limit_bytes: int
    free_bytes: int
    complete: bool = Field(description="Whether the index covers the whole store yet.")


class WriteRefusal(Response):
    what: str
    detail: str
    since: float
    last: float


class Disk(Response):
    refusals: list[WriteRefusal]


class Fill(Response):
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
    remaining_seconds: float | None = Field(description="At that rate; null while unknown.")


class Fills(Response):
    fills: list[Fill]
    waiters: int = Field(description="Requests that wait for them.")


class SeenClient(Response):
    address: str
    seen_at: float


class ClientCounts(Response):
    connections: int
    seen: dict[str, int] = Field(description="In the last 1h, 1d and 7d.")
    latest: list[SeenClient] = Field(
        description="Those seen last, by the names that reports.addresses allows."
    )


class Worker(Response):
    slot: int
    pid: int
    up_since: float
    ready: bool
    leaving: bool = Field(False, description="Whether others serve in its place, and it ends its responses.")


class Catalog(Response):
    source: str | None
    streams: int | None
    read_at: float | None
    problem: str | None


class Upstream(Response):
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
    catalogue: Catalog | None


class Upstreams(Response):
    upstreams: list[Upstream]


class Limit(Response):
    limit: int | None = Field(description="Null when there is none.")
    used: int = Field(default=0, description="Left out where each client or connection has its own limit.")


class Scrub(Response):
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


class Reload(Response):
    successful: bool = Field(description="Whether the last reload succeeded.")


class Alarm(Response):
    id: str = Field(description="From its begin to its end, also over a restart.")
    name: str
    severity: Literal["warning", "critical"]
    since: float
    subject: str = Field(description="What it is about; empty for the service itself.")
    text: str
    what_to_do: str


class Alarms(Response):
    alarms: list[Alarm] = Field(description="The active alarms, the critical ones first.")


class TestMessage(Response):
    to: str = Field(description="webhook or command.")
    accepted: bool
    detail: str = Field(description="Why it was not accepted; else what the command wrote.")


class TestMessages(Response):
    sent: list[TestMessage]


class FailedFill(Response):
    at: float
    key: str
    problem: str
    detail: str


class KeyNote(Response):
    at: float
    detail: str
    upstream: str = ""
    resumes: int = 0
    seconds: float = 0.0


class Traffic(Response):
    """Bytes of a time span. Saved is sent minus received, and may be below zero."""

    sent_bytes: int
    received_bytes: int
    saved_bytes: int
    wasted_bytes: int = Field(description="Of those received, what was of no use.")

    @classmethod
    def of(cls, sent: int, received: int, wasted: int, /, **more: Any) -> Self:
        moved = {"sent_bytes": sent, "received_bytes": received, "wasted_bytes": wasted}
        return cls(**moved, saved_bytes=sent - received, **more)


class SiteTraffic(Traffic):
    """Of all members, and of those that are gone: received over the WAN, saved for the site."""

    between_members_bytes: int = Field(description="From one to another: neither WAN bytes nor saved ones.")


_TOTALS = "Counters since it was installed, by metric."


class ClusterMember(Response):
    name: str
    address: str
    askable: bool = Field(description="Whether this node asks it; true for itself.")
    state: Literal["ready", "not-ready", "unreachable", "unlike", "unknown", "alone"] = Field(
        description="As this node sees it. Unlike: it has another protocol or other upstreams. Alone: this "
        "node, whose name another one has."
    )
    detail: str = Field(description='Why it is not ready; "" when it is.')
    told_seconds: float | None = Field(description="Since it told its figures; null when it never has.")
    share_bytes_per_second: int | None = Field(description="Of the WAN's rate; null while it has no grant.")
    wan_bytes_per_second: int | None = Field(
        description="What it reads from the WAN; null when it has told nothing for three seconds."
    )
    unconfirmed_orders: int | None = Field(
        description="Purges and pins that this node knows and it does not; null while that is unknown."
    )
    totals: dict[str, int] = Field(description=_TOTALS)


class GoneMember(Response):
    name: str
    address: str
    left: bool = Field(description="It said goodbye; else it fell silent.")
    gone_seconds: float
    totals: dict[str, int] = Field(description=_TOTALS)


class Cluster(Response):
    site: str | None = Field(description="None: this gup is alone.")
    node: str
    alone: bool = Field(
        description="Whether it has no part in the cluster: no settings, or its name is taken."
    )
    engine_error: str | None = Field(description="Why the engine does not answer; None when it does.")
    wan_rate_bytes_per_second: int | None = Field(description="The site's now; None: unlimited.")
    members: list[ClusterMember] = Field(description="This node too, by name.")
    gone: list[GoneMember] = Field(description="Members of the last day, as far as this node has seen it.")
    sums: SiteTraffic


class RevisionOnHold(Response):
    stream: str = Field(description="The moniker.")
    product: str
    revision: str
    held_by: str = Field(description="As they stated it.")
    held_at: float
    reason: str
    except_subnets: list[str] = Field(description="Clients in these may have it.")
    newest: str | None = Field(description="The newest revision stored here that all clients may have.")


class WaitingRevision(Response):
    stream: str = Field(description="The moniker.")
    product: str
    revision: str
    opens_at: float = Field(description="When all clients get it.")
    first: list[str] = Field(description="Clients in these get it already.")


class RevisionsOnHold(Response):
    holds: list[RevisionOnHold]
    canary: list[WaitingRevision] = Field(description="New revisions, which only some clients get.")


class HoldsChanged(RevisionsOnHold):
    unconfirmed: list[str] = Field(description=_UNCONFIRMED)


class BudgetForecast(Response):
    """What the use so far, and that of the days before, lead to."""

    expected_bytes: int | None = Field(description="At the period's end; null while nothing is known.")
    expected_share: float | None = Field(description="The same, of the budget.")
    runs_out_at: float | None = Field(description="When the budget is used up; null: not in this period.")
    basis: Literal["weekdays", "days", "period", "none"] = Field(
        description="Means by weekday, of all days before, or this period alone; none: too early to tell."
    )
    days: int = Field(description="How many whole days it is judged by.")


class BudgetNode(Response):
    node: str
    id: str = Field(description="Of its counts; a gup that was installed again has another one.")
    used_bytes: int
    told_at: float = Field(description="When it was heard of last.")


class Budget(Response):
    """The bytes that may cross the WAN in a period, those of all gups of a cluster together."""

    bytes: int | None = Field(description="Null: no budget is set.")
    per: Literal["month", "day"]
    period_began_at: float
    period_ends_at: float
    used_bytes: int = Field(description="Without those of cheap hours.")
    left_bytes: int | None
    used_share: float | None
    cheap_now: bool = Field(description="Whether bytes do not count at this hour.")
    cheap_bytes: int = Field(description="Received in cheap hours of this period.")
    by_kind: dict[Literal["full", "delta", "index", "other"], int] = Field(
        description="All that was received in this period, cheap or not."
    )
    background_bytes: int = Field(description="Those of them that were prefetched.")
    held_back: list[Literal["background", "full", "delta"]] = Field(description="What is held back now.")
    opens_at: float | None = Field(description="When that ends by itself.")
    held_back_total: dict[Literal["background", "full", "delta"], int] = Field(
        description="Fills held back since the installation."
    )
    forecast: BudgetForecast
    nodes: list[BudgetNode]
    saying: str = Field(description="All this in a sentence.")


class Outbreak(Response):
    began_at: float
    until: float
    left_seconds: float
    by: str = Field(description="As they stated it.")
    reason: str


class OutbreakState(Response):
    outbreak: Outbreak | None = Field(description="Null: there is none.")


class OutbreakChanged(OutbreakState):
    unconfirmed: list[str] = Field(description=_UNCONFIRMED)


class Status(Response):
    site: str
    version: str
    pid: int = Field(description="The controller's.")
    started_at: float
    installed_at: float
    uptime_seconds: float
    ready: bool
    totals: dict[Literal["since_start", "since_install"], Totals]
    cache: Cache
    disk: Disk
    fills: list[Fill]
    fill_waiters: int
    clients: ClientCounts
    workers: list[Worker]
    upstreams: list[Upstream]
    wan_rate_bytes_per_second: int | None
    limits: dict[str, Limit] = Field(description="By what is limited.")
    scrub: Scrub
    reload: Reload
    alarms: list[Alarm]
    holds: list[RevisionOnHold] = Field(description="Revisions that clients do not get.")
    canary: list[WaitingRevision] = Field(description="New revisions, which only some clients get.")
    budget: Budget | None = Field(description="Of the WAN; null: none is set.")
    outbreak: Outbreak | None = Field(description="Null: there is none.")
    cluster: Cluster | None = Field(description="None: this gup is alone.")
    failures: list[FailedFill]
    malformed_events: int


class Remedy(Response):
    action: str = Field(description="A word for programs.")
    text: str
    url: str = Field("", description="The LiveUpdate server's, where that is the way.")


class Decision(Response):
    upstream: str
    catalogue: str = Field(description="Where its catalogue was read, or why not.")
    product: str | None
    product_language: str | None
    refused: bool = Field(description="Whether that is enforced.")
    allowed: bool
    rule: str | None = Field(description="Which rule refuses.")
    because: str
    type: str | None = Field(description="Type of content.")
    client: Variant
    fits: Variant
    remedies: list[Remedy]
    notes: list[str]


class Explanation(Response):
    moniker: str
    mode: str = Field(description="enforce, report or off.")
    allowed: bool = Field(description="At any of them that has content under /content/.")
    served_from: str | None = Field(description="The upstream that the client would be served from.")
    decisions: list[Decision]
    client_notes: list[str] = Field(description="What is stated and can't be read.")


# --- cursors: the position of a page's last row, as text that the client sends to get the next page


def _read(value: object, check: Callable[[object], Any]) -> Any:
    try:
        return check(json.loads(base64.urlsafe_b64decode(value)) if isinstance(value, str) else value)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not a cursor from an earlier page") from error


def _written(place: tuple[float, str | int]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Number = Annotated[int, Field(ge=0, lt=2**63)]
_AS_TEXT = WithJsonSchema({"type": "string", "minLength": 1})
EntryCursor = Annotated[tuple[_Finite, str], WrapValidator(_read), PlainSerializer(_written), _AS_TEXT]
"""The value that entries are sorted by, and the last entry's key."""
ClientCursor = Annotated[tuple[_Finite, _Number], WrapValidator(_read), PlainSerializer(_written), _AS_TEXT]
"""When the last client was seen, and its number among those seen at that time."""
CURSOR = "From the previous page, with the same other parameters."


class Entry(Response):
    key: str
    version: str
    language: str
    stream: str
    revision: str = Field(description="The folder's.")
    file: str
    product: str = Field(description="From the catalogue; the moniker when it is not listed.")
    product_version: str | None = Field(description="From the catalogue: what the product is made for.")
    product_language: str | None = Field(description="From the catalogue.")
    type: str | None = Field(description="Type of content, from the catalogue.")
    kind: Kind
    content_revision: str | None = Field(description="What it brings a client to, if the names tell.")
    from_revision: str | None = Field(description="Of a delta.")
    to_revision: str | None = Field(description="Of a delta.")
    length_bytes: int
    stored_at: float
    used_at: float
    hits: int
    pinned: bool
    sent_bytes: int
    received_bytes: int = Field(description="Over the WAN, not from other members of the cluster.")


class Entries(Response):
    entries: list[Entry]
    matching: int = Field(description="How many match, on all pages.")
    cursor: EntryCursor | None = Field(description="The cursor of the next page; null on the last.")
    complete: bool = Field(description="Whether the index covers the whole store yet.")


class EntryRecord(Response):
    """The entry's record, without the sums of its chunks."""

    model_config = ConfigDict(extra="ignore")

    format: int
    key: str
    kind: Kind
    length: int
    etag: str
    content_type: str
    last_modified: str | None
    upstream: str
    upstream_etag: str | None
    stored_at: float
    validated_at: float
    pinned: bool
    generation: int
    path: str


class EntryWithRecord(Entry):
    record: EntryRecord | None = Field(description="Null when it is damaged or has just been removed.")


class Purged(Response):
    key: str
    freed_bytes: int
    unconfirmed: list[str] = Field(description=_UNCONFIRMED)


class PurgedEntries(Response):
    dry_run: bool
    entries: int = Field(description="Entries purged, or with a dry run those that would be.")
    freed_bytes: int
    pinned: int = Field(description="Skipped because they are pinned.")
    busy: int = Field(description="Skipped, with a filter by times, because another process used them.")
    unconfirmed: list[str] = Field(description=_UNCONFIRMED)


class Pinned(Response):
    key: str
    pinned: bool


class Import(RootModel[Imported]):
    """`present`: entries that were here already. `problem`: why the archive was not read to its end."""


class Eviction(Response):
    key: str
    reason: str
    size_bytes: int


class Evictions(Response):
    evicted: list[Eviction]
    freed_bytes: int


class Finding(Response):
    where: str = Field(description="body, record, part, state, stray or index.")
    path: str
    key: str | None
    detail: str
    mended: bool | None = Field(description="Null without repair.")
    why_not: str | None


class Verification(Response):
    running: bool
    repair: bool
    began_at: float | None
    ended_at: float | None
    failed: str | None = Field(description="Why it ended early.")
    checked: int
    total: int
    busy: int = Field(description="Left out: another process worked on them.")
    damaged: int
    mended: int
    found: list[Finding]


class Reloaded(Response):
    reloaded: bool = Field(description="Whether the new settings are in force; if not, the old ones are.")
    problems: list[str] = Field(description="Mistakes in the settings, each with its key.")
    changed: list[str] = Field(description="Keys whose new values are in force now.")
    waiting: list[str] = Field(
        description="Keys whose new values need a restart; until then the old values are in force."
    )


class Upgraded(Response):
    upgraded: bool = Field(description="Whether the new program takes over; if not, the old one goes on.")
    problems: list[str] = Field(description="Why the new program can't take over.")
    pid: int = Field(description="The controller's, which is about to be replaced.")
    workers: list[int] = Field(description="Pids of the workers that are about to be replaced.")


class Prefetch(Response):
    key: str
    path: str = Field(description="The path at the upstream.")
    product: str
    language: str
    kind: Kind
    by: Literal["traffic", "operator"]
    outcome: Literal["queued", "fetching", "stored", "present", "absent", "failed", "superseded"]
    detail: str = Field(description="Why it is absent, failed, superseded, or tried again.")
    asked_at: float
    ended_at: float | None
    tries: int


class PrefetchOrder(Response):
    wanted: list[Prefetch] = Field(description="What was queued, for each variant that fits.")
    unconfirmed: list[str] = Field(description=_UNCONFIRMED)


class RuleRefusal(Variant):
    """Clients that state this version and language; null: nothing."""

    rule: str
    because: str
    enforced: bool
    clients: int


class Spell(Response):
    """Where the seconds of a fill or of a request went; the phases add up to the whole."""

    what: Literal["fill", "request"]
    key: str | None
    client: str | None
    at: float | None = Field(description="When it ended; null: it is under way.")
    seconds: float
    phases: dict[str, float]
    behind: dict[str, list[str]] = Field(
        description="By phase, who was in front: keys of fills, clients that had download slots."
    )
    said: str = Field(description="The same in a sentence.")


class Slowest(Response):
    """What takes long at present, and the slowest fills and requests of the last day."""

    under_way: list[Spell]
    slowest: list[Spell]


class KnownFile(Response):
    """What is known of one file; notes are of the time since the start."""

    key: str
    path: str = Field(description="The path at the upstream.")
    said: list[str] = Field(description="All of it in sentences.")
    stored: bool
    entry: Entry | None
    upstream: str | None = Field(description="Where the stored body came from.")
    fetched: KeyNote | None = Field(description="The last successful fill.")
    failed: KeyNote | None = Field(description="The last fill that failed.")
    unstored: KeyNote | None = Field(description="Why it was passed through without being stored.")
    removed: KeyNote | None = Field(description="Why it is no longer stored.")
    fill: Fill | None
    waiting: Literal["fill", "prefetch"] | None = Field(
        description="In which queue, or for upstream's answer."
    )
    prefetch: Prefetch | None
    refusals: list[RuleRefusal]
    taken: int = Field(description="Clients that took this revision here.")
    clients: list[SeenClient] = Field(description="The last of them, with the time when they took it.")
    times: Spell | None = Field(description="Of the fill under way, or else of the last one.")
    slow: list[Spell] = Field(description="The last slow requests for it.")


class Why(Response):
    files: list[KnownFile] = Field(description="One for each variant that the file may be stored as.")
    client: str | None = Field(description="As it is stored; null when a file was asked for.")
    slow: list[Spell] = Field(description="The client's last slow requests.")


class SkippedStream(Response):
    stream: str
    product: str
    why: str


class PrefetchQueue(Response):
    enabled: bool
    pending: int
    wanted: list[Prefetch] = Field(description="The latest first.")
    left_out: list[SkippedStream]


class Client(SeenClient, Variant):
    """A client, named as `reports.addresses` says."""


class KnownClient(Client):
    first_seen_at: float


class Clients(Response):
    seen: dict[str, int] = Field(description="In the last 1h, 1d and 7d.")
    known: int = Field(description="Client records.")
    matching: int = Field(description="How many match, on all pages.")
    clients: list[KnownClient] = Field(description="The last seen first.")
    cursor: ClientCursor | None = Field(description="The cursor of the next page; null on the last.")


class Report(Response):
    at: float
    addresses: str = Field(description="reports.addresses: full, hashed or off.")
    retention_seconds: float = Field(description="Records of clients not seen for so long are removed.")
    note: str | None = Field(description="Why the report is empty, where that is by the settings.")


class RevisionClients(Response):
    revision: str
    clients: int = Field(description="Clients at it now.")
    took: int = Field(description="Clients that ever took it here.")
    first_taken_at: float | None
    last_taken_at: float | None


class LaggingClient(Client):
    revision: str | None = Field(description="Its revision; null while unknown.")
    lag_revisions: int
    lag_seconds: float | None = Field(description="By the dates in the revisions: whole days.")
    taken_at: float | None
    asked: str | None = Field(description="The newest revision that it requested.")
    asked_at: float | None


class StreamReport(Response):
    product: str
    version: str
    language: str
    type: str | None
    moniker: str
    variant: Variant = Field(description="Whose bytes they are: of an upstream of this version and language.")
    clients: int = Field(description="Clients that requested any of it.")
    current: int = Field(description="Of them, those at the newest revision.")
    behind: int = Field(description="Of them, the others.")
    newest_held: str | None = Field(description="The newest revision in the store.")
    newest_taken: str | None
    newest_asked: str | None
    lag_revisions: int = Field(description="Known revisions newer than the newest held.")
    lag_seconds: float | None
    revisions: list[RevisionClients]
    lagging: list[LaggingClient] = Field(description="Those furthest behind first; 1000 a stream at most.")


class ContentReport(Report):
    content: list[StreamReport]


class ClientGroup(Variant):
    clients: int


class Restart(Client):
    state: Literal["pending", "unknown"] = Field(description="unknown: it states no build.")
    version_then: str | None = Field(description="As it stated when it took the patch.")
    product: str
    moniker: str
    revision: str
    taken_at: float


class RestartReport(Report):
    """Clients by what they state, and those that may wait for a restart."""

    clients: list[ClientGroup]
    catalogue_known: bool = Field(
        description="Without a catalogue it is not known which streams are patches."
    )
    pending: int
    unknown: int
    saying: str
    restart_pending: list[Restart]


class TimedRevision(Response):
    """A stream's revision that a client had at a moment, as far as this gup knows."""

    product: str
    version: str
    language: str
    type: str | None
    moniker: str
    revision: str | None = Field(description="Null: nothing was known of it then.")
    how: Literal["taken", "stated"] | None = Field(
        description="taken: it was sent all of it here; stated: it asked for a delta from it."
    )
    age_days: int | None = Field(description="From the date in the revision's name to that moment.")
    changed_at: float | None = Field(description="When it came to this revision.")
    next_revision: str | None = Field(description="The first known change after that moment.")
    next_at: float | None
    exact: bool = Field(description="False: of that day the last change is kept, and others may be missing.")


class RevisionChange(Response):
    at: float
    product: str
    moniker: str
    revision: str
    how: Literal["taken", "stated"]


class AgeShare(Response):
    """The active clients of an hour, by age of their revision."""

    at: float
    product: str | None = Field(description="Null: the whole site, each client by its oldest stream.")
    version: str | None
    language: str | None
    moniker: str | None
    clients: int
    current: int = Field(description="Of them, those at the newest revision known then.")
    ages: dict[str, int] = Field(
        description="1d: today's or yesterday's revision; 3d, 7d, 30d: not older than so many days; older; "
        "unknown."
    )
    newest: str | None = Field(description="The newest revision known then: held, taken or requested.")
    held: str | None = Field(description="The newest revision in the store then.")


class Timeline(Report):
    """Which revision a client had when, or the site's shares by age."""

    saying: str
    node: str | None = Field(description="In a cluster: whose record it is. Others have their own.")
    time_zone: str = Field(description='Of times without a zone; "" is the machine\'s.')
    kept_seconds: float = Field(description="reports.timeline.")
    since: float = Field(description="Changes are known from here on.")
    exact_since: float = Field(description="All of them from here on; before, the last of each day.")
    active_seconds: float = Field(description="Who requested something within this time is active.")
    moment: float | None = Field(description="The time asked about.")
    moment_note: str | None = Field(description="How that time was read, where it has two meanings or none.")
    client: str | None = Field(description="By the name that reports.addresses allows.")
    seen_at: float | None = Field(description="When the client was seen last; null without a record of it.")
    standings: list[TimedRevision]
    changes: list[RevisionChange] = Field(description="Of this client, the newest first; 10,000 at most.")
    shares: list[AgeShare] = Field(description="The newest first.")


class SickClient(Response):
    """What is wrong with a client."""

    address: str
    finding: Literal["repeated-full", "no-delta", "behind", "refused", "unfinished"]
    product: str | None = Field(description="The stream, or what it asked for; null: see `seen`.")
    moniker: str | None
    what: str = Field(description="The revision, the file or the rule.")
    times: int
    first_at: float
    last_at: float
    seen: str
    cause: str = Field(description="The likely cause.")
    what_to_do: str


class SickReport(Report):
    """Clients that something seems to be wrong with."""

    clients: int = Field(description="Clients seen within two weeks.")
    left_out: int = Field(description="Of them, addresses of several machines.")
    sick: int = Field(description="Clients with a finding.")
    findings: dict[str, int] = Field(description="Clients by finding.")
    examined_at: float
    examined_seconds: float
    rows: list[SickClient] = Field(description="500 of a finding at most.")


class TrafficByCause(Traffic):
    sent: dict[str, int] = Field(description="By source.")
    received: dict[str, int] = Field(description="By purpose.")
    wasted: dict[str, int] = Field(description="By reason.")


class StreamTraffic(Traffic):
    product: str
    language: str
    kind: str


class DayTraffic(TrafficByCause):
    """One day of the site; null is everything before single days were kept."""

    day: str | None
    streams: list[StreamTraffic]


class Savings(Response):
    """The savings ledger. All days together are the counters."""

    counted_since: float
    time_zone: str = Field(description='Of the days; "" is the machine\'s.')
    today: TrafficByCause
    last_30_days: TrafficByCause
    since_install: TrafficByCause
    days: list[DayTraffic] = Field(description="The newest first.")


class MonthDay(Traffic):
    day: str
    due_seconds: float = Field(description="For how long gup could count: since installed, until now.")
    covered_seconds: float | None = Field(description="For how long it did; null where that is not known.")
    ages: dict[str, int] | None = Field(
        description="Clients by age of their revision, all counts of the day added up; null without one."
    )


class StreamBehind(Response):
    product: str
    language: str
    counts: int
    counts_behind: int = Field(description="Of them, those in which something newer was known than held.")
    within_a_day: float | None = Field(description="Share of clients with today's or yesterday's revision.")
    at_newest: float | None = Field(description="Share of clients at the newest revision known.")


class IncidentSum(Response):
    name: str = Field(description="The alarm.")
    said: str = Field(description="What it means, in plain words.")
    severity: str
    subject: str | None = Field(description="Which server; null for other kinds.")
    count: int
    seconds: float = Field(description="In this month, all together.")
    longest_seconds: float
    lasts: bool = Field(description="Whether one has not ended yet.")


class PastIncident(Response):
    name: str
    said: str
    subject: str | None
    began_at: float
    ended_at: float | None = Field(description="Null: it lasts.")
    seconds: float = Field(description="In this month.")


class MonthReport(Response):
    """A month of the site, for those who pay the link."""

    month: str
    site: str
    node: str | None = Field(description="In a cluster: whose figures these are.")
    time_zone: str = Field(description='Of the month; "" is the machine\'s.')
    since: float
    until: float
    so_far: bool = Field(description="Whether the month is not over yet.")
    made_at: float
    installed_at: float
    traffic: TrafficByCause
    price_per_gb: str | None = Field(description="reports.price_per_gb; null: no money is shown.")
    currency: str | None
    saved_money: str | None = Field(description="Saved bytes at that price, to the hundredth.")
    days: list[MonthDay]
    streams: list[StreamTraffic] = Field(description="The ten with the most bytes sent.")
    covered_seconds: float | None = Field(description="For how long gup counted; null where unknown.")
    due_seconds: float
    clients_most: int | None = Field(description="The highest count of active clients.")
    clients_mean: int | None
    versions: list[ClientGroup] = Field(description="What clients state now, the ten most frequent.")
    within_a_day: float | None
    at_newest: float | None
    counted_by: Literal["hour", "day"] = Field(description="Of months long past one count a day is kept.")
    counts: int = Field(description="How often clients were counted.")
    counts_behind: int = Field(description="Of them, when something newer was known than held.")
    behind: list[StreamBehind]
    incidents: list[IncidentSum]
    notable: list[PastIncident] = Field(description="Critical ones and unreachable servers; 20 at most.")
    incidents_since: float | None
    reservations: list[str] = Field(description="What is to be known about these figures.")


class HistoryPoint(Moved):
    """One minute or hour: bytes moved, the highest rates in it, and the state at its end."""

    at: int = Field(description="When it began.")
    covered_seconds: float = Field(
        description="For how much of it there are figures; a rate is bytes divided by this."
    )
    upstream_wasted_bytes: int
    fills: dict[str, int] = Field(description="By outcome.")
    client_peak_bytes_per_second: int
    wan_peak_bytes_per_second: int
    wan_limit_bytes_per_second: int | None = Field(description="Null when unlimited.")
    cache_entries_bytes: int


class History(Response):
    """The points of a span, the oldest first; none for times when gup did not run."""

    span: str
    step_seconds: int
    since: float
    until: float
    points: list[HistoryPoint]


# --- sizing


class SizingPoint(Response):
    """A store of one size under the recorded demand."""

    size_bytes: int
    factor: float = Field(description="Of the present size.")
    wan_bytes: int = Field(description="What would have crossed the WAN.")
    fetches: int
    saved_more_bytes: int = Field(description="Than with the present size; below zero: less.")


class Sizing(Response):
    """What stores of other sizes would have saved, by a replay of the recorded demand."""

    at: float
    since: float = Field(description="Begin of the recorded time that is counted.")
    until: float
    recorded: bool = Field(description="Whether demand is recorded at present.")
    record_bytes: int
    record_limit_bytes: int
    present_bytes: int = Field(description="`cache.max_size`.")
    room_bytes: int = Field(description="What the disk has room for, with what is stored.")
    everything_bytes: int = Field(description="The largest store that this demand fills.")
    enough_bytes: int | None = Field(description="The size beyond which hardly anything more is saved.")
    requests: int
    requested_bytes: int
    unknown_requests: int = Field(description="For bodies whose size is not known.")
    failed_fetches: int = Field(description="Fetches that no upstream could answer.")
    sent_bytes: int = Field(description="What was really sent to clients in this time.")
    received_bytes: int = Field(description="What really crossed the WAN in this time.")
    left_out_bytes: int | None = Field(description="Sizes up to this one took too long to replay.")
    points: list[SizingPoint] = Field(description="By size.")
    saying: list[str] = Field(description="In words.")


class Outcome(Response):
    """The recorded demand under one set of settings."""

    wan_bytes: int = Field(description="What would have crossed the WAN.")
    fetches: int
    hit_ratio: float | None = Field(description="Share of the requests that needed no fetch of their own.")
    peak_minute_bytes_per_second: int = Field(description="Most that was asked of the WAN in a minute.")
    peak_hour_bytes_per_second: int
    longest_wait_seconds: float = Field(
        description="Of a client's fetch until its last byte, at the WAN's rate; 0 when that is unlimited."
    )
    longest_wait_at: float | None
    late_fetches: int = Field(description="Clients' fetches that would wait longer than fill.queue_timeout.")
    busy_seconds: float = Field(description="For how long the WAN would be in use.")
    queued_seconds: float = Field(description="With more downloads at once than clients.max_downloads.")
    refused_seconds: float = Field(description="With more than clients.queue could take, too.")
    address_exceeded: int = Field(
        description="How often an address began more full packages in a second than it may have at once."
    )
    held_back: dict[str, int] = Field(description="Requests that the WAN's budget would refuse, by class.")
    held_back_at: float | None = Field(description="When the first of them was.")


class RuleOutcome(Response):
    """What one rule would refuse, with the settings that are tried and with the present ones."""

    rule: str
    enforced: bool = Field(description='False where rules.mode is "report": it is only counted.')
    clients: int
    requests: int
    present_clients: int
    present_requests: int
    streams: list[str] = Field(description="By product; at most 20.")
    some_clients: list[SeenClient] = Field(description="The last of them; at most 20.")


class Trial(Response):
    """A dry run of settings: the recorded demand under them, beside the present ones."""

    problems: list[str] = Field(description="What is wrong with the settings; then nothing was tried.")
    changed: list[str] = Field(description="Keys whose values differ from those in force.")
    at: float
    since: float
    until: float
    requests: int
    requested_bytes: int
    sent_bytes: int = Field(description="What was really sent to clients.")
    received_bytes: int = Field(description="What really crossed the WAN.")
    peak_minute_bytes_per_second: int = Field(description="Most that really crossed the WAN in a minute.")
    most_downloads: int = Field(description="Most bodies over 256 KiB that were really sent at once.")
    most_queued: int
    present: Outcome | None
    tried: Outcome | None
    refusals: list[RuleOutcome]
    newly_refused_clients: int
    no_longer_refused_clients: int
    saying: list[str] = Field(description="In words, what the record can't know too.")
