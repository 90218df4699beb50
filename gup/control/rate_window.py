"""The increase of a counter over a time window, and the rate that this makes."""

from collections import deque


class RateWindow:
    """Told of a counter now and then, by a clock that only goes forward. Remembers some twenty readings."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._marks: deque[tuple[float, int]] = deque()
        self._last = (0.0, 0)

    def see(self, total: int, now: float) -> int:
        """Take in the counter's value; its increase within the window (0 at the first call)."""
        if not self._marks or now - self._marks[-1][0] >= self._seconds / 20:
            self._marks.append((now, total))
        while len(self._marks) > 1 and self._marks[1][0] <= now - self._seconds:
            self._marks.popleft()
        self._last = now, total
        return max(0, total - self._marks[0][1])

    def per_second(self) -> float | None:
        """The rate over the window; None while nothing has been compared."""
        if not self._marks or self._last[0] <= self._marks[0][0]:
            return None
        (then, before), (now, after) = self._marks[0], self._last
        return max(0.0, (after - before) / (now - then))

    def bytes_per_second(self) -> int:
        """The rate as a whole number, 0 while nothing has been compared."""
        return round(self.per_second() or 0)
