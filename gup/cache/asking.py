"""What a fill asks upstream for, and whether what came may be that; reads and writes no body."""

from collections.abc import Awaitable, Callable

from gup.cache.flight import Flight, Means
from gup.cache.part import ZIP_TAIL_BYTES, zip_end_is_right
from gup.cache.record import Record
from gup.content.key import Kind
from gup.errors import Problem
from gup.upstream.connection import Ask
from gup.upstream.download import Begun, Download
from gup.upstream.exchange import UpstreamFailure

Reread = Callable[[int, int], Awaitable[bytes]]
"""Gives back so many bytes from an offset on that were received before."""


def download_of(
    means: Means, flight: Flight, path: str, reread: Reread, begun: Begun | None, record: Record | None
) -> Download:
    """The download of a flight's body, or of its rest; with `record`, only if upstream has another by now."""
    route, variant, via = flight.route, flight.variant, flight.via
    upstreams, reserve = means.pool.chosen(variant, flight.key.text, via, resuming=begun is not None)
    if not upstreams:
        raise Problem("no-upstream", f"no upstream has {variant}")
    conditional = record is not None and begun is None
    ask = Ask(
        path=path,
        purpose=_purpose(flight),
        stream=counted_as(means, flight),
        if_none_match=record.upstream_etag if conditional and record else None,
        if_modified_since=record.last_modified if conditional and record else None,
        share=flight.share,
        via=via,
    )
    return Download(
        means.pool,
        upstreams,
        ask,
        means.counters,
        immutable=route.immutable,
        reread=reread,
        begun=begun,
        reserve=reserve,
        clock=means.clock,
    )


def _purpose(flight: Flight) -> str:
    """What the bytes are counted under: what began ahead stays so when somebody asks for it meanwhile."""
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
