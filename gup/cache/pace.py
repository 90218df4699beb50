"""The present rate of a body that grows: what the last seconds brought; knows no clock and no body."""

from collections import deque

_WINDOW_SECONDS = 4.0
_STEP_SECONDS = 0.5
"""Between two marks: with the window, what bounds their number."""


class Pace:
    """How fast a body grows at present. Times are on the monotonic clock and never go back.

    The mean over its whole life would be wrong for minutes after a link has become slow.
    """

    __slots__ = ("_came_at", "_marks", "began_at")

    def __init__(self, now: float) -> None:
        self.began_at = self._came_at = now
        self._marks = deque([(now, 0)])

    def begin_with(self, size: int, now: float) -> None:
        """The first `size` bytes were there before, which tells nothing of the rate."""
        self._came_at = now
        self._marks = deque([(now, size)])

    def came(self, size: int, now: float) -> None:
        """The body has `size` bytes by now."""
        self._came_at = now
        if now - self._marks[-1][0] >= _STEP_SECONDS:
            self._marks.append((now, size))
            while len(self._marks) > 1 and self._marks[1][0] <= now - _WINDOW_SECONDS:
                self._marks.popleft()

    def seconds_for(self, missing: int, size: int, now: float) -> float:
        """How long `missing` bytes beyond `size` will take.

        Where nothing has come for a while, the time of that silence is the best guess.
        """
        if missing <= 0:
            return 0.0
        since, size_then = self._marks[0]
        gained, silent_seconds = size - size_then, now - self._came_at
        return max(missing * (now - since) / gained if gained > 0 else 0.0, silent_seconds)
