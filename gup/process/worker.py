"""A worker's main: puts the data plane together, serves until it is told to drain, then exits."""

import asyncio
import importlib
import logging
import socket
import sys
from collections.abc import Mapping
from functools import partial
from operator import itemgetter

import uvloop

from gup import log
from gup.client_names import ClientNames, read_key
from gup.config import Settings
from gup.process.assembly import Assembly, node_name, until_told
from gup.process.child import Parent
from gup.process.page import POLICY_EPOCH, STORE_EPOCH, Row
from gup.server.access_log import AccessLog
from gup.server.admission import AddressCounts, Admission
from gup.server.downloads import Downloads, MachineView
from gup.server.handler import Handler
from gup.server.hot_cache import HotCache
from gup.server.listener import Listener
from gup.server.policy import Policy

_WARM_UP_AFTER_SECONDS = 0.3
_LOG = logging.getLogger("gup.worker")


class Worker:
    """One worker's life, driven by the supervisor's messages."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._assembly = assembly = Assembly(parent)
        self._drained = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._drained_soon = False
        page = assembly.shared.page
        epochs = partial(itemgetter(POLICY_EPOCH, STORE_EPOCH), page.words)  # no frame: asked for each hit
        hot_cache = HotCache(epochs, assembly.cache.close_removed)
        loop = asyncio.get_running_loop()
        downloads = Downloads(
            assembly.downloads,
            lambda: assembly.means.settings.clients,
            assembly.counters,
            self._machine(),
            loop,
        )
        names = ClientNames(assembly.settings.reports.addresses, read_key(assembly.store.run / "address-key"))
        self._access_log = AccessLog(assembly.settings, assembly.counters, names, assembly.means.clock)
        self._policy = Policy(
            assembly.settings,
            assembly.store.run,
            assembly.counters,
            assembly.executor,
            lambda: page.policy_epoch,
            assembly.tell,
            hot_cache.drop,
            assembly.means.clock,
        )
        assembly.pool.lists = self._policy.lists
        handler = Handler(
            assembly.means,
            assembly.cache,
            self._policy,
            hot_cache,
            downloads,
            self._access_log,
            node=node_name(assembly.settings),
        )
        self._addresses = AddressCounts(
            assembly.store.run / "addresses", parent.assignment.slot, assembly.settings.worker_count
        )
        self._listener = Listener(
            loop,
            [socket.socket(fileno=fd) for fd in parent.assignment.listen_fds],
            assembly.settings,
            handler,
            hot_cache,
            self._access_log,
            downloads,
            Admission(
                assembly.settings,
                assembly.counters,
                self._addresses,
                assembly.shared.sum_of("gup_client_connections"),
                most_here=assembly.descriptors * 3 // 4,
            ),
            on_second=self._each_second,
        )

    def _machine(self) -> MachineView:
        """What the workers show each other of their downloads."""
        shared, block = self._assembly.shared, self._assembly.block
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
        self._assembly.shared.page.beat(self._assembly.block)
        self._assembly.cache.look_over()
        self._access_log.each_second(
            self._assembly.tell, self._assembly.offer, wall_now, everything=self._drained_soon
        )

    async def run(self) -> None:
        """Serve until drained, or until the supervisor is gone."""
        self._listener.start()
        self._parent.send({"ready": True})
        loop = asyncio.get_running_loop()
        warming = loop.create_task(self._warm_up())
        told = loop.create_task(until_told(self._parent, self._told))
        drained = loop.create_task(self._drained.wait())
        await asyncio.wait((told, drained), return_when=asyncio.FIRST_COMPLETED)
        if not self._drained.is_set():  # the supervisor is gone: nobody would replace this worker
            await self._listener.drain(0.0)
        for task in (told, drained, warming):
            task.cancel()
        await asyncio.gather(told, drained, warming, return_exceptions=True)
        self._addresses.close()
        await self._policy.close()
        await self._assembly.close()

    async def _warm_up(self) -> None:
        """Import aiohttp when serving has begun: that takes longer than everything before it together."""
        await asyncio.sleep(_WARM_UP_AFTER_SECONDS)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._assembly.executor, importlib.import_module, "aiohttp")

    def _told(self, message: Mapping[str, object]) -> None:
        if message.get("drain") and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())
        elif "settings" in message:
            settings = Settings.model_validate(message["settings"])
            self._assembly.apply(settings)
            self._listener.apply(settings)
            log.configure_child(settings.log)

    async def _drain(self) -> None:
        await self._listener.drain(self._assembly.settings.listen.drain_timeout)
        await self._assembly.cache.stop()  # what clients have whole is committed before this worker ends
        self._drained_soon = True
        self._each_second(self._assembly.means.wall_clock())
        self._parent.send({"drained": True})
        self._drained.set()


async def _main(parent: Parent) -> None:
    await Worker(parent).run()


def main() -> None:
    """Entry point of a worker process; `gup serve` starts it."""
    parent = Parent.from_argv(sys.argv)
    settings = parent.settings()
    log.configure_child(settings.log)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(parent))


if __name__ == "__main__":
    main()
