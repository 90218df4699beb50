"""The rate to one client (`clients.rate`): the kernel's pacing, or our own where that has no effect."""

import contextlib
import logging
import socket
import struct
import time

log = logging.getLogger("gup.pacing")

_SO_MAX_PACING_RATE = 47
"""socket(7); the socket module has no name for it."""
_BUFFER_SECONDS = 0.25
_LEAST_BUFFER_BYTES = 8 * 1024
_MOST_BUFFER_BYTES = 1 << 20
_SLICE_SECONDS = 0.05
_LEAST_SLICE_BYTES = 1024
_PROBE_BYTES = 128 * 1024
_PROBE_PER_SECOND = 4_000_000
_PROBE_SEGMENT_BYTES = 1400
_PROBES = 2
_PACED_SECONDS = 0.012
"""A paced probe takes 27 ms, an unpaced one 0.3 ms (both measured on loopback)."""


class Pacer:
    """One connection's allowance where the kernel does not pace: small slices, each paid for by waiting.

    Times are seconds on any one monotonic clock. Its connection alone calls `took`.
    """

    __slots__ = ("_paid_until", "_per_second", "slice_bytes")

    def __init__(self, per_second: int, now: float) -> None:
        self._per_second = per_second
        self._paid_until = now
        self.slice_bytes = max(_LEAST_SLICE_BYTES, int(per_second * _SLICE_SECONDS))

    def delay_seconds(self, now: float) -> float:
        """How long to wait before the next slice may leave; 0: now."""
        return max(0.0, self._paid_until - now)

    def took(self, sent_bytes: int, now: float) -> None:
        """So much has left. A timer that was late is made up for, by one slice at most."""
        self._paid_until = max(self._paid_until, now - _SLICE_SECONDS) + sent_bytes / self._per_second


class Pacing:
    """How connections accepted from now on are held to `per_second` bytes; 0 is unlimited."""

    def __init__(self, per_second: int, *, by_kernel: bool) -> None:
        self.per_second = per_second
        self.by_kernel = by_kernel
        # What waits in the kernel leaves at the rate too: a large buffer would hold minutes of it, beyond the
        # reach of time-outs and counted as sent.
        wanted = int(per_second * _BUFFER_SECONDS)
        self._buffer_bytes = min(max(wanted, _LEAST_BUFFER_BYTES), _MOST_BUFFER_BYTES)

    @property
    def grace_seconds(self) -> float:
        """How long a full buffer takes to leave: a client that takes no byte for so long may be well."""
        return 4 * self._buffer_bytes / self.per_second if self.per_second else 0.0

    def begin(self, sock: socket.socket, now: float) -> Pacer | None:
        """Hold a new connection to the rate; the pacer that its sender must obey, if the kernel does not."""
        if not self.per_second:
            return None
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
        if self.by_kernel:
            try:
                set_kernel_rate(sock, self.per_second)
            except OSError:  # it took it at the start; a connection is not lost over this
                pass
            else:
                return None
        return Pacer(self.per_second, now)


def set_kernel_rate(sock: socket.socket, per_second: int) -> None:
    """SO_MAX_PACING_RATE in 64 bits (Linux 4.20), else in 32; OSError when it is refused."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("=Q", per_second))
    except OSError:
        narrow = struct.pack("=I", min(per_second, 0xFFFF_FFFE))  # all ones would mean unlimited
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, narrow)


def kernel_paces() -> bool:
    """Whether the kernel paces for real, found by trying on loopback; blocks for some 60 ms.

    The fastest of the tries counts: other work on the machine makes a try slower, never faster.
    """
    try:
        fastest = min(_probe_seconds() for _ in range(_PROBES))
    except OSError as error:
        log.warning("the kernel does not pace connections (%s): gup does it itself", error)
        return False
    paces = fastest >= _PACED_SECONDS
    if paces:
        log.info("connections are paced by the kernel")
    else:
        log.warning("the kernel takes a pacing rate and does not heed it: gup paces connections itself")
    return paces


def _probe_seconds() -> float:
    """How long a paced connection takes for the probe.

    The kernel lets a connection's first ten segments go unpaced, and on loopback they are of 64 KiB: so they
    are made small.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        receiving = stack.enter_context(socket.socket())
        receiving.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _PROBE_SEGMENT_BYTES)
        receiving.settimeout(1.0)
        receiving.connect(listening.getsockname())
        sending = stack.enter_context(listening.accept()[0])
        set_kernel_rate(sending, _PROBE_PER_SECOND)
        sending.setblocking(False)
        return _transfer_seconds(sending, receiving)


def _transfer_seconds(sending: socket.socket, receiving: socket.socket) -> float:
    began = time.monotonic()
    unsent, unread = _PROBE_BYTES, _PROBE_BYTES
    while unread:
        with contextlib.suppress(BlockingIOError):
            unsent -= sending.send(bytes(unsent)) if unsent else 0
        unread -= len(receiving.recv(_PROBE_BYTES))
    return time.monotonic() - began
