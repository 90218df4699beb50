"""The in-flight table's rows: one fill a key, led or followed by this process, and its collaborators."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum

from gup import config
from gup.cache.body import GrowingBody
from gup.cache.budget_gate import BudgetGate
from gup.cache.disk import ShortJobs, Space
from gup.cache.fair_shares import ClientCounts
from gup.cache.locks import Claims
from gup.cache.memory_files import MemoryFiles
from gup.cache.negative_cache import NegativeCache
from gup.cache.purges import Purges
from gup.cache.records import Record
from gup.cache.scheduler import Class, FillQueue, class_of
from gup.cache.store import OpenFile, Store
from gup.cache.streams import Streams
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.metrics import Counters
from gup.phases import FillClock
from gup.upstream.bandwidth import Share, Wan
from gup.upstream.members import Members
from gup.upstream.pool import Pool

OF_MEMBER = "member "
"""Begins the name of a client that asked another member of the cluster, for its fair turn here."""


@dataclass(slots=True)
class FillDependencies:
    """The collaborators of every fill in this process. `settings` is replaced at a reload."""

    store: Store
    claims: Claims
    pool: Pool
    members: Members
    counters: Counters
    queue: FillQueue
    space: Space
    memory: MemoryFiles
    failures: NegativeCache
    purges: Purges
    misses: ClientCounts
    """Of each client, in this second."""
    streams: Streams
    executor: Executor
    short: ShortJobs
    settings: config.Settings
    tell: Callable[[Mapping[str, object]], None]
    """Sends an event to the controller; from any thread."""
    raise_store_epoch: Callable[[], None]
    store_epoch: Callable[[], int]
    wall_clock: Callable[[], float]
    clock: Callable[[], float]
    budget: BudgetGate
    """Says whether a fill may begin."""

    def count_miss(self, client: str) -> bool:
        """Count a request that needs an upstream; False when its client has too many in this second.

        The clients of other members are limited there.
        """
        most = self.settings.clients.max_misses_per_address
        return (
            not most
            or not client
            or client.startswith(OF_MEMBER)
            or self.misses.add_within(client, int(self.clock())) <= most
        )

    @property
    def longest_wait_seconds(self) -> float:
        """Until a fill's first byte: the time in the queue, and one upstream that does not answer."""
        slowest = max((u.connect_timeout + u.first_byte_timeout for u in self.settings.upstream), default=1.0)
        return self.settings.fill.queue_timeout + 2 * slowest


def nowhere() -> bool:
    """The body arrives from nowhere at present."""
    return False


class FillEnd(Enum):
    COMMITTED = "committed"
    VALIDATED = "validated"
    UNSTORABLE = "unstorable"


@dataclass(slots=True, eq=False)
class Fill:
    """One key's fill as this process sees it, whether it is led here or elsewhere.

    Only its task, which leads or follows, calls `attach`, `detach`, `land` and `fail`; requests `join`.
    """

    key: ContentKey
    route: Route
    variant: Variant
    passed: tuple[str, ...] = ()
    """The gups that its first request came through, so that upstreams detect loops."""
    client: str = ""
    """Address of that request's client; "" without a request."""
    since: float = 0.0
    """When it began, by the clock: its waiters share one patience."""
    suspect: bool = False
    """It compares the stored body, which may be damaged."""
    seen: int | None = None
    """The generation in which the damage was seen, if known: another one is not suspect."""
    noted: bool = False
    """That damage is counted already."""
    background: bool = False
    """No client waits for it, so it yields to clients' fills. See `promote`."""
    patient: bool = False
    """It waits for its slot without limit, since no client waits for it."""
    inherits: bool = False
    """Its leader died in mid-body: the takeover gets that leader's slot."""
    joins: bool = False
    """It only follows another process, for a member of the cluster that asks what is held. See `promote`."""
    from_memory: bool = False
    """Its body is complete in memory and is only stored. No client waits for it."""
    count_readers: Callable[[int], None] | None = None
    """Called with every change of the number of its body's readers."""
    body: GrowingBody | None = None
    end: FillEnd | None = None
    problem: Problem | None = None
    record: Record | None = None
    file: OpenFile | None = None
    led: bool = False
    """This process leads it."""
    fetched: bool = False
    """This process asked an upstream for it."""
    repairs: bool = False
    """It fetches the rest of a damaged entry."""
    finishing: bool = False
    """All of the body has arrived: the process does not stop before it is committed."""
    asks_gups: bool = True
    """Some of its upstreams are gups, or may be; known where `passed` names any."""
    from_wan: Callable[[], bool] = nowhere
    """Whether its body arrives from the WAN at this moment, at this node."""
    order: str | None = None
    """What was known of purges when its fetch began; None before that."""
    pinned: bool = False
    """The entry that it repairs or replaces is pinned."""
    aside: bool = False
    """A purge names it: it goes on for those that read it or wait for it, and nobody else joins it."""
    freed: bool = False
    """It has freed the key's claim, and touches none of the key's files any more."""
    step_aside: Callable[[], Coroutine[None, None, None]] | None = None
    """Frees the key's claim for the next fill. None where another process leads it."""
    share: Share = field(init=False)
    times: FillClock = field(init=False)
    """Set when it begins."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all is over and another fill of the key may begin."""
    _settled: asyncio.Event | None = None
    _joining: int = 0

    def __post_init__(self) -> None:
        self.share = Share(Class.BACKGROUND if self.background else class_of(self.route))

    @property
    def is_read(self) -> bool:
        return self.body is not None and self.body.readers > 0

    @property
    def wanted(self) -> bool:
        return self._joining > 0 or self.is_read

    @property
    def over(self) -> bool:
        return self.end is not None or self.problem is not None

    def attach(self, body: GrowingBody) -> None:
        """From now on this is the body to read; readers of another one are cut."""
        if self.body is not None and self.body is not body:
            self.body.fail()
        self.body = body
        body.count_readers, body.times = self.count_readers, self.times
        self._settle()

    def detach(self) -> None:
        """The body must not be read any more; new waiters get the next one."""
        if self.body is not None:
            self.body.fail()
            self.body = self._settled = None

    def finish(self, end: FillEnd) -> None:
        assert not self.over
        self.end = end
        self._settle()

    def fail(self, problem: Problem) -> None:
        assert not self.over
        self.problem = problem
        if self.body is not None:
            self.body.fail()
        self._settle()

    def has_failed(self, path: str, passed: tuple[str, ...]) -> bool:
        """Whether its failure is also that of a request for `path` that came through these gups.

        Upstream may have the same content under another spelling; and what `passed` brought about is no
        other client's.
        """
        if self.problem is None or path != self.route.upstream_path:
            return False
        shared = is_shared(self.problem, self.passed, asks_gups=self.asks_gups)
        return shared or set(self.passed) <= set(passed)

    def is_purged(self, purges: Purges) -> bool:
        """Whether a purge names it, or has named it."""
        if not self.aside and self.order is not None:
            self.aside = purges.name(self.key, self.route.kind, self.order, pinned=self.pinned)
        return self.aside

    def allows_another(self, path: str, passed: tuple[str, ...]) -> bool:
        """Whether a request that has waited for it in vain may wait for the next one."""
        return self.problem is not None and (self.aside or not self.has_failed(path, passed))

    async def join(self) -> GrowingBody | FillEnd:
        """Wait for a body to read, as one of its readers, or for the end. Problem when it failed."""
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
            return self.body.reader()
        assert self.end is not None
        return self.end

    def request(self, wan: Wan, *, background: bool) -> None:
        """A client waits for it, or another member's `background` fill: it may fetch."""
        self.joins = False
        if not background:
            self.promote(wan)

    def promote(self, wan: Wan) -> None:
        """A client waits for it now: it does not yield to clients' fills any more."""
        if self.background:
            self.background = False
            self.share.priority = class_of(self.route)
            wan.sort_anew(self.share)

    async def outcome(self) -> bool:
        """Wait for its end; whether this process fetched it. Problem when it is not stored now."""
        await self.ended.wait()
        if self.problem is not None:
            raise self.problem.again()
        if self.aside:
            raise Problem("overloaded", "it was purged while it was fetched", retry_after_seconds=1.0)
        if self.end is FillEnd.UNSTORABLE:
            raise Problem("overloaded", "it can't be stored: it is too large, or the disk refuses it")
        return self.fetched

    def _settle(self) -> None:
        if self._settled is not None:
            self._settled.set()


def is_shared(problem: Problem, passed: tuple[str, ...], *, asks_gups: bool) -> bool:
    """Whether a failure is every client's, and may be remembered: no client's Via can have brought it about.

    An upstream that is no gup has a file or has it not, whatever gups the request has `passed`.
    """
    return not passed or (not asks_gups and problem.status in (404, 410))


def committed(record: Record, *, replaced: bool, path: str = "", **fetched: object) -> dict[str, object]:
    """The event that tells the controller of a new body; with the `path` that a client's fill asked for, and
    the `resumes`, the bytes `received` over the WAN and the times of a fill that this process has led.
    """
    own = {"key": record.key.text, "length": record.length, "kind": str(record.kind)}
    told = {"replaced": replaced, "path": path, "upstream": record.upstream} | fetched
    return {"type": "committed"} | own | told
