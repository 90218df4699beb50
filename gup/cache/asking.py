"""What a fill asks upstream for, and whether what came may be that; reads and writes no body."""

from collections.abc import Awaitable, Callable, Iterable, Sequence

from gup.cache.failures import Holds
from gup.cache.flight import Flight, Means
from gup.cache.part import ZIP_TAIL_BYTES, zip_end_is_right
from gup.cache.record import Record
from gup.cache.state import Hold
from gup.content.key import Kind
from gup.errors import Problem
from gup.upstream.download import Begun, Download
from gup.upstream.exchange import UpstreamFailure
from gup.upstream.session import Ask, Upstream

Reread = Callable[[int, int], Awaitable[bytes]]
"""Gives back so many bytes from an offset on that were received before."""


def holds_of(means: Means, flight: Flight, rows: Iterable[Hold]) -> Holds:
    """The upstreams that a flight's key is not asked for; what is found wrong is told to the controller."""

    def tell(upstream: str, detail: str) -> None:
        means.tell({"type": "rejected", "key": flight.key.text, "upstream": upstream, "detail": detail})

    return Holds(rows, means.settings.cache.error_ttl, means.clock, tell)


def stand_seconds(means: Means, flight: Flight, holds: Holds, failure: UpstreamFailure) -> float:
    """How long no upstream is to be asked for a flight's body again after it has failed so.

    What took all upstreams down needs no memory of each key: the pool knows.
    """
    if failure.slug == "overloaded":
        return 0.0
    candidates = means.pool.candidates(flight.variant, flight.key.text)
    waits = [holds.seconds_left(upstream.name) for upstream in candidates]
    if waits and all(waits):
        return min(waits)
    return 0.0 if failure.outcome == "unreachable" else means.settings.cache.error_ttl


def download_of(
    means: Means,
    flight: Flight,
    path: str,
    reread: Reread,
    begun: Begun | None,
    record: Record | None,
    holds: Holds,
) -> Download:
    """The download of a flight's body, or of its rest; with `record`, only if upstream has another by now.

    UpstreamFailure when none is up, or all are on hold.
    """
    route, variant, via = flight.route, flight.variant, flight.via
    resuming = begun is not None and flight.is_read
    chosen, reserve = means.pool.chosen(variant, flight.key.text, via, resuming=resuming)
    if not chosen:
        raise Problem("no-upstream", f"no upstream has {variant}")
    upstreams = [upstream for upstream in chosen if not holds.seconds_left(upstream.name)]
    if not upstreams:
        raise _on_hold(chosen, holds)
    conditional = record is not None and begun is None
    ask = Ask(
        path=path,
        purpose=_purpose(flight),
        stream=counted_as(means, flight),
        if_none_match=record.upstream_etag if conditional and record else None,
        if_modified_since=record.last_modified if conditional and record else None,
        share=flight.share,
        via=via,
        client=flight.client,
    )
    return Download(
        means.pool,
        upstreams,
        ask,
        means.counters,
        immutable=route.immutable,
        reread=reread,
        begun=begun,
        reserve=[upstream for upstream in reserve if not holds.seconds_left(upstream.name)],
        is_read=lambda: flight.is_read,
        holds=holds,
        clock=means.clock,
    )


def _on_hold(upstreams: Sequence[Upstream], holds: Holds) -> UpstreamFailure:
    names = ", ".join(upstream.name for upstream in upstreams)
    return UpstreamFailure(
        "error",
        "upstream-error",
        f"{names}: not asked for this again yet, as it said or since what it sent was wrong",
        again=False,
        retry_after_seconds=min(holds.seconds_left(upstream.name) for upstream in upstreams),
    )


def _purpose(flight: Flight) -> str:
    """What the bytes are counted under: what began ahead stays so when somebody asks for it meanwhile."""
    if flight.repairs:
        return "repair"
    if flight.ahead:
        return "prefetch"
    return "index" if flight.route.kind is Kind.INDEX else "fill"


def counted_as(means: Means, flight: Flight) -> tuple[int, str]:
    """Number of the stream and kind that a flight's bytes are counted under."""
    return means.streams.number(flight.key), str(flight.route.kind)


async def check_structure(means: Means, flight: Flight, received: int, reread: Reread) -> None:
    """UpstreamFailure when a whole body of `received` bytes can't be what its name says."""
    file = flight.key.file
    if not file.lower().endswith(".zip"):
        return
    start = max(0, received - ZIP_TAIL_BYTES)
    if not zip_end_is_right(await reread(start, received - start)):
        means.counters.waste("rejected", counted_as(means, flight), received)
        raise UpstreamFailure(
            "rejected",
            "upstream-bad-body",
            f"what came as {file} does not end as a ZIP file does",
            again=False,
        )
