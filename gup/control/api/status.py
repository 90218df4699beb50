"""The state of the service: in full, in parts, for monitors; the settings, and explanations of the rules."""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, Field

import gup
from gup.cache.canary import Waiting
from gup.cache.revision_holds import RevisionHold
from gup.cache.store import Part
from gup.cluster.membership import Row
from gup.config import Settings
from gup.config.loading import masked
from gup.content.catalog import Stream, normal_moniker
from gup.content.key import ANY
from gup.content.rules import Rulebook
from gup.content.variant_choice import explain
from gup.control.api import schemas
from gup.control.api.endpoint import TEXT, Endpoint, Request, Text, problem
from gup.control.entry_table import stream_of
from gup.control.exposition import expose, gauges
from gup.control.state import ControlState, began_at, numbers
from gup.control.stats.history import added_up, shown, sums_of

_Section = TypeVar("_Section", bound=BaseModel)
_OLD_SECONDS = 3.0
"""What a member has told of its rates holds for so long."""
_LATEST = 5
"""Clients that the status names."""


class Question(Request):
    """A stream, and what a client states."""

    moniker: Text = Field(description="The stream: a GUID, with braces or without.")
    client_version: str | None = Field(None, description="What the client states, such as 14.3 RU2.")
    client_language: str | None = Field(None, description="What the client states, such as French or fr.")
    upstream: Text | None = Field(None, description="Only at the upstream of this name.")


async def status(state: ControlState) -> schemas.Status:
    """Everything at a glance."""
    disk, settings, now = await state.evictor.measure(), state.settings, state.clock()
    process, totals, wan_rate = state.dependencies, state.dependencies.totals(), state.dependencies.wan_rate()
    return schemas.Status(
        site=settings.site.name,
        version=gup.__version__,
        pid=os.getpid(),
        started_at=process.started_at,
        installed_at=process.installed_at,
        uptime_seconds=max(0.0, now - process.started_at),
        ready=not state.not_ready(),
        totals={"since_start": totals_of(process.since_start()), "since_install": totals_of(totals)},
        cache=schemas.Cache(
            entries=len(state.index.rows),
            entries_bytes=disk.entries_bytes,
            parts=sum(1 for part in disk.parts if part.generation),
            parts_bytes=disk.parts_bytes,
            size_bytes=disk.size_bytes,
            limit_bytes=settings.cache.max_size,
            free_bytes=disk.free_bytes,
            complete=state.index.complete,
        ),
        disk=schemas.Disk(refusals=list(state.refusals.rows.values())),
        fills=fills_under_way(state, disk.parts),
        fill_waiters=totals.get("gup_fill_waiters", 0),
        clients=schemas.ClientCounts(
            connections=totals.get("gup_client_connections", 0),
            seen=state.clients.counts(now),
            latest=[
                schemas.SeenClient(address=name, seen_at=at)
                for client, at in state.clients.newest(_LATEST)
                if (name := state.reports.name_of(client)) is not None
            ],
        ),
        workers=[schemas.Worker.model_validate(worker) for worker in process.workers()],
        upstreams=_upstreams(state),
        wan_rate_bytes_per_second=wan_rate or None,
        limits=limits_of(
            settings,
            totals,
            size_bytes=disk.size_bytes,
            wan_rate=wan_rate,
            wan_used=state.history.wan.bytes_per_second(),
        ),
        scrub=state.scrubber.progress(),
        reload=schemas.Reload(successful=process.config_ok()),
        alarms=state.alarms,
        holds=on_hold(state, state.holds.holds),
        canary=new_revisions(state, state.holds.waiting()),
        budget=state.budget.standing() if settings.wan.budget.bytes else None,
        outbreak=outbreak_of(state),
        cluster=await cluster(state) if process.cluster is not None else None,
        failures=list(state.failures),
        malformed_events=state.malformed_events,
    )


def outbreak_of(state: ControlState) -> schemas.Outbreak | None:
    found, until = state.outbreak.now, state.outbreak.until
    if found is None or until is None:
        return None
    left = max(0.0, until - state.clock())
    return schemas.Outbreak(
        began_at=until - found.seconds, until=until, left_seconds=left, by=found.by, reason=found.reason
    )


def on_hold(state: ControlState, holds: Iterable[RevisionHold]) -> list[schemas.RevisionOnHold]:
    return [
        schemas.RevisionOnHold(
            stream=hold.stream,
            product=state.label((ANY, ANY, hold.stream))[0],
            revision=hold.revision,
            held_by=hold.by,
            held_at=hold.at,
            reason=hold.reason,
            except_subnets=list(hold.except_subnets),
            newest=hold.newest or None,
        )
        for hold in holds
    ]


def new_revisions(
    state: ControlState, waiting: Iterable[tuple[str, Waiting]]
) -> list[schemas.WaitingRevision]:
    """Those that only some clients get."""
    return [
        schemas.WaitingRevision(
            stream=stream,
            product=state.label((ANY, ANY, stream))[0],
            revision=new.revision,
            opens_at=new.opens_at,
            first=state.settings.rules.canary.subnets,
        )
        for stream, new in waiting
        if new.opens_at is not None
    ]


async def fills(state: ControlState) -> schemas.Fills:
    """What is being fetched now."""
    disk = await state.evictor.measure()
    waiters = state.dependencies.totals().get("gup_fill_waiters", 0)
    return schemas.Fills(fills=fills_under_way(state, disk.parts), waiters=waiters)


async def upstreams(state: ControlState) -> schemas.Upstreams:
    """Upstreams and their health."""
    return schemas.Upstreams(upstreams=_upstreams(state))


async def cluster(state: ControlState) -> schemas.Cluster:
    """The members of the cluster as this node sees them, and their shares of the WAN's rate."""
    control, settings = state.dependencies.cluster, state.settings
    rate = state.dependencies.site_rate() or None
    if control is None:
        return schemas.Cluster(
            site=None,
            node=settings.site.name,
            alone=True,
            engine_error=None,
            wan_rate_bytes_per_second=rate,
            members=[],
            gone=[],
            sums=_site_traffic([]),
        )
    own = _member(control.own, control.node, settings.cluster.address or "", askable=True)
    if control.is_alone:
        own.state, own.detail = "alone", "another node has its name"
    elif reasons := state.not_ready():
        own.state, own.detail = "not-ready", "; ".join(reasons)
    members, asked = [own], control.published.askable
    for peer in control.membership.peers() if not control.is_alone else ():
        member = _member(peer.row, peer.name, peer.address, askable=peer.name in asked)
        member.state, member.detail = peer.state
        if peer.row is not None:
            member.told_seconds = control.age_seconds(peer.seen_at)
        if member.told_seconds is None or member.told_seconds >= _OLD_SECONDS:
            member.share_bytes_per_second = member.wan_bytes_per_second = None
        member.unconfirmed_orders = control.unconfirmed(peer.known) if peer.known is not None else None
        members.append(member)
    gone = [
        schemas.GoneMember(
            name=one.name,
            address=one.address,
            left=one.left,
            gone_seconds=control.age_seconds(one.at),
            totals=dict(one.row.totals) if one.row is not None else {},
        )
        for one in control.membership.gone.values()
    ]
    return schemas.Cluster(
        site=settings.cluster.site,
        node=control.node,
        alone=control.is_alone,
        engine_error=control.engine_error,
        wan_rate_bytes_per_second=rate,
        members=sorted(members, key=lambda member: member.name),
        gone=gone,
        sums=_site_traffic([*(one.totals for one in members), *(one.totals for one in gone)]),
    )


def _member(row: Row | None, name: str, address: str, *, askable: bool) -> schemas.ClusterMember:
    """A node that is well."""
    return schemas.ClusterMember(
        name=name,
        address=address,
        askable=askable,
        state="ready",
        detail="",
        told_seconds=0.0 if row is not None else None,
        share_bytes_per_second=(row.share or None) if row is not None else None,
        wan_bytes_per_second=row.received_rate if row is not None else 0,
        unconfirmed_orders=0,
        totals=dict(row.totals) if row is not None else {},
    )


def _site_traffic(totals: Iterable[Mapping[str, int]]) -> schemas.SiteTraffic:
    sums = added_up(totals)
    moved = ("gup_client_sent", "gup_upstream_received", "gup_upstream_wasted")
    return schemas.SiteTraffic.of(
        *(sums[f"{name}_bytes_total"] for name in moved),
        between_members_bytes=sums["gup_peer_received_bytes_total"],
    )


async def alarms(state: ControlState) -> schemas.Alarms:
    """Problems that need an operator's attention."""
    return schemas.Alarms(alarms=state.alarms)


async def config(state: ControlState) -> Settings:
    """The settings in force; secrets are masked."""
    settings = state.settings
    upstreams = [_masked(upstream) for upstream in settings.upstream]
    return settings.model_copy(update={"upstream": upstreams, "alarms": _masked(settings.alarms)})


def _masked(section: _Section) -> _Section:
    return section.model_copy(update={key: masked(key, value) for key, value in section})


async def explanation(state: ControlState, query: Question) -> schemas.Explanation:
    """What the delivery rules decide, and why."""
    moniker = normal_moniker(query.moniker)
    if moniker is None:
        raise web.HTTPBadRequest(text=f"moniker: {query.moniker!r} is no GUID, with braces or without")
    names = [upstream.name for upstream in state.settings.upstream]
    if query.upstream is not None and query.upstream not in names:
        raise web.HTTPBadRequest(text=f"upstream: {query.upstream!r} is none of {', '.join(names)}")

    def decide() -> schemas.Explanation:
        """In a thread: the language tables are read from a file when they are first used."""
        settings, book = state.settings, Rulebook(state.settings)
        client = book.identities.stated(query.client_version, query.client_language)
        chosen = [upstream for upstream in settings.upstream if query.upstream in (None, upstream.name)]
        sources = {one.name: "LiveUpdate has no catalogue" for one in chosen if one.kind == "liveupdate"}
        for name, kept in state.dependencies.catalogues().items():
            read, source = kept["streams"] is not None, str(kept["source"])
            sources[name] = source if read else f"{source} can't be read ({kept['problem']})"
        explained = explain(book, state.dependencies.catalogue_rows(), chosen, sources, moniker, client)
        return schemas.Explanation.model_validate(explained)

    return await asyncio.to_thread(decide)


async def healthz() -> web.Response:
    """The process lives and its loop turns."""
    return web.Response(text="ok\n")


async def readyz(state: ControlState) -> web.Response:
    """Content can be served; 503 says why not."""
    reasons = state.not_ready()
    return problem(503, "; ".join(reasons), reasons=reasons) if reasons else web.Response(text="ready\n")


async def metrics(state: ControlState, request: web.Request) -> web.Response:
    """The exposition, as text or OpenMetrics."""
    totals, names = state.dependencies.totals(), [upstream.name for upstream in state.settings.upstream]
    body, content_type = expose(totals, names, await gauges(state, totals), request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


ENDPOINTS = (
    Endpoint("GET", "/healthz", healthz, media=(TEXT,)),
    Endpoint("GET", "/readyz", readyz, media=(TEXT,)),
    Endpoint("GET", "/metrics", metrics, media=(TEXT, "application/openmetrics-text")),
    Endpoint("GET", "/api/v1/status", status),
    Endpoint("GET", "/api/v1/fills", fills),
    Endpoint("GET", "/api/v1/upstreams", upstreams),
    Endpoint("GET", "/api/v1/cluster", cluster),
    Endpoint("GET", "/api/v1/alarms", alarms),
    Endpoint("GET", "/api/v1/config", config),
    Endpoint("GET", "/api/v1/rules/explain", explanation),
)


# --- parts of the status

_FROM_STORE = ("hit", "revalidated", "stale")
_SERVED = (*_FROM_STORE, "miss", "collapsed", "bypass")


def totals_of(words: Mapping[str, int]) -> schemas.Totals:
    """Bytes moved, and requests by result, from series and their values.

    The hit ratio counts requests for content that were answered from the store.
    """
    sums = sums_of(words)
    figures = shown(sums)
    requests = figures["requests"]
    served = sum(requests[result] for result in _SERVED)
    del figures["upstream_wasted_bytes"]
    more = {
        "requests_total": sum(requests.values()),
        "hit_ratio": sum(requests[result] for result in _FROM_STORE) / served if served else None,
        "fills": sum(figures["fills"].values()),
        "evictions": sum(count for name, count in sums.items() if name.startswith("evictions.")),
    }
    return schemas.Totals(**figures | more)


def fills_under_way(state: ControlState, parts: Iterable[Part]) -> list[schemas.Fill]:
    in_progress = [part for part in parts if part.claimed and part.generation > 0]
    rates = state.fill_rates.of(in_progress, state.clock())
    return [fill_of(part, rate, state.label) for part, rate in zip(in_progress, rates, strict=True)]


def fill_of(part: Part, rate: float | None, label: Callable[[Stream], tuple[str, str]]) -> schemas.Fill:
    """A fill in progress; `label` gives a stream's product and language."""
    fill, head = part.state, part.state.head if part.state else None
    product, language = label(stream_of(fill.key)) if fill else (None, None)
    length = head.length if head else None
    return schemas.Fill(
        key=fill.key.text if fill else None,
        id=part.id,
        phase=fill.phase if fill else None,
        received_bytes=part.size_bytes,
        length_bytes=length,
        upstream=head.upstream if head else None,
        product=product,
        language=language,
        kind=fill.kind if fill else None,
        began_at=began_at(part),
        bytes_per_second=rate,
        remaining_seconds=(length - part.size_bytes) / rate if length is not None and rate else None,
    )


_CONFIGURED = ("name", "url", "kind", "priority", "weight", "version", "language")


def _upstreams(state: ControlState) -> list[schemas.Upstream]:
    process, rows = state.dependencies, []
    states, catalogues = process.upstream_states(), process.catalogues()
    for upstream in state.settings.upstream:
        health, since = states.get(upstream.name, ("unknown", None))
        at, detail = state.upstream_errors.get(upstream.name, (None, None))
        found = {name: getattr(upstream, name) for name in _CONFIGURED} | {
            "up": health != "down",
            "state": health,
            "since": since or process.started_at,
            "last_error": detail,
            "last_error_at": at,
            "catalogue": catalogues.get(upstream.name),
        }
        rows.append(schemas.Upstream.model_validate(found))
    return rows


_USED = {
    "downloads": "gup_client_downloads_in_progress",
    "queue": "gup_client_downloads_queued",
    "connections": "gup_client_connections",
    "fills": "gup_fills_in_progress",
}


def limits_of(
    settings: Settings, totals: Mapping[str, int], *, size_bytes: int, wan_rate: int, wan_used: int
) -> dict[str, schemas.Limit]:
    """Limit (None: unlimited) and use of each; rates are bytes per second."""
    limit, most = schemas.Limit, numbers(settings)
    return {
        **{name: limit(limit=most.get(name), used=totals.get(of, 0)) for name, of in _USED.items()},
        "connections_per_address": limit(limit=most.get("connections_per_address")),
        "client_rate_bytes_per_second": limit(limit=settings.clients.rate or None),
        "wan_rate_bytes_per_second": limit(limit=wan_rate or None, used=wan_used),
        "cache_size_bytes": limit(limit=settings.cache.max_size, used=size_bytes),
    }
