"""Main module of the controller process: wires the control plane and runs it."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from gup.cache.catalog_cache import read_catalogue
from gup.cache.disk import Durability
from gup.cache.recovery import Recovery
from gup.cache.scheduler import share_class
from gup.cache.streams import read_streams
from gup.cluster.member_list import Members, read_members, write_members
from gup.cluster.share import Classes
from gup.config import Settings
from gup.content.key import ANY, Variant
from gup.content.routes import Route
from gup.content.rules import Rulebook
from gup.content.variant_choice import Choices
from gup.control.catalog_refresh import CatalogRefresher
from gup.control.cluster import ClusterControl, ClusterDependencies
from gup.control.dependencies import ControlDependencies, Reload
from gup.control.eviction import AgeClock
from gup.control.order_book import OrderBook
from gup.control.service import Control
from gup.control.stats.history import RECEIVED
from gup.process.child import Message, Parent
from gup.process.shared_memory import (
    CLUSTER_EPOCH,
    CONFIG_OK,
    ENGINE_TIME,
    ENGINE_TIME_BEFORE,
    ORDERED,
    POLICY_EPOCH,
    PURGES,
    STORE_BYTES,
    STORE_EPOCH,
    WAN_MEMBERS,
    WAN_SHARE,
    WAN_SHARE_UNTIL,
    Row,
)
from gup.process.start_check import of_clocks, of_rate
from gup.process.wiring import ChildProcess, run_child
from gup.upstream.bandwidth import NOBODY, priority_of
from gup.upstream.download import Fetched, fetch_catalogue
from gup.upstream.probe import Prober

_LOG = logging.getLogger("gup.process")
_RELOAD_SECONDS = 10.0
_UPGRADE_SECONDS = 40.0
_ASKED_WITHIN_SECONDS = 120
"""Until then each upstream that can answer has done so."""
_SHOWN = (
    "gup_client_sent_bytes_total",
    "gup_upstream_received_bytes_total",
    "gup_upstream_wasted_bytes_total",
    "gup_peer_received_bytes_total",
    "gup_peer_sent_bytes_total",
    "gup_requests_total",
)
"""Totals that the members show of each other."""


class Controller(ChildProcess):
    def __init__(self, parent: Parent) -> None:
        super().__init__(parent)
        self._ruled = self.settings, Rulebook(self.settings)  # after a reload it is made in a thread
        self._totals: Mapping[str, int] = {}
        self._totals_until = 0.0
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
        self.budget.label = lambda route: catalogues.label((ANY, ANY, route.stream), route.file)
        self.pool.lists = lambda name, moniker: catalogues.catalogues.listed(name, moniker) is not None
        self._durability = Durability(
            self.store.root,
            lambda: self.settings.cache.sync_interval,
            shared.sum_of("gup_fills_total", outcome="committed"),
        )
        self._cluster = self._make_cluster()
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
                purges=dependencies.purges,
                share_purges=self._share_purges,
                set_store_bytes=lambda size_bytes: words.__setitem__(STORE_BYTES, size_bytes),
                promised_bytes=self.reserved_bytes,
                upstream_states=lambda: {
                    u.name: (board.get(u.name).state.name.lower(), board.get(u.name).since or None)
                    for u in self.settings.upstream
                },
                wan_rate=self.wan_rate,
                site_rate=self.site_rate,
                cluster=self._cluster,
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
                gate=self.budget,
                fetch_ahead=self.cache.prefetch,
                head=self.cache.head,
                drop_memory=dependencies.memory.drop,
                places=self._places,
                link_idle=dependencies.queue.idle,
                fills_waiting=dependencies.queue.waiting,
                label_of=catalogues.label,
                catalogues=catalogues.shown,
                catalogue_rows=lambda: catalogues.catalogues,
                raise_policy_epoch=lambda: self.page.raise_epoch(POLICY_EPOCH),
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
        if self._cluster is not None:
            tasks.append(self._loop.create_task(self._keep_cluster(self._cluster)))
        await self.handle_messages()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._cluster is not None:
            await self._cluster.close(stays=self._leaves)
        if self._leaves:
            await self._control.leave()
        await self.cache.stop()  # sends events of its last commits to the control plane
        await self._control.stop()
        await self._durability.sync()
        for end in self._handed:
            end.close()
        await self.close()

    def _make_cluster(self) -> ClusterControl | None:
        cluster = self.settings.cluster
        if cluster.url is None:
            return None
        from gup.cluster.engine import Engine  # noqa: PLC0415 - redis may be missing where this gup is alone

        assert cluster.site is not None
        words, run, page = self.words, self.store.run, self.page

        async def publish(members: Members) -> None:
            await asyncio.to_thread(write_members, run, members)
            page.raise_epoch(CLUSTER_EPOCH)

        def set_share(share: int, until_ns: int) -> None:
            words[WAN_SHARE], words[WAN_SHARE_UNTIL] = share, until_ns

        def set_time_offset(offset: int) -> None:
            words[ENGINE_TIME_BEFORE], words[ENGINE_TIME] = words[ENGINE_TIME], max(0, offset)

        return ClusterControl(
            ClusterDependencies(
                settings=cluster,
                upstreams=lambda: self.settings.upstream,
                signer=self.sign_as,
                rate=self.site_rate,
                paid=self._paid_bytes,
                waiting=self._waiting_classes,
                received_rate=self._received_rate,
                totals=self._shown_totals,
                publish=publish,
                set_share=set_share,
                set_most=lambda most: words.__setitem__(WAN_MEMBERS, most),
                time_offset=lambda: words[ENGINE_TIME],
                set_time_offset=set_time_offset,
                accept_time_offset=lambda offset: words.__setitem__(ENGINE_TIME_BEFORE, max(0, offset)),
                book=OrderBook(run, cluster.node, lambda: self.engine_ms() / 1000, self._share_purges),
                set_ordered=lambda: words.__setitem__(ORDERED, 1),
                known=read_members(run),
            ),
            Engine(cluster),
            Prober(cluster.node),
        )

    async def _keep_cluster(self, cluster: ClusterControl) -> None:
        while True:
            try:
                await cluster.run()
            except Exception:  # noqa: BLE001 - the service must go on
                _LOG.exception("the cluster's control failed; it is started again")
            await asyncio.sleep(1.0)

    def _paid_bytes(self) -> Classes:
        urgent, other, background = (sum(row) for row in self._paid)
        return urgent, other, background

    def _waiting_classes(self) -> frozenset[int]:
        """The classes of the first waiters for the WAN, of all workers."""
        words = [
            word for block, word in enumerate(self.page.row(Row.WAN_TURNS)) if word and self._alive(block)
        ]
        return frozenset(share_class(priority_of(NOBODY - word)) for word in words)

    def _received_rate(self) -> int:
        return self._control.state.history.wan.bytes_per_second()

    def _shown_totals(self) -> Mapping[str, int]:
        """What the other members show of this one, at most a second old."""
        if self._loop.time() >= self._totals_until:
            self._totals_until = self._loop.time() + 1.0
            sums: Counter[str] = Counter()
            for name, count in self.shared.totals().items():
                metric = name.partition("{")[0]
                if metric in _SHOWN:
                    sums[metric] += count
            self._totals = dict(sums)
        return self._totals

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
            self.cache.set_purged_aside()
            self.tell_under_way()
            await asyncio.sleep(1.0)

    def tell(self, event: Mapping[str, object]) -> None:
        """Take an event of the controller's own fills; workers send theirs over the socket."""
        self._loop.call_soon_threadsafe(self._control.state.take, [json.dumps(event).encode()])

    def handle(self, message: Message) -> None:
        if message.get("stop") or message.get("leave"):
            self._leaves = "leave" in message
            self.stopped.set()
        elif message.get("goodbye"):
            if self._cluster is not None:
                self._cluster.leave()
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
        if self._cluster is not None and settings.cluster.site is not None:
            self._cluster.apply()
        self._applying = self._loop.create_task(self._apply(settings))

    async def _apply(self, settings: Settings) -> None:
        self._ruled = settings, await asyncio.to_thread(Rulebook, settings)
        await self._control.apply(settings)

    # --- called by the control plane

    def _share_purges(self) -> None:
        """All processes read the purges, and close what they name, at once."""
        self.words[PURGES] += 1
        self.page.raise_epoch(STORE_EPOCH)

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
