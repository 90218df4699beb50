"""Asks one upstream for its catalogue, conditionally; keeps and understands nothing of it.

Straight from upstream, past the store, whose copy may be `cache.index_ttl` old: for the moment when somebody
asked for what no catalogue lists.
"""

from dataclasses import dataclass

from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES
from gup.metrics import MAX_STREAMS
from gup.upstream.connection import Ask
from gup.upstream.exchange import RemoteHead, UpstreamFailure, rejected, unconfirmed
from gup.upstream.pool import Pool


@dataclass(frozen=True, slots=True)
class Fetched:
    """A catalogue as it came, with its validators. `text` is None when it has not changed."""

    text: bytes | None
    etag: str | None = None
    last_modified: str | None = None


async def fetch_catalogue(pool: Pool, name: str, etag: str | None, last_modified: str | None) -> Fetched:
    """What the upstream of that name has. UpstreamFailure when it has none, or none can be had."""
    upstream = next((upstream for upstream in pool.upstreams if upstream.name == name), None)
    if upstream is None:
        raise UpstreamFailure("error", "no-upstream", f"there is no upstream {name}", again=False)
    ask = Ask(
        path=CATALOG_PATH,
        purpose="catalog",
        stream=(MAX_STREAMS, "index"),
        if_none_match=etag,
        if_modified_since=last_modified,
    )
    answer = await pool.ask(upstream, ask)
    if isinstance(answer, RemoteHead):
        if answer.status == 304:
            return Fetched(None, etag, last_modified)
        detail = f"{upstream.url(CATALOG_PATH)}: {name} answered {answer.status}"
        raise UpstreamFailure("not_found", "upstream-not-found", detail, again=False, status=answer.status)
    text = bytearray()
    try:
        while len(text) <= MAX_CATALOG_BYTES and (piece := await answer.read()):
            text += piece
    finally:
        answer.close()
    if len(text) > MAX_CATALOG_BYTES:
        raise rejected(
            f"{upstream.url(CATALOG_PATH)} is over {MAX_CATALOG_BYTES} bytes long: no catalogue is"
        )
    if not answer.confirmed and await pool.length_of(upstream, ask, answer.head) != len(text):
        raise unconfirmed(name, len(text))
    return Fetched(bytes(text), answer.head.etag, answer.head.last_modified)
