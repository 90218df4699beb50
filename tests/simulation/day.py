"""Who asks for what, and when, on a working day: clients that are switched on, and three revisions.

Sizes are those that vendors publish: a full of virus definitions has 110 MB, a delta 200 kB, one over days up
to 1.5 MB. Sizes of the other streams, and the shares of clients, are assumptions.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

HOUR = 3600
REVISIONS = (5 * HOUR, 11 * HOUR, 16 * HOUR)
"""When the manager has each."""
_LONGEST_AWAY_DAYS = 6
_SHIFT = 20


class Stream(NamedTuple):
    moniker: str
    share: float
    """Of the clients."""
    full_bytes: int
    delta_bytes: int


STREAMS = (
    Stream("{07B590B3-9282-482F-BBAA-6D515D385869}", 0.95, 110_000_000, 200_000),
    Stream("{535CB6A4-441F-4E8A-A897-804CD859100E}", 0.05, 110_000_000, 200_000),
    Stream("{55DE35DC-862A-44C9-8A2B-3EF451665D0A}", 1.0, 20_000_000, 100_000),
    Stream("{D6AEBC07-D833-485F-9723-6C908D37F806}", 1.0, 15_000_000, 100_000),
    Stream("{B6DC6C8F-46FA-40C7-A806-B669BE1D2D19}", 1.0, 2_000_000, 20_000),
)


class Request(NamedTuple):
    second: int
    client: int
    key: int
    """Its place in `Day.keys`."""


class Day:
    """`keys` and `sizes` of all content that somebody takes; `requests` in the order of time."""

    def __init__(self, clients: int, seed: int, storm: float = 0.05) -> None:
        """`storm`: the share of clients that were away too long, and need fulls."""
        self.clients, self.keys, self.sizes = clients, [], []
        self._numbers: dict[str, int] = {}
        self._packed = sorted(self._asked(random.Random(seed), storm))

    def requests(self) -> Iterator[Request]:
        mask = (1 << _SHIFT) - 1
        for packed in self._packed:
            yield Request(packed >> 2 * _SHIFT, packed >> _SHIFT & mask, packed & mask)

    def __len__(self) -> int:
        return len(self._packed)

    def _asked(self, chance: random.Random, storm: float) -> Iterator[int]:
        for client in range(self.clients):
            on, off = 0, 24 * HOUR
            if chance.random() >= 0.08:  # else it is a server, which is always on
                on = int(min(max(chance.gauss(8.5 * HOUR, 0.4 * HOUR), 6.5 * HOUR), 11 * HOUR))
                off = on + 9 * HOUR
            away = chance.random()
            streams = [s for s in STREAMS if s.share == 1.0]
            streams.append(STREAMS[0] if chance.random() < STREAMS[0].share else STREAMS[1])
            held = -1
            for revision, since in enumerate(REVISIONS):
                until = REVISIONS[revision + 1] if revision + 1 < len(REVISIONS) else off
                begin = max(on, since)
                second = begin + chance.randrange(600 if begin == on else HOUR)
                if second >= min(until, off):
                    continue
                for stream in streams:
                    key = self._key(stream, revision, held, away, storm, chance)
                    yield second << 2 * _SHIFT | client << _SHIFT | key
                held = revision

    def _key(
        self, stream: Stream, revision: int, held: int, away: float, storm: float, chance: random.Random
    ) -> int:
        """The full, the delta from the revision before, or one over some days."""
        if held < 0 and away < storm:
            return self._number(stream, revision, "full.zip", stream.full_bytes)
        days = chance.randrange(2, _LONGEST_AWAY_DAYS + 1) if held < 0 and away < storm + 0.1 else 0
        size = stream.delta_bytes * (1 + days)
        return self._number(stream, revision, f"xdelta{held}_{days}_To_{revision}.dax", size)

    def _number(self, stream: Stream, revision: int, file: str, size: int) -> int:
        key = f"any/any/{stream.moniker}/26113000{revision}/{file}"
        if key not in self._numbers:
            self._numbers[key] = len(self.keys)
            self.keys.append(key)
            self.sizes.append(size)
        return self._numbers[key]
