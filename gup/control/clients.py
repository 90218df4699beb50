"""Which client addresses were seen, and when last; bounded. Never does I/O."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

MAX_CLIENTS = 100_000
WINDOWS: Mapping[str, float] = {"1h": 3600.0, "1d": 86400.0, "7d": 7 * 86400.0}
"""The windows of `gup_clients_seen`, in seconds, the shortest first."""
_MOST_MOVED = 2000
"""So many leave a window in one count; of a crowd that was there at once the rest leaves at the next."""


class ClientsBook:
    """Last times by address, the longest unseen first; those beyond `limit` are forgotten.

    Each address stands in the shortest window that it was seen in, in the order of being seen; a count moves
    what has become too old to the next longer one. So a count costs what has changed, not what is known.
    """

    def __init__(self, limit: int = MAX_CLIENTS) -> None:
        self._ages: list[OrderedDict[str, float]] = [OrderedDict() for _ in (*WINDOWS, "older")]
        """By window, the last one for what none of them holds; an address stands in one of them."""
        self._limit = limit
        self.changed = False
        """Whether anybody was seen since this was last set to False (by whoever writes the book down)."""

    def __len__(self) -> int:
        return sum(map(len, self._ages))

    def see(self, addresses: Iterable[str], now: float) -> None:
        """Note that these asked at `now` (Unix seconds)."""
        youngest, *older = self._ages
        for address in addresses:
            for age in older:
                age.pop(address, None)
            youngest[address] = now
            youngest.move_to_end(address)
            self.changed = True
        self._forget()

    def _forget(self) -> None:
        for _ in range(len(self) - self._limit):
            next(age for age in reversed(self._ages) if age).popitem(last=False)

    def counts(self, now: float) -> dict[str, int]:
        """How many addresses were seen in each window."""
        for age, older, seconds in zip(self._ages, self._ages[1:], WINDOWS.values(), strict=False):
            gone = [address for address, at in islice(age.items(), _MOST_MOVED) if now - at > seconds]
            for address in gone:
                older[address] = age.pop(address)
        counts, total = {}, 0
        for window, age in zip(WINDOWS, self._ages, strict=False):
            total += len(age)
            counts[window] = total
        return counts

    def newest(self, limit: int) -> list[tuple[str, float]]:
        """The addresses seen last, with their times, newest first."""
        return list(islice(chain.from_iterable(reversed(age.items()) for age in self._ages), limit))

    def to_json(self) -> list[tuple[str, float]]:
        return list(chain.from_iterable(age.items() for age in reversed(self._ages)))

    def restore(self, rows: Any) -> None:
        """Take back what `to_json` gave; what is not of that form is left out. Newer sightings stay."""
        newer = self.to_json()
        self._ages = [OrderedDict() for _ in self._ages]
        well = list(_well_formed(rows))
        last = max((at for _, at in well), default=0.0)
        for address, at in well:
            for known in self._ages:
                known.pop(address, None)
            self._ages[sum(last - at > seconds for seconds in WINDOWS.values())][address] = at
            self.changed = True
        for address, at in newer:
            self.see([address], at)
        self._forget()


def _well_formed(rows: Any) -> Iterator[tuple[str, float]]:
    for row in rows if isinstance(rows, list) else ():
        match row:
            case [str(address), int() | float() as seen_at]:
                yield address, float(seen_at)
