"""Main module of the controller process: wires the control plane and runs it."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence

from gup.cache.catalog_cache import read_catalogue
from gup.cache.disk import Durability
from gup.cache.recovery import Recovery
from gup.cache.streams import read_streams
from gup.config import Settings
from gup.content.key import Variant
from gup.content.routes import Route
from gup.content.rules import Rulebook
from gup.content.variant_choice import Choices
from gup.control.catalog_refresh import CatalogRefresher
from gup.control.dependencies import ControlDependencies, Reload
from gup.control.eviction import AgeClock
from gup.control.service import Control
from gup.control.stats.history import RECEIVED
from gup.process.child import Message, Parent
from gup.process.shared_memory import CONFIG_OK, POLICY_EPOCH, STORE_BYTES, STORE_EPOCH
from gup.process.start_check import of_clocks, of_rate
from gup.process.wiring import ChildProcess, run_child
from gup.upstream.download import Fetched, fetch_catalogue

_LOG = logging.getLogger("gup.process")
_RELOAD_SECONDS = 10.0
_UPGRADE_SECONDS = 40.0
_ASKED_WITHIN_SECONDS = 120
"""Until then each upstream that can answer has done so."""


class Controller(ChildProcess):
    def __init__(self, parent: Parent) -> None:
        super().__init__(parent)
        self._ruled = self.settings, Rulebook(self.settings)  # after a reload it is made in a thread
        self._worker_rows: Sequence[Mapping[str, object]] = ()
        self._reloads: deque[asyncio.Future[Reload]] = deque()
        self._upgrades: deque[asyncio.Future[list[str]]] = deque()
        self._applying: asyncio.Task[None] | None = None
        self._leaves = False
        self._loop = asyncio.get_running_loop()
        shared, words, dependencies, board = self.shared, self.words, self.dependencies, self.pool.board
        recovery = Recovery(self.store, self.counters, self._take_over, self.tell)
        self._catalogues = catalogues = CatalogRefresher(
            self.store.run,
            self.settings,
            self._look_up_catalogue,
            lambda name, etag, modified: fetch_catalogue(self.pool, name, etag, modified),
            lambda: self.page.raise_epoch(POLICY_EPOCH),
        )
        self.pool.lists = lambda name, moniker: catalogues.catalogues.listed(name, moniker) is not None
        self._durability = Durability(
            self.store.root,
            lambda: self.settings.cache.sync_interval,
            shared.sum_of("gup_fills_total", outcome="committed"),
        )
        self._handed = handed = [socket.socket(fileno=fd) for fd in parent.assignment.handed_fds]
        self._control = Control(
            ControlDependencies(
                settings=lambda: self.settings,
                store=self.store,
                claims=dependencies.claims,
                counters=self.counters,
                totals=shared.totals,
                since_start=shared.since_start,
                stream_names=lambda: read_streams(self.store.run / "streams"),
                raise_store_epoch=lambda: self.page.raise_epoch(STORE_EPOCH),
                set_store_bytes=lambda size_bytes: words.__setitem__(STORE_BYTES, size_bytes),
                promised_bytes=self.reserved_bytes,
                upstream_states=lambda: {
                    u.name: (board.get(u.name).state.name.lower(), board.get(u.name).since or None)
                    for u in self.settings.upstream
                },
                wan_rate=self.wan_rate,
                workers=lambda: self._worker_rows,
                config_ok=lambda: bool(words[CONFIG_OK]),
                reload=self._reload,
                upgrade=self._upgrade,
                recover=recovery.run,
                mend=lambda key, counted: self.cache.repair(key, counted=counted),
                events=socket.socket(fileno=os.dup(parent.assignment.event_fd)),
                admin=socket.socket(fileno=parent.assignment.listen_fds[0]),
                handed=(handed[0], handed[1]),
                started_at=shared.started_at,
                installed_at=shared.installed_at,
                fetch_ahead=self.cache.prefetch,
                drop_memory=dependencies.memory.drop,
                places=self._places,
                link_idle=dependencies.queue.idle,
                fills_waiting=dependencies.queue.waiting,
                label_of=catalogues.label,
                catalogues=catalogues.shown,
                catalogue_rows=lambda: catalogues.catalogues,
                unlisted=catalogues.unlisted,
            ),
            ages=AgeClock(),
        )

    async def run(self) -> None:
        await self._control.start()
        self.parent.send({"ready": True})
        jobs = (
            self._keep_beating(),
            self.pool.run_checks(),
            self._catalogues.keep(),
            self._durability.run(),
            self._warn(),
            self._note_occupied(),
        )
        tasks = [self._loop.create_task(job) for job in jobs]
        await self.handle_messages()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._leaves:
            await self._control.leave()
        await self.cache.stop()  # sends events of its last commits to the control plane
        await self._control.stop()
        await self._durability.sync()
        for end in self._handed:
            end.close()
        await self.close()

    async def _warn(self) -> None:
        """Log what can't work as it is set, as soon as it is known: each upstream is checked before long."""
        with contextlib.suppress(OSError):  # a damaged disk has its alarm
            points = await self._control.state.history.series("quarter")
            fastest = max((point.wan_peak for point in points), default=0)
            received = sum(point.sums[RECEIVED] for point in points)
            for words in of_rate(self.settings.wan.rate, fastest, received):
                _LOG.warning("%s", words)
        for _ in range(_ASKED_WITHIN_SECONDS):
            ahead = {u.name: u.ahead_seconds for u in self.pool.upstreams if u.ahead_seconds is not None}
            if len(ahead) == len(self.pool.upstreams):
                break
            await asyncio.sleep(1.0)
        for words in of_clocks(ahead):
            _LOG.warning("%s", words)

    async def _note_occupied(self) -> None:
        try:
            await asyncio.to_thread(self.store.note_occupied)
        except OSError as error:
            _LOG.warning("each miss looks at the disk, since the cache directory can't be read: %s", error)

    async def _keep_beating(self) -> None:
        while True:
            self.beat()
            await asyncio.sleep(1.0)

    def tell(self, event: Mapping[str, object]) -> None:
        """Take an event of the controller's own fills; workers send theirs over the socket."""
        self._loop.call_soon_threadsafe(self._control.state.take, [json.dumps(event).encode()])

    def handle(self, message: Message) -> None:
        if message.get("stop") or message.get("leave"):
            self._leaves = "leave" in message
            self.stopped.set()
        elif "workers" in message:
            self._worker_rows = message["workers"]
        elif "problems" in message:
            outcome = self._reloads.popleft()
            if not outcome.done():  # else `_reload` timed out
                outcome.set_result(Reload(**message))
        elif "upgrade" in message:
            answer = self._upgrades.popleft()
            if not answer.done():  # else `_upgrade` timed out
                answer.set_result(message["upgrade"])

    def apply(self, settings: Settings) -> None:
        super().apply(settings)
        self._catalogues.apply(settings)
        self._applying = self._loop.create_task(self._apply(settings))

    async def _apply(self, settings: Settings) -> None:
        self._ruled = settings, await asyncio.to_thread(Rulebook, settings)
        await self._control.apply(settings)

    # --- called by the control plane

    async def _look_up_catalogue(self, name: str) -> Fetched:
        variants = {u.name: Variant(u.version, u.language) for u in self.settings.upstream}
        return await read_catalogue(self.cache.open, variants[name])

    def _places(self, stream: str) -> Sequence[tuple[Variant, Variant]]:
        settings, book = self._ruled
        return Choices(book, self._catalogues.catalogues, settings.upstream).variants(stream)

    def _take_over(self, route: Route, inherits: bool) -> asyncio.Event | None:
        assert route.variant is not None
        return self.cache.take_over(route, route.variant, inherits=inherits)

    async def _reload(self) -> Reload:
        """Have the supervisor reload the settings. Answers come in order."""
        outcome: asyncio.Future[Reload] = self._loop.create_future()
        if not self.parent.send({"reload": True}):
            return Reload(["the supervisor does not read its messages"])
        self._reloads.append(outcome)
        try:
            async with asyncio.timeout(_RELOAD_SECONDS):  # wait_for of Python 3.11 may swallow a cancellation
                answer = await outcome
                if self._applying is not None:  # the settings arrived before the answer
                    await asyncio.shield(self._applying)
        except TimeoutError:
            return Reload([f"the settings were not applied within {_RELOAD_SECONDS:g} s"])
        return answer

    async def _upgrade(self) -> list[str]:
        """Have the supervisor try the new program, and run it if it can take over. Answers come in order."""
        answer: asyncio.Future[list[str]] = self._loop.create_future()
        if not self.parent.send({"upgrade": True}):
            return ["the supervisor does not read its messages"]
        self._upgrades.append(answer)
        try:
            async with asyncio.timeout(_UPGRADE_SECONDS):
                return await answer
        except TimeoutError:
            return [f"the supervisor did not answer within {_UPGRADE_SECONDS:g} s"]


if __name__ == "__main__":
    run_child(Controller)
