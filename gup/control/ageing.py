"""The clock by which things grow old: it does not believe every jump of the wall clock. Removes nothing."""

import logging
import time
from collections.abc import Callable, Iterable

_log = logging.getLogger("gup.control.ageing")
JUMP_SECONDS = 3600.0
"""A wall clock that gains so much on the time since boot has been set."""
GAP_SECONDS = 7 * 86400.0
"""At the start: so long after the last use of anything, either the service was away or the clock is wrong."""
BELIEVED_AFTER_SECONDS = 86400.0


def boot_clock() -> float:
    """Seconds since boot, those of suspension among them; nobody sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class AgeClock:
    """Unix seconds for ages: the wall clock's, but a jump ahead counts only when it has stood for a day.

    A clock that is wrong by a year for an hour would else make everything unused for longer than
    `cache.max_unused`, and empty the store. A jump back is taken over at once: it makes all younger.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = boot_clock
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._made_at = wall()
        self._offset = self._made_at - steady()
        """From steady to believed time."""
        self._begun = False
        self._doubted_since: float | None = None

    def begin(self, uses: Iterable[float]) -> None:
        """`uses` are the times of last use of all that is stored: those of earlier lives tell where time was.

        Only the first call counts; call it before anything is removed for its age.
        """
        if self._begun:
            return
        self._begun = True
        last = max((used for used in uses if used < self._made_at), default=self._made_at)
        if self._made_at - last > GAP_SECONDS:
            self._offset = last - self._steady()

    def __call__(self) -> float:
        steady, wall = self._steady(), self._wall()
        ahead = wall - steady - self._offset
        if ahead <= JUMP_SECONDS:
            self._believe(wall - steady)
        elif self._doubted_since is None:
            self._doubted_since = steady
            _log.warning("the clock is %.0f s ahead of what it was: nothing ages by that for a day", ahead)
        elif steady - self._doubted_since >= BELIEVED_AFTER_SECONDS:
            self._believe(wall - steady)
        return steady + self._offset

    def _believe(self, offset: float) -> None:
        self._offset = offset
        self._doubted_since = None
