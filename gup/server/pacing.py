"""The rate to one client (`clients.rate`)."""

_SLICE_SECONDS = 0.05
_LEAST_SLICE_BYTES = 1024


class Pacer:
    """One connection's allowance: small slices, each paid for by waiting.

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
