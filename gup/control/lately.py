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
