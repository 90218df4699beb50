"""Storms of fulls: who asks for full packages where deltas exist, and what that costs. No I/O.

A client that was away too long needs the full (FIELD); many of them at once are a sign of something else, and
cost the LAN, and the WAN, hundreds of times what deltas do.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gup.content.key import Kind
from gup.control.rows import Stream
from gup.metrics import MAX_STREAMS

_log = logging.getLogger("gup.control.storms")

WINDOW_SECONDS = 600.0
FULLS = 10
"""So many of one stream in this window and the last, and more than deltas, are a storm if deltas exist."""
CALM_SECONDS = 60.0
"""It has ended when it was none for so long."""
MAX_ADDRESSES = 1000
"""Counted of each stream and window; there may be more."""
SHOWN = 20


@dataclass(slots=True)
class _Window:
    """What was asked for in one stretch of time. `fulls` is by key."""

    number: int = 0
    fulls: Counter[str] = field(default_factory=Counter)
    deltas: int = 0
    addresses: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Asked:
    """One stream: this window, the one before, and since when there is a storm, and was last."""

    now: _Window = field(default_factory=_Window)
    before: _Window = field(default_factory=_Window)
    since: float | None = None
    last: float = 0.0

    def turn(self, number: int) -> None:
        if number != self.now.number:
            self.before = self.now if number == self.now.number + 1 else _Window()
            self.now = _Window(number)

    @property
    def fulls(self) -> Counter[str]:
        return self.now.fulls + self.before.fulls

    @property
    def deltas(self) -> int:
        return self.now.deltas + self.before.deltas

    @property
    def addresses(self) -> Counter[str]:
        return self.now.addresses + self.before.addresses


@dataclass(frozen=True, slots=True)
class Storm:
    """One that stands. Counts are of the last ten to twenty minutes; times are Unix seconds.

    `addresses` are those that asked most often, of `clients` in all (at least so many). `lan_bytes` is what
    the fulls are in all, `wan_bytes` what they are fetched for once; `delta_bytes` is what a delta of the
    stream is on average.
    """

    stream: Stream
    since: float
    fulls: int
    deltas: int
    clients: int
    addresses: tuple[str, ...]
    lan_bytes: int
    wan_bytes: int
    delta_bytes: int


class Storms:
    """By stream; as many streams as are counted apart. `look` alone begins and ends a storm, and logs it."""

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Asked] = OrderedDict()

    def _asked(self, stream: Stream, now: float) -> _Asked:
        asked = self._streams.setdefault(stream, _Asked())
        self._streams.move_to_end(stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        asked.turn(int(now // WINDOW_SECONDS))
        return asked

    def count(self, stream: Stream, kind: Kind, key: str, times: int, now: float) -> None:
        """Clients asked so many times for a full or a delta."""
        asked = self._asked(stream, now)
        if kind is Kind.FULL:
            asked.now.fulls[key] += times
        elif kind is Kind.DELTA:
            asked.now.deltas += times

    def note_client(self, stream: Stream, address: str, times: int, now: float) -> None:
        """Whose requests for fulls these were."""
        addresses = self._asked(stream, now).now.addresses
        if address in addresses or len(addresses) < MAX_ADDRESSES:
            addresses[address] += times

    def look(self, now: float, has_deltas: Callable[[Stream], bool]) -> None:
        """Begin and end storms; to be called once a second or so."""
        for stream, asked in self._streams.items():
            asked.turn(int(now // WINDOW_SECONDS))
            fulls = asked.fulls.total()
            if fulls >= FULLS and fulls > asked.deltas and has_deltas(stream):
                asked.last = now
                if asked.since is None:
                    asked.since = now
                    _log.warning(
                        "a storm of fulls: %d clients asked for %d full packages of %s, where deltas exist",
                        len(asked.addresses),
                        fulls,
                        "/".join(stream),
                    )
            elif asked.since is not None and not 0 <= now - asked.last < CALM_SECONDS:
                _log.warning(
                    "the storm of fulls of %s is over, after %d s",
                    "/".join(stream),
                    asked.last - asked.since,
                )
                asked.since = None

    def flags(self) -> Mapping[Stream, bool]:
        """Whether there is a storm, for every stream that was asked for."""
        return {stream: asked.since is not None for stream, asked in self._streams.items()}

    def standing(
        self, length_of: Callable[[str], int], delta_bytes_of: Callable[[Stream], int]
    ) -> list[Storm]:
        """The storms there are. `length_of` a key is 0 while it is unknown."""
        return [
            self._storm(stream, asked, asked.since, length_of, delta_bytes_of(stream))
            for stream, asked in self._streams.items()
            if asked.since is not None
        ]

    @staticmethod
    def _storm(
        stream: Stream, asked: _Asked, since: float, length_of: Callable[[str], int], delta_bytes: int
    ) -> Storm:
        fulls, addresses = asked.fulls, asked.addresses
        return Storm(
            stream,
            since,
            fulls.total(),
            asked.deltas,
            len(addresses),
            tuple(address for address, _ in addresses.most_common(SHOWN)),
            sum(times * length_of(key) for key, times in fulls.items()),
            sum(length_of(key) for key in fulls),
            delta_bytes,
        )
