"""The control plane's life: starts its jobs and its server, applies reloads, ends all of it."""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine

from aiohttp import web

from gup.config import Settings
from gup.content.key import ContentKey
from gup.control.alarm_collector import Watch
from gup.control.app import make_app
from gup.control.auth import Access
from gup.control.dependencies import Surroundings
from gup.control.eviction import AgeClock
from gup.control.prefetch import LANES
from gup.control.reconcile import BusyError, change, reconcile
from gup.control.state import Plane
from gup.control.stats.history import WRITE_SECONDS

_log = logging.getLogger("gup.control.service")


class Jobs:
    """Named tasks. A job that raises is logged and, if it is periodic, runs again at its next turn."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run `work` once, until it ends or `stop`. No other of this name may run."""
        if any(task.get_name() == f"control {name}" for task in self._tasks):
            work.close()
            raise AssertionError(f"{name} runs already")
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
        """Cancel all and wait until they have ended."""
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


__all__ = ["Control", "Surroundings"]

_FLUSH_SECONDS = 1.0
_METER_SECONDS = 1.0
_TOUCH_SECONDS = 60.0
_REVISIONS_SECONDS = 60.0
_SPACE_SECONDS = 5.0
_REPORTS_SECONDS = 2.0
_LEDGER_SECONDS = 10.0
_PRUNE_SECONDS = 3600.0
_RESTART_SECONDS = 1.0
_RECONCILE_SECONDS = 600.0
_RECOVER_SECONDS = 2.0
_SHUTDOWN_SECONDS = 2.0
_LOOK_OVER_SECONDS = 5.0
_WATCH_SECONDS = 1.0
_OLD_CLIENTS_NOTE = "clients"
"""Of earlier editions: it held as many rows as there were clients."""


class Control:
    """The control plane. `start` returns when its address answers; `stop` leaves no task, thread or socket.

    The database opens and the store is scanned behind; until then `/readyz` says so and nothing is evicted.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        clock: Callable[[], float] = time.time,
        ages: AgeClock | None = None,
    ) -> None:
        """`ages` tells how old things are; by default that is what `clock` says."""
        self.plane = Plane(surroundings, clock, ages)
        self._around = surroundings
        self._jobs = Jobs()
        self._access = Access()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Answer requests, take events, and begin the jobs."""
        await self._access.open(self.plane.settings.listen, self._around.store.run, self._around.admin)
        self._around.events.setblocking(False)
        asyncio.get_running_loop().add_reader(self._around.events, self.plane.take_events)
        self._runner = web.AppRunner(
            make_app(self.plane, self._access),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        await self._runner.setup()
        await web.SockSite(self._runner, self._around.admin, ssl_context=self._access.tls).start()
        self._jobs.start("open", self._open())
        self._jobs.start("open statistics", self._open_statistics())

    async def _open_statistics(self) -> None:
        await self.plane.history.open()
        self.plane.clients.restore(await self.plane.reports.newest_clients())
        self._jobs.every(_METER_SECONDS, "meter", self.plane.meter)
        self._jobs.every(WRITE_SECONDS, "history", self.plane.history.write)

    async def _open(self) -> None:
        """Open the index, then begin what depends on it."""
        await self.plane.index.open()
        self.plane.index.drop_note(_OLD_CLIENTS_NOTE)
        self.plane.scrubber.restore()
        self.plane.prefetcher.restore(self.plane.index.note)
        jobs, plane = self._jobs, self.plane
        # `keep` ends only by a mistake of ours; eviction must go on after it.
        jobs.every(_RESTART_SECONDS, "space", lambda: plane.space.keep(_SPACE_SECONDS))
        jobs.every(_RECONCILE_SECONDS, "reconcile", self._reconcile)
        jobs.every(_FLUSH_SECONDS, "flush", self._flush)
        jobs.every(_TOUCH_SECONDS, "touch", self._touch)
        jobs.every(_REPORTS_SECONDS, "reports", plane.reports.write_clients)
        jobs.every(_LEDGER_SECONDS, "ledger", plane.reports.write_savings)
        jobs.every(_PRUNE_SECONDS, "prune", plane.reports.prune)
        jobs.every(_RECOVER_SECONDS, "recover", self._around.recover)
        jobs.every(_RESTART_SECONDS, "scrub", plane.scrubber.keep)
        for lane in range(len(LANES)):
            jobs.every(_RESTART_SECONDS, f"prefetch {lane}", functools.partial(plane.prefetcher.run, lane))
        jobs.every(_WATCH_SECONDS, "watch", Watch(plane).look)
        jobs.every(_LOOK_OVER_SECONDS, "prefetch", self._look_over)
        jobs.every(_REVISIONS_SECONDS, "revisions", self._note_all)

    async def stop(self) -> None:
        """End everything; what is due is written first."""
        asyncio.get_running_loop().remove_reader(self._around.events)
        self.plane.take_events()
        if self._runner is not None:
            await self._runner.cleanup()
        await self.plane.space.stop()
        await self.plane.verification.stop()
        await self._jobs.stop()
        self.plane.scrubber.save()
        self.plane.prefetcher.save(self.plane.index.set_note, all_=True)
        await self._repin()
        await self._touch()
        await self.plane.meter()
        await self.plane.history.write()
        await self.plane.reports.write_clients()
        await self.plane.reports.write_savings()
        await self.plane.database.stop()
        await self.plane.index.close()

    async def apply(self, settings: Settings) -> None:
        """Take over reloaded settings; the address stays as it was bound."""
        self.plane.settings = settings
        self.plane.space.limits = settings.cache
        await self._access.renew(settings.listen, self._around.store.run)
        self.plane.space.look_soon()

    # --- jobs

    async def _reconcile(self) -> None:
        around, plane = self._around, self.plane
        await reconcile(plane.index, around.store, around.claims, around.counters, around.mend, plane.clock())
        plane.space.look_soon()

    async def _look_over(self) -> None:
        self.plane.prefetcher.look_over()

    async def _note_all(self) -> None:
        self.plane.prefetcher.save(self.plane.index.set_note, all_=True)

    async def _flush(self) -> None:
        await self._repin()
        self.plane.prefetcher.save(self.plane.index.set_note)
        await self.plane.index.flush()

    async def _repin(self) -> None:
        """Pin the new generations of pinned entries on disk too; a refusal is tried at the next turn."""
        for text in list(self.plane.repin):
            key = ContentKey.parse(text)
            try:
                pin = functools.partial(self._around.store.set_pinned, key, True)
                await change(self._around.claims, key, pin, patience_seconds=0.0)
            except BusyError:
                continue
            except OSError as error:
                self.plane.refusals.tell("pins", error.strerror or str(error), self.plane.clock())
                return
            self.plane.repin.discard(text)
        self.plane.refusals.clear("pins")

    async def _touch(self) -> None:
        """Write last uses where they outlive a lost index."""
        due, self.plane.touches = self.plane.touches, {}

        def touch_all() -> None:
            for key, used_at in due.items():
                self._around.store.touch(ContentKey.parse(key), used_at)

        await asyncio.to_thread(touch_all)
