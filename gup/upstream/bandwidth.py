"""The WAN's rate, kept over all processes: who may take the next bytes, and when; never reads a byte itself.

One shared word is the nanosecond at which all that was taken is paid for (GCRA: a leaky bucket as one clock).
Who comes next is start-time fair queueing: every fill carries a tag that grows by what it took, the smallest
tag of the most urgent class goes first, and a class waits while a more urgent one wants anything.

What the kernel has received is beyond any limit, so each connection's receive buffer is bounded too.
"""

import asyncio
import os
import socket
import struct
import time
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from gup.fsutil import lock_range, unlock_range
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
_WINDOW_SLACK_SECONDS = 0.1
"""Beyond the round trip: a reader takes bytes in steps, and on a busy machine it is late."""
_LONGEST_ROUND_TRIP_SECONDS = 2.0
_LEAST_WINDOW_BYTES = 8 * 1024
_MOST_SLACK_BYTES = 2 << 20
_MOST_WINDOW_BYTES = 8 << 20
UNBOUNDED = 1 << 30
"""Bytes of a window beyond what TCP can have: the kernel's own limits hold."""
_USUAL_MOST_BUFFER_BYTES = 212_992
_SO_BUF_LOCK = 72
_WINDOW_STEP = 16
"""A buffer is set anew when it is wrong by more than this part of it."""
_TIMESTAMPS = 1
_TCP_INFO = struct.Struct("=5xB14xI44xI20xI")
"""Of Linux's `struct tcp_info`: tcpi_options, tcpi_rcv_mss, tcpi_rtt and tcpi_rcv_rtt."""


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
        self.windows: WeakSet[ReceiveWindow] = WeakSet()
        """Those of the answers that this process reads; each adds itself."""

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
        lock_range(self._fd, 0, wait=True)  # blocks for another's few instructions at most
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
            unlock_range(self._fd, 0)
        me.share.tag += amount
        return 0.0

    def close(self) -> None:
        os.close(self._fd)


class Socket(Protocol):
    """What a receive window needs of a socket; a transport's has it."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...
    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def window_bytes(rate: int, round_trip_seconds: float, segment_bytes: int, readers: int) -> int:
    """The least receive buffer that carries `rate` bytes a second; unbounded without a rate.

    Each connection gets the whole rate's round trip, since any of the `readers` may soon be the only one;
    what is more than that is there for them together. Below two segments a sender waits for a timer before
    it sends.
    """
    if rate <= 0:
        return UNBOUNDED
    needed = int(rate * min(round_trip_seconds, _LONGEST_ROUND_TRIP_SECONDS))
    slack = min(int(rate * _WINDOW_SLACK_SECONDS), _MOST_SLACK_BYTES) // readers
    return min(max(needed + slack, 2 * segment_bytes, _LEAST_WINDOW_BYTES), _MOST_WINDOW_BYTES)


class ReceiveWindow:
    """Keeps one connection's receive buffer at what the rate needs: else tens of MB pile up in the kernel.

    It is set when an answer begins, as the round trip is known then, and follows round trip and rate. Set
    before connecting, a small buffer would fix a small window scale, and so the largest window, for the
    connection's life. A buffer above net.core.rmem_max can't be set: there the kernel's tuning stays on,
    which makes room for about twice what is read in a round trip.
    """

    def __init__(self, wan: Wan, connection: Socket | None) -> None:
        self._wan = wan
        self._socket = connection
        self._bytes = 0
        wan.windows.add(self)
        self.follow()

    def follow(self) -> None:
        """Adjust the buffer when rate or round trip have changed; call it at each read."""
        rate = self._wan.rate_bytes_per_second
        if self._socket is None or (rate <= 0 and self._bytes == UNBOUNDED):
            return
        try:
            wanted = (
                window_bytes(rate, *_path(self._socket), len(self._wan.windows)) if rate > 0 else UNBOUNDED
            )
            if abs(wanted - self._bytes) > self._bytes // _WINDOW_STEP:
                _set_buffer(self._socket, wanted)
                self._bytes = wanted
        except OSError:
            self._socket = None  # closed: whoever reads is told so


def _path(connection: Socket) -> tuple[float, int]:
    """Round trip in seconds and the peer's segment.

    The round trip of handshake and request, or the receiver's own estimate when that is longer: it has the
    queues on the way in it. Without timestamps the latter measures a whole window and would feed on itself.
    """
    answer = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    options, segment_bytes, sent, received = _TCP_INFO.unpack(answer)
    microseconds = max(sent, received) if options & _TIMESTAMPS else sent
    return microseconds / 1e6, segment_bytes


def _set_buffer(connection: Socket, wanted: int) -> None:
    """Hold the buffer at `wanted`, or leave it to the kernel where it can't be as large."""
    if wanted <= _most_buffer_bytes():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)  # the kernel doubles it
    else:
        with suppress(OSError):  # Linux before 5.15: what was set before stays set
            connection.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)
    # The kernel bounds the window by the buffer that the connection began with until the clamp is raised.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, UNBOUNDED)


@cache
def _most_buffer_bytes() -> int:
    """What SO_RCVBUF can be set to; Linux's default where that can't be read."""
    try:
        return int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return _USUAL_MOST_BUFFER_BYTES
