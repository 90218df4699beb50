"""Wiring of a child process: makes the objects that worker and controller have in common."""

import asyncio
import hashlib
import json
import logging
import os
import resource
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from gup import __version__, log
from gup.cache.budget_gate import BudgetGate
from gup.cache.cache import Cache
from gup.cache.disk import ShortJobs, Space
from gup.cache.fair_shares import ClientCounts
from gup.cache.inflight import FillDependencies
from gup.cache.locks import Claims, Occupied, Slots
from gup.cache.memory_files import MemoryFiles
from gup.cache.negative_cache import NegativeCache
from gup.cache.purges import Purges
from gup.cache.scheduler import GROUPS, Backlog, FillQueue, share_class
from gup.cache.store import Store
from gup.cache.streams import Streams
from gup.cluster.member_list import MembersReader
from gup.cluster.share import floor, without_grant
from gup.cluster.signing import Signer, read_secrets
from gup.config import Settings
from gup.content.key import ContentKey, Kind
from gup.files import FileError
from gup.process import shared_memory as layout
from gup.process.child import Message, Parent
from gup.process.shared_memory import Page, Row, SharedFile
from gup.upstream.bandwidth import Turns, Wan, rate_at, site_time
from gup.upstream.health import Board
from gup.upstream.members import Members
from gup.upstream.pool import Pool

# First lock number of each kind of slot in run/slots.
_BULK_FIRST, _URGENT_FIRST, _INHERITED_FIRST = 0, 10_000, 20_000
_RANGE_BYPASS_FIRST, _BYPASS_FIRST = 100_000, 200_000
DOWNLOADS_FIRST = 1_000_000

_LOG = logging.getLogger("gup.process")
_RANGE_BYPASS_SLOTS = 2
_BYPASS_SLOTS = 4
_THREADS = 16
_RATE_SECONDS = 0.5
_ALIVE_NS = 3_000_000_000  # a process without a heartbeat for this long is skipped in queues


class ChildProcess(ABC):
    """Worker or controller: its collaborators, made from its assignment, and the supervisor's messages."""

    def __init__(self, parent: Parent) -> None:
        assignment = parent.assignment
        self.parent, self.settings, self.block = parent, assignment.settings, assignment.block
        self._told_under_way = False
        self.stopped = asyncio.Event()  # set to end `handle_messages`
        self.descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # raised by the supervisor
        self.shared = shared = SharedFile(assignment.shared_fd)
        self.page = page = Page(assignment.page_fd, assignment.blocks)
        self.words = words = page.words
        self.counters = shared.counters(self.block)
        self.store = Store(self.settings.cache.directory)
        self.store.service_start = self.shared.started_at
        self.store.claims = Claims(self.store.partial / "claims")
        occupied = words[layout.OCCUPIED : layout.OCCUPIED + layout.OCCUPIED_WORDS]
        self.store.occupied = Occupied(occupied.cast("B"))
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="gup")
        self.node = _node_name(self.settings)  # the node's name in Via
        self.slots = Claims(self.store.run / "slots")
        self._beats = page.row(Row.BEAT)
        self._reserved = page.row(Row.PROMISES)
        self._reserved[self.block] = 0  # reservations of a predecessor with this block ended with it
        self._events = socket.socket(fileno=os.dup(assignment.event_fd))
        self._events.setblocking(False)
        self._rate, self._rate_until = 0, 0.0
        self.before_need: Callable[[], None] = lambda: None
        """Tells the controller what clients have requested up to now; a worker sets it."""
        self._paid = [page.row(row) for row in (Row.WAN_URGENT, Row.WAN_OTHER, Row.WAN_BACKGROUND)]
        self.wan = Wan(
            words,
            layout.WAN_CLOCK,
            self.turns(Row.WAN_TURNS),
            self.wan_rate,
            self.store.run / "wan.lock",
            self._note_paid,
        )
        names = [upstream.name for upstream in self.settings.upstream]

        def tell_health(name: str, detail: str) -> None:
            self.tell({"type": "upstream", "name": name, "detail": detail[:500]})

        self.pool = Pool(
            self.settings.upstream,
            self.counters,
            self.wan,
            user_agent=f"gup/{__version__}",
            via=f"1.1 {self.node} (gup)",
            board=Board(
                names, words, layout.UPSTREAM_HEALTH, layout.MOST_UPSTREAMS, page.locked, tell_health
            ),
        )
        self.budget = BudgetGate(
            words[layout.BUDGET_STATE : layout.OUTBREAK_UNTIL + 1],
            lambda: self.settings.wan.budget,
            shared.received(),
            self.counters,
            time.time,
        )
        self.purges = Purges(self.store.run, lambda: words[layout.PURGES], lambda: self.engine_ms() / 1000)
        self.dependencies = FillDependencies(
            store=self.store,
            claims=self.store.claims,
            pool=self.pool,
            members=self._make_members(),
            counters=self.counters,
            queue=self._fill_queue(),
            space=Space(
                self.store.root,
                max_size=lambda: self.settings.cache.max_size,
                min_free=lambda: self.settings.cache.min_free,
                used=lambda: words[layout.STORE_BYTES] + self.reserved_bytes(),
                promise=self._reserve,
                need=self._need,
                evictions=lambda: words[layout.STORE_EPOCH],
            ),
            memory=MemoryFiles(
                words[layout.MEMORY : layout.MEMORY + layout.MEMORY_WORDS],
                lambda: page.locked(layout.MEMORY),
                lambda: self.settings.fill.memory,
                lambda: self.settings.listen.write_timeout,
            ),
            failures=NegativeCache(
                words[layout.FAILURES : layout.FAILURES + layout.FAILURES_WORDS],
                lambda: page.locked(layout.FAILURES),
            ),
            purges=self.purges,
            misses=ClientCounts.alone(),
            streams=Streams(self.store.run / "streams"),
            executor=self.executor,
            short=ShortJobs(),
            settings=self.settings,
            tell=self.tell,
            raise_store_epoch=lambda: page.raise_epoch(layout.STORE_EPOCH),
            store_epoch=lambda: words[layout.STORE_EPOCH],
            wall_clock=time.time,
            clock=time.monotonic,
            budget=self.budget,
        )
        self.cache = Cache(
            self.dependencies,
            max_open=min(4096, self.descriptors // 8),
            bypass=Slots(self.slots, _BYPASS_FIRST, lambda: _BYPASS_SLOTS),
            range_bypass=Slots(self.slots, _RANGE_BYPASS_FIRST, lambda: _RANGE_BYPASS_SLOTS),
        )

    def _make_members(self) -> Members:
        cluster = self.settings.cluster
        self.signer: Signer | None = None
        if cluster.site is None or cluster.url is None:
            return Members(self.counters)
        self.signer = Signer(cluster.site, read_secrets(cluster.secret_file))
        read = MembersReader(self.store.run, lambda: self.words[layout.CLUSTER_EPOCH])
        return Members(
            self.counters,
            user_agent=f"gup/{__version__}",
            via=f"1.1 {self.node} (gup)",
            node=cluster.node,
            signer=self.sign_as,
            time_ms=self.engine_ms,
            listed=read,
            is_purged=lambda key, kind, order: self.purges.name(ContentKey.parse(key), Kind(kind), order),
            settled=lambda: self.words[layout.CLUSTER_EPOCH] > 0,
        )

    def sign_as(self) -> Signer:
        """With the cluster's secrets of now."""
        assert self.signer is not None
        return self.signer

    def engine_ms(self) -> int:
        """The cluster engine's time in ms; this machine's while that is unknown."""
        offset = self.words[layout.ENGINE_TIME]
        return time.monotonic_ns() // 1_000_000 + offset if offset else int(time.time() * 1000)

    def _fill_queue(self) -> FillQueue:
        held = self.words[layout.FILL_HELD : layout.FILL_HELD + GROUPS]
        return FillQueue(
            Slots(self.slots, _URGENT_FIRST, lambda: self.settings.fill.max),
            Slots(self.slots, _BULK_FIRST, lambda: self.settings.fill.max),
            # As many as an exited process can have held: `fill.max` of each class.
            Slots(self.slots, _INHERITED_FIRST, lambda: 2 * self.settings.fill.max),
            lambda: self.settings.fill.queue_timeout,
            (self.turns(Row.URGENT_TURNS), self.turns(Row.BULK_TURNS)),
            Backlog(self.page.row(Row.FILL_BACKLOG), held, self.block, self._alive),
        )

    def turns(self, row: Row) -> Turns:
        return Turns(self.page.row(row), self.block, self._alive)

    def beat(self) -> None:
        self._beats[self.block] = time.monotonic_ns()

    def _alive(self, block: int) -> bool:
        return time.monotonic_ns() - self._beats[block] < _ALIVE_NS

    def wan_rate(self) -> int:
        """The rate of this gup's fills now, in bytes/s, 0: unlimited; in a cluster a part of the site's."""
        rate = self.site_rate()
        if self.settings.cluster.url is None or not rate:
            return rate
        now, until = time.monotonic_ns(), self.words[layout.WAN_SHARE_UNTIL]
        if now < until:
            return min(max(1, self.words[layout.WAN_SHARE]), rate)
        most = self.words[layout.WAN_MEMBERS]
        return without_grant(rate, now - until, most) if until else floor(rate, most)

    def _note_paid(self, priority: int, amount_bytes: int) -> None:
        self._paid[share_class(priority)][self.block] += amount_bytes

    def site_rate(self) -> int:
        """The rate of all of the site's fills now; the schedule is evaluated twice a second.

        During an outbreak its lower rates do not apply.
        """
        if not self.settings.wan.schedule:
            return self.settings.wan.rate
        now = time.monotonic()
        if now >= self._rate_until:
            self._rate = rate_at(self.settings.wan, site_time(self.settings, time.time()))
            if self.budget.outbreak:
                rates = self._rate, self.settings.wan.rate
                self._rate = max(rates) if all(rates) else 0
            self._rate_until = now + _RATE_SECONDS
        return self._rate

    def reserved_bytes(self) -> int:
        return sum(self._reserved)

    def _need(self, size_bytes: int, refused: bool) -> None:
        """The controller is to evict: first it is told what was used up to now."""
        self.before_need()
        self.tell({"type": "need", "bytes": size_bytes, "refused": refused})

    def _reserve(self, change: int) -> None:
        self._reserved[self.block] += change

    def tell(self, event: Mapping[str, object]) -> None:
        """A lost event is counted; the next reconcile compensates for it."""
        if not self.offer(event):
            self.counters.add("gup_events_lost_total")

    def offer(self, event: Mapping[str, object]) -> bool:
        """Send an event that can be sent later too. False if the queue is full or the controller is gone."""
        try:
            self._events.send(json.dumps(event, separators=(",", ":")).encode())
        except OSError:
            return False
        return True

    def tell_under_way(self, requests: Sequence[object] = ()) -> None:
        """Tell which fills and `requests` of this process take long; to be called once a second."""
        fills = self.cache.slow_fills()
        if fills or requests or self._told_under_way:
            self.tell({"type": "under_way", "process": os.getpid(), "fills": fills, "requests": requests})
        self._told_under_way = bool(fills or requests)

    # --- the supervisor's messages

    @abstractmethod
    def handle(self, message: Message) -> None:
        """Act on a message that is not about settings."""

    @abstractmethod
    async def run(self) -> None:
        """Work until `stopped` is set or the supervisor is gone."""

    def apply(self, settings: Settings) -> None:
        self.settings = self.dependencies.settings = settings
        self._rate_until = 0.0
        self.pool.apply(settings.upstream)
        cluster = settings.cluster
        if cluster.site is not None and self.signer is not None:
            try:
                self.signer = Signer(cluster.site, read_secrets(cluster.secret_file))
            except FileError as error:
                _LOG.error("cluster.secret_file: %s; the secrets of before stay", error)
        log.configure_child(settings.log)

    async def handle_messages(self) -> bool:
        """False if the supervisor is gone."""
        loop, gone = asyncio.get_running_loop(), False

        def readable() -> None:
            nonlocal gone
            messages = self.parent.receive()
            for message in messages or ():
                if "settings" in message:
                    self.apply(Settings.model_validate(message["settings"]))
                else:
                    self.handle(message)
            if messages is None:
                loop.remove_reader(self.parent.fileno())
                gone = True
                self.stopped.set()

        loop.add_reader(self.parent.fileno(), readable)
        await self.stopped.wait()
        loop.remove_reader(self.parent.fileno())
        return not gone

    async def close(self) -> None:
        await self.cache.stop()
        await self.pool.close()
        await self.dependencies.members.close()
        self.dependencies.short.close()
        self.executor.shutdown(wait=True, cancel_futures=True)
        self._events.close()
        self.wan.close()


def _node_name(settings: Settings) -> str:
    """The site's name, and a hash that differs for each host and cache directory, but not in a cluster."""
    cluster = settings.cluster
    own = f"{settings.cache.directory.resolve()}\n{socket.gethostname()}"
    own = f"cluster\n{cluster.site}" if cluster.url is not None else own
    site = (
        "".join(c if (c.isascii() and c.isalnum()) or c in "-._" else "-" for c in settings.site.name)
        or "gup"
    )
    return f"{site}-{hashlib.blake2b(own.encode(), digest_size=4).hexdigest()}"


def run_child(
    make: Callable[[Parent], ChildProcess],
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """The main function of a child process; `make` is called in the event loop."""
    parent = Parent(sys.argv)
    log.configure_child(parent.assignment.settings.log)

    async def run() -> None:
        await make(parent).run()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())
