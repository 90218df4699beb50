"""The control plane as a service: its server and periodic jobs, from start to stop."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial

from aiohttp import web

from gup.config import Settings
from gup.content.key import ContentKey
from gup.control.alarms import AlarmCollector
from gup.control.application import make_app
from gup.control.auth import Access
from gup.control.dependencies import ControlDependencies
from gup.control.eviction import AgeClock
from gup.control.prefetch import LANES
from gup.control.reconcile import BusyError, change, reconcile
from gup.control.state import ControlState

_log = logging.getLogger("gup.control.service")


class Jobs:
    """Runs named jobs. An exception is logged; a periodic job runs again at its next turn."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run `work` once."""
        task = asyncio.create_task(self._guarded(name, work), name=f"control {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it never began

    def every(self, seconds: float, name: str, turn: Callable[[], Awaitable[None]]) -> None:
        """Run `turn` now and again `seconds` after each end."""

        async def repeat() -> None:
            while True:
                await self._guarded(name, turn())
                await asyncio.sleep(seconds)

        self.start(name, repeat())

    async def stop(self) -> None:
        """Cancel all jobs and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _guarded(name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001 - must end neither the control plane nor the job's later turns
            _log.exception("the job %r failed", name)


_SHUTDOWN_SECONDS = 2.0
_RESTART_SECONDS = 1.0
_SPACE_SECONDS = 5.0


class Control:
    """The control plane. `start` returns when its address answers; `stop` leaves no task or socket.

    The database opens and the store is scanned behind; until then `/readyz` says so and nothing is evicted.
    """

    def __init__(
        self,
        dependencies: ControlDependencies,
        clock: Callable[[], float] = time.time,
        ages: AgeClock | None = None,
    ) -> None:
        """`ages` is the clock that ages are measured with, by default `clock`."""
        self.state = ControlState(dependencies, clock, ages)
        self._dependencies = dependencies
        self._jobs = Jobs()
        self._access = Access()
        self._runner = web.AppRunner(
            make_app(self.state, self._access),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )

    async def start(self) -> None:
        """Answer requests, take events, and begin the jobs."""
        dependencies = self._dependencies
        await self._access.open(dependencies.settings().listen, dependencies.store.run, dependencies.admin)
        dependencies.events.setblocking(False)
        asyncio.get_running_loop().add_reader(dependencies.events, self.state.take_events)
        await self._runner.setup()
        await web.SockSite(self._runner, dependencies.admin, ssl_context=self._access.tls).start()
        self._jobs.start("open", self._open())
        self._jobs.start("open statistics", self._open_statistics())

    async def _open_statistics(self) -> None:
        self.state.clients.restore(await self.state.reports.newest_clients())
        self._jobs.every(1.0, "meter", self.state.meter)
        self._jobs.every(10.0, "history", self.state.history.write)

    async def _open(self) -> None:
        """Open the index, then begin what depends on it."""
        jobs, state = self._jobs, self.state
        await state.index.open()
        state.scrubber.restore()
        state.prefetcher.restore()
        # What never returns ends only by a mistake of ours; it must go on after it.
        jobs.every(_RESTART_SECONDS, "space", lambda: state.evictor.keep(_SPACE_SECONDS))
        jobs.every(_RESTART_SECONDS, "scrub", state.scrubber.keep)
        for lane in range(len(LANES)):
            jobs.every(_RESTART_SECONDS, f"prefetch {lane}", partial(state.prefetcher.run, lane))
        jobs.every(600.0, "reconcile", self._reconcile)
        jobs.every(1.0, "flush", self._flush)
        jobs.every(60.0, "touch", self._touch)
        jobs.every(2.0, "reports", state.reports.write_clients)
        jobs.every(3600.0, "prune", state.reports.prune)
        jobs.every(2.0, "recover", self._dependencies.recover)
        jobs.every(1.0, "watch", AlarmCollector(state).look)
        jobs.every(5.0, "prefetch", state.prefetcher.look_over)

    async def stop(self) -> None:
        """Write what is due and end everything."""
        state = self.state
        asyncio.get_running_loop().remove_reader(self._dependencies.events)
        state.take_events()
        await self._runner.cleanup()
        await state.evictor.stop()
        await state.verification.stop()
        await self._jobs.stop()
        state.scrubber.save()
        await self._repin()
        await self._touch()
        await state.meter()
        await state.history.write()
        await state.reports.write_clients()
        await state.database.stop()
        await state.index.close()

    async def apply(self, settings: Settings) -> None:
        """Take over reloaded settings; the listening address stays."""
        await self._access.read(settings.listen, self._dependencies.store.run)
        self.state.evictor.look_soon()

    # --- jobs

    async def _reconcile(self) -> None:
        await reconcile(self._dependencies, self.state.index, self.state.clock())
        self.state.evictor.look_soon()

    async def _flush(self) -> None:
        await self._repin()
        self.state.prefetcher.save()
        await self.state.index.flush()

    async def _repin(self) -> None:
        """Pin new generations of pinned entries on disk too; what fails is tried again at the next turn."""
        claims, store, refusals = self._dependencies.claims, self._dependencies.store, self.state.refusals
        for text in list(self.state.repin):
            key = ContentKey.parse(text)
            try:
                await change(claims, key, partial(store.set_pinned, key, True), patience_seconds=0.0)
            except BusyError:
                continue
            except OSError as error:
                refusals.note("pins", error.strerror or str(error))
                return
            self.state.repin.discard(text)
        refusals.note("pins", None)

    async def _touch(self) -> None:
        """Write revisions named again, and times of last use to the bodies: they survive a lost index."""
        due, self.state.touches = self.state.touches, {}

        def touch_all() -> None:
            for key, used_at in due.items():
                self._dependencies.store.touch(ContentKey.parse(key), used_at)

        await asyncio.to_thread(touch_all)
        self.state.prefetcher.save(all_=True)
