"""How fast fills go: looks at what is here of each, from time to time. Fetches nothing, asks no disk."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from gup.cache.store import Part
from gup.control.status import fill_of

_WINDOW_SECONDS = 5.0
_Sight = tuple[float, int]


class FillRates:
    """Sizes of the parts seen lately, by part and generation; those that ended are forgotten."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._seen: dict[tuple[str, int], deque[_Sight]] = {}

    def see(self, parts: Iterable[Part]) -> None:
        """Look at the fills under way."""
        now, seen = self._monotonic(), self._seen
        self._seen = {}
        for part in parts:
            sights = seen.get((part.id, part.generation), deque())
            sights.append((now, part.size_bytes))
            while len(sights) > 2 and sights[0][0] < now - _WINDOW_SECONDS:
                sights.popleft()
            self._seen[part.id, part.generation] = sights

    def row(
        self, part: Part, label: Callable[[tuple[str, str, str]], tuple[str, str]], wall: float
    ) -> dict[str, Any]:
        """A fill for the API: `fill_of`, and what the sights tell. `wall` is now, in Unix seconds."""
        fill = fill_of(part)
        key = part.state.key if part.state else None
        product, language = label((key.version, key.language, key.stream)) if key else (None, None)
        began_at = part.generation / 1e6  # a generation is the time at which it began, in microseconds
        rate = self._rate(part, wall - began_at)
        left = fill["length_bytes"] - part.size_bytes if fill["length_bytes"] is not None else None
        return fill | {
            "product": product,
            "language": language,
            "kind": str(part.state.kind) if part.state else None,
            "began_at": began_at,
            "bytes_per_second": rate,
            "remaining_seconds": left / rate if left is not None and rate else None,
        }

    def _rate(self, part: Part, age_seconds: float) -> float | None:
        """Over the last seconds; since its beginning when it was seen once only; None when that is now."""
        sights = self._seen.get((part.id, part.generation), deque())
        if len(sights) > 1 and sights[-1][0] > sights[0][0]:
            (then, before), (now, after) = sights[0], sights[-1]
            return max(0.0, (after - before) / (now - then))
        return part.size_bytes / age_seconds if age_seconds > 0 else None
