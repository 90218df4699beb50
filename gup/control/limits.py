"""Every limit with what is in use of it, for `/api/v1/status` and `/metrics`. Pure; enforces nothing."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from gup.config import Settings

_WINDOW_SECONDS = 5.0


class Meter:
    """How fast bytes move, over the last seconds. Told of the total once a second."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, total_bytes: int, now: float) -> None:
        """The total at `now`, seconds on a clock that only goes forward."""
        self._seen.append((now, total_bytes))
        while len(self._seen) > 2 and self._seen[0][0] < now - _WINDOW_SECONDS:
            self._seen.popleft()

    def bytes_per_second(self) -> int:
        """0 before there are two looks."""
        if len(self._seen) < 2:
            return 0
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        return max(0, round((after - before) / (now - then))) if now > then else 0


def sum_of(totals: Mapping[str, int], metric: str) -> int:
    """Over all series of a metric."""
    return sum(count for name, count in totals.items() if name.partition("{")[0] == metric)


def numbers(settings: Settings) -> dict[str, int]:
    """The limits that are numbers of something; those that are not in force are absent."""
    every = {
        "connections": settings.listen.max_connections,
        "connections_per_address": settings.clients.max_connections_per_address,
        "downloads": settings.clients.max_downloads,
        "fills": settings.fill.max,
    }
    found = {name: limit for name, limit in every.items() if limit}
    # without a limit on downloads nobody ever waits; with one, a queue of 0 is a limit too
    return found | ({"queue": settings.clients.queue} if settings.clients.max_downloads else {})


def limits_of(
    settings: Settings, totals: Mapping[str, int], *, size_bytes: int, wan_rate: int, wan_used: int
) -> dict[str, Any]:
    """Limit (None: unlimited) and use of each; rates are bytes per second.

    What is in use of a limit on each client or each connection is no one number, and so left out.
    """
    most = numbers(settings)

    def row(name: str, word: str) -> dict[str, int | None]:
        return {"limit": most.get(name), "used": totals.get(word, 0)}

    return {
        "downloads": row("downloads", "gup_client_downloads_in_progress"),
        "queue": row("queue", "gup_client_downloads_queued"),
        "connections": row("connections", "gup_client_connections"),
        "connections_per_address": {"limit": most.get("connections_per_address")},
        "client_rate_bytes_per_second": {"limit": settings.clients.rate or None},
        "wan_rate_bytes_per_second": {"limit": wan_rate or None, "used": wan_used},
        "cache_size_bytes": {"limit": settings.cache.max_size, "used": size_bytes},
        "fills": row("fills", "gup_fills_in_progress"),
    }
