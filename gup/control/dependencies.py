"""The collaborators of the control plane, given by the controller process."""

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from gup.cache.locks import Claims
from gup.cache.store import Store
from gup.config import Settings
from gup.content.catalog import Catalogues, Label, Stream
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.metrics import Counters


async def _nobody_fetches(_route: Route, _variant: Variant) -> bool:
    raise Problem("no-upstream", "nothing can be fetched here")


@dataclass(frozen=True, slots=True)
class ControlDependencies:
    """`counters` is the controller's own block; `totals` (since installed) and `since_start` are the sums of
    all blocks, by series name: counters, histogram words and gauges alike.

    `stream_names` has version, language and moniker of each slot; `product_of` a stream's product and
    language from the catalogue; `label_of` the same with version and type, for a stream of a variant and a
    file of it (LiveUpdate's index files tell by their names what they are), None for what nothing lists.
    `raise_store_epoch` is called after bodies were unlinked, `set_store_bytes`
    with bodies and those parts together that nobody fills; `promised_bytes` is what all fills
    under way will take. `wan_rate` is bytes per second, 0 unlimited. `workers` are mappings with
    `slot`, `pid`, `up_since` and `ready`. `recover` takes over or clears parts that nobody works on. `mend`
    looks at all of a stored body and fetches its damaged chunks anew; what it returns is why it could not.
    Its second argument tells whether the damage is counted already. `reload` has the settings read again and
    returns what is wrong with them: nothing, if they took. `events` is the receiving end of a
    datagram socket, `admin` a listening socket. Times are Unix seconds.
    """

    settings: Settings
    store: Store
    claims: Claims
    counters: Counters
    totals: Callable[[], Mapping[str, int]]
    since_start: Callable[[], Mapping[str, int]]
    stream_names: Callable[[], Sequence[tuple[str, str, str]]]
    product_of: Callable[[Stream], tuple[str, str] | None]
    raise_store_epoch: Callable[[], None]
    set_store_bytes: Callable[[int], None]
    promised_bytes: Callable[[], int]
    upstreams_up: Callable[[], Mapping[str, bool]]
    wan_rate: Callable[[], int]
    workers: Callable[[], Sequence[Mapping[str, object]]]
    config_ok: Callable[[], bool]
    reload: Callable[[], Awaitable[Sequence[str]]]
    recover: Callable[[], Awaitable[None]]
    mend: Callable[[ContentKey, bool], Awaitable[Problem | None]]
    events: socket.socket
    admin: socket.socket
    started_at: float
    installed_at: float
    upstream_states: Callable[[], Mapping[str, tuple[str, int | None]]] = dict
    """Each upstream's state, and since when (Unix seconds; None: since the start)."""
    fetch_ahead: Callable[[Route, Variant], Awaitable[bool]] = _nobody_fetches
    """Cache.fetch_ahead."""
    drop_memory: Callable[[ContentKey], int] = lambda _key: 0
    """MemoryFiles.drop."""
    places: Callable[[str], Sequence[tuple[Variant, Variant]]] = lambda _stream: ()
    """Choices.places."""
    link_idle: Callable[[], bool] = lambda: True
    """Whether no fill but background fills streams or waits, in any process."""
    fills_waiting: Callable[[], int] = lambda: 0
    """Fills that wait for a slot, in all processes."""
    label_of: Callable[[Stream, str], Label | None] = lambda _stream, _file: None
    catalogues: Callable[[], Mapping[str, Mapping[str, object]]] = dict
    """Each upstream's catalogue: `source`, `streams`, `read_at`, `problem`."""
    catalogue_rows: Callable[[], Catalogues] = Catalogues
    """The present rows of the upstreams' catalogues."""
    unlisted: Callable[[str], None] = lambda _moniker: None
    """Called with a moniker that a client asked for and no catalogue lists."""
