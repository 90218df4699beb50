"""Main module of a worker process: wires the data plane and serves clients until it has drained."""

import asyncio
import gc
import importlib
import socket
import time
from collections.abc import Sequence
from functools import partial
from operator import itemgetter

import uvloop

from gup.cache.fair_shares import FairShares, Shared
from gup.cache.locks import Slots
from gup.client_names import ClientNames, read_key
from gup.config import Settings
from gup.content.key import ANY
from gup.process.child import Message, Parent
from gup.process.shared_memory import (
    ENGINE_TIME,
    ENGINE_TIME_BEFORE,
    FIRST_WORKER,
    ORDERED,
    POLICY_EPOCH,
    STORE_EPOCH,
    Row,
)
from gup.process.wiring import DOWNLOADS_FIRST, ChildProcess, run_child
from gup.server.access_log import AccessLog
from gup.server.admission import Admission
from gup.server.downloads import Downloads
from gup.server.handler import Handler
from gup.server.hot_cache import HotCache
from gup.server.listener import Listener
from gup.server.peer import PeerAdmission, PeerHandler, PeerLog, PeerOrders
from gup.server.policy import Policy

_WARM_UP_AFTER_SECONDS = 0.3
_ORDERS_SECONDS, _LOOK_SECONDS = 10.0, 0.01
"""The longest wait of content for the controller, which catches up the orders at the start or gives up after
1.6 s."""
_PARTS, _TURN_OVER = 16, 256
"""Of a second, and of the store: if so much of it is sent within a part, the uses are told more often."""
_COLLECT_AFTER = 10_000
"""New objects that outlive their use; Python's own 700 takes 3 to 5 % of a small miss."""


class Worker(ChildProcess):
    def __init__(self, parent: Parent) -> None:
        super().__init__(parent)
        self._draining: asyncio.Task[None] | None = None
        self._stops = False
        self._sent_bytes = 0
        self._loop = asyncio.get_running_loop()
        shared, settings = self.shared, self.settings
        # Called for each hit, so without a Python frame.
        epochs = partial(itemgetter(POLICY_EPOCH, STORE_EPOCH), self.words)
        hot_cache = HotCache(epochs, self.cache.close_removed)
        turns = self.turns(Row.DOWNLOAD_TURNS)
        slots = Slots(self.slots, DOWNLOADS_FIRST, lambda: self.settings.clients.max_downloads)
        assignment = parent.assignment
        workers = assignment.blocks - FIRST_WORKER
        self._shares = FairShares(assignment.shares_fd, assignment.block - FIRST_WORKER, workers)
        counts = self._shares.counts
        self.dependencies.queue.clients = counts[Shared.FILLS]
        self.dependencies.misses = counts[Shared.MISSES]
        downloads = Downloads(
            slots,
            lambda: self.settings.clients,
            self.counters,
            shared.sum_of,
            turns,
            counts[Shared.DOWNLOADS],
        )
        names = ClientNames(settings.reports.addresses, read_key(self.store.run / "address-key"))
        self._access_log = access_log = AccessLog(settings, self.counters, names)
        self.before_need = lambda: access_log.tell_uses(self.tell, self.dependencies.wall_clock())
        self._policy = Policy(self.dependencies, lambda: self.words[POLICY_EPOCH], hot_cache.drop)
        policy = self._policy
        self.pool.lists = lambda name, moniker: policy.choices.catalogues.listed(name, moniker) is not None
        self.budget.label = lambda route: policy.choices.catalogues.label(
            (ANY, ANY, route.stream), route.file
        )
        handler = Handler(
            self.dependencies, self.cache, self._policy, hot_cache, downloads, self._access_log, self.node
        )
        admission = Admission(
            settings,
            self.counters,
            counts[Shared.CONNECTIONS],
            shared.sum_of("gup_client_connections"),
            most_here=self.descriptors * 3 // 4,
        )
        self._peers = self._make_peers(
            [socket.socket(fileno=fd) for fd in assignment.peer_fds], downloads, names
        )
        sockets = [socket.socket(fileno=fd) for fd in assignment.listen_fds]
        handed = [socket.socket(fileno=fd) for fd in assignment.handed_fds]
        self._listener = Listener(
            sockets, (handed[0], handed[1]), settings, handler, admission, self._each_second
        )

    def _make_peers(
        self, sockets: Sequence[socket.socket], downloads: Downloads, names: ClientNames
    ) -> Listener | None:
        """What answers the members of the cluster; None without one."""
        cluster = self.settings.cluster
        if not sockets:
            return None
        times = ENGINE_TIME, ENGINE_TIME_BEFORE
        handler = PeerHandler(
            self.dependencies,
            self.cache,
            downloads,
            PeerLog(self.settings, self.counters, names),
            self.node,
            cluster.node,
            self.sign_as,
            lambda: [self.engine_ms(), *(time.monotonic_ns() // 1_000_000 + self.words[at] for at in times)],
            PeerOrders(self.dependencies, self.sign_as, lambda: self.words[ORDERED] != 0),
        )
        return Listener(sockets, None, self.settings, handler, PeerAdmission(), lambda _now: None)

    def _each_second(self, wall_now: float, *, everything: bool = False) -> None:
        self.beat()
        self.cache.look_over()
        self.cache.set_purged_aside()
        self._access_log.each_second(self.tell, self.offer, wall_now, everything=everything)
        self.tell_under_way(self._access_log.under_way())
        for part in range(1, _PARTS if not everything else 0):
            self._loop.call_later(part / _PARTS, self._look_at_order)

    def _look_at_order(self) -> None:
        """Where much of the store is sent in a second, the order of uses within it counts for eviction."""
        before, self._sent_bytes = self._sent_bytes, self._access_log.sent_bytes()
        if self._sent_bytes - before > self.settings.cache.max_size // _TURN_OVER:
            for part in range(_PARTS // 4):
                self._loop.call_later(part / _PARTS**2 * 4, self.before_need)

    async def run(self) -> None:
        gc.freeze()  # what the start has made stays, and need not be looked through again and again
        gc.set_threshold(_COLLECT_AFTER)  # a fill leaves no cycles: there is little to collect
        self.parent.send({"ready": True})  # only then is the controller started, which catches up the orders
        if self._peers is not None:
            self._peers.start()
            give_up_at = time.monotonic() + _ORDERS_SECONDS
            while not self.words[ORDERED] and time.monotonic() < give_up_at:  # noqa: ASYNC110 - its memory
                await asyncio.sleep(_LOOK_SECONDS)
        self._listener.start()
        warming = asyncio.create_task(self._warm_up())
        if not await self.handle_messages():  # the supervisor is gone
            if self._draining is not None:
                self._draining.cancel()
            await self._listener.drain(0.0)
            if self._peers is not None:
                await self._peers.drain(0.0)
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await self._policy.close()
        await self.close()
        self._shares.close()  # fills that ended just now had their part of it

    async def _warm_up(self) -> None:
        """The import takes longer than the rest of the start, so it is done once the worker serves."""
        await asyncio.sleep(_WARM_UP_AFTER_SECONDS)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.executor, importlib.import_module, "aiohttp")

    def apply(self, settings: Settings) -> None:
        super().apply(settings)
        self._listener.apply(settings)
        if self._peers is not None:
            self._peers.apply(settings)

    def handle(self, message: Message) -> None:
        if message.get("leave") and self._draining is None:
            self._draining = asyncio.create_task(self._leave())
        elif message.get("drain") and not self._stops:
            self._stops = True
            if self._draining is not None:
                self._draining.cancel()
            self._draining = asyncio.create_task(self._drain(self.settings.listen.drain_timeout))

    async def _leave(self) -> None:
        """Others serve: hand them the idle connections, end the responses, and the fills that they follow."""
        await asyncio.gather(self._listener.leave(), *([] if self._peers is None else [self._peers.leave()]))
        await self.cache.end_fills()
        await self._drain(0.0)

    async def _drain(self, timeout_seconds: float) -> None:
        await self._listener.drain(timeout_seconds)
        if self._peers is not None:
            await self._peers.drain(0.0)
        await self.cache.stop()  # bodies that clients have completely are committed first
        self._each_second(self.dependencies.wall_clock(), everything=True)
        self.parent.send({"drained": True})
        self.stopped.set()


if __name__ == "__main__":
    run_child(Worker, uvloop.new_event_loop)
