"""Which client addresses were seen, and when last; bounded. Never does I/O."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

MAX_CLIENTS = 100_000
WINDOWS: Mapping[str, float] = {"1h": 3600.0, "1d": 86400.0, "7d": 7 * 86400.0}
"""The windows of `gup_clients_seen`, in seconds."""


class ClientsBook:
    """Last times by address, the longest unseen first; those beyond `limit` are forgotten."""

    def __init__(self, limit: int = MAX_CLIENTS) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._limit = limit
        self.changed = False
        """Whether anybody was seen since this was last set to False (by whoever writes the book down)."""

    def __len__(self) -> int:
        return len(self._seen)

    def see(self, addresses: Iterable[str], now: float) -> None:
        """Note that these asked at `now` (Unix seconds)."""
        for address in addresses:
            self._seen[address] = now
            self._seen.move_to_end(address)
            self.changed = True
        while len(self._seen) > self._limit:
            self._seen.popitem(last=False)

    def counts(self, now: float) -> dict[str, int]:
        """How many addresses were seen in each window."""
        counts = dict.fromkeys(WINDOWS, 0)
        for seen_at in self._seen.values():
            for window, seconds in WINDOWS.items():
                counts[window] += now - seen_at <= seconds
        return counts

    def newest(self, limit: int) -> list[tuple[str, float]]:
        """The addresses seen last, with their times, newest first."""
        newest: list[tuple[str, float]] = []
        for address in reversed(self._seen):
            if len(newest) == limit:
                break
            newest.append((address, self._seen[address]))
        return newest

    def to_json(self) -> list[tuple[str, float]]:
        return list(self._seen.items())

    def restore(self, rows: Any) -> None:
        """Take back what `to_json` gave; what is not of that form is left out. Newer sightings stay."""
        newer = self._seen
        self._seen = OrderedDict()
        for row in rows if isinstance(rows, list) else ():
            match row:
                case [str(address), int() | float() as seen_at]:
                    self.see([address], float(seen_at))
        for address, seen_at in newer.items():
            self.see([address], seen_at)
