"""Wiring of a child process: makes the objects that worker and controller have in common."""

import asyncio
import hashlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from gup import __version__, config, log
from gup.cache.cache import Cache
from gup.cache.disk_space import Space
from gup.cache.inflight import FillDependencies
from gup.cache.locks import Claims, Slots
from gup.cache.memory_files import MemoryFiles
from gup.cache.negative_cache import NegativeCache
from gup.cache.scheduler import CLASSES, Backlog, FillQueue
from gup.cache.store import Store
from gup.cache.streams import Streams
from gup.process.child import Parent
from gup.process.shared_memory import (
    FAILURES,
    FAILURES_WORDS,
    FILL_HELD,
    MEMORY,
    MEMORY_WORDS,
    MOST_UPSTREAMS,
    STORE_BYTES,
    UPSTREAM_HEALTH,
    WAN_CLOCK,
    Row,
    SharedFile,
)
from gup.upstream.bandwidth import Turns, Wan, rate_at, site_time
from gup.upstream.health import Board
from gup.upstream.pool import Pool

# First lock number of each kind of slot in run/slots.
_BULK_FIRST = 0
_URGENT_FIRST = 10_000
_INHERITED_FIRST = 20_000
_RANGE_BYPASS_FIRST = 100_000
_BYPASS_FIRST = 200_000
_DOWNLOADS_FIRST = 1_000_000

_RANGE_BYPASS_SLOTS = 2
_BYPASS_SLOTS = 4
_THREADS = 16
_RATE_SECONDS = 0.5
_ALIVE_NS = 3_000_000_000
"""Nobody waits for the turn of a process whose last heartbeat is older."""


def node_name(settings: config.Settings) -> str:
    """The node's name in Via: the site's name, and a hash that differs for each host and cache directory."""
    own = f"{settings.cache.directory.resolve()}\n{socket.gethostname()}"
    site = "".join(c if c.isalnum() or c in "-._" else "-" for c in settings.site.name) or "gup"
    return f"{site}-{hashlib.blake2b(own.encode(), digest_size=4).hexdigest()}"


class Wiring:
    """The collaborators of one child process, made from its assignment. Close it at the end."""

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self.settings = parent.settings()
        self.block = parent.assignment.block
        self.descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # raised by the supervisor
        self.shared = SharedFile(parent.assignment.shared_fd)
        self.counters = self.shared.counters(self.block)
        self.store = Store(self.settings.cache.directory)
        self.store.service_start = self.shared.started_at
        self.store.claims = Claims(self.store.partial / "claims")
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="gup")
        self._slots = Claims(self.store.run / "slots")
        self._reserved = self.shared.page.row(Row.PROMISES)
        self._reserved[self.block] = 0  # reservations of a predecessor in this slot ended with it
        self._events = socket.socket(fileno=os.dup(parent.assignment.event_fd))
        self._events.setblocking(False)
        self._rate = 0
        self._rate_until = 0.0
        self._rate_of: config.Settings | None = None
        self.wan = Wan(
            self.shared.page.words,
            WAN_CLOCK,
            Turns(self.shared.page.row(Row.WAN_TURNS), self.block, self._alive),
            self.wan_rate,
            self.store.run / "wan.lock",
        )
        self.pool = Pool(
            self.settings.upstream,
            self.counters,
            self.wan,
            user_agent=f"gup/{__version__}",
            via=f"1.1 {node_name(self.settings)} (gup)",
            board=self._board(),
        )
        self.downloads = Slots(
            self._slots, _DOWNLOADS_FIRST, lambda: self.means.settings.clients.max_downloads
        )
        self.means = self._means(self.store.claims)
        self.cache = Cache(
            self.means,
            max_open=min(4096, self.descriptors // 8),
            bypass=Slots(self._slots, _BYPASS_FIRST, lambda: _BYPASS_SLOTS),
            range_bypass=Slots(self._slots, _RANGE_BYPASS_FIRST, lambda: _RANGE_BYPASS_SLOTS),
        )

    def _board(self) -> Board:
        def tell(name: str, detail: str) -> None:
            # Not self.tell: the controller replaces means.tell.
            self.means.tell({"type": "upstream", "name": name, "detail": detail[:500]})

        return Board(
            [upstream.name for upstream in self.settings.upstream],
            self.shared.page.words,
            UPSTREAM_HEALTH,
            MOST_UPSTREAMS,
            self.shared.page.locked,
            tell,
        )

    def _means(self, claims: Claims) -> FillDependencies:
        return FillDependencies(
            store=self.store,
            claims=claims,
            pool=self.pool,
            counters=self.counters,
            queue=self._fill_queue(),
            space=Space(
                self.store.root,
                max_size=lambda: self.means.settings.cache.max_size,
                min_free=lambda: self.means.settings.cache.min_free,
                used=lambda: self.shared.page.words[STORE_BYTES] + self.reserved_bytes(),
                promise=self._reserve,
                need=lambda missing, refused: self.tell(
                    {"type": "need", "bytes": missing, "refused": refused}
                ),
                evictions=lambda: self.shared.page.store_epoch,
            ),
            memory=MemoryFiles(
                self.shared.page.words[MEMORY : MEMORY + MEMORY_WORDS],
                lambda: self.shared.page.locked(MEMORY),
                lambda: self.means.settings.fill.memory,
                lambda: self.means.settings.listen.write_timeout,
            ),
            failures=NegativeCache(
                self.shared.page.words[FAILURES : FAILURES + FAILURES_WORDS],
                lambda: self.shared.page.locked(FAILURES),
            ),
            streams=Streams(self.store.run / "streams"),
            executor=self.executor,
            settings=self.settings,
            tell=self.tell,
            raise_store_epoch=self.shared.page.raise_store,
            store_epoch=lambda: self.shared.page.store_epoch,
            wall_clock=time.time,
            clock=time.monotonic,
        )

    def _fill_queue(self) -> FillQueue:
        page = self.shared.page

        def most() -> int:
            return self.means.settings.fill.max

        return FillQueue(
            Slots(self._slots, _URGENT_FIRST, most),
            Slots(self._slots, _BULK_FIRST, most),
            # As many as an exited process can have held: `fill.max` of each class.
            Slots(self._slots, _INHERITED_FIRST, lambda: 2 * most()),
            lambda: self.means.settings.fill.queue_timeout,
            Turns(page.row(Row.FILL_TURNS), self.block, self._alive),
            Backlog(
                page.row(Row.FILL_BACKLOG),
                page.words[FILL_HELD : FILL_HELD + CLASSES],
                self.block,
                self._alive,
            ),
        )

    def _alive(self, block: int) -> bool:
        return time.monotonic_ns() - self.shared.page.last_beat(block) < _ALIVE_NS

    def wan_rate(self) -> int:
        """The WAN rate now in bytes per second; the schedule is evaluated twice a second."""
        settings = self.means.settings
        if not settings.wan.schedule:
            return settings.wan.rate
        now = time.monotonic()
        if now >= self._rate_until or self._rate_of is not settings:
            self._rate = rate_at(settings.wan, site_time(settings, time.time()))
            self._rate_until, self._rate_of = now + _RATE_SECONDS, settings
        return self._rate

    def reserved_bytes(self) -> int:
        """Disk space reserved by the fills of all processes."""
        return sum(self._reserved)

    def _reserve(self, change: int) -> None:
        self._reserved[self.block] += change

    def tell(self, event: Mapping[str, object]) -> None:
        """Send an event to the controller. A lost event is counted, and made up for by the next reconcile."""
        if not self.offer(event):
            self.counters.add("gup_events_lost_total")

    def offer(self, event: Mapping[str, object]) -> bool:
        """Send an event that can be sent later too. False if the queue is full or the controller is gone."""
        try:
            self._events.send(json.dumps(event, separators=(",", ":")).encode())
        except OSError:
            return False
        return True

    def apply(self, settings: config.Settings) -> None:
        """Take over reloaded settings."""
        self.settings = self.means.settings = settings
        self.pool.apply(settings.upstream)

    async def close(self) -> None:
        await self.cache.stop()
        await self.pool.close()
        self.executor.shutdown(wait=True, cancel_futures=True)
        self._events.close()
        self.wan.close()


async def handle_messages(
    parent: Parent, handle: Callable[[Mapping[str, object]], None], stop: asyncio.Event
) -> bool:
    """Pass the supervisor's messages to `handle` until `stop` is set. False if the supervisor is gone."""
    loop, gone = asyncio.get_running_loop(), False

    def readable() -> None:
        nonlocal gone
        messages = parent.receive()
        for message in messages or ():
            handle(message)
        if messages is None:
            loop.remove_reader(parent.fileno())
            gone = True
            stop.set()

    loop.add_reader(parent.fileno(), readable)
    try:
        await stop.wait()
    finally:
        loop.remove_reader(parent.fileno())
    return not gone


class Runnable(Protocol):
    """A child's main object."""

    async def run(self) -> None: ...


def run_child(
    make: Callable[[Parent], Runnable],
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """The main function of a child process; `make` is called in the event loop."""
    parent = Parent.from_argv(sys.argv)
    log.configure_child(parent.settings().log)

    async def run() -> None:
        await make(parent).run()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())
