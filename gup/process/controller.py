"""The controller's main: puts the control plane together, runs until it is told to stop."""

import asyncio
import json
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import cast

from gup import log
from gup.cache.catalogue_body import read_catalogue
from gup.cache.durability import Durability
from gup.cache.recovery import Recovery
from gup.cache.streams import read_streams
from gup.config import Settings
from gup.content.key import Variant
from gup.content.routes import Route
from gup.content.rules import Rulebook
from gup.content.variant_choice import Choices
from gup.control.catalog_refresh import CatalogRefresher
from gup.control.dependencies import ControlDependencies
from gup.control.eviction import AgeClock
from gup.control.service import Control
from gup.process.assembly import Assembly, until_told
from gup.process.child import Parent
from gup.process.page import CONFIG_OK, STORE_BYTES
from gup.upstream.catalogue import Fetched, fetch_catalogue
from gup.upstream.health import Checks

_LOG = logging.getLogger("gup.controller")
_BEAT_SECONDS = 1.0
_RELOAD_SECONDS = 10.0


class Controller:
    """The controller's life, driven by the supervisor's messages."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._assembly = assembly = Assembly(parent)
        self._page = assembly.shared.page
        self._stopped = asyncio.Event()
        self._ruled = assembly.settings, Rulebook(assembly.settings)
        """Settings and their rules; made here before anything is served, and in a thread after a reload."""
        self._worker_rows: Sequence[Mapping[str, object]] = ()
        self._reloads: deque[asyncio.Future[Sequence[str]]] = deque()
        self._applying: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        assembly.means.tell = self._tell_itself
        self._recovery = Recovery(
            assembly.store, assembly.means.claims, assembly.counters, self._take_over, self._tell_itself
        )
        self._catalogues = CatalogRefresher(
            assembly.store.run,
            assembly.settings,
            self._look_up_catalogue,
            lambda name, etag, modified: fetch_catalogue(assembly.pool, name, etag, modified),
            self._page.raise_policy,
        )
        assembly.pool.lists = self._catalogues.lists
        self._durability = Durability(
            assembly.store,
            lambda: assembly.settings.cache.sync_interval,
            assembly.shared.sum_of("gup_fills_total", outcome="committed"),
        )
        self._control = Control(
            ControlDependencies(
                settings=assembly.settings,
                store=assembly.store,
                claims=assembly.means.claims,
                counters=assembly.counters,
                totals=assembly.shared.totals,
                since_start=assembly.shared.since_start,
                stream_names=lambda: read_streams(assembly.store.run / "streams"),
                product_of=self._catalogues.product_of,
                raise_store_epoch=self._page.raise_store,
                set_store_bytes=self._set_store_bytes,
                promised_bytes=assembly.promised_bytes,
                upstreams_up=self._upstreams_up,
                upstream_states=self._upstream_states,
                wan_rate=assembly.wan_rate,
                workers=self._workers,
                config_ok=lambda: bool(self._page.words[CONFIG_OK]),
                reload=self._reload,
                recover=self._recovery.run,
                mend=lambda key, counted: assembly.cache.mend(key, counted=counted),
                events=socket.socket(fileno=os.dup(parent.assignment.event_fd)),
                admin=socket.socket(fileno=parent.assignment.listen_fds[0]),
                started_at=assembly.shared.started_at,
                installed_at=assembly.shared.installed_at,
                fetch_ahead=assembly.cache.fetch_ahead,
                drop_memory=assembly.means.memory.drop,
                places=self._places,
                link_idle=assembly.means.queue.idle,
                fills_waiting=assembly.means.queue.waiting,
                label_of=self._catalogues.label,
                catalogues=self._catalogues.shown,
                catalogue_rows=lambda: self._catalogues.catalogues,
                unlisted=self._catalogues.unlisted,
            ),
            ages=AgeClock(),
        )

    async def run(self) -> None:
        """Run until told to stop, or until the supervisor is gone."""
        loop = asyncio.get_running_loop()
        await self._control.start()
        self._parent.send({"ready": True})
        beating = loop.create_task(self._beat())
        checking = loop.create_task(Checks(self._assembly.pool).run())
        reading = loop.create_task(self._catalogues.keep())
        syncing = loop.create_task(self._durability.run())
        told = loop.create_task(until_told(self._parent, self._told))
        stopped = loop.create_task(self._stopped.wait())
        await asyncio.wait((told, stopped), return_when=asyncio.FIRST_COMPLETED)
        tasks = (beating, checking, reading, syncing, told, stopped)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._assembly.cache.stop()  # its commits are told to the control plane
        await self._control.stop()
        await self._durability.sync()
        await self._assembly.close()

    async def _beat(self) -> None:
        while True:
            self._page.beat(self._assembly.block)
            await asyncio.sleep(_BEAT_SECONDS)

    def _told(self, message: Mapping[str, object]) -> None:
        if message.get("stop"):
            self._stopped.set()
        elif "workers" in message:
            self._worker_rows = cast(Sequence[Mapping[str, object]], message["workers"])
        elif "problems" in message:
            outcome = self._reloads.popleft()
            if not outcome.done():  # nobody waits any more
                outcome.set_result(cast(Sequence[str], message["problems"]))
        elif "settings" in message:
            settings = Settings.model_validate(message["settings"])
            self._assembly.apply(settings)
            self._catalogues.apply(settings)
            log.configure_child(settings.log)
            self._applying = asyncio.get_running_loop().create_task(self._apply(settings))

    async def _apply(self, settings: Settings) -> None:
        self._ruled = settings, await asyncio.to_thread(Rulebook, settings)
        await self._control.apply(settings)

    # --- what the control plane asks of the process

    async def _look_up_catalogue(self, name: str) -> Fetched:
        variants = {u.name: Variant(u.version, u.language) for u in self._assembly.settings.upstream}
        return await read_catalogue(self._assembly.cache.open, variants[name])

    def _places(self, stream: str) -> Sequence[tuple[Variant, Variant]]:
        settings, book = self._ruled
        return Choices(book, self._catalogues.catalogues, settings.upstream).variants(stream)

    def _take_over(self, route: Route, inherits: bool) -> asyncio.Event | None:
        assert route.variant is not None
        return self._assembly.cache.take_over(route, route.variant, inherits=inherits)

    def _tell_itself(self, event: Mapping[str, object]) -> None:
        """The way of a worker's events leads here; what this process's own fills tell goes straight in."""
        self._loop.call_soon_threadsafe(self._control.state.take_event, json.dumps(event).encode())

    async def _reload(self) -> Sequence[str]:
        """Ask the supervisor, whose answers come in the order of the questions."""
        outcome: asyncio.Future[Sequence[str]] = self._loop.create_future()
        if not self._parent.send({"reload": True}):
            return ["the supervisor takes no message"]
        self._reloads.append(outcome)
        try:
            problems = await asyncio.wait_for(outcome, _RELOAD_SECONDS)
            if self._applying is not None:  # the settings came before the answer
                await asyncio.wait_for(asyncio.shield(self._applying), _RELOAD_SECONDS)
        except TimeoutError:
            return [f"the settings were not taken over within {_RELOAD_SECONDS:g} s"]
        return problems

    def _set_store_bytes(self, size_bytes: int) -> None:
        self._page.words[STORE_BYTES] = size_bytes

    def _upstreams_up(self) -> dict[str, bool]:
        board = self._assembly.pool.board
        names = [upstream.name for upstream in self._assembly.settings.upstream]
        return {name: not board.is_down(name) for name in names}

    def _upstream_states(self) -> dict[str, tuple[str, int | None]]:
        board = self._assembly.pool.board
        healths = {u.name: board.get(u.name) for u in self._assembly.settings.upstream}
        return {name: (health.state.name.lower(), health.since or None) for name, health in healths.items()}

    def _workers(self) -> Sequence[Mapping[str, object]]:
        return self._worker_rows


async def _main(parent: Parent) -> None:
    await Controller(parent).run()


def main() -> None:
    """Entry point of the controller process; `gup serve` starts it."""
    parent = Parent.from_argv(sys.argv)
    settings = parent.settings()
    log.configure_child(settings.log)
    asyncio.run(_main(parent))


if __name__ == "__main__":
    main()
