"""The WAN's rate, kept over all processes: who may take the next bytes, and when; never reads a byte itself.

One shared word is the nanosecond at which all that was taken is paid for (GCRA: a leaky bucket as one clock).
Who comes next is start-time fair queueing: every fill carries a tag that grows by what it took, the smallest
tag of the most urgent class goes first, and a class waits while a more urgent one wants anything.
"""

import asyncio
import fcntl
import os
import struct
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gup.upstream.turns import Turns, rank

_BURST_NS = 100_000_000
"""Credit for time not used: covers a busy machine's late wakes, and is 1 % of any ten seconds."""
_SLICE_SECONDS = 0.02
"""Bytes are paid for in slices of so much of the rate: an urgent one waits for no more than that."""
_LEAST_SLICE_BYTES = 2048
_MOST_SLICE_BYTES = 256 * 1024
_OVERDUE_NS = _BURST_NS + 30_000_000
"""A process whose turn it is and that does not come is passed over, so that the link never idles."""
_SHORTEST_SLEEP_SECONDS = 0.001
_FLOCK = struct.Struct("hhqqi4x")
_LOCK = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
_UNLOCK = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0)


@dataclass(slots=True)
class Share:
    """What one download has taken, for fairness. `tag` is in bytes on the machine's virtual clock."""

    priority: int
    tag: int = 0


@dataclass(slots=True, order=True)
class _Waiter:
    rank: int
    number: int
    share: Share = field(compare=False)
    first: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


class Wan:
    """What all fills of the machine may take together.

    `words[clock]` is the time clock, `words[clock + 1]` the virtual one; both move under an
    open-file-description lock that is held for a few instructions and that the kernel frees when its holder
    dies. `rate` gives bytes per second, 0 for unlimited; it is asked at each slice.
    """

    def __init__(
        self, words: "memoryview[int]", clock: int, turns: Turns, rate: Callable[[], int], lock: Path
    ) -> None:
        self._words = words
        self._clock = clock
        self._turns = turns
        self._rate = rate
        self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._waiting: list[_Waiter] = []
        self._numbers = 0

    @property
    def limited(self) -> bool:
        return self._rate() > 0

    @property
    def rate_bytes_per_second(self) -> int:
        """The rate in force; 0 is unlimited."""
        return self._rate()

    @property
    def slice_bytes(self) -> int:
        """The most to read at once so that nobody waits long behind it; 0 without a rate."""
        return self._slice(self._rate())

    def _slice(self, rate: int) -> int:
        return min(max(int(rate * _SLICE_SECONDS), _LEAST_SLICE_BYTES), _MOST_SLICE_BYTES) if rate > 0 else 0

    async def pay(self, amount_bytes: int, share: Share) -> None:
        """Return when `amount_bytes`, just read, are due: the next read then comes in time."""
        left = amount_bytes
        while left > 0 and (rate := self._rate()) > 0:
            piece = min(left, self._slice(rate))
            await self._take(piece, share)
            left -= piece

    async def _take(self, amount: int, share: Share) -> None:
        """Wait for this share's turn and for the clock, then move both on."""
        share.tag = max(share.tag, self._words[self._clock + 1])
        self._numbers += 1
        me = _Waiter(rank(share.priority, share.tag), self._numbers, share)
        insort(self._waiting, me)
        self._first_changed()
        try:
            while (seconds := self._try(me, amount)) > 0:
                if self._waiting[0] is me:
                    await asyncio.sleep(seconds)
                else:
                    me.first.clear()
                    await me.first.wait()
        finally:
            self._waiting.remove(me)
            self._first_changed()

    def sort_anew(self, share: Share) -> None:
        """To be called when the share's priority was changed: what of it waits takes its new place."""
        for waiter in self._waiting:
            if waiter.share is share:
                waiter.rank = rank(share.priority, share.tag)
        self._waiting.sort()
        self._first_changed()

    def _first_changed(self) -> None:
        self._turns.ask(self._waiting[0].rank if self._waiting else None)
        if self._waiting:
            self._waiting[0].first.set()

    def _try(self, me: _Waiter, amount: int) -> float:
        """Take now (0), or the seconds until trying again is worth it."""
        rate = self._rate()
        if rate <= 0:
            return 0.0
        if self._waiting[0] is not me:
            return _SHORTEST_SLEEP_SECONDS
        words, clock = self._words, self._clock
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _LOCK)  # blocks for another's few instructions at most
        try:
            now = time.monotonic_ns()
            early = words[clock] - now
            if early > 0:
                return max(early / 1e9, _SHORTEST_SLEEP_SECONDS)
            if early > -_OVERDUE_NS and not self._turns.mine():
                return _SHORTEST_SLEEP_SECONDS
            words[clock] = max(words[clock], now - _BURST_NS) + amount * 1_000_000_000 // rate
            words[clock + 1] = max(words[clock + 1], me.share.tag)
        finally:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _UNLOCK)
        me.share.tag += amount
        return 0.0

    def close(self) -> None:
        os.close(self._fd)
