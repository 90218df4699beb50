"""Whether the store has room for one more body; asks for eviction, never evicts."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from gup.cache.disk import told_apart

_PATIENCE_SECONDS = 2.0
"""For eviction to show an effect; each further one is waited for as long again."""
_SHORT_PATIENCE_SECONDS = 0.25
"""For some time after none could be made: not every miss shall wait for what others waited for in vain."""
_VAIN_SECONDS = 30.0
_MAKE_BYTES = 1 << 20
"""How much is evicted for a disk that refuses though its figures promise room."""
_POLL_SECONDS = 0.02
_ASK_AGAIN_SECONDS = 0.1
_SETTLE_SECONDS = 0.25
"""A committed body is counted here for so long, until the controller has surely done so."""


class Space:
    """Promises of room, kept over all workers.

    `used()` is what bodies and unclaimed parts take plus what every worker has promised; `promise` changes
    this worker's share of the latter. `need` tells the controller how much is to be evicted; if its flag is
    set, whatever the figures say. `evictions()` changes when something was.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_size: Callable[[], int],
        min_free: Callable[[], int],
        used: Callable[[], int],
        promise: Callable[[int], None],
        need: Callable[[int, bool], None],
        evictions: Callable[[], int],
    ) -> None:
        self._folder = folder
        self._max_size = max_size
        self._min_free = min_free
        self._used = used
        self._promise = promise
        self._need = need
        self._evictions = evictions
        self._settling = 0
        self._in_vain_until = 0.0

    def too_large(self, amount_bytes: int) -> bool:
        """Whether a body of this size can never be stored."""
        return amount_bytes > self._max_size()

    async def reserve(self, amount_bytes: int) -> bool:
        """Promise room, evicting if need be; False when there is none in time.

        The promise comes first: whoever makes room sees it, and of two that want the last room none
        oversteps. Nothing is evicted for what would not fit into the room of all that is stored.
        """
        if self._hopeless(amount_bytes):
            return False
        self._promise(amount_bytes)
        patience = self._patience_seconds()
        deadline, least = time.monotonic() + patience, 1 << 62
        ask_at = 0.0
        try:
            while (missing := self._missing(amount_bytes)) > 0:
                now = time.monotonic()
                if missing < least:
                    least, deadline = missing, now + patience
                if now >= deadline:
                    self._promise(-amount_bytes)
                    self._in_vain_until = now + _VAIN_SECONDS
                    return False
                if now >= ask_at:
                    self._need(min(missing, amount_bytes), False)
                    ask_at = now + _ASK_AGAIN_SECONDS
                await asyncio.sleep(_POLL_SECONDS)
        except BaseException:
            self._promise(-amount_bytes)
            raise
        self._in_vain_until = 0.0
        return True

    async def make_room(self) -> bool:
        """Evict for a disk that is full though its figures told otherwise: a quota, inodes, another's files.

        False when nothing was evicted in time.
        """
        before = self._evictions()
        deadline = time.monotonic() + self._patience_seconds()
        self._need(_MAKE_BYTES, True)
        while self._evictions() == before:
            if time.monotonic() >= deadline:
                self._in_vain_until = deadline + _VAIN_SECONDS
                return False
            await asyncio.sleep(_POLL_SECONDS)
        self._in_vain_until = 0.0
        return True

    def _patience_seconds(self) -> float:
        return _SHORT_PATIENCE_SECONDS if time.monotonic() < self._in_vain_until else _PATIENCE_SECONDS

    def release(self, amount_bytes: int, *, committed: bool) -> None:
        """Take a promise back. A committed body counts on here until the controller has surely counted it."""
        self._promise(-amount_bytes)
        if committed:
            self._settling += amount_bytes
            asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._settle, amount_bytes)

    def _settle(self, amount_bytes: int) -> None:
        self._settling -= amount_bytes

    def _hopeless(self, amount_bytes: int) -> bool:
        """Whether the disk has too little room even without anything stored."""
        stored = self._used()  # 0 as long as it is not known
        return 0 < stored < self.short_on_disk(amount_bytes)

    def _missing(self, amount_bytes: int) -> int:
        over = self._used() + self._settling - self._max_size()
        return max(over, self.short_on_disk(amount_bytes))

    def short_on_disk(self, amount_bytes: int) -> int:
        """How much room the disk lacks for so many bytes and `cache.min_free`; 0 or less when it has it."""
        with told_apart():
            disk = os.statvfs(self._folder)
        return self._min_free() + amount_bytes - disk.f_bavail * disk.f_frsize
