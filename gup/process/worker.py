"""Main module of a worker process: wires the data plane and serves clients until it has drained."""

import asyncio
import importlib
import socket
from collections.abc import Mapping
from functools import partial
from operator import itemgetter

import uvloop

from gup import log
from gup.client_names import ClientNames, read_key
from gup.config import Settings
from gup.process.child import Parent
from gup.process.shared_memory import POLICY_EPOCH, STORE_EPOCH, Row
from gup.process.wiring import Wiring, handle_messages, node_name, run_child
from gup.server.access_log import AccessLog
from gup.server.admission import AddressCounts, Admission
from gup.server.downloads import Downloads, MachineView
from gup.server.handler import Handler
from gup.server.hot_cache import HotCache
from gup.server.listener import Listener
from gup.server.policy import Policy

_WARM_UP_AFTER_SECONDS = 0.3


class Worker:
    """One worker, directed by the supervisor's messages."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._wiring = wiring = Wiring(parent)
        self._drained = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._finishing = False
        page = wiring.shared.page
        # Called for each hit, so without a Python frame.
        epochs = partial(itemgetter(POLICY_EPOCH, STORE_EPOCH), page.words)
        hot_cache = HotCache(epochs, wiring.cache.close_removed)
        loop = asyncio.get_running_loop()
        downloads = Downloads(
            wiring.downloads,
            lambda: wiring.means.settings.clients,
            wiring.counters,
            self._machine(),
            loop,
        )
        names = ClientNames(wiring.settings.reports.addresses, read_key(wiring.store.run / "address-key"))
        self._access_log = AccessLog(wiring.settings, wiring.counters, names, wiring.means.clock)
        self._policy = Policy(
            wiring.settings,
            wiring.store.run,
            wiring.counters,
            wiring.executor,
            lambda: page.policy_epoch,
            wiring.tell,
            hot_cache.drop,
            wiring.means.clock,
        )
        wiring.pool.lists = self._policy.lists
        handler = Handler(
            wiring.means,
            wiring.cache,
            self._policy,
            hot_cache,
            downloads,
            self._access_log,
            node=node_name(wiring.settings),
        )
        self._addresses = AddressCounts(
            wiring.store.run / "addresses", parent.assignment.slot, wiring.settings.worker_count
        )
        self._listener = Listener(
            loop,
            [socket.socket(fileno=fd) for fd in parent.assignment.listen_fds],
            wiring.settings,
            handler,
            hot_cache,
            self._access_log,
            downloads,
            Admission(
                wiring.settings,
                wiring.counters,
                self._addresses,
                wiring.shared.sum_of("gup_client_connections"),
                most_here=wiring.descriptors * 3 // 4,
            ),
            on_second=self._each_second,
        )

    def _machine(self) -> MachineView:
        """What the workers tell each other about their downloads."""
        shared, block = self._wiring.shared, self._wiring.block
        waiting_since = shared.page.row(Row.DOWNLOAD_WAITING_SINCE)

        def show(since_ns: int) -> None:
            waiting_since[block] = since_ns

        return MachineView(
            in_progress=shared.sum_of("gup_client_downloads_in_progress"),
            queued=shared.sum_of("gup_client_downloads_queued"),
            ended=shared.sum_of("gup_client_downloads_total"),
            waiting_since_ns=waiting_since,
            own=block,
            show=show,
        )

    def _each_second(self, wall_now: float) -> None:
        self._wiring.shared.page.beat(self._wiring.block)
        self._wiring.cache.look_over()
        self._access_log.each_second(
            self._wiring.tell, self._wiring.offer, wall_now, everything=self._finishing
        )

    async def run(self) -> None:
        """Serve until drained or until the supervisor is gone."""
        self._listener.start()
        self._parent.send({"ready": True})
        warming = asyncio.get_running_loop().create_task(self._warm_up())
        if not await handle_messages(self._parent, self._handle, self._drained):
            await self._listener.drain(0.0)  # the supervisor is gone
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        self._addresses.close()
        await self._policy.close()
        await self._wiring.close()

    async def _warm_up(self) -> None:
        """Import aiohttp once the worker serves: the import takes longer than the rest of the start."""
        await asyncio.sleep(_WARM_UP_AFTER_SECONDS)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._wiring.executor, importlib.import_module, "aiohttp")

    def _handle(self, message: Mapping[str, object]) -> None:
        if message.get("drain") and self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif "settings" in message:
            settings = Settings.model_validate(message["settings"])
            self._wiring.apply(settings)
            self._listener.apply(settings)
            log.configure_child(settings.log)

    async def _drain(self) -> None:
        await self._listener.drain(self._wiring.settings.listen.drain_timeout)
        await self._wiring.cache.stop()  # bodies that clients have in full are committed first
        self._finishing = True
        self._each_second(self._wiring.means.wall_clock())
        self._parent.send({"drained": True})
        self._drained.set()


if __name__ == "__main__":
    run_child(Worker, uvloop.new_event_loop)
