"""The simulated WAN link: one token bucket that all connections share. Never sees what is sent."""

import asyncio
import time
from collections.abc import Callable

PIECE_BYTES = 16 * 1024
"""Most that a connection sends in one turn; small, so that connections share the link fairly."""

_SLACK_SECONDS = 0.01
"""How much unused time may be made up for: covers late wake-ups, far too little to be a burst."""


class Link:
    """A link of a fixed rate. Turns are given in the order of asking, so equal askers get equal shares."""

    def __init__(self, rate_bytes_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate_bytes_per_second` 0 is unlimited; `clock` is monotonic seconds."""
        assert rate_bytes_per_second >= 0, rate_bytes_per_second
        self._rate = rate_bytes_per_second
        self._clock = clock
        self._free_at_seconds = clock()

    def reserve(self, size_bytes: int) -> float:
        """Take the link's next free time for `size_bytes`; returns the seconds until they have passed it."""
        if not self._rate:
            return 0.0
        now = self._clock()
        start = max(self._free_at_seconds, now - _SLACK_SECONDS)
        self._free_at_seconds = start + size_bytes / self._rate
        return max(0.0, self._free_at_seconds - now)

    async def pass_through(self, size_bytes: int) -> None:
        """Return when `size_bytes` (at most PIECE_BYTES) have had their time on the link."""
        assert size_bytes <= PIECE_BYTES, size_bytes
        # Also without a wait the loop must turn, or one connection would keep the others from asking.
        await asyncio.sleep(self.reserve(size_bytes))
