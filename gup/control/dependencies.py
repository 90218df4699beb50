"""The collaborators of the control plane, given by the controller process, and how it changes an entry."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gup.cache.budget_gate import BudgetGate
from gup.cache.locks import Claims
from gup.cache.purges import Purges
from gup.cache.store import Store
from gup.config import Settings
from gup.content.catalog import Catalogues, Label, Stream
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.control.cluster import ClusterControl
from gup.control.order_book import OrderBook
from gup.control.threads import to_its_end
from gup.errors import GupError, Problem
from gup.metrics import Counters


@dataclass(frozen=True, slots=True)
class Reload:
    """What came of reading the settings again: what is wrong with them (then those before stay in force), the
    keys whose new values are in force, and those whose new values need a restart.
    """

    problems: Sequence[str]
    changed: Sequence[str] = ()
    waiting: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlDependencies:
    """Times are Unix seconds. `totals` (since installed) and `since_start` are the sums of all blocks of
    counters, by series name: counters, histogram words and gauges alike.
    """

    settings: Callable[[], Settings]
    """In force now; a reload replaces them."""
    store: Store
    claims: Claims
    counters: Counters
    """The controller's own block."""
    totals: Callable[[], Mapping[str, int]]
    since_start: Callable[[], Mapping[str, int]]
    stream_names: Callable[[], Sequence[tuple[str, str, str]]]
    """Version, language and moniker of each slot."""
    label_of: Callable[[Stream, str], Label | None]
    """The catalogue's label of a stream, or of a file of it (LiveUpdate's index files state their product in
    their names); None where no catalogue lists it.
    """
    raise_store_epoch: Callable[[], None]
    """Called after bodies were unlinked."""
    purges: Purges
    share_purges: Callable[[], None]
    """Called when a purge was noted on disk."""
    set_store_bytes: Callable[[int], None]
    """Called with the bytes of bodies and unclaimed parts."""
    promised_bytes: Callable[[], int]
    """Reservations of all fills in progress."""
    upstream_states: Callable[[], Mapping[str, tuple[str, int | None]]]
    """Each upstream's state ("down", "doubtful", …), and since when; None: since the start."""
    wan_rate: Callable[[], int]
    """Of this gup's fills: in a cluster a part of the site's."""
    site_rate: Callable[[], int]
    workers: Callable[[], Sequence[Mapping[str, object]]]
    """`slot`, `pid`, `up_since`, `ready` and `leaving` of each."""
    config_ok: Callable[[], bool]
    reload: Callable[[], Awaitable[Reload]]
    upgrade: Callable[[], Awaitable[list[str]]]
    """Has the installed program take over; returns why it can't. The processes are replaced afterwards."""
    recover: Callable[[], Awaitable[None]]
    """Takes over or clears unclaimed parts."""
    mend: Callable[[ContentKey, bool], Awaitable[Problem | None]]
    """Compares all of a stored body and fetches its damaged chunks again; returns the problem if that failed.
    The flag: the damage is counted already.
    """
    events: socket.socket
    admin: socket.socket
    handed: tuple[socket.socket, socket.socket]
    """By the first come idle connections of a controller that leaves, by the second this one's go."""
    started_at: float
    installed_at: float
    fetch_ahead: Callable[..., Awaitable[bool]]
    """Cache.prefetch."""
    head: Callable[[Route, Variant], Awaitable[object]]
    """Asks upstream for a head; Problem when it can't be had."""
    drop_memory: Callable[[ContentKey], int]
    places: Callable[[str], Sequence[tuple[Variant, Variant]]]
    """Choices.variants: pairs of the variant to ask and the one to store under."""
    gate: BudgetGate
    """What the workers read of the WAN's budget."""
    link_idle: Callable[[], bool]
    """No fill but background fills streams or waits, in any process."""
    fills_waiting: Callable[[], int]
    """Fills that wait for a slot, in all processes."""
    catalogues: Callable[[], Mapping[str, Mapping[str, object]]]
    """Each upstream's catalogue: `source`, `streams`, `read_at`, `problem`."""
    catalogue_rows: Callable[[], Catalogues]
    """The present rows of the upstreams' catalogues."""
    cluster: ClusterControl | None = None
    """None: this gup is alone."""
    unlisted: Callable[[str], None]
    """Called with a moniker that a client asked for and no catalogue lists."""
    raise_policy_epoch: Callable[[], None] = lambda: None
    """Called when run/holds or run/revisions has changed."""

    @property
    def book(self) -> OrderBook | None:
        """The orders of the cluster; None: this gup is alone."""
        return self.cluster.book if self.cluster is not None else None


PATIENCE_SECONDS = 5.0
"""Time limit of an operator's command for a fill of the same key."""
_POLL_SECONDS = 0.01
_Result = TypeVar("_Result")


class BusyError(GupError):
    """The entry can't be changed now: another process fills, revalidates or repairs it."""

    def __init__(self, key: ContentKey) -> None:
        super().__init__(f"{key.text} is being fetched or checked, so nothing was changed; try again later")


async def change(
    claims: Claims, key: ContentKey, work: Callable[[], _Result], patience_seconds: float = PATIENCE_SECONDS
) -> _Result:
    """Run `work` in a thread, holding the key's claim; BusyError when another holds it for too long."""
    give_up_at = time.monotonic() + patience_seconds
    while not claims.try_claim(key.claim_offset):
        if time.monotonic() >= give_up_at:
            raise BusyError(key)
        await asyncio.sleep(_POLL_SECONDS)
    try:
        return await to_its_end(work)
    finally:
        claims.release(key.claim_offset)
