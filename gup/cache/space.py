"""Whether the store has room for one more body; asks for eviction, never evicts."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.02
_ASK_AGAIN_SECONDS = 0.1
_SETTLE_SECONDS = 0.25
"""A committed body is counted here for so long, until the controller has surely done so."""


class Space:
    """Promises of room, kept over all workers.

    `used()` is what bodies and unclaimed parts take plus what every worker has promised; `promise` changes
    this worker's share of the latter. `need` tells the controller how much is to be evicted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_size: Callable[[], int],
        min_free: Callable[[], int],
        used: Callable[[], int],
        promise: Callable[[int], None],
        need: Callable[[int], None],
    ) -> None:
        self._folder = folder
        self._max_size = max_size
        self._min_free = min_free
        self._used = used
        self._promise = promise
        self._need = need
        self._settling = 0

    def too_large(self, amount_bytes: int) -> bool:
        """Whether a body of this size can never be stored."""
        return amount_bytes > self._max_size()

    async def reserve(self, amount_bytes: int) -> bool:
        """Promise room, evicting if need be; False when there is none in time.

        The promise comes first: whoever makes room sees it, and of two that want the last room none
        oversteps.
        """
        self._promise(amount_bytes)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        ask_at = 0.0
        try:
            while (missing := self._missing(amount_bytes)) > 0:
                now = time.monotonic()
                if now >= deadline:
                    self._promise(-amount_bytes)
                    return False
                if now >= ask_at:
                    self._need(min(missing, amount_bytes))
                    ask_at = now + _ASK_AGAIN_SECONDS
                await asyncio.sleep(_POLL_SECONDS)
        except BaseException:
            self._promise(-amount_bytes)
            raise
        return True

    def release(self, amount_bytes: int, *, committed: bool) -> None:
        """Take a promise back. A committed body counts on here until the controller has surely counted it."""
        self._promise(-amount_bytes)
        if committed:
            self._settling += amount_bytes
            asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._settle, amount_bytes)

    def _settle(self, amount_bytes: int) -> None:
        self._settling -= amount_bytes

    def _missing(self, amount_bytes: int) -> int:
        over = self._used() + self._settling - self._max_size()
        disk = os.statvfs(self._folder)
        return max(over, self._min_free() + amount_bytes - disk.f_bavail * disk.f_frsize)
