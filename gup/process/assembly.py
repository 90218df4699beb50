"""Puts a child's parts together: what worker and controller have in common; decides and serves nothing."""

import asyncio
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from gup import __version__, config
from gup.cache.backlog import CLASSES, Backlog
from gup.cache.cache import Cache
from gup.cache.claim import Claims
from gup.cache.flight import Means
from gup.cache.memory_files import MemoryFiles
from gup.cache.queue import FillQueue
from gup.cache.slots import Slots
from gup.cache.space import Space
from gup.cache.store import Store
from gup.cache.streams import Streams
from gup.metrics import Counters
from gup.process.child import Parent
from gup.process.descriptors import use_all_descriptors
from gup.process.page import (
    FILL_HELD,
    MEMORY,
    MEMORY_WORDS,
    MOST_UPSTREAMS,
    STORE_BYTES,
    UPSTREAM_HEALTH,
    WAN_CLOCK,
    Row,
)
from gup.process.shared import SharedFile
from gup.upstream.bandwidth import Wan
from gup.upstream.health import Board
from gup.upstream.pool import Pool
from gup.upstream.schedule import rate_at, site_time
from gup.upstream.turns import Turns

_URGENT_FIRST = 10_000
_INHERITED_FIRST = 20_000
"""As many as a dead process can have held: `fill.max` of each class."""

_RANGE_BYPASS_FIRST = 100_000
_RANGE_BYPASS_PLACES = 2
_BYPASS_FIRST = 200_000
_BYPASS_PLACES = 4
_DOWNLOADS_FIRST = 1_000_000
_THREADS = 16
_RATE_SECONDS = 0.5
_ALIVE_NS = 3_000_000_000
"""A process that gave no sign of life for so long keeps nobody waiting."""


def node_name(settings: config.Settings) -> str:
    """What the node is called in Via: the site's name, told apart from other nodes of that name."""
    own = f"{settings.cache.directory.resolve()}\n{socket.gethostname()}"
    site = "".join(c if c.isalnum() or c in "-._" else "-" for c in settings.site.name) or "gup"
    return f"{site}-{hashlib.blake2b(own.encode(), digest_size=4).hexdigest()}"


class Assembly:
    """The collaborators of one child process, made from its assignment. `close` ends what has to be ended."""

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self.settings = parent.settings()
        self.block = parent.assignment.block
        self.descriptors = use_all_descriptors()
        self.shared = SharedFile.attach(parent.assignment.shared_fd)
        self.counters: Counters = self.shared.counters(self.block)
        self.store = Store(self.settings.cache.directory)
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="gup")
        self.words = self.shared.page.words
        self._promises = self.shared.page.row(Row.PROMISES)
        self._promises[self.block] = 0  # a predecessor's promises died with it
        self._events = socket.socket(fileno=os.dup(parent.assignment.event_fd))
        self._events.setblocking(False)
        self._rate = 0
        self._rate_until = 0.0
        self._rate_of: config.Settings | None = None
        self.wan = Wan(
            self.words,
            WAN_CLOCK,
            self._turns(Row.WAN_TURNS),
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
        self.means = self._means()
        self.cache = Cache(
            self.means,
            max_open=min(4096, self.descriptors // 8),
            bypass=Slots(self._places, _BYPASS_FIRST, lambda: _BYPASS_PLACES),
            range_bypass=Slots(self._places, _RANGE_BYPASS_FIRST, lambda: _RANGE_BYPASS_PLACES),
        )

    def _means(self) -> Means:
        claims = self.store.claims = Claims(self.store.partial / "claims")
        places = self._places = Claims(self.store.run / "slots")
        self.downloads = Slots(places, _DOWNLOADS_FIRST, lambda: self.means.settings.clients.max_downloads)
        return Means(
            store=self.store,
            claims=claims,
            pool=self.pool,
            counters=self.counters,
            queue=self._queue(places),
            space=Space(
                self.store.root,
                max_size=lambda: self.means.settings.cache.max_size,
                min_free=lambda: self.means.settings.cache.min_free,
                used=self._used,
                promise=self._promise,
                need=lambda missing, refused: self.tell(
                    {"type": "need", "bytes": missing, "refused": refused}
                ),
                evictions=lambda: self.shared.page.store_epoch,
            ),
            memory=MemoryFiles(
                self.words[MEMORY : MEMORY + MEMORY_WORDS],
                lambda: self.shared.page.locked(MEMORY),
                lambda: self.means.settings.fill.memory,
                lambda: self.means.settings.listen.write_timeout,
            ),
            streams=Streams(self.store.run / "streams"),
            executor=self.executor,
            settings=self.settings,
            tell=self.tell,
            raise_store_epoch=self.shared.page.raise_store,
            store_epoch=lambda: self.shared.page.store_epoch,
            spell=lambda route, variant: self.cache.spell(route, variant),  # noqa: PLW0108 - made after this
            wall_clock=time.time,
            clock=time.monotonic,
        )

    def _turns(self, row: Row) -> Turns:
        """Words by which processes that wait for the same thing tell each other who comes next."""
        return Turns(self.shared.page.row(row), self.block, self._alive)

    def _alive(self, block: int) -> bool:
        return time.monotonic_ns() - self.shared.page.last_beat(block) < _ALIVE_NS

    def _queue(self, places: Claims) -> FillQueue:
        def most() -> int:
            return self.means.settings.fill.max

        return FillQueue(
            Slots(places, _URGENT_FIRST, most),
            Slots(places, 0, most),
            Slots(places, _INHERITED_FIRST, lambda: 2 * most()),
            lambda: self.means.settings.fill.queue_timeout,
            self._turns(Row.FILL_TURNS),
            Backlog(
                self.shared.page.row(Row.FILL_BACKLOG),
                self.words[FILL_HELD : FILL_HELD + CLASSES],
                self.block,
                self._alive,
            ),
        )

    def wan_rate(self) -> int:
        """Bytes per second from upstream, by the schedule; looked up anew twice a second, or on a reload."""
        settings = self.means.settings
        if not settings.wan.schedule:
            return settings.wan.rate
        now = time.monotonic()
        if now >= self._rate_until or self._rate_of is not settings:
            self._rate = rate_at(settings.wan, site_time(settings, time.time()))
            self._rate_until, self._rate_of = now + _RATE_SECONDS, settings
        return self._rate

    def promised_bytes(self) -> int:
        """What the fills under way in all processes will take."""
        return sum(self._promises)

    def _used(self) -> int:
        return self.words[STORE_BYTES] + self.promised_bytes()

    def _promise(self, change: int) -> None:
        self._promises[self.block] += change

    def _board(self) -> Board:
        def tell(name: str, detail: str) -> None:  # by means.tell: the controller tells itself
            self.means.tell({"type": "upstream", "name": name, "detail": detail[:500]})

        return Board(
            [upstream.name for upstream in self.settings.upstream],
            self.words,
            UPSTREAM_HEALTH,
            MOST_UPSTREAMS,
            self.shared.page.locked,
            tell,
        )

    def tell(self, event: Mapping[str, object]) -> None:
        """Send an event to the controller; a lost one is counted, and healed when it looks at the store."""
        if not self.offer(event):
            self.counters.add("gup_events_lost_total")

    def offer(self, event: Mapping[str, object]) -> bool:
        """The same for what can wait; False: the controller's queue is full, or it is gone."""
        try:
            self._events.send(json.dumps(event, separators=(",", ":")).encode())
        except OSError:
            return False
        return True

    def apply(self, settings: config.Settings) -> None:
        """Reloaded settings: what can change while the process runs does."""
        self.settings = self.means.settings = settings
        self.pool.apply(settings.upstream)

    async def close(self) -> None:
        await self.cache.stop()
        await self.pool.close()
        self.executor.shutdown(wait=True, cancel_futures=True)
        self._events.close()
        self.wan.close()


async def until_told(parent: Parent, on_message: Callable[[Mapping[str, object]], None]) -> None:
    """Hand messages of the supervisor on, until it is gone."""
    loop = asyncio.get_running_loop()
    gone = loop.create_future()

    def readable() -> None:
        messages = parent.receive()
        for message in messages or ():
            on_message(message)
        if messages is None and not gone.done():
            loop.remove_reader(parent.fileno())
            gone.set_result(None)

    loop.add_reader(parent.fileno(), readable)
    try:
        await gone
    finally:
        loop.remove_reader(parent.fileno())
