"""Active health checks: asks each upstream for a head now and then; one process alone does this, for all.

A check costs a request without a body. Managers and LiveUpdate are asked for an index file; another gup for
what it refuses by itself, since an index file would have it ask upstream, and a gup whose upstream is gone
still serves.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from gup.content.catalog import CATALOG_PATH
from gup.upstream.connection import Ask, Upstream
from gup.upstream.exchange import UpstreamFailure
from gup.upstream.health import FIRST_BACKOFF_SECONDS, Health, State, backoff_seconds
from gup.upstream.pool import Pool

_LOG = logging.getLogger("gup.upstream")
_TICK_SECONDS = 0.2
_PATHS = {"manager": CATALOG_PATH, "liveupdate": "/minitri.flg", "gup": "/"}


def check_path(kind: str) -> str:
    """What is asked for."""
    return _PATHS[kind]


def wait_seconds(name: str, health: Health, interval_seconds: float) -> float:
    """Time from one check to the next."""
    if health.state is State.DOWN:
        return backoff_seconds(name, health)
    if health.state in (State.DOUBTFUL, State.RECOVERING):
        return min(FIRST_BACKOFF_SECONDS, interval_seconds)
    return interval_seconds


class Checks:
    """The checks of all upstreams of a pool, each its own task, owned here. `run` goes on until cancelled."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._began = clock()
        self._last: dict[str, float] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                self._begin_due()
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin_due(self) -> None:
        for upstream in list(self._pool.upstreams):
            if upstream.name not in self._running and self._is_due(upstream):
                task = asyncio.get_running_loop().create_task(self._check(upstream))
                self._running[upstream.name] = task
                task.add_done_callback(lambda done, name=upstream.name: self._ended(name, done))  # type: ignore[misc]

    def _is_due(self, upstream: Upstream) -> bool:
        interval = upstream.settings.health_interval
        if interval <= 0:
            return False
        name, board = upstream.name, self._pool.board
        health = board.get(name)
        wait = wait_seconds(name, health, interval)
        if health.state is State.DOWN:
            return board.may_try(name, wait)
        return self._clock() - self._last.get(name, self._began) >= wait

    async def _check(self, upstream: Upstream) -> None:
        self._last[upstream.name] = self._clock()
        ask = Ask(path=check_path(upstream.settings.kind), purpose="index", method="HEAD", check=True)
        try:
            await self._pool.ask(upstream, ask)
        except UpstreamFailure as failure:
            _LOG.debug("check of %s: %s", upstream.name, failure.detail)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        del self._running[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a check of %s failed by a mistake of ours", name, exc_info=error)
