"""Main module of the controller process: wires the control plane and runs it."""

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from typing import cast

from gup import log
from gup.cache.catalog_cache import read_catalogue
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
from gup.process.child import Parent
from gup.process.shared_memory import CONFIG_OK, STORE_BYTES
from gup.process.wiring import Wiring, handle_messages, run_child
from gup.upstream.download import Fetched, fetch_catalogue
from gup.upstream.health import Checks

_BEAT_SECONDS = 1.0
_RELOAD_SECONDS = 10.0


class Controller:
    """The controller, directed by the supervisor's messages."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._wiring = wiring = Wiring(parent)
        self._page = wiring.shared.page
        self._stopped = asyncio.Event()
        self._ruled = wiring.settings, Rulebook(wiring.settings)
        """Settings and their rules: made here at the start, in a thread after a reload."""
        self._worker_rows: Sequence[Mapping[str, object]] = ()
        self._reloads: deque[asyncio.Future[Sequence[str]]] = deque()
        self._applying: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        wiring.means.tell = self._take_own_event
        self._recovery = Recovery(
            wiring.store, wiring.means.claims, wiring.counters, self._take_over, self._take_own_event
        )
        self._catalogues = CatalogRefresher(
            wiring.store.run,
            wiring.settings,
            self._look_up_catalogue,
            lambda name, etag, modified: fetch_catalogue(wiring.pool, name, etag, modified),
            self._page.raise_policy,
        )
        wiring.pool.lists = lambda name, moniker: (
            self._catalogues.catalogues.listed(name, moniker) is not None
        )
        self._durability = Durability(
            wiring.store,
            lambda: wiring.settings.cache.sync_interval,
            wiring.shared.sum_of("gup_fills_total", outcome="committed"),
        )
        self._control = Control(
            ControlDependencies(
                settings=lambda: wiring.settings,
                store=wiring.store,
                claims=wiring.means.claims,
                counters=wiring.counters,
                totals=wiring.shared.totals,
                since_start=wiring.shared.since_start,
                stream_names=lambda: read_streams(wiring.store.run / "streams"),
                product_of=self._catalogues.product_of,
                raise_store_epoch=self._page.raise_store,
                set_store_bytes=self._set_store_bytes,
                promised_bytes=wiring.reserved_bytes,
                upstreams_up=self._upstreams_up,
                upstream_states=self._upstream_states,
                wan_rate=wiring.wan_rate,
                workers=lambda: self._worker_rows,
                config_ok=lambda: bool(self._page.words[CONFIG_OK]),
                reload=self._reload,
                recover=self._recovery.run,
                mend=lambda key, counted: wiring.cache.repair(key, counted=counted),
                events=socket.socket(fileno=os.dup(parent.assignment.event_fd)),
                admin=socket.socket(fileno=parent.assignment.listen_fds[0]),
                started_at=wiring.shared.started_at,
                installed_at=wiring.shared.installed_at,
                fetch_ahead=wiring.cache.prefetch,
                drop_memory=wiring.means.memory.drop,
                places=self._places,
                link_idle=wiring.means.queue.idle,
                fills_waiting=wiring.means.queue.waiting,
                label_of=self._catalogues.label,
                catalogues=self._catalogues.shown,
                catalogue_rows=lambda: self._catalogues.catalogues,
                unlisted=self._catalogues.unlisted,
            ),
            ages=AgeClock(),
        )

    async def run(self) -> None:
        """Run until the supervisor sends `stop` or is gone."""
        await self._control.start()
        self._parent.send({"ready": True})
        jobs = (
            self._beat(),
            Checks(self._wiring.pool).run(),
            self._catalogues.keep(),
            self._durability.run(),
        )
        tasks = [self._loop.create_task(job) for job in jobs]
        await handle_messages(self._parent, self._handle, self._stopped)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._wiring.cache.stop()  # sends events of its last commits to the control plane
        await self._control.stop()
        await self._durability.sync()
        await self._wiring.close()

    async def _beat(self) -> None:
        while True:
            self._page.beat(self._wiring.block)
            await asyncio.sleep(_BEAT_SECONDS)

    def _handle(self, message: Mapping[str, object]) -> None:
        if message.get("stop"):
            self._stopped.set()
        elif "workers" in message:
            self._worker_rows = cast(Sequence[Mapping[str, object]], message["workers"])
        elif "problems" in message:
            outcome = self._reloads.popleft()
            if not outcome.done():  # else `_reload` timed out
                outcome.set_result(cast(Sequence[str], message["problems"]))
        elif "settings" in message:
            settings = Settings.model_validate(message["settings"])
            self._wiring.apply(settings)
            self._catalogues.apply(settings)
            log.configure_child(settings.log)
            self._applying = self._loop.create_task(self._apply(settings))

    async def _apply(self, settings: Settings) -> None:
        self._ruled = settings, await asyncio.to_thread(Rulebook, settings)
        await self._control.apply(settings)

    # --- called by the control plane

    async def _look_up_catalogue(self, name: str) -> Fetched:
        variants = {u.name: Variant(u.version, u.language) for u in self._wiring.settings.upstream}
        return await read_catalogue(self._wiring.cache.open, variants[name])

    def _places(self, stream: str) -> Sequence[tuple[Variant, Variant]]:
        settings, book = self._ruled
        return Choices(book, self._catalogues.catalogues, settings.upstream).variants(stream)

    def _take_over(self, route: Route, inherits: bool) -> asyncio.Event | None:
        assert route.variant is not None
        return self._wiring.cache.take_over(route, route.variant, inherits=inherits)

    def _take_own_event(self, event: Mapping[str, object]) -> None:
        """Events of the controller's own fills; those of workers come through the socket."""
        self._loop.call_soon_threadsafe(self._control.state.take_event, json.dumps(event).encode())

    async def _reload(self) -> Sequence[str]:
        """Have the supervisor reload the settings; returns the problems. Answers come in order."""
        outcome: asyncio.Future[Sequence[str]] = self._loop.create_future()
        if not self._parent.send({"reload": True}):
            return ["the supervisor does not read its messages"]
        self._reloads.append(outcome)
        try:
            problems = await asyncio.wait_for(outcome, _RELOAD_SECONDS)
            if self._applying is not None:  # the settings arrived before the answer
                await asyncio.wait_for(asyncio.shield(self._applying), _RELOAD_SECONDS)
        except TimeoutError:
            return [f"the settings were not applied within {_RELOAD_SECONDS:g} s"]
        return problems

    def _set_store_bytes(self, size_bytes: int) -> None:
        self._page.words[STORE_BYTES] = size_bytes

    def _upstreams_up(self) -> dict[str, bool]:
        board = self._wiring.pool.board
        names = [upstream.name for upstream in self._wiring.settings.upstream]
        return {name: not board.is_down(name) for name in names}

    def _upstream_states(self) -> dict[str, tuple[str, int | None]]:
        board = self._wiring.pool.board
        healths = {u.name: board.get(u.name) for u in self._wiring.settings.upstream}
        return {name: (health.state.name.lower(), health.since or None) for name, health in healths.items()}


if __name__ == "__main__":
    run_child(Controller)
