"""The fills that a process leads or follows, one a key, and what they need to do their work."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum

from gup import config
from gup.cache.disk_space import Space
from gup.cache.growing_body import GrowingBody
from gup.cache.locks import Claims
from gup.cache.memory_files import MemoryFiles
from gup.cache.records import Record
from gup.cache.scheduler import FillQueue
from gup.cache.store import Store
from gup.cache.streams import Streams
from gup.content.key import ContentKey, Kind, Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.metrics import Counters
from gup.upstream.bandwidth import Share
from gup.upstream.pool import Pool

PRIORITIES = {Kind.DELTA: 0, Kind.INDEX: 1, Kind.FULL: 2, Kind.OTHER: 2}
"""Order in which fills get a place, and bytes of the WAN: what is small and urgent before what is large."""
AHEAD_PRIORITY = 3
"""Of what nobody has asked for yet."""


@dataclass(slots=True)
class Means:
    """The collaborators of every fill in this process. `settings` is replaced at a reload."""

    store: Store
    claims: Claims
    pool: Pool
    counters: Counters
    queue: FillQueue
    space: Space
    memory: MemoryFiles
    streams: Streams
    executor: Executor
    settings: config.Settings
    tell: Callable[[Mapping[str, object]], None]
    """Sends an event to the controller; from any thread."""
    raise_store_epoch: Callable[[], None]
    store_epoch: Callable[[], int]
    spell: Callable[[Route, Variant], Awaitable[str | None]]
    """Another path under which upstream may have what it does not have under the client's spelling."""
    wall_clock: Callable[[], float]
    clock: Callable[[], float]

    @property
    def longest_wait_seconds(self) -> float:
        """For the first byte of a fill: after its place in the queue, one upstream that does not answer."""
        slowest = max((u.connect_timeout + u.first_byte_timeout for u in self.settings.upstream), default=1.0)
        return self.settings.fill.queue_timeout + 2 * slowest


class Landing(Enum):
    """How a flight ended when there is no growing body to read."""

    COMMITTED = "committed"
    VALIDATED = "validated"
    UNSTORABLE = "unstorable"


@dataclass(slots=True)
class Flight:
    """One key's fill as this process sees it, be its leader here or elsewhere.

    The task that leads or follows alone calls `attach`, `land` and `fail`; requests `join`.
    """

    key: ContentKey
    route: Route
    variant: Variant
    via: str | None = None
    """The Via of the request that began it: upstream sees where it came from, so that a loop ends."""
    client: str = ""
    """Whose request that was, by address; "" of nobody's."""
    body: GrowingBody | None = None
    landing: Landing | None = None
    problem: Problem | None = None
    stands_seconds: float = 0.0
    since: float = 0.0
    """When the first request for it came, by the clock: those who wait have one patience together."""
    fetched: bool = False
    """Whether this process asked an upstream for it."""
    suspect: bool = False
    """Whether the stored body may be damaged, so that being there does not end the flight."""
    seen: int | None = None
    """The generation in which damage was seen, if that is known: another one is not suspect."""
    repairs: bool = False
    """Whether what it fetches is the rest of a damaged entry."""
    noted: bool = False
    """Whether that damage is counted already."""
    ahead: bool = False
    """Whether nobody has asked for it: see gup.cache.ahead, which alone changes it."""
    patient: bool = False
    """Whether it may wait for its place for as long as that takes: no client waits for it."""
    inherits: bool = False
    """Whether its leader died while it streamed: whoever goes on has that leader's place."""
    from_memory: bool = False
    """Whether its body is in memory, whole, and is only to be stored. No client waits for it."""
    settling: bool = False
    """Whether all of the body has come: this process does not end before the fill has."""
    share: Share = field(init=False)
    """What its bytes of the WAN are reckoned to."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all is over and another flight may begin."""
    _settled: asyncio.Event | None = None
    _joining: int = 0

    def __post_init__(self) -> None:
        self.share = Share(AHEAD_PRIORITY if self.ahead else PRIORITIES[self.route.kind])

    def suspects(self, record: Record) -> bool:
        """Whether the body of `record` may be damaged."""
        return self.suspect and self.seen in (None, record.generation)

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it or reads it."""
        return self._joining > 0 or (self.body is not None and bool(self.body.readers))

    @property
    def is_read(self) -> bool:
        """Whether clients have a part of its body."""
        return self.body is not None and bool(self.body.readers)

    @property
    def over(self) -> bool:
        return self.landing is not None or self.problem is not None

    @property
    def complete(self) -> bool:
        """Whether all of it can be sent: what is left of the fill is its commit, which nobody awaits."""
        return self.body is not None and self.body.complete_in_file

    def attach(self, body: GrowingBody) -> None:
        """From now on this is the body to read; readers of another one are cut."""
        if self.body is not None and self.body is not body:
            self.body.fail()
        self.body = body
        self._settle()

    def detach(self) -> None:
        """The body is not to be read any more; who comes now waits for the next one."""
        if self.body is not None:
            self.body.fail()
            self.body = self._settled = None

    def land(self, landing: Landing) -> None:
        assert not self.over
        self.landing = landing
        self._settle()

    def fail(self, problem: Problem, stands_seconds: float) -> None:
        """End with a problem, which need not be looked into again before `stands_seconds` have passed."""
        assert not self.over
        self.problem = problem
        self.stands_seconds = stands_seconds
        if self.body is not None:
            self.body.fail()
        self._settle()

    async def join(self) -> GrowingBody | Landing:
        """Wait until there is something to read, or nothing will come. Problem when it failed."""
        self._joining += 1
        try:
            while self.body is None and not self.over:
                self._settled = self._settled or asyncio.Event()
                await self._settled.wait()
        finally:
            self._joining -= 1
        if self.problem is not None:
            raise self.problem.again()
        if self.body is not None:
            return self.body
        assert self.landing is not None
        return self.landing

    def _settle(self) -> None:
        if self._settled is not None:
            self._settled.set()


def hurry(means: Means, flight: Flight) -> None:
    """Somebody waits for it from now on."""
    if flight.ahead:
        flight.ahead = False
        flight.share.priority = PRIORITIES[flight.route.kind]
        means.pool.wan.sort_anew(flight.share)


async def outcome(flight: Flight) -> bool:
    """Wait for its end; whether this process fetched it. Problem when it is not stored now."""
    await flight.ended.wait()
    if flight.problem is not None:
        raise flight.problem.again()
    if flight.landing is Landing.UNSTORABLE:
        raise Problem("overloaded", "it can't be stored: it is too large, or the disk refuses it")
    return flight.fetched


def committed(record: Record, *, replaced: bool) -> dict[str, object]:
    """The event that tells the controller of a new body."""
    return {
        "type": "committed",
        "key": record.key.text,
        "length": record.length,
        "replaced": replaced,
        "kind": str(record.kind),
    }
