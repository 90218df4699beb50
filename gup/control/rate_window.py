"""How much something that only grows has grown within a while; told of it now and then. No I/O."""

from collections import deque


class Lately:
    """The growth of one total over the last `seconds`, within a twentieth of that."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._step = seconds / 20
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, total: int, now: float) -> int:
        """The growth until `now`, seconds on a clock that only goes forward. What was there first is none."""
        if not self._seen or now - self._seen[-1][0] >= self._step:
            self._seen.append((now, total))
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._seconds:
            self._seen.popleft()
        return max(0, total - self._seen[0][1])


_RATE_SECONDS = 5.0


class Meter:
    """How fast bytes move, over the last seconds. Told of the total once a second."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, total_bytes: int, now: float) -> None:
        """The total at `now`, seconds on a clock that only goes forward."""
        self._seen.append((now, total_bytes))
        while len(self._seen) > 2 and self._seen[0][0] < now - _RATE_SECONDS:
            self._seen.popleft()

    def bytes_per_second(self) -> int:
        """0 before there are two looks."""
        if len(self._seen) < 2:
            return 0
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        return max(0, round((after - before) / (now - then))) if now > then else 0
