"""Keeps the history: looks at the counters each second, writes behind each half minute. Answers no request.

The points live in memory, on the event loop; the file belongs to one thread.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gup.control.history.figures import RECEIVED, SENT, Reader, Sums
from gup.control.history.file import HistoryFile
from gup.control.history.record import Gauges, History, Reached
from gup.control.limits import Meter
from gup.control.refusals import Refusals

_log = logging.getLogger("gup.control.history")
FILE = "history.sqlite"
WRITE_SECONDS = 30.0
_T = TypeVar("_T")
_WHAT = "history"
"""Under this name refusals of the disk are told."""


class HistoryKeeper:
    """`history` is what was moved; `wan` and `clients` are how fast it moves. For one service's life."""

    def __init__(
        self,
        folder: Path,
        refusals: Refusals,
        *,
        totals: Callable[[], Mapping[str, int]],
        since_start: Callable[[], Mapping[str, int]],
        installed_at: float,
        clock: Callable[[], float],
    ) -> None:
        """`totals` and `since_start` as in Surroundings; `clock` is the wall's, in Unix seconds."""
        self.history = History()
        self.wan, self.clients = Meter(), Meter()
        self._file = HistoryFile(folder / FILE)
        self._refusals = refusals
        self._totals, self._since_start = totals, since_start
        self._installed_at = installed_at
        self._clock = clock
        self._reader = Reader()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-history")

    async def open(self) -> None:
        """Read what earlier lives wrote; a disk that refuses leaves the history in memory only."""
        try:
            points, reached = await self._in_thread(self._file.load)
        except OSError as error:
            points, reached = [], None
            self._refusals.tell(_WHAT, str(error), self._clock())
        sums = self._reader.sums(self._totals())
        since_start = self._reader.sums(self._since_start())
        before_start = tuple(max(0, now - own) for now, own in zip(sums, since_start, strict=True))
        self.history.begin(points, reached, Reached(sums, self._installed_at, self._clock()), before_start)

    def look(self, *, wan_limit: int, entries_bytes: int) -> Sums:
        """Take in what the counters gained; what they show. For once a second, and before reading."""
        sums, steady = self._reader.sums(self._totals()), time.monotonic()
        self.wan.see(sums[RECEIVED], steady)
        self.clients.see(sums[SENT], steady)
        if self.history.begun:
            gauges = Gauges(
                self.wan.bytes_per_second(), wan_limit, self.clients.bytes_per_second(), entries_bytes
            )
            self.history.see(sums, gauges, self._clock(), steady)
        return sums

    async def write(self) -> None:
        """Write down what changed; what the disk refuses stays due."""
        if not self.history.begun:
            return
        points, reached = self.history.due()
        try:
            await self._in_thread(lambda: self._file.write(points, reached))
        except (OSError, asyncio.CancelledError) as error:
            self.history.put_back(points)
            if isinstance(error, asyncio.CancelledError):
                raise
            self._refusals.tell(_WHAT, str(error), self._clock())
        else:
            self._refusals.clear(_WHAT)

    async def close(self) -> None:
        """Write the rest and end the thread."""
        await self.write()
        await self._in_thread(self._file.close)
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
