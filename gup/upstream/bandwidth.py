"""The WAN's rate limit, shared by all processes, and its schedule.

The limit is a leaky bucket (GCRA): one shared word holds the time at which all bytes taken so far are paid
for. Its order is self-clocked fair queueing: each fill has a tag that grows by the bytes it takes; the
smallest tag in the most urgent class goes first, and a class waits while a more urgent one has waiters.

Bytes that the kernel has received escape the limit, so each connection's receive buffer is bounded too.
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
from datetime import datetime
from functools import cache
from pathlib import Path
from weakref import WeakSet
from zoneinfo import ZoneInfo

from gup import config
from gup.files import lock_range, unlock_range

_BURST_NS = 100_000_000
"""Unused time that may be caught up on: covers late wakeups on a busy machine; 1 % of ten seconds."""
_SLICE_SECONDS = 0.02
"""Bytes are paid for in slices of this duration: the longest time that an urgent fill waits for another."""
_LEAST_SLICE_BYTES = 2048
_MOST_SLICE_BYTES = 256 * 1024
_OVERDUE_NS = _BURST_NS + 30_000_000
"""A process that does not use its turn for this long is skipped, so that the link does not idle."""
_SHORTEST_SLEEP_SECONDS = 0.001
_WINDOW_SLACK_SECONDS = 0.1
"""Added to the round trip: readers take bytes in steps, and late on a busy machine."""
_LONGEST_ROUND_TRIP_SECONDS = 2.0
_LEAST_WINDOW_BYTES = 8 * 1024
_MOST_SLACK_BYTES = 2 << 20
_MOST_WINDOW_BYTES = 8 << 20
UNBOUNDED = 1 << 30
"""A window larger than TCP allows: only the kernel's own limits hold."""
_USUAL_MOST_BUFFER_BYTES = 212_992
_SO_BUF_LOCK = 72
_WINDOW_STEP = 16
"""A buffer is set again when it differs by more than 1/16."""
_TIMESTAMPS = 1
_TCP_INFO = struct.Struct("=5xB14xI44xI20xI")
"""Of Linux's `struct tcp_info`: tcpi_options, tcpi_rcv_mss, tcpi_rtt and tcpi_rcv_rtt."""


@dataclass(slots=True)
class Share:
    priority: int
    tag: int = 0


@dataclass(slots=True, order=True)
class _Waiter:
    rank: int
    number: int
    share: Share = field(compare=False)
    first: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


CLOCK_WORDS = 3
"""The time clock, the virtual clock, and the rate at which the time clock was set last."""


def at_rate(clock_ns: int, now_ns: int, old: int, new: int) -> int:
    """The time clock when the rate becomes `new`: as many bytes are owed, or to spare, as at the `old` rate.

    Without this a debt would last as long at a higher rate, and credit would grow with each change.
    """
    if old in (0, new):
        return clock_ns
    return max(0, now_ns + max(clock_ns - now_ns, -_BURST_NS) * old // new)


class Wan:
    """The rate limit of all fills on this machine together.

    Its words begin at `words[clock]`. They change under a lock that is held for a few instructions and that
    the kernel frees when its holder dies. `rate` returns bytes per second, 0 for unlimited; it is called for
    each slice. `paid` is told the priority and the bytes of each slice.
    """

    def __init__(
        self,
        words: "memoryview[int]",
        clock: int,
        turns: "Turns",
        rate: Callable[[], int],
        lock: Path,
        paid: Callable[[int, int], None] = lambda _priority, _bytes: None,
    ) -> None:
        self._words, self._clock, self._turns, self._paid = words, clock, turns, paid
        self.rate = rate
        self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._waiting: list[_Waiter] = []
        self._numbers = 0
        self.windows: WeakSet[ReceiveWindow] = WeakSet()
        """Windows of the responses that this process reads; each adds itself."""

    @classmethod
    def free(cls) -> "Wan":
        """Without a rate, for bytes that cross no WAN."""
        words = memoryview(bytearray(8 * CLOCK_WORDS)).cast("Q")
        return cls(words, 0, Turns.none(), lambda: 0, Path(os.devnull))

    @property
    def slice_bytes(self) -> int:
        """Limit of one read, so that other waiters come soon; 0 without a rate."""
        rate = self.rate()
        return min(max(int(rate * _SLICE_SECONDS), _LEAST_SLICE_BYTES), _MOST_SLICE_BYTES) if rate > 0 else 0

    async def pay(self, amount_bytes: int, share: Share) -> None:
        """Wait until `amount_bytes`, just read, are due; the next read may follow then."""
        while amount_bytes > 0 and (slice_bytes := self.slice_bytes):
            await self._take(min(amount_bytes, slice_bytes), share)
            amount_bytes -= slice_bytes

    async def _take(self, amount: int, share: Share) -> None:
        """Wait for this share's turn and for the clock, then advance both."""
        share.tag = max(share.tag, self._words[self._clock + 1])
        self._numbers += 1
        me = _Waiter(rank(share.priority, share.tag), self._numbers, share)
        insort(self._waiting, me)
        self._first_changed()
        try:
            while (seconds := self._try(me, amount)) > 0:
                if self._waiting[0] is me:  # not for long: the rate may change
                    await asyncio.sleep(min(seconds, _SLICE_SECONDS))
                else:
                    me.first.clear()
                    await me.first.wait()
        finally:
            self._waiting.remove(me)
            self._first_changed()

    def sort_anew(self, share: Share) -> None:
        """Wake the waiter after a change of the share's priority, so that it is queued by it."""
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
        """Take the bytes and return 0, or return the seconds until the next try."""
        rate = self.rate()
        if rate <= 0:
            return 0.0
        if self._waiting[0] is not me:
            return _SHORTEST_SLEEP_SECONDS
        words, clock = self._words, self._clock
        lock_range(self._fd, 0, wait=True)  # blocks for another's few instructions at most
        try:
            now = time.monotonic_ns()
            if words[clock + 2] != rate:
                words[clock] = at_rate(words[clock], now, words[clock + 2], rate)
                words[clock + 2] = rate
            early = words[clock] - now
            if early > 0:
                return max(early / 1e9, _SHORTEST_SLEEP_SECONDS)
            if early > -_OVERDUE_NS and not self._turns.mine():
                return _SHORTEST_SLEEP_SECONDS
            words[clock] = max(words[clock], now - _BURST_NS) + amount * 1_000_000_000 // rate
            me.share.tag += amount
            # The end of the slice, not its start: a new share comes after all that wait now. If it came
            # before them, a stream of bodies of one slice each would keep larger ones waiting for ever.
            words[clock + 1] = max(words[clock + 1], me.share.tag)
        finally:
            unlock_range(self._fd, 0)
        self._paid(me.share.priority, amount)
        return 0.0

    def close(self) -> None:
        os.close(self._fd)


def window_bytes(rate: int, round_trip_seconds: float, segment_bytes: int, readers: int) -> int:
    """The smallest receive buffer that carries `rate` bytes a second; unbounded without a rate.

    Each connection gets the bytes of a round trip at the full rate, since any of the `readers` may soon be
    the only one; the slack is divided among them. With less than two segments a sender waits for a timer.
    """
    if rate <= 0:
        return UNBOUNDED
    needed = int(rate * min(round_trip_seconds, _LONGEST_ROUND_TRIP_SECONDS))
    slack = min(int(rate * _WINDOW_SLACK_SECONDS), _MOST_SLACK_BYTES) // readers
    return min(max(needed + slack, 2 * segment_bytes, _LEAST_WINDOW_BYTES), _MOST_WINDOW_BYTES)


class ReceiveWindow:
    """Bounds one connection's receive buffer by what the rate needs; else the kernel would buffer tens of MB.

    The buffer is set when a response begins, when the round trip is known, and follows round trip and rate.
    If it were set before connecting, a small one would fix a small window scale, and so the largest possible
    window, for the life of the connection. A buffer above net.core.rmem_max can't be set: the kernel's
    tuning stays on then, which allows about twice what is read in a round trip.
    """

    def __init__(self, wan: Wan, connection: socket.socket | None) -> None:
        self._wan = wan
        self._socket = connection
        self._bytes = 0
        wan.windows.add(self)
        self.follow()

    def follow(self) -> None:
        """Adjust the buffer to rate and round trip. Call this at each read."""
        rate = self._wan.rate()
        if self._socket is None or (rate <= 0 and self._bytes == UNBOUNDED):
            return
        try:
            wanted = window_bytes(rate, *_path(self._socket), len(self._wan.windows))
            if abs(wanted - self._bytes) > self._bytes // _WINDOW_STEP:
                self._set(self._socket, wanted)
        except (OSError, ValueError):  # ValueError: uvloop's socket, when it is closed
            self._socket = None  # closed: the next read fails

    def _set(self, connection: socket.socket, wanted: int) -> None:
        if wanted <= _most_buffer_bytes():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)  # the kernel doubles it
        else:
            with suppress(OSError):  # Linux before 5.15: the old size stays set
                connection.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)
        # Until the clamp is raised, the kernel bounds the window by the buffer at the time of connecting.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, UNBOUNDED)
        self._bytes = wanted


def _path(connection: socket.socket) -> tuple[float, int]:
    """Round trip in seconds, and the size of the peer's segments.

    The round trip is that of handshake and request, or the receiver's estimate if longer, which includes
    queues on the way. Without TCP timestamps that estimate measures a whole window and would only grow.
    """
    answer = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    options, segment_bytes, sent, received = _TCP_INFO.unpack(answer)
    return (max(sent, received) if options & _TIMESTAMPS else sent) / 1e6, segment_bytes


@cache
def _most_buffer_bytes() -> int:
    """The largest value for SO_RCVBUF; Linux's default if it can't be read."""
    try:
        return int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return _USUAL_MOST_BUFFER_BYTES


# --- turns

NOBODY = (1 << 64) - 1
_RANK_BITS = 60


def rank(priority: int, tag: int) -> int:
    """A waiter's rank as one word: priority (0 is the most urgent), then tag; smaller goes first."""
    return (priority << _RANK_BITS) | min(tag, (1 << _RANK_BITS) - 1)


def priority_of(rank: int) -> int:
    return rank >> _RANK_BITS


class Turns:
    """Order among processes that wait for the same thing: one shared word per process.

    The word is NOBODY less the rank of the process's first waiter; so 0, as in a new file, is nobody, and a
    process that never waits holds no other up. Only its process writes it. Processes that are no longer
    `alive` are skipped; a successor clears the word when it starts.
    """

    def __init__(self, words: "memoryview[int]", mine: int, alive: Callable[[int], bool]) -> None:
        self._words, self._mine, self._alive = words, mine, alive
        words[mine] = 0

    @classmethod
    def none(cls) -> "Turns":
        return cls(memoryview(bytearray(8)).cast("Q"), 0, lambda _: True)

    def ask(self, first: int | None) -> None:
        self._words[self._mine] = 0 if first is None else NOBODY - first

    def free(self) -> bool:
        return all(not word or not self._alive(block) for block, word in enumerate(self._words))

    def mine(self) -> bool:
        """Whether this process's first waiter goes before those of all other processes."""
        own = self._words[self._mine]
        return not any(other > own and self._alive(block) for block, other in enumerate(self._words))


# --- the schedule

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def rate_at(wan: config.Wan, local: datetime) -> int:
    """The rate in bytes per second at `local`, the site's wall-clock time; 0 is unlimited.

    The first matching row decides, else `wan.rate`. Also on the day that clocks change, 08:00 is when the
    site's clocks show it.
    """
    return next((row.rate for row in wan.schedule if is_within(row, local)), wan.rate)


def is_within(hours: config.WanHours, local: datetime) -> bool:
    """Whether the site's clocks show one of these hours; `to` is the first minute after them."""
    minute = f"{local.hour:02}:{local.minute:02}"
    today, yesterday = _DAYS[local.weekday()], _DAYS[local.weekday() - 1]
    begun, not_over = hours.from_ <= minute, minute < hours.to
    if hours.from_ < hours.to:
        return today in hours.days and begun and not_over
    return (today in hours.days and begun) or (yesterday in hours.days and not_over)  # over midnight


def site_time(settings: config.Settings, unix_seconds: float) -> datetime:
    """The site's wall-clock time: in `site.time_zone`, else in the machine's time zone."""
    zone = ZoneInfo(settings.site.time_zone) if settings.site.time_zone else None
    return datetime.fromtimestamp(unix_seconds, zone)
